"""Boxes: the rectangular parts of tensors that processes hold, and the positions of their elements."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...decode.selection import Selection, select


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


def positions_of(selection: Selection, first: int, stop: int) -> NDArray[np.int64]:
    """Returns the positions of the elements ``first`` to ``stop`` - 1 of a box, ascending."""
    length = len(selection.run)
    low, high = first // length, -(-stop // length)
    starts = selection.starts[low:high, None] + selection.run.start
    return (starts + np.arange(length)).reshape(-1)[first - low * length : stop - low * length]
