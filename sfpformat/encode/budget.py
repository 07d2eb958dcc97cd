"""Bit allocation: chooses a step for each tensor of a model, so that all take a given number of bits.

Without an importance, errors count relative to the weights of the same tensor, and steps are proportional
to the root mean square of the weights. With an importance, a step is inversely proportional to the root of
the mean error weight. The last bit of every tensor then reduces the weighted error by the same amount (equal
slope: for small steps error = step^2 / 12, and one bit less doubles the step).
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
from ..names import checked_by_name, require_mapping
from ..options import Uniform
from .finite import require_finite
from .importances import checked_importance
from .level_sources import sampled_survivors
from .plan import exact_bits, flat_mask
from .quantise import SAMPLE, error_weights, exact_sum, mean_of
from .step_search import CLOSE, Sampled
from .turning_point import Guess, turning_point

# Approximate maximum of the size of all samples together, in weights. The search evaluates them 24 times.
_ALL_SAMPLES = 1 << 21
_LEAST_SAMPLE = 1 << 12
# Number of segments, and positions in each, from which the lossless size of a tensor is estimated.
_EXACT_SEGMENTS, _EXACT_SEGMENT = 16, 3072
# A tensor is quantised if this takes less than this part of its lossless bits. Both sizes are estimates.
_EXACT_SHARE = 0.98


@dataclass(frozen=True)
class Candidate:
    """A tensor in the bit allocation.

    Attributes:
        sample: a sample of the weights.
        positions: number of positions.
        unit: the tensor's step relative to the common step of all tensors.
        exact: estimate of the bits per position of lossless coding.
    """

    sample: Sampled
    positions: int
    unit: float
    exact: float

    def bits(self, step: float) -> float:
        """Returns an estimate of the tensor's bits (times 2^16) with a step."""
        return self._whole(self.sample.bits(step)[1])

    def mask_bits(self) -> float:
        """Returns an estimate of the mask's bits (times 2^16) that do not depend on the step."""
        return self._whole(self.sample.mask_bits())

    def exact_bits(self) -> float:
        """Returns an estimate of the tensor's bits (times 2^16) in lossless coding."""
        return self.exact * self.positions * (1 << FRACTION)

    @property
    def survivors(self) -> float:
        """An estimate of the tensor's number of survivors."""
        return self._whole(len(self.sample.magnitudes))

    def _whole(self, of_sample: int) -> float:
        return of_sample * (self.positions / self.sample.positions) if self.sample.positions else 0.0


def steps_for_budget(
    tensors: Mapping[str, NDArray[np.generic]],
    budget: float,
    *,
    masks: Mapping[str, Mask] | None = None,
    importances: Mapping[str, NDArray[np.floating]] | None = None,
    weighted: str | None = None,
    rate_weight: float = Uniform.rate_weight,
) -> dict[str, float]:
    """Returns steps with which all tensors together take about ``budget`` bits per position.

    The result does not contain tensors for which lossless coding takes no more bits than their step. These
    tensors stay lossless if the caller passes the result as options by name. The other tensors share the
    remaining bits.

    ``steps = steps_for_budget(tensors, 3.0)``
    ``save_file(tensors, "m.sfp", options={n: Options(Uniform(step=s)) for n, s in steps.items()})``

    Args:
        tensors: name -> float array of any shape, finite.
        budget: bits per position, including masks, without index and tables.
        masks: name -> bool array of the tensor's shape. Without one, all non-zero weights survive.
        importances: name -> float array of the tensor's shape, finite and not negative, in the same unit for
            all tensors. Required if ``weighted`` is set.
        weighted, rate_weight: as in `Uniform`; pass the same values there.

    Returns:
        Name -> step, for the tensors to quantise with ``Options(Uniform(step=...))``.

    Raises:
        OptionError: a tensor is not a float of the format or not finite, its mask is not bool or has another
            shape, its importance is missing or has another shape, a name in an argument is not the name of a
            tensor, the masks alone take more than the budget, or the budget is so small that all weights
            would become 0.
    """
    asked = Uniform(budget=budget, weighted=weighted, rate_weight=rate_weight)
    require_mapping(tensors, "tensors")
    masks = checked_by_name(masks, tensors, "masks")
    importances = checked_by_name(importances, tensors, "importances")
    found = {}
    for name, array in tensors.items():
        try:
            found[name] = candidate(array, masks.get(name), importances.get(name), asked, len(tensors))
        except OptionError as error:
            raise OptionError(f"tensor {name!r}: {error}") from None
    steps = share_bits(found.values(), budget)
    return {name: step for name, step in zip(found, steps, strict=True) if step is not None}


