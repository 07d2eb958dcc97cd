"""Converts levels to weights (SPEC.md chapters 11 to 14): as bit patterns, by look-up, or in float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.planes import Levels
from ...coding.quantisers import F32
from ..translation import SCALE_QUOTIENT, SCALE_REMAINDER
from .compiling import Int, kernel
from .unaligned import load32, load64, store16, store32, store64
from .vectors import (
    LANES16,
    LANES32,
    LANES_LOOKED_UP,
    is_aligned,
    join16,
    join32,
    look_up2,
    look_up4,
    stream16,
    stream32,
)

# Modes of conversion from levels to weights.
PATTERNS, LOOKED_UP, ARITHMETIC, RAW = range(4)


@kernel
def join_residuals(
    data: Bytes,
    start: Int,
    count: Int,
    width: Int,
    base: np.uint64,
    slots: Bytes,
    place: Int,
    spread: Bytes,
    streamed: bool,
    out: Bytes,
    to: Int,
) -> None:
    """Joins slots and residuals to exact weights of 2 bytes (residuals of up to 8 bits) or 4 bytes (24 bits).

    Needs no array of levels.

    Args:
        data: uint8, the chunk; the residuals end at least 8 bytes before its end (`index.read_index`).
        start: bit offset in ``data`` of the segment's residuals.
        width: bits of each residual.
        base: uint64, the first level of slot 0; slots are consecutive classes of 2^width levels. With 24 bits
            a multiple of 2^24.
        slots, place: the segment's slots begin at ``slots[place]``.
        spread: uint8 [count + 7 or more], scratch memory.
        streamed: whether non-temporal stores may be used.
        out: uint8, written from byte ``to`` on.
    """
    if width == 24:
        _join_wide(data, start >> 3, count, np.uint8(base >> np.uint64(24)), slots, place, streamed, out, to)
    elif width == 8 and start & 7 == 0:
        _join_narrow(data, start >> 3, count, width, base, slots, place, streamed, out, to)
    else:
        _spread_fields(data, start, count, width, spread)
        _join_narrow(spread, 0, count, width, base, slots, place, streamed, out, to)


@kernel
def _join_narrow(
    residuals: Bytes,
    start: Int,
    count: Int,
    width: Int,
    base: np.uint64,
    slots: Bytes,
    place: Int,
    streamed: bool,
    out: Bytes,
    to: Int,
) -> None:
    """Joins slots with residuals of one byte each, from byte ``start`` on."""
    low, shift = np.uint16(base), np.uint16(width)
    whole = count - count % LANES16
    if streamed and is_aligned(out, to):
        for i in range(0, whole, LANES16):
            stream16(slots, place + i, residuals, start + i, low, shift, out, to + 2 * i)
    else:
        for i in range(0, whole, LANES16):
            join16(slots, place + i, residuals, start + i, low, shift, out, to + 2 * i)
    for i in range(whole, count):
        level = (
            (np.uint32(slots[place + i]) << np.uint32(width))
            + np.uint32(low)
            + np.uint32(residuals[start + i])
        )
        level &= np.uint32(0xFFFF)
        store16(out, to + 2 * i, np.uint16(level >> np.uint32(1) | level << np.uint32(15)))


@kernel
def _join_wide(
    data: Bytes,
    start: Int,
    count: Int,
    above: Int,
    slots: Bytes,
    place: Int,
    streamed: bool,
    out: Bytes,
    to: Int,
) -> None:
    """Joins slots with residuals of three bytes each, from byte ``start`` on."""
    whole = count - count % LANES32
    if streamed and is_aligned(out, to):
        for i in range(0, whole, LANES32):
            stream32(slots, place + i, data, start + 3 * i, above, out, to + 4 * i)
    else:
        for i in range(0, whole, LANES32):
            join32(slots, place + i, data, start + 3 * i, above, out, to + 4 * i)
    for i in range(whole, count):
        low = load32(data, start + 3 * i) & np.uint32(0xFFFFFF)  # one byte more, in bounds: TAIL_BYTES
        level = np.uint32(np.uint8(slots[place + i] + above)) << np.uint32(24) | np.uint32(low)
        store32(out, to + 4 * i, np.uint32(level >> np.uint32(1) | level << np.uint32(31)))


@kernel
def _spread_fields(data: Bytes, start: Int, count: Int, width: Int, out: Bytes) -> None:
    """Unpacks fields of at most 8 bits, from bit ``start`` on, to one byte each: eight per step, by halving.

    Args:
        out: uint8, at least ``count`` + 7 elements.
    """
    w = np.uint64(width)
    four = (np.uint64(1) << np.uint64(4) * w) - np.uint64(1)
    two = ((np.uint64(1) << np.uint64(2) * w) - np.uint64(1)) * np.uint64(0x0000000100000001)
    one = ((np.uint64(1) << w) - np.uint64(1)) * np.uint64(0x0001000100010001)
    for i in range(0, count, 8):
        bit = start + i * width
        word = load64(data, bit >> 3) >> np.uint64(bit & 7)
        word = word & four | (word >> np.uint64(4) * w & four) << np.uint64(32)
        word = word & two | (word >> np.uint64(2) * w & two) << np.uint64(16)
        word = word & one | (word >> w & one) << np.uint64(8)
        store64(out, i, word)


@kernel
def patterns_of_levels(levels: Levels, count: Int, item: Int, out: Bytes, to: Int) -> None:
    """Writes the bit patterns of levels, ``item`` bytes each: moves the sign from lowest to highest bit."""
    one = np.uint64(1)
    sign = np.uint64(8 * item - 1)
    for i in range(count):
        pattern = (levels[i] >> one) | ((levels[i] & one) << sign)
        if item == 2:
            store16(out, to + 2 * i, np.uint16(pattern))
        elif item == 4:
            store32(out, to + 4 * i, np.uint32(pattern))
        elif item == 1:
            out[to + i] = np.uint8(pattern)
        else:
            store64(out, to + 8 * i, pattern)


@kernel
def looked_up(
    levels: Levels, count: Int, patterns: NDArray[np.uint32], item: Int, out: Bytes, to: Int
) -> None:
    """Writes the bit pattern of each level, from a look-up table (uint32)."""
    for i in range(count):
        pattern = patterns[levels[i]]
        if item == 2:
            store16(out, to + 2 * i, np.uint16(pattern))
        elif item == 4:
            store32(out, to + 4 * i, pattern)
        else:
            out[to + i] = np.uint8(pattern)


@kernel
def signed_patterns(patterns: NDArray[np.uint32], first: Levels, by_slot: NDArray[np.uint32]) -> None:
    """Fills a look-up table by slot and sign, if every class has two levels, which differ in their sign.

    Args:
        patterns: uint32, the bit pattern of every level.
        first: uint64 [256], the first level of each slot.
        by_slot: uint32 [512], filled: the pattern of slot s and sign b at 2 * s + b.
    """
    for slot in range(256):
        for sign in range(2):
            level = first[slot] + np.uint64(sign)
            by_slot[2 * slot + sign] = patterns[level] if level < np.uint64(patterns.size) else 0


@kernel
def looked_up_by_slot(
    data: Bytes,
    start: Int,
    count: Int,
    by_slot: NDArray[np.uint32],
    item: Int,
    slots: Bytes,
    place: Int,
    out: Bytes,
    to: Int,
) -> None:
    """Writes the weights of a segment whose residuals are only signs.

    Args:
        data: uint8, the chunk; the signs end at least 8 bytes before its end (`index.read_index`).
        start: bit offset in ``data`` of the signs.
        by_slot: the table of `signed_patterns`.
        slots, place: the segment's slots begin at ``slots[place]``.
        out: uint8, written from byte ``to`` on.
    """
    whole = count & -32 if item in (2, 4) else 0
    for i in range(0, whole, 32):
        bit = start + i
        signs = load64(data, bit >> 3) >> np.uint64(bit & 7)
        for part in range(0, 32, LANES_LOOKED_UP):
            if item == 4:
                look_up4(slots, place + i + part, signs, by_slot, out, to + 4 * (i + part))
            else:
                look_up2(slots, place + i + part, signs, by_slot, out, to + 2 * (i + part))
            signs >>= np.uint64(LANES_LOOKED_UP)
    for i in range(whole, count):
        bit = start + i
        sign = load64(data, bit >> 3) >> np.uint64(bit & 7) & np.uint64(1)
        pattern = by_slot[np.uint64(slots[place + i]) << np.uint64(1) | sign]
        if item == 4:
            store32(out, to + 4 * i, pattern)
        elif item == 2:
            store16(out, to + 2 * i, np.uint16(pattern))
        else:
            out[to + i] = np.uint8(pattern)


@kernel
def signed_magnitudes(levels: Levels, count: Int, magnitudes: F32, numbers: F32) -> None:
    """Fills ``numbers`` (float32) with the signed magnitude of each level."""
    for i in range(count):
        magnitude = magnitudes[levels[i] >> np.uint64(1)]
        numbers[i] = -magnitude if levels[i] & np.uint64(1) else magnitude


@kernel
def multiply_by_place(
    numbers: F32, count: Int, places: NDArray[np.int64], start: Int, unit: Int, by: Int, factors: F32
) -> None:
    """Multiplies each number by the factor of its position.

    Args:
        places: int64, the position of each number in its segment, ascending.
        start: the segment's first position in the tensor.
        unit: positions per factor (rows, groups) or factors per row (columns).
        by: `SCALE_TENSOR`, `SCALE_QUOTIENT` or `SCALE_REMAINDER` of position and unit.
    """
    quotient, remainder = start // unit, start % unit
    at = np.int64(0)
    for i in range(count):
        remainder += places[i] - at
        at = places[i]
        while remainder >= unit:
            remainder -= unit
            quotient += 1
        factor = factors[0]
        if by == SCALE_QUOTIENT:
            factor = factors[quotient]
        elif by == SCALE_REMAINDER:
            factor = factors[remainder]
        numbers[i] = numbers[i] * factor


@kernel
def multiply_by_product(
    numbers: F32, count: Int, places: NDArray[np.int64], start: Int, columns: Int, rows: F32, across: F32
) -> None:
    """Multiplies each number by the product of its row's and its column's factor.

    Computes that product first.
    """
    row, column = start // columns, start % columns
    at = np.int64(0)
    for i in range(count):
        column += places[i] - at
        at = places[i]
        while column >= columns:
            column -= columns
            row += 1
        numbers[i] = numbers[i] * (rows[row] * across[column])


@kernel
def rounded(numbers: F32, count: Int, item: Int, out: Bytes, to: Int) -> None:
    """Writes the numbers as F32 (``item`` 4) or rounded to BF16 (2), ties to even. None may be a NaN."""
    patterns = numbers.view(np.uint32)
    for i in range(count):
        bits = patterns[i]
        if item == 4:
            store32(out, to + 4 * i, bits)
        else:
            even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            store16(out, to + 2 * i, np.uint16(np.uint32(bits + even) >> np.uint32(16)))
