"""Ensures that numbers are reconstructed as finite weights (the encoder's side of SPEC.md chapter 14).

A reader multiplies a number by the step (or looks up its centroid), by the scale factor and by the importance
in float32, and rounds the product to the tensor's dtype. If a weight is near the greatest number of its
dtype, its nearest number may give an infinity, or a NaN in F8_E4M3. The encoder then uses the greatest number
that is finite.

Reconstruction is monotonic: each operation rounds a product with a factor that is not negative. Therefore
exactly the numbers from 0 up to a greatest one are finite, and bisection finds that one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..coding.quantisers import F32, NumberQuantiser
from ..dtypes import DTYPES, Dtype
from ..errors import OptionError

Numbers = NDArray[np.uint64]

# The greatest number that can be coded: levels are below 2^32 (SPEC.md chapter 8).
_MOST = (1 << 31) - 1
_BLOCK = 1 << 18  # positions processed at a time
_CACHED = 1 << 15  # the same for results that should stay in the fastest caches


@dataclass(frozen=True)
class Reconstruction:
    """The reader's reconstruction of weights from the numbers of a lossy quantiser.

    Attributes:
        dtype: the tensor's dtype.
        quantiser: the quantiser as stored.
        centroids: of the quantiser, ascending; None if it has none.
    """

    dtype: Dtype
    quantiser: NumberQuantiser
    centroids: F32 | None = None

    def values(
        self, numbers: NDArray[np.unsignedinteger], scale: F32 | None, multiplier: F32 | None
    ) -> NDArray[np.generic]:
        """Returns the magnitudes that a reader reconstructs, in the tensor's dtype, shape [n].

        Args:
            numbers: shape [n].
            scale: the scale factor of each number, shape [n], or None.
            multiplier: the importance of each number if it is a multiplier, shape [n]; else None.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            levels = numbers.astype(np.uint64) << np.uint64(1)
            return self.quantiser.fingerprint_values(levels, self.dtype, self.centroids, scale, multiplier)

    def lowered(
        self, numbers: NDArray[np.unsignedinteger], scale: F32 | None, multiplier: F32 | None
    ) -> NDArray[np.unsignedinteger]:
        """Returns the numbers, each lowered to the greatest one that is reconstructed as finite.

        Args:
            numbers, scale, multiplier: as in `values`.

        Raises:
            OptionError: no number is finite at some position.
        """
        if not len(numbers) or self.is_finite(int(numbers.max()), scale, multiplier):
            return numbers
        over = np.flatnonzero(~np.isfinite(self.values(numbers, scale, multiplier)))
        if not len(over):
            return numbers
        some_scale = None if scale is None else scale[over]
        some_multiplier = None if multiplier is None else multiplier[over]
        low, high = np.full(len(over), -1, np.int64), numbers[over].astype(np.int64)
        while (high - low > 1).any():
            middle = (low + high) >> 1
            finite = np.isfinite(
                self.values(np.maximum(middle, 0).astype(np.uint64), some_scale, some_multiplier)
            )
            low, high = np.where(finite, middle, low), np.where(finite, high, middle)
        if (low < 0).any():
            raise OptionError(
                f"no centroid times its scale factor is finite in {self.dtype.name}; use more centroids"
            )
        out = numbers.copy()
        out[over] = low.astype(numbers.dtype)
        return out

    def is_finite(self, number: int, scale: F32 | None, multiplier: F32 | None) -> bool:
        """Returns whether a number, and therefore every lower one, is finite with all given factors.

        Args:
            number: at least 0.
            scale, multiplier: factors, at least one each, or None.
        """
        each = [None if factors is None else np.abs(factors).max()[None] for factors in (scale, multiplier)]
        return bool(np.isfinite(self.values(np.array([number], np.uint64), *each))[0])


def greatest_codable(step: np.float32, greatest_scale: np.float32) -> int:
    """Returns the greatest number allowed in a code table for a step and scale (R-QNT-006, R-SCL-006)."""
    low, high = 0, _MOST + 1
    with np.errstate(over="ignore"):
        while high - low > 1:
            middle = (low + high) >> 1
            finite = np.isfinite(np.float32(middle) * step * greatest_scale)
            low, high = (middle, high) if finite else (low, middle)
    return low


def require_finite(flat: NDArray[np.generic]) -> None:
    """Raises if a lossy quantiser does not support the weights.

    Raises:
        OptionError: a weight is not finite in float32, or all weights are too small for float32.
    """
    for start in range(0, len(flat), _CACHED):
        with np.errstate(over="ignore", invalid="ignore"):
            values = flat[start : start + _CACHED].astype(np.float32, copy=False)
            extremes = np.array([values.min(), values.max()])  # both are NaN if any value is
        if not np.isfinite(extremes).all():
            raise OptionError(
                "a lossy quantiser takes finite float32 only, no infinities or NaNs; leave the tensor out of "
                "the lossy options, such as by options={name: ...} for the others"
            )
    if flat.dtype == np.float64 and np.any(flat) and not _has_normal_float32(flat):
        raise OptionError(
            "all weights are too small for float32, in which a lossy quantiser works; use lossless"
        )


def _has_normal_float32(flat: NDArray[np.generic]) -> bool:
    """Whether the magnitude of at least one weight is a normal number in float32."""
    least = DTYPES["F32"].least_normal
    return any(
        bool((np.abs(flat[start : start + _BLOCK].astype(np.float64)) >= least).any())
        for start in range(0, len(flat), _BLOCK)
    )
