"""Levels to prefix and residual planes, as `coding.planes.encode_levels`; and a mask to octets or runs.

Theory of operation: a bit writer is a word, how many of its lowest bits are taken, and the byte that it goes
to. It is stored whole, 8 bytes, and moved on by the bytes that are full; so at most 7 bits are left in it,
and 57 may be added between two stores. Planes have room for 8 bytes after their last one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...coding.codetable import MAX_CODE_BITS
from .compiling import allocating_kernel
from .counting import class_of
from .memory import store64

# Symbols between two stores: 4 codewords of 12 bits are at most the 57 there is room for.
_SYMBOLS = 4
_WORD_BITS = np.uint64(MAX_CODE_BITS)


@allocating_kernel
def fill_words(lengths: Any, words: Any) -> None:
    """Fills ``words`` (uint32 [codes, symbols]): a codeword, its first bit lowest, from bit 16 its length.

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
    levels: Any, counts: Any, codes: Any, first: int, width: int, words: Any, plane: Any, sizes: Any
) -> int:
    """The prefix plane where all classes have one width and symbols are single classes.

    Args:
        levels: unsigned, of whole segments.
        counts, codes: int64, levels and code of each.
        first: the class that has symbol 0, counted in classes of 2^width levels.
        words: uint32 [codes, symbols], of `fill_words`.
        plane: uint8, filled; room for all codewords and 8 bytes more.
        sizes: int64, set to the bits of each segment.

    Returns:
        How many bytes of the plane are used.
    """
    word, taken, to = np.uint64(0), np.uint64(0), np.int64(0)
    low16, sixteen, seven, three = np.uint64(0xFFFF), np.uint64(16), np.uint64(7), np.uint64(3)
    # Unsigned throughout: signed subscripts are tested for being negative.
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
            store64(plane, to, word)
            to += np.int64(taken >> three)
            word >>= taken & ~seven
            taken &= seven
        while at < stop:
            entry = np.uint64(own[(np.uint64(levels[at]) >> shift) - least])
            word |= (entry & low16) << taken
            taken += entry >> sixteen
            at += one
            store64(plane, to, word)
            to += np.int64(taken >> three)
            word >>= taken & ~seven
            taken &= seven
        sizes[s] = to * 8 + np.int64(taken) - before
    if taken:
        plane[to] = np.uint8(word)
        to += 1
    return to


@allocating_kernel
def pack_prefix(
    levels: Any,
    counts: Any,
    codes: Any,
    base: Any,
    constant: int,
    lookup: Any,
    firsts: Any,
    group: int,
    words: Any,
    plane: Any,
    sizes: Any,
) -> int:
    """The prefix plane of any stream; see `pack_prefix_of_one_width` and `counting.class_of`."""
    word, taken, to = np.uint64(0), np.uint64(0), np.int64(0)
    low16, sixteen, seven, three = np.uint64(0xFFFF), np.uint64(16), np.uint64(7), np.uint64(3)
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
            store64(plane, to, word)
            to += np.int64(taken >> three)
            word >>= taken & ~seven
            taken &= seven
        at = stop
        sizes[s] = to * 8 + np.int64(taken) - before
    if taken:
        plane[to] = np.uint8(word)
        to += 1
    return to


@allocating_kernel
def pack_residuals(
    levels: Any,
    counts: Any,
    trims: Any,
    base: Any,
    constant: int,
    lookup: Any,
    firsts: Any,
    extra: Any,
    plane: Any,
    sizes: Any,
) -> int:
    """The residual plane of any stream.

    Args:
        levels, counts: of whole segments.
        trims: int64, residual bits that each segment leaves out.
        base, constant, lookup, firsts: as in `counting.class_of`.
        extra: uint8, residual bits of each class.
        plane: uint8, filled; room for all residuals and 8 bytes more.
        sizes: int64, set to the bits of each segment.

    Returns:
        How many bytes of the plane are used.
    """
    word, taken, to = np.uint64(0), np.uint64(0), np.int64(0)
    one, seven, three = np.uint64(1), np.uint64(7), np.uint64(3)
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
            store64(plane, to, word)
            to += np.int64(taken >> three)
            word >>= taken & ~seven
            taken &= seven
            at += 1
        sizes[s] = to * 8 + np.int64(taken) - before
    if taken:
        plane[to] = np.uint8(word)
        to += 1
    return to
