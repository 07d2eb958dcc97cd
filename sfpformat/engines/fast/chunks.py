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
    STREAMS,
    TRIMS,
    read_index,
    row_of,
)
from .levels import decode_segment
from .lookup import extras, firsts, prepare
from .masks import OCTETS, mask_of_levels, mask_of_slots, spread, survivor_places
from .recipe import (
    BASE_OF,
    CLASSES_OF,
    COLUMNS,
    CONTIGUOUS,
    FINGERPRINTS,
    GROUP_OF,
    IMPORTANCE,
    ITEM,
    LENGTHS_OF,
    MASK,
    MASK_KIND,
    MODE,
    MULTIPLIER,
    NUMBER,
    SCALE_BY,
    SCALE_UNIT,
    SEGMENT,
    START_OF,
    STOP_OF,
)
from .slots import decode_and_join, decode_slots
from .values import (
    ARITHMETIC,
    FACTORS,
    LOOKED_UP,
    NO_MULTIPLIER,
    NOTHING,
    OF_POSITIONS,
    OF_SURVIVORS,
    PATTERNS,
    looked_up,
    looked_up_by_slot,
    multiply_by_place,
    multiply_by_product,
    patterns_of_levels,
    rounded,
    signed_magnitudes,
    signed_patterns,
)
from .vectors import BY_SLOT

# `filled` of all streams: the number of the recipe that it is about, then each stream's of `lookup`.
_FILLED_OF = 1 + MAX_CODES
FILLED = 1 + len(STREAMS) * _FILLED_OF


@kernel
def _filled_of(filled: Any, stream: int) -> Any:
    at = 1 + stream * _FILLED_OF
    return filled[at : at + _FILLED_OF]


@kernel
def _prepare_stream(stream: int, shapes: Any, lengths: Any, tables: Any, filled: Any) -> bool:
    """Has the tables of a stream's classes made, if they are not there."""
    shape = shapes[stream]
    return prepare(
        np.uint64(shape[BASE_OF]),
        shape[CLASSES_OF],
        lengths[shape[LENGTHS_OF] :],
        shape[CODES_OF],
        shape[GROUP_OF],
        tables[shape[START_OF] : shape[STOP_OF]],
        _filled_of(filled, stream),
    )


