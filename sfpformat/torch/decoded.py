"""The memory of decoded weights, and which compressed layers share one.

Rules: who asks for a layer's weight while somebody has it gets the same memory, so that ties are seen and
writes through one tensor are read through another. What was written is encoded into every layer that shares
the weight; memory that a layer does not follow any more refuses to be written.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..errors import OptionError, SfpError
from . import operators, packed
from .derivatives import is_observed
from .kept import KeptWeights, version_of

# Where a layer keeps its bytes: the name of the buffer.
BYTES = "weight_sfp"

# What cannot be done with the weight, for messages.
FROZEN = (
    "is frozen and takes no part in gradients and transforms; write detached values under torch.no_grad(), "
    "or make the model dense with decompress_model"
)


class Holder(Protocol):
    """A compressed layer, as this module needs it; `layers.Compressed` says what the attributes are."""

    weight: Any
    weight_sfp: torch.Tensor
    weight_shape: tuple[int, int]
    weight_dtype: torch.dtype
    kept: KeptWeights
    _buffers: dict[str, torch.Tensor | None]

    def title(self) -> str:
        """What messages call the layer."""


_lock = threading.RLock()
_holders: weakref.WeakSet[Holder] = weakref.WeakSet()
_decoded: weakref.WeakValueDictionary[tuple[object, ...], Decoded] = weakref.WeakValueDictionary()
_awaited: list[Callable[[], object]] = []


def before_first_layer(action: Callable[[], object]) -> None:
    """Has something done once, before the process has its first compressed layer."""
    _awaited.append(action)


def register(layer: Holder) -> None:
    """Notes a layer, so that writes to a weight find all layers that share it."""
    with _lock:
        while _awaited:
            _awaited.pop()()
        _holders.add(layer)


def unregister(layer: Holder) -> None:
    """Forgets a layer that is not compressed any more."""
    with _lock:
        _holders.discard(layer)


def holders_of(data: torch.Tensor) -> list[Holder]:
    """The layers whose bytes these are."""
    with _lock:
        return [layer for layer in _holders if layer._buffers.get(BYTES) is data]


def expire(data: torch.Tensor) -> None:
    """Tells weights that were decoded from these bytes that the bytes were replaced: writes are refused."""
    with _lock:
        for decoded in [found for found in _decoded.values() if found.data is data]:
            decoded.is_current = False
            _decoded.pop(decoded.key, None)


class Decoded:
    """The memory of one decoded weight, shared by all tensors that stand for it.

    Attributes:
        layer, title: one that has the weight, and what messages call it.
        data: the bytes that the memory was decoded from, or encoded to.
        shape, dtype: of the weight.
        kept: what keeps decoded weights for the layer.
        is_current: False once the layer's bytes were replaced in a way that the memory did not follow.
        key: what `decoded_of` finds it by.
    """

    def __init__(self, layer: Holder, key: tuple[object, ...]) -> None:
        self.layer, self.title = layer, layer.title()
        self.data, self.version = layer.weight_sfp, version_of(layer.weight_sfp)
        self.shape, self.dtype = layer.weight_shape, layer.weight_dtype
        self.kept = layer.kept
        self.is_current = True
        self.key = key
        self._memory: torch.Tensor | None = None

    @property
    def memory(self) -> torch.Tensor:
        """The weight as a plain tensor, [rows, columns]; decoded when it is first asked for.

        Raises:
            MismatchError: the layer has no weight yet.
            InvalidFileError, UnsupportedError, LimitError: the bytes are damaged or refused.
        """
        if self._memory is None:
            # No inference tensor: torch does not count writes to those.
            with torch.inference_mode(False), torch.no_grad():
                self._memory = operators.decode(self.data, list(self.shape), self.dtype, self.kept.token)
        return self._memory

    def refused(self, why: str) -> OptionError:
        """The error for what cannot be done with the weight."""
        return OptionError(f"{self.title} is compressed: {why}")

    def drop(self) -> None:
        """Lets go of memory that may not be what the bytes mean."""
        self._memory = None
        self.is_current = False
        with _lock:
            _decoded.pop(self.key, None)

    def require_current(self) -> None:
        """Refuses a write where the layer would not see it.

        Raises:
            OptionError: the layer's bytes were replaced after this memory was decoded.
        """
        if not self.is_current or version_of(self.data) != self.version:
            raise self.refused("its weight was replaced since this tensor was taken; take layer.weight again")

    def write(self) -> None:
        """Encodes the memory into all layers that share the weight.

        Raises:
            OptionError: the memory is not the layer's any more, or cannot be encoded.
        """
        memory = self.memory
        if memory.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(memory):
            self.drop()
            raise self.refused(f"its weight {FROZEN}")
        try:
            self.require_current()
            data = encoded(memory, self.data)
        except SfpError:
            self.drop()
            raise
        for layer in holders_of(self.data):
            take(layer, data, self.shape, self.dtype)
        with _lock:
            _decoded.pop(self.key, None)
            self.data, self.version = data, version_of(data)
            self.key = _key_of(data, self.shape, self.dtype)
            _decoded[self.key] = self


def take(layer: Holder, data: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Gives a layer another weight."""
    layer._buffers[BYTES] = data
    layer.weight_shape, layer.weight_dtype = shape, dtype


def encoded(weight: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The bytes of a weight, losslessly, on its device; on the meta device, those that there were.

    Raises:
        OptionError: it has no data, or a dtype without a name in the format.
    """
    if weight.is_meta and before.is_meta:
        return before.clone()
    return packed.pack(weight.detach()).to(weight.device)


def decoded_of(layer: Holder) -> Decoded:
    """The decoded weight of a layer: the same memory for all who ask while one of them has it."""
    if is_observed() or type(layer.weight_sfp) is not torch.Tensor:
        return Decoded(layer, ())  # what a tracer or a transform makes is no one else's
    key = _key_of(layer.weight_sfp, layer.weight_shape, layer.weight_dtype)
    with _lock:
        found = _decoded.get(key)
        if found is None:
            found = _decoded[key] = Decoded(layer, key)
        return found


def _key_of(data: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> tuple[object, ...]:
    return id(data), version_of(data), shape, dtype


def require_matrix(value: object, layer: Holder) -> tuple[int, int]:
    """The shape of what is to be a layer's weight.

    Raises:
        OptionError: it is no matrix of numbers, or belongs to a transform of `torch.func`.
    """
    said = f"{layer.title()} is compressed"
    if not isinstance(value, torch.Tensor):
        raise OptionError(f"{said}: its weight cannot be a {type(value).__name__}, it is a tensor")
    if value.dim() != 2:
        raise OptionError(f"{said}: its weight is a matrix, not a tensor of shape {list(value.shape)}")
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise OptionError(f"{said}: its weight {FROZEN}")
    rows, columns = value.shape
    return rows, columns
