"""The weight of a compressed layer as a tensor: decoded when it is read; a write to it is encoded.

Rules: `DecodedWeight` stands where a dense layer has its Parameter. A function that only reads sees a plain
tensor. After a function that wrote to the weight or to a view of it, the new values are encoded losslessly
into every layer that shares the weight. What cannot reach the layer is refused.

How a write is noticed: torch counts writes to memory (``Tensor._version``), those to views included. Every
function of torch that is given a `DecodedWeight` comes here first, so the count before and after the call
tells. Not noticed are writes past torch, through ``untyped_storage()`` or ``data_ptr()``; and inside
``torch.compile`` and ``torch.export`` the weight is a plain copy, whose writes are lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from ..errors import OptionError
from .decoded import Decoded, decoded_of, encoded, expire, holders_of, require_matrix, take
from .kept import version_of
from .tensors import ReadsAsPlain


def _dispatch(
    cls: type, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
) -> Any:
    """Does what `DecodedWeight.__torch_function__` does, for operators that are called past it."""
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

    Reads as the dense weight does, and gives plain tensors. In-place functions, ``out=``, assignment to
    elements, ``.data`` and ``torch.nn.init`` reach the layer: each such write encodes the whole weight
    again, losslessly. numpy's view is read-only.

    Raises:
        OptionError: by functions that cannot reach the layer: gradients of the weight, a Parameter made of
            it, changes of shape in place, sharing with other processes or libraries.
    """

    _decoded: Decoded | None
    _view: torch.Tensor | None
    _is_param: bool

    @staticmethod
    def __new__(cls, decoded: Decoded, view: torch.Tensor | None = None) -> DecodedWeight:
        """The whole weight, or a view of its memory."""
        shape: tuple[int, ...] = decoded.shape
        dtype, strides, offset = decoded.dtype, None, None
        if view is not None:
            shape, dtype, strides, offset = view.shape, view.dtype, view.stride(), view.storage_offset()
        # A tensor without memory. Functions that torch does not send here see one on the meta device and
        # refuse it: ``other.data = weight`` would else give another tensor no memory without saying so.
        make: Callable[..., Any] = torch.Tensor._make_wrapper_subclass
        made: DecodedWeight = make(cls, shape, strides, offset, dtype=dtype, device="meta")
        made._decoded, made._view = decoded, view
        # torch, and code that ties weights, takes the whole for the frozen Parameter that it stands for.
        made._is_param = view is None
        return made

    @property
    def decoded(self) -> Decoded:
        """The memory behind it.

        Raises:
            OptionError: `data` was set to a weight of another shape, dtype or device.
        """
        if self._decoded is None:
            raise OptionError(
                "this tensor's data were replaced by others of another kind; take layer.weight again"
            )
        return self._decoded

    @property
    def is_whole(self) -> bool:
        """Whether it is the weight itself, not a view of it."""
        return self._view is None

    def plain(self) -> torch.Tensor:
        """The same memory as a plain tensor; what is written there is not noticed."""
        decoded = self.decoded
        return decoded.memory if self._view is None else self._view

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Calls a function of torch with plain tensors, and sees to it that writes reach the layer."""
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
    """What tells whether memory was written, or a tensor moved to other memory."""

    version: int
    place: tuple[object, ...]

    @staticmethod
    def of(tensor: torch.Tensor) -> _Memory:
        """That of a tensor now."""
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return _Memory(version_of(tensor), (id(tensor),))
        storage = tensor.untyped_storage()._cdata
        if torch._C._get_tracing_state() is not None:  # sizes are tensors then
            return _Memory(version_of(tensor), (storage,))
        place = storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        return _Memory(version_of(tensor), place)


def _call(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Calls a function with plain tensors, and encodes the weights that it wrote to."""
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
            decoded.drop()  # written in part
        raise
    _require_same_place(func, weights, before)
    for decoded in changed().values():
        decoded.write()
    return _wrapped(out, weights)


def _no_collective(weight: DecodedWeight) -> OptionError:
    """For functions of ``torch.distributed``, which write without counting it, and may write later."""
    return weight.decoded.refused("collectives cannot write to its weight; give them layer.weight.clone()")


