"""Choosing steps and centroids, and turning weights into numbers (the encoder's side of chapter 11).

Sums that decide something are taken by `np.bincount`, which adds one by one in order, so that they do not
depend on a platform's vector units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from ..coding.classes import FRACTION, Histogram, entropy_bits, histogram, log2_fixed
from ..coding.quantisers import F32, Uniform, uniform_numbers
from ..dtypes import DTYPES, Dtype
from .finite import Reconstruction

F64 = NDArray[np.float64]

# Search a step on at most so many weights, evenly spaced: the estimate's error is under 0.5 %.
SAMPLE = 1 << 16
_SEARCH_ROUNDS = 24
_CODE_LOSS = 32  # about one part in so many that prefix codes of a mask and levels take beyond entropy
_CLASS_BITS = 10  # numbers of more bits are counted by so many leading ones
_MOST_IN_PAIRS = 8  # with more different numbers, a code of pairs takes about their entropy
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
class WeighedNumbers:
    """Magnitude numbers of a uniform quantiser where the error of each weight counts as much as it says.

    Of the nearest number, the one below it and 0 the one is taken for which
    (weight * (error squared, in steps) + rate_weight * bits) is least; of equals the greatest.

    Attributes:
        step: the step.
        costs: rate_weight * bits of each number; a greater number rounds to nearest.
    """

    step: np.float32
    costs: F32

    def __call__(self, magnitudes: F32, weights: F32) -> NDArray[np.uint32]:
        """The number of each magnitude, shape [n]; weights, shape [n], are 1 in the mean."""
        chosen = uniform_numbers(magnitudes, self.step, np.zeros(0, np.float32))
        weighed = np.flatnonzero((chosen > 0) & (chosen < len(self.costs)))
        steps, weights = magnitudes[weighed] / self.step, weights[weighed]
        numbers = nearest = chosen[weighed]
        with np.errstate(over="ignore", invalid="ignore"):  # a cost that is no number is not less
            least = self._cost(steps, weights, nearest)
            for candidate in (nearest - np.uint32(1), np.zeros_like(nearest)):
                cost = self._cost(steps, weights, candidate)
                numbers = np.where(cost < least, candidate, numbers)
                least = np.minimum(cost, least)
        chosen[weighed] = numbers
        return chosen

    def _cost(self, steps: F32, weights: F32, numbers: NDArray[np.uint32]) -> F32:
        error = steps - numbers.astype(np.float32)
        return np.asarray(weights * (error * error) + self.costs[numbers], np.float32)


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
    if not rate_weight:
        return UniformNumbers(np.float32(step), np.zeros(0, np.float32))
    rise = _rise_of_bits(magnitudes, np.float32(step))
    shift = np.minimum(rate_weight * rise / 2, 0.499)
    return UniformNumbers(np.float32(step), (np.arange(len(rise)) + 0.5 + shift).astype(np.float32))


def weighed_numbers(magnitudes: F32, step: float | np.float32, rate_weight: float) -> WeighedNumbers:
    """As `weighing_numbers`, for weights whose errors do not count alike."""
    bits = np.cumsum(_rise_of_bits(magnitudes, np.float32(step)))
    return WeighedNumbers(np.float32(step), np.concatenate(([0.0], rate_weight * bits)).astype(np.float32))


def _rise_of_bits(magnitudes: F32, step: np.float32) -> F64:
    """How many bits a number takes more than the one below, at least 0, by the entropy of the nearest."""
    nearest = uniform_numbers(magnitudes, step, np.zeros(0, np.float32))
    counts = histogram(np.minimum(nearest, np.uint32(4096)))
    # One is added to each count so that what did not occur in the sample still has a finite cost.
    bits = -log2_fixed(counts + 1) / float(1 << FRACTION) + (np.arange(len(counts)) > 0)
    return np.clip(np.diff(bits), 0, None)


@dataclass(frozen=True)
class Sampled:
    """Some weights of a tensor, by which its step is chosen.

    Attributes:
        magnitudes: of the survivors among them, float32, divided by their scale.
        positions: how many positions they stand for, pruned ones included.
        weights: how much the error of each counts, 1 in the mean, float32; None for all alike.
        rate_weight: as in `Options`.
        dtype: the tensor's.
        originals: the magnitudes as they are in the tensor, float64; None where there is no scale.
        scale: the scale factor of each, or None.
        multiplier: the importance of each, as stored, where it multiplies the weights; else None.
        masked: whether there is a mask in which survivors stay survivors though their number becomes 0.
        widest: the greatest magnitude of the whole tensor, divided by its scale, where all levels have one
            width; else None.
    """

    magnitudes: F32
    positions: int
    weights: F32 | None
    rate_weight: float
    dtype: Dtype = DTYPES["F32"]
    originals: F64 | None = None
    scale: F32 | None = None
    multiplier: F32 | None = None
    masked: bool = False
    widest: float | None = None

    def quantiser(self, step: float | np.float32) -> UniformNumbers | WeighedNumbers:
        """The quantiser of the whole tensor with that step."""
        how = weighing_numbers if self.weights is None else weighed_numbers
        return how(self.magnitudes, step, self.rate_weight)

    def numbers(self, step: float) -> NDArray[np.unsignedinteger]:
        """The numbers of the sample with that step."""
        quantiser = self.quantiser(step)
        if isinstance(quantiser, UniformNumbers):
            numbers = quantiser(self.magnitudes)
        else:
            assert self.weights is not None
            numbers = quantiser(self.magnitudes, self.weights)
        return self._reconstruction(step).lowered(numbers, self.scale, self.multiplier)

    def _reconstruction(self, step: float) -> Reconstruction:
        return Reconstruction(self.dtype, Uniform(np.float32(step)))

    @property
    def pruned(self) -> int:
        """How many of the positions are pruned."""
        return self.positions - len(self.magnitudes)

    def mask_bits(self) -> int:
        """About how many bits (times 2^16) the mask takes whatever the step; 0 where that depends on it."""
        if self.widest is not None:
            return self.positions << FRACTION if self.masked or self.pruned else 0
        return entropy_bits(np.array([self.pruned, len(self.magnitudes)])) if self.masked else 0

    def bits(self, step: float) -> tuple[int, int]:
        """About how many bits (times 2^16) the sample takes with that step: its levels, and all of it.

        Survivors that become 0 are pruned like others, except where there is a mask.
        """
        if not len(self.magnitudes):
            return 0, self.mask_bits()
        counts = histogram(self.numbers(step))
        if self.widest is not None:
            return self._fixed_bits(step, int(counts[0]))
        levels = numbers_bits(counts)
        if self.masked:
            # The survivors that become 0 share a stream with the others, and have signs, too.
            levels = max(levels, pairs_bits(counts)) + (int(counts[0]) << FRACTION)
            return levels, self.mask_bits() + levels
        counts[0] += self.pruned
        return levels, numbers_bits(counts)

    def _fixed_bits(self, step: float, zeros: int) -> tuple[int, int]:
        """As `bits` where all levels have one width, and the mask is a bit a position where there is one."""
        assert self.widest is not None
        greatest = math.floor(np.float32(self.widest) / np.float32(step) + np.float32(0.5))
        width = (2 * greatest + 1).bit_length() if greatest else 0
        levels = width * len(self.magnitudes) << FRACTION
        kept = len(self.magnitudes) - (0 if self.masked or not self.pruned else zeros)
        return levels, self.mask_bits() + (width * kept << FRACTION)

    def error(self, step: float) -> float:
        """The sum of the squared errors with that step, weighed, before any importance multiplies."""
        values = self._reconstruction(step).values(self.numbers(step), self.scale, None)
        return self._weighed_sum(self._originals() - values.astype(np.float64))

    def power(self) -> float:
        """The sum of the squares, weighed."""
        return self._weighed_sum(self._originals())

    def _originals(self) -> F64:
        return self.magnitudes.astype(np.float64) if self.originals is None else self.originals

    def _weighed_sum(self, numbers: F64) -> float:
        squares = numbers * numbers
        return exact_sum(squares if self.weights is None else squares * self.weights)


def error_weights(importances: NDArray[np.floating], weighted: str) -> F32:
    """How much errors count: the importances, float32, or their square roots.

    Other powers would not be the same bits everywhere.
    """
    with np.errstate(over="ignore"):
        wide = np.asarray(importances, np.float32)
    return np.sqrt(wide) if weighted == "root" else wide


def mean_of(weights: F32) -> np.float32:
    """Their mean; 1 where that is no number to divide by."""
    mean = np.float32(exact_sum(weights.astype(np.float64)) / max(len(weights), 1))
    return mean if 0 < mean < np.inf else np.float32(1)


def numbers_bits(counts: Histogram) -> int:
    """About how many bits (times 2^16) numbers with signs take, given how often each occurs.

    The entropy of which are 0, that of the others, and their signs; a prefix code for pairs takes half a bit
    a number at least, where there is more than one number.
    """
    total, others = int(counts.sum()), counts[1:]
    alive = int(others.sum())
    mask = entropy_bits(np.array([total - alive, alive]))
    least = alive << (FRACTION - 1) if np.count_nonzero(others) > 1 else 0
    classes, residuals = _in_classes(others)
    return mask + max(entropy_bits(classes) + (residuals << FRACTION), least) + (alive << FRACTION)


def pairs_bits(counts: Histogram) -> int:
    """How many bits (times 2^16) numbers and the signs of those above 0 take with a Huffman code of pairs.

    It is well above the entropy where one number is much more frequent than the others: 0.68 bits a number
    instead of 0.54 where seven in eight are 0. Returns 0 where many numbers occur, whose entropy is close.
    """
    often = [int(count) for count in counts if count]
    if len(often) > _MOST_IN_PAIRS or len(counts) > 1 << _CLASS_BITS:
        return 0
    total = sum(often)
    pairs = [one * other for one in often for other in often]
    heapify(pairs)
    length = 0  # of all codewords, each times how often it occurs among total^2 pairs
    while len(pairs) > 1:
        joined = heappop(pairs) + heappop(pairs)
        length += joined
        heappush(pairs, joined)
    return (length << FRACTION) // max(2 * total, 1) + ((total - int(counts[0])) << FRACTION)


def _in_classes(counts: Histogram) -> tuple[Histogram, int]:
    """A histogram whose great numbers are joined into classes, and the residual bits that these take.

    A sample has too few weights to show the entropy of numbers that are many: of n different ones it would be
    log2 n at most. Numbers of a class are taken to be equally frequent.
    """
    if len(counts) <= 1 << _CLASS_BITS:
        return counts, 0
    numbers = np.flatnonzero(counts)
    often = counts[numbers]
    widths = np.maximum(np.frexp(numbers.astype(np.float64))[1].astype(np.int64) - _CLASS_BITS, 0)
    classes = (numbers >> widths) + (widths << (_CLASS_BITS - 1))
    joined = np.bincount(classes, weights=often.astype(np.float64)).astype(np.int64)  # exact below 2^53
    return joined, int(often @ widths)


def step_for_bits(sample: Sampled, bits: float) -> float:
    """The least step found with which a survivor's level takes at most ``bits`` bits, and a position no more.

    With the second condition pruning makes no tensor more than 1 % larger; it counts where few are pruned. A
    mask that stays as it is and alone takes more than half of ``bits`` a position would leave too little for
    the levels: it is not counted.
    """
    levels = int(bits * len(sample.magnitudes) * (1 << FRACTION))
    whole = int(bits * sample.positions * (1 << FRACTION))
    counted = sample.pruned > 0 and 2 * sample.mask_bits() <= whole
    if sample.masked:
        whole -= whole // _CODE_LOSS  # two streams instead of one

    def holds(step: float) -> bool:
        found = sample.bits(step)
        return found[0] <= levels and not (counted and found[1] > whole)

    return turning_point(holds, _greatest(sample.magnitudes))[1]


def step_for_budget(sample: Sampled, budget: float) -> float | None:
    """The least step found with which a position takes at most ``budget`` bits; None where none does."""
    allowed = int(budget * sample.positions * (1 << FRACTION))
    if sample.mask_bits() > allowed:
        return None
    return turning_point(lambda step: sample.bits(step)[1] <= allowed, _greatest(sample.magnitudes))[1]


def step_for_error(sample: Sampled, allowed: float) -> float | None:
    """The greatest step found whose mean squared error is at most ``allowed``; None where none is."""
    most = allowed * len(sample.magnitudes)
    step = turning_point(lambda step: sample.error(step) > most, _greatest(sample.magnitudes))[0]
    return step if sample.error(step) <= most else None


def _greatest(magnitudes: F32) -> float:
    return float(magnitudes.max(initial=0))


def turning_point(holds: Callable[[float], bool], greatest: float) -> tuple[float, float]:
    """Two steps, 1 part in 10^5 apart: at the first something does not hold yet, at the second it does.

    Args:
        holds: does not hold for small steps and does for great ones.
        greatest: the greatest magnitude.
    """
    if greatest == 0.0:
        return 1.0, 1.0
    least = float(np.finfo(np.float32).smallest_subnormal)
    low = max(float(np.float32(greatest / (1 << 20))), least)
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
