"""CRC-32 of tensors, computed in parts by several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..io.checksum import crc32
from ..io.threads import for_each

T = TypeVar("T")

# Bytes per part. Two parts fit in the cache of a core.
PART = 1 << 20

_POLYNOMIAL = 0xEDB88320  # reflected, R-CNV-004
_ONE = 1 << 31  # the polynomial 1


def combined(first: int, second: int, length: int) -> int:
    """Returns the CRC-32 of two byte sequences one after another.

    Args:
        first, second: their CRC-32.
        length: number of bytes of the second one.
    """
    return _times(_after(length), first) ^ second


def joined(parts: Iterable[int], length: int) -> int:
    """Returns the CRC-32 of ``length`` bytes, given that of each part of `PART` bytes."""
    total = 0
    for start, one in zip(range(0, length, PART), parts, strict=True):
        total = combined(total, one, min(PART, length - start))
    return total


def of_parts(work: Callable[[slice], T], length: int, threads: int) -> list[T]:
    """Calls ``work`` for each `PART` of ``length`` bytes, in several threads. Returns the results."""
    found: dict[int, T] = {}

    def part(start: int) -> None:
        found[start] = work(slice(start, start + PART))

    starts = range(0, length, PART)
    for_each(part, starts, max(min(threads, len(starts)), 1))
    return [found[start] for start in starts]


def checksum_of(array: NDArray[np.generic], threads: int = 1) -> int:
    """Returns the CRC-32 of the elements of a contiguous array."""
    data = array.reshape(-1).view(np.uint8)
    if threads <= 1 or len(data) <= PART:
        return crc32(data.data)
    return joined(of_parts(lambda part: crc32(data[part].data), len(data), threads), len(data))


def _times(a: int, b: int) -> int:
    """Returns a product modulo the polynomial of the CRC; the highest bit is the coefficient of 1."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@cache
def _square(power: int) -> int:
    """Returns x^(2^power) modulo the polynomial."""
    if power == 0:
        return _ONE >> 1
    return _times(_square(power - 1), _square(power - 1))


@cache
def _after(length: int) -> int:
    """Returns the polynomial that a CRC is multiplied by for ``length`` further bytes: x^(8 length)."""
    product, power = _ONE, 3
    while length:
        if length & 1:
            product = _times(_square(power), product)
        length >>= 1
        power += 1
    return product
