"""A stream's prefix planes to slots: the segments of a run in fours that share a code (see `prefix`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...coding.codetable import MAX_CODES
from .compiling import kernel
from .index import (
    CODES,
    CODES_OF,
    CONSTANT_OF,
    COUNTS,
    PREFIX_BITS,
    PREFIX_START,
    RESIDUAL_START,
    row_of,
)
from .lookup import entries_of_code, firsts, of_length_of, symbol_slots_of
from .prefix import CHAINS, SLACK, decode_four, order_by_code, slot_places
from .recipe import BITS_OF, FINGERPRINTS, GROUP_OF, ITEM, SEGMENT
from .values import join_whole_bytes

# Rows of `four`, what `decode_four` takes: see there.
_STARTS, _COUNTS, _PLACES, _TARGETS, _ENDS, _SEGMENTS = range(6)


@kernel
def _choose_four(order: Any, at: int, stop: int, starts: Any, counts: Any, group: int, four: Any) -> None:
    """Fills starts, counts and segments of the four from ``at`` on; where fewer are left, the last again."""
    for k in range(CHAINS):
        s = order[min(at + k, stop - 1)]
        four[_SEGMENTS, k], four[_STARTS, k] = s, starts[s]
        four[_COUNTS, k] = counts[s] + (counts[s] & (group - 1))


@kernel
def _end_well(starts: Any, sizes: Any, counts: Any, group: int, slots: Any, four: Any) -> bool:
    """Whether four segments end where they must (R-PLN-003), and odd ones with class 0 (R-PLN-002)."""
    for k in range(CHAINS):
        s = four[_SEGMENTS, k]
        if four[_ENDS, k] != starts[s] + sizes[s]:
            return False
        if group == 2 and counts[s] & 1 and slots[four[_PLACES, k] + counts[s]]:  # class 0 has slot 0
            return False
    return True


@kernel
def decode_slots(
    data: Any,
    starts: Any,
    sizes: Any,
    counts: Any,
    codes: Any,
    shape: Any,
    tables: Any,
    filled: Any,
    places: Any,
) -> tuple[bool, Any]:
    """The slots of some segments of a stream; False where one does not end as it must.

    Args:
        data: uint8, the chunk, at least 8 bytes.
        starts, sizes: int64 [n], bit offset in ``data`` and bits of each segment in the prefix plane.
        counts, codes: int64 [n], levels and code of each.
        shape: int64, the stream's row of the recipe.
        tables, filled: the stream's, see `lookup`.
        places: int64 [n], set to where each segment's slots begin.

    Returns:
        Whether all is well, and the slots.
    """
    room, spare = slot_places(counts, places)
    all_codes, bits, group = shape[CODES_OF], shape[BITS_OF], shape[GROUP_OF]
    if all_codes == 0:
        return True, np.zeros(room, np.uint8)
    slots = np.empty(room, np.uint8)
    order, begins = np.empty(counts.size, np.int64), np.empty(MAX_CODES + 1, np.int64)
    order_by_code(codes, order, begins)
    four = np.empty((6, CHAINS), np.int64)
    at = 0
    for code in range(all_codes):
        if at == begins[code]:
            continue
        entries = entries_of_code(tables, all_codes, bits, code, group, filled)
        of_length, symbol_slots = of_length_of(tables, code), symbol_slots_of(tables, all_codes, code)
        while at < begins[code]:
            _choose_four(order, at, begins[code], starts, counts, group, four)
            for k in range(CHAINS):
                four[_PLACES, k] = places[four[_SEGMENTS, k]] if at + k < begins[code] else spare
            decode_four(
                data,
                four[_STARTS],
                four[_COUNTS],
                four[_PLACES],
                four[_ENDS],
                bits,
                entries,
                of_length,
                symbol_slots,
                group,
                slots,
                None,
                four[_TARGETS],
                0,
            )
            if not _end_well(starts, sizes, counts, group, slots, four):
                return False, slots
            at += CHAINS
        at = begins[code]
    return True, slots


@kernel
def decode_and_join(
    data: Any, index: Any, first: int, stop: int, whole: Any, shapes: Any, tables: Any, filled: Any, out: Any
) -> bool:
    """The weights of a run without mask and trims whose residuals are whole bytes.

    Slots are joined with residuals four segments at a time, while they are in the nearest cache. The weights
    go to memory that is in no cache yet, and stores that wait for it would hold up the look-ups of the next
    four; so that memory is fetched while the slots are decoded (measured 1.3 times as fast).
    """
    shape = shapes[FINGERPRINTS]
    starts = index[row_of(FINGERPRINTS, PREFIX_START), first:stop]
    sizes = index[row_of(FINGERPRINTS, PREFIX_BITS), first:stop]
    counts = index[row_of(FINGERPRINTS, COUNTS), first:stop]
    codes = index[row_of(FINGERPRINTS, CODES), first:stop]
    residuals = index[row_of(FINGERPRINTS, RESIDUAL_START), first:stop]
    all_codes, bits, group, constant = shape[CODES_OF], shape[BITS_OF], shape[GROUP_OF], shape[CONSTANT_OF]
    order, begins = np.empty(stop - first, np.int64), np.empty(MAX_CODES + 1, np.int64)
    order_by_code(codes, order, begins)
    room, item = whole[SEGMENT] + 1 + SLACK, whole[ITEM]
    slots, base = np.empty(CHAINS * room, np.uint8), firsts(tables)[0]
    four = np.empty((6, CHAINS), np.int64)
    at = 0
    for code in range(all_codes):
        if at == begins[code]:
            continue
        entries = entries_of_code(tables, all_codes, bits, code, group, filled)
        of_length, symbol_slots = of_length_of(tables, code), symbol_slots_of(tables, all_codes, code)
        while at < begins[code]:
            _choose_four(order, at, begins[code], starts, counts, group, four)
            for k in range(CHAINS):
                four[_PLACES, k] = k * room
                four[_TARGETS, k] = item * (four[_SEGMENTS, k] * whole[SEGMENT] - k * room)
            decode_four(
                data,
                four[_STARTS],
                four[_COUNTS],
                four[_PLACES],
                four[_ENDS],
                bits,
                entries,
                of_length,
                symbol_slots,
                group,
                slots,
                out,
                four[_TARGETS],
                item,
            )
            if not _end_well(starts, sizes, counts, group, slots, four):
                return False
            for k in range(min(CHAINS, begins[code] - at)):
                s = four[_SEGMENTS, k]
                to = s * whole[SEGMENT] * item
                join_whole_bytes(data, residuals[s] >> 3, counts[s], constant, base, slots, k * room, out, to)
            at += CHAINS
        at = begins[code]
    return True
