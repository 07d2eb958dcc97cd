"""Differences between the elements of two tensors, in the order of the base's exponents (SPEC.md chapter 28).

This module is the reference implementation. It knows elements only as bit patterns: unsigned integers of 8 to
64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, Dtype

Patterns = NDArray[np.unsignedinteger]

# Changes that `write_changes` makes at a time: numpy copies the positions that it is given, as int64.
_WRITTEN = 1 << 15

NEVER = 1 << 62  # `Bucket.left` where no further element is coded
NO_RANK = (1 << 32) - 1  # greater than the rank of any element


@dataclass(frozen=True)
class ElementKind:
    """How differences of the elements of a dtype are computed (SPEC.md 28.2).

    Attributes:
        bits: w, the width of an element. A complex number is two elements.
        exponent_bits: e, the number of bits of the exponent field; 0 without one.
    """

    bits: int
    exponent_bits: int

    @property
    def keys(self) -> int:
        """The number of keys, and so of buckets of a block."""
        return 1 << self.exponent_bits

    @property
    def shift(self) -> int:
        """The number of bits of a magnitude below its exponent."""
        return self.bits - 1 - self.exponent_bits

    @property
    def pattern(self) -> np.dtype[np.unsignedinteger]:
        """The numpy dtype of an element's bit pattern."""
        return np.dtype(f"<u{self.bits // 8}")

    @property
    def stored(self) -> Dtype:
        """The dtype of the tensor that stores differences of such elements (R-DLT-007)."""
        return DTYPES[{8: "F8_E4M3", 16: "BF16", 32: "F32", 64: "F64"}[self.bits]]


@cache
def kind_of(dtype: Dtype) -> ElementKind:
    """Returns how differences of a dtype's elements are computed."""
    if dtype.is_float:
        return ElementKind(dtype.bits, dtype.exponent_bits)
    if dtype.name in ("C64", "C128"):
        return kind_of(DTYPES["F32" if dtype.name == "C64" else "F64"])
    return ElementKind(dtype.bits, 0)


class Extent(NamedTuple):
    """What is known about the changes between two arrays before they are listed.

    Attributes:
        most: the number of elements that differ, or an upper bound.
        first, last: the least and the greatest of their keys, or a wider range; ``first > last`` for none.
    """

    most: int
    first: int
    last: int

    def joined(self, other: Extent) -> Extent:
        """Returns the extent of both."""
        return Extent(self.most + other.most, min(self.first, other.first), max(self.last, other.last))


NOTHING = Extent(0, 1 << 16, -1)  # the extent of no changes


class Changes(NamedTuple):
    """The elements of a block that differ from the base, in the order of positions.

    Attributes:
        keys: the key of each, uint16 [n].
        ranks: its number among the block's elements with the same key, in the order of positions, uint32 [n].
        levels: its difference as a level, [n], in the dtype of the patterns.
        elements: number of the block's elements with each key that occurs in ``keys``, 0 for other keys,
            int64 [keys].
    """

    keys: NDArray[np.uint16]
    ranks: NDArray[np.uint32]
    levels: Patterns
    elements: NDArray[np.int64]


class Bucket(NamedTuple):
    """The coded differences of a block's buckets, as arrays with an element for each key.

    Attributes:
        left: elements up to and including the next coded one, int64; `NEVER` for none. 0 in a dense bucket.
        gap: index of the next gap to read, int64. Changed by the engine.
        level: index of the next level to read, int64. Changed by the engine.
        last: index after the bucket's last level, int64.
        dense: whether all elements of the bucket are coded, uint8.
    """

    left: NDArray[np.int64]
    gap: NDArray[np.int64]
    level: NDArray[np.int64]
    last: NDArray[np.int64]
    dense: NDArray[np.uint8]


def keys_of(patterns: Patterns, kind: ElementKind) -> NDArray[np.uint16]:
    """Returns the key of each element: the exponent field of its magnitude minus 1 (SPEC.md 28.2)."""
    if kind.exponent_bits == 0:
        return np.zeros(len(patterns), np.uint16)
    number = patterns.dtype.type
    magnitude = number((1 << (kind.bits - 1)) - 1)
    below = ((patterns & magnitude) - number(1)) & magnitude
    return (below >> number(kind.shift)).astype(np.uint16)


def ordered(patterns: Patterns, kind: ElementKind) -> Patterns:
    """Maps float patterns to integers in the order of the values, and back. Keeps those of integers."""
    if kind.exponent_bits == 0:
        return patterns
    top = patterns.dtype.type(kind.bits - 1)
    low = patterns.dtype.type((1 << (kind.bits - 1)) - 1)
    return np.asarray(patterns ^ ((patterns >> top) * low))


def to_levels(base: Patterns, new: Patterns, kind: ElementKind) -> Patterns:
    """Returns the level of each difference: 0 for none, 1 for -1, 2 for +1, 3 for -2, …"""
    difference = ordered(new, kind) - ordered(base, kind)
    one, top = difference.dtype.type(1), difference.dtype.type(kind.bits - 1)
    return np.asarray((difference << one) ^ (~difference.dtype.type(0) * (difference >> top)))


def from_levels(base: Patterns, levels: Patterns, kind: ElementKind) -> Patterns:
    """Returns the new elements; the inverse of `to_levels`."""
    one = levels.dtype.type(1)
    difference = (levels >> one) ^ (~levels.dtype.type(0) * (levels & one))
    return ordered(ordered(base, kind) + difference, kind)


