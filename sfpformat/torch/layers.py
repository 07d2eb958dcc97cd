"""Layers that hold their weight compressed and decode it when they are called.

Rules: a layer keeps the interface of its dense class, its hooks and its bias. Its weight is frozen: it is not
a parameter and has no gradient. ``layer.weight`` decodes it; a write to it is encoded into the layer (module
`weight`). The output equals that of the dense layer with the decoded weight, bit for bit. Exception: if a
CUDA device multiplies without decoding, the order of the sums differs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Self

import torch
import torch.fx
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import MismatchError, OptionError, SfpError
from ..options import Options
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
    unregister,
)
from .derivatives import How, linear
from .files import Device, require_device
from .kept import KeptWeights
from .weight import DecodedWeight

# Device type -> whether autocast supports it. Evaluated at import, because the compilers of some versions of
# torch cannot trace the call.
_AUTOCAST_IS_THERE: dict[str, bool] = {
    kind: torch.amp.is_autocast_available(kind) for kind in ("cpu", "cuda", "meta", "mps", "xla", "xpu")
}

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
        weight_dtype: the dtype that the weight is converted to; `to` changes it.
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
        """Returns the layer's name in messages."""
        if self.layer_name:
            return f"layer {self.layer_name!r}"
        rows, columns = self.weight_shape
        return f"the {type(self).__name__} of {rows} × {columns}"

    @property
    def weight(self) -> Any:
        """The weight, [rows, columns], decoded when it is read.

        Writes are encoded losslessly into this layer and the layers tied to it: in-place functions, ``out=``,
        assignment to elements, ``.data``, ``torch.nn.init``. Assigning to ``layer.weight`` replaces the
        weight
        of this layer only: the weight of another compressed layer becomes shared, other tensors are encoded.
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
                    f"{self.title()} has a weight of {list(self.weight_shape)}, not {list(shape)}"
                )
            take(self, encoded(value, self.weight_sfp), shape, value.dtype)

    @weight.deleter
    def weight(self) -> None:
        raise OptionError(f"{self.title()} is compressed and has no weight to delete; use decompress_model")

    def _share(self, weight: DecodedWeight) -> None:
        """Takes over the weight of another compressed layer, or an earlier weight of this layer."""
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
                f"{self.title()} is compressed and its weight cannot be a Parameter: make the model dense "
                "with decompress_model first; layer.weight = tensor encodes new values"
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
                f"{self.title()} is compressed and its weight is frozen: make it dense with decompress_model "
                "to train it; layer.bias.requires_grad_() is for the bias alone"
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
        """Saves the bytes under the weight's name; the decoded weight while `dense_states` is active."""
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
        """Returns the new bytes: the given ones after a check of their shape, or an encoded dense weight."""
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


class SfpLinear(Compressed, nn.Linear):
    """A linear layer whose weight stays compressed and is decoded when the layer is called.

    Input and bias have gradients, and, outside of ``torch.compile``, forward derivatives. `compress_model`
    and `of` create it. A layer created by its constructor gets its weight through ``load_state_dict``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Same arguments as `torch.nn.Linear`. The layer has no weight yet; the bias is 0.

        Raises:
            OptionError: the device does not exist.
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
        """Returns a compressed layer with the encoded weight, lossless by default; it shares the dense bias.

        Raises:
            OptionError: the options do not fit.
        """
        made = cls(dense.in_features, dense.out_features, False, dense.weight.device, dense.weight.dtype)
        made.bias = dense.bias
        made._put(packed.pack(dense.weight, options).to(dense.weight.device))
        return made.train(dense.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Maps [..., in_features] to [..., out_features].

        Raises:
            InvalidFileError, UnsupportedError, LimitError: the bytes are damaged or refused.
        """
        if isinstance(input, torch.fx.Proxy):
            return _called_symbolically(self, input)
        bias: torch.Tensor | None = self.bias
        compute = self.weight_dtype
        # Autocast does not cast for custom operators: this repeats what it does for the dense layer.
        if _autocasts(input.device.type) and torch.float64 not in (input.dtype, compute):
            compute = torch.get_autocast_dtype(input.device.type)
            input = input.to(compute)
            bias = None if bias is None else bias.to(compute)
        how = How(self.out_features, False, self.weight_dtype, compute, self.kept.token)
        return linear(input, bias, self.weight_sfp, how)


