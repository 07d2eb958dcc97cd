"""Layers that keep the compressed bytes of their weight and decode it when they are called.

Rules: a layer keeps the face of its dense class, its hooks and its bias. Its weight is frozen: no parameter
any more, and a copy for whoever reads it. What it computes is, bit for bit, what the dense layer computes
from the decoded weight; where a CUDA device multiplies without decoding, sums have an order of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping
from typing import Any, Self

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..codec.options import Options
from ..errors import MismatchError, SfpError
from . import operators, packed
from .derivatives import How, linear
from .files import Device, require_device
from .kept import KeptWeights

# Where a layer's bytes are in its ``state_dict``.
BYTES = "weight_sfp"

# Kind of device -> whether autocast knows of it. Asked here: the compilers of some versions of torch cannot
# trace the question.
_AUTOCAST_IS_THERE: dict[str, bool] = {
    kind: torch.amp.is_autocast_available(kind) for kind in ("cpu", "cuda", "meta", "mps", "xla", "xpu")
}

# Bytes that a layer had -> those that it has now, so that tied layers get the same ones again.
_now: MutableMapping[torch.Tensor, weakref.ref[torch.Tensor]] = WeakTensorKeyDictionary()


class Compressed(nn.Module):
    """What the compressed layers share.

    Attributes:
        weight_sfp: a buffer, uint8 [bytes]: an `.sfp` file with the weight alone; tied layers have the same.
        weight_shape: rows and columns.
        weight_dtype: what the weight is converted to; `to` changes it.
        weight_trains: whether the weight is to train again once the layer is dense.
        kept: what keeps decoded weights.
    """

    weight_sfp: torch.Tensor
    weight_shape: tuple[int, int]
    weight_dtype: torch.dtype
    weight_trains: bool
    kept: KeptWeights

    def _begin(self, shape: tuple[int, int], dtype: torch.dtype, data: torch.Tensor) -> None:
        """Sets what a layer has beside its dense class's attributes."""
        self.weight_shape = shape
        self.weight_dtype = dtype
        self.weight_trains = False
        self.kept = KeptWeights()
        self.register_buffer(BYTES, data)

    def _copy_of_weight(self) -> torch.Tensor:
        copied: torch.Tensor = operators.decode(
            self.weight_sfp, self.weight_shape, self.weight_dtype, self.kept.token
        )
        return copied

    # The weight, decoded: a copy, on the layer's device.
    weight: Any = property(_copy_of_weight)

    def _put(self, data: torch.Tensor) -> None:
        """Takes other bytes. Whoever had the same ones as this layer, and takes equal ones, shares them."""
        before = self.weight_sfp
        reference = _now.get(before)
        other = None if reference is None else reference()
        if other is not None and _are_equal(other, data):
            data = other
        elif data is not before:
            _now[before] = weakref.ref(data)
        self._buffers[BYTES] = data

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moves the bytes and notes the dtype; the rest as in any module."""
        before = self.weight_sfp
        apply: Callable[..., object] = super()._apply
        apply(fn, recurse)
        after = self.weight_sfp
        if after.dtype != torch.uint8:  # `type` asks every tensor to be converted
            after = before.to(after.device)
        like = torch.empty(0, dtype=self.weight_dtype, device=before.device)
        self.weight_dtype = fn(like).dtype
        self._buffers[BYTES] = before
        self._put(after)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes bytes of any length; or a dense weight, which is encoded losslessly."""
        rest = dict(state_dict)
        given, dense = rest.pop(prefix + BYTES, None), rest.pop(prefix + "weight", None)
        if given is None and dense is None:
            if strict:
                missing_keys.append(prefix + BYTES)
        else:
            try:
                self._put(self._taken(given, dense, bool(local_metadata.get("assign_to_params_buffers"))))
            except SfpError as error:
                error_msgs.append(f"{prefix}{BYTES}: {error}")
        mine = self._buffers.pop(BYTES)  # done already
        try:
            super()._load_from_state_dict(
                rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._buffers[BYTES] = mine

    def _taken(self, given: torch.Tensor | None, dense: torch.Tensor | None, assign: bool) -> torch.Tensor:
        """The bytes to have, of those given or of a dense weight."""
        if given is None:
            assert dense is not None
            given = packed.pack(dense.to(self.weight_dtype))
        packed.require_shape(given, self.weight_shape)
        if assign:
            return given
        device = torch.device("cpu") if self.weight_sfp.is_meta else self.weight_sfp.device
        return given.detach().to(device, copy=True)

    def extra_repr(self) -> str:
        """As of the dense class, and the bytes."""
        return f"{super().extra_repr()}, compressed={self.weight_sfp.numel():,} bytes"


class SfpLinear(Compressed, nn.Linear):
    """A linear layer whose weight stays compressed and is decoded when the layer is called.

    Gradients flow to input and bias, forward derivatives too outside of ``torch.compile``. Made by
    `compress_model`, or by `of`; one that is constructed takes its weight by ``load_state_dict``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As `torch.nn.Linear`, without a weight yet; the bias is 0.

        Raises:
            OptionError: there is no such device.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        dtype = torch.get_default_dtype() if dtype is None else dtype
        device = None if device is None else require_device(device)
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))
        self._begin((out_features, in_features), dtype, torch.empty(0, dtype=torch.uint8, device=device))

    @classmethod
    def of(cls, dense: nn.Linear, options: Options | None = None) -> SfpLinear:
        """A compressed layer that shares the dense one's bias; its weight is encoded, losslessly by default.

        Raises:
            OptionError: the options do not fit.
        """
        made = cls(dense.in_features, dense.out_features, False, dense.weight.device, dense.weight.dtype)
        made.bias = dense.bias
        made._put(packed.pack(dense.weight, options).to(dense.weight.device))
        return made.train(dense.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features].

        Raises:
            InvalidFileError, UnsupportedError, LimitError: the bytes are damaged or refused.
        """
        bias: torch.Tensor | None = self.bias
        compute = self.weight_dtype
        # Autocast does not cast for operators of one's own: this is what it does for the dense layer.
        if _autocasts(input.device.type) and torch.float64 not in (input.dtype, compute):
            compute = torch.get_autocast_dtype(input.device.type)
            input = input.to(compute)
            bias = None if bias is None else bias.to(compute)
        how = How(self.out_features, False, self.weight_dtype, compute, self.kept.token)
        return linear(input, bias, self.weight_sfp, how)


class SfpEmbedding(Compressed, nn.Embedding):
    """An embedding whose weight stays compressed; of few rows only the segments that hold them are decoded.

    Made by `compress_model`, or by `of`; one that is constructed takes its weight by ``load_state_dict``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As `torch.nn.Embedding`, without a weight yet. ``padding_idx`` is for the dense layer made of it.

        Raises:
            MismatchError: ``padding_idx`` is no row.
            OptionError: there is no such device.
        """
        nn.Module.__init__(self)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise MismatchError(f"padding_idx is {padding_idx}, there are {num_embeddings} rows")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        dtype = torch.get_default_dtype() if dtype is None else dtype
        device = None if device is None else require_device(device)
        self._begin((num_embeddings, embedding_dim), dtype, torch.empty(0, dtype=torch.uint8, device=device))

    @classmethod
    def of(cls, dense: nn.Embedding, options: Options | None = None) -> SfpEmbedding:
        """A compressed layer; the weight is encoded, losslessly by default.

        Raises:
            OptionError: the options do not fit.
            MismatchError: the layer changes its weight when it is called (``max_norm``).
        """
        if dense.max_norm is not None:
            raise MismatchError("an embedding with max_norm changes its weight when it is called")
        weight = dense.weight
        made = cls(dense.num_embeddings, dense.embedding_dim, dense.padding_idx, weight.device, weight.dtype)
        made.norm_type, made.scale_grad_by_freq = dense.norm_type, dense.scale_grad_by_freq
        made.sparse = dense.sparse
        made._put(packed.pack(weight, options).to(weight.device))
        return made.train(dense.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Numbers of rows, [...] -> [..., embedding_dim].

        Raises:
            IndexError: there is no such row.
            InvalidFileError, UnsupportedError, LimitError: the bytes are damaged or refused.
        """
        out: torch.Tensor = operators.embedding(
            input, self.weight_sfp, self.embedding_dim, self.weight_dtype, self.kept.token
        )
        return out


# ---------------------------------------------------------------------------- from dense and back, in place


def compressed_class(module: nn.Module) -> type[Compressed] | None:
    """What a layer becomes; None for all others, such as subclasses, which may have ways of their own."""
    if "weight" not in module._parameters:
        return None
    if type(module) is nn.Linear:
        return SfpLinear
    if type(module) is nn.Embedding and module.max_norm is None:
        return SfpEmbedding
    return None


def dense_names(model: nn.Module) -> dict[str, str]:
    """Names in the ``state_dict``, those of compressed layers' bytes -> those of their weights once dense."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Compressed):
            start = f"{path}." if path else ""
            found[start + BYTES] = f"{start}weight"
    return found


def make_compressed(module: nn.Module, data: torch.Tensor, kept: KeptWeights) -> None:
    """Turns a dense layer into a compressed one. It stays the same object: whoever has it, has it still.

    Args:
        module: one with a `compressed_class`.
        data: its bytes.
        kept: what keeps decoded weights.
    """
    wanted = compressed_class(module)
    weight = module._parameters.pop("weight")
    assert wanted is not None
    assert weight is not None
    module.__class__ = wanted
    assert isinstance(module, Compressed)
    rows, columns = weight.shape
    module._begin((rows, columns), weight.dtype, data)
    module.weight_trains, module.kept = weight.requires_grad, kept


def make_dense(module: Compressed, weight: nn.Parameter) -> None:
    """Turns a compressed layer into a dense one with that weight; it stays the same object."""
    del module._buffers[BYTES]
    for name in ("weight_shape", "weight_dtype", "weight_trains", "kept"):
        del module.__dict__[name]
    others = module._parameters
    dense: nn.Module = module
    dense.__class__ = nn.Linear if isinstance(module, SfpLinear) else nn.Embedding
    dense._parameters = {"weight": weight, **others}


def _autocasts(kind: str) -> bool:
    """Whether autocast is on for a kind of device."""
    there = _AUTOCAST_IS_THERE.get(kind)
    if there is None:  # a kind of somebody's own
        there = torch.amp.is_autocast_available(kind)
    return there and torch.is_autocast_enabled(kind)


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.device != other.device or one.shape != other.shape:
        return False
    return one.is_meta or torch.equal(one, other)
