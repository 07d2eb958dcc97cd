"""Chooses steps and centroids, and converts weights to numbers (the encoder's side of SPEC.md chapter 11).

Sums that affect a decision use `np.bincount`, which adds in order, so that they do not depend on the vector
units of a platform.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..coding.classes import FRACTION, LOG2, LOG2_BITS, Histogram, entropy_bits, log2_fixed
from ..coding.quantisers import F32, Uniform, uniform_numbers
from ..dtypes import DTYPES, Dtype
from ..errors import OptionError
from .finite import Reconstruction
from .number_counts import Magnitudes, NumberCounts

F64 = NDArray[np.float64]

# The greatest number of weights, evenly spaced, on which a step is searched: the estimate's error is < 0.5 %.
SAMPLE = 1 << 16
_SEARCH_ROUNDS = 24
_CODE_LOSS = 32  # prefix codes of a mask and levels take about 1/32 more than the entropy
_CLASS_BITS = 10  # numbers of more bits are counted by this many leading bits
_MOST_IN_PAIRS = 8  # with more different numbers, a Huffman code of pairs takes about the entropy
_FEW_NUMBERS = 64  # for at most this many numbers, sums in Python are faster than in numpy
_REPEATED = 4  # errors are computed once for equal magnitudes if each occurs so often on average
_MOST_RISES = 4096  # from this number on, all numbers are counted as one to estimate their bits


_LOGARITHMS: list[int] = LOG2.tolist()


def log2_of(number: int) -> int:
    """Returns the result of `log2_fixed` for one positive integer."""
    exponent = number.bit_length() - 1
    shift = exponent - LOG2_BITS
    mantissa = number >> shift if shift >= 0 else number << -shift
    return (exponent << FRACTION) + _LOGARITHMS[mantissa - (1 << LOG2_BITS)]


@dataclass(frozen=True)
class UniformNumbers:
    """Magnitude numbers of a uniform quantiser.

    Attributes:
        step: the step.
        thresholds: see `coding.quantisers.uniform_numbers`.
    """

    step: np.float32
    thresholds: F32

    def __call__(self, magnitudes: F32) -> NDArray[np.uint32]:
        """Returns the number of each magnitude, shape [n]."""
        return uniform_numbers(magnitudes, self.step, self.thresholds)


@dataclass(frozen=True)
class WeighedNumbers:
    """Magnitude numbers of a uniform quantiser with a weight for each error.

    The candidates are the nearest number, the number below it, and 0. The one with the least
    (weight * (error squared, in steps) + rate_weight * bits) is chosen; of equal ones the greatest.

    Attributes:
        step: the step.
        costs: rate_weight * bits of each number. Numbers beyond its end are rounded to nearest.
    """

    step: np.float32
    costs: F32

    def __call__(self, magnitudes: F32, weights: F32) -> NDArray[np.uint32]:
        """Returns the number of each magnitude, shape [n]. The weights, shape [n], have a mean of 1."""
        chosen = uniform_numbers(magnitudes, self.step, np.zeros(0, np.float32))
        weighed = np.flatnonzero((chosen > 0) & (chosen < len(self.costs)))
        steps, weights = magnitudes[weighed] / self.step, weights[weighed]
        numbers = nearest = chosen[weighed]
        with np.errstate(over="ignore", invalid="ignore"):  # a NaN cost compares as not less
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


def exact_sum(values: F64) -> float:
    """Returns the sum, added in order."""
    return float(np.bincount(np.zeros(len(values), np.intp), weights=values)[0]) if len(values) else 0.0


def weighing_numbers(magnitudes: Magnitudes, step: float | np.float32, rate_weight: float) -> UniformNumbers:
    """Returns a uniform quantiser whose thresholds weigh bits against error.

    Of two neighbouring numbers, the one with the lower (error squared, in steps) + rate_weight * bits is
    chosen. The bits are from the order-0 entropy of rounding to nearest. At high rates,
    rate_weight = ln(2) / 6 = 0.1155 is the slope of error against bits; greater values gain nothing.
    """
    if not rate_weight:
        return UniformNumbers(np.float32(step), np.zeros(0, np.float32))
    rise = _rise_of_bits(magnitudes, np.float32(step))
    shift = np.minimum(rate_weight * rise / 2, 0.499)
    return UniformNumbers(np.float32(step), (np.arange(len(rise)) + 0.5 + shift).astype(np.float32))


def weighed_numbers(magnitudes: Magnitudes, step: float | np.float32, rate_weight: float) -> WeighedNumbers:
    """Returns a quantiser like that of `weighing_numbers`, for errors with different weights."""
    bits = np.cumsum(_rise_of_bits(magnitudes, np.float32(step)))
    return WeighedNumbers(np.float32(step), np.concatenate(([0.0], rate_weight * bits)).astype(np.float32))


def _rise_of_bits(magnitudes: Magnitudes, step: np.float32) -> F64:
    """Returns how many more bits each number takes than the one below it, at least 0.

    The bits are from the order-0 entropy of rounding to nearest.
    """
    found = magnitudes.counts(UniformNumbers(step, np.zeros(0, np.float32)))
    counts = np.bincount(np.minimum(found.numbers, _MOST_RISES), found.often).astype(np.int64)
    if len(counts) <= _FEW_NUMBERS:  # numpy takes longer than Python
        logarithms = [log2_of(count + 1) / (1 << FRACTION) for count in counts.tolist()]
        costs = [(number > 0) - logarithm for number, logarithm in enumerate(logarithms)]
        return np.array([max(b - a, 0.0) for a, b in pairwise(costs)], np.float64)
    # One is added to each count, so that numbers that are not in the sample have a finite cost.
    bits = -log2_fixed(counts + 1) / float(1 << FRACTION) + (np.arange(len(counts)) > 0)
    return np.clip(np.diff(bits), 0, None)


class _Few(NamedTuple):
    """The distinct magnitudes of a sample.

    Attributes:
        values: the magnitudes, ascending.
        places: the place in ``values`` of each magnitude of the sample.
    """

    values: F32
    places: NDArray[np.int64]


@dataclass(frozen=True)
class Sampled:
    """A sample of a tensor's weights, from which its step is chosen.

    Attributes:
        magnitudes: magnitudes of sampled survivors, float32, divided by their scale.
        positions: how many positions the sample represents, pruned ones included.
        weights: the weight of each error, float32, with a mean of 1; None: all errors are equal.
        rate_weight: as in `Uniform`.
        dtype: the tensor's dtype.
        originals: the magnitudes in the tensor, float64; None: equal to ``magnitudes``.
        scale: the scale factor of each weight, or None.
        multiplier: the stored importance of each weight, if it multiplies the weights; else None.
        masked: whether a mask was given. Survivors then remain survivors if their number is 0.
        widest: with fixed width, the greatest magnitude of the whole tensor, divided by its scale; else None.
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
        """Returns the quantiser of the whole tensor for a step."""
        how = weighing_numbers if self.weights is None else weighed_numbers
        return how(self._sorted, step, self.rate_weight)

    @cached_property
    def _sorted(self) -> Magnitudes:
        return Magnitudes(self.magnitudes)

    @cached_property
    def _greatest_product(self) -> float:
        """The greatest product of a number times the step with factors, in any order; 1 without factors."""
        factors = (np.abs(each).max(initial=1) for each in (self.scale, self.multiplier) if each is not None)
        return math.prod(float(factor) for factor in factors)

    def counts(self, step: float) -> NumberCounts:
        """Returns how often each number occurs in the sample for a step."""
        quantiser = self.quantiser(step)
        if isinstance(quantiser, UniformNumbers):
            found = self._sorted.counts(quantiser)
            greatest = int(found.numbers[-1]) if len(found.numbers) else 0
            # Far below the greatest number, rounding cannot make a product infinite.
            bound = min(self.dtype.greatest, DTYPES["F32"].greatest) / 4
            if greatest * float(step) * self._greatest_product < bound:
                return found
        return NumberCounts.of(self.numbers(step))

    def numbers(self, step: float) -> NDArray[np.unsignedinteger]:
        """Returns the numbers of the sample for a step."""
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
        """The number of represented positions that are pruned."""
        return self.positions - len(self.magnitudes)

    def mask_bits(self) -> int:
        """Returns about how many bits (times 2^16) the mask takes; 0 if that depends on the step."""
        if self.widest is not None:
            return self.positions << FRACTION if self.masked or self.pruned else 0
        return entropy_bits(np.array([self.pruned, len(self.magnitudes)])) if self.masked else 0

    def bits(self, step: float) -> tuple[int, int]:
        """Returns about how many bits (times 2^16) the sample takes for a step: its levels, and all of it.

        Survivors whose number is 0 are pruned, unless a mask was given.
        """
        if not len(self.magnitudes):
            return 0, self.mask_bits()
        counts = self.counts(step)
        if self.widest is not None:
            return self._fixed_bits(step, counts.zeros)
        levels = numbers_bits(counts)
        if self.masked:
            # Survivors whose number is 0 are in the same stream, and have signs too.
            levels = max(levels, pairs_bits(counts)) + (counts.zeros << FRACTION)
            return levels, self.mask_bits() + levels
        return levels, levels + zeros_bits(counts, self.pruned) - zeros_bits(counts)

    def loses_all(self, step: float) -> bool:
        """Whether a step makes 0 of all survivors, though a mask or a fixed width spends bits on them."""
        if self.widest is not None:
            return self.widest > 0 and not self._greatest_number(step)
        return self.masked and bool(self.magnitudes.any()) and not self.counts(step).numbers.any()

    def _greatest_number(self, step: float) -> int:
        """Returns the greatest number of the whole tensor, which has a fixed width."""
        assert self.widest is not None
        return math.floor(np.float32(self.widest) / np.float32(step) + np.float32(0.5))

    def _fixed_bits(self, step: float, zeros: int) -> tuple[int, int]:
        """Returns the result of `bits` with fixed width: a mask takes one bit per position."""
        greatest = self._greatest_number(step)
        width = (2 * greatest + 1).bit_length() if greatest else 0
        levels = width * len(self.magnitudes) << FRACTION
        kept = len(self.magnitudes) - (0 if self.masked or not self.pruned else zeros)
        return levels, self.mask_bits() + (width * kept << FRACTION)

    def error(self, step: float) -> float:
        """Returns the weighted sum of squared errors for a step, before an importance multiplies."""
        reconstruction, few = self._reconstruction(step), self._few
        if few is not None:
            numbers = weighing_numbers(self._sorted, step, self.rate_weight)(few.values)
            values = reconstruction.values(reconstruction.lowered(numbers, None, None), None, None)
            errors = few.values.astype(np.float64) - values.astype(np.float64)
            return exact_sum((errors * errors)[few.places])  # in the order of the sample
        values = reconstruction.values(self.numbers(step), self.scale, None)
        return self._weighed_sum(self._originals() - values.astype(np.float64))

    @cached_property
    def _few(self) -> _Few | None:
        """The distinct magnitudes, if they are few and alone determine the errors; else None."""
        if self.dtype.bits > 32 or not (self.weights is self.scale is self.multiplier is None):
            return None
        values = self._sorted.values
        if len(values) * _REPEATED > len(self.magnitudes):
            return None
        return _Few(values, np.searchsorted(values, self.magnitudes))

    def power(self) -> float:
        """Returns the weighted sum of squares."""
        return self._weighed_sum(self._originals())

    def _originals(self) -> F64:
        return self.magnitudes.astype(np.float64) if self.originals is None else self.originals

    def _weighed_sum(self, numbers: F64) -> float:
        squares = numbers * numbers
        return exact_sum(squares if self.weights is None else squares * self.weights)


