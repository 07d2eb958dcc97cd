"""How often the numbers of a quantiser occur among magnitudes, from sorted magnitudes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..coding.quantisers import F32

# Every _STRIDE-th magnitude is quantised first. Magnitudes between two with the same number have it, too.
_STRIDE = 32
# At most this many magnitudes, such as those of a BF16 tensor, are all quantised: that is faster.
_FEW_MAGNITUDES = 4096


class NumberCounts(NamedTuple):
    """How often numbers occur.

    Attributes:
        numbers: the numbers that occur, ascending, int64 [n].
        often: how often each occurs, above 0, int64 [n].
    """

    numbers: NDArray[np.int64]
    often: NDArray[np.int64]

    @classmethod
    def of(cls, numbers: NDArray[np.integer]) -> NumberCounts:
        """Counts numbers, shape [n]."""
        found, often = np.unique(numbers, return_counts=True)
        return cls(found.astype(np.int64), often.astype(np.int64))

    @property
    def zeros(self) -> int:
        """How often the number 0 occurs."""
        return int(self.often[0]) if len(self.numbers) and not self.numbers[0] else 0


class Magnitudes:
    """The magnitudes of a sample, sorted, for counting their numbers at many steps.

    Quantising rounds, so a greater magnitude never has a smaller number. Therefore the counts need only the
    places in the sorted magnitudes where the number changes.

    Attributes:
        values: the distinct magnitudes, ascending.
    """

    def __init__(self, magnitudes: F32) -> None:
        """Sorts magnitudes, shape [n]."""
        ascending = np.sort(magnitudes)
        starts = np.flatnonzero(np.concatenate(([len(ascending) > 0], ascending[1:] != ascending[:-1])))
        self.values = ascending[starts]
        self._before = np.append(starts, len(ascending))
        self._grid = np.arange(0, len(starts) + _STRIDE - 1, _STRIDE).clip(max=max(len(starts) - 1, 0))

    def counts(self, quantise: Callable[[F32], NDArray[np.unsignedinteger]]) -> NumberCounts:
        """Returns how often each number occurs.

        Args:
            quantise: returns the number of each magnitude, shape [n], and never a smaller one for a greater
                magnitude.
        """
        values = self.values
        if not len(values):
            return NumberCounts(np.zeros(0, np.int64), np.zeros(0, np.int64))
        if len(values) > _FEW_MAGNITUDES:
            places = self._possible_changes(quantise)
            numbers = quantise(values[places])
        else:
            places, numbers = None, quantise(values)
        first = np.append(0, np.flatnonzero(numbers[1:] != numbers[:-1]) + 1)
        before = self._before[first if places is None else places[first]]
        often = np.diff(before, append=self._before[-1])
        return NumberCounts(numbers[first].astype(np.int64), often)

    def _possible_changes(self, quantise: Callable[[F32], NDArray[np.unsignedinteger]]) -> NDArray[np.int64]:
        """Returns the place of the first magnitude, and of all that may have another number than the last."""
        coarse = quantise(self.values[self._grid])
        changes = np.flatnonzero(coarse[1:] != coarse[:-1])
        inside = (self._grid[changes][:, None] + np.arange(1, _STRIDE + 1)).reshape(-1)
        return np.append(0, inside[inside < len(self.values)])