class SfpEmbedding(Compressed, nn.Embedding):
    """An embedding whose weight stays compressed. For few rows, only their segments are decoded.

    `compress_model` and `of` create it. A layer created by its constructor gets its weight through
    ``load_state_dict``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Same arguments as `torch.nn.Embedding`; the layer has no weight yet.

        ``padding_idx`` has an effect only after the layer becomes dense.

        Raises:
            MismatchError: ``padding_idx`` is out of range.
            OptionError: the device does not exist.
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
        """Returns a compressed layer with the encoded weight, lossless by default.

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
        """Maps row indices [...] to [..., embedding_dim].

        Raises:
            IndexError: an index is out of range.
            InvalidFileError, UnsupportedError, LimitError: the bytes are damaged or refused.
        """
        if isinstance(input, torch.fx.Proxy):
            return _called_symbolically(self, input)
        out: torch.Tensor = operators.embedding(
            input, self.weight_sfp, self.embedding_dim, self.weight_dtype, self.kept.token
        )
        return out


# ---------------------------------------------------------------------------- from dense and back, in place


def compressed_class(module: nn.Module) -> type[Compressed] | None:
    """Returns the compressed class of a layer; None if it cannot be compressed.

    Subclasses of Linear and Embedding return None: they may compute differently.
    """
    if "weight" not in module._parameters:
        return None
    if type(module) is nn.Linear:
        return SfpLinear
    if type(module) is nn.Embedding and module.max_norm is None:
        return SfpEmbedding
    return None


def compressed_weights(model: nn.Module) -> set[str]:
    """Returns the names under which the ``state_dict`` has the bytes of compressed weights."""
    return {
        f"{path}.weight" if path else "weight"
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Compressed)
    }


def make_compressed(module: nn.Module, data: torch.Tensor, kept: KeptWeights, name: str) -> None:
    """Turns a dense layer into a compressed one. The object stays the same, so references stay valid.

    Args:
        module: a layer with a `compressed_class`.
        data: the compressed bytes of its weight.
        kept: the cache of decoded weights.
        name: the layer's name in messages.
    """
    wanted = compressed_class(module)
    weight = module._parameters.pop("weight")
    assert wanted is not None
    assert weight is not None
    module.__class__ = wanted
    assert isinstance(module, Compressed)
    rows, columns = weight.shape
    module._begin((rows, columns), weight.dtype, data)
    module.weight_trains, module.kept, module.layer_name = weight.requires_grad, kept, name


def make_dense(module: Compressed, weight: nn.Parameter) -> None:
    """Turns a compressed layer into a dense one with that weight. The object stays the same."""
    unregister(module)
    data = module._buffers.pop(BYTES, None)  # a shallow copy has the same dictionary
    if data is not None:
        expire(data)
    module._non_persistent_buffers_set.discard(BYTES)
    for name in ("weight_shape", "weight_dtype", "weight_trains", "kept", "layer_name"):
        del module.__dict__[name]
    others = module._parameters
    dense: nn.Module = module
    dense.__class__ = nn.Linear if isinstance(module, SfpLinear) else nn.Embedding
    dense._parameters = {"weight": weight, **others}


def _called_symbolically(layer: Compressed, input: torch.fx.Proxy) -> Any:
    """Returns a call of the layer in a `torch.fx` graph, like that of a dense layer of torch.

    Raises:
        OptionError: the traced module is the layer itself.
    """
    tracer: Any = input.tracer
    path = tracer.path_of_module(layer)
    if not path:
        raise OptionError(f"{layer.title()} is traced within a model, not by itself")
    return tracer.create_proxy("call_module", path, (input,), {})


def _autocasts(kind: str) -> bool:
    """Returns whether autocast is enabled for a device type."""
    there = _AUTOCAST_IS_THERE.get(kind)
    if there is None:  # a custom device type
        there = torch.amp.is_autocast_available(kind)
    return there and torch.is_autocast_enabled(kind)


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.device != other.device or one.shape != other.shape:
        return False
    return one.is_meta or torch.equal(one, other)
