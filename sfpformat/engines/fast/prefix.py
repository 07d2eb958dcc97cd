"""Prefix planes to class slots, four segments side by side (SPEC.md chapter 9).

Theory of operation: decoding one segment is a chain of loads that wait for each other; four segments have
four chains that do not. Where a segment starts comes from the segment index, so they may be taken in any
order: those that share a code together, so that one table is in use at a time (1.4 times as fast as a table
for each chain: the pointers fit the registers).

Why no read leaves the chunk: every load's offset is cut to the last whole word of the chunk. Positions only
grow, and a segment counts as decoded only if it ends exactly where the index says, which is inside; so no
load of a segment that counts was ever cut. Why no write leaves the slots: a look-up writes four bytes from a
place that is at most the segment's end, and `SLACK` bytes follow there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...coding.codetable import MAX_CODES
from .compiling import kernel
from .lookup import LONG, MAX_SLOTS, decode_one
from .memory import load64, prefetch, store32

# Segments decoded side by side.
CHAINS = 4
# Look-ups a load: 4 * 12 bits are at most the 57 that are there whatever the bit offset.
_LOOKUPS = 4
# Slots that a segment may write past its last one.
SLACK = MAX_SLOTS
# Slots that all the look-ups of one load give at most.
_ROUND = _LOOKUPS * MAX_SLOTS


@kernel
def _step(
    data: Any, at: int, out: int, end: int, entries: Any, mask: Any, slots: Any
) -> tuple[int, int, Any]:
    """One look-up that gives no slot from ``end`` on; returns the next bit, the next slot, and the entry."""
    word = load64(data, min(at >> 3, np.int64(data.size - 8))) >> np.uint64(at & 7)
    entry = entries[word & mask]
    store32(slots, out, np.uint32(entry >> np.uint64(32)))
    given = min(np.int64(entry >> np.uint64(8) & np.uint64(15)), end - out)
    taken = np.int64(entry >> np.uint64(12 + 4 * given) & np.uint64(15))
    return at + taken, out + given, entry


@kernel
def _long_codeword(
    data: Any,
    at: int,
    out: int,
    end: int,
    entry: Any,
    of_length: Any,
    symbol_slots: Any,
    group: int,
    slots: Any,
) -> tuple[int, int]:
    """Decodes one symbol bit by bit where ``entry`` is `LONG` and ``end`` is not reached."""
    if entry != np.uint64(LONG) or out >= end:
        return at, out
    word = load64(data, min(at >> 3, np.int64(data.size - 8))) >> np.uint64(at & 7)
    pair, length = decode_one(word, of_length, symbol_slots)
    store32(slots, out, np.uint32(pair))
    return at + length, out + group


@kernel
def decode_four(
    data: Any,
    starts: Any,
    counts: Any,
    places: Any,
    ends: Any,
    bits: int,
    entries: Any,
    of_length: Any,
    symbol_slots: Any,
    group: int,
    slots: Any,
    out: Any,
    targets: Any,
    item: int,
) -> None:
    """Decodes four segments that share a code.

    Args:
        data: uint8, the chunk, at least 8 bytes.
        starts: int64 [4], bit offsets in ``data``.
        counts: int64 [4], slots wanted of each, a multiple of ``group``.
        places: int64 [4], where each segment's slots begin; room for its count and `SLACK` follows.
        ends: int64 [4], set to the bit after each segment.
        bits, entries, of_length, symbol_slots, group: of the code, see `lookup`.
        slots: uint8, filled.
        out: uint8, where the weights are to go, which is fetched on the way; or None.
        targets: int64 [4], for each segment: slot p's weight goes to byte ``targets + item * p`` of ``out``.
        item: bytes a weight.
    """
    last, mask = np.int64(data.size - 8), np.uint64((1 << bits) - 1)
    low6, low8, eight, high = np.uint64(63), np.uint64(255), np.uint64(8), np.uint64(32)
    at0, at1, at2, at3 = starts[0], starts[1], starts[2], starts[3]
    to0, to1, to2, to3 = places[0], places[1], places[2], places[3]
    end0, end1, end2, end3 = to0 + counts[0], to1 + counts[1], to2 + counts[2], to3 + counts[3]
    zero, long = np.uint64(0), np.uint64(LONG)
    while to0 + _ROUND <= end0 and to1 + _ROUND <= end1 and to2 + _ROUND <= end2 and to3 + _ROUND <= end3:
        word0 = load64(data, min(at0 >> 3, last)) >> np.uint64(at0 & 7)
        word1 = load64(data, min(at1 >> 3, last)) >> np.uint64(at1 & 7)
        word2 = load64(data, min(at2 >> 3, last)) >> np.uint64(at2 & 7)
        word3 = load64(data, min(at3 >> 3, last)) >> np.uint64(at3 & 7)
        entry0, entry1, entry2, entry3 = zero, zero, zero, zero
        sum0, sum1, sum2, sum3 = zero, zero, zero, zero
        for _ in range(_LOOKUPS):
            entry0, entry1 = entries[word0 & mask], entries[word1 & mask]
            entry2, entry3 = entries[word2 & mask], entries[word3 & mask]
            store32(slots, to0 + np.int64(sum0 >> eight & low8), np.uint32(entry0 >> high))
            store32(slots, to1 + np.int64(sum1 >> eight & low8), np.uint32(entry1 >> high))
            store32(slots, to2 + np.int64(sum2 >> eight & low8), np.uint32(entry2 >> high))
            store32(slots, to3 + np.int64(sum3 >> eight & low8), np.uint32(entry3 >> high))
            word0 >>= entry0 & low6
            word1 >>= entry1 & low6
            word2 >>= entry2 & low6
            word3 >>= entry3 & low6
            sum0 += entry0
            sum1 += entry1
            sum2 += entry2
            sum3 += entry3
        at0 += np.int64(sum0 & low8)
        at1 += np.int64(sum1 & low8)
        at2 += np.int64(sum2 & low8)
        at3 += np.int64(sum3 & low8)
        to0 += np.int64(sum0 >> eight & low8)
        to1 += np.int64(sum1 >> eight & low8)
        to2 += np.int64(sum2 >> eight & low8)
        to3 += np.int64(sum3 >> eight & low8)
        if out is not None:
            prefetch(out, targets[0] + item * to0)
            prefetch(out, targets[1] + item * to1)
            prefetch(out, targets[2] + item * to2)
            prefetch(out, targets[3] + item * to3)
        # This entry takes nothing and gives nothing: who met it stands before a long codeword ever since.
        if entry0 == long or entry1 == long or entry2 == long or entry3 == long:
            at0, to0 = _long_codeword(data, at0, to0, end0, entry0, of_length, symbol_slots, group, slots)
            at1, to1 = _long_codeword(data, at1, to1, end1, entry1, of_length, symbol_slots, group, slots)
            at2, to2 = _long_codeword(data, at2, to2, end2, entry2, of_length, symbol_slots, group, slots)
            at3, to3 = _long_codeword(data, at3, to3, end3, entry3, of_length, symbol_slots, group, slots)
    # The last slots of each, still side by side; a segment that has all of its own stands still.
    while to0 < end0 or to1 < end1 or to2 < end2 or to3 < end3:
        at0, to0, entry0 = _step(data, at0, to0, end0, entries, mask, slots)
        at1, to1, entry1 = _step(data, at1, to1, end1, entries, mask, slots)
        at2, to2, entry2 = _step(data, at2, to2, end2, entries, mask, slots)
        at3, to3, entry3 = _step(data, at3, to3, end3, entries, mask, slots)
        if entry0 == long or entry1 == long or entry2 == long or entry3 == long:
            at0, to0 = _long_codeword(data, at0, to0, end0, entry0, of_length, symbol_slots, group, slots)
            at1, to1 = _long_codeword(data, at1, to1, end1, entry1, of_length, symbol_slots, group, slots)
            at2, to2 = _long_codeword(data, at2, to2, end2, entry2, of_length, symbol_slots, group, slots)
            at3, to3 = _long_codeword(data, at3, to3, end3, entry3, of_length, symbol_slots, group, slots)
    ends[0], ends[1], ends[2], ends[3] = at0, at1, at2, at3


@kernel
def order_by_code(codes: Any, order: Any, begins: Any) -> None:
    """The segments in the order of their codes, into ``order``; those of code c end before ``begins[c]``."""
    begins[:] = 0
    for s in range(codes.size):
        begins[codes[s] + 1] += 1
    for code in range(MAX_CODES):
        begins[code + 1] += begins[code]
    for s in range(codes.size):
        order[begins[codes[s]]] = s
        begins[codes[s]] += 1


@kernel
def slot_places(counts: Any, places: Any) -> tuple[int, int]:
    """Where the slots of each segment begin, `SLACK` and one for an odd count apart.

    Returns:
        The room needed, and where in it a place lies for one more segment, which is written and never read.
    """
    at, most = np.int64(0), np.int64(0)
    for s in range(counts.size):
        places[s] = at
        at += counts[s] + 1 + SLACK
        most = max(most, counts[s])
    return at + most + 1 + SLACK, at
