"""Searches for the step of a uniform quantiser, on a sample of a tensor: for bits, a budget, or an error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..coding.classes import FRACTION, entropy_bits
from ..coding.quantisers import F32, Uniform
from ..dtypes import DTYPES, Dtype
from ..errors import OptionError
from .finite import Reconstruction
from .number_bits import numbers_bits, pairs_bits, zeros_bits
from .number_counts import Magnitudes, NumberCounts
from .quantise import F64, UniformNumbers, WeighedNumbers, exact_sum, weighed_numbers, weighing_numbers
from .turning_point import Guess, turning_point

CLOSE = 1 / 4096  # of the allowed bits or error may remain unused; a sample is less exact
_CODE_LOSS = 32  # prefix codes of a mask and levels take about 1/32 more than the entropy
_REPEATED = 4  # errors are computed once for equal magnitudes if each occurs so often on average


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

    @cached_property
    def mean(self) -> float:
        """The mean magnitude; 0 without survivors."""
        return exact_sum(self.magnitudes.astype(np.float64)) / max(len(self.magnitudes), 1)

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

    def excess(step: float) -> float:
        found = sample.bits(step)
        return max(found[0] - levels, found[1] - whole) if counted else found[0] - levels

    return _least_step(sample, excess, levels, bits)


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
    bits = (allowed - sample.mask_bits()) / (max(len(sample.magnitudes), 1) << FRACTION)
    return _least_step(sample, lambda step: sample.bits(step)[1] - allowed, allowed, bits)


def _least_step(
    sample: Sampled, excess: Callable[[float], float], allowed: float, bits: float
) -> float | None:
    # With fixed width, the bits change in jumps, and the least step of a width has the least error.
    close = 0.0 if sample.widest is not None else -CLOSE * allowed
    guess = Guess.of(sample.mean, bits, len(sample.magnitudes))
    step = turning_point(excess, _greatest(sample.magnitudes), close, guess)[1]
    return None if sample.loses_all(step) else step


def step_for_error(sample: Sampled, allowed: float) -> float | None:
    """Returns the greatest step found with a mean squared error of at most ``allowed``, or None."""
    most = allowed * len(sample.magnitudes)

    def room(step: float) -> float:
        left = most - sample.error(step)
        return left or math.ulp(0.0)  # the error may be equal

    # Small steps give a mean error of step² / 12, which grows by the factor 4 with each octave.
    guess = Guess(math.sqrt(12 * allowed), max(1.4 * most, math.ulp(0.0)))
    step = turning_point(room, _greatest(sample.magnitudes), CLOSE * most, guess)[0]
    return step if sample.error(step) <= most else None


def _greatest(magnitudes: F32) -> float:
    return float(magnitudes.max(initial=0))
