"""Decodes a chunk's segments to weights in one call: index, mask, fingerprints, importance, reconstruction.

Rules: a kernel returns False on any problem, or if it does not support the chunk. The output is then
undefined. The caller falls back to the reference, which decodes the chunk or raises the fault.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.codetable import MAX_CODES
from ...coding.planes import Levels
from ...coding.quantisers import F32
from ...container.entry import CHUNK_ALIGNMENT
from ..translation import (
    FINGERPRINTS,
    IMPORTANCE,
    MASK,
    NO_MULTIPLIER,
    NO_SCALE,
    OCTETS,
    OF_FACTORS,
    OF_POSITIONS,
    OF_SURVIVORS,
    STREAMS,
)
from .compiling import Int, kernel
from .index import (
    CODES,
    CONSTANT_OF,
    COUNTS,
    PREFIX_BITS,
    PREFIX_START,
    PRESENT_OF,
    RESIDUAL_BITS,
    RESIDUAL_START,
    ROW_SURVIVORS,
    TRIMS,
    read_index,
    row_of,
)
from .level_decoding import decode_segment
from .lookup import classes_of, prepare
from .mask_decoding import mask_of_levels, mask_of_slots, spread, survivor_places
from .prefix import CHAINS, SLACK
from .recipe import (
    BASE_OF,
    CLASSES_OF,
    COLUMNS,
    CONTIGUOUS,
    GROUP_OF,
    ITEM,
    LENGTHS_OF,
    MASK_KIND,
    MODE,
    MULTIPLIER,
    NUMBER,
    SCALE_BY,
    SCALE_UNIT,
    SEGMENT,
    START_OF,
    STOP_OF,
    STREAMED,
)
from .slots import Segments, Target, decode_codes, place_slots, stored_codes
from .values import (
    ARITHMETIC,
    LOOKED_UP,
    PATTERNS,
    join_residuals,
    looked_up,
    looked_up_by_slot,
    multiply_by_place,
    multiply_by_product,
    patterns_of_levels,
    rounded,
    signed_magnitudes,
    signed_patterns,
)
from .working import Working, carve, working_bytes

# `filled` of all streams: the number of the recipe that the tables belong to, then `lookup`'s flags per
# stream.
FILLED_OF = 1 + MAX_CODES
FILLED = 1 + len(STREAMS) * FILLED_OF


@kernel
def _any(values: NDArray[np.int64]) -> bool:
    """Returns whether any value is not 0."""
    seen: Int = np.int64(0)
    for value in values:
        seen |= value
    return seen != 0


@kernel
def _of_stream(
    stream: Int, shapes: NDArray[np.int64], tables: Bytes, filled: NDArray[np.int64]
) -> tuple[Bytes, NDArray[np.int64]]:
    """Returns a stream's part of ``tables`` and of ``filled``."""
    at = 1 + stream * FILLED_OF
    return tables[shapes[stream, START_OF] : shapes[stream, STOP_OF]], filled[at : at + FILLED_OF]


@kernel
def _prepare_stream(
    stream: Int,
    shapes: NDArray[np.int64],
    lengths: Bytes,
    tables: Bytes,
    filled: NDArray[np.int64],
    class_slots: NDArray[np.int64],
) -> bool:
    """Calls `lookup.prepare` for a stream: fills the tables of its classes, unless they are filled."""
    shape = shapes[stream]
    own, own_filled = _of_stream(stream, shapes, tables, filled)
    return prepare(
        np.uint64(shape[BASE_OF]),
        shape[CLASSES_OF],
        lengths[shape[LENGTHS_OF] :],
        stored_codes(shape),
        shape[GROUP_OF],
        own,
        own_filled,
        class_slots,
    )


