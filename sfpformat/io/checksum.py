"""CRC-32 (SPEC.md R-CNV-004). Uses zlib-ng if it is installed, which is much faster than zlib."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from .source import Buffer

try:
    from zlib_ng.zlib_ng import crc32 as _crc32
except ImportError:
    from zlib import crc32 as _crc32

POLYNOMIAL = 0xEDB88320  # reflected, R-CNV-004
_ONE = 1 << 31  # the polynomial 1

_COPIED = 1 << 18  # bytes that `crc32_with` copies at a time


def crc32(data: Buffer, before: int = 0) -> int:
    """Returns the CRC-32 of ``data``, an integer from 0 to 2^32 - 1.

    Args:
        data: the bytes.
        before: the CRC-32 of all bytes before ``data``; 0 without such bytes.
    """
    return _crc32(data, before)


def crc32_with(
    base: NDArray[np.unsignedinteger],
    positions: NDArray[np.uint32],
    values: NDArray[np.unsignedinteger],
    known: int,
) -> int:
    """Returns the CRC-32 of elements after changes. Copies only a part of them at a time.

    Args:
        base: the elements before the changes, contiguous, [n].
        positions: positions of the changes, ascending, [m].
        values: the elements at these positions after the changes, [m].
        known: the CRC-32 of ``base``.
    """
    if len(positions) == 0:
        return known
    crc, size = 0, _COPIED // base.itemsize
    for start in range(0, len(base), size):
        part = base[start : start + size]
        # Bounds of another dtype would make numpy copy all positions.
        first, stop = np.searchsorted(positions, np.array((start, start + size), np.uint32))
        if first < stop:
            part = part.copy()
            part[positions[first:stop] - np.uint32(start)] = values[first:stop]
        crc = crc32(part.data, crc)
    return crc


def combined(first: int, second: int, length: int) -> int:
    """Returns the CRC-32 of two byte sequences one after another.

    Args:
        first, second: their CRC-32.
        length: number of bytes of the second one.
    """
    return times(power(8 * length), first) ^ second if first else second


def times(a: int, b: int) -> int:
    """Returns a product modulo the polynomial of the CRC; the highest bit is the coefficient of 1."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (POLYNOMIAL if b & 1 else 0)
    return product


@cache
def _square(exponent: int) -> int:
    """Returns x^(2^exponent) modulo the polynomial."""
    if exponent == 0:
        return _ONE >> 1
    return times(_square(exponent - 1), _square(exponent - 1))


@cache
def power(exponent: int) -> int:
    """Returns x^exponent modulo the polynomial. A CRC is multiplied by x^(8 n) for n further bytes."""
    product, bit = _ONE, 0
    while exponent:
        if exponent & 1:
            product = times(_square(bit), product)
        exponent >>= 1
        bit += 1
    return product
