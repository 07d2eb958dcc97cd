"""`EncodingTensor`: a matrix without memory that encodes the rows that are written to it. The counterpart of
`LazyTensor`.

Loaders of inference engines write each tensor of a checkpoint, or the part that a process of tensor
parallelism keeps, to rows of a parameter: ``parameter.data.narrow(0, 64, 64).copy_(part)``. The rows stay
compressed, so that no dense weight is allocated.

Rules: whole tensors of a file are copied without encoding them again. Everything else is encoded losslessly.
An operation that would be lost raises an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..errors import MismatchError, OptionError
from . import packed
from .lazy_tensor import ABOUT, whole_bytes

_Tensor: Any = torch.Tensor


class EncodedRows:
    """The compressed rows of a matrix.

    Attributes:
        name: the name of the matrix in messages.
        shape: rows and columns.
        dtype: the dtype that decoded elements are converted to.
    """

    def __init__(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        self._parts: dict[tuple[int, int], torch.Tensor] = {}

    def write(self, start: int, stop: int, value: torch.Tensor) -> None:
        """Encodes rows. They replace rows that were written before.

        Args:
            start, stop: the rows.
            value: [stop - start, columns]; may be a `LazyTensor`.

        Raises:
            MismatchError: the value has another shape.
            OptionError: the rows overlap some that were written together with others.
            InvalidFileError, UnsupportedError, LimitError: the file of a `LazyTensor` is damaged or refused.
        """
        if value.shape != (stop - start, self.shape[1]):
            raise MismatchError(
                f"{self.name}: a tensor of shape {list(value.shape)} does not fill rows {start} to {stop} of "
                f"{self.shape[1]} columns"
            )
        if stop == start:
            return
        for low, high in list(self._parts):
            if low < stop and start < high:
                if low < start or high > stop:
                    raise OptionError(
                        f"{self.name}: rows {start} to {stop} are written after rows {low} to {high}, "
                        "which they replace in part; a compressed weight cannot do that"
                    )
                del self._parts[low, high]
        size = value.numel() * self.dtype.itemsize
        data = whole_bytes(value)
        if data is None or data.nbytes >= size:
            data = packed.pack(value.to(self.dtype))
        self._parts[start, stop] = data

    def parts(self) -> list[tuple[int, torch.Tensor]]:
        """Returns the number of rows and the bytes of each part, from the first row to the last.

        Raises:
            MismatchError: rows were not written.
        """
        end, out, missing = 0, [], []
        for (start, stop), data in sorted(self._parts.items()):
            if start > end:
                missing.append(f"{end} to {start}")
            out.append((stop - start, data))
            end = stop
        if end < self.shape[0]:
            missing.append(f"{end} to {self.shape[0]}")
        if missing:
            rows = ", ".join(missing)
            raise MismatchError(f"no tensor fills rows {rows} of {self.name}", [self.name])
        return out


class EncodingTensor(torch.Tensor):
    """A matrix, or some of its rows, that encodes what ``copy_`` and ``fill_`` write.

    ``data``, ``detach``, ``narrow`` and subscripts return rows of it. Shape, dtype and strides can be read.
    Anything else raises an `OptionError`. The tensor is on the meta device.

    Attributes:
        rows: the encoded rows of the whole matrix.
        start: the first row of this tensor.
    """

    rows: EncodedRows
    start: int

    @classmethod
    def make(cls, name: str, shape: tuple[int, int], dtype: torch.dtype) -> EncodingTensor:
        """Returns a matrix of which nothing is written yet.

        Args:
            name: its name in messages.
            shape: rows and columns.
            dtype: the dtype that decoded elements are converted to.
        """
        return _rows(EncodedRows(name, shape, dtype), 0, shape[0])

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Records, encodes, or raises."""
        kwargs = kwargs or {}
        if func in _ALLOWED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        act = _ACTIONS.get(func)
        tensor = args[0] if args else None
        if act is not None and isinstance(tensor, EncodingTensor):
            return act(tensor, *args[1:], **kwargs)
        leaves = tree_leaves((args, kwargs))  # also those in lists, such as the argument of torch.cat
        found = next(one for one in leaves if isinstance(one, EncodingTensor))
        raise _refused(found, getattr(func, "__name__", str(func)))


