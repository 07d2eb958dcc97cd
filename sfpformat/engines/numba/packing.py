"""Encodes levels to prefix and residual planes (`coding.planes.encode_levels`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.codetable import MAX_CODE_BITS
from ...coding.planes import AnyLevels, Counts, Levels
from .bitwriter import close, flush
from .compiling import Int, allocating_kernel
from .counting import class_of
from .unaligned import store64

# Symbols between two flushes: 4 codewords of 12 bits fit in the 57 free bits.
_SYMBOLS = 4
# Residuals of at most this many bits are packed eight at a time.
MOST_TOGETHER = 8


@allocating_kernel
def fill_words(lengths: Bytes, words: NDArray[np.uint32]) -> None:
    """Fills ``words`` (uint32 [codes, symbols]): the codeword, its first bit lowest; from bit 16 its length.

    Args:
        lengths: uint8 [codes, symbols].
    """
    codes, symbols = lengths.shape
    for code in range(codes):
        codeword = np.int64(0)
        for length in range(1, MAX_CODE_BITS + 1):
            for symbol in range(symbols):
                if lengths[code, symbol] == length:
                    turned = np.int64(0)
                    for b in range(length):
                        turned |= ((codeword >> b) & 1) << (length - 1 - b)
                    words[code, symbol] = np.uint32(turned | length << 16)
                    codeword += 1
            codeword <<= 1


@allocating_kernel
def pack_prefix_of_one_width(
    levels: AnyLevels,
    counts: Counts,
    codes: Counts,
    first: Int,
    width: Int,
    words: NDArray[np.uint32],
    plane: Bytes,
    sizes: Counts,
) -> Int:
    """Encodes the prefix plane if all classes have one width and each symbol is one class.

    Args:
        levels: unsigned, of whole segments.
        counts, codes: int64, number of levels and code of each segment.
        first: the class of symbol 0, counted in classes of 2^width levels.
        words: uint32 [codes, symbols], from `fill_words`.
        plane: uint8, filled; needs 8 bytes more than all codewords.
        sizes: int64, set to the number of bits of each segment.

    Returns:
        The number of used bytes of the plane.
    """
    word, taken, to = np.uint64(0), np.uint64(0), np.int64(0)
    low16, sixteen = np.uint64(0xFFFF), np.uint64(16)
    # Unsigned indices, because Numba tests signed ones for negative values.
    shift, least, one = np.uint64(width), np.uint64(first), np.uint64(1)
    at = np.uint64(0)
    for s in range(counts.size):
        stop = at + np.uint64(counts[s])
        before = to * 8 + np.int64(taken)
        own = words[codes[s]]
        while at + np.uint64(_SYMBOLS) <= stop:
            for _ in range(_SYMBOLS):
                entry = np.uint64(own[(np.uint64(levels[at]) >> shift) - least])
                word |= (entry & low16) << taken
                taken += entry >> sixteen
                at += one
            to, word, taken = flush(plane, to, word, taken)
        while at < stop:
            entry = np.uint64(own[(np.uint64(levels[at]) >> shift) - least])
            word |= (entry & low16) << taken
            taken += entry >> sixteen
            at += one
            to, word, taken = flush(plane, to, word, taken)
        sizes[s] = to * 8 + np.int64(taken) - before
    return close(plane, to, word, taken)


@allocating_kernel
def pack_prefix(
    levels: AnyLevels,
    counts: Counts,
    codes: Counts,
    base: np.uint64,
    constant: Int,
    lookup: NDArray[np.uint16],
    firsts: Levels,
    group: Int,
    words: NDArray[np.uint32],
    plane: Bytes,
    sizes: Counts,
) -> Int:
    """Encodes the prefix plane of any stream. Arguments: `pack_prefix_of_one_width`, `counting.class_of`."""
    word, taken, to = np.uint64(0), np.uint64(0), np.int64(0)
    low16, sixteen = np.uint64(0xFFFF), np.uint64(16)
    at, classes = np.int64(0), firsts.size
    for s in range(counts.size):
        stop = at + counts[s]
        before = to * 8 + np.int64(taken)
        own = words[codes[s]]
        while at < stop:
            symbol = class_of(np.uint64(levels[at]), base, constant, lookup, firsts)
            at += 1
            if group == 2:
                if at < stop:
                    symbol += classes * class_of(np.uint64(levels[at]), base, constant, lookup, firsts)
                at += 1
            entry = np.uint64(own[symbol])
            word |= (entry & low16) << taken
            taken += entry >> sixteen
            to, word, taken = flush(plane, to, word, taken)
        at = stop
        sizes[s] = to * 8 + np.int64(taken) - before
    return close(plane, to, word, taken)


@allocating_kernel
def pack_residuals_of_one_width(
    levels: AnyLevels, counts: Counts, base: np.uint64, width: Int, plane: Bytes, sizes: Counts
) -> Int:
    """Encodes the residual plane if all classes have one width of at most `MOST_TOGETHER`, without trims.

    Args:
        levels, counts: same as for `pack_prefix_of_one_width`.
        base: uint64, the base of the code table.
        width: residual bits of each level.
        plane: uint8, filled; needs 8 bytes more than all residuals.
        sizes: int64, set to the number of bits of each segment.

    Returns:
        The number of used bytes of the plane.
    """
    for s in range(counts.size):
        sizes[s] = counts[s] * width
    bits, mask = np.uint64(width), (np.uint64(1) << np.uint64(width)) - np.uint64(1)
    at, to, size = np.uint64(0), np.int64(0), np.uint64(levels.size)
    # Eight residuals fill a whole number of bytes.
    while at + np.uint64(8) <= size:
        word = np.uint64(0)
        for i in range(8):
            word |= (np.uint64(levels[at + np.uint64(i)]) - base & mask) << np.uint64(i) * bits
        store64(plane, to, word)
        at += np.uint64(8)
        to += width
    word, taken = np.uint64(0), np.uint64(0)
    while at < size:
        word |= (np.uint64(levels[at]) - base & mask) << taken
        taken += bits
        at += np.uint64(1)
    if taken:
        store64(plane, to, word)
        to += np.int64((taken + np.uint64(7)) >> np.uint64(3))
    return to


@allocating_kernel
def pack_residuals(
    levels: AnyLevels,
    counts: Counts,
    trims: Counts,
    base: np.uint64,
    constant: Int,
    lookup: NDArray[np.uint16],
    firsts: Levels,
    extra: Bytes,
    plane: Bytes,
    sizes: Counts,
) -> Int:
    """Encodes the residual plane of any stream.

    Args:
        levels, counts: same as for `pack_prefix_of_one_width`.
        trims: int64, residual bits that each segment omits.
        base, constant, lookup, firsts: same as for `counting.class_of`.
        extra: uint8, residual bits of each class.
        plane: uint8, filled; needs 8 bytes more than all residuals.
        sizes: int64, set to the number of bits of each segment.

    Returns:
        The number of used bytes of the plane.
    """
    word, taken, to = np.uint64(0), np.uint64(0), np.int64(0)
    one = np.uint64(1)
    at = np.int64(0)
    for s in range(counts.size):
        stop = at + counts[s]
        before = to * 8 + np.int64(taken)
        trim = np.uint64(trims[s])
        while at < stop:
            level = np.uint64(levels[at])
            number = class_of(level, base, constant, lookup, firsts)
            residual, width = level - firsts[number], np.uint64(extra[number])
            if trim:
                residual = (residual & one) | (residual >> (trim + one)) << one
                width -= trim
            word |= residual << taken  # at most 7 + 56 bits
            taken += width
            to, word, taken = flush(plane, to, word, taken)
            at += 1
        sizes[s] = to * 8 + np.int64(taken) - before
    return close(plane, to, word, taken)
