"""Choosing steps and centroids, and turning weights into numbers (the encoder's side of chapter 11).

Sums that decide something are taken by `np.bincount`, which adds one by one in order, so that they do not
depend on a platform's vector units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..coding.classes import FRACTION, Histogram, entropy_bits, histogram, log2_fixed
from ..coding.quantiser import F32, uniform_numbers

F64 = NDArray[np.float64]

# Search a step on at most so many weights, evenly spaced: the estimate's error is under 0.5 %.
SAMPLE = 1 << 16
_SEARCH_ROUNDS = 24
_LLOYD_BITS = 14  # the histogram of magnitudes has 2^14 bins
_LLOYD_ROUNDS = 200


@dataclass(frozen=True)
class UniformNumbers:
    """Magnitude numbers of a uniform quantiser.

    Attributes:
        step: the step.
        thresholds: see `coding.quantiser.uniform_numbers`.
    """

    step: np.float32
    thresholds: F32

    def __call__(self, magnitudes: F32) -> NDArray[np.uint32]:
        """The number of each magnitude, shape [n]."""
        return uniform_numbers(magnitudes, self.step, self.thresholds)


@dataclass(frozen=True)
class TableNumbers:
    """Magnitude numbers of a table of centroids, ascending: the nearest, of two equally near the lower."""

    centroids: F32

    def __call__(self, magnitudes: F32) -> NDArray[np.uint64]:
        """The number of each magnitude, shape [n]."""
        wide = self.centroids.astype(np.float64)
        middles = (wide[1:] + wide[:-1]) / 2
        return np.searchsorted(middles, magnitudes, side="left").astype(np.uint64)


def sample(values: NDArray[np.generic], size: int = SAMPLE) -> NDArray[np.generic]:
    """At most ``size`` values, evenly spaced."""
    if len(values) <= size:
        return values
    return values[np.arange(size) * len(values) // size]


def exact_sum(values: F64) -> float:
    """The sum, added in order."""
    return float(np.bincount(np.zeros(len(values), np.intp), weights=values)[0]) if len(values) else 0.0


def weighing_numbers(magnitudes: F32, step: float | np.float32, rate_weight: float) -> UniformNumbers:
    """A uniform quantiser whose thresholds weigh bits against error.

    Between two neighbouring numbers the lower is taken while (error squared, in steps) + rate_weight * bits
    is less; the bits are those of the order-0 entropy when all round to nearest. At high rates
    rate_weight = ln(2) / 6 = 0.1155 is the slope of error against bits, hence no gain beyond it.
    """
    plain = UniformNumbers(np.float32(step), np.zeros(0, np.float32))
    if not rate_weight:
        return plain
    counts = histogram(np.minimum(plain(magnitudes), np.uint32(4096)))
    numbers = np.arange(len(counts))
    # One is added to each count so that what did not occur in the sample still has a finite cost.
    bits = -log2_fixed(counts + 1) / float(1 << FRACTION) + (numbers > 0)
    rise = np.clip(np.diff(bits), 0, None)
    shift = np.minimum(rate_weight * rise / 2, 0.499)
    return UniformNumbers(np.float32(step), (numbers[1:] - 0.5 + shift).astype(np.float32))


def numbers_bits(counts: Histogram) -> int:
    """About how many bits (times 2^16) numbers with signs take, given how often each occurs.

    The entropy of which are 0, that of the others, and their signs; a prefix code for pairs takes half a bit
    a number at least, where there is more than one number.
    """
    total, others = int(counts.sum()), counts[1:]
    alive = int(others.sum())
    mask = entropy_bits(np.array([total - alive, alive]))
    least = alive << (FRACTION - 1) if np.count_nonzero(others) > 1 else 0
    return mask + max(entropy_bits(others), least) + (alive << FRACTION)


def step_for_bits(magnitudes: F32, positions: int, bits: float, rate_weight: float) -> float:
    """The least step found that needs at most ``bits`` bits a position.

    Args:
        magnitudes: a sample of the survivors' magnitudes.
        positions: how many positions the sample stands for, pruned ones included.
    """
    pruned = positions - len(magnitudes)

    def fits(step: float) -> bool:
        counts = histogram(weighing_numbers(magnitudes, step, rate_weight)(magnitudes))
        counts[0] += pruned
        return numbers_bits(counts) <= int(bits * positions * (1 << FRACTION))

    return _turning_point(fits, magnitudes)[1]


def step_for_error(magnitudes: F32, error_db: float, rate_weight: float) -> float:
    """The greatest step found whose mean squared error is at most ``error_db`` under the mean square."""
    wide = magnitudes.astype(np.float64)
    allowed = exact_sum(wide * wide) * 10.0 ** (error_db / 10)

    def too_great(step: float) -> bool:
        numbers = weighing_numbers(magnitudes, step, rate_weight)(magnitudes)
        error = wide - numbers.astype(np.float64) * float(np.float32(step))
        return bool(exact_sum(error * error) > allowed)

    return _turning_point(too_great, magnitudes)[0]


def _turning_point(holds: Callable[[float], bool], magnitudes: F32) -> tuple[float, float]:
    """Two steps, 1 part in 10^5 apart: at the first something does not hold yet, at the second it does."""
    greatest = float(magnitudes.max()) if len(magnitudes) else 0.0
    if greatest == 0.0:
        return 1.0, 1.0
    low = float(np.float32(greatest / (1 << 20)))
    high = float(np.float32(min(greatest * 4, float(np.finfo(np.float32).max))))
    if holds(low):
        return low, low
    if not holds(high):
        return high, high
    for _ in range(_SEARCH_ROUNDS):
        middle = float(np.float32(np.sqrt(low * high)))
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low, high


def lloyd_max(magnitudes: F32, count: int, weights: F32 | None = None) -> F32:
    """Centroids of least mean squared error (Lloyd 1957, Max 1960), ascending, at most ``count``.

    Args:
        magnitudes: of the survivors, shape [n].
        count: how many centroids.
        weights: how much each error counts (an importance), shape [n], or None for all alike.
    """
    distinct = np.unique(magnitudes[: 4 * count + 64])
    if len(distinct) <= count:
        distinct = np.unique(magnitudes)
        if len(distinct) <= count:
            return distinct.astype(np.float32)
    # Whole numbers throughout: sums are exact in any order, and differences of running sums too. With at most
    # 2^16 magnitudes all stays below 2^53.
    greatest = float(magnitudes.max())
    places = (magnitudes.astype(np.float64) * ((1 << 20) / greatest)).astype(np.int64)
    mass = np.ones(len(magnitudes), np.int64)
    if weights is not None and weights.max() > 0:
        mass = (np.maximum(weights, 0).astype(np.float64) * ((1 << 16) / float(weights.max()))).astype(
            np.int64
        )
    bins = np.minimum(places >> (20 - _LLOYD_BITS), (1 << _LLOYD_BITS) - 1)
    mass_below = _running(bins, mass)
    moment_below = _running(bins, mass * places)
    # Start with equal shares of the square root of the mass, which is near the optimum for many centroids.
    spread = np.concatenate(([0.0], np.cumsum(np.sqrt(np.diff(mass_below)))))
    shares = (np.arange(count) + 0.5) / count * spread[-1]
    centroids = (np.searchsorted(spread, shares) - 0.5) * (1 << (20 - _LLOYD_BITS))
    for _ in range(_LLOYD_ROUNDS):
        middles = (centroids[1:] + centroids[:-1]) / 2
        cuts = np.ceil(middles / (1 << (20 - _LLOYD_BITS))).astype(np.int64)
        edges = np.concatenate(([0], np.clip(cuts, 0, 1 << _LLOYD_BITS), [1 << _LLOYD_BITS]))
        inside = np.diff(mass_below[edges])
        moved = np.where(inside > 0, np.diff(moment_below[edges]) / np.maximum(inside, 1), centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return np.unique((centroids * (greatest / (1 << 20))).astype(np.float32))


def _running(bins: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sums of the values in all bins below each."""
    sums = np.zeros(1 << _LLOYD_BITS, np.int64)
    np.add.at(sums, bins, values)
    return np.concatenate(([0], np.cumsum(sums)))