def _rows(rows: EncodedRows, start: int, stop: int) -> EncodingTensor:
    """Returns a tensor for some rows."""
    memory = torch.empty(stop - start, rows.shape[1], dtype=rows.dtype, device="meta")
    out: EncodingTensor = _Tensor._make_subclass(EncodingTensor, memory)
    out.rows, out.start = rows, start
    return out


def _refused(tensor: EncodingTensor, what: str) -> OptionError:
    return OptionError(
        f"{tensor.rows.name} is compressed while it is loaded, and takes copy_ and fill_ of whole rows, not "
        f"{what}. Load this model without compressed layers"
    )


def _whole(tensor: EncodingTensor) -> EncodingTensor:
    return _rows(tensor.rows, tensor.start, tensor.start + tensor.shape[0])


def _narrow(tensor: EncodingTensor, dim: int, start: int, length: int) -> EncodingTensor:
    torch.empty(tensor.shape, dtype=torch.uint8, device="meta").narrow(dim, start, length)  # torch's checks
    start = start % tensor.shape[dim] if start < 0 else start
    if dim % 2 == 0:
        return _rows(tensor.rows, tensor.start + start, tensor.start + start + length)
    if length != tensor.shape[1]:
        raise _refused(tensor, "a part of each row")
    return _whole(tensor)


def _subscript(tensor: EncodingTensor, index: Any) -> EncodingTensor:
    items = index if isinstance(index, tuple) else (index,)
    if not items or items == (...,):
        return _whole(tensor)
    slices = [one for one in items if isinstance(one, slice) and one.step in (None, 1)]
    if len(slices) != len(items) or len(items) > 2:
        raise _refused(tensor, f"the subscript {index!r}")
    out = tensor
    for dim, one in enumerate(slices):
        start, stop, _ = one.indices(out.shape[dim])
        out = _narrow(out, dim, start, max(stop - start, 0))
    return out


def _copy(tensor: EncodingTensor, src: torch.Tensor, non_blocking: bool = False) -> EncodingTensor:
    if not isinstance(src, torch.Tensor) or isinstance(src, EncodingTensor):
        raise _refused(tensor, f"copy_ of a {type(src).__name__}")
    tensor.rows.write(tensor.start, tensor.start + tensor.shape[0], src)
    return tensor


def _fill(tensor: EncodingTensor, value: float) -> EncodingTensor:
    full = torch.full(tensor.shape, value, dtype=tensor.rows.dtype, device="cpu")
    tensor.rows.write(tensor.start, tensor.start + tensor.shape[0], full)
    return tensor


def _moved(tensor: EncodingTensor, *args: Any, **kwargs: Any) -> EncodingTensor:
    like = torch.empty(0, dtype=tensor.rows.dtype, device="cpu").to(*args, **kwargs)
    if like.dtype != tensor.rows.dtype or (not like.is_meta and _names_a_device(args, kwargs)):
        raise _refused(tensor, "a move to another device or dtype, as offloading does")
    return _whole(tensor)


def _names_a_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return not all(isinstance(one, (torch.dtype, bool)) for one in (*args, *kwargs.values()))


def _no_data(tensor: EncodingTensor, value: Any) -> None:
    raise _refused(tensor, "other memory, as offloading gives it")


_ALLOWED = {
    *ABOUT,
    *(getattr(_Tensor, name).__get__ for name in ("grad", "grad_fn", "is_leaf", "_version")),
    _Tensor.requires_grad.__set__,
    _Tensor.requires_grad_,
    _Tensor.is_contiguous,
    _Tensor.__hash__,
}

_ACTIONS: dict[Any, Callable[..., Any]] = {
    _Tensor.data.__get__: _whole,
    _Tensor.data.__set__: _no_data,
    _Tensor.detach: _whole,
    torch.detach: _whole,
    _Tensor.narrow: _narrow,
    torch.narrow: _narrow,
    _Tensor.__getitem__: _subscript,
    _Tensor.copy_: _copy,
    _Tensor.fill_: _fill,
    _Tensor.zero_: lambda tensor: _fill(tensor, 0.0),
    _Tensor.to: _moved,
}
