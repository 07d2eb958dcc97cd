"""Layers that keep the compressed bytes of their weight and decode it when they are called.

Rules: a layer keeps the face of its dense class, its hooks and its bias. Its weight is frozen: it is no
parameter and has no gradient. ``layer.weight`` decodes it; what is written there is encoded into the layer
(see `weight`). What a layer computes is, bit for bit, what the dense layer computes from the decoded weight;
where a CUDA device multiplies without decoding, sums have an order of their own.
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

# Kind of device -> whether autocast knows of it. Asked here: the compilers of some versions of torch cannot
# trace the question.
_AUTOCAST_IS_THERE: dict[str, bool] = {
    kind: torch.amp.is_autocast_available(kind) for kind in ("cpu", "cuda", "meta", "mps", "xla", "xpu")
}

# Bytes that a layer had -> those that it has now, so that tied layers get the same ones again.
_now: MutableMapping[torch.Tensor, weakref.ref[torch.Tensor]] = WeakTensorKeyDictionary()


class _Dense(NamedTuple):
    """What `dense_states` is on for.

    Attributes:
        layers: those that give decoded weights; None for all.
        made: what they gave, so that tied weights stay one tensor.
    """

    layers: Collection[Compressed] | None
    made: list[Decoded]


_dense: ContextVar[_Dense | None] = ContextVar("dense states", default=None)


@contextmanager
def dense_states(layers: Collection[Compressed] | None = None) -> Iterator[None]:
    """Lets ``state_dict`` give the decoded weights of these layers, or of all, as the dense model does."""
    token = _dense.set(_Dense(layers, []))
    try:
        yield
    finally:
        _dense.reset(token)


class Compressed(nn.Module):
    """What the compressed layers share.

    In a ``state_dict`` the weight has the name that it has in the dense model, ``weight``, and is its bytes:
    a dense layer that is given them refuses their shape. ``load_state_dict`` takes bytes, or a dense weight,
    which is encoded losslessly.

    Attributes:
        weight_sfp: a buffer, uint8 [bytes]: an `.sfp` file with the weight alone; tied layers have the same.
        weight_shape: rows and columns.
        weight_dtype: what the weight is converted to; `to` changes it.
        weight_trains: whether the weight is to train again once the layer is dense.
        kept: what keeps decoded weights.
        layer_name: what messages call the layer; "" where it has no name.
    """

    weight_sfp: torch.Tensor
    weight_shape: tuple[int, int]
    weight_dtype: torch.dtype
    weight_trains: bool
    kept: KeptWeights
    layer_name: str

    def _begin(self, shape: tuple[int, int], dtype: torch.dtype, data: torch.Tensor) -> None:
        """Sets what a layer has beside its dense class's attributes."""
        self.weight_shape = shape
        self.weight_dtype = dtype
        self.weight_trains = False
        self.kept = KeptWeights()
        self.layer_name = ""
        self.register_buffer(BYTES, data, persistent=False)  # `_save_to_state_dict` gives them another name
        register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of copies and pickles."""
        restore: Callable[..., object] = super().__setstate__
        restore(state)
        register(self)

    def title(self) -> str:
        """What messages call the layer."""
        if self.layer_name:
            return f"layer {self.layer_name!r}"
        rows, columns = self.weight_shape
        return f"the {type(self).__name__} of {rows} × {columns}"

    @property
    def weight(self) -> Any:
        """The weight, [rows, columns], decoded when it is read.

        Writes are encoded into this layer and those tied to it, losslessly: in-place functions, ``out=``,
        elements, ``.data``, ``torch.nn.init``. Setting it gives this layer another weight: the weight of
        another compressed layer is shared with it, other tensors are encoded. Inside ``torch.compile`` and
        ``torch.export`` it is a plain copy. Writes there are lost without an error, as are those past torch,
        through ``untyped_storage()`` and ``data_ptr()``: neither can be noticed.

        Raises:
            OptionError: what is written or set cannot reach the layer: it needs a gradient, is a Parameter,
                or no matrix.
            MismatchError: what is set has another shape.
        """
        if torch.compiler.is_compiling():
            return self.decoded_weight()
        return DecodedWeight(decoded_of(self))

    @weight.setter
    def weight(self, value: Any) -> None:
        if isinstance(value, DecodedWeight) and value.is_whole:
            self._share(value)
        elif packed.may_be_bytes(value):
            self._buffers[BYTES] = value  # the bytes of a ``state_dict``, as ``functional_call`` gives them
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
        """Has the weight of another compressed layer, or one that this layer had before."""
        decoded = weight.decoded
        take(self, decoded.data, decoded.shape, decoded.dtype)

    def decoded_weight(self) -> torch.Tensor:
        """The weight as a plain tensor of its own, on the layer's device."""
        copied: torch.Tensor = operators.decode(
            self.weight_sfp, self.weight_shape, self.weight_dtype, self.kept.token
        )
        return copied

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in any module, but for the weight.

        Raises:
            OptionError: a Parameter is to be, or to hide, the weight.
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
        """As in any module, but the weight cannot train.

        Raises:
            OptionError: it should.
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
        """Takes other bytes. Whoever had the same ones as this layer, and takes equal ones, shares them."""
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
        """Takes other bytes, together with the layers that share the weight."""
        before = self.weight_sfp
        if not _are_equal(before, data):
            for layer in holders_of(before):
                layer._buffers[BYTES] = data
            expire(before)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moves the bytes and notes the dtype; the rest as in any module."""
        before = self.weight_sfp
        apply: Callable[..., object] = super()._apply
        apply(fn, recurse)
        after = self.weight_sfp
        if after.dtype != torch.uint8:  # `type` asks every tensor to be converted
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
        """The bytes under the weight's name; the weight itself while `dense_states` is on."""
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
        """Takes bytes of any length; or a dense weight, which is encoded losslessly."""
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
        """The bytes to have, of those given or of a dense weight."""
        if isinstance(given, torch.Tensor) and given.dtype.is_floating_point:
            given = packed.pack(given.to(self.weight_dtype))
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
        if isinstance(input, torch.fx.Proxy):
            return _called_symbolically(self, input)
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
        if isinstance(input, torch.fx.Proxy):
            return _called_symbolically(self, input)
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


def compressed_weights(model: nn.Module) -> set[str]:
    """The names in the ``state_dict`` under which it has the bytes of compressed weights."""
    return {
        f"{path}.weight" if path else "weight"
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Compressed)
    }


def make_compressed(module: nn.Module, data: torch.Tensor, kept: KeptWeights, name: str) -> None:
    """Turns a dense layer into a compressed one. It stays the same object: whoever has it, has it still.

    Args:
        module: one with a `compressed_class`.
        data: its bytes.
        kept: what keeps decoded weights.
        name: what messages call the layer.
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
    """Turns a compressed layer into a dense one with that weight; it stays the same object."""
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
    """A call of the layer in a graph of `torch.fx`, as the dense layers of torch have it.

    Raises:
        OptionError: the layer is all there is to trace.
    """
    tracer: Any = input.tracer
    path = tracer.path_of_module(layer)
    if not path:
        raise OptionError(f"{layer.title()} is traced within a model, not by itself")
    return tracer.create_proxy("call_module", path, (input,), {})


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
