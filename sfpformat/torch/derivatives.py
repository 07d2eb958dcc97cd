"""Derivatives of a linear layer with a compressed weight, to its input and its bias; the weight is frozen.

Rules: a derivative is the same operator, turned or not; the weight is decoded again for it, none is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from ..errors import MismatchError
from . import operators


class How(NamedTuple):
    """What the operator is told beside tensors, in its order.

    Attributes:
        features: last size of the result.
        turned: whether to multiply by the weight, and not by its transpose.
        dtype, compute: what the weight is converted to, and what that is then converted to.
        kept: token of what keeps decoded weights.
    """

    features: int
    turned: bool
    dtype: torch.dtype
    compute: torch.dtype
    kept: str


def linear(x: torch.Tensor, bias: torch.Tensor | None, data: torch.Tensor, how: How) -> torch.Tensor:
    """x @ weight.T + bias, differentiable; turned, x @ weight.

    Args:
        x: [..., columns]; turned, [..., rows].
        bias: [rows], or None, as it must be for turned.
        data: the bytes of the weight.
        how: features and the rest.

    Returns:
        [..., how.features].
    """
    # The compiler takes operators, and no functions that have forward derivatives of their own. (An operator
    # has no forward derivative: torch would take 0 for it.) Outside of it, too, functions are for those alone
    # who need them: torch inspects their signature at every call, which takes longer than the product.
    if torch.compiler.is_compiling() or not (_is_transformed() or _has_tangent(x) or _has_tangent(bias)):
        call = operators.compute_linear if _is_plain(x, bias, data) else operators.linear
        out: torch.Tensor = call(x, bias, data, *how)
        return out
    apply: Callable[..., torch.Tensor] = _Linear.apply
    return apply(x, bias, data, *how)


# Whether a transform of torch.func is on.
_is_transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active


def _is_plain(x: torch.Tensor, bias: torch.Tensor | None, data: torch.Tensor) -> bool:
    """Whether torch need not know of a call: there is no gradient, and nobody who traces or looks on.

    Half of what a call costs the processor is torch's way from an operator to what it does.
    """
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    if type(x) is not torch.Tensor or type(data) is not torch.Tensor or type(bias) not in _PLAIN:
        return False
    if x.is_meta or x.device != data.device or torch._C._get_tracing_state() is not None:
        return False
    return not (_modes() or torch._C._autograd._profiler_enabled())


def is_observed() -> bool:
    """Whether a tracer, a mode or a transform of torch looks on: tensors that are made now may be its own."""
    return bool(_is_transformed() or _modes() or torch._C._get_tracing_state() is not None)


_PLAIN = (type(None), torch.Tensor, torch.nn.Parameter)
# How many modes want to see what operators are called.
_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


def _has_tangent(tensor: torch.Tensor | None) -> bool:
    """Whether forward derivatives are taken with respect to a tensor."""
    unpack: Callable[..., Any] = forward_ad.unpack_dual
    return tensor is not None and unpack(tensor).tangent is not None


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, _, data, *how = inputs
    ctx.save_for_backward(data)
    ctx.how, ctx.width, ctx.shape = How(*how), x.shape[-1], output.shape


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """To the input, through the same operator the other way round, and to the bias."""
    (data,) = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        other = ctx.how._replace(turned=not ctx.how.turned, features=ctx.width)
        to_x = linear(gradient, None, data, other)
    if ctx.needs_input_grad[1]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return to_x, to_bias, None, *(None for _ in ctx.how)


torch.library.register_autograd("sfpformat::linear", _backward, setup_context=_remember)


class _Linear(torch.autograd.Function):
    """The operator, with forward derivatives and batches too."""

    @staticmethod
    def forward(x: torch.Tensor, bias: torch.Tensor | None, data: torch.Tensor, *how: Any) -> Any:
        """Calls the operator."""
        return operators.linear(x, bias, data, *how)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Remembers the bytes."""
        _remember(ctx, inputs, output)
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Of the one output."""
        return _backward(ctx, *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """It is linear."""
        (data,) = ctx.saved_tensors
        of_x, of_bias, *_ = tangents
        out = None if of_x is None else linear(of_x, of_bias, data, ctx.how)
        return of_bias.expand(ctx.shape) if out is None else out

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any, bias: Any, data: Any, *how: Any) -> tuple[Any, int]:
        """The batch is one more dimension in front.

        Raises:
            MismatchError: it is a batch of weights, too.
        """
        of_x, of_bias, of_data, *_ = in_dims
        if of_data is not None:  # files that happen to be equally long: nothing that models have
            raise MismatchError(
                "vmap has a batch of compressed weights, which is one weight for the layer; "
                "call the layers in turn, or decompress them"
            )
        x = x.expand(info.batch_size, *x.shape) if of_x is None else x.movedim(of_x, 0)
        if of_bias is None:
            return linear(x, bias, data, How(*how)), 0
        out = linear(x, None, data, How(*how))
        each = bias.movedim(of_bias, 0)
        return out + each.reshape(len(each), *(1 for _ in x.shape[2:]), each.shape[-1]), 0