@kernel
def _segments_of(index: NDArray[np.int64], stream: Int, first: Int, stop: Int) -> Segments:
    return Segments(
        index[row_of(stream, PREFIX_START), first:stop],
        index[row_of(stream, PREFIX_BITS), first:stop],
        index[row_of(stream, COUNTS), first:stop],
        index[row_of(stream, CODES), first:stop],
        index[row_of(stream, RESIDUAL_START), first:stop],
    )


@kernel
def _decode_slots(
    data: Bytes,
    stream: Int,
    first: Int,
    stop: Int,
    shapes: NDArray[np.int64],
    tables: Bytes,
    filled: NDArray[np.int64],
    working: Working,
    slots: Bytes,
) -> bool:
    """Decodes the slots of a stream over a run of segments to ``working.places[stream]``.

    False on a fault.
    """
    segments = _segments_of(working.segment_index, stream, first, stop)
    places = working.places[stream]
    spare = place_slots(segments.counts, places)
    target = Target(False, 0, np.uint64(0), 0, working.residuals, False, slots)
    own, own_filled = _of_stream(stream, shapes, tables, filled)
    return decode_codes(
        data, segments, target, shapes[stream], own, own_filled, places, spare, working, slots
    )


@kernel
def _decode_and_join(
    data: Bytes,
    first: Int,
    stop: Int,
    whole: NDArray[np.int64],
    shapes: NDArray[np.int64],
    tables: Bytes,
    filled: NDArray[np.int64],
    working: Working,
    out: Bytes,
) -> bool:
    """Decodes the weights of a run without mask and trims. Slots must be consecutive classes of one width.

    Joins slots with residuals segment by segment, while the slots are in the L1 cache.
    """
    segments = _segments_of(working.segment_index, FINGERPRINTS, first, stop)
    own, own_filled = _of_stream(FINGERPRINTS, shapes, tables, filled)
    shape = shapes[FINGERPRINTS]
    target = Target(
        True,
        shape[CONSTANT_OF],
        classes_of(own).first[0],
        whole[SEGMENT] * whole[ITEM],
        working.residuals,
        whole[STREAMED] != 0,
        out,
    )
    places, room = working.chain_places, whole[SEGMENT] + 1 + SLACK
    for k in range(CHAINS):
        places[k] = k * room
    return decode_codes(
        data, segments, target, shape, own, own_filled, places, CHAINS * room, working, working.slots
    )


@kernel
def _levels_of_segment(
    data: Bytes,
    index: NDArray[np.int64],
    stream: Int,
    s: Int,
    shapes: NDArray[np.int64],
    tables: Bytes,
    slots: Bytes,
    place: Int,
    levels: Levels,
) -> bool:
    """Decodes the levels of segment ``s`` of the chunk. False if its residuals do not end where they must."""
    first, extra = classes_of(tables[shapes[stream, START_OF] : shapes[stream, STOP_OF]])
    return decode_segment(
        data,
        index[row_of(stream, RESIDUAL_START), s],
        index[row_of(stream, RESIDUAL_BITS), s],
        index[row_of(stream, COUNTS), s],
        index[row_of(stream, TRIMS), s],
        shapes[stream, CONSTANT_OF],
        first,
        extra,
        slots,
        place,
        levels,
    )


@kernel
def _decode_mask(
    data: Bytes,
    first: Int,
    stop: Int,
    whole: NDArray[np.int64],
    shapes: NDArray[np.int64],
    tables: Bytes,
    filled: NDArray[np.int64],
    working: Working,
) -> bool:
    """Decodes the mask bits of a run into ``working.bits``, ``segment / 8`` bytes per segment."""
    slots, index, bits, segment = working.slots, working.segment_index, working.bits, whole[SEGMENT]
    if not _decode_slots(data, MASK, first, stop, shapes, tables, filled, working, slots):
        return False
    places = working.places[MASK]
    octets_alone = whole[MASK_KIND] == OCTETS and shapes[MASK, CONSTANT_OF] == 0
    first_levels = classes_of(_of_stream(MASK, shapes, tables, filled)[0]).first
    bits[:] = 0
    for s in range(first, stop):
        count, survivors = index[row_of(MASK, COUNTS), s], index[ROW_SURVIVORS, s]
        place, at, positions = places[s - first], (s - first) * (segment >> 3), working.positions[s]
        if octets_alone:
            if not mask_of_slots(first_levels, slots, place, count, positions, survivors, bits, at):
                return False
            continue
        levels = working.levels
        if not _levels_of_segment(data, index, MASK, s, shapes, tables, slots, place, levels):
            return False
        if not mask_of_levels(whole[MASK_KIND], levels, count, positions, survivors, bits, at):
            return False
    return True


