"""Checks, bit sequences, dtypes and rounding (chapters 1, 14 and 25)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

Entry = dict[str, Any]


class Bad(Exception):
    """The file breaks a clause; the error's argument is the clause id."""


def need(holds: bool, clause: str) -> None:
    """Raises `Bad` with the clause unless ``holds``."""
    if not holds:
        raise Bad(clause)


def align(x: int, k: int) -> int:
    """Rounds x up to a multiple of k (chapter 1)."""
    return (x + k - 1) // k * k


def zero(data: bytes, start: int, stop: int, clause: str) -> None:
    """Checks that the bits from start to stop - 1 are zero."""
    need(not any(data[bit // 8] >> bit % 8 & 1 for bit in range(start, stop)), clause)


class Bits:
    """A bit sequence (R-CNV-002, R-CNV-003). Reading past its end breaks R-PLN-003."""

    def __init__(self, data: bytes, start: int, stop: int) -> None:
        self.data, self.at, self.stop = data, start, stop

    def bit(self) -> int:
        need(self.at < self.stop, "R-PLN-003")
        self.at += 1
        return self.data[(self.at - 1) // 8] >> (self.at - 1) % 8 & 1

    def field(self, width: int) -> int:
        return sum(self.bit() << i for i in range(width))


@dataclass(frozen=True)
class Float:
    """A float type: bits of exponent and mantissa, first non-finite pattern, dtypes that it widens to."""

    exponent: int
    mantissa: int
    nonfinite: int
    widens: tuple[str, ...] = ()

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa


FLOATS = {
    "F64": Float(11, 52, 0x7FF0000000000000),
    "F32": Float(8, 23, 0x7F800000, ("F64",)),
    "F16": Float(5, 10, 0x7C00, ("F32", "F64")),
    "BF16": Float(8, 7, 0x7F80, ("F32", "F64")),
    "F8_E4M3": Float(4, 3, 0x7F, ("F16", "BF16", "F32", "F64")),
    "F8_E5M2": Float(5, 2, 0x7C, ("F16", "BF16", "F32", "F64")),
}
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1, "U8": 1, "I8": 1}
BYTES |= {"U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8, "C64": 8, "C128": 16}
BYTES |= {"F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}
FACTORS = ("F32", "F16", "BF16")


def number_of(pattern: int, dtype: str) -> float:
    """Returns the number that a bit pattern represents."""
    kind = FLOATS[dtype]
    sign = -1.0 if pattern >> (kind.bits - 1) else 1.0
    magnitude = pattern & ((1 << (kind.bits - 1)) - 1)
    if magnitude >= kind.nonfinite:
        infinite = magnitude == kind.nonfinite and dtype != "F8_E4M3"
        return sign * math.inf if infinite else math.nan
    bias = (1 << (kind.exponent - 1)) - 1
    exponent, mantissa = magnitude >> kind.mantissa, magnitude & ((1 << kind.mantissa) - 1)
    if exponent:
        mantissa += 1 << kind.mantissa
    return sign * math.ldexp(mantissa, max(exponent, 1) - bias - kind.mantissa)


def pattern_of(x: float, dtype: str) -> int:
    """Returns the pattern of a number rounded to nearest, ties to even. The number must not be a NaN."""
    kind = FLOATS[dtype]
    sign = 1 << (kind.bits - 1) if math.copysign(1, x) < 0 else 0
    if math.isinf(x):
        return sign | kind.nonfinite
    if x == 0:
        return sign
    least = 2 - (1 << (kind.exponent - 1))  # exponent of the least normal number
    exponent = max(math.frexp(x)[1] - 1, least)
    units = round(Fraction(abs(x)) / Fraction(2) ** (exponent - kind.mantissa))  # ties to even
    return sign | min(((exponent - least) << kind.mantissa) + units, kind.nonfinite)


def f32(x: float) -> float:
    """Rounds a number to binary32."""
    return number_of(pattern_of(x, "F32"), "F32")
