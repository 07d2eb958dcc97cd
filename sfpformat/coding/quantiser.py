"""Quantisers and reconstruction (SPEC.md chapters 11, 13 and 14): levels to numbers, bit for bit, and back.

Rules: every operation is one numpy operation on float32 (float64 where SPEC.md says so), in the order of
chapter 14, so that there is nothing to fuse and nothing to reorder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, Dtype
from ..errors import OptionError, fault
from .codetable import CodeTable
from .planes import AnyLevels, Levels

F32 = NDArray[np.float32]

MAX_CENTROIDS = 1 << 16  # R-QNT-004
# A number this great would need classes for 2^30 levels; a step so small asks for `exact`.
MAX_NUMBER = (1 << 30) - 1


@dataclass(frozen=True)
class Exact:
    """Levels are the bit patterns of ``dtype``, sign lowest; with ``trim`` segments leave out zero bits."""

    dtype: Dtype
    trim: bool = False


@dataclass(frozen=True)
class Uniform:
    """The magnitude is its number times ``step``, a finite float32 above 0 (R-QNT-003)."""

    step: np.float32

    def __post_init__(self) -> None:
        if not (np.isfinite(self.step) and self.step > 0):
            raise fault("R-QNT-003", f"the step is {self.step}, must be finite and above 0")


@dataclass(frozen=True)
class Table:
    """The magnitude is one of ``count`` centroids, which the vector chunk holds."""

    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_CENTROIDS:
            raise fault("R-QNT-004", f"{self.count} centroids, must be 1 to {MAX_CENTROIDS}")


Quantiser = Exact | Uniform | Table


# -------------------------------------------------------------------------------------- bounds of a stream


def fingerprint_bound(quantiser: Quantiser, dtype: Dtype) -> int:
    """The bound on ``top`` of a fingerprint stream for a tensor of ``dtype`` (SPEC.md chapter 8)."""
    if isinstance(quantiser, Uniform):
        return 1 << 32
    if isinstance(quantiser, Table):
        return 2 * quantiser.count
    return 1 << dtype.bits if quantiser.dtype == dtype else finite_bound(quantiser.dtype)


def importance_bound(quantiser: Quantiser) -> int:
    """The bound on ``top`` of an importance stream (SPEC.md chapter 8)."""
    if isinstance(quantiser, Uniform):
        return 1 << 31
    if isinstance(quantiser, Table):
        return quantiser.count
    return finite_bound(quantiser.dtype)


def finite_bound(dtype: Dtype) -> int:
    """One past the greatest level whose pattern is finite."""
    assert dtype.nonfinite is not None
    return 2 * dtype.nonfinite


def require_finite_step(quantiser: Uniform, greatest_number: int, clause: str) -> np.float32:
    """The greatest magnitude that a table can code; raises ``clause`` unless it is finite."""
    with np.errstate(over="ignore"):
        greatest = np.float32(greatest_number) * quantiser.step
    if not np.isfinite(greatest):
        raise fault(clause, f"step {quantiser.step} times {greatest_number} is not finite")
    return np.float32(greatest)


def greatest_magnitude(quantiser: Quantiser, table: CodeTable, centroids: F32 | None) -> np.float32:
    """The greatest magnitude that a `Uniform` or `Table` fingerprint stream can have (R-QNT-006)."""
    if isinstance(quantiser, Uniform):
        return require_finite_step(quantiser, (table.top - 1) // 2, "R-QNT-006")
    assert centroids is not None
    return np.float32(centroids[-1])


def require_centroids(centroids: F32) -> None:
    """Checks what the vector chunk gives as centroids (R-QNT-005, R-QNT-007)."""
    if not np.isfinite(centroids).all() or np.signbit(centroids).any():
        raise fault("R-QNT-005", "a centroid is negative or not finite")
    if (np.diff(centroids) <= 0).any():
        raise fault("R-QNT-007", "the centroids are not in ascending order")


# ------------------------------------------------------------------------------------------------- exact


def patterns_to_levels(patterns: NDArray[np.unsignedinteger]) -> AnyLevels:
    """Moves the sign from the highest bit of each pattern to the lowest; same dtype."""
    one, top = patterns.dtype.type(1), patterns.dtype.type(8 * patterns.itemsize - 1)
    return np.asarray((patterns << one) | (patterns >> top))


def levels_to_patterns(levels: Levels, dtype: Dtype) -> NDArray[np.unsignedinteger]:
    """The inverse of `patterns_to_levels`."""
    narrow = levels.astype(dtype.pattern)
    one = dtype.pattern.type(1)
    return np.asarray((narrow >> one) | (narrow << dtype.pattern.type(dtype.bits - 1)))


def float_patterns(values: NDArray[np.generic], dtype: Dtype) -> NDArray[np.unsignedinteger]:
    """The bit patterns of a one-dimensional array of ``dtype``."""
    return values.view(dtype.pattern)


# ------------------------------------------------------------------------------------------- uniform levels


def uniform_numbers(magnitudes: F32, step: np.float32, thresholds: F32) -> NDArray[np.uint32]:
    """The number of each magnitude, shape [n].

    Args:
        thresholds: entry m - 1 is the least magnitude, in steps, that gets the number m instead of m - 1, for
            numbers up to len(thresholds); greater ones round to nearest. Empty: all round to nearest.

    Raises:
        OptionError: a number is beyond `MAX_NUMBER`.
    """
    with np.errstate(over="ignore"):
        steps = magnitudes / step
    nearest = np.floor(steps + np.float32(0.5))
    if len(nearest) and nearest.max() > MAX_NUMBER:
        raise OptionError(f"a step of {step} is too small for weights of {magnitudes.max()}")
    numbers = nearest.astype(np.int64)
    if len(thresholds):
        low = np.minimum(numbers, len(thresholds))
        numbers -= (numbers == low) & (low > 0) & (steps < thresholds[np.maximum(low, 1) - 1])
    return np.asarray(numbers, np.uint32)


def uniform_levels(weights: F32, factors: F32 | None, step: np.float32, thresholds: F32) -> AnyLevels:
    """The level of each weight: twice its number, one more where it is negative; 0 for all that becomes zero.

    Args:
        weights: finite, shape [n].
        factors: what magnitudes are divided by first (those of 0 give 0), shape [n], or None.
        step, thresholds: as in `uniform_numbers`.

    Returns:
        The levels, uint8, uint16 or uint32, whichever is enough.
    """
    magnitudes = np.abs(weights)
    if factors is not None:
        magnitudes = scaled_down(magnitudes, factors)
    levels = uniform_numbers(magnitudes, step, thresholds) * np.uint32(2)
    levels += np.signbit(weights) & (levels > 0)
    return levels.astype(np.min_scalar_type(int(levels.max(initial=0))))


def scaled_down(magnitudes: F32, factors: F32) -> F32:
    """Magnitudes divided by their factors; 0 where the factor is 0."""
    return np.divide(magnitudes, factors, out=np.zeros_like(magnitudes), where=factors > 0)


# --------------------------------------------------------------------------------------- numbers of levels


def magnitudes(numbers: Levels, quantiser: Quantiser, centroids: F32 | None) -> F32:
    """The unsigned numbers that a `Uniform` or `Table` quantiser gives."""
    if isinstance(quantiser, Uniform):
        return numbers.astype(np.float32) * quantiser.step
    assert centroids is not None
    return centroids[numbers.astype(np.int64)]


def fingerprint_values(
    levels: Levels,
    quantiser: Quantiser,
    dtype: Dtype,
    centroids: F32 | None = None,
    scale: F32 | None = None,
    multiplier: F32 | None = None,
) -> NDArray[np.generic]:
    """The weights of survivors, in the tensor's dtype (SPEC.md chapter 14).

    Args:
        levels: of the survivors, shape [n].
        dtype: the tensor's.
        centroids: of a `Table`.
        scale: the scale factor of each survivor, shape [n], or None.
        multiplier: the importance of each survivor, shape [n], or None.
    """
    if isinstance(quantiser, Exact):
        exact = levels_to_patterns(levels, quantiser.dtype).view(quantiser.dtype.numpy)
        if quantiser.dtype != dtype:
            exact = exact.astype(dtype.numpy)
        return exact if multiplier is None else multiplied(exact, multiplier, dtype)
    values = magnitudes(levels >> np.uint64(1), quantiser, centroids)
    np.negative(values, out=values, where=(levels & np.uint64(1)).astype(bool))
    if scale is not None:
        values = values * scale
    if multiplier is not None:
        with np.errstate(over="ignore"):
            values = values * multiplier
    return round_to(values, dtype)


def multiplied(exact: NDArray[np.generic], multiplier: F32, dtype: Dtype) -> NDArray[np.generic]:
    """Exact weights times their importances; an infinity or a NaN stays as it is (R-REC-004)."""
    wide = np.float64 if dtype.name == "F64" else np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(exact)
        product = round_to(exact.astype(wide) * multiplier.astype(wide), dtype)
    return np.where(finite, product, exact)


def round_to(values: NDArray[np.floating], dtype: Dtype) -> NDArray[np.generic]:
    """Rounds to nearest, ties to even; beyond the greatest number by R-REC-002 and R-REC-003."""
    with np.errstate(over="ignore"):
        return values.astype(dtype.numpy)


def importance_values(levels: Levels, quantiser: Quantiser, centroids: F32 | None) -> F32:
    """The importances of an importance stream, float32 (SPEC.md chapter 13)."""
    if isinstance(quantiser, Exact):
        patterns = levels_to_patterns(levels, quantiser.dtype)
        return patterns.view(quantiser.dtype.numpy).astype(np.float32)
    return magnitudes(levels, quantiser, centroids)


def narrowest_exact(values: NDArray[np.generic], dtype: Dtype) -> Dtype:
    """The narrowest dtype that widens to ``dtype`` and holds all the values bit for bit (R-QNT-002)."""
    for name in ("F8_E4M3", "F8_E5M2", "BF16", "F16", "F32"):
        narrow = DTYPES[name]
        # The first block is short: almost all tensors fail it.
        starts = [0, *range(_NARROW_FIRST, len(values), _NARROW_BLOCK)]
        if dtype.name in narrow.widens_to and all(
            _holds(narrow, values[start : start + (_NARROW_BLOCK if start else _NARROW_FIRST)], dtype)
            for start in starts
        ):
            return narrow
    return dtype


_NARROW_FIRST, _NARROW_BLOCK = 1 << 6, 1 << 20  # values compared at a time: bounds the memory


def _holds(narrow: Dtype, values: NDArray[np.generic], dtype: Dtype) -> bool:
    """Whether a narrower dtype holds the values of ``dtype`` bit for bit, and all are finite."""
    with np.errstate(all="ignore"):
        back = values.astype(narrow.numpy)
        same = back.astype(dtype.numpy).view(dtype.pattern) == values.view(dtype.pattern)
        return bool(same.all() and np.isfinite(back).all())
