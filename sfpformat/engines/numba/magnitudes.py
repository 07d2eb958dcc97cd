"""Tensors of few values: as the functions of the same names in `coding.magnitudes`, to the bit.

Patterns of one or two bytes are looked up in a table of all patterns. Wider ones are hashed: a slot holds a
magnitude's pattern, a full slot sends the search on to the next one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...coding.exact import Patterns
from ...coding.magnitudes import magnitude_bits, translation
from .compiling import kernel

# 2^64 over the golden ratio: the upper bits of products with it are spread evenly (Knuth, vol. 3, 6.4).
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# Slots for each magnitude that a table may hold: few searches look at a second slot.
_SLOTS_EACH = 8
_FREE = np.uint64(0xFFFFFFFFFFFFFFFF)  # no magnitude: its highest bit is a sign


def few_magnitudes(patterns: Patterns, most: int) -> Patterns | None:
    """As `coding.magnitudes.few_magnitudes`."""
    patterns = np.ascontiguousarray(patterns)
    low = magnitude_bits(patterns.dtype)
    if patterns.itemsize <= 2:
        flags = np.zeros(int(low) + 1, np.uint8)
        if _flag(patterns, low, most, flags) > most:
            return None
        return np.flatnonzero(flags).astype(patterns.dtype)
    bits = _slot_bits(most)
    slots, found = np.full(1 << bits, _FREE, np.uint64), np.empty(most + 1, patterns.dtype)
    count = _collect(patterns, low, most, np.uint64(64 - bits), slots, found)
    return None if count > most else np.sort(found[:count])


def translate(
    patterns: Patterns, magnitudes: Patterns, meanings: NDArray[np.unsignedinteger]
) -> NDArray[np.unsignedinteger]:
    """As `coding.magnitudes.translate`."""
    patterns = np.ascontiguousarray(patterns)
    out = np.empty(len(patterns), meanings.dtype)
    if patterns.itemsize <= 2:
        _look_up(patterns, translation(magnitudes, meanings), out)
        return out
    bits = _slot_bits(max(len(magnitudes), 1))
    slots, by_slot = np.full(1 << bits, _FREE, np.uint64), np.zeros(2 << bits, meanings.dtype)
    low, top = magnitude_bits(patterns.dtype), np.uint64(8 * patterns.itemsize - 1)
    _search(patterns, magnitudes, low, top, np.uint64(64 - bits), slots, meanings, by_slot, out)
    return out


def _slot_bits(most: int) -> int:
    """Of the number of a slot, in a table for so many magnitudes."""
    return (_SLOTS_EACH * most - 1).bit_length()


@kernel
def _flag(patterns: Any, low: Any, most: int, flags: Any) -> int:
    """Sets the flag of each magnitude; returns how many are set, once they are more than ``most``."""
    count = np.int64(0)
    for i in range(patterns.size):
        magnitude = patterns[i] & low
        if not flags[magnitude]:
            flags[magnitude] = 1
            count += 1
            if count > most:
                break
    return count


@kernel
def _place(magnitude: Any, shift: Any, slots: Any) -> int:
    """The slot that has a magnitude, or the free one where it belongs."""
    last = np.uint64(slots.size - 1)
    at = magnitude * _MULTIPLIER >> shift
    while slots[at] != magnitude and slots[at] != _FREE:
        at = at + np.uint64(1) & last
    return at


@kernel
def _collect(patterns: Any, low: Any, most: int, shift: Any, slots: Any, found: Any) -> int:
    """Fills ``found`` with the magnitudes, in the order in which they occur; returns how many.

    Args:
        most: it ends after one more than so many.
        shift: of a product that leaves the number of a slot.
        slots: uint64, all free, more than ``most``.
        found: room for ``most`` and one more.
    """
    count = np.int64(0)
    for i in range(patterns.size):
        magnitude = np.uint64(patterns[i] & low)
        at = _place(magnitude, shift, slots)
        if slots[at] != magnitude:
            slots[at] = magnitude
            found[count] = patterns[i] & low
            count += 1
            if count > most:
                break
    return count


@kernel
def _look_up(patterns: Any, table: Any, out: Any) -> None:
    """Fills ``out`` from a table of all patterns."""
    for i in range(patterns.size):
        out[i] = table[patterns[i]]


@kernel
def _search(
    patterns: Any,
    magnitudes: Any,
    low: Any,
    top: Any,
    shift: Any,
    slots: Any,
    meanings: Any,
    by_slot: Any,
    out: Any,
) -> None:
    """Fills ``out`` with what each value means.

    Args:
        magnitudes, meanings: as in `translate`; every magnitude of the patterns is there.
        low, top: ones where a pattern has no sign, and the number of its highest bit.
        shift, slots: as in `_collect`.
        by_slot: as ``meanings``, two for each slot, free for use.
    """
    one = np.uint64(1)
    for number in range(magnitudes.size):
        magnitude = np.uint64(magnitudes[number])
        at = _place(magnitude, shift, slots)
        slots[at] = magnitude
        by_slot[2 * at], by_slot[2 * at + one] = meanings[2 * number], meanings[2 * number + 1]
    for i in range(patterns.size):
        pattern = np.uint64(patterns[i])
        at = _place(pattern & np.uint64(low), shift, slots)
        out[i] = by_slot[at << one | pattern >> top]
