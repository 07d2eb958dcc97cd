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
from ..coding.quantiser import F32
from ..dtypes import DTYPES, of_numpy
from ..errors import OptionError
from ..names import checked_by_name
from .importances import checked_importance
from .lossy import require_finite, sampled_survivors
from .options import Options
from .quantise import SAMPLE, Sampled, error_weights, exact_sum, mean_of, turning_point

# The samples of all tensors together have at most about so many weights: the search goes over them 24 times.
_ALL_SAMPLES = 1 << 21
_LEAST_SAMPLE = 1 << 12


@dataclass(frozen=True)
class Candidate:
    """A tensor that shares bits with others.

    Attributes:
        sample: some of its weights.
        positions: how many it has.
        unit: its step over that of the others, times a number that all have in common.
    """

    sample: Sampled
    positions: int
    unit: float


def steps_for_budget(
    tensors: Mapping[str, NDArray[np.generic]],
    bits: float,
    *,
    masks: Mapping[str, Mask] | None = None,
    importances: Mapping[str, NDArray[np.floating]] | None = None,
    weighted: str | None = None,
    rate_weight: float = Options.rate_weight,
) -> dict[str, float]:
    """The step of each tensor with which all together take about so many bits a position.

    Args:
        tensors: name -> float array of any shape, finite.
        bits: a position, masks included, index and tables not.
        masks: name -> bool array of the tensor's shape; without one what is not zero survives.
        importances: name -> float array of the tensor's shape, finite and not negative; the same measure in
            all tensors. Needed where ``weighted`` says how errors count by it.
        weighted, rate_weight: as in `Options`, and to be given there again.

    Returns:
        Name -> step, for ``Options(quantiser="uniform", step=...)``.

    Raises:
        OptionError: a tensor is not finite, its importance is missing or not like it, or a name in an
            argument is no tensor's.
    """
    options = Options(quantiser="uniform", bits=bits, weighted=weighted, rate_weight=rate_weight)
    masks = checked_by_name(masks, tensors, "masks")
    importances = checked_by_name(importances, tensors, "importances")
    found = {}
    for name, array in tensors.items():
        try:
            found[name] = candidate(array, masks.get(name), importances.get(name), options, len(tensors))
        except OptionError as error:
            raise OptionError(f"tensor {name!r}: {error}") from None
    steps = share_bits(found.values(), bits)
    return dict(zip(found, steps, strict=True))


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
        options: how it will be quantised; `weighted` and `rate_weight` count here.
        tensors: how many share.

    Raises:
        OptionError: as `steps_for_budget`.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    require_finite(flat)
    size = min(len(flat), SAMPLE, max(_ALL_SAMPLES // max(tensors, 1), _LEAST_SAMPLE))
    chosen, represented = sampled_survivors(flat, None if mask is None else mask.reshape(-1), size)
    magnitudes = np.abs(flat[chosen].astype(np.float32))
    weights, mean = None, np.float32(1)
    if options.weighted is not None:
        if not isinstance(importance, np.ndarray) or importance.shape != array.shape:
            raise OptionError("weighted needs an importance of the tensor's shape")
        given = error_weights(checked_importance(importance)[chosen], options.weighted)
        mean = mean_of(given)
        weights = given / mean
    dtype = of_numpy(flat.dtype)
    if dtype is None or not dtype.is_float:
        raise OptionError(f"dtype {flat.dtype} is no float of the format")
    sample = Sampled(magnitudes, represented, weights, options.rate_weight, dtype)
    return Candidate(sample, len(flat), _unit(magnitudes, float(mean), options.weighted))


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


def share_bits(candidates: Iterable[Candidate], bits: float) -> list[float]:
    """The steps with which the candidates together take at most ``bits`` bits a position, each a float32."""
    candidates = list(candidates)
    allowed = bits * sum(c.positions for c in candidates) * (1 << FRACTION)

    def fits(common: float) -> bool:
        taken = 0.0
        for c in candidates:
            if c.sample.positions:
                taken += c.sample.bits(_step(c, common)) * (c.positions / c.sample.positions)
        return taken <= allowed

    # What the greatest magnitude of any tensor is in common units bounds the search.
    greatest = max([float(c.sample.magnitudes.max(initial=0)) / c.unit for c in candidates], default=0.0)
    common = turning_point(fits, greatest)[1]
    return [_step(c, common) for c in candidates]


def _step(candidate: Candidate, common: float) -> float:
    """As float32, kept within what numbers of the sample can be coded and what the tensor's dtype holds."""
    sample, single = candidate.sample, DTYPES["F32"]
    greatest = float(sample.magnitudes.max(initial=0))
    least = max(greatest / (1 << 24), single.least) if greatest else single.least_normal
    most = min(sample.dtype.greatest, single.greatest)
    return float(np.float32(min(max(common * candidate.unit, least), most)))
