"""CRC-32 of changed elements, from that of the elements before.

A CRC is linear: the CRC of new elements is that of the old ones, xor a sum over the bits that differ. The
kernels add the term of each such bit, from a table for the bits of a group of bytes. From one group to the
next, they multiply the sum by x^(bits of a group). Where few elements change, this takes less time than a
second pass over all bytes.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from ...coding.changes import ElementKind, Extent, Patterns
from ...io import checksum
from .comparing import COMPARED, differing, first_start, key_of, masks_of
from .compiling import Int, kernel
from .unaligned import prefetch, trailing_zeros

# Bytes per group: at least 64 elements of 8 bytes; the table of its bits then takes a quarter of the first
# cache of most processors.
_GROUP_BITS = 9
_GROUP = 1 << _GROUP_BITS
_PREFETCHED = 16  # changes ahead
# Above one change in this many bytes, a second pass over all bytes is faster.
_SPARSE = 32

Words = NDArray[np.uint32]


def compare(base: Patterns, new: Patterns, kind: ElementKind, known: int) -> tuple[int, Extent]:
    """Implements `Engine.compare`."""
    most = base.nbytes // _SPARSE
    changed, first, last, sum_ = _compare(
        base, new, base.itemsize, kind.shift, kind.bits, kind.exponent_bits != 0, most, *_tables()
    )
    crc = known ^ int(sum_) if changed <= most else checksum.crc32(new.data)
    return crc, Extent(int(changed), int(first), int(last))


def crc32_with(base: Patterns, positions: NDArray[np.uint32], values: Patterns, known: int) -> int:
    """Implements `io.checksum.crc32_with`."""
    if len(positions) > base.nbytes // _SPARSE:
        return checksum.crc32_with(base, positions, values, known)
    return known ^ int(_sum_of(base, positions, values, base.itemsize, *_tables()))


@cache
def _tables() -> tuple[Words, Words]:
    """Returns the terms of the bits of a group, [8 · _GROUP], and the factor of the next group, [4, 256].

    Row b of the factor has the products of the numbers with only byte b.
    """
    terms = np.zeros(8 * _GROUP, np.uint32)
    term = checksum.POLYNOMIAL
    for bit in reversed(range(len(terms))):
        terms[bit] = term
        term = (term >> 1) ^ (checksum.POLYNOMIAL if term & 1 else 0)
    ahead = checksum.power(8 * _GROUP)
    bits = [checksum.times(ahead, 1 << bit) for bit in range(32)]
    factor = np.zeros((4, 256), np.uint32)
    for byte in range(4):
        for bit in range(8):
            factor[byte] ^= np.where(np.arange(256) >> bit & 1, bits[8 * byte + bit], 0).astype(np.uint32)
    return terms, factor


@kernel
def _ahead(sum_: Int, groups: Int, factor: Words) -> np.uint32:
    """Returns a sum after ``groups`` further groups."""
    word = np.uint32(sum_)
    for _ in range(groups if word else 0):
        word = (
            factor[0, word & np.uint32(255)]
            ^ factor[1, (word >> np.uint32(8)) & np.uint32(255)]
            ^ factor[2, (word >> np.uint32(16)) & np.uint32(255)]
            ^ factor[3, word >> np.uint32(24)]
        )
    return word


@kernel
def _term(difference: np.uint64, offset: Int, terms: Words) -> np.uint32:
    """Returns the term of an element that differs, at a byte offset in its group."""
    sum_ = np.uint32(0)
    rest = difference
    while rest:
        sum_ ^= terms[8 * offset + np.int64(trailing_zeros(rest))]
        rest &= rest - np.uint64(1)
    return sum_


@kernel
def _compare(
    base: Patterns,
    new: Patterns,
    width: Int,
    shift: Int,
    bits: Int,
    is_float: bool,
    most: Int,
    terms: Words,
    factor: Words,
) -> tuple[Int, Int, Int, Int]:
    """Returns the number of elements that differ, their least and greatest key, and the sum of their terms.

    The sum is undefined if more than ``most`` elements differ.
    """
    _, low, _, _ = masks_of(bits, is_float)
    changed, sum_, group = 0, np.uint32(0), 0
    first, last = np.int64(1 << 16), np.int64(-1)
    before = -len(base) * width & (_GROUP - 1)  # bytes of the first group that lie before the elements
    # The last comparison ends with the last group, so that none has elements of two groups.
    for start in range(first_start(len(base)), len(base), COMPARED):
        if start < 0:
            mask = np.uint64(0)
            for i in range(start + COMPARED):
                mask |= np.uint64(base[i] != new[i]) << np.uint64(i - start)
        else:
            mask = differing(base, new, start)
        if not mask:
            continue
        at = (before + (start + COMPARED) * width - 1) >> _GROUP_BITS
        if changed <= most:
            sum_ = _ahead(sum_, at - group, factor)
            group = at
        while mask:
            found = start + np.int64(trailing_zeros(mask))
            mask &= mask - np.uint64(1)
            old = np.uint64(base[found])
            key = np.int64(key_of(old, low, shift, is_float))
            first, last = min(first, key), max(last, key)
            changed += 1
            if changed <= most:
                sum_ ^= _term(old ^ np.uint64(new[found]), (before + found * width) & (_GROUP - 1), terms)
    return (
        changed,
        first,
        last,
        _ahead(sum_, ((before + len(base) * width - 1) >> _GROUP_BITS) - group, factor),
    )


@kernel
def _sum_of(
    base: Patterns,
    positions: NDArray[np.uint32],
    values: Patterns,
    width: Int,
    terms: Words,
    factor: Words,
) -> np.uint32:
    """Returns the sum of the terms of changes."""
    sum_, group = np.uint32(0), np.int64(0)
    before = -len(base) * width & (_GROUP - 1)
    for n in range(len(positions)):
        prefetch(base, width * np.int64(positions[min(n + _PREFETCHED, len(positions) - 1)]))
        i = np.int64(positions[n])
        at = np.int64(before + i * width)
        if at >> np.int64(_GROUP_BITS) != group:
            sum_ = _ahead(sum_, (at >> np.int64(_GROUP_BITS)) - group, factor)
            group = at >> np.int64(_GROUP_BITS)
        sum_ ^= _term(np.uint64(base[i]) ^ np.uint64(values[n]), at & (_GROUP - 1), terms)
    return _ahead(sum_, ((before + len(base) * width - 1) >> _GROUP_BITS) - group, factor)