def error_weights(importances: NDArray[np.floating], weighted: str) -> F32:
    """Returns the weights of errors: the importances, float32, or with ``root`` their square roots.

    Other powers are not bit-identical on all platforms.
    """
    with np.errstate(over="ignore"):
        wide = np.asarray(importances, np.float32)
    return np.sqrt(wide) if weighted == "root" else wide


def mean_of(weights: F32) -> np.float32:
    """Returns the mean of the weights; 1 if the mean is 0 or not finite."""
    mean = np.float32(exact_sum(weights.astype(np.float64)) / max(len(weights), 1))
    return mean if 0 < mean < np.inf else np.float32(1)


def numbers_bits(counts: NumberCounts) -> int:
    """Returns about how many bits (times 2^16) numbers with signs take.

    The sum of three parts: the entropy of which numbers are 0, the entropy of the other numbers, and their
    signs. The second part is at least half a bit per number if there are several different ones, because a
    code of pairs takes at least one bit per pair.

    Args:
        counts: how often each number occurs.
    """
    others = slice(int(counts.zeros > 0), None)
    numbers, often = counts.numbers[others], counts.often[others]
    alive = int(often.sum())
    least = alive << (FRACTION - 1) if len(often) > 1 else 0
    classes, residuals = _in_classes(numbers, often)
    few = len(classes) <= _FEW_NUMBERS
    entropy = _entropy(classes.tolist()) if few else entropy_bits(classes)
    rest = max(entropy + (residuals << FRACTION), least) + (alive << FRACTION)
    return zeros_bits(counts) + rest


