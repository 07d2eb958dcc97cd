"""Decodes the symbols of windows to class slots (SPEC.md chapter 9), 32 levels per step.

Theory of operation: a segment stores one bit plane for each bit of a symbol. A step loads 32 bits of each
plane and turns them into 32 bytes in vector registers. A level is escaped if its bit is one in all planes, so
that the conjunction of the words shows the escaped levels. Their places are written to a list without a
branch on their number, four per step: most steps have fewer, and a branch that is hard to predict would take
longer than the rest of the step. A second loop replaces the slots of these levels by their classes.

Why no read is out of bounds: the symbols and the escaped classes are in the prefix plane, which ends at least
8 bytes before the end of the chunk. Why no write is out of bounds: the levels after the last whole step are
decoded one at a time, and `places` has room for `PLACES_SLACK` more than all levels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import register_jitable
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.codetable import MAX_WINDOW_BITS
from .compiling import Int, intrinsic, kernel
from .unaligned import count_ones, load64, pointer_to, require_inside, trailing_zeros
from .vectors import splat

_STEP = 32  # levels
_LISTED = 4  # places that a step lists without a branch
# Elements that a step may write past the last place.
PLACES_SLACK = _LISTED
assert MAX_WINDOW_BITS == 4


@intrinsic
def _spread(
    typing_context: Any,
    word0: Any,
    word1: Any,
    word2: Any,
    word3: Any,
    window: Any,
    slots: Any,
    to: Any,
) -> Any:
    """Writes 32 slots: the window plus the symbol whose bits are at the same place of four words."""
    lanes = ir.VectorType(ir.IntType(8), _STEP)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *words, first, target, at = arguments
        flags = ir.VectorType(ir.IntType(1), _STEP)
        # A set bit becomes the byte -1. The negative of the symbol is the sum, with doubling.
        ones = [builder.sext(builder.bitcast(word, flags), lanes) for word in words]
        negative = ones[3]
        for plane in (2, 1, 0):
            negative = builder.add(builder.add(negative, negative), ones[plane])
        least = splat(builder, first, _STEP)
        place = pointer_to(context, builder, signature.args[5], target, at, 8)
        builder.store(builder.sub(least, negative), builder.bitcast(place, lanes.as_pointer())).align = 1
        return context.get_dummy_value()

    words = (types.uint32,) * MAX_WINDOW_BITS
    return types.void(*words, types.uint8, slots, types.int64), generate


@register_jitable
def _spread_inside(
    word0: Int, word1: Int, word2: Int, word3: Int, window: Int, slots: Bytes, to: Int
) -> None:
    """Calls `_spread`."""
    require_inside(slots, to, _STEP)
    _spread(
        np.uint32(word0), np.uint32(word1), np.uint32(word2), np.uint32(word3), np.uint8(window), slots, to
    )


@kernel
def _bits(data: Bytes, bit: Int) -> np.uint64:
    """Returns 32 bits from a bit offset on, in the lower half."""
    return load64(data, bit >> 3) >> np.uint64(bit & 7) & np.uint64(0xFFFFFFFF)


@kernel
def _symbols(
    data: Bytes,
    start: Int,
    count: Int,
    width: Int,
    window: Int,
    slots: Bytes,
    place: Int,
    places: NDArray[np.int64],
) -> Int:
    """Decodes the symbols of a segment to slots, and lists the escaped levels. Returns their number."""
    all_ones, one = np.uint64(0xFFFFFFFF), np.uint64(1)
    found = np.int64(0)
    whole = count - count % _STEP
    for i in range(0, whole, _STEP):
        at = start + i
        word0, word1, word2, word3 = _bits(data, at), np.uint64(0), np.uint64(0), np.uint64(0)
        hits = word0
        if width > 1:
            word1 = _bits(data, at + count)
            hits &= word1
        if width > 2:
            word2 = _bits(data, at + 2 * count)
            hits &= word2
        if width > 3:
            word3 = _bits(data, at + 3 * count)
            hits &= word3
        _spread_inside(word0, word1, word2, word3, window, slots, place + i)
        number = np.int64(count_ones(hits))
        for k in range(_LISTED):
            places[found + k] = i + np.int64(trailing_zeros(hits | ~all_ones))
            hits &= hits - one
        for k in range(_LISTED, number):
            places[found + k] = i + np.int64(trailing_zeros(hits))
            hits &= hits - one
        found += number
    last = (np.int64(1) << width) - 1
    for i in range(whole, count):
        symbol = np.int64(0)
        for k in range(width):
            at = start + k * count + i
            symbol |= np.int64(data[at >> 3] >> (at & 7) & 1) << k
        slots[place + i] = np.uint8(window + symbol)
        places[found] = i
        found += symbol == last
    return found


@kernel
def decode_window(
    data: Bytes,
    start: Int,
    size: Int,
    count: Int,
    width: Int,
    window: Int,
    classes: Int,
    slots: Bytes,
    place: Int,
    places: NDArray[np.int64],
) -> bool:
    """Decodes a segment with a window to slots. False if it does not end as it must, or on a wrong class.

    Args:
        data: uint8, the chunk, in which 8 bytes follow the segment.
        start, size: bit offset in ``data`` and size in bits of the segment.
        count: its number of levels.
        width: bits of a symbol.
        window: the first class of its window.
        classes: number of classes.
        slots, place: the slots are written from ``slots[place]`` on.
        places: int64 [count + PLACES_SLACK], scratch memory.
    """
    if count * width > size:  # R-PLN-003
        return False
    found = _symbols(data, start, count, width, window, slots, place, places)
    bits = 0
    while classes - 1 >> bits:
        bits += 1
    if count * width + found * bits != size:
        return False
    at, mask = start + count * width, np.uint64((1 << bits) - 1)
    greatest = np.uint64(0)
    for k in range(found):
        escaped = load64(data, at >> 3) >> np.uint64(at & 7) & mask
        greatest = max(greatest, escaped)
        slots[place + places[k]] = np.uint8(escaped)
        at += bits
    return bool(greatest < np.uint64(classes))  # R-PLN-005
