"""The table of dtypes (SPEC.md chapter 25.1), for the codec, the numpy and torch APIs, and the tests."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class Dtype:
    """An element type.

    Attributes:
        name: the name in the directory and in safetensors.
        bits: width of an element, in bits.
        numpy: the numpy dtype, little-endian; a dtype of `ml_dtypes` if numpy has none.
        nonfinite: the first bit pattern, without the sign bit, that is an infinity or a NaN. Only for float
            types that coding ``fingerprint`` supports; else None.
        widens_to: names of the dtypes that represent every finite value of this one.
    """

    name: str
    bits: int
    numpy: np.dtype[np.generic]
    nonfinite: int | None = None
    widens_to: tuple[str, ...] = ()

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.bits // 8

    @property
    def is_float(self) -> bool:
        """Whether coding ``fingerprint`` supports this type."""
        return self.nonfinite is not None

    @property
    def pattern(self) -> np.dtype[np.unsignedinteger]:
        """The numpy dtype of unsigned integers of the same width. Only for widths of 8 to 64 bits."""
        return np.dtype(f"<u{self.itemsize}")

    @property
    def exponent_bits(self) -> int:
        """Number of bits of the exponent field of a float type.

        Raises:
            ValueError: the dtype is not a float type.
        """
        if self.nonfinite is None:
            raise ValueError(f"{self.name} is not a float type")
        return {64: 11, 32: 8}.get(self.bits) or {"F16": 5, "BF16": 8, "F8_E4M3": 4, "F8_E5M2": 5}[self.name]

    def value_of(self, pattern: int) -> float:
        """Returns the value of a bit pattern of a float type."""
        return float(np.array(pattern, self.pattern).view(self.numpy))

    @property
    def greatest(self) -> float:
        """The greatest finite number of a float type (SPEC.md 25.2).

        Raises:
            ValueError: the dtype is not a float type.
        """
        if self.nonfinite is None:
            raise ValueError(f"{self.name} is not a float type")
        return self.value_of(self.nonfinite - 1)

    @property
    def least_normal(self) -> float:
        """The least positive normal number of a float type."""
        return self.value_of(1 << (self.bits - 1 - self.exponent_bits))

    @property
    def least(self) -> float:
        """The least positive number of a float type, which is subnormal if the type has subnormals."""
        return self.value_of(1)


def _plain(name: str, code: str) -> Dtype:
    dtype = np.dtype(code)
    return Dtype(name, dtype.itemsize * 8, dtype)


DTYPES: dict[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        Dtype("F64", 64, np.dtype("<f8"), 0x7FF0_0000_0000_0000),
        Dtype("F32", 32, np.dtype("<f4"), 0x7F80_0000, ("F64",)),
        Dtype("F16", 16, np.dtype("<f2"), 0x7C00, ("F32", "F64")),
        Dtype("BF16", 16, np.dtype(ml_dtypes.bfloat16), 0x7F80, ("F32", "F64")),
        Dtype("F8_E4M3", 8, np.dtype(ml_dtypes.float8_e4m3fn), 0x7F, ("F16", "BF16", "F32", "F64")),
        Dtype("F8_E5M2", 8, np.dtype(ml_dtypes.float8_e5m2), 0x7C, ("F16", "BF16", "F32", "F64")),
        _plain("BOOL", "?"),
        _plain("U8", "u1"),
        _plain("I8", "i1"),
        _plain("U16", "<u2"),
        _plain("I16", "<i2"),
        _plain("U32", "<u4"),
        _plain("I32", "<i4"),
        _plain("U64", "<u8"),
        _plain("I64", "<i8"),
        _plain("C64", "<c8"),
        _plain("C128", "<c16"),
        Dtype("F8_E8M0", 8, np.dtype(ml_dtypes.float8_e8m0fnu)),
        Dtype("F8_E4M3FNUZ", 8, np.dtype(ml_dtypes.float8_e4m3fnuz)),
        Dtype("F8_E5M2FNUZ", 8, np.dtype(ml_dtypes.float8_e5m2fnuz)),
    )
}

_BY_NUMPY: dict[np.dtype[np.generic], Dtype] = {d.numpy: d for d in DTYPES.values()}

# The allowed dtypes of scales, factors and exact importances (R-SCL-003, R-IMP-003).
FACTOR_DTYPES = ("F32", "F16", "BF16")


def of_numpy(dtype: np.dtype[np.generic]) -> Dtype | None:
    """Returns the dtype of the table for a numpy dtype of any byte order, or None if it has none."""
    return _BY_NUMPY.get(dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype)
