"""A chunk's segments to weights in one compiled call: index, mask, fingerprints, importance, reconstruction.

Rules: False means that something is wrong, or not for this kernel; nothing is said about what, and what was
written so far means nothing. The caller then goes the plain way, which judges.
"""

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
    PRESENT_OF,
    RESIDUAL_BITS,
    RESIDUAL_START,
    ROW_SURVIVORS,
    ROWS,
    TRIMS,
    read_index,
    row_of,
)
from .levels import decode_segment
from .lookup import entries_of, extras, firsts, of_length_of, symbol_slots_of
from .masks import mask_of_levels, spread, survivor_places
from .prefix import CHAINS, SLACK, decode_four, order_by_code, slot_places
from .recipe import (
    BITS_OF,
    COLUMNS,
    CONTIGUOUS,
    FINGERPRINTS,
    GROUP_OF,
    IMPORTANCE,
    ITEM,
    MASK,
    MASK_KIND,
    MODE,
    MULTIPLIER,
    SCALE_BY,
    SCALE_UNIT,
    SEGMENT,
    START_OF,
    STOP_OF,
)
from .values import (
    ARITHMETIC,
    FACTORS,
    LOOKED_UP,
    NO_MULTIPLIER,
    NOTHING,
    OF_POSITIONS,
    OF_SURVIVORS,
    PATTERNS,
    join_whole_bytes,
    looked_up,
    multiply_by_place,
    multiply_by_product,
    patterns_of_levels,
    rounded,
    signed_magnitudes,
)


@kernel
def decode_slots(
    data: Any, starts: Any, sizes: Any, counts: Any, codes: Any, shape: Any, tables: Any, places: Any
) -> tuple[bool, Any]:
    """The slots of some segments of a stream; False where one does not end where it must (R-PLN-003).

    Args:
        data: uint8, the chunk, at least 8 bytes.
        starts, sizes: int64 [n], bit offset in ``data`` and bits of each segment in the prefix plane.
        counts, codes: int64 [n], levels and code of each.
        shape: int64, the stream's row of the recipe.
        tables: uint8, the stream's, see `lookup`.
        places: int64 [n], set to where each segment's slots begin.

    Returns:
        Whether all is well, and the slots.
    """
    room = slot_places(counts, places)
    all_codes, bits, group = shape[CODES_OF], shape[BITS_OF], shape[GROUP_OF]
    if all_codes == 0:
        return True, np.zeros(room, np.uint8)
    slots = np.empty(room, np.uint8)
    order, begins = np.empty(counts.size, np.int64), np.empty(MAX_CODES + 1, np.int64)
    order_by_code(codes, order, begins)
    four = np.empty((4, CHAINS), np.int64)
    spare = room - slots_room(counts)
    done = 0
    for code in range(all_codes):
        entries = entries_of(tables, all_codes, bits, code)
        of_length, symbol_slots = of_length_of(tables, code), symbol_slots_of(tables, all_codes, code)
        while done < begins[code]:
            for k in range(CHAINS):
                # Where a code's last group is not full, a segment is decoded again, to where nobody looks.
                s = order[min(done + k, begins[code] - 1)]
                four[0, k], four[1, k] = starts[s], counts[s] + (counts[s] & (group - 1))
                four[2, k] = places[s] if done + k < begins[code] else spare
            decode_four(
                data, four[0], four[1], four[2], four[3], bits, entries, of_length, symbol_slots, group, slots
            )
            for k in range(CHAINS):
                s = order[min(done + k, begins[code] - 1)]
                if four[3, k] != starts[s] + sizes[s]:
                    return False, slots
            done += CHAINS
        done = begins[code]
    if group == 2:
        for s in range(counts.size):
            if counts[s] & 1 and slots[places[s] + counts[s]]:  # R-PLN-002; class 0 has slot 0
                return False, slots
    return True, slots


@kernel
def slots_room(counts: Any) -> int:
    """Room of the place that `slot_places` keeps at the end."""
    most = np.int64(0)
    for s in range(counts.size):
        most = max(most, counts[s])
    return most + 1 + SLACK


@kernel
def _slots_of_stream(
    data: Any, index: Any, stream: int, first: int, stop: int, shapes: Any, tables: Any, places: Any
) -> tuple[bool, Any]:
    """The slots of a stream over a run of segments, and where each segment's begin; whether all is well."""
    return decode_slots(
        data,
        index[row_of(stream, PREFIX_START), first:stop],
        index[row_of(stream, PREFIX_BITS), first:stop],
        index[row_of(stream, COUNTS), first:stop],
        index[row_of(stream, CODES), first:stop],
        shapes[stream],
        tables,
        places,
    )


