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
from ..coding.quantiser import F32
from ..errors import OptionError

F64 = NDArray[np.float64]

# Search a step on at most so many weights, evenly spaced: the estimate's error is under 0.5 %.
SAMPLE = 1 << 16
_SEARCH_ROUNDS = 24
_LLOYD_BINS = 1 << 14
_LLOYD_ROUNDS = 200
# A number this great would need classes for 2^30 levels; a step so small asks for `exact`.
MAX_NUMBER = (1 << 30) - 1


@dataclass(frozen=True)
class UniformNumbers:
    """Magnitude numbers of a uniform quantiser.

    Attributes:
        step: the step.
        thresholds: entry m - 1 is the least magnitude, in steps, that gets the number m instead of m - 1, for
            numbers up to len(thresholds); greater ones round to nearest. Empty: all round to nearest.
    """

    step: np.float32
    thresholds: F32

    def __call__(self, magnitudes: F32) -> NDArray[np.uint64]:
        """The number of each magnitude, shape [n]."""
        with np.errstate(over="ignore"):
            steps = magnitudes / self.step
        nearest = np.floor(steps + np.float32(0.5))
        if len(nearest) and nearest.max() > MAX_NUMBER:
            raise OptionError(f"a step of {self.step} is too small for weights of {magnitudes.max()}")
        numbers = nearest.astype(np.int64)
        if len(self.thresholds):
            low = np.minimum(numbers, len(self.thresholds))
            below = (numbers == low) & (low > 0) & (steps < self.thresholds[np.maximum(low, 1) - 1])
            numbers -= below
        return np.asarray(numbers, np.uint64)


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


def uniform_numbers(magnitudes: F32, step: float, rate_weight: float) -> UniformNumbers:
    """A uniform quantiser whose thresholds weigh bits against error.

    Between two neighbouring numbers the lower is taken while (error squared, in steps) + rate_weight * bits
    is less; the bits are those of the order-0 entropy when all round to nearest. At high rates
    rate_weight = ln(2) / 6 = 0.1155 is the slope of error against bits, hence no gain beyond it.
    """
    plain = UniformNumbers(np.float32(step), np.zeros(0, np.float32))
    if not rate_weight:
        return plain
    counts = histogram(np.minimum(plain(magnitudes), np.uint64(4096)))
    numbers = np.arange(len(counts))
    # One is added to each count so that what did not occur in the sample still has a finite cost.
    bits = -log2_fixed(counts + 1) / float(1 << FRACTION) + (numbers > 0)
    rise = np.clip(np.diff(bits), 0, None)
    shift = np.minimum(rate_weight * rise / 2, 0.499)
    return UniformNumbers(np.float32(step), (numbers[1:] - 0.5 + shift).astype(np.float32))


def numbers_entropy(counts: Histogram) -> int:
    """Bits (times 2^16) of numbers with signs: the order-0 entropy, and a bit for each that is not 0."""
    return entropy_bits(counts) + (int(counts[1:].sum()) << FRACTION)


def step_for_bits(magnitudes: F32, positions: int, bits: float, rate_weight: float) -> float:
    """The least step found that needs at most ``bits`` bits a position.

    Args:
        magnitudes: a sample of the survivors' magnitudes.
        positions: how many positions the sample stands for, pruned ones included.
    """
    pruned = positions - len(magnitudes)

    def fits(step: float) -> bool:
        counts = histogram(uniform_numbers(magnitudes, step, rate_weight)(magnitudes))
        counts[0] += pruned
        return numbers_entropy(counts) <= int(bits * positions * (1 << FRACTION))

    return _least(fits, magnitudes)


def step_for_error(magnitudes: F32, error_db: float, rate_weight: float) -> float:
    """The greatest step found whose mean squared error is at most ``error_db`` under the mean square."""
    wide = magnitudes.astype(np.float64)
    allowed = exact_sum(wide * wide) * 10.0 ** (error_db / 10)

    def too_great(step: float) -> bool:
        numbers = uniform_numbers(magnitudes, step, rate_weight)(magnitudes)
        error = wide - numbers.astype(np.float64) * float(np.float32(step))
        return bool(exact_sum(error * error) > allowed)

    least = _least(too_great, magnitudes)
    return float(np.nextafter(np.float32(least), np.float32(0))) if too_great(least) else least


def _least(holds: Callable[[float], bool], magnitudes: F32) -> float:
    """The least step, to 1 part in 10^5, for which something holds that holds for all greater ones."""
    greatest = float(magnitudes.max()) if len(magnitudes) else 0.0
    if greatest == 0.0:
        return 1.0
    limits = np.finfo(np.float32)
    low = max(greatest / (1 << 20), float(limits.smallest_subnormal))
    high = min(greatest * 4, float(limits.max))
    if holds(low):
        return low
    for _ in range(_SEARCH_ROUNDS):
        middle = float(np.float32(np.sqrt(low * high)))
        low, high = (low, middle) if holds(middle) else (middle, high)
    return float(np.float32(high))


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
    greatest = float(magnitudes.max())
    bins = np.minimum(
        (magnitudes.astype(np.float64) * (_LLOYD_BINS / greatest)).astype(np.int64), _LLOYD_BINS - 1
    )
    mass = np.ones(len(magnitudes)) if weights is None else np.maximum(weights, 0).astype(np.float64)
    mass_below = _running(np.bincount(bins, mass, _LLOYD_BINS))
    moment_below = _running(np.bincount(bins, mass * magnitudes, _LLOYD_BINS))
    # Start with quantiles of mass^(1/3)-like spacing: equal shares of the square root of the mass.
    spread = _running(np.sqrt(np.diff(mass_below)))
    shares = (np.arange(count) + 0.5) / count * spread[-1]
    centroids = (np.searchsorted(spread, shares) - 0.5) * (greatest / _LLOYD_BINS)
    for _ in range(_LLOYD_ROUNDS):
        middles = (centroids[1:] + centroids[:-1]) / 2
        cuts = np.clip(np.ceil(middles * (_LLOYD_BINS / greatest)).astype(np.int64), 0, _LLOYD_BINS)
        edges = np.concatenate(([0], cuts, [_LLOYD_BINS]))
        inside = np.diff(mass_below[edges])
        moved = np.where(inside > 0, np.diff(moment_below[edges]) / np.maximum(inside, 1e-300), centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return np.unique(np.maximum(centroids, 0).astype(np.float32))


def _running(values: NDArray[np.generic]) -> F64:
    """Sums of all values before each place, one place more than there are values."""
    return np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
