"""Decodes prefix planes to class slots, four segments in parallel (SPEC.md chapter 9).

Theory of operation: decoding a segment is a chain of dependent look-ups; the chains of four segments are
independent of each other. The segment index gives the start of each segment, so segments can be decoded in
any order: those that share a code are decoded together, so that only one look-up table is in use at a time. A
chain that has finished its segment starts the next one while the others continue. `advance` decodes until one
chain is near the end of its segment; `finish` decodes the last slots of a segment; the caller does the
scheduling.

Why no read is out of bounds: `advance` only decodes segments whose slots, at the maximum of 12 bits per
codeword, end at least 8 bytes before the end of the chunk (`is_inside`). `finish` decodes the other segments,
the last of a plane; it clamps its loads to the last word of the chunk. A segment is accepted only if it ends
exactly where the index says, so no load of an accepted segment was clamped. Why no write is out of bounds: a
look-up writes eight bytes from a slot before the segment's end, and `SLACK` bytes follow the segment.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.codetable import MAX_CODE_BITS, MAX_CODES
from .compiling import Int, inlined_kernel, kernel
from .lookup import COUNT_AT, LONG, MAX_SLOTS, SLOTS_AT, Code, decode_one
from .unaligned import leading_zeros, load64, store64

# Segments decoded in parallel.
CHAINS = 4
# Look-ups per load: 5 * 11 bits are at most the 57 bits that a load provides at any bit offset.
_LOOKUPS = 5
# Maximum number of slots from the look-ups of one load.
ROUND = _LOOKUPS * MAX_SLOTS
# Bytes that decoding a segment may write past its last slot.
SLACK = 8
# Rows of the state of the chains: the next bit, the next slot, the last slot at which a round may begin.
AT, TO, STOP = range(3)
STATE = 3


@inlined_kernel
def is_inside(size: int, start: int, count: int) -> bool:
    """Returns whether `advance` may decode a segment.

    Args:
        size: size of the chunk in bytes.
        start: bit offset of the segment.
        count: its number of slots.
    """
    return (start + MAX_CODE_BITS * count + 7) // 8 + 8 <= size


@kernel
def advance(data: Bytes, state: NDArray[np.int64], code: Code, slots: Bytes) -> None:
    """Decodes four segments that share a code, until one of them has fewer than `ROUND` slots remaining.

    Stops also at a codeword that is too long for the look-up table; `pass_long_codewords` decodes it.

    Args:
        data: uint8, the chunk.
        state: int64 [STATE, CHAINS], updated; every chain's segment satisfies `is_inside`.
        code: a `lookup.Code`.
        slots: uint8, filled.
    """
    entries, mask = code.entries, code.mask
    low6, top, long = np.uint64(63), np.uint64(1 << 63), np.uint64(LONG)
    slots_at, count_at = np.uint64(SLOTS_AT), np.uint64(COUNT_AT)
    at0, at1, at2, at3 = state[AT, 0], state[AT, 1], state[AT, 2], state[AT, 3]
    to0, to1, to2, to3 = state[TO, 0], state[TO, 1], state[TO, 2], state[TO, 3]
    stop0, stop1, stop2, stop3 = state[STOP, 0], state[STOP, 1], state[STOP, 2], state[STOP, 3]
    while to0 <= stop0 and to1 <= stop1 and to2 <= stop2 and to3 <= stop3:
        # The top bit is a marker: its final position gives the number of consumed bits.
        word0 = load64(data, at0 >> 3) >> np.uint64(at0 & 7) | top
        word1 = load64(data, at1 >> 3) >> np.uint64(at1 & 7) | top
        word2 = load64(data, at2 >> 3) >> np.uint64(at2 & 7) | top
        word3 = load64(data, at3 >> 3) >> np.uint64(at3 & 7) | top
        entry0, entry1, entry2, entry3 = top, top, top, top
        for _ in range(_LOOKUPS):
            entry0, entry1 = entries[word0 & mask], entries[word1 & mask]
            entry2, entry3 = entries[word2 & mask], entries[word3 & mask]
            store64(slots, to0, entry0 >> slots_at)
            store64(slots, to1, entry1 >> slots_at)
            store64(slots, to2, entry2 >> slots_at)
            store64(slots, to3, entry3 >> slots_at)
            word0 >>= entry0 & low6
            word1 >>= entry1 & low6
            word2 >>= entry2 & low6
            word3 >>= entry3 & low6
            to0 += np.int64(entry0 >> count_at)
            to1 += np.int64(entry1 >> count_at)
            to2 += np.int64(entry2 >> count_at)
            to3 += np.int64(entry3 >> count_at)
        at0 += np.int64(leading_zeros(word0))
        at1 += np.int64(leading_zeros(word1))
        at2 += np.int64(leading_zeros(word2))
        at3 += np.int64(leading_zeros(word3))
        # An entry for a long codeword consumes no bits: once a chain meets one, its entry stays `long`.
        if entry0 == long or entry1 == long or entry2 == long or entry3 == long:
            break
    state[AT, 0], state[AT, 1], state[AT, 2], state[AT, 3] = at0, at1, at2, at3
    state[TO, 0], state[TO, 1], state[TO, 2], state[TO, 3] = to0, to1, to2, to3


@inlined_kernel
def _window(data: Bytes, at: Int) -> np.uint64:
    """Returns the bits from ``at`` on: at least 57, unless the chunk ends before."""
    return load64(data, min(at >> 3, np.int64(data.size - 8))) >> np.uint64(at & 7)


@kernel
def pass_long_codewords(data: Bytes, state: NDArray[np.int64], code: Code, slots: Bytes) -> None:
    """Decodes one codeword of each chain whose next codeword is too long for the look-up table."""
    for k in range(CHAINS):
        at, to = state[AT, k], state[TO, k]
        if to <= state[STOP, k]:
            window = _window(data, at)
            if code.entries[window & code.mask] == np.uint64(LONG):
                pair, length = decode_one(window, code.of_length, code.symbol_slots)
                store64(slots, to, np.uint64(pair))
                state[AT, k], state[TO, k] = at + length, to + code.group


@kernel
def finish(data: Bytes, at: Int, to: Int, end: Int, code: Code, slots: Bytes) -> Int:
    """Decodes a segment from bit ``at`` and slot ``to`` to slot ``end`` - 1.

    Returns the bit after its end.
    """
    while to < end:
        window = _window(data, at)
        entry = code.entries[window & code.mask]
        if entry == np.uint64(LONG):
            pair, length = decode_one(window, code.of_length, code.symbol_slots)
            store64(slots, to, np.uint64(pair))
            at += length
            to += code.group
            continue
        store64(slots, to, entry >> np.uint64(SLOTS_AT))
        count = np.int64(entry >> np.uint64(COUNT_AT))
        if to + count <= end:
            at += np.int64(entry & np.uint64(63))
            to += count
            continue
        while to < end:
            symbol = np.int64(slots[to])
            if code.group == 2:
                symbol += np.int64(slots[to + 1]) << 6
            at += np.int64(code.symbol_length[symbol])
            to += code.group
    return at


@kernel
def order_by_code(codes: NDArray[np.int64], order: NDArray[np.int64], begins: NDArray[np.int64]) -> None:
    """Fills ``order`` with the segments sorted by code; those of code c end before index ``begins[c]``."""
    begins[:] = 0
    for s in range(codes.size):
        begins[codes[s] + 1] += 1
    for code in range(MAX_CODES):
        begins[code + 1] += begins[code]
    for s in range(codes.size):
        order[begins[codes[s]]] = s
        begins[codes[s]] += 1
