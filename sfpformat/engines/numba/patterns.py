"""Encoding kernels on the bit patterns of floats, without arrays of levels (SPEC.md chapter 11).

The level of a pattern is the pattern with its sign moved from the highest bit to the lowest. With classes of
2^width levels, its class is the pattern without its sign and without its lowest width - 1 bits. The classes
of several patterns can therefore be extracted from one word.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.counts import Rows
from ...coding.exact_encoding import Patterns
from ...coding.planes import Counts
from .bitwriter import close, flush
from .compiling import Int, inlined_kernel, kernel
from .unaligned import load32, load64, trailing_zeros
from .vectors import LANES16, LANES32, level_bytes16, level_bytes32

# Maximum index bits of a look-up table of pairs.
MAX_PAIR_BITS = 16
# An entry holds the bits of both codewords, and from this bit on their number.
_LENGTH_AT = 24
# Patterns per step of `shared_zeros`.
_TOGETHER = 64


@inlined_kernel
def _four_classes(
    raw: Bytes, item: Int, at: Int, cut: np.uint64, low: np.uint64
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """Returns the classes of four patterns of ``item`` bytes, from index ``at`` on.

    Args:
        cut: number of bits below the class.
        low: uint64, mask of the bits of a class.
    """
    if item == 1:
        some = np.uint64(load32(raw, at)) >> cut
        return (
            some & low,
            some >> np.uint64(8) & low,
            some >> np.uint64(16) & low,
            some >> np.uint64(24) & low,
        )
    if item == 2:
        some = load64(raw, 2 * at) >> cut
        return (
            some & low,
            some >> np.uint64(16) & low,
            some >> np.uint64(32) & low,
            some >> np.uint64(48) & low,
        )
    if item == 4:
        some, more = load64(raw, 4 * at) >> cut, load64(raw, 4 * at + 8) >> cut
        return some & low, some >> np.uint64(32) & low, more & low, more >> np.uint64(32) & low
    zeroth, oneth = load64(raw, 8 * at) >> cut, load64(raw, 8 * at + 8) >> cut
    twoth, third = load64(raw, 8 * at + 16) >> cut, load64(raw, 8 * at + 24) >> cut
    return zeroth & low, oneth & low, twoth & low, third & low


@inlined_kernel
def _classes_of_eight(raw: Bytes, item: Int, at: Int, cut: np.uint64, lows: np.uint64) -> np.uint64:
    """Returns the classes of eight patterns of 1, 2 or 4 bytes from index ``at``: a byte each, in any order.

    Args:
        cut: number of bits below the class.
        lows: uint64, mask of the bits of a class, at most 8, repeated for each pattern in a word.
    """
    eight, sixteen = np.uint64(8), np.uint64(16)
    if item == 1:
        return load64(raw, at) >> cut & lows
    if item == 2:
        return load64(raw, 2 * at) >> cut & lows | (load64(raw, 2 * at + 8) >> cut & lows) << eight
    some = load64(raw, 4 * at) >> cut & lows | (load64(raw, 4 * at + 8) >> cut & lows) << eight
    more = load64(raw, 4 * at + 16) >> cut & lows | (load64(raw, 4 * at + 24) >> cut & lows) << eight
    return some | more << sixteen


@kernel
def _in_each(low: np.uint64, bits: np.uint64) -> np.uint64:
    """Returns a uint64 that repeats ``low`` every ``bits`` bits."""
    word, filled = low, bits
    while filled < np.uint64(64):
        word |= word << filled
        filled += filled
    return word


@kernel
def count_classes(
    patterns: Patterns, raw: Bytes, counts: Counts, width: Int, first: Int, counters: Rows, rows: Rows
) -> None:
    """Fills ``rows`` (int32 [segments, classes]): how often each class of 2^width levels occurs.

    Args:
        patterns: unsigned, of whole segments; their classes are ``first`` to ``first`` + classes - 1.
        raw: the same memory as uint8.
        counts: int64, number of patterns of each segment.
        width: at least 1.
        counters: int32 [4, classes], scratch memory. Neighbours often share a class, and an increment waits
            for the previous one of the same counter; four interleaved sets break this dependency.
    """
    # Unsigned indices, because Numba tests signed ones for negative values.
    item, more = np.int64(patterns.itemsize), np.int32(1)
    cut, least = np.uint64(width - 1), np.uint64(first)
    low = (np.uint64(1) << np.uint64(8 * item - width)) - np.uint64(1)
    lows, low8 = _in_each(low, np.uint64(8 * item)), np.uint64(0xFF)
    in_bytes = item <= 4 and low <= low8 and first == 0
    zeroth, oneth, twoth, third = counters[0], counters[1], counters[2], counters[3]
    at = np.int64(0)
    for s in range(counts.size):
        stop = at + counts[s]
        counters[:] = np.int32(0)
        while in_bytes and at + 8 <= stop:
            some = _classes_of_eight(raw, item, at, cut, lows)
            zeroth[some & low8] += more
            oneth[some >> np.uint64(8) & low8] += more
            twoth[some >> np.uint64(16) & low8] += more
            third[some >> np.uint64(24) & low8] += more
            zeroth[some >> np.uint64(32) & low8] += more
            oneth[some >> np.uint64(40) & low8] += more
            twoth[some >> np.uint64(48) & low8] += more
            third[some >> np.uint64(56)] += more
            at += 8
        while at + 4 <= stop:
            a, b, c, d = _four_classes(raw, item, at, cut, low)
            zeroth[a - least] += more
            oneth[b - least] += more
            twoth[c - least] += more
            third[d - least] += more
            at += 4
        while at < stop:
            zeroth[(np.uint64(patterns[at]) >> cut & low) - least] += more
            at += 1
        for k in range(rows.shape[1]):
            rows[s, k] = zeroth[k] + oneth[k] + twoth[k] + third[k]


@kernel
def shared_zeros(patterns: Patterns, counts: Counts, zeros: Counts) -> None:
    """Fills ``zeros`` (int64) with `coding.planes.shared_zeros` of the levels."""
    top = np.uint64(1) << np.uint64(8 * patterns.itemsize - 1)
    at = np.int64(0)
    for s in range(counts.size):
        stop = at + counts[s]
        joined, i = np.uint64(0), at
        # Almost always the first few patterns show that there are none. If not, the loop tests many patterns
        # per step, which the compiler vectorises.
        few = min(at + 8, stop)
        while i < few and not joined & np.uint64(1):
            joined |= np.uint64(patterns[i])
            i += 1
        while i + _TOGETHER <= stop and not joined & np.uint64(1):
            some = patterns[i]
            for j in range(1, _TOGETHER):
                some |= patterns[i + j]
            joined |= np.uint64(some)
            i += _TOGETHER
        while i < stop and not joined & np.uint64(1):
            joined |= np.uint64(patterns[i])
            i += 1
        zeros[s] = np.int64(trailing_zeros(joined | top)) if stop > at else 0
        at = stop


@kernel
def fill_pairs(words: NDArray[np.uint32], first: Int, class_bits: Int, pairs: NDArray[np.uint32]) -> None:
    """Fills the look-up table of pairs of codewords.

    Args:
        words: uint32 [codes, classes], from `packing.fill_words`.
        first: the class of symbol 0.
        pairs: uint32 [codes, 2^(2 class_bits)]. Entry a + b * 2^class_bits is set to the codeword of class a,
            then that of class b, and from bit 24 on their total length. Entries of classes without a codeword
            are undefined.
    """
    low, sixteen = np.uint32(0xFFFF), np.uint32(16)
    for code in range(words.shape[0]):
        own = words[code]
        for b in range(own.size):
            if own[b] == 0:
                continue
            for a in range(own.size):
                length = own[a] >> sixteen
                joined = own[a] & low | (own[b] & low) << length
                whole = length + (own[b] >> sixteen)
                pairs[code, (first + a) | (first + b) << class_bits] = np.uint32(
                    joined | whole << np.uint32(_LENGTH_AT)
                )


@kernel
def pack_prefix(
    patterns: Patterns,
    raw: Bytes,
    counts: Counts,
    codes: Counts,
    first: Int,
    width: Int,
    words: NDArray[np.uint32],
    pairs: NDArray[np.uint32],
    plane: Bytes,
    sizes: Counts,
) -> Int:
    """Encodes the prefix plane of patterns of 2 or 4 bytes; two codewords per look-up if there are pairs.

    Args:
        patterns: of whole segments; ``raw``: the same memory as uint8.
        counts, codes: int64, number of patterns and code of each segment.
        first: the class of symbol 0.
        words, pairs: from `packing.fill_words` and `fill_pairs`; ``pairs`` has no columns if its table would
            be too large.
        plane: uint8, filled; needs 8 bytes more than all codewords.
        sizes: int64, set to the number of bits of each segment.

    Returns:
        The number of used bytes of the plane.
    """
    item = np.int64(patterns.itemsize)
    bits, one = np.uint64(8 * item), np.uint64(1)
    class_bits = bits - np.uint64(width)
    cut = np.uint64(width - 1)  # bits below the class
    low = (one << class_bits) - one
    lows, apart, both = _in_each(low, bits), bits - class_bits, low << class_bits | low
    kept = ~np.uint64(0) >> (np.uint64(64) - bits)
    low24, length_at = np.uint64(0xFFFFFF), np.uint64(_LENGTH_AT)
    low16, sixteen, thirtytwo = np.uint64(0xFFFF), np.uint64(16), np.uint64(32)
    word, taken, to = np.uint64(0), np.uint64(0), np.int64(0)
    at = np.int64(0)
    for s in range(counts.size):
        stop = at + counts[s]
        before = to * 8 + np.int64(taken)
        own, alone = pairs[codes[s]], words[codes[s]]
        # Four codewords of 12 bits fit in the 57 free bits.
        while own.size and at + 4 <= stop:
            some = load64(raw, item * at) >> cut & lows
            some |= some >> apart
            more = some >> thirtytwo
            if item == 4:
                more = load64(raw, 4 * at + 8) >> cut & lows
                more |= more >> apart
            zeroth, oneth = np.uint64(own[some & both]), np.uint64(own[more & both])
            length = zeroth >> length_at
            word |= (zeroth & low24 | (oneth & low24) << length) << taken
            taken += length + (oneth >> length_at)
            at += 4
            to, word, taken = flush(plane, to, word, taken)
        while at < stop:
            number = (np.uint64(patterns[at]) << one & kept) >> np.uint64(width)
            entry = np.uint64(alone[number - np.uint64(first)])
            word |= (entry & low16) << taken
            taken += entry >> sixteen
            at += 1
            to, word, taken = flush(plane, to, word, taken)
        sizes[s] = to * 8 + np.int64(taken) - before
    return close(plane, to, word, taken)


@kernel
def pack_residuals(
    patterns: Patterns, raw: Bytes, counts: Counts, trims: Counts, width: Int, plane: Bytes, sizes: Counts
) -> Int:
    """Encodes the residual plane of patterns of 2 or 4 bytes whose residuals are the low bits of the levels.

    Args:
        patterns: of whole segments; ``raw``: the same memory as uint8.
        counts, trims: int64, number of patterns of each segment, and residual bits that it omits.
        width: residual bits of each level.
        plane: uint8, filled; needs `vectors.STEP_BYTES` more than all residuals.
        sizes: int64, set to the number of bits of each segment.

    Returns:
        The number of used bytes of the plane.
    """
    item = np.int64(patterns.itemsize)
    bits, one = np.uint64(8 * item), np.uint64(1)
    sign, low = bits - one, (one << np.uint64(width)) - one
    word, taken, to = np.uint64(0), np.uint64(0), np.int64(0)
    at = np.int64(0)
    for s in range(counts.size):
        stop = at + counts[s]
        trim = np.uint64(trims[s])
        sizes[s] = counts[s] * (width - trims[s])
        if not taken and not trim:  # whole bytes
            if item == 2 and width == 8:
                while at + LANES16 <= stop:
                    level_bytes16(raw, 2 * at, plane, to)
                    at += LANES16
                    to += LANES16
            elif item == 4 and width == 24:
                while at + LANES32 <= stop:
                    level_bytes32(raw, 4 * at, plane, to)
                    at += LANES32
                    to += 3 * LANES32
        each = np.uint64(width) - trim
        while at < stop:
            pattern = np.uint64(patterns[at])
            residual = (pattern << one | pattern >> sign) & low
            if trim:
                residual = residual & one | residual >> (trim + one) << one
            word |= residual << taken
            taken += each
            to, word, taken = flush(plane, to, word, taken)
            at += 1
    return close(plane, to, word, taken)