def extent_of(base: Patterns, new: Patterns, kind: ElementKind) -> Extent:
    """Returns the extent of the changes between two arrays of one size."""
    keys = keys_of(base[base != new], kind)
    return Extent(len(keys), int(keys.min()), int(keys.max())) if len(keys) else NOTHING


def find_changes(
    parts: Sequence[tuple[Patterns, Patterns]], kind: ElementKind, extent: Extent
) -> Changes | None:
    """Returns the elements of a block that differ.

    Args:
        parts: the block's elements in the base and in the result, one part after another, each [n].
        kind: their kind.
        extent: the extent of their changes.

    Returns:
        The changes; None if there are more than ``extent`` says.
    """
    base = np.concatenate([old for old, _ in parts])
    new = np.concatenate([now for _, now in parts])
    keys = keys_of(base, kind)
    order = np.argsort(keys, kind="stable")
    counts = np.bincount(keys, minlength=kind.keys)
    rank = np.empty(len(keys), np.int64)
    rank[order] = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = np.flatnonzero(base != new)
    if len(at) > extent.most:
        return None
    elements = np.where(np.bincount(keys[at], minlength=kind.keys) > 0, counts, 0)
    return Changes(keys[at], rank[at].astype(np.uint32), to_levels(base[at], new[at], kind), elements)


def place_changes(
    base: Patterns,
    kind: ElementKind,
    buckets: Bucket,
    gaps: NDArray[np.uint32],
    levels: Patterns,
    positions: NDArray[np.uint32],
    values: Patterns,
) -> int:
    """Finds the changed elements of a part of a block.

    Args:
        base: the elements of the part in the base, [n].
        kind: their kind.
        buckets: what is left of the block's buckets. Updated.
        gaps, levels: the arrays that the buckets refer to.
        positions: receives the positions of coded elements in the part, ascending, [n].
        values: receives their new values, [n].

    Returns:
        The number of coded elements, or -1 if a dense bucket has fewer levels than elements.
    """
    keys = keys_of(base, kind)
    coded = (buckets.level < buckets.last) | (buckets.dense == 1)
    some = np.flatnonzero(coded[keys])
    by_key = some[np.argsort(keys[some], kind="stable")]
    counts = np.bincount(keys[some], minlength=kind.keys)
    ends = np.cumsum(counts)
    found: list[NDArray[np.int64]] = []
    chosen: list[Patterns] = []
    for key in np.flatnonzero(counts):
        at = by_key[ends[key] - counts[key] : ends[key]]
        remaining = int(buckets.last[key] - buckets.level[key])
        first = int(buckets.level[key])
        if buckets.dense[key]:
            if remaining < len(at):
                return -1
            taken, ranks = len(at), np.arange(len(at))
        else:
            steps = gaps[int(buckets.gap[key]) : int(buckets.gap[key]) + remaining].astype(np.int64)
            steps[1:] += 1
            steps[0] = buckets.left[key] - 1
            ranks = np.cumsum(steps)
            taken = int(np.searchsorted(ranks, len(at)))
            if taken < remaining:
                buckets.left[key] = ranks[taken] - len(at) + 1
            else:
                buckets.left[key] = NEVER
            buckets.gap[key] += taken
            ranks = ranks[:taken]
        buckets.level[key] += taken
        found.append(at[ranks])
        chosen.append(levels[first : first + taken])
    where = np.concatenate([np.zeros(0, np.int64), *found])
    order = np.argsort(where, kind="stable")
    where = where[order]
    positions[: len(where)] = where
    values[: len(where)] = from_levels(base[where], np.concatenate([levels[:0], *chosen])[order], kind)
    return len(where)


def write_changes(elements: Patterns, positions: NDArray[np.uint32], values: Patterns) -> None:
    """Writes changed elements.

    Args:
        elements: the elements to be changed, [n].
        positions: positions of the changes, less than n, ascending, [m].
        values: the elements at these positions after the changes, [m].
    """
    for start in range(0, len(positions), _WRITTEN):
        some = slice(start, start + _WRITTEN)
        elements[positions[some]] = values[some]


def open_buckets(counts: NDArray[np.int64], gaps: NDArray[np.uint32], gap: int, level: int) -> Bucket:
    """Returns the buckets of a block before its first element.

    Args:
        counts: the block's row of the counts, [keys]: 2 × number of coded elements + (1 if dense).
        gaps: the gaps.
        gap, level: index of the block's first gap and level.
    """
    coded, dense = counts >> 1, (counts & 1).astype(np.uint8)
    last = level + np.cumsum(coded)
    sparse = np.where(dense == 1, 0, coded)
    first_gap = gap + np.cumsum(sparse) - sparse
    left = np.where(dense == 1, 0, NEVER)
    some = np.flatnonzero(sparse)
    left[some] = gaps[first_gap[some]].astype(np.int64) + 1
    return Bucket(left, first_gap, last - coded, last, dense)


def coded_ranks(counts: NDArray[np.int64], gaps: NDArray[np.uint32], out: NDArray[np.uint32]) -> None:
    """Computes the numbers of a block's coded elements among the elements of their keys.

    Args:
        counts, gaps: as for `open_buckets`; the gaps of this block.
        out: receives the rank of each, in the order of keys, [n]; at most 2^32 - 2, which no element has.
    """
    level = gap = 0
    for number in counts[counts > 1].tolist():
        coded = number >> 1
        ranks = out[level : level + coded]
        if number & 1:
            ranks[:] = np.arange(coded, dtype=np.uint32)
        else:
            steps = np.cumsum(gaps[gap : gap + coded], dtype=np.int64)
            steps += np.arange(coded)
            ranks[:] = np.minimum(steps, NO_RANK - 1, out=steps)
            gap += coded
        level += coded