def _require_same_place(func: Any, weights: list[DecodedWeight], before: list[_Memory]) -> None:
    """Refuses functions that gave a weight other memory, or another shape.

    Raises:
        OptionError: a tensor is not where it was.
    """
    for weight, memory in zip(weights, before, strict=True):
        if _Memory.of(weight.plain()).place != memory.place:
            weight.decoded.drop()
            raise weight.decoded.refused(
                f"{_name_of(func)} would move its weight or change its shape; assign to layer.weight"
            )


def _unwrapped(value: Any, found: list[DecodedWeight]) -> Any:
    """Arguments with plain tensors in the place of weights, which are added to ``found``."""

    def plain(weight: DecodedWeight) -> torch.Tensor:
        found.append(weight)
        return weight.plain()

    return tree_map_only(DecodedWeight, plain, value)


def _wrapped(out: Any, weights: list[DecodedWeight]) -> Any:
    """A result, in which tensors over the memory of a weight are weights, so that writes to them count."""

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
    """Whether two plain tensors lie in the same storage; those without storage do not."""
    if type(one) is not torch.Tensor or one.layout != torch.strided:
        return False
    try:
        return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return False


def _by_argument(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[tuple[Any, Any]]:
    """The arguments of a schema and what was given for them."""
    positional = schema.arguments[: len(args)]
    yield from zip(positional, args, strict=True)
    yield from ((a, kwargs[a.name]) for a in schema.arguments[len(args) :] if a.name in kwargs)


def _name_of(func: Any) -> str:
    return str(getattr(func, "__name__", func))


# ---------------------------------------------------------------------- functions with rules of their own


def _get_data(func: Any, weight: DecodedWeight) -> Any:
    return _call(torch.Tensor.detach, (weight,), {})


def _set_data(func: Any, weight: DecodedWeight, value: torch.Tensor) -> None:
    """``weight.data = value``: of a whole weight the new values are encoded into all layers that share it."""
    decoded = weight.decoded
    if not weight.is_whole:
        raise decoded.refused("setting .data of a view reaches nothing; write to the view with copy_")
    if isinstance(value, DecodedWeight):
        plain, memory = value.plain(), decoded.memory
        if value.decoded is decoded and _Memory.of(plain).place == _Memory.of(memory).place:
            return  # what was written to `weight.data` has reached the layer already
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
        "its weight is frozen and has no gradient; make the model dense with decompress_model to train it, "
        "or take layer.weight.clone()"
    )


def _require_grad(func: Any, weight: DecodedWeight, requires_grad: bool = True) -> Any:
    """A view, such as `detach` gives, may be a leaf with a gradient of its own; the weight may not."""
    if weight._view is not None:
        weight._view.requires_grad_(requires_grad)
    elif requires_grad:
        raise _frozen(weight)
    return weight


def _get_of_gradient(func: Any, weight: DecodedWeight) -> Any:
    """What a view knows of its gradient; the weight has none."""
    if weight._view is not None:
        return func(weight._view)
    return False if func == _T.requires_grad.__get__ else None


def _set_grad(func: Any, weight: DecodedWeight, *value: Any) -> None:
    if weight._view is not None:
        func(weight._view, *value)
    elif any(one is not None for one in value):
        raise _frozen(weight)


def _is_leaf(func: Any, weight: DecodedWeight) -> bool:
    # Optimizers refuse what is no leaf and retains no gradient, and ask in this order.
    return False if weight._view is None else weight._view.is_leaf


def _retains_grad(func: Any, weight: DecodedWeight) -> bool:
    if weight._view is None:
        raise _frozen(weight)
    return weight._view.retains_grad


def _to_numpy(func: Any, weight: DecodedWeight, *args: Any, **kwargs: Any) -> Any:
    """numpy's view of the memory, read-only: writes there could not be noticed."""
    array = func(weight.plain().detach(), *args, **kwargs)
    array.flags.writeable = False
    return array


def _write_uncounted(func: Any, weight: DecodedWeight, *args: Any) -> Any:
    """For functions that write without counting it."""
    _call(func, (weight, *args), {})
    weight.decoded.write()
    return weight


def _shared_outside(func: Any, weight: DecodedWeight, *args: Any, **kwargs: Any) -> Any:
    raise weight.decoded.refused(
        f"{_name_of(func)} would share memory in which writes are not noticed; take layer.weight.clone()"
    )


def _deepcopied(func: Any, weight: DecodedWeight, memo: dict[int, Any]) -> Any:
    """A Parameter; in a copy of a whole model the weight of the layer's copy, so that ties stay."""
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

# What is known without decoding: asked of the tensor without memory, and of the bytes.
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
