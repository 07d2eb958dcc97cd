"""Converts an index such as ``[10:20, :64]`` to positions of a tensor and to the segments with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType

import numpy as np
from numpy.typing import NDArray

Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]

# Elements that are gathered at a time. This bounds the memory of their positions, 8 bytes per element.
_GATHER_BLOCK = 1 << 20


@dataclass(frozen=True)
class Selection:
    """Positions in a flattened tensor: every start plus every offset of the run.

    Attributes:
        shape: shape of the result.
        starts: int64 [n].
        run: the offsets from each start.
    """

    shape: tuple[int, ...]
    starts: NDArray[np.int64]
    run: range

    @property
    def size(self) -> int:
        """Number of selected positions."""
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether the positions are consecutive and ascending."""
        return len(self.starts) == 1 and self.run.step == 1

    def segments(self, segment: int) -> NDArray[np.int64]:
        """Returns the numbers of the segments that contain any of the positions, ascending."""
        low, high = min(self.run[0], self.run[-1]), max(self.run[0], self.run[-1])
        first, last = (self.starts + low) // segment, (self.starts + high) // segment
        spread = int((last - first).max()) + 1
        if len(self.starts) == 1:
            return np.arange(first[0], last[0] + 1)
        every = first[:, None] + np.arange(spread)
        return np.unique(every[every <= last[:, None]])

    def blocks(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yields the positions in blocks, in the order of the result: offset in the result, positions."""
        run = np.arange(self.run.start, self.run.stop, self.run.step)
        step = max(_GATHER_BLOCK // len(run), 1)
        for first in range(0, len(self.starts), step):
            block = self.starts[first : first + step, None] + run
            yield first * len(run), block.reshape(-1)


def select(shape: tuple[int, ...], index: Index) -> Selection:
    """Returns the positions that a basic numpy index selects.

    Raises:
        IndexError: too many indices, an index out of range, more than one ``...``, or an index that is not an
            integer, a slice or ``...``.
    """
    ranges, kept = _ranges(shape, index)
    result = tuple(len(r) for r, keep in zip(ranges, kept, strict=True) if keep)
    if math.prod(result) == 0:
        return Selection(result, np.zeros(0, np.int64), range(0))
    # Join the last dimensions into one run while they are selected whole.
    run, stride, outer = range(1), 1, len(shape)
    while outer and len(run) == stride and run.step == 1:
        outer -= 1
        r = ranges[outer]
        if len(run) > 1 and r.step != 1:
            outer += 1
            break
        run = range(r.start * stride, r.start * stride + len(r) * stride) if r.step == 1 else r
        stride *= shape[outer]
    starts = np.zeros(1, np.int64)
    for size, r in zip(shape[:outer], ranges[:outer], strict=True):
        starts = (starts[:, None] * size + np.arange(r.start, r.stop, r.step)).reshape(-1)
    return Selection(result, starts * math.prod(shape[outer:]), run)


def _ranges(shape: tuple[int, ...], index: Index) -> tuple[list[range], list[bool]]:
    """Returns a range for each dimension, and whether the dimension remains in the result."""
    items = index if isinstance(index, tuple) else (index,)
    for item in items:
        if not (item is Ellipsis or isinstance(item, (int, np.integer, slice))) or isinstance(item, bool):
            raise IndexError(f"only integers, slices and '...' can index a slice, not {item!r}")
    if sum(item is Ellipsis for item in items) > 1:
        raise IndexError("an index can have only one '...'")
    given = len(items) - (Ellipsis in items)
    if given > len(shape):
        raise IndexError(f"{given} indices for {len(shape)} dimensions")
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    filled = [*items[:at], *[slice(None)] * (len(shape) - given), *items[at + 1 :]]
    ranges, kept = [], []
    for size, item in zip(shape, filled, strict=True):
        if isinstance(item, slice):
            ranges.append(range(size)[item])
            kept.append(True)
            continue
        assert not isinstance(item, EllipsisType)  # replaced by slices above
        number = int(item)
        if not -size <= number < size:
            raise IndexError(f"index {number} is out of range for size {size}")
        ranges.append(range(number % size, number % size + 1))
        kept.append(False)
    return ranges, kept
