"""Slices of tensors, which are decoded when they are indexed."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..container.entry import TensorEntry
from .execution import Into
from .selection import Index, Selection, select
from .tensor import TensorDecoder, Values


class _File(Protocol):
    """An open file."""

    def decode(
        self, entry: TensorEntry, selection: Selection, dtype: np.dtype[Any], into: Into
    ) -> NDArray[Any]:
        """Decodes the selected positions of a tensor."""

    def get_slice(self, name: str) -> SfpSlice:
        """Returns a slice of a tensor."""


class SfpSlice:
    """A tensor that is decoded when it is indexed. Same interface as the slice object of safetensors."""

    def __init__(self, file: _File, entry: TensorEntry) -> None:
        self._file = file
        self._entry = entry

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles the slice with its file. Unpickling opens the file again."""
        return _slice_of, (self._file, self._entry.name)

    def get_shape(self) -> list[int]:
        """Returns the tensor's shape."""
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """Returns the name of the tensor's dtype, such as ``"BF16"``."""
        return self._entry.dtype.name

    def __getitem__(self, index: Index) -> Values:
        """Decodes the selected part into a new array.

        Args:
            index: integers, slices with any step, and ``...``, as in basic numpy indexing.

        Raises:
            IndexError: the index does not fit the shape, or has an item of another type.
            InvalidFileError: the file is damaged.
            LimitError: the tensor exceeds a limit.
        """
        selection = select(self._entry.shape, index)
        return self._file.decode(self._entry, selection, self._entry.dtype.numpy, TensorDecoder.weights_into)


def _slice_of(file: _File, name: str) -> SfpSlice:
    """Unpickles a slice."""
    return file.get_slice(name)
