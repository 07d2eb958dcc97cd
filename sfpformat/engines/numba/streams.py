"""Decodes the levels of one stream, for callers that need levels and not weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.planes import Counts, Levels
from .compiling import Int, kernel
from .index import CONSTANT_OF
from .level_decoding import decode_segment
from .lookup import classes_of, prepare
from .recipe import BASE_OF, CLASSES_OF, GROUP_OF
from .slots import Segments, Target, decode_codes, place_slots, stored_codes
from .working import carve


@kernel
def decode_levels(
    data: Bytes,
    prefix_start: Int,
    prefix_bits: Counts,
    residual_start: Int,
    residual_bits: Counts,
    counts: Counts,
    codes: Counts,
    trims: Counts,
    shape: Counts,
    lengths: Bytes,
    tables: Bytes,
    filled: NDArray[np.int64],
    bits_before: NDArray[np.int64],
    most: Int,
    memory: Bytes,
    levels: Levels,
) -> bool:
    """Decodes the levels of a run of segments, segment by segment. False on any problem.

    Args:
        data: uint8, the chunk, at least 8 bytes. If all classes have one width, the residuals must end 8
            bytes before its end.
        prefix_start, residual_start: bit offsets of the run in the two planes.
        prefix_bits, residual_bits, counts, codes, trims: int64 [n], of each segment.
        shape: int64, from `recipe.stream_shape`.
        lengths: uint8, from `lookup.lengths_of`.
        tables: uint8, ``shape[STOP_OF]`` bytes; ``filled``: int64 [FILLED_OF], zeros.
        bits_before: int64 [2, n], scratch memory.
        most: the greatest count; ``memory``: uint8, for `working.carve` of n segments of that size.
        levels: uint64, as many elements as the sum of all counts; filled.
    """
    n = counts.size
    working = carve(memory, n, n, most)
    base = np.uint64(shape[BASE_OF])
    codes_of_stream, group, slots_of_classes = stored_codes(shape), shape[GROUP_OF], working.class_slots
    if not prepare(
        base, shape[CLASSES_OF], lengths, codes_of_stream, group, tables, filled, slots_of_classes
    ):
        return False
    starts, residuals = bits_before[0], bits_before[1]
    at, residual = prefix_start, residual_start
    for s in range(n):
        starts[s], residuals[s] = at, residual
        at += prefix_bits[s]
        residual += residual_bits[s]
    slots, places = working.slots, working.places[0]
    spare = place_slots(counts, places)
    segments = Segments(starts, prefix_bits, counts, codes, residuals)
    target = Target(False, 0, np.uint64(0), 0, working.residuals, False, slots)
    if not decode_codes(data, segments, target, shape, tables, filled, places, spare, working, slots):
        return False
    first, extra = classes_of(tables)
    done = np.int64(0)
    for s in range(n):
        if not decode_segment(
            data,
            residuals[s],
            residual_bits[s],
            counts[s],
            trims[s],
            shape[CONSTANT_OF],
            first,
            extra,
            slots,
            places[s],
            levels[done : done + counts[s]],
        ):
            return False
        done += counts[s]
    return True
