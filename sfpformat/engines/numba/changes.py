"""Kernels of `coding.changes`: one pass over the elements, with a counter for each key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

from ...coding.changes import NEVER, Bucket, Changes, ElementKind, Patterns
from .compiling import kernel

if TYPE_CHECKING:
    from .compiling import Int


def find_changes(base: Patterns, new: Patterns, kind: ElementKind, ranks: NDArray[np.int64]) -> Changes:
    """Implements `coding.changes.find_changes`."""
    size = len(base)
    keys, at = np.empty(size, np.uint16), np.empty(size, np.uint32)
    levels = np.empty(size, base.dtype)
    found = _find(base, new, kind.shift, kind.bits, kind.exponent_bits != 0, ranks, keys, at, levels)
    return Changes(keys[:found], at[:found], levels[:found])


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
    return int(
        _place(
            base,
            kind.shift,
            kind.bits,
            kind.exponent_bits != 0,
            *buckets,
            gaps,
            levels,
            positions,
            values,
        )
    )


@register_jitable
def _key(old: np.uint64, low: np.uint64, shift: Int, is_float: bool) -> np.uint64:
    """Returns the key of an element, given the mask of its magnitude."""
    return (((old & low) - np.uint64(1)) & low) >> np.uint64(shift) if is_float else np.uint64(0)


@register_jitable
def _ordered(pattern: np.uint64, flip: np.uint64, top: np.uint64) -> np.uint64:
    """Implements `coding.changes.ordered`, given the bits to flip in negative numbers."""
    return pattern ^ (flip if pattern >> top else np.uint64(0))


@register_jitable
def _masks(bits: Int, is_float: bool) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """Returns the place of the sign, and the masks of magnitude and pattern and of the bits to flip."""
    top = np.uint64(bits - 1)
    low = (np.uint64(1) << top) - np.uint64(1)
    return top, low, low | (np.uint64(1) << top), low if is_float else np.uint64(0)


@kernel
def _find(
    base: Patterns,
    new: Patterns,
    shift: Int,
    bits: Int,
    is_float: bool,
    ranks: NDArray[np.int64],
    keys: NDArray[np.uint16],
    at: NDArray[np.uint32],
    levels: Patterns,
) -> Int:
    top, low, full, flip = _masks(bits, is_float)
    found = 0
    for i in range(len(base)):
        old = np.uint64(base[i])
        key = _key(old, low, shift, is_float)
        rank = ranks[key]
        ranks[key] = rank + 1
        now = np.uint64(new[i])
        if old != now:
            difference = (_ordered(now, flip, top) - _ordered(old, flip, top)) & full
            sign = full if difference >> top else np.uint64(0)
            keys[found] = key
            at[found] = rank
            levels[found] = ((difference << np.uint64(1)) ^ sign) & full
            found += 1
    return found


@kernel
def _place(
    base: Patterns,
    shift: Int,
    bits: Int,
    is_float: bool,
    left: NDArray[np.int64],
    gap: NDArray[np.int64],
    level: NDArray[np.int64],
    last: NDArray[np.int64],
    dense: NDArray[np.uint8],
    gaps: NDArray[np.uint32],
    levels: Patterns,
    positions: NDArray[np.uint32],
    values: Patterns,
) -> Int:
    top, low, full, flip = _masks(bits, is_float)
    found = 0
    for i in range(len(base)):
        old = np.uint64(base[i])
        key = _key(old, low, shift, is_float)
        rest = left[key] - 1
        left[key] = rest
        if rest > 0:
            continue
        if dense[key] and level[key] >= last[key]:
            return -1
        coded = np.uint64(levels[level[key]])
        level[key] += 1
        if not dense[key]:
            gap[key] += 1
            left[key] = np.int64(gaps[gap[key]]) + 1 if level[key] < last[key] else np.int64(NEVER)
        sign = full if coded & np.uint64(1) else np.uint64(0)
        difference = (coded >> np.uint64(1)) ^ sign
        now = (_ordered(old, flip, top) + difference) & full
        positions[found] = i
        values[found] = _ordered(now, flip, top)
        found += 1
    return found
