"""The weight of a compressed layer as a tensor: reading decodes it, writing encodes the new values.

Rules: `DecodedWeight` replaces the Parameter of a dense layer. Functions that only read get a plain tensor.
After a function that writes to the weight or to a view of it, the new values are encoded losslessly into
every layer that shares the weight. Writes that cannot be encoded into the layer are refused.

Detection of writes: torch counts writes to memory (``Tensor._version``), including those through views. Every
torch function that gets a `DecodedWeight` calls ``__torch_function__``, which compares the count before and
after the call. Writes through ``untyped_storage()`` or ``data_ptr()`` are not detected. Inside
``torch.compile`` and ``torch.export`` the weight is a plain copy; writes to it are lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from ..errors import OptionError
from .by_memory import version_of
from .decoded import Decoded, decoded_of, encoded, expire, holders_of, require_matrix, take
from .tensors import ReadsAsPlain


def _dispatch(
    cls: type, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
) -> Any:
    """Does the work of `DecodedWeight.__torch_function__` for operators that torch calls directly."""
    kwargs = kwargs or {}
    weights: list[DecodedWeight] = []
    plain_args, plain_kwargs = _unwrapped((args, kwargs), weights)
    if func.namespace == "c10d":
        raise _no_collective(weights[0])
    before = [_Memory.of(weight.plain()) for weight in weights]
    out = func(*plain_args, **plain_kwargs)
    _require_same_place(func, weights, before)
    written: list[DecodedWeight] = []
    for argument, value in _by_argument(func._schema, args, kwargs):
        if argument.alias_info is not None and argument.alias_info.is_write:
            _unwrapped(value, written)
    for decoded in {id(one.decoded): one.decoded for one in written}.values():
        decoded.write()
    return _wrapped(out, weights)


class DecodedWeight(ReadsAsPlain, torch.Tensor):
    """The weight of a compressed layer, [rows, columns], or a view of it.

    Functions read it like a dense weight and return plain tensors. In-place functions, ``out=``, assignment
    to elements, ``.data`` and ``torch.nn.init`` write to the layer: each write encodes the whole weight
    again, losslessly. The numpy view is read-only.

    Raises:
        OptionError: an operation that a compressed layer does not support: a gradient of the weight, a
            Parameter made from it, an in-place change of its shape, or sharing with other processes or
            libraries.
    """

    _decoded: Decoded | None
    _view: torch.Tensor | None
    _is_param: bool

    @staticmethod
    def __new__(cls, decoded: Decoded, view: torch.Tensor | None = None) -> DecodedWeight:
        """Creates the whole weight, or a view of its memory."""
        shape: tuple[int, ...] = decoded.shape
        dtype, strides, offset = decoded.dtype, None, None
        if view is not None:
            shape, dtype, strides, offset = view.shape, view.dtype, view.stride(), view.storage_offset()
        # A tensor without memory, on the meta device. Functions that bypass `__torch_function__` refuse it.
        # Otherwise ``other.data = weight`` would silently give another tensor no memory.
        make: Callable[..., Any] = torch.Tensor._make_wrapper_subclass
        made: DecodedWeight = make(cls, shape, strides, offset, dtype=dtype, device="meta")
        made._decoded, made._view = decoded, view
        # torch, and code that ties weights, treats the whole weight as a frozen Parameter.
        made._is_param = view is None
        return made

    @property
    def decoded(self) -> Decoded:
        """The decoded memory of the weight.

        Raises:
            OptionError: `data` was set to a weight of another shape, dtype or device.
        """
        if self._decoded is None:
            raise OptionError(
                "the data of this tensor were replaced by a tensor of another shape, dtype or device; read "
                "layer.weight again"
            )
        return self._decoded

    @property
    def is_whole(self) -> bool:
        """Whether this is the whole weight, not a view of it."""
        return self._view is None

    def plain(self) -> torch.Tensor:
        """Returns the same memory as a plain tensor; writes to it are not detected."""
        decoded = self.decoded
        return decoded.memory if self._view is None else self._view

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Calls a torch function with plain tensors, and encodes writes into the layers."""
        kwargs = kwargs or {}
        if func in _OF_SHAPE:
            assert args[0].decoded
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _OF_DEVICE:
            return func(args[0].decoded.data)
        special = _SPECIAL.get(func)
        return _call(func, args, kwargs) if special is None else special(func, *args, **kwargs)

    __torch_dispatch__: Any = classmethod(_dispatch)


class _Memory(NamedTuple):
    """The version and location of a tensor's memory, to detect writes and moves."""

    version: int
    place: tuple[object, ...]

    @staticmethod
    def of(tensor: torch.Tensor) -> _Memory:
        """Returns the current version and location of a tensor's memory."""
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return _Memory(version_of(tensor), (id(tensor),))
        storage = tensor.untyped_storage()._cdata
        if torch._C._get_tracing_state() is not None:  # while tracing, sizes are tensors
            return _Memory(version_of(tensor), (storage,))
        place = storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        return _Memory(version_of(tensor), place)