@kernel
def _multiply(
    data: Bytes,
    s: Int,
    start: Int,
    whole: NDArray[np.int64],
    shapes: NDArray[np.int64],
    tables: Bytes,
    place: Int,
    scale: F32,
    importances: F32,
    rows: F32,
    across: F32,
    working: Working,
    count: Int,
) -> bool:
    """Multiplies the numbers of segment ``s`` by their scale factors and importances (R-REC-001).

    Args:
        start: the segment's first position in the tensor.
        place: index of the first slot of its importances.
        scale, importances, rows, across: same as for `decode_values`.
        count: number of values in ``working.numbers``; ``working.inside`` holds their positions in the
            segment.
    """
    multiplier, numbers, inside = whole[MULTIPLIER], working.numbers, working.inside
    if whole[SCALE_BY] != NO_SCALE:
        multiply_by_place(numbers, count, inside, start, whole[SCALE_UNIT], whole[SCALE_BY], scale)
    if multiplier == OF_FACTORS:
        multiply_by_product(numbers, count, inside, start, whole[COLUMNS], rows, across)
    elif multiplier != NO_MULTIPLIER:
        index, slots, levels = working.segment_index, working.importance_slots, working.levels
        if not _levels_of_segment(data, index, IMPORTANCE, s, shapes, tables, slots, place, levels):
            return False
        for i in range(count):
            at = inside[i] if multiplier == OF_POSITIONS else i
            numbers[i] = numbers[i] * importances[levels[at]]
    return True


@kernel
def decode_raw(data: Bytes, total: Int, first: Int, whole: NDArray[np.int64], out: Bytes) -> bool:
    """Copies the elements of a run of segments of a raw chunk. Checks size and padding of the chunk.

    Args:
        data: uint8, the whole chunk; its checksum has been verified.
        total: number of positions of the chunk.
        first: the run's first segment.
        out: uint8, exactly as many bytes as the run's elements.
    """
    size, start = total * whole[ITEM], first * whole[SEGMENT] * whole[ITEM]
    if data.size != (size + CHUNK_ALIGNMENT - 1) // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT:
        return False
    for i in range(size, data.size):
        if data[i]:
            return False
    for i in range(out.size):
        out[i] = data[start + i]
    return True


