"""Derivatives of a compressed linear layer with respect to its input and its bias; the weight is frozen.

Rules: the derivative with respect to the input uses the same operator with `turned` inverted. It decodes the
weight again; no decoded weight is saved for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from ..errors import MismatchError
from . import operators


class How(NamedTuple):
    """The operator's arguments that are not tensors, in the operator's order.

    Attributes:
        features: size of the result's last dimension.
        turned: True multiplies by the weight, False by its transpose.
        dtype, compute: the weight is converted to `dtype`, then to `compute`.
        kept: token of the cache of decoded weights.
    """

    features: int
    turned: bool
    dtype: torch.dtype
    compute: torch.dtype
    kept: str


def linear(x: torch.Tensor, bias: torch.Tensor | None, data: torch.Tensor, how: How) -> torch.Tensor:
    """Returns x @ weight.T + bias, or x @ weight if ``how.turned``; differentiable.

    Args:
        x: [..., columns]; [..., rows] if ``how.turned``.
        bias: [rows], or None. Must be None if ``how.turned``.
        data: the compressed bytes of the weight.
        how: the operator's other arguments.

    Returns:
        [..., how.features].
    """
    # The compiler accepts operators, but not autograd functions with their own forward derivatives. An
    # operator has no forward derivative: torch would use 0. Outside the compiler, the autograd function is
    # used only if it is needed: torch inspects its signature at every call, which takes longer than the
    # product.
    if torch.compiler.is_compiling() or not (_is_transformed() or _has_tangent(x) or _has_tangent(bias)):
        call = operators.compute_linear if _is_plain(x, bias, data) else operators.linear
        out: torch.Tensor = call(x, bias, data, *how)
        return out
    apply: Callable[..., torch.Tensor] = _Linear.apply
    return apply(x, bias, data, *how)


# Returns whether a transform of torch.func is active.
_is_transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active


def _is_plain(x: torch.Tensor, bias: torch.Tensor | None, data: torch.Tensor) -> bool:
    """Returns whether a call can skip torch's dispatcher: no gradient, tracer, mode or profiler needs it.

    The dispatcher takes half of the CPU time of a call.
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
    """Returns whether a tracer, mode or transform of torch is active; new tensors may then belong to it."""
    return bool(_is_transformed() or _modes() or torch._C._get_tracing_state() is not None)


_PLAIN = (type(None), torch.Tensor, torch.nn.Parameter)
# Returns the number of active dispatch modes.
_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


def _has_tangent(tensor: torch.Tensor | None) -> bool:
    """Returns whether a tensor has a tangent, that is, forward derivatives are taken with respect to it."""
    unpack: Callable[..., Any] = forward_ad.unpack_dual
    return tensor is not None and unpack(tensor).tangent is not None


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, _, data, *how = inputs
    ctx.save_for_backward(data)
    ctx.how, ctx.width, ctx.shape = How(*how), x.shape[-1], output.shape


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Returns the gradients of the input, by the same operator with `turned` inverted, and of the bias."""
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
    """The operator with forward derivatives and support for vmap."""

    @staticmethod
    def forward(x: torch.Tensor, bias: torch.Tensor | None, data: torch.Tensor, *how: Any) -> Any:
        """Calls the operator."""
        return operators.linear(x, bias, data, *how)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Saves the compressed bytes for the backward pass and for forward derivatives."""
        _remember(ctx, inputs, output)
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Returns the gradients of the inputs."""
        return _backward(ctx, *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Returns the tangent of the output: the operator is linear, so it is applied to the tangents."""
        (data,) = ctx.saved_tensors
        of_x, of_bias, *_ = tangents
        out = None if of_x is None else linear(of_x, of_bias, data, ctx.how)
        return of_bias.expand(ctx.shape) if out is None else out

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Any, bias: Any, data: Any, *how: Any) -> tuple[Any, int]:
        """Calls the operator with the batch as one more leading dimension.

        Raises:
            MismatchError: the weight is batched too.
        """
        of_x, of_bias, of_data, *_ = in_dims
        if of_data is not None:  # a batch needs files of equal length; weights have different ones
            raise MismatchError(
                "vmap over compressed weights is not supported; "
                "call the layers one by one, or decompress them"
            )
        x = x.expand(info.batch_size, *x.shape) if of_x is None else x.movedim(of_x, 0)
        if of_bias is None:
            return linear(x, bias, data, How(*how)), 0
        out = linear(x, None, data, How(*how))
        each = bias.movedim(of_bias, 0)
        return out + each.reshape(len(each), *(1 for _ in x.shape[2:]), each.shape[-1]), 0
