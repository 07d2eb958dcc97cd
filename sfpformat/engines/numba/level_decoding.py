"""Decodes levels from class slots and the residual plane (SPEC.md chapter 9)."""

from __future__ import annotations

import numpy as np

from ...coding.bits import Bytes
from ...coding.planes import Levels
from .compiling import Int, kernel
from .unaligned import load64


@kernel
def decode_segment(
    data: Bytes,
    start: Int,
    size: Int,
    count: Int,
    trim: Int,
    constant: Int,
    first: Levels,
    extra: Bytes,
    slots: Bytes,
    place: Int,
    levels: Levels,
) -> bool:
    """Decodes the levels of a segment. False if its residuals do not end where they must (R-PLN-003).

    If the widths differ, load offsets are clamped to the last whole word of the chunk (see `prefix`).

    Args:
        data: uint8, the chunk.
        start, size: bit offset in ``data`` and size in bits of the segment's residuals.
        count: its number of levels.
        trim: residual bits that the segment omits.
        constant: residual bits of all used classes, or -1 if they differ.
        first, extra: the tables of `lookup.Classes`.
        slots, place: the segment's slots begin at ``slots[place]``.
        levels: uint64, at least ``count`` elements; filled.
    """
    one = np.uint64(1)
    if constant == 0:
        for i in range(count):
            levels[i] = first[slots[place + i]]
        return True
    last = np.int64(data.size - 8)
    above = np.uint64(trim + 1)
    at = start
    if constant > 0:
        width = constant - trim
        mask = (one << np.uint64(width)) - one
        if constant == 1:  # a sign: one load gives 32
            for i in range(0, count, 32):
                bit = start + i
                signs = load64(data, bit >> 3) >> np.uint64(bit & 7)
                for j in range(i, min(i + 32, count)):
                    levels[j] = first[slots[place + j]] + (signs & one)
                    signs >>= one
            return True
        # `index.read_index` has checked that the residuals are inside the chunk: no clamp is needed.
        for i in range(count):
            bit = start + i * width
            residual = (load64(data, bit >> 3) >> np.uint64(bit & 7)) & mask
            if trim:
                residual = (residual & one) | (residual >> one) << above
            levels[i] = first[slots[place + i]] + residual
        return True
    for i in range(count):
        slot = slots[place + i]
        width = np.int64(extra[slot]) - trim
        residual = (load64(data, min(at >> 3, last)) >> np.uint64(at & 7)) & ((one << np.uint64(width)) - one)
        if trim:
            residual = (residual & one) | (residual >> one) << above
        levels[i] = first[slot] + residual
        at += width
    return at == start + size
