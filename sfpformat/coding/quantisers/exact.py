"""The kind ``exact``: levels are bit patterns of a float dtype, with the sign moved to the lowest bit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ...dtypes import DTYPES, Dtype
from ...errors import fault
from ..planes import AnyLevels, Levels
from .kind import F32, Quantiser, StreamMap, round_to


@dataclass(frozen=True)
class Exact(Quantiser):
    """Levels are bit patterns of ``dtype`` with the sign lowest. With ``trim``, segments omit zero bits."""

    dtype: Dtype
    trim: bool = False

    NAME: ClassVar[str] = "exact"
    KEYS: ClassVar[tuple[str, ...]] = ("dtype", "trim")

    def __str__(self) -> str:
        return f"exact {self.dtype.name}"

    def to_map(self) -> dict[str, object]:
        return {"dtype": self.dtype.name, "trim": int(self.trim)}

    @classmethod
    def from_map(cls, source: StreamMap) -> Exact:
        name = source.required("dtype", str)
        if name not in DTYPES:
            raise fault("R-TEN-003", f"unknown dtype {name!r}", offset=source.place("dtype"))
        trim = source.required("trim", int)
        if trim not in (0, 1):
            raise fault("R-QNT-008", f"trim is {trim}, must be 0 or 1", offset=source.place("trim"))
        return _shared(name, trim)

    def fingerprint_bound(self, dtype: Dtype) -> int:
        return 1 << dtype.bits if self.dtype == dtype else finite_bound(self.dtype)

    def importance_bound(self) -> int:
        return finite_bound(self.dtype)

    def widens_to(self, dtype: Dtype) -> bool:
        return self.dtype.name == dtype.name or dtype.name in self.dtype.widens_to

    def fingerprint_values(
        self,
        levels: Levels,
        dtype: Dtype,
        centroids: F32 | None = None,
        scale: F32 | None = None,
        multiplier: F32 | None = None,
    ) -> NDArray[np.generic]:
        exact = levels_to_patterns(levels, self.dtype).view(self.dtype.numpy)
        if self.dtype != dtype:
            exact = exact.astype(dtype.numpy)
        return exact if multiplier is None else multiplied(exact, multiplier, dtype)

    def importance_values(self, levels: Levels, centroids: F32 | None) -> F32:
        return levels_to_patterns(levels, self.dtype).view(self.dtype.numpy).astype(np.float32)


@cache
def _shared(dtype: str, trim: int) -> Exact:
    return Exact(DTYPES[dtype], bool(trim))


def finite_bound(dtype: Dtype) -> int:
    """Returns the greatest level whose pattern is finite, plus 1."""
    assert dtype.nonfinite is not None
    return 2 * dtype.nonfinite


def patterns_to_levels(patterns: NDArray[np.unsignedinteger]) -> AnyLevels:
    """Moves the sign of each pattern from the highest bit to the lowest. Keeps the dtype."""
    one, top = patterns.dtype.type(1), patterns.dtype.type(8 * patterns.itemsize - 1)
    return np.asarray((patterns << one) | (patterns >> top))


def levels_to_patterns(levels: Levels, dtype: Dtype) -> NDArray[np.unsignedinteger]:
    """Converts levels to bit patterns of ``dtype``; the inverse of `patterns_to_levels`."""
    narrow = levels.astype(dtype.pattern)
    one = dtype.pattern.type(1)
    return np.asarray((narrow >> one) | (narrow << dtype.pattern.type(dtype.bits - 1)))


def float_patterns(values: NDArray[np.generic], dtype: Dtype) -> NDArray[np.unsignedinteger]:
    """Returns a view of a one-dimensional array of ``dtype`` as bit patterns."""
    return values.view(dtype.pattern)


def multiplied(exact: NDArray[np.generic], multiplier: F32, dtype: Dtype) -> NDArray[np.generic]:
    """Returns exact weights times their importances. Infinities and NaNs are unchanged (R-REC-004)."""
    wide = np.float64 if dtype.name == "F64" else np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(exact)
        product = round_to(exact.astype(wide) * multiplier.astype(wide), dtype)
    return np.where(finite, product, exact)


_NARROW_FIRST, _NARROW_BLOCK = 1 << 6, 1 << 20  # values that are compared at a time; bounds the memory


def narrowest_exact(values: NDArray[np.generic], dtype: Dtype) -> Dtype:
    """Returns the narrowest dtype that widens to ``dtype`` and represents all values exactly (R-QNT-002)."""
    for name in ("F8_E4M3", "F8_E5M2", "BF16", "F16", "F32"):
        narrow = DTYPES[name]
        # The first block is short, because almost all tensors fail in it.
        starts = [0, *range(_NARROW_FIRST, len(values), _NARROW_BLOCK)]
        if dtype.name in narrow.widens_to and all(
            _holds(narrow, values[start : start + (_NARROW_BLOCK if start else _NARROW_FIRST)], dtype)
            for start in starts
        ):
            return narrow
    return dtype


def may_be_narrower(patterns: NDArray[np.unsignedinteger], dtype: Dtype) -> bool:
    """Returns False if `narrowest_exact` certainly returns ``dtype``: the first weights have too many bits.

    A value of a narrower dtype with fewer mantissa bits has zeros in the lowest bits of its mantissa.

    Args:
        patterns: bit patterns of ``dtype``.
        dtype: a float dtype.
    """
    joined = int(np.bitwise_or.reduce(patterns[:_NARROW_FIRST], initial=0))
    return joined & ((1 << _fewer_bits(dtype.name)) - 1) == 0


@cache
def _fewer_bits(name: str) -> int:
    """Returns how many mantissa bits more a dtype has than each narrower one, at least."""
    own = _mantissa_bits(DTYPES[name])
    narrower = [
        _mantissa_bits(dtype) for dtype in DTYPES.values() if dtype.is_float and name in dtype.widens_to
    ]
    return own - max(narrower, default=own)


def _mantissa_bits(dtype: Dtype) -> int:
    return dtype.bits - 1 - dtype.exponent_bits


def _holds(narrow: Dtype, values: NDArray[np.generic], dtype: Dtype) -> bool:
    """Returns whether a narrower dtype represents the values of ``dtype`` bit-exactly, and all are finite."""
    with np.errstate(all="ignore"):
        back = values.astype(narrow.numpy)
        same = back.astype(dtype.numpy).view(dtype.pattern) == values.view(dtype.pattern)
        return bool(same.all() and np.isfinite(back).all())
