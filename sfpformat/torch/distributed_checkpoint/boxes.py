"""Boxes: the rectangular parts of tensors that processes hold, and the positions of their elements."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ...decode.selection import Selection, select
from ..tensors import Array


class Box(NamedTuple):
    """A part of a tensor that a process holds.

    Attributes:
        rank: the process.
        item: the number of the part among the items of its plan.
        start: index of its first element in the tensor.
        size: its shape.
    """

    rank: int
    item: int
    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.size)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that selects the part of the tensor."""
        return tuple(slice(low, low + length) for low, length in zip(self.start, self.size, strict=True))

    def selection(self, shape: tuple[int, ...]) -> Selection:
        """Returns its positions in a tensor of a shape. They ascend in the order of its elements."""
        return select(shape, self.slices)


def elements_before(selection: Selection, edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns how many positions of a box are less than each edge, int64 [edges].

    Args:
        selection: the positions of a box.
        edges: positions in the tensor, int64 [edges].
    """
    if not selection.size:
        return np.zeros(len(edges), np.int64)
    starts, length = selection.starts + selection.run.start, len(selection.run)
    runs = np.searchsorted(starts, edges)  # that begin before the edge
    last = np.maximum(runs - 1, 0)
    inside = last * length + np.minimum(edges - starts[last], length)
    return np.where(runs > 0, inside, 0).astype(np.int64)


def position_at(selection: Selection, number: int) -> int:
    """Returns the position of one element of a box."""
    run, offset = divmod(number, len(selection.run))
    return int(selection.starts[run]) + selection.run.start + offset


def elements_of(values: Array, low: int, selection: Selection, first: int, stop: int) -> Array:
    """Returns the elements ``first`` to ``stop`` - 1 of a box: a view if they are consecutive, else a copy.

    Args:
        values: consecutive elements of the tensor, [n], which contain them.
        low: the position of the first value.
        selection: the positions of the box.
        first, stop: the elements; there is at least one.

    Returns:
        The elements, [stop - first].
    """
    length = len(selection.run)
    if first // length == (stop - 1) // length:
        start = position_at(selection, first) - low
        return values[start : start + stop - first]
    begin, end = -(-first // length), stop // length  # the runs that are needed whole
    starts = selection.starts[begin:end] + (selection.run.start - low)
    steps = np.diff(starts)
    if len(starts) < 2 or (steps != steps[0]).any():
        return values[positions_of(selection, first, stop) - low]
    # Rows of equal distance, such as a half of each row of a matrix: numpy copies them without positions.
    out = np.empty(stop - first, values.dtype)
    step, size = int(steps[0]), values.strides[0]
    rows = as_strided(values[int(starts[0]) :], (len(starts), length), (step * size, size), writeable=False)
    out[begin * length - first : end * length - first].reshape(rows.shape)[:] = rows
    for some in (range(first, begin * length), range(end * length, stop)):  # of incomplete runs
        if some:
            start = position_at(selection, some.start) - low
            out[some.start - first : some.stop - first] = values[start : start + len(some)]
    return out


def positions_of(selection: Selection, first: int, stop: int) -> NDArray[np.int64]:
    """Returns the positions of the elements ``first`` to ``stop`` - 1 of a box, ascending."""
    length = len(selection.run)
    low, high = first // length, -(-stop // length)
    starts = selection.starts[low:high, None] + selection.run.start
    return (starts + np.arange(length)).reshape(-1)[first - low * length : stop - low * length]
