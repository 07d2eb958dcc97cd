"""Plans the device memory of a batch of blocks: tiles, ranges of keys, and where each array is.

* Kept, for `Changes.flip`: the tiles, the levels (later the bits that change), the place of each change.
* For the batch: the key ranges, the first change of each key, the ranks; the counts of each tile; the totals
  and the sums, which are copied back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.changes import ElementKind, coded_ranks
from ..device_interface import DeviceBlock, DevicePart, Misfit
from . import layout
from .change_checksums import Words


def _aligned(size: int) -> int:
    return -(-size // layout.ALIGNMENT) * layout.ALIGNMENT


class KeyRange(NamedTuple):
    """A range of keys of a block: its first key, the number of keys, and the index of its first tile."""

    block: int
    key: int
    keys: int
    tile: int
    tiles: int


def ranges_of(counts: NDArray[np.int64] | None) -> list[tuple[int, int]]:
    """Returns first key and number of keys of ranges that cover all dense buckets and those with levels."""
    out: list[tuple[int, int]] = []
    for key in () if counts is None else np.flatnonzero(counts).tolist():
        if out and key < out[-1][0] + layout.MOST_KEYS:
            out[-1] = out[-1][0], key - out[-1][0] + 1
        else:
            out.append((key, 1))
    return out


def _tiles_of(parts: Sequence[DevicePart], item: int) -> NDArray[np.void]:
    """Returns the tiles of parts, without a range."""
    elements = np.array([part.elements for part in parts], np.int64)
    tiles = -(-elements // layout.TILE_ELEMENTS)
    index = np.arange(int(tiles.sum())) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    out = np.zeros(len(index), layout.CHANGE_TILE)
    first = np.repeat(np.array([part.address for part in parts], np.uint64), tiles)
    out["data"] = first + (index * (layout.TILE_ELEMENTS * item)).astype(np.uint64)
    rest = np.repeat(elements, tiles) - index * layout.TILE_ELEMENTS
    out["count"] = np.minimum(rest, layout.TILE_ELEMENTS)
    flags = [layout.IS_CHANGED * part.is_changed + layout.IS_BOOL * part.is_bool for part in parts]
    out["flags"] = np.repeat(np.array(flags, np.uint32), tiles)
    out["range"] = layout.NO_RANGE
    return out


@dataclass(frozen=True)
class Plan:
    """The memory of a batch.

    Attributes:
        tiles: of all blocks. The tiles of a block for its first range, or for none, precede those for others.
        own: for each block, the slices of its tiles, of one or more ranges.
        ranges: the ranges of keys.
        counted: number of counts.
        changes: number of changes.
        item: bytes per element.
    """

    tiles: NDArray[np.void]
    own: list[list[slice]]
    ranges: list[KeyRange]
    counted: int
    changes: int
    item: int

    @property
    def kept_sizes(self) -> tuple[int, int, int]:
        """Bytes of the kept tiles, levels and places."""
        return sizes_kept(len(self.tiles), self.changes, self.item)

    @property
    def copied_sizes(self) -> tuple[int, int, int]:
        """Bytes of the ranges, of the first changes of keys, and of the ranks."""
        starts = sum(one.keys + 1 for one in self.ranges)
        return (
            _aligned(len(self.ranges) * layout.KEY_RANGE.itemsize),
            _aligned(4 * starts),
            _aligned(4 * self.changes),
        )

    @property
    def returned_sizes(self) -> tuple[int, int, int]:
        """Bytes of the totals, and of the sums of elements and of changed bits."""
        totals, sums = sum(one.keys for one in self.ranges), len(self.tiles)
        return _aligned(4 * totals), _aligned(4 * sums), _aligned(4 * sums)


def sizes_kept(tiles: int, changes: int, item: int) -> tuple[int, int, int]:
    return _aligned(tiles * layout.CHANGE_TILE.itemsize), _aligned(changes * item), _aligned(4 * changes)


def plan_of(blocks: Sequence[DeviceBlock], item: int) -> Plan:
    """Plans the memory of a batch."""
    tiles: list[NDArray[np.void]] = []
    own: list[list[slice]] = []
    ranges: list[KeyRange] = []
    at = counted = changes = 0
    for number, block in enumerate(blocks):
        found, slices = _tiles_of(block.parts, item), []
        for key, keys in ranges_of(block.counts) or [(0, 0)]:
            some = found.copy()
            if keys:
                some["range"] = len(ranges)
                ranges.append(KeyRange(number, key, keys, at, len(some)))
                counted += len(some) * keys
            tiles.append(some)
            slices.append(slice(at, at + len(some)))
            at += len(some)
        own.append(slices)
        changes += len(block.levels) if block.counts is not None else 0
    return Plan(np.concatenate(tiles), own, ranges, counted, changes, item)


def misfit_of(block: DeviceBlock, one: KeyRange, last: Words, totals: Words) -> Misfit | None:
    """Returns why the changes of a range of keys do not fit the elements, of which there are ``totals``."""
    assert block.counts is not None
    counts = block.counts[one.key : one.key + one.keys]
    coded, dense = counts >> 1, counts & 1 == 1
    if np.any(dense & (coded < totals)):
        return Misfit.FEWER
    left = np.where(dense, coded > totals, (coded > 0) & (last >= totals))
    return Misfit.LEFT if left.any() else None


def fill(
    out: Bytes,
    at: int,
    plan: Plan,
    blocks: Sequence[DeviceBlock],
    kind: ElementKind,
    memory: int,
    counts: int,
) -> list[Words]:
    """Writes the copied part of a batch.

    Args:
        out: the pinned memory.
        at: offset of the ranges in it; before them are tiles and levels.
        plan: the plan.
        blocks: the blocks.
        kind: the kind of their elements.
        memory: address of the ranges on the device.
        counts: address of the counts on the device.

    Returns:
        For each range, the rank of the last change of each key; undefined for a key without changes.
    """
    tiles_size, _, _ = plan.kept_sizes
    ranges_size, starts_size, ranks_size = plan.copied_sizes
    out[: plan.tiles.nbytes] = plan.tiles.view(np.uint8)
    levels = out[tiles_size : tiles_size + plan.changes * plan.item].view(kind.pattern)
    ranges = np.zeros(len(plan.ranges), layout.KEY_RANGE)
    starts = out[at + ranges_size : at + ranges_size + starts_size].view(np.uint32)
    ranks_at = at + ranges_size + starts_size
    ranks = out[ranks_at : ranks_at + 4 * plan.changes].view(np.uint32)
    firsts, change = [], 0
    for block in blocks:
        firsts.append(change)
        if block.counts is not None:
            stop = change + len(block.levels)
            levels[change:stop] = block.levels
            coded_ranks(block.counts, block.gaps, ranks[change:stop])
            change = stop
    last: list[Words] = []
    start, total = 0, memory + ranges_size + starts_size + ranks_size
    for number, one in enumerate(plan.ranges):
        of_block = blocks[one.block].counts
        assert of_block is not None
        ends = firsts[one.block] + np.cumsum(of_block >> 1)
        first = ends[one.key - 1] if one.key else firsts[one.block]
        own = starts[start : start + one.keys + 1]
        own[0], own[1:] = first, ends[one.key : one.key + one.keys]
        ends_of_keys = own[1:].astype(np.int64)
        last.append(ranks[np.maximum(ends_of_keys - 1, 0)] if len(ranks) else np.zeros(one.keys, np.uint32))
        ranges[number] = (
            counts,
            total,
            memory + ranges_size + 4 * start,
            one.tile,
            one.tiles,
            one.key,
            one.keys,
            kind.shift,
            kind.exponent_bits != 0,
        )
        counts += 4 * one.tiles * one.keys
        total += 4 * one.keys
        start += one.keys + 1
    out[at : at + ranges.nbytes] = ranges.view(np.uint8)
    return last
