"""Tensors of few distinct values: bit-identical to the functions of the same names in `coding.magnitudes`.

Patterns of one or two bytes use a look-up table of all patterns. Wider ones use a hash table with linear
probing; a slot holds a magnitude's pattern.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.exact_encoding import Patterns
from ...coding.magnitudes import magnitude_bits, translation
from ...coding.planes import Levels
from .compiling import Int, kernel

# 2^64 divided by the golden ratio: the upper bits of products with it are spread evenly (Knuth, vol. 3, 6.4).
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# Slots per magnitude of the hash table: few searches need a second slot.
_SLOTS_EACH = 8
_FREE = np.uint64(0xFFFFFFFFFFFFFFFF)  # no magnitude: its highest bit is a sign


def few_magnitudes(patterns: Patterns, most: int) -> Patterns | None:
    """Implements `coding.magnitudes.few_magnitudes`."""
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
    """Implements `coding.magnitudes.translate`."""
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
    """Returns the bits of a slot number, in a hash table for ``most`` magnitudes."""
    return (_SLOTS_EACH * most - 1).bit_length()


@kernel
def _flag(patterns: Patterns, low: np.unsignedinteger, most: Int, flags: Bytes) -> Int:
    """Sets the flag of each magnitude and returns the number of set flags. Stops at more than ``most``."""
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
def _place(magnitude: np.uint64, shift: np.uint64, slots: Levels) -> np.uint64:
    """Returns the slot of a magnitude, or the free slot for it."""
    last = np.uint64(slots.size - 1)
    at = magnitude * _MULTIPLIER >> shift
    while slots[at] != magnitude and slots[at] != _FREE:
        at = at + np.uint64(1) & last
    return at


@kernel
def _collect(
    patterns: Patterns, low: np.unsignedinteger, most: Int, shift: np.uint64, slots: Levels, found: Patterns
) -> Int:
    """Fills ``found`` with the distinct magnitudes, in order of occurrence; returns their number.

    Args:
        low: mask of a pattern's bits without the sign.
        most: stops at more than this many magnitudes.
        shift: right shift of a hash product that gives a slot number.
        slots: uint64, all free, more than ``most``.
        found: ``most`` + 1 elements.
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
def _look_up(
    patterns: Patterns, table: NDArray[np.unsignedinteger], out: NDArray[np.unsignedinteger]
) -> None:
    """Fills ``out`` from a look-up table of all patterns."""
    for i in range(patterns.size):
        out[i] = table[patterns[i]]


@kernel
def _search(
    patterns: Patterns,
    magnitudes: Patterns,
    low: np.unsignedinteger,
    top: np.uint64,
    shift: np.uint64,
    slots: Levels,
    meanings: NDArray[np.unsignedinteger],
    by_slot: NDArray[np.unsignedinteger],
    out: NDArray[np.unsignedinteger],
) -> None:
    """Fills ``out`` with the meaning of each pattern.

    Args:
        magnitudes, meanings: same as for `translate`; ``magnitudes`` contains every magnitude of the
            patterns.
        low, top: mask of a pattern's bits without the sign, and the number of its highest bit.
        shift, slots: same as for `_collect`.
        by_slot: dtype of ``meanings``, two elements per slot, scratch memory.
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
