"""The base class of compressed layers: the weight, moves to devices and dtypes, and the ``state_dict``.

Rules: a layer's weight is frozen: it is not a parameter and has no gradient. Reading ``layer.weight`` decodes
it; writing to it encodes the new values into the layer (module `weight`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import MismatchError, OptionError, SfpError
from . import operators, packed
from .decoded import (
    BYTES,
    FROZEN,
    Decoded,
    decoded_of,
    encoded,
    expire,
    holders_of,
    register,
    require_matrix,
    take,
)
from .weight import DecodedWeight
from .weight_cache import KeptWeights

# The previous bytes of a layer -> its current bytes, so that tied layers share the same tensor again.
_now: MutableMapping[torch.Tensor, weakref.ref[torch.Tensor]] = WeakTensorKeyDictionary()


class _Dense(NamedTuple):
    """The state of an active `dense_states`.

    Attributes:
        layers: the layers that return decoded weights; None for all.
        made: the returned weights, kept alive so that tied weights stay one tensor.
    """

    layers: Collection[Compressed] | None
    made: list[Decoded]


_dense: ContextVar[_Dense | None] = ContextVar("dense states", default=None)


@contextmanager
def dense_states(layers: Collection[Compressed] | None = None) -> Iterator[None]:
    """Context in which ``state_dict`` returns decoded weights for these layers, or for all if None."""
    token = _dense.set(_Dense(layers, []))
    try:
        yield
    finally:
        _dense.reset(token)


class Compressed(nn.Module):
    """Base class of the compressed layers.

    In a ``state_dict`` the weight has the same name as in the dense model, ``weight``, and its value is the
    compressed bytes; a dense layer refuses them because of their shape. ``load_state_dict`` accepts bytes, or
    a dense weight, which it encodes losslessly.

    Attributes:
        weight_sfp: a buffer, uint8 [bytes]: an `.sfp` file with this weight alone. Tied layers share it.
        weight_shape: rows and columns.
        weight_dtype: the dtype that the decoded weight is converted to; `to` changes it.
        weight_trains: whether the weight requires a gradient again when the layer becomes dense.
        kept: the cache of decoded weights.
        layer_name: the layer's name in messages; "" if it has none.
    """

    weight_sfp: torch.Tensor
    weight_shape: tuple[int, int]
    weight_dtype: torch.dtype
    weight_trains: bool
    kept: KeptWeights
    layer_name: str

    def _begin(self, shape: tuple[int, int], dtype: torch.dtype, data: torch.Tensor) -> None:
        """Sets the attributes that the dense class does not have, and registers the layer."""
        self.weight_shape = shape
        self.weight_dtype = dtype
        self.weight_trains = False
        self.kept = KeptWeights()
        self.layer_name = ""
        self.register_buffer(BYTES, data, persistent=False)  # `_save_to_state_dict` gives them another name
        register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy or an unpickled layer, and registers it."""
        restore: Callable[..., object] = super().__setstate__
        restore(state)
        register(self)

    def title(self) -> str:
        """Returns the layer's name, or its class and shape, for messages."""
        if self.layer_name:
            return f"layer {self.layer_name!r}"
        rows, columns = self.weight_shape
        return f"the {type(self).__name__} of {rows} × {columns}"

    @property
    def weight(self) -> Any:
        """The weight, [rows, columns], of the dtype `weight_dtype`; decoded when it is read.

        Writes are encoded losslessly into this layer and the layers tied to it: in-place functions, ``out=``,
        assignment to elements, ``.data``, ``torch.nn.init``. Assigning to ``layer.weight`` replaces the
        weight of this layer only: the weight of another compressed layer becomes shared, other tensors are
        encoded.

        Inside ``torch.compile`` and ``torch.export`` the weight is a plain copy. Writes to that copy, and
        writes through ``untyped_storage()`` or ``data_ptr()``, cannot be detected and are lost without an
        error.

        Raises:
            OptionError: the assigned value requires a gradient, is a Parameter or is not a matrix; or a write
                cannot be encoded into the layer.
            MismatchError: the assigned value has another shape.
        """
        if torch.compiler.is_compiling():
            return self.decoded_weight()
        return DecodedWeight(decoded_of(self))

    @weight.setter
    def weight(self, value: Any) -> None:
        if isinstance(value, DecodedWeight) and value.is_whole:
            self._share(value)
        elif packed.may_be_bytes(value):
            self._buffers[BYTES] = value  # the bytes of a ``state_dict``, as ``functional_call`` passes them
        else:
            shape = require_matrix(value, self)
            if value.requires_grad and torch.is_grad_enabled():
                raise OptionError(f"{self.title()} is compressed: its weight {FROZEN}")
            if shape != self.weight_shape:
                raise MismatchError(
                    f"{self.title()}: the weight must have the shape {list(self.weight_shape)}, "
                    f"not {list(shape)}"
                )
            take(self, encoded(value, self.weight_sfp), shape, value.dtype)

    @weight.deleter
    def weight(self) -> None:
        raise OptionError(
            f"{self.title()} is compressed and its weight cannot be deleted: call decompress_model first"
        )

    def _share(self, weight: DecodedWeight) -> None:
        """Shares the weight of another compressed layer, or restores an earlier weight of this layer."""
        decoded = weight.decoded
        take(self, decoded.data, decoded.shape, decoded.dtype)

    def decoded_weight(self) -> torch.Tensor:
        """Returns a decoded copy of the weight as a plain tensor, on the layer's device."""
        copied: torch.Tensor = operators.decode(
            self.weight_sfp, self.weight_shape, self.weight_dtype, self.kept.token
        )
        return copied

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers a parameter. A `DecodedWeight` given as ``weight`` is shared with this layer instead.

        Raises:
            OptionError: the weight would become a Parameter, or be hidden by one.
        """
        if isinstance(param, DecodedWeight) and param.is_whole and name == "weight":
            self._share(param)
        elif name == "weight" or isinstance(param, DecodedWeight):
            raise OptionError(
                f"{self.title()} is compressed and its weight cannot be a Parameter: call decompress_model "
                "first; to encode new values, assign a plain tensor"
            )
        else:
            super().register_parameter(name, param)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freezes the bias, and keeps the weight frozen when the layer becomes dense again.

        Raises:
            OptionError: ``requires_grad`` is true; the weight cannot train.
        """
        if requires_grad:
            raise OptionError(
                f"{self.title()} is compressed and its weight is frozen: call decompress_model to train it; "
                "layer.bias.requires_grad_() changes the bias only"
            )
        self.weight_trains = False
        super().requires_grad_(False)
        return self

    def _put(self, data: torch.Tensor) -> None:
        """Replaces the bytes. Tied layers that get equal bytes share one tensor again."""
        before = self.weight_sfp
        reference = _now.get(before)
        other = None if reference is None else reference()
        if other is not None and _are_equal(other, data):
            data = other
        elif data is not before:
            _now[before] = weakref.ref(data)
        if data is not before:
            expire(before)
        self._buffers[BYTES] = data

    def _fill(self, data: torch.Tensor) -> None:
        """Replaces the bytes of this layer and of all layers that share the weight."""
        before = self.weight_sfp
        if not _are_equal(before, data):
            for layer in holders_of(before):
                layer._buffers[BYTES] = data
            expire(before)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moves the bytes to the new device and records the new dtype; the bytes are not converted."""
        before = self.weight_sfp
        apply: Callable[..., object] = super()._apply
        apply(fn, recurse)
        after = self.weight_sfp
        if after.dtype != torch.uint8:  # `Module.type` converts every tensor
            after = before.to(after.device)
        like = torch.empty(0, dtype=self.weight_dtype, device=before.device)
        dtype = fn(like).dtype
        self._buffers[BYTES] = before
        if dtype != self.weight_dtype:
            expire(before)
        self.weight_dtype = dtype
        self._put(after)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Saves the bytes under the weight's name, or the decoded weight while `dense_states` is active."""
        dense = _dense.get()
        if dense is None or not (dense.layers is None or self in dense.layers):
            weight = self.weight_sfp if keep_vars else self.weight_sfp.detach()
        else:
            dense.made.append(decoded_of(self))
            weight = dense.made[-1].memory
        destination[f"{prefix}weight"] = weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

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
        """Loads compressed bytes of any length, or a dense weight, which is encoded losslessly."""
        name, rest = f"{prefix}weight", dict(state_dict)
        given = rest.pop(name, None)
        if given is not None:
            assign = bool(local_metadata.get("assign_to_params_buffers"))
            try:
                data = self._taken(given, assign)
                if assign:
                    self._put(data)
                else:
                    self._fill(data)
            except SfpError as error:
                error_msgs.append(f"{name}: {error}")
        elif strict:
            missing_keys.append(name)
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _taken(self, given: torch.Tensor, assign: bool) -> torch.Tensor:
        """Returns the new bytes: those given, after a check of their shape, or an encoded dense weight."""
        if isinstance(given, torch.Tensor) and given.dtype.is_floating_point:
            given = packed.pack(given.to(self.weight_dtype))
        packed.require_shape(given, self.weight_shape)
        if assign:
            return given
        device = torch.device("cpu") if self.weight_sfp.is_meta else self.weight_sfp.device
        return given.detach().to(device, copy=True)

    def extra_repr(self) -> str:
        """Returns the dense class's text and the number of compressed bytes."""
        return f"{super().extra_repr()}, compressed={self.weight_sfp.numel():,} bytes"


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.device != other.device or one.shape != other.shape:
        return False
    return one.is_meta or torch.equal(one, other)
