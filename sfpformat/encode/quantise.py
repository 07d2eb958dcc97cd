"""Converts magnitudes to the numbers of a uniform quantiser (the encoder's side of SPEC.md chapter 11).

Sums that affect a decision use `np.bincount`, which adds in order, so that they do not depend on the vector
units of a platform.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..coding.quantisers import F32, uniform_numbers
from .number_bits import rise_of_bits
from .number_counts import Magnitudes

F64 = NDArray[np.float64]

# The greatest number of weights, evenly spaced, on which a step is searched: the estimate's error is < 0.5 %.
SAMPLE = 1 << 16
_MOST_RISES = 4096  # from this number on, all numbers are counted as one to estimate their bits


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
    """Returns the result of `rise_of_bits` for rounding to nearest."""
    found = magnitudes.counts(UniformNumbers(step, np.zeros(0, np.float32)))
    counts = np.bincount(np.minimum(found.numbers, _MOST_RISES), found.often)
    return rise_of_bits(counts.astype(np.int64))


def exact_sum(values: F64) -> float:
    """Returns the sum, added in order."""
    return float(np.bincount(np.zeros(len(values), np.intp), weights=values)[0]) if len(values) else 0.0


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
