"""The kind ``uniform``: the magnitude is a whole number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ...dtypes import Dtype
from ...errors import OptionError, fault, placed
from ..planes import AnyLevels, Levels
from .kind import F32, NumberQuantiser, StreamMap, scaled_down

# Greater numbers would need classes for more than 2^31 levels; with such a small step, use `exact`.
MAX_NUMBER = (1 << 30) - 1


@dataclass(frozen=True)
class Uniform(NumberQuantiser):
    """The magnitude is the number of a level times ``step``, a finite float32 above 0 (R-QNT-003)."""

    step: np.float32

    NAME: ClassVar[str] = "uniform"
    KEYS: ClassVar[tuple[str, ...]] = ("step",)

    def __post_init__(self) -> None:
        if not (np.isfinite(self.step) and self.step > 0):
            raise fault("R-QNT-003", f"step is {self.step}, must be finite and above 0")

    def __str__(self) -> str:
        return f"uniform {float(self.step):.4g}"

    def to_map(self) -> dict[str, object]:
        return {"step": np.float32(self.step).tobytes()}

    @classmethod
    def from_map(cls, source: StreamMap) -> Uniform:
        step = source.required("step", bytes)
        with placed(base=source.place("step")):
            if len(step) != 4:
                raise fault("R-QNT-003", f"step has {len(step)} bytes, must have 4")
            return cls(np.frombuffer(step, "<f4")[0])

    def fingerprint_bound(self, dtype: Dtype) -> int:
        return 1 << 32

    def importance_bound(self) -> int:
        return 1 << 31

    def known_magnitude(self, number: int) -> np.float32:
        with np.errstate(over="ignore"):
            return np.float32(np.float32(number) * self.step)

    def greatest_magnitude(self, greatest_number: int, centroids: F32 | None) -> np.float32:
        return self.known_magnitude(greatest_number)

    def magnitudes(self, numbers: Levels, centroids: F32 | None) -> F32:
        return numbers.astype(np.float32) * self.step


def uniform_numbers(magnitudes: F32, step: np.float32, thresholds: F32) -> NDArray[np.uint32]:
    """Returns the number of each magnitude, shape [n].

    Args:
        magnitudes: shape [n].
        step: the quantiser's step.
        thresholds: element m - 1 is the least magnitude, in steps, that has the number m; for numbers m up to
            len(thresholds). Greater numbers are rounded to nearest; with no thresholds, all numbers are.

    Raises:
        OptionError: a number is greater than `MAX_NUMBER`.
    """
    with np.errstate(over="ignore"):
        steps = magnitudes / step
    nearest = np.floor(steps + np.float32(0.5))
    if len(nearest) and nearest.max() > MAX_NUMBER:
        raise OptionError(
            f"the step {step} is too small for the weight {magnitudes.max()}; use a greater step"
        )
    numbers = nearest.astype(np.int64)
    if len(thresholds):
        low = np.minimum(numbers, len(thresholds))
        numbers -= (numbers == low) & (low > 0) & (steps < thresholds[np.maximum(low, 1) - 1])
    return np.asarray(numbers, np.uint32)


def uniform_levels(weights: F32, factors: F32 | None, step: np.float32, thresholds: F32) -> AnyLevels:
    """Returns the level of each weight: twice its number, plus 1 if it is negative. The number 0 has level 0.

    Args:
        weights: finite, shape [n].
        factors: magnitudes are first divided by these; a factor of 0 gives 0. Shape [n], or None.
        step, thresholds: as in `uniform_numbers`.

    Returns:
        The levels, in the narrowest sufficient dtype of uint8, uint16 and uint32.

    Raises:
        OptionError: a number is greater than `MAX_NUMBER`.
    """
    magnitudes = np.abs(weights)
    if factors is not None:
        magnitudes = scaled_down(magnitudes, factors)
    levels = uniform_numbers(magnitudes, step, thresholds) * np.uint32(2)
    levels += np.signbit(weights) & (levels > 0)
    return levels.astype(np.min_scalar_type(int(levels.max(initial=0))))
