"""Source of `uniform`: magnitude numbers are whole numbers of a step, which is given or found by a search."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ...coding.classes import FRACTION, entropy_bits
from ...coding.mask import Mask
from ...coding.planes import AnyLevels
from ...coding.quantisers import F32, Uniform, float_patterns, scaled_down
from ...dtypes import Dtype
from ...errors import OptionError
from ...options import Uniform as Asked
from ..finite import greatest_codable
from ..quantise import F64, SAMPLE, UniformNumbers, WeighedNumbers, mean_of
from ..step_search import Sampled, step_for_bits, step_for_budget, step_for_error
from .base import BLOCK, CACHED_LEVELS, Flat, blocks_of
from .lossy import LossyTensor, NumberSource, sampled_survivors

# How often a step is reduced if its error over the whole tensor is too great, and the tolerance: 0.05 dB.
_ERROR_ROUNDS = 8
_ERROR_TOLERANCE = 10.0**0.005
_LOOKED_UP = 1 << 17  # positions; levels of smaller tensors are not looked up by bit patterns


@dataclass(frozen=True)
class UniformSource(NumberSource):
    """Numbers of a uniform quantiser.

    Attributes:
        tensor: the tensor.
        numbers: converts magnitudes to numbers.
        given_step: whether the caller set the step. Such a step is refused if a weight whose nearest number
            is not 0 would get the number 0, because no other number is finite.
        kept: the cached levels of all positions; empty until they are needed.
    """

    numbers: UniformNumbers | WeighedNumbers
    given_step: bool = False
    kept: list[AnyLevels] = field(default_factory=list)

    @property
    def quantiser(self) -> Uniform:
        return Uniform(self.numbers.step)

    def bound(self, dtype: Dtype) -> int:
        scaling = self.tensor.scaling
        scale = np.float32(0) if scaling is None else np.abs(scaling.factors).max(initial=0)
        greatest = greatest_codable(self.numbers.step, scale or np.float32(1))
        return min(super().bound(dtype), 2 * greatest + 2)

    def survives(self, block: slice) -> Mask:
        return np.asarray(self._all_levels(block) != 0)

    def levels(self, block: slice, mask: Mask | None) -> AnyLevels:
        levels = self._all_levels(block)
        return levels if mask is None else self.tensor.engine.chosen(levels, mask)

    def _all_levels(self, block: slice) -> AnyLevels:
        """Returns the levels of all positions of a block. Caches the levels of tensors that are not large."""
        if self.positions > CACHED_LEVELS:
            return self._quantised(block)
        if not self.kept:
            starts = range(0, max(self.positions, 1), BLOCK)
            self.kept.append(np.concatenate([self._quantised(slice(i, i + BLOCK)) for i in starts]))
        return self.kept[0][block]

    def _quantised(self, block: slice) -> AnyLevels:
        tensor, numbers = self.tensor, self.numbers
        if self._of_patterns is not None:
            levels = np.take(self._of_patterns, float_patterns(tensor.flat[block], tensor.dtype))
            return self._finite(levels, None, None)
        weights = tensor.flat[block].astype(np.float32, copy=False)
        scale, multiplier = tensor.factors(block)
        if isinstance(numbers, UniformNumbers):
            levels = tensor.engine.uniform_levels(weights, scale, numbers.step, numbers.thresholds)
            return self._finite(levels, scale, multiplier)
        assert tensor.weights is not None
        magnitudes = np.abs(weights)
        if scale is not None:
            magnitudes = scaled_down(magnitudes, scale)
        levels = numbers(magnitudes, tensor.weights[block]) * np.uint32(2)
        return self._finite(levels + (np.signbit(weights) & (levels > 0)), scale, multiplier)

    @cached_property
    def _of_patterns(self) -> AnyLevels | None:
        """The level of each bit pattern, for large tensors of 2-byte weights without factors; else None.

        Patterns above the greatest magnitude of the tensor have no level, but 0.
        """
        tensor, numbers = self.tensor, self.numbers
        if tensor.dtype.bits != 16 or tensor.scaling is not None or tensor.multiplier is not None:
            return None
        if self.positions < _LOOKED_UP or not isinstance(numbers, UniformNumbers):
            return None
        blocks = (float_patterns(tensor.flat[block], tensor.dtype) for block in blocks_of(self.positions))
        sign = 1 << 15
        magnitudes = np.arange(max(int((block & (sign - 1)).max()) for block in blocks) + 1, dtype=np.uint16)
        values = magnitudes.view(tensor.dtype.numpy).astype(np.float32)
        found = tensor.engine.uniform_levels(values, None, numbers.step, numbers.thresholds)
        levels = np.zeros(2 * sign, found.dtype)
        levels[: len(found)] = found
        levels[sign : sign + len(found)] = found + (found > 0)
        return levels

    def _finite(self, levels: AnyLevels, scale: F32 | None, multiplier: F32 | None) -> AnyLevels:
        """Returns the levels, lowered if the reconstructed weight would not be finite.

        Raises:
            OptionError: the caller's step is too great.
        """
        reconstruction, one = self.reconstruction, levels.dtype.type(1)
        if not len(levels) or reconstruction.is_finite(int(levels.max()) >> 1, scale, multiplier):
            return levels
        nearest = levels >> one
        numbers = reconstruction.lowered(nearest, scale, multiplier)
        lost = (numbers == 0) & (nearest > 0)
        if self.given_step and lost.any():
            at = int(np.flatnonzero(lost)[0])
            factor = "" if scale is None else f" times the scale factor {scale[at]!s}"
            raise OptionError(
                f"a step of {self.numbers.step!s}{factor} is too great for {self.tensor.dtype.name}; "
                "use a smaller step"
            )
        return np.asarray(numbers << one | (levels & one & (numbers > 0)), levels.dtype)


def source(tensor: LossyTensor, asked: Asked, *, fixed_width: bool) -> UniformSource | None:
    """Returns the source with the caller's step, or a step chosen from a sample of survivors.

    Args:
        tensor: the tensor.
        asked: the caller's quantiser.
        fixed_width: as in `Options`.

    Returns:
        The source. None if no step reaches its `error_db`, `bits` or `budget`.

    Raises:
        OptionError: the step is not a positive float32, or the mask alone takes more than the budget.
    """
    step = asked.step
    if step is not None and tensor.scaling is not None:
        step *= tensor.scaling.unit
    if step is not None and not asked.rate_weight:  # nothing to choose
        numbers = UniformNumbers(_checked_step(step), np.zeros(0, np.float32))
        return UniformSource(tensor, numbers, given_step=True)
    positions, represented = sampled_survivors(tensor.flat, tensor.mask, SAMPLE)
    if tensor.weights is not None:
        tensor = replace(tensor, weights=tensor.weights / mean_of(tensor.weights[positions]))
    sample = Sampled(
        tensor.magnitudes(positions),
        represented,
        None if tensor.weights is None else tensor.weights[positions],
        asked.rate_weight,
        tensor.dtype,
        np.abs(tensor.flat[positions].astype(np.float64)),
        None if tensor.scaling is None else tensor.scaling.of(positions),
        None if tensor.multiplier is None else tensor.multiplier(positions),
        tensor.mask is not None,
        tensor.greatest_magnitude() if fixed_width else None,
    )
    if step is not None:
        return UniformSource(tensor, sample.quantiser(_checked_step(step)), given_step=True)
    if asked.error_db is not None:
        return _for_error(tensor, sample, asked.error_db)
    if asked.bits is not None:
        found = step_for_bits(sample, asked.bits)
    else:
        assert asked.budget is not None
        found = step_for_budget(sample, asked.budget)
    return None if found is None else UniformSource(tensor, sample.quantiser(_checked_step(found)))


def _for_error(tensor: LossyTensor, sample: Sampled, error_db: float) -> UniformSource | None:
    """Returns the source with a mean squared error of at most ``error_db``, relative to the mean square.

    Returns None if no step reaches that error.
    """
    is_part = len(tensor.flat) > SAMPLE
    power = tensor.mean_power() if is_part else sample.power() / max(len(sample.magnitudes), 1)
    allowed = power * 10.0 ** (error_db / 10)
    step = step_for_error(sample, allowed)
    for _ in range(_ERROR_ROUNDS):
        if step is None:
            return None
        found = UniformSource(tensor, sample.quantiser(_checked_step(step)))
        if not is_part:
            return found
        error = found.mean_error()
        if error <= allowed * _ERROR_TOLERANCE:
            return found
        step *= 0.99 * math.sqrt(allowed / error)
    return None


def _checked_step(step: float) -> np.float32:
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.float32(step)
    if not 0 < rounded < np.inf:
        raise OptionError(f"a step of {step} is not a float32 above 0")
    return rounded


def allowed_bits(asked: Asked, flat: Flat, mask: Mask | None) -> int:
    """Returns how many bits the caller allows for mask and levels; 0 if no number of bits is set.

    Args:
        asked: the caller's quantiser.
        flat: the tensor, shape [n].
        mask: the survivors, shape [n]; None: all non-zero weights.
    """
    if asked.budget is not None:
        return int(asked.budget * len(flat))
    if asked.bits is None:
        return 0
    survivors = _nonzero(flat) if mask is None else int(np.count_nonzero(mask))
    mask_bits = entropy_bits(np.array([len(flat) - survivors, survivors])) >> FRACTION
    return int(asked.bits * survivors) + mask_bits


def _nonzero(flat: Flat) -> int:
    """Returns how many weights are not 0."""
    if flat.itemsize != 2:
        return int(np.count_nonzero(flat != 0))
    # BF16 and F16 as integers: numpy compares these nine times as fast.
    patterns, magnitude = flat.view(np.uint16), np.uint16(0x7FFF)
    return sum(int(np.count_nonzero(patterns[block] & magnitude)) for block in blocks_of(len(flat)))


def why_none(asked: Asked) -> str:
    """Returns the message for a tensor for which `source` returned None."""
    if asked.error_db is not None:
        return f"no step has an error of at most {asked.error_db} dB; use lossless"
    target = f"{asked.bits} bits" if asked.bits else f"a budget of {asked.budget} bits per position"
    return f"with {target}, all weights would become 0; use more bits"


def greatest_errors(
    quantiser: Uniform,
    magnitudes: F64,
    scale: F64,
    centroids: F64 | None,
    greatest: float,
    *,
    weighted: bool,
) -> F64:
    """Returns the greatest error of each weight: one step, because a number is the nearest or the next below.

    With weighted errors a weight may also become 0.

    Args:
        quantiser: as stored.
        magnitudes: of the weights, shape [n].
        scale: the scale factor of each, shape [n].
        centroids: None.
        greatest: the greatest number of the tensor's dtype.
        weighted: whether errors were weighted by an importance.
    """
    moved = float(quantiser.step) * scale
    return np.maximum(moved, magnitudes) if weighted else moved
