"""`LazyTensor`: a tensor of a file that decodes only the part that is used. For loaders of inference engines.

A process of tensor parallelism gets each tensor of a checkpoint whole, and takes its part by ``narrow`` or
another operation that selects a box. These operations are recorded. Any other operation decodes the box.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map

from . import packed
from .files import TorchFile, TorchSlice

Box = tuple["int | slice", ...]
_Tensor: Any = torch.Tensor


class _Whole:
    """A tensor of a file, and its decoded value after an operation has needed all of it."""

    def __init__(self, file: TorchFile, name: str, used: Callable[[], object]) -> None:
        self.file, self.name = file, name
        self.part: TorchSlice = file.get_slice(name)
        self.used = used
        self.value: torch.Tensor | None = None

    def decode(self, box: Any) -> torch.Tensor:
        """Decodes a box, and reports that the tensor is used."""
        self.used()
        return self.part[box]


class LazyTensor(torch.Tensor):
    """A tensor, or a box of it, that is decoded when an operation needs elements.

    Recorded, without decoding: ``narrow``, ``select``, ``chunk``, ``split``, ``unbind``, iteration, and
    subscripts of integers, of slices with step 1 and of ``...``. Shape, dtype, device and strides do not
    decode either. All other operations get the box as an ordinary tensor, which is decoded once. An operation
    that changes a box in place decodes the whole tensor, so that all its boxes see the change; changes of
    views that other operations returned are seen by no other box. The file must be open until then.

    `lazy_weights` makes them.

    Example::

        with safe_open("model.sfp") as file:
            weights = dict(lazy_weights(file))
            parameter.copy_(weights["layer.weight"].narrow(0, 64, 64))  # decodes half of 128 rows
    """

    _whole: _Whole
    _box: Box
    _value: torch.Tensor | None

    @staticmethod
    def __new__(cls, whole: _Whole, box: Box, shape: torch.Size) -> LazyTensor:
        """Makes a tensor without memory.

        Args:
            whole: the tensor of the file.
            box: for each dimension of it, an integer, or a slice with a start, a stop and step 1.
            shape: the shape of the box.

        Raises:
            MismatchError: this version of torch has no such dtype.
        """
        make = _Tensor._make_wrapper_subclass
        out: LazyTensor = make(cls, shape, dtype=whole.part.dtype, device=whole.part.device)
        out._whole = whole
        out._box = box
        out._value = None
        return out

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Records, or decodes and calls the function with ordinary tensors."""
        kwargs = kwargs or {}
        if args and isinstance(args[0], LazyTensor):
            if func in ABOUT:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            record = _RECORDED.get(func)
            if record is not None and not _has_tensors((args[1:], kwargs)):
                return record(args[0], func, args[1:], kwargs)
        return _call(func, args, kwargs, _writes(func))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's annotation lacks the first parameter
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Decodes, where another subclass has turned `__torch_function__` off."""
        return _call(func, args, kwargs or {}, func._schema.is_mutable)


def lazy_weights(
    file: TorchFile, prefix: str = "", used: set[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the names and tensors of an open file, in file order. Decodes nothing before it is used.

    Args:
        file: from `safe_open`; must be open while the tensors are used.
        prefix: stands before each name.
        used: gets the name, without the prefix, of each tensor of which something is decoded.

    Raises:
        MismatchError: this version of torch has no such dtype.
    """
    names: set[str] = set() if used is None else used
    for name in file:
        whole = _Whole(file, name, partial(names.add, name))
        shape = whole.part.shape
        yield prefix + name, LazyTensor(whole, tuple(slice(0, size) for size in shape), shape)


def whole_bytes(tensor: torch.Tensor) -> torch.Tensor | None:
    """Copies the chunks of a whole tensor of a file, without decoding them.

    Returns:
        A file with this tensor alone, as `packed.cut_out` makes it. None if the argument is no `LazyTensor`,
        or a part of a tensor, or was decoded already.

    Raises:
        InvalidFileError: a chunk's checksum does not match.
    """
    if not isinstance(tensor, LazyTensor):
        return None
    whole = tensor._whole
    if whole.value is not None or tensor.shape != whole.part.shape:
        return None
    whole.used()
    return packed.cut_out(whole.file.file, whole.name)


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], writes: bool) -> Any:
    """Calls a function with decoded tensors. If it writes, then to its first argument, or to ``out``."""
    first = tree_map(lambda one: _decoded(one, writes), args[:1])
    rest = tree_map(_decoded, args[1:])
    named = tree_map(_decoded, {name: value for name, value in kwargs.items() if name != "out"})
    if "out" in kwargs:
        named["out"] = tree_map(lambda one: _decoded(one, True), kwargs["out"])
    return func(*first, *rest, **named)


def _decoded(value: Any, to_write: bool = False) -> Any:
    """Returns the elements of a lazy tensor, as an ordinary tensor; all other values as they are."""
    if not isinstance(value, LazyTensor):
        return value
    whole = value._whole
    is_whole = value.shape == whole.part.shape
    if whole.value is None and (to_write or is_whole):
        whole.value = whole.decode(...)
    if whole.value is not None:
        return whole.value if is_whole else whole.value[value._box]
    if value._value is None:
        value._value = whole.decode(value._box)
    return value._value


