"""Decodes mask levels to mask bits, and writes survivors to their positions (SPEC.md chapter 10)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.planes import Levels
from ..translation import OCTETS, RUNS_OF_PRUNED
from .compiling import Int, kernel
from .expanding import ONE_BY_ONE, WAY2, WAY4, expand2, expand4
from .unaligned import count_ones, load16, load32, load64, prefetch, store16, store32, store64, trailing_zeros

# Prefetch distance in bytes ahead of the store.
_AHEAD = 1024


@kernel
def mask_of_levels(
    kind: Int, levels: Levels, count: Int, positions: Int, survivors: Int, bits: Bytes, at: Int
) -> bool:
    """Decodes the mask bits of a segment. False if they break R-MSK-004 to R-MSK-006.

    Args:
        kind: of the mask, as in `translation`.
        levels: uint64, ``count`` elements.
        bits: uint8, initially zero; filled from byte ``at`` on. A segment has a multiple of 4 bytes.
    """
    if kind == OCTETS:
        for i in range(count):
            bits[at + i] = np.uint8(levels[i])
        if positions & 7 and bits[at + count - 1] >> np.uint8(positions & 7):
            return False
    else:
        if kind == RUNS_OF_PRUNED:
            for i in range(positions >> 3):
                bits[at + i] = 255
            if positions & 7:
                bits[at + (positions >> 3)] = (1 << (positions & 7)) - 1
        p = np.int64(-1)
        for i in range(count):
            p += np.int64(levels[i]) + 1
            if p >= positions:
                return False
            bits[at + (p >> 3)] ^= np.uint8(1 << (p & 7))
    return _count_mask(bits, at, positions) == survivors


@kernel
def mask_of_slots(
    first: Levels, slots: Bytes, place: Int, count: Int, positions: Int, survivors: Int, bits: Bytes, at: Int
) -> bool:
    """Does the work of `mask_of_levels` for octets of classes without residuals: each slot is one octet.

    Args:
        first: uint64 [256], the first level of each slot.
        slots, place: the segment's slots begin at ``slots[place]``.
    """
    for i in range(count):
        bits[at + i] = np.uint8(first[slots[place + i]])
    if positions & 7 and bits[at + count - 1] >> np.uint8(positions & 7):
        return False
    return _count_mask(bits, at, positions) == survivors


@kernel
def _count_mask(bits: Bytes, at: Int, positions: Int) -> Int:
    """Returns the number of mask bits of a segment that are one."""
    found = np.int64(0)
    for word in range((positions + 31) >> 5):
        found += np.int64(count_ones(np.uint64(load32(bits, at + 4 * word))))
    return found


@kernel
def survivor_places(bits: Bytes, at: Int, positions: Int, places: NDArray[np.int64]) -> None:
    """Fills ``places`` (int64) with the position in its segment of each survivor."""
    i = 0
    for start in range(0, positions, 32):
        word = np.uint64(load32(bits, at + (start >> 3)))
        while word:
            places[i] = start + np.int64(trailing_zeros(word))
            word &= word - np.uint64(1)
            i += 1


@kernel
def spread(bits: Bytes, at: Int, positions: Int, values: Bytes, item: Int, out: Bytes, to: Int) -> None:
    """Writes the survivors of a segment to their positions, and zero to all others.

    Args:
        values: uint8, the survivors' bit patterns of ``item`` bytes each, then bytes that may be read but are
            not used (see `expanding`).
        out: uint8, written from byte ``to`` on.
    """
    whole: Int
    i, whole = np.int64(0), np.int64(0)
    if (item == 2 and WAY2 != ONE_BY_ONE) or (item == 4 and WAY4 != ONE_BY_ONE):
        whole = positions & -32
    for start in range(0, whole, 32):
        word = np.uint64(load32(bits, at + (start >> 3)))
        prefetch(out, to + item * start + _AHEAD)
        if item == 4:
            expand4(values, 4 * i, word, out, to + 4 * start)
        else:
            expand2(values, 2 * i, word, out, to + 2 * start)
        i += np.int64(count_ones(word))
    # A loop over survivors, even if half of the positions survive: in a loop over all positions each step
    # depends on the previous one.
    out[to + whole * item : to + positions * item] = 0
    for start in range(whole, positions, 32):
        word = np.uint64(load32(bits, at + (start >> 3)))
        while word:
            p = start + np.int64(trailing_zeros(word))
            if item == 2:
                store16(out, to + 2 * p, load16(values, 2 * i))
            elif item == 4:
                store32(out, to + 4 * p, load32(values, 4 * i))
            elif item == 1:
                out[to + p] = values[i]
            else:
                store64(out, to + 8 * p, load64(values, 8 * i))
            word &= word - np.uint64(1)
            i += 1
