"""Schedules the segments of a stream for `prefix`: decodes its prefix plane to slots or to weights."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from .compiling import Int, inlined_kernel, kernel
from .index import CODES_OF
from .lookup import Code, code_of
from .prefix import AT, CHAINS, ROUND, SLACK, STOP, TO, advance, finish, is_inside, order_by_code
from .prefix import pass_long_codewords as pass_long
from .recipe import BITS_OF, CLASSES_OF, GROUP_OF, WINDOW_OF
from .values import join_residuals
from .windows import decode_window
from .working import Working

# Results of `_take`: no segment remains, or a segment does not end where it must.
_NONE, _BAD = -1, -2


class Segments(NamedTuple):
    """The segments of a stream in a run.

    Attributes:
        starts, sizes: int64 [n], bit offset in the chunk and size in bits of each in the prefix plane.
        counts, codes: int64 [n], number of levels and code of each.
        residuals: int64 [n], bit offset in the chunk of the residuals of each.
    """

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    counts: NDArray[np.int64]
    codes: NDArray[np.int64]
    residuals: NDArray[np.int64]


class Target(NamedTuple):
    """The output for weights, if slots are joined with residuals as soon as a segment's slots are decoded.

    Attributes:
        joined: whether to join; if false, slots stay at their places, and the other fields are not used.
        width: bits of each residual.
        base: uint64, first level of slot 0.
        unit: bytes of a segment's weights.
        spread: uint8 [segment + 8], scratch memory.
        streamed: whether non-temporal stores may be used.
        out: uint8, all weights of the run.
    """

    joined: bool
    width: Int
    base: np.uint64
    unit: Int
    spread: Bytes
    streamed: bool
    out: Bytes


@inlined_kernel
def _complete(
    data: Bytes, segments: Segments, target: Target, s: Int, end: Int, group: Int, slots: Bytes, place: Int
) -> bool:
    """Checks and joins segment ``s``, whose codewords end at bit ``end``.

    False if it does not end as it must.
    """
    count = segments.counts[s]
    if end != segments.starts[s] + segments.sizes[s]:  # R-PLN-003
        return False
    if group == 2 and count & 1 and slots[place + count]:  # R-PLN-002; class 0 has slot 0
        return False
    if target.joined:
        join_residuals(
            data,
            segments.residuals[s],
            count,
            target.width,
            target.base,
            slots,
            place,
            target.spread,
            target.streamed,
            target.out,
            s * target.unit,
        )
    return True


@inlined_kernel
def _take(
    data: Bytes,
    order: NDArray[np.int64],
    at: Int,
    code: Code,
    segments: Segments,
    target: Target,
    places: NDArray[np.int64],
    k: Int,
    state: NDArray[np.int64],
    slots: Bytes,
) -> tuple[Int, Int]:
    """Assigns to chain ``k`` the next segment that `prefix.advance` may decode. Decodes skipped segments.

    Returns:
        The segment, or `_NONE` or `_BAD`; and the next index in ``order``.
    """
    while at < order.size:
        s = order[at]
        at += 1
        place, start = places[k if target.joined else s], segments.starts[s]
        padded = segments.counts[s] + (segments.counts[s] & (code.group - 1))
        if padded >= 2 * ROUND and is_inside(data.size, start, padded):
            state[AT, k], state[TO, k], state[STOP, k] = start, place, place + padded - ROUND
            return s, at
        end = finish(data, start, place, place + padded, code, slots)
        if not _complete(data, segments, target, s, end, code.group, slots, place):
            return _BAD, at
    return _NONE, at


@kernel
def _decode_code(
    data: Bytes,
    order: NDArray[np.int64],
    code: Code,
    segments: Segments,
    target: Target,
    places: NDArray[np.int64],
    spare: Int,
    state: NDArray[np.int64],
    taken: NDArray[np.int64],
    slots: Bytes,
) -> bool:
    """Decodes the segments of ``order``, which share a code. False if one does not end where it must."""
    at: Int
    at, busy, idle = 0, 0, np.int64(_NONE)
    for k in range(CHAINS):
        taken[k], at = _take(data, order, at, code, segments, target, places, k, state, slots)
        if taken[k] == _BAD:
            return False
        if taken[k] == _NONE:
            state[TO, k], state[STOP, k] = 1, 0  # has finished
        else:
            busy, idle = busy + 1, taken[k]
    while busy:
        through = False
        for k in range(CHAINS):
            if state[TO, k] <= state[STOP, k]:
                continue
            through = True
            s = taken[k]
            if s != _NONE:
                stop = state[STOP, k] + ROUND
                end = finish(data, state[AT, k], state[TO, k], stop, code, slots)
                place = stop - (segments.counts[s] + (segments.counts[s] & (code.group - 1)))
                if not _complete(data, segments, target, s, end, code.group, slots, place):
                    return False
                taken[k], at = _take(data, order, at, code, segments, target, places, k, state, slots)
                if taken[k] == _BAD:
                    return False
                busy -= taken[k] == _NONE
            if taken[k] == _NONE:  # an idle chain decodes a segment again, into spare slots
                padded = segments.counts[idle] + (segments.counts[idle] & (code.group - 1))
                state[AT, k], state[TO, k] = segments.starts[idle], spare
                state[STOP, k] = spare + padded - ROUND
        if not through:
            pass_long(data, state, code, slots)
        advance(data, state, code, slots)
    return True


@kernel
def place_slots(counts: NDArray[np.int64], places: NDArray[np.int64]) -> Int:
    """Fills ``places`` with the first slot index of each segment, and returns the next free index.

    Each segment has `SLACK` more bytes, and one more for an odd count.
    """
    at = np.int64(0)
    for s in range(counts.size):
        places[s] = at
        at += counts[s] + 1 + SLACK
    return at


@kernel
def _decode_windows(
    data: Bytes,
    segments: Segments,
    target: Target,
    shape: NDArray[np.int64],
    places: NDArray[np.int64],
    working: Working,
    slots: Bytes,
) -> bool:
    """Decodes segments with windows. False if one is not valid. Arguments: those of `decode_codes`."""
    width, classes = shape[WINDOW_OF], shape[CLASSES_OF]
    for s in range(segments.counts.size):
        place = places[0 if target.joined else s]
        start, size, count = segments.starts[s], segments.sizes[s], segments.counts[s]
        window = segments.codes[s]
        if not decode_window(data, start, size, count, width, window, classes, slots, place, working.escaped):
            return False
        if not _complete(data, segments, target, s, start + size, 1, slots, place):
            return False
    return True


@kernel
def stored_codes(shape: NDArray[np.int64]) -> Int:
    """Returns the number of prefix codes of a stream: 0 with windows."""
    return 0 if shape[WINDOW_OF] else shape[CODES_OF]


@kernel
def decode_codes(
    data: Bytes,
    segments: Segments,
    target: Target,
    shape: NDArray[np.int64],
    tables: Bytes,
    filled: NDArray[np.int64],
    places: NDArray[np.int64],
    spare: Int,
    working: Working,
    slots: Bytes,
) -> bool:
    """Decodes segments, code by code, or window by window. False if one does not end where it must.

    Args:
        data: uint8, the chunk, at least 8 bytes.
        shape: int64, the stream's row of `shapes`.
        tables, filled: the stream's tables and their flags (`lookup`).
        places: int64, first slot index of each segment; of each chain if slots are joined.
        spare: first index of spare slots for one segment, which are written but never read.
        slots: uint8, filled.
    """
    if shape[CODES_OF] == 0:
        slots[:spare] = 0
    if shape[WINDOW_OF]:
        return _decode_windows(data, segments, target, shape, places, working, slots)
    begins, begin = working.begins, 0
    order_by_code(segments.codes, working.order, begins)
    for number in range(shape[CODES_OF]):
        if begin < begins[number]:
            code = code_of(
                tables,
                shape[CODES_OF],
                shape[BITS_OF],
                number,
                shape[GROUP_OF],
                filled,
                working.single,
                working.ends,
            )
            if not _decode_code(
                data,
                working.order[begin : begins[number]],
                code,
                segments,
                target,
                places,
                spare,
                working.state,
                working.taken,
                slots,
            ):
                return False
        begin = begins[number]
    return True