@kernel
def _levels_of_segment(
    data: Any, index: Any, stream: int, s: int, shapes: Any, tables: Any, slots: Any, place: int, levels: Any
) -> bool:
    """The levels of segment ``s``."""
    return decode_segment(
        data,
        index[row_of(stream, RESIDUAL_START), s],
        index[row_of(stream, RESIDUAL_BITS), s],
        index[row_of(stream, COUNTS), s],
        index[row_of(stream, TRIMS), s],
        shapes[stream, CONSTANT_OF],
        firsts(tables),
        extras(tables),
        slots,
        place,
        levels,
    )


@kernel
def _decode_mask(
    data: Any,
    index: Any,
    positions: Any,
    first: int,
    stop: int,
    whole: Any,
    shapes: Any,
    tables: Any,
    bits: Any,
) -> bool:
    """The mask bits of a run, ``segment / 8`` bytes a segment."""
    places, segment = np.empty(stop - first, np.int64), whole[SEGMENT]
    good, slots = _slots_of_stream(data, index, MASK, first, stop, shapes, tables, places)
    if not good:
        return False
    levels = np.empty(segment, np.uint64)
    for s in range(first, stop):
        if not _levels_of_segment(data, index, MASK, s, shapes, tables, slots, places[s - first], levels):
            return False
        if not mask_of_levels(
            whole[MASK_KIND],
            levels,
            index[row_of(MASK, COUNTS), s],
            positions[s],
            index[ROW_SURVIVORS, s],
            bits,
            (s - first) * (segment >> 3),
        ):
            return False
    return True


@kernel
def _join_segments(
    data: Any,
    index: Any,
    first: int,
    stop: int,
    whole: Any,
    shapes: Any,
    tables: Any,
    slots: Any,
    places: Any,
    out: Any,
) -> None:
    """The weights of a run without mask and trims whose residuals are whole bytes.

    Apart from decoding the slots on purpose: weights go to memory that is not in a cache yet, and stores that
    wait for it hold up those of the slots (measured 1.3 times as slow, four segments at a time).
    """
    size, base = whole[SEGMENT] * whole[ITEM], firsts(tables)[0]
    for s in range(first, stop):
        join_whole_bytes(
            data,
            index[row_of(FINGERPRINTS, RESIDUAL_START), s] >> 3,
            index[row_of(FINGERPRINTS, COUNTS), s],
            shapes[FINGERPRINTS, CONSTANT_OF],
            base,
            slots,
            places[s - first],
            out,
            (s - first) * size,
        )


@kernel
def _multiply(
    data: Any,
    index: Any,
    s: int,
    start: int,
    whole: Any,
    shapes: Any,
    tables: Any,
    slots: Any,
    place: int,
    scale: Any,
    importances: Any,
    rows: Any,
    across: Any,
    levels: Any,
    places: Any,
    count: int,
    numbers: Any,
) -> bool:
    """Multiplies the numbers of segment ``s`` by their scale factors and importances (R-REC-001).

    Args:
        start: the segment's first position in the tensor.
        tables, slots, place: of the importance stream.
        scale, importances, rows, across: as in `decode_values`.
        levels: uint64, free for use.
        places: int64, the position of each number in the segment.
        count: how many numbers.
        numbers: float32, changed in place.
    """
    multiplier = whole[MULTIPLIER]
    if whole[SCALE_BY] != NOTHING:
        multiply_by_place(numbers, count, places, start, whole[SCALE_UNIT], whole[SCALE_BY], scale)
    if multiplier == FACTORS:
        multiply_by_product(numbers, count, places, start, whole[COLUMNS], rows, across)
    elif multiplier != NO_MULTIPLIER:
        if not _levels_of_segment(data, index, IMPORTANCE, s, shapes, tables, slots, place, levels):
            return False
        for i in range(count):
            at = places[i] if multiplier == OF_POSITIONS else i
            numbers[i] = numbers[i] * importances[levels[at]]
    return True


