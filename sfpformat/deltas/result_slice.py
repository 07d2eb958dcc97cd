"""Slices of the result of a delta."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..decode.selection import Index, Selection, select
from .tensors import Array, Spec


class Sliceable(Protocol):
    """What a slice needs of the result: `DeltaFile` has it."""

    def read_part(self, name: str, selection: Selection) -> Array:
        """Returns selected elements of a tensor."""

    def changed_part(self, name: str, selection: Selection) -> NDArray[np.bool_]:
        """Returns which of the selected elements of a tensor change."""


class DeltaSlice:
    """A tensor of the result that is computed when it is indexed. Same interface as `SfpSlice`.

    Reads only the selected elements, and the blocks of the delta that contain them: by default, 4,194,304
    consecutive elements of the changed tensors of one dtype. Of a base in a file, it decodes only these.

    A slice cannot be compared with the checksum of a whole tensor. Checked are: names, dtypes and shapes of
    the base, the checksums of the chunks that are decoded, and that the changes of each block fit the base's
    exponents (R-DLT-011). A wrong base with the same exponents is not detected. `DeltaFile.check` compares
    the checksums of whole tensors; so does an index that selects a whole tensor, and any index of a tensor
    that the delta stores in parts: it is computed as a whole.
    """

    def __init__(self, file: Sliceable, name: str, spec: Spec) -> None:
        self._file, self._name, self._spec = file, name, spec

    def get_shape(self) -> list[int]:
        """Returns the tensor's shape."""
        return list(self._spec.shape)

    def get_dtype(self) -> str:
        """Returns the name of the tensor's dtype, such as ``"BF16"``."""
        return self._spec.dtype.name

    def __getitem__(self, index: Index) -> Array:
        """Returns the selected part as a new array.

        Args:
            index: integers, slices with any step, and ``...``, as in basic numpy indexing.

        Raises:
            IndexError: the index does not fit the shape, or has an item of another type.
            BaseMismatchError, InvalidFileError, LimitError: as in `DeltaFile.get_tensor`.
        """
        return self._file.read_part(self._name, select(self._spec.shape, index))

    def get_changed(self, index: Index = ...) -> NDArray[np.bool_]:
        """Returns which of the selected elements differ from the base: bool, of the shape of the selection.

        All elements of replaced and added tensors count as different. Decodes only the blocks that contain
        the selected elements. Same arguments and errors as indexing.
        """
        return self._file.changed_part(self._name, select(self._spec.shape, index))


def write_selected(
    out: NDArray[np.generic],
    selection: Selection,
    width: int,
    at: NDArray[np.int64],
    values: NDArray[np.generic],
) -> None:
    """Writes values into the selected elements of a tensor.

    Args:
        out: the selected elements, in the order of the selection, [elements].
        selection: their positions in the tensor.
        width: elements of a position.
        at: the elements that the values replace, ascending, [n]. Those that are not selected are ignored.
        values: the values, [n].
    """
    if selection.contiguous:
        low = (int(selection.starts[0]) + selection.run.start) * width
        first, stop = np.searchsorted(at, (low, low + len(out)))
        out[at[first:stop] - low] = values[first:stop]
    elif len(at):
        for first, positions in selection.blocks():
            elements = (positions[:, None] * width + np.arange(width)).reshape(-1)
            nearest = np.minimum(np.searchsorted(at, elements), len(at) - 1)
            hit = np.flatnonzero(at[nearest] == elements)
            out[first * width + hit] = values[nearest[hit]]