@kernel
def decode_values(
    data: Bytes,
    total: Int,
    start: Int,
    first: Int,
    stop: Int,
    whole: NDArray[np.int64],
    shapes: NDArray[np.int64],
    lengths: Bytes,
    tables: Bytes,
    filled: NDArray[np.int64],
    memory: Bytes,
    patterns: NDArray[np.uint32],
    numbers_of: F32,
    scale: F32,
    importances: F32,
    rows: F32,
    across: F32,
    out: Bytes,
) -> bool:
    """Decodes the weights of all positions of a run of segments. False on any problem.

    Args:
        data: uint8, the whole chunk, at least 64 bytes; its checksum has been verified.
        total: number of positions of the chunk.
        start: position in the tensor of the chunk's first position.
        first, stop: the run's first segment, and one past its last.
        whole, shapes, lengths, patterns, numbers_of, scale, importances, rows, across: arrays of
            `recipe.Recipe`.
        tables: uint8, memory for the tables of all streams (`lookup`).
        filled: int64 [FILLED], the recipe of the tables, and flags of the filled ones.
        memory: uint8, for `working.carve`.
        out: uint8, exactly as many bytes as the run's weights.
    """
    segment, item, mode = whole[SEGMENT], whole[ITEM], whole[MODE]
    segments = (total + segment - 1) // segment
    if working_bytes(segments, stop - first, segment) > memory.size:
        return False
    working = carve(memory, segments, stop - first, segment)
    positions, index = working.positions, working.segment_index
    positions[:] = segment
    positions[segments - 1] -= segments * segment - total
    if not read_index(data, shapes, positions, index):
        return False
    masked = shapes[MASK, PRESENT_OF] != 0
    streamed = whole[MULTIPLIER] == OF_SURVIVORS or whole[MULTIPLIER] == OF_POSITIONS
    if filled[0] != whole[NUMBER]:
        filled[:] = 0
        filled[0] = whole[NUMBER]
    for stream, needed in ((MASK, masked), (FINGERPRINTS, True), (IMPORTANCE, streamed)):
        if needed and not _prepare_stream(stream, shapes, lengths, tables, filled, working.class_slots):
            return False
    if masked and not _decode_mask(data, first, stop, whole, shapes, tables, filled, working):
        return False
    joined = whole[CONTIGUOUS] != 0 and not _any(index[row_of(FINGERPRINTS, TRIMS), first:stop])
    if joined and not masked:
        return _decode_and_join(data, first, stop, whole, shapes, tables, filled, working, out)
    if streamed and not _decode_slots(
        data, IMPORTANCE, first, stop, shapes, tables, filled, working, working.importance_slots
    ):
        return False
    slots, places = working.slots, working.places[FINGERPRINTS]
    if not _decode_slots(data, FINGERPRINTS, first, stop, shapes, tables, filled, working, slots):
        return False
    own = _of_stream(FINGERPRINTS, shapes, tables, filled)[0]
    bits, levels, by_slot = working.bits, working.levels, working.by_slot
    signs_alone = mode == LOOKED_UP and shapes[FINGERPRINTS, CONSTANT_OF] == 1
    if signs_alone:
        signed_patterns(patterns, classes_of(own).first, by_slot)
    if mode == ARITHMETIC and not masked:
        for i in range(segment):
            working.inside[i] = i
    for s in range(first, stop):
        count, place = index[row_of(FINGERPRINTS, COUNTS), s], places[s - first]
        to, bit = (s - first) * segment * item, (s - first) * (segment >> 3)
        target, at = out, to
        if masked:
            target, at = working.survivors, 0
        if signs_alone:
            signs = index[row_of(FINGERPRINTS, RESIDUAL_START), s]
            looked_up_by_slot(data, signs, count, by_slot, item, slots, place, target, at)
        elif joined:
            join_residuals(
                data,
                index[row_of(FINGERPRINTS, RESIDUAL_START), s],
                count,
                shapes[FINGERPRINTS, CONSTANT_OF],
                classes_of(own).first[0],
                slots,
                place,
                working.residuals,
                False,
                target,
                at,
            )
        elif not _levels_of_segment(data, index, FINGERPRINTS, s, shapes, tables, slots, place, levels):
            return False
        elif mode == PATTERNS:
            patterns_of_levels(levels, count, item, target, at)
        elif mode == LOOKED_UP:
            looked_up(levels, count, patterns, item, target, at)
        else:
            signed_magnitudes(levels, count, numbers_of, working.numbers)
            if masked:
                survivor_places(bits, bit, positions[s], working.inside)
            if not _multiply(
                data,
                s,
                start + s * segment,
                whole,
                shapes,
                tables,
                working.places[IMPORTANCE, s - first],
                scale,
                importances,
                rows,
                across,
                working,
                count,
            ):
                return False
            rounded(working.numbers, count, item, target, at)
        if masked:
            spread(bits, bit, positions[s], target, item, out, to)
    return True