def zeros_bits(counts: NumberCounts, more: int = 0) -> int:
    """Returns the entropy (times 2^16) of which numbers are 0, with ``more`` zeros than in the counts."""
    zeros, alive = counts.zeros + more, int(counts.often.sum()) - counts.zeros
    return _entropy([zeros, alive])


def _entropy(counts: list[int]) -> int:
    """Returns the result of `entropy_bits`, which takes longer for a few counts."""
    total = sum(counts)
    return total * log2_of(total) - sum(n * log2_of(n) for n in counts if n) if total else 0


def pairs_bits(counts: NumberCounts) -> int:
    """Returns how many bits (times 2^16) numbers and signs (of non-zero ones) take with a code of pairs.

    The code is a Huffman code. It is well above the entropy if one number is much more frequent than the
    others: 0.68 bits per number instead of 0.54 if seven in eight are 0. Returns 0 if many different numbers
    occur, because the entropy is then close.
    """
    often: list[int] = counts.often.tolist()
    if len(often) > _MOST_IN_PAIRS or counts.numbers[-1] >= 1 << _CLASS_BITS:
        return 0
    total = sum(often)
    pairs = [one * other for one in often for other in often]
    heapify(pairs)
    length = 0  # sum of code length * count over all pairs; total^2 pairs
    while len(pairs) > 1:
        joined = heappop(pairs) + heappop(pairs)
        length += joined
        heappush(pairs, joined)
    return (length << FRACTION) // max(2 * total, 1) + ((total - counts.zeros) << FRACTION)