def candidate(
    array: NDArray[np.generic],
    mask: Mask | None,
    importance: NDArray[np.floating] | None,
    asked: Uniform,
    tensors: int,
    *,
    fixed_width: bool = False,
) -> Candidate:
    """Returns a tensor as a candidate of `share_bits`: its sample, unit and lossless size.

    Args:
        array, mask, importance: same as for `steps_for_budget`.
        asked: the caller's quantiser; only its `weighted` and `rate_weight` are used.
        tensors: the number of tensors that share the bits.
        fixed_width: same as in `Options`.

    Raises:
        OptionError: an argument is invalid; see `steps_for_budget`.
    """
    array = np.asanyarray(array)
    flat = np.ascontiguousarray(array).reshape(-1)
    dtype = of_numpy(flat.dtype)
    if dtype is None or not dtype.is_float:
        raise OptionError(f"dtype {flat.dtype} is not a float dtype of the format")
    require_finite(flat)
    survives = flat_mask(mask, array.shape)
    size = min(len(flat), SAMPLE, max(_ALL_SAMPLES // max(tensors, 1), _LEAST_SAMPLE))
    chosen, represented = sampled_survivors(flat, survives, size)
    magnitudes = np.abs(flat[chosen].astype(np.float32))
    weights, mean = None, np.float32(1)
    if asked.weighted is not None:
        if not isinstance(importance, np.ndarray) or importance.shape != array.shape:
            raise OptionError("weighted needs an importance of the tensor's shape")
        given = error_weights(checked_importance(importance)[chosen], asked.weighted)
        mean = mean_of(given)
        weights = given / mean
    sample = Sampled(
        magnitudes,
        represented,
        weights,
        asked.rate_weight,
        dtype,
        masked=mask is not None,
        widest=float(np.abs(flat).max(initial=0)) if fixed_width else None,
    )
    # A tensor with fixed width is never stored lossless.
    exact = math.inf if fixed_width else _exact_bits(flat, survives)
    return Candidate(sample, len(flat), _unit(magnitudes, float(mean), asked.weighted), exact)


def _exact_bits(flat: NDArray[np.generic], mask: Mask | None) -> float:
    """Returns an estimate of the bits per position of lossless coding, from some of the tensor's segments."""
    every = max(len(flat) // (_EXACT_SEGMENTS * _EXACT_SEGMENT), 1)
    starts = range(0, max(len(flat), 1), every * _EXACT_SEGMENT)
    segments = [flat[start : start + _EXACT_SEGMENT] for start in starts]
    masks = None if mask is None else [mask[start : start + _EXACT_SEGMENT] for start in starts]
    some = np.concatenate(segments)
    return exact_bits(some, None if masks is None else np.concatenate(masks)) / max(len(some), 1)


def _unit(magnitudes: F32, mean_weight: float, weighted: str | None) -> float:
    """Returns the step of a tensor relative to the common step.

    With ``weighted`` = ``root`` the unit is the geometric mean of the units for ``full`` and None, except for
    the mean weight. Uses only square roots, which round the same on all platforms.
    """
    wide = magnitudes.astype(np.float64)
    power = exact_sum(wide * wide) / max(len(wide), 1)
    if power == 0.0:
        return 1.0
    if weighted is None:
        return math.sqrt(power)
    return (math.sqrt(math.sqrt(power)) if weighted == "root" else 1.0) / math.sqrt(mean_weight)


def share_bits(candidates: Iterable[Candidate], budget: float) -> list[float | None]:
    """Returns the step, a float32, of each candidate, so that all take at most ``budget`` bits per position.

    The step is None for candidates for which lossless coding takes no more bits. The others then share the
    remaining bits. As soon as all remaining candidates fit in lossless coding, their steps are None, too.

    Raises:
        OptionError: the masks alone take more than the budget, or the budget is so small that all weights
            would become 0 although a mask or a fixed width takes bits for them.
    """
    candidates = list(candidates)
    left = budget * sum(c.positions for c in candidates) * (1 << FRACTION)
    if sum(c.mask_bits() for c in candidates) > left:
        raise OptionError(
            f"the masks alone take more than the budget of {budget:g} bits per position; increase the budget"
        )
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
    """Returns steps with which the candidates together take at most ``allowed`` bits (times 2^16).

    Raises:
        OptionError: so few bits are allowed that all weights would become 0; see `share_bits`.
    """
    # The greatest magnitude of any tensor, in common units, bounds the search.
    greatest = max([float(c.sample.magnitudes.max(initial=0)) / c.unit for c in candidates], default=0.0)

    def excess(common: float) -> float:
        return sum(c.bits(_step(c, common)) for c in candidates) - allowed

    survivors = sum(c.survivors for c in candidates)
    bits = (allowed - sum(c.mask_bits() for c in candidates)) / (max(survivors, 1) * (1 << FRACTION))
    mean = sum(c.sample.mean / c.unit * c.survivors for c in candidates) / max(survivors, 1)
    common = turning_point(excess, greatest, -CLOSE * allowed, Guess.of(mean, bits, survivors))[1]
    steps = [_step(c, common) for c in candidates]
    used = zip(candidates, steps, strict=True)
    lost = [c.sample.loses_all(step) for c, step in used if c.sample.magnitudes.any()]
    if any(lost) and (all(lost) or excess(common) > 0):
        raise OptionError("the budget is so small that all weights would become 0; increase the budget")
    return steps


def _step(candidate: Candidate, common: float) -> float:
    """Returns a candidate's step for a common step, a float32.

    The step stays in the range of the dtype, and large enough to code the numbers of the sample.
    """
    sample, single = candidate.sample, DTYPES["F32"]
    greatest = float(sample.magnitudes.max(initial=0))
    least = max(greatest / (1 << 24), single.least) if greatest else single.least_normal
    most = min(sample.dtype.greatest, single.greatest)
    return float(np.float32(min(max(common * candidate.unit, least), most)))
