"""Kernels of `coding.changes`.

An element needs work only if changes occur among elements with its key. After a small step of an optimiser,
these are few, so the kernels compare 64 elements at once with the range of such keys, and look at the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

from ...coding.changes import NEVER, Bucket, Changes, ElementKind, Extent, Patterns
from .comparing import COMPARED, Masks, first_start, inside, key_of, masks_of
from .compiling import inlined_kernel, kernel
from .unaligned import count_ones, prefetch, trailing_zeros

if TYPE_CHECKING:
    from .compiling import Int

# Of more of 64 elements with keys of the range, a loop over all is faster than one over the bits of a mask.
_FEW = 20
_AHEAD = 1024  # elements
_PREFETCHED = 16  # changes ahead


def find_changes(
    parts: Sequence[tuple[Patterns, Patterns]], kind: ElementKind, extent: Extent
) -> Changes | None:
    """Implements `coding.changes.find_changes`."""
    is_float = kind.exponent_bits != 0
    size = min(extent.most, sum(len(base) for base, _ in parts))
    keys, ranks = np.empty(size, np.uint16), np.empty(size, np.uint32)
    levels, elements = np.empty(size, kind.pattern), np.zeros(kind.keys, np.int64)
    found: Int = 0
    for base, new in parts if size else ():
        found = _find(
            base,
            new,
            kind.shift,
            kind.bits,
            is_float,
            extent.first,
            extent.last,
            elements,
            keys,
            ranks,
            levels,
            found,
        )
    if found > size:
        return None
    elements[np.bincount(keys[:found], minlength=kind.keys) == 0] = 0
    return Changes(keys[:found], ranks[:found], levels[:found], elements)


def place_changes(
    base: Patterns,
    kind: ElementKind,
    buckets: Bucket,
    gaps: NDArray[np.uint32],
    levels: Patterns,
    positions: NDArray[np.uint32],
    values: Patterns,
) -> int:
    """Implements `coding.changes.place_changes`."""
    is_float = kind.exponent_bits != 0
    return int(_place(base, kind.shift, kind.bits, is_float, buckets, gaps, levels, positions, values))


def write_changes(elements: Patterns, positions: NDArray[np.uint32], values: Patterns) -> None:
    """Implements `coding.changes.write_changes`."""
    _write(elements, positions, values)


@register_jitable
def _ordered(pattern: np.uint64, flip: np.uint64, top: np.uint64) -> np.uint64:
    """Implements `coding.changes.ordered`, given the bits to flip in negative numbers."""
    return pattern ^ (flip & (np.uint64(0) - (pattern >> top)))  # no branch: signs are random


@register_jitable
def _chosen(
    base: Patterns, start: Int, low: np.uint64, shift: Int, is_float: bool, first: Int, last: Int
) -> np.uint64:
    """Returns the mask of the elements among 64 that the kernels look at: those with keys of a range.

    All of them for integers, and if many have such keys. All that exist if ``start`` is negative.
    """
    if start < 0:
        return ~np.uint64(0) << np.uint64(-start)
    if not is_float:
        return ~np.uint64(0)
    size = np.uint64(last - first + 1) << np.uint64(shift)
    mask = inside(base, start, low, np.uint64(first) << np.uint64(shift), size)
    return mask if count_ones(mask) <= np.uint64(_FEW) else ~np.uint64(0)


@inlined_kernel
def _count(
    base: Patterns,
    new: Patterns,
    i: Int,
    shift: Int,
    masks: Masks,
    is_float: bool,
    elements: NDArray[np.int64],
    keys: NDArray[np.uint16],
    ranks: NDArray[np.uint32],
    levels: Patterns,
    found: Int,
) -> Int:
    """Counts an element, and stores it if it differs and the arrays have room.

    Returns:
        The number of elements that differ.
    """
    top, low, full, flip = masks
    old = np.uint64(base[i])
    key = key_of(old, low, shift, is_float)
    rank = elements[key]
    elements[key] = rank + 1
    now = np.uint64(new[i])
    if old != now:
        if found < len(keys):
            difference = (_ordered(now, flip, top) - _ordered(old, flip, top)) & full
            sign = full & (np.uint64(0) - (difference >> top))
            keys[found] = key
            ranks[found] = rank
            levels[found] = ((difference << np.uint64(1)) ^ sign) & full
        found += 1
    return found


@kernel
def _find(
    base: Patterns,
    new: Patterns,
    shift: Int,
    bits: Int,
    is_float: bool,
    first: Int,
    last: Int,
    elements: NDArray[np.int64],
    keys: NDArray[np.uint16],
    ranks: NDArray[np.uint32],
    levels: Patterns,
    found: Int,
) -> Int:
    """Finds the changes of a part, given the range of keys with changes. Counts the elements in the range.

    Returns:
        The number of changes of this part and those before, ``found``. Stores those that have room.
    """
    masks = masks_of(bits, is_float)
    width = bits >> 3
    for start in range(first_start(len(base)), len(base), COMPARED):
        # Few elements of this array are read, too irregularly for the processor to read ahead.
        prefetch(new, (start + _AHEAD) * width)
        prefetch(new, (start + _AHEAD) * width + 64)
        mask = _chosen(base, start, masks[1], shift, is_float, first, last)
        if mask == ~np.uint64(0):
            for i in range(start, start + COMPARED):
                found = _count(base, new, i, shift, masks, is_float, elements, keys, ranks, levels, found)
            continue
        while mask:
            at = start + np.int64(trailing_zeros(mask))
            mask &= mask - np.uint64(1)
            found = _count(base, new, at, shift, masks, is_float, elements, keys, ranks, levels, found)
    return found


@inlined_kernel
def _step(
    base: Patterns,
    i: Int,
    shift: Int,
    masks: Masks,
    is_float: bool,
    buckets: Bucket,
    gaps: NDArray[np.uint32],
    levels: Patterns,
    positions: NDArray[np.uint32],
    values: Patterns,
    found: Int,
) -> Int:
    """Places the change of an element, if it has one.

    Returns:
        The number of placed changes, or -1 if a dense bucket has no level left.
    """
    top, low, full, flip = masks
    left, gap, level, last, _ = buckets
    old = np.uint64(base[i])
    key = key_of(old, low, shift, is_float)
    rest = left[key]
    if rest <= 1:  # 0 in a dense bucket
        number = level[key]
        if number >= last[key]:
            found = -1
        else:
            coded = np.uint64(levels[number])
            level[key] = number + 1
            if rest:
                gap[key] += 1
                left[key] = np.int64(gaps[gap[key]]) + 1 if number + 1 < last[key] else np.int64(NEVER)
            difference = (coded >> np.uint64(1)) ^ (full & (np.uint64(0) - (coded & np.uint64(1))))
            now = (_ordered(old, flip, top) + difference) & full
            positions[found] = i
            values[found] = _ordered(now, flip, top)
            found += 1
    else:
        left[key] = rest - 1
    return found


@kernel
def _place(
    base: Patterns,
    shift: Int,
    bits: Int,
    is_float: bool,
    buckets: Bucket,
    gaps: NDArray[np.uint32],
    levels: Patterns,
    positions: NDArray[np.uint32],
    values: Patterns,
) -> Int:
    """Places the changes of a part."""
    masks = masks_of(bits, is_float)
    found: Int = 0
    low_key, high_key = len(buckets.level), -1
    for key in range(len(buckets.level)):
        if buckets.level[key] < buckets.last[key] or buckets.dense[key]:
            low_key, high_key = min(low_key, key), key
    if high_key < 0:
        return 0
    width = bits >> 3
    for start in range(first_start(len(base)), len(base), COMPARED):
        # Sooner than the processor would; a fifth faster where the elements come from memory.
        prefetch(base, (start + _AHEAD) * width)
        prefetch(base, (start + _AHEAD) * width + 64)
        mask = _chosen(base, start, masks[1], shift, is_float, low_key, high_key)
        while mask:
            at = start + np.int64(trailing_zeros(mask))
            mask &= mask - np.uint64(1)
            found = _step(base, at, shift, masks, is_float, buckets, gaps, levels, positions, values, found)
            if found < 0:
                return -1
    return found


@kernel
def _write(elements: Patterns, positions: NDArray[np.uint32], values: Patterns) -> None:
    """Writes changed elements."""
    last = len(positions) - 1
    for n in range(len(positions)):
        prefetch(elements, elements.itemsize * np.int64(positions[min(n + _PREFETCHED, last)]))
        elements[positions[n]] = values[n]