@kernel
def decode_values(
    data: Any,
    total: int,
    start: int,
    first: int,
    stop: int,
    whole: Any,
    shapes: Any,
    tables: Any,
    patterns: Any,
    numbers_of: Any,
    scale: Any,
    importances: Any,
    rows: Any,
    across: Any,
    out: Any,
) -> bool:
    """The weights of all positions of a run of segments.

    Args:
        data: uint8, the whole chunk, its checksum compared; at least 64 bytes.
        total: positions of the chunk.
        start: position in the tensor of the chunk's first.
        first, stop: the run.
        whole, shapes, tables, patterns, numbers_of, scale, importances, rows, across: of `recipe.Recipe`.
        out: uint8, exactly the bytes of the run's weights.
    """
    segment, item, mode = whole[SEGMENT], whole[ITEM], whole[MODE]
    segments = (total + segment - 1) // segment
    positions = np.full(segments, segment)
    positions[segments - 1] -= segments * segment - total
    index = np.empty((ROWS, segments), np.int64)
    if not read_index(data, shapes, positions, index):
        return False
    masked = shapes[MASK, PRESENT_OF] != 0
    own = tables[shapes[FINGERPRINTS, START_OF] : shapes[FINGERPRINTS, STOP_OF]]
    bits = np.zeros((stop - first) * (segment >> 3) if masked else 0, np.uint8)
    if masked:
        of_mask = tables[shapes[MASK, START_OF] : shapes[MASK, STOP_OF]]
        if not _decode_mask(data, index, positions, first, stop, whole, shapes, of_mask, bits):
            return False
    places = np.empty(stop - first, np.int64)
    good, slots = _slots_of_stream(data, index, FINGERPRINTS, first, stop, shapes, own, places)
    if not good:
        return False
    if whole[CONTIGUOUS] and not masked and not index[row_of(FINGERPRINTS, TRIMS), first:stop].any():
        _join_segments(data, index, first, stop, whole, shapes, own, slots, places, out)
        return True
    streamed = whole[MULTIPLIER] == OF_SURVIVORS or whole[MULTIPLIER] == OF_POSITIONS
    of_importance = tables[shapes[IMPORTANCE, START_OF] : shapes[IMPORTANCE, STOP_OF]]
    importance_places, importance_slots = np.zeros(stop - first, np.int64), slots
    if streamed:
        good, importance_slots = _slots_of_stream(
            data, index, IMPORTANCE, first, stop, shapes, of_importance, importance_places
        )
        if not good:
            return False
    levels = np.empty(segment, np.uint64)
    inside = np.arange(segment if mode == ARITHMETIC else 0)
    numbers = np.empty(segment if mode == ARITHMETIC else 0, np.float32)
    survivors = np.empty(segment * item if masked else 0, np.uint8)
    for s in range(first, stop):
        count, place, to = (
            index[row_of(FINGERPRINTS, COUNTS), s],
            places[s - first],
            (s - first) * segment * item,
        )
        target, at, bit = out, to, (s - first) * (segment >> 3)
        if masked:
            target, at = survivors, 0
        if not _levels_of_segment(data, index, FINGERPRINTS, s, shapes, own, slots, place, levels):
            return False
        if mode == PATTERNS:
            patterns_of_levels(levels, count, item, target, at)
        elif mode == LOOKED_UP:
            looked_up(levels, count, patterns, item, target, at)
        else:
            signed_magnitudes(levels, count, numbers_of, numbers)
            if masked:
                survivor_places(bits, bit, positions[s], inside)
            if not _multiply(
                data,
                index,
                s,
                start + s * segment,
                whole,
                shapes,
                of_importance,
                importance_slots,
                importance_places[s - first],
                scale,
                importances,
                rows,
                across,
                levels,
                inside,
                count,
                numbers,
            ):
                return False
            rounded(numbers, count, item, target, at)
        if masked:
            spread(bits, bit, positions[s], survivors, item, out, to)
    return True


@kernel
def decode_levels(
    data: Any,
    prefix_start: int,
    prefix_bits: Any,
    residual_start: int,
    residual_bits: Any,
    counts: Any,
    codes: Any,
    trims: Any,
    shape: Any,
    tables: Any,
    levels: Any,
) -> bool:
    """The levels of a run of segments, one segment's after another's.

    Args:
        data: uint8, the chunk, at least 8 bytes. Where all classes have one width, the residuals were checked
            to lie 8 bytes inside.
        prefix_start, residual_start: bit offsets of the run in the two planes.
        prefix_bits, residual_bits, counts, codes, trims: int64 [n], of each segment.
        shape, tables: the stream's, as in `decode_slots`.
        levels: uint64, as many as all counts.
    """
    n = counts.size
    places, starts = np.empty(n, np.int64), np.empty(n, np.int64)
    at = prefix_start
    for s in range(n):
        starts[s] = at
        at += prefix_bits[s]
    good, slots = decode_slots(data, starts, prefix_bits, counts, codes, shape, tables, places)
    if not good:
        return False
    at, done = residual_start, np.int64(0)
    for s in range(n):
        if not decode_segment(
            data,
            at,
            residual_bits[s],
            counts[s],
            trims[s],
            shape[CONSTANT_OF],
            firsts(tables),
            extras(tables),
            slots,
            places[s],
            levels[done : done + counts[s]],
        ):
            return False
        at += residual_bits[s]
        done += counts[s]
    return True