@kernel
def _slots_of_stream(
    data: Any,
    index: Any,
    stream: int,
    first: int,
    stop: int,
    shapes: Any,
    tables: Any,
    filled: Any,
    places: Any,
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
        _filled_of(filled, stream),
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
    filled: Any,
    bits: Any,
) -> bool:
    """The mask bits of a run, ``segment / 8`` bytes a segment."""
    places, segment = np.empty(stop - first, np.int64), whole[SEGMENT]
    good, slots = _slots_of_stream(data, index, MASK, first, stop, shapes, tables, filled, places)
    if not good:
        return False
    octets_alone = whole[MASK_KIND] == OCTETS and shapes[MASK, CONSTANT_OF] == 0
    levels = np.empty(0 if octets_alone else segment, np.uint64)
    for s in range(first, stop):
        if octets_alone:
            if not mask_of_slots(
                firsts(tables),
                slots,
                places[s - first],
                index[row_of(MASK, COUNTS), s],
                positions[s],
                index[ROW_SURVIVORS, s],
                bits,
                (s - first) * (segment >> 3),
            ):
                return False
            continue
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
    lengths: Any,
    tables: Any,
    filled: Any,
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
        whole, shapes, lengths, patterns, numbers_of, scale, importances, rows, across: of `recipe.Recipe`.
        tables: uint8, room for the tables of all streams, see `lookup`.
        filled: int64 [FILLED], which of them are there, and of which recipe.
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
    streamed = whole[MULTIPLIER] == OF_SURVIVORS or whole[MULTIPLIER] == OF_POSITIONS
    if filled[0] != whole[NUMBER]:
        filled[:] = 0
        filled[0] = whole[NUMBER]
    for stream, needed in ((MASK, masked), (FINGERPRINTS, True), (IMPORTANCE, streamed)):
        if needed and not _prepare_stream(stream, shapes, lengths, tables, filled):
            return False
    own = tables[shapes[FINGERPRINTS, START_OF] : shapes[FINGERPRINTS, STOP_OF]]
    bits = np.zeros((stop - first) * (segment >> 3) if masked else 0, np.uint8)
    if masked:
        of_mask = tables[shapes[MASK, START_OF] : shapes[MASK, STOP_OF]]
        if not _decode_mask(data, index, positions, first, stop, whole, shapes, of_mask, filled, bits):
            return False
    if whole[CONTIGUOUS] and not masked and not index[row_of(FINGERPRINTS, TRIMS), first:stop].any():
        own_filled = _filled_of(filled, FINGERPRINTS)
        return decode_and_join(data, index, first, stop, whole, shapes, own, own_filled, out)
    places = np.empty(stop - first, np.int64)
    good, slots = _slots_of_stream(data, index, FINGERPRINTS, first, stop, shapes, own, filled, places)
    if not good:
        return False
    of_importance = tables[shapes[IMPORTANCE, START_OF] : shapes[IMPORTANCE, STOP_OF]]
    importance_places, importance_slots = np.zeros(stop - first, np.int64), slots
    if streamed:
        good, importance_slots = _slots_of_stream(
            data, index, IMPORTANCE, first, stop, shapes, of_importance, filled, importance_places
        )
        if not good:
            return False
    levels = np.empty(segment, np.uint64)
    inside = np.arange(segment if mode == ARITHMETIC else 0)
    numbers = np.empty(segment if mode == ARITHMETIC else 0, np.float32)
    survivors = np.empty(segment * item if masked else 0, np.uint8)
    signs_alone = mode == LOOKED_UP and shapes[FINGERPRINTS, CONSTANT_OF] == 1
    by_slot = np.empty(BY_SLOT if signs_alone else 0, np.uint32)
    if signs_alone:
        signed_patterns(patterns, firsts(own), by_slot)
    for s in range(first, stop):
        count, place, to = (
            index[row_of(FINGERPRINTS, COUNTS), s],
            places[s - first],
            (s - first) * segment * item,
        )
        target, at, bit = out, to, (s - first) * (segment >> 3)
        if masked:
            target, at = survivors, 0
        if signs_alone:
            signs = index[row_of(FINGERPRINTS, RESIDUAL_START), s]
            looked_up_by_slot(data, signs, count, by_slot, item, slots, place, target, at)
        elif not _levels_of_segment(data, index, FINGERPRINTS, s, shapes, own, slots, place, levels):
            return False
        elif mode == PATTERNS:
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
    lengths: Any,
    levels: Any,
) -> bool:
    """The levels of a run of segments, one segment's after another's.

    Args:
        data: uint8, the chunk, at least 8 bytes. Where all classes have one width, the residuals were checked
            to lie 8 bytes inside.
        prefix_start, residual_start: bit offsets of the run in the two planes.
        prefix_bits, residual_bits, counts, codes, trims: int64 [n], of each segment.
        shape: int64, of `recipe.stream_shape`.
        lengths: uint8, of `lookup.lengths_of`.
        levels: uint64, as many as all counts.
    """
    n = counts.size
    tables, filled = np.empty(shape[STOP_OF], np.uint8), np.zeros(_FILLED_OF, np.int64)
    base = np.uint64(shape[BASE_OF])
    if not prepare(base, shape[CLASSES_OF], lengths, shape[CODES_OF], shape[GROUP_OF], tables, filled):
        return False
    places, starts = np.empty(n, np.int64), np.empty(n, np.int64)
    at = prefix_start
    for s in range(n):
        starts[s] = at
        at += prefix_bits[s]
    good, slots = decode_slots(data, starts, prefix_bits, counts, codes, shape, tables, filled, places)
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
