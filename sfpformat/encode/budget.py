"""Sharing bits among the tensors of a model: a step for each, so that all together take so many.

Where errors count alike in every tensor, relative to its own weights, steps go by the root mean square of the
weights. With an importance they go by what an error does, too: a step is in inverse proportion to the root of
the mean weight of an error, which makes the last bit of every tensor buy the same (equal slope; for small
steps error = step^2 / 12, and a bit less doubles the step).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..coding.classes import FRACTION
from ..coding.mask import Mask
from ..coding.quantisers import F32
from ..dtypes import DTYPES, of_numpy
from ..errors import OptionError
from ..names import checked_by_name
from ..options import Options
from .importances import checked_importance
from .lossy import require_finite, sampled_survivors
from .plan import exact_bits
from .quantise import SAMPLE, Sampled, error_weights, exact_sum, mean_of, turning_point

# The samples of all tensors together have at most about so many weights: the search goes over them 24 times.
_ALL_SAMPLES = 1 << 21
_LEAST_SAMPLE = 1 << 12
# Segments, and positions each, by which it is told what a tensor takes without loss.
_EXACT_SEGMENTS, _EXACT_SEGMENT = 16, 3072
# A tensor is quantised where that takes a smaller part of its lossless bits than this: both are estimates.
_EXACT_SHARE = 0.98


@dataclass(frozen=True)
class Candidate:
    """A tensor that shares bits with others.

    Attributes:
        sample: some of its weights.
        positions: how many it has.
        unit: its step over that of the others, times a number that all have in common.
        exact: about how many bits a position it takes without loss.
    """

    sample: Sampled
    positions: int
    unit: float
    exact: float

    def bits(self, step: float) -> float:
        """About how many bits (times 2^16) it takes with that step."""
        return self._whole(self.sample.bits(step)[1])

    def mask_bits(self) -> float:
        """About how many of them the mask takes whatever the step (times 2^16)."""
        return self._whole(self.sample.mask_bits())

    def exact_bits(self) -> float:
        """About how many bits (times 2^16) it takes without loss."""
        return self.exact * self.positions * (1 << FRACTION)

    def _whole(self, of_sample: int) -> float:
        return of_sample * (self.positions / self.sample.positions) if self.sample.positions else 0.0


def steps_for_budget(
    tensors: Mapping[str, NDArray[np.generic]],
    budget: float,
    *,
    masks: Mapping[str, Mask] | None = None,
    importances: Mapping[str, NDArray[np.floating]] | None = None,
    weighted: str | None = None,
    rate_weight: float = Options.rate_weight,
) -> dict[str, float]:
    """The step of each tensor with which all together take about so many bits a position.

    A tensor that takes no more bits without loss than with its step is left out of the result, so that it is
    kept lossless where options are given by name, and its bits go to the others.

    Args:
        tensors: name -> float array of any shape, finite.
        budget: bits a position, masks included, index and tables not.
        masks: name -> bool array of the tensor's shape; without one what is not zero survives.
        importances: name -> float array of the tensor's shape, finite and not negative; the same measure in
            all tensors. Needed where ``weighted`` says how errors count by it.
        weighted, rate_weight: as in `Options`, and to be given there again.

    Returns:
        Name -> step, for ``Options(quantiser="uniform", step=...)``, of the tensors that are to be quantised.

    Raises:
        OptionError: a tensor is not finite, its importance is missing or not like it, a name in an argument
            is no tensor's, or the masks alone take more than the budget.
    """
    options = Options(quantiser="uniform", budget=budget, weighted=weighted, rate_weight=rate_weight)
    masks = checked_by_name(masks, tensors, "masks")
    importances = checked_by_name(importances, tensors, "importances")
    found = {}
    for name, array in tensors.items():
        try:
            found[name] = candidate(array, masks.get(name), importances.get(name), options, len(tensors))
        except OptionError as error:
            raise OptionError(f"tensor {name!r}: {error}") from None
    steps = share_bits(found.values(), budget)
    return {name: step for name, step in zip(found, steps, strict=True) if step is not None}


def candidate(
    array: NDArray[np.generic],
    mask: Mask | None,
    importance: NDArray[np.floating] | None,
    options: Options,
    tensors: int,
) -> Candidate:
    """A tensor's sample and unit.

    Args:
        array, mask, importance: as in `steps_for_budget`.
        options: how it will be quantised; `weighted`, `rate_weight` and `fixed_width` count here.
        tensors: how many share.

    Raises:
        OptionError: as `steps_for_budget`.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    dtype = of_numpy(flat.dtype)
    if dtype is None or not dtype.is_float:
        raise OptionError(f"dtype {flat.dtype} is no float of the format")
    require_finite(flat)
    flat_mask = None if mask is None else mask.reshape(-1)
    size = min(len(flat), SAMPLE, max(_ALL_SAMPLES // max(tensors, 1), _LEAST_SAMPLE))
    chosen, represented = sampled_survivors(flat, flat_mask, size)
    magnitudes = np.abs(flat[chosen].astype(np.float32))
    weights, mean = None, np.float32(1)
    if options.weighted is not None:
        if not isinstance(importance, np.ndarray) or importance.shape != array.shape:
            raise OptionError("weighted needs an importance of the tensor's shape")
        given = error_weights(checked_importance(importance)[chosen], options.weighted)
        mean = mean_of(given)
        weights = given / mean
    sample = Sampled(
        magnitudes,
        represented,
        weights,
        options.rate_weight,
        dtype,
        masked=mask is not None,
        widest=float(np.abs(flat).max(initial=0)) if options.fixed_width else None,
    )
    # A tensor of a fixed width is wanted for its structure.
    exact = math.inf if options.fixed_width else _exact_bits(flat, flat_mask)
    return Candidate(sample, len(flat), _unit(magnitudes, float(mean), options.weighted), exact)


def _exact_bits(flat: NDArray[np.generic], mask: Mask | None) -> float:
    """About how many bits a position a tensor takes without loss, by some of its segments."""
    every = max(len(flat) // (_EXACT_SEGMENTS * _EXACT_SEGMENT), 1)
    starts = range(0, max(len(flat), 1), every * _EXACT_SEGMENT)
    segments = [flat[start : start + _EXACT_SEGMENT] for start in starts]
    masks = None if mask is None else [mask[start : start + _EXACT_SEGMENT] for start in starts]
    some = np.concatenate(segments)
    return exact_bits(some, None if masks is None else np.concatenate(masks)) / max(len(some), 1)


def _unit(magnitudes: F32, mean_weight: float, weighted: str | None) -> float:
    """The step of a tensor over what all steps have in common.

    The root of an importance lies halfway between the importance and none, and so does its unit, in its
    logarithm. Roots alone, which round alike everywhere.
    """
    wide = magnitudes.astype(np.float64)
    power = exact_sum(wide * wide) / max(len(wide), 1)
    if power == 0.0:
        return 1.0
    if weighted is None:
        return math.sqrt(power)
    return (math.sqrt(math.sqrt(power)) if weighted == "root" else 1.0) / math.sqrt(mean_weight)


def share_bits(candidates: Iterable[Candidate], budget: float) -> list[float | None]:
    """The steps with which the candidates together take at most ``budget`` bits a position, each a float32.

    None for a candidate that takes no more bits without loss, whose bits then go to the others, and for all
    that are left where all fit without loss.

    Raises:
        OptionError: the masks alone take more.
    """
    candidates = list(candidates)
    left = budget * sum(c.positions for c in candidates) * (1 << FRACTION)
    if sum(c.mask_bits() for c in candidates) > left:
        raise OptionError(f"the masks alone take more than a budget of {budget:g} bits a position")
    steps: list[float | None] = [None] * len(candidates)
    quantised = dict(enumerate(candidates))
    while quantised:
        if sum(c.exact_bits() for c in quantised.values()) <= left:
            break
        found = _steps(list(quantised.values()), left)
        taken = dict(zip(quantised, found, strict=True))
        exact = [
            i
            for i, step in taken.items()
            if quantised[i].bits(step) >= _EXACT_SHARE * quantised[i].exact_bits()
        ]
        if not exact:
            for i, step in taken.items():
                steps[i] = step
            break
        left -= sum(quantised.pop(i).exact_bits() for i in exact)
    return steps


def _steps(candidates: list[Candidate], allowed: float) -> list[float]:
    """The steps with which the candidates together take at most so many bits (times 2^16)."""
    # What the greatest magnitude of any tensor is in common units bounds the search.
    greatest = max([float(c.sample.magnitudes.max(initial=0)) / c.unit for c in candidates], default=0.0)

    def fits(common: float) -> bool:
        return sum(c.bits(_step(c, common)) for c in candidates) <= allowed

    common = turning_point(fits, greatest)[1]
    return [_step(c, common) for c in candidates]


def _step(candidate: Candidate, common: float) -> float:
    """As float32, kept within what numbers of the sample can be coded and what the tensor's dtype holds."""
    sample, single = candidate.sample, DTYPES["F32"]
    greatest = float(sample.magnitudes.max(initial=0))
    least = max(greatest / (1 << 24), single.least) if greatest else single.least_normal
    most = min(sample.dtype.greatest, single.greatest)
    return float(np.float32(min(max(common * candidate.unit, least), most)))