def _in_classes(numbers: NDArray[np.int64], often: NDArray[np.int64]) -> tuple[Histogram, int]:
    """Joins great numbers into classes. Returns the histogram of the classes, and all residual bits.

    A sample of n weights cannot show an entropy above log2 n, which is too low if there are many different
    numbers. Numbers of a class are assumed to be equally frequent.

    Args:
        numbers: the numbers that occur, at least 1, ascending.
        often: how often each occurs.
    """
    if not len(numbers) or numbers[-1] <= 1 << _CLASS_BITS:
        return often, 0
    numbers = numbers - 1
    widths = np.maximum(np.frexp(numbers.astype(np.float64))[1].astype(np.int64) - _CLASS_BITS, 0)
    classes = (numbers >> widths) + (widths << (_CLASS_BITS - 1))
    joined = np.bincount(classes, weights=often.astype(np.float64)).astype(np.int64)  # exact below 2^53
    return joined, int(often @ widths)


def step_for_bits(sample: Sampled, bits: float) -> float | None:
    """Returns the least step found for ``bits`` bits per survivor's level and at most ``bits`` per position.

    Returns None if there is none but one that loses all weights (`Sampled.loses_all`).

    The second condition includes the mask. It matters if few positions are pruned: pruning makes no tensor
    more than 1 % larger. It is ignored if a given mask alone takes more than half of ``bits`` per position,
    because too little would remain for the levels.
    """
    levels = int(bits * len(sample.magnitudes) * (1 << FRACTION))
    whole = int(bits * sample.positions * (1 << FRACTION))
    counted = sample.pruned > 0 and 2 * sample.mask_bits() <= whole
    if sample.masked:
        whole -= whole // _CODE_LOSS  # two streams instead of one

    def holds(step: float) -> bool:
        found = sample.bits(step)
        return found[0] <= levels and not (counted and found[1] > whole)

    return _least_step(sample, holds)


def step_for_budget(sample: Sampled, budget: float) -> float | None:
    """Returns the least step found for at most ``budget`` bits per position.

    Returns None if there is none but one that loses all weights (`Sampled.loses_all`).

    Raises:
        OptionError: the mask alone takes more than the budget.
    """
    allowed = int(budget * sample.positions * (1 << FRACTION))
    if sample.mask_bits() > allowed:
        raise OptionError(
            f"the mask alone takes more than the budget of {budget} bits per position; increase the budget"
        )
    return _least_step(sample, lambda step: sample.bits(step)[1] <= allowed)


def _least_step(sample: Sampled, holds: Callable[[float], bool]) -> float | None:
    step = turning_point(holds, _greatest(sample.magnitudes))[1]
    return None if sample.loses_all(step) else step


def step_for_error(sample: Sampled, allowed: float) -> float | None:
    """Returns the greatest step found with a mean squared error of at most ``allowed``, or None."""
    most = allowed * len(sample.magnitudes)
    step = turning_point(lambda step: sample.error(step) > most, _greatest(sample.magnitudes))[0]
    return step if sample.error(step) <= most else None


def _greatest(magnitudes: F32) -> float:
    return float(magnitudes.max(initial=0))


def turning_point(holds: Callable[[float], bool], greatest: float) -> tuple[float, float]:
    """Bisects for the step at which a condition begins to hold. Returns a step below it and a step above it.

    The two steps differ by about 1 part in 10^5. They are equal if the condition holds for the least step or
    not for the greatest.

    Args:
        holds: a condition that is false for small steps and true for great ones.
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
