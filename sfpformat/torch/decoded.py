"""The memory of decoded weights, and the registry of compressed layers that share a weight.

Rules: while a decoded weight is alive, every read of the layer's weight returns the same memory. Therefore
torch recognises ties, and a value that is written through one tensor is read through another. A write is
encoded into every layer that shares the weight. A write to memory that is out of date is refused.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..errors import OptionError, SfpError
from . import operators, packed
from .by_memory import version_of
from .derivatives import is_observed
from .weight_cache import KeptWeights

# The name of the buffer that has a layer's compressed bytes.
BYTES = "weight_sfp"

# The end of the messages about gradients.
FROZEN = (
    "is frozen and does not support gradients and transforms; write detached values under torch.no_grad(), "
    "or call decompress_model first"
)


class Holder(Protocol):
    """The interface of a compressed layer that this module uses; `compressed.Compressed` documents it."""

    weight: Any
    weight_sfp: torch.Tensor
    weight_shape: tuple[int, int]
    weight_dtype: torch.dtype
    kept: KeptWeights
    _buffers: dict[str, torch.Tensor | None]

    def title(self) -> str:
        """The layer's name in messages."""


_lock = threading.RLock()
_holders: weakref.WeakSet[Holder] = weakref.WeakSet()
_decoded: weakref.WeakValueDictionary[tuple[object, ...], Decoded] = weakref.WeakValueDictionary()
_awaited: list[Callable[[], object]] = []


def before_first_layer(action: Callable[[], object]) -> None:
    """Registers a callback that runs once, before the process creates its first compressed layer."""
    _awaited.append(action)


def register(layer: Holder) -> None:
    """Registers a layer, so that writes to a weight reach all layers that share it."""
    with _lock:
        while _awaited:
            _awaited.pop()()
        _holders.add(layer)


def unregister(layer: Holder) -> None:
    """Removes a layer that is no longer compressed from the registry."""
    with _lock:
        _holders.discard(layer)


def holders_of(data: torch.Tensor) -> list[Holder]:
    """Returns the layers whose weight is these bytes: the same tensor object."""
    with _lock:
        return [layer for layer in _holders if layer._buffers.get(BYTES) is data]


def expire(data: torch.Tensor) -> None:
    """Marks weights that were decoded from these bytes as out of date, so that writes to them are refused."""
    with _lock:
        for decoded in [found for found in _decoded.values() if found.data is data]:
            decoded.is_current = False
            _decoded.pop(decoded.key, None)


class Decoded:
    """The memory of one decoded weight, shared by all tensors that represent it.

    Attributes:
        layer, title: a layer that has the weight, and its name in messages.
        data: the bytes that the memory was decoded from or last encoded to.
        shape, dtype: shape and dtype of the weight.
        kept: the layer's cache of decoded weights.
        is_current: False once the layer's bytes were replaced without this memory being updated.
        key: the key under which `decoded_of` finds it.
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
        """The weight as a plain tensor, [rows, columns]; decoded at the first access.

        Raises:
            MismatchError: the layer has no weight yet.
            InvalidFileError, UnsupportedError, LimitError: the bytes are damaged or refused.
        """
        if self._memory is None:
            # Not an inference tensor: torch does not count writes to those.
            with torch.inference_mode(False), torch.no_grad():
                self._memory = operators.decode(self.data, list(self.shape), self.dtype, self.kept.token)
        return self._memory

    def refused(self, why: str) -> OptionError:
        """Returns the error for an operation that the weight does not support."""
        return OptionError(f"{self.title} is compressed: {why}")

    def drop(self) -> None:
        """Releases memory that may differ from the compressed bytes, and marks it as out of date."""
        self._memory = None
        self.is_current = False
        with _lock:
            _decoded.pop(self.key, None)

    def require_current(self) -> None:
        """Refuses a write to memory that is no longer the layer's weight.

        Raises:
            OptionError: the layer's bytes were replaced after this memory was decoded.
        """
        if not self.is_current or version_of(self.data) != self.version:
            raise self.refused("its weight was replaced after this tensor was read; read layer.weight again")

    def write(self) -> None:
        """Encodes the memory into all layers that share the weight.

        Raises:
            OptionError: the memory no longer belongs to the layer, requires a gradient, or cannot be encoded.
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
    """Replaces a layer's bytes, shape and dtype."""
    layer._buffers[BYTES] = data
    layer.weight_shape, layer.weight_dtype = shape, dtype


def encoded(weight: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Encodes a weight losslessly, on its device. If both are on the meta device, clones ``before``.

    Raises:
        OptionError: the weight has no data, or its dtype has no name in the format.
    """
    if weight.is_meta and before.is_meta:
        return before.clone()
    return packed.pack(weight.detach()).to(weight.device)


def decoded_of(layer: Holder) -> Decoded:
    """Returns the decoded weight of a layer: the same object as long as a reference to it exists."""
    if is_observed() or type(layer.weight_sfp) is not torch.Tensor:
        return Decoded(layer, ())  # tensors of a tracer or a transform are not shared
    key = _key_of(layer.weight_sfp, layer.weight_shape, layer.weight_dtype)
    with _lock:
        found = _decoded.get(key)
        if found is None:
            found = _decoded[key] = Decoded(layer, key)
        return found


def _key_of(data: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> tuple[object, ...]:
    return id(data), version_of(data), shape, dtype


def require_matrix(value: object, layer: Holder) -> tuple[int, int]:
    """Returns the shape (rows, columns) of a value that is to become a layer's weight.

    Raises:
        OptionError: the value is not a two-dimensional tensor, or belongs to a transform of `torch.func`.
    """
    subject = f"{layer.title()} is compressed"
    if not isinstance(value, torch.Tensor):
        raise OptionError(f"{subject}: its weight cannot be a {type(value).__name__}; assign a tensor")
    if value.dim() != 2:
        raise OptionError(f"{subject}: its weight is a matrix, not a tensor of shape {list(value.shape)}")
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        raise OptionError(f"{subject}: its weight {FROZEN}")
    rows, columns = value.shape
    return rows, columns