def _writes(func: Any) -> bool:
    """Whether a function changes its first argument, by torch's rules for names."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (name.startswith("__i") and name in _IN_PLACE)
    return name.endswith("_")


# Operators in place, such as ``+=``. Not ``__index__``, ``__int__``, ``__invert__``, ``__iter__``.
_IN_PLACE = {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
} | {"__ilshift__", "__irshift__"}


def _has_tensors(values: Any) -> bool:
    """Whether some arguments are tensors: an index that has to be decoded or computed."""
    found: list[bool] = []
    tree_map(lambda one: found.append(isinstance(one, torch.Tensor)), values)
    return any(found)


# ------------------------------------------------------------------------------- operations that are recorded

Record = Callable[[LazyTensor, Any, tuple[Any, ...], dict[str, Any]], Any]


def _like(lazy: LazyTensor) -> torch.Tensor:
    """Returns a tensor of the same shape without memory, on which torch checks arguments."""
    return torch.empty(lazy.shape, dtype=torch.uint8, device="meta")


def _part(lazy: LazyTensor, dim: int, start: int, length: int | None) -> LazyTensor:
    """Returns elements of one dimension of a box. A length of None removes the dimension."""
    dims = [at for at, one in enumerate(lazy._box) if isinstance(one, slice)]
    at = dims[dim]
    old = lazy._box[at]
    assert isinstance(old, slice)
    begin = old.start + start
    new: int | slice = begin if length is None else slice(begin, begin + length)
    shape = list(lazy.shape)
    shape[dim : dim + 1] = [] if length is None else [length]
    return LazyTensor(lazy._whole, (*lazy._box[:at], new, *lazy._box[at + 1 :]), torch.Size(shape))


def _narrow(lazy: LazyTensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    length = func(_like(lazy), *args, **kwargs).shape  # raises what torch raises
    dim, start, _ = _named(("dim", "start", "length"), args, kwargs)
    dim = dim % lazy.ndim
    return _part(lazy, dim, start % lazy.shape[dim] if start < 0 else start, length[dim])


def _select(lazy: LazyTensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    func(_like(lazy), *args, **kwargs)
    dim, index = _named(("dim", "index"), args, kwargs)
    dim = dim % lazy.ndim
    return _part(lazy, dim, index % lazy.shape[dim], None)


def _pieces(lazy: LazyTensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """For ``chunk`` and ``split``."""
    parts = func(_like(lazy), *args, **kwargs)
    dim = (kwargs["dim"] if "dim" in kwargs else args[1] if len(args) > 1 else 0) % lazy.ndim
    out, start = [], 0
    for part in parts:
        out.append(_part(lazy, dim, start, part.shape[dim]))
        start += part.shape[dim]
    return tuple(out)


def _unbind(lazy: LazyTensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parts = func(_like(lazy), *args, **kwargs)
    dim = (kwargs["dim"] if "dim" in kwargs else args[0] if args else 0) % lazy.ndim
    return tuple(_part(lazy, dim, at, None) for at in range(len(parts)))


def _subscript(lazy: LazyTensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    index = args[0] if isinstance(args[0], tuple) else (args[0],)
    simple = all(
        one is ...
        or (isinstance(one, int) and not isinstance(one, bool))
        or (isinstance(one, slice) and one.step in (None, 1))
        for one in index
    )
    if not simple or sum(one is ... for one in index) > 1:
        return func(_decoded(lazy, False), *args, **kwargs)
    func(_like(lazy), *args, **kwargs)
    if ... in index:
        at = index.index(...)
        index = (*index[:at], *[slice(None)] * (lazy.ndim - len(index) + 1), *index[at + 1 :])
    out, dim = lazy, 0
    for one in index:
        size = out.shape[dim]
        if isinstance(one, int):
            out = _part(out, dim, one % size, None)
        else:
            start, stop, _ = one.indices(size)
            out = _part(out, dim, start, max(stop - start, 0))
            dim += 1
    return out


def _named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Returns the values of parameters that are given by position or by name."""
    return [args[at] if at < len(args) else kwargs[name] for at, name in enumerate(names)]


_RECORDED: dict[Any, Record] = {
    torch.narrow: _narrow,
    _Tensor.narrow: _narrow,
    torch.select: _select,
    _Tensor.select: _select,
    torch.chunk: _pieces,
    _Tensor.chunk: _pieces,
    torch.split: _pieces,
    _Tensor.split: _pieces,
    torch.unbind: _unbind,
    _Tensor.unbind: _unbind,
    _Tensor.__getitem__: _subscript,
}

# What a tensor says of itself without its elements.
ABOUT = {
    *(getattr(_Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "itemsize")),
    *(getattr(_Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_meta", "is_sparse", "nbytes")),
    *(getattr(_Tensor, name).__get__ for name in ("requires_grad", "is_quantized")),
    *(getattr(_Tensor, name) for name in ("size", "dim", "numel", "nelement", "element_size", "stride")),
    *(getattr(_Tensor, name) for name in ("is_floating_point", "is_complex", "is_contiguous", "__len__")),
    torch.numel,
    torch.is_floating_point,
    torch.is_complex,
}