def _call(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Calls a function with plain tensors, and encodes the weights that it changed."""
    weights: list[DecodedWeight] = []
    plain_args, plain_kwargs = _unwrapped((args, dict(kwargs)), weights)
    if str(getattr(func, "__module__", "")).startswith("torch.distributed"):
        raise _no_collective(weights[0])
    before = [_Memory.of(weight.plain()) for weight in weights]

    def changed() -> dict[int, Decoded]:
        return {
            id(weight.decoded): weight.decoded
            for weight, memory in zip(weights, before, strict=True)
            if _Memory.of(weight.plain()) != memory
        }

    try:
        out = func(*plain_args, **plain_kwargs)
    except BaseException:
        for decoded in changed().values():
            decoded.drop()  # may be partly written
        raise
    _require_same_place(func, weights, before)
    for decoded in changed().values():
        decoded.write()
    return _wrapped(out, weights)


def _no_collective(weight: DecodedWeight) -> OptionError:
    """Returns the error for ``torch.distributed``: it writes without counting, possibly after the call."""
    return weight.decoded.refused("collectives cannot write to its weight; pass layer.weight.clone()")


def _require_same_place(func: Any, weights: list[DecodedWeight], before: list[_Memory]) -> None:
    """Refuses functions that moved a weight to other memory or changed its shape.

    Raises:
        OptionError: the location or shape of a weight changed.
    """
    for weight, memory in zip(weights, before, strict=True):
        if _Memory.of(weight.plain()).place != memory.place:
            weight.decoded.drop()
            raise weight.decoded.refused(
                f"{_name_of(func)} would move its weight or change its shape; assign to layer.weight"
            )


def _unwrapped(value: Any, found: list[DecodedWeight]) -> Any:
    """Returns the arguments with weights replaced by plain tensors; appends the weights to ``found``."""

    def plain(weight: DecodedWeight) -> torch.Tensor:
        found.append(weight)
        return weight.plain()

    return tree_map_only(DecodedWeight, plain, value)


def _wrapped(out: Any, weights: list[DecodedWeight]) -> Any:
    """Returns a result in which tensors that share a weight's memory are weights, so that writes count."""

    def wrap(tensor: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            if tensor is weight.plain():
                return weight
        for weight in weights:
            if _share_memory(tensor, weight.plain()):
                return DecodedWeight(weight.decoded, tensor)
        return tensor

    if out is None or isinstance(out, (bool, int, float, str)):
        return out
    return tree_map_only(torch.Tensor, wrap, out)


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Returns whether two plain tensors share a storage; False if a tensor has none."""
    if type(one) is not torch.Tensor or one.layout != torch.strided:
        return False
    try:
        return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
    except NotImplementedError:  # no storage, for example in torch.func.vmap
        return False


def _by_argument(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[tuple[Any, Any]]:
    """Yields the arguments of a schema with their given values."""
    positional = schema.arguments[: len(args)]
    yield from zip(positional, args, strict=True)
    yield from ((a, kwargs[a.name]) for a in schema.arguments[len(args) :] if a.name in kwargs)


def _name_of(func: Any) -> str:
    return str(getattr(func, "__name__", func))


# ---------------------------------------------------------------------- functions that need special handling


def _get_data(func: Any, weight: DecodedWeight) -> Any:
    return _call(torch.Tensor.detach, (weight,), {})


def _set_data(func: Any, weight: DecodedWeight, value: torch.Tensor) -> None:
    """Implements ``weight.data = value``: encodes the new values into all layers that share the weight."""
    decoded = weight.decoded
    if not weight.is_whole:
        raise decoded.refused("setting .data of a view has no effect; write to the view with copy_")
    if isinstance(value, DecodedWeight):
        plain, memory = value.plain(), decoded.memory
        if value.decoded is decoded and _Memory.of(plain).place == _Memory.of(memory).place:
            return  # a write to `weight.data` was already encoded into the layer
        value = plain
    shape = require_matrix(value, decoded.layer)
    decoded.require_current()
    holders = holders_of(decoded.data)
    data = encoded(value, decoded.data)
    expire(decoded.data)
    decoded.is_current = False
    for layer in holders:
        take(layer, data, shape, value.dtype)
    same = shape == decoded.shape and value.dtype == decoded.dtype and data.device == decoded.data.device
    weight._decoded = decoded_of(decoded.layer) if same and holders else None


def _frozen(weight: DecodedWeight) -> OptionError:
    return weight.decoded.refused(
        "its weight is frozen and has no gradient; call decompress_model to train it, "
        "or use layer.weight.clone()"
    )


def _require_grad(func: Any, weight: DecodedWeight, requires_grad: bool = True) -> Any:
    """Sets ``requires_grad`` of a view, which can be a leaf with its own gradient; the weight refuses it."""
    if weight._view is not None:
        weight._view.requires_grad_(requires_grad)
    elif requires_grad:
        raise _frozen(weight)
    return weight


def _get_of_gradient(func: Any, weight: DecodedWeight) -> Any:
    """Returns a gradient attribute of a view; False or None for the whole weight, which has no gradient."""
    if weight._view is not None:
        return func(weight._view)
    return False if func == _T.requires_grad.__get__ else None


def _set_grad(func: Any, weight: DecodedWeight, *value: Any) -> None:
    if weight._view is not None:
        func(weight._view, *value)
    elif any(one is not None for one in value):
        raise _frozen(weight)


def _is_leaf(func: Any, weight: DecodedWeight) -> bool:
    # Optimizers refuse tensors that are not leaves and do not retain gradients; they check in this order.
    return False if weight._view is None else weight._view.is_leaf


def _retains_grad(func: Any, weight: DecodedWeight) -> bool:
    if weight._view is None:
        raise _frozen(weight)
    return weight._view.retains_grad


def _to_numpy(func: Any, weight: DecodedWeight, *args: Any, **kwargs: Any) -> Any:
    """Returns a read-only numpy view of the memory: writes to it could not be detected."""
    array = func(weight.plain().detach(), *args, **kwargs)
    array.flags.writeable = False
    return array


def _write_uncounted(func: Any, weight: DecodedWeight, *args: Any) -> Any:
    """Calls a function that writes without counting, and encodes the weight."""
    _call(func, (weight, *args), {})
    weight.decoded.write()
    return weight


def _shared_outside(func: Any, weight: DecodedWeight, *args: Any, **kwargs: Any) -> Any:
    raise weight.decoded.refused(
        f"{_name_of(func)} would share memory, in which writes cannot be detected; use layer.weight.clone()"
    )


def _deepcopied(func: Any, weight: DecodedWeight, memo: dict[int, Any]) -> Any:
    """Returns a Parameter; within a copy of a model, the weight of the copied layer, which keeps ties."""
    if memo and weight.is_whole:
        return deepcopy(weight.decoded.layer, memo).weight
    return _reduced_to_parameter(weight)


def _pickled(func: Any, weight: DecodedWeight, protocol: Any) -> Any:
    reduced: Any = _reduced_to_parameter(weight)
    return reduced.__reduce_ex__(protocol)


def _reduced_to_parameter(weight: DecodedWeight) -> torch.Tensor:
    copied = weight.plain().detach().clone().requires_grad_(weight.requires_grad)
    return torch.nn.Parameter(copied, weight.requires_grad) if weight._is_param else copied


_T: Any = torch.Tensor

# Attributes that need no decoding. `_OF_SHAPE` reads them from the tensor without memory, `_OF_DEVICE` from
# the compressed bytes.
_OF_SHAPE = {
    _T.shape.__get__,
    _T.dtype.__get__,
    _T.layout.__get__,
    _T.ndim.__get__,
    _T.itemsize.__get__,
    _T.nbytes.__get__,
    _T.size,
    _T.dim,
    _T.ndimension,
    _T.numel,
    _T.nelement,
    _T.stride,
    _T.element_size,
    _T.is_floating_point,
    _T.is_complex,
    _T.is_contiguous,
    _T.__len__,
}
_OF_DEVICE = {
    _T.device.__get__,
    _T.is_cpu.__get__,
    _T.is_cuda.__get__,
    _T.is_meta.__get__,
    _T.get_device,
}

_SPECIAL: dict[Any, Callable[..., Any]] = {
    _T.data.__get__: _get_data,
    _T.data.__set__: _set_data,
    _T.requires_grad.__get__: _get_of_gradient,
    _T.grad.__get__: _get_of_gradient,
    _T.grad_fn.__get__: _get_of_gradient,
    _T.requires_grad.__set__: _require_grad,
    _T.requires_grad_: _require_grad,
    _T.grad.__set__: _set_grad,
    _T.grad.__delete__: _set_grad,
    _T.is_leaf.__get__: _is_leaf,
    _T.retains_grad.__get__: _retains_grad,
    _T.numpy: _to_numpy,
    _T.__array__: _to_numpy,
    _T.apply_: _write_uncounted,
    _T.map_: _write_uncounted,
    _T.map2_: _write_uncounted,
    _T.__dlpack__: _shared_outside,
    _T.share_memory_: _shared_outside,
    _T.__deepcopy__: _deepcopied,
    _T.__reduce_ex__: _pickled,
}
