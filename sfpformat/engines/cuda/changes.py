"""Finds and makes the changes of a delta in the memory of a device. Implements `interface.DeviceChanges`.

A batch of blocks is one copy to the device, three launches, and one copy back. ``kernels/source/changes.cuh``
says how the kernels work. Device memory of a batch:

* kept, for `Changes.flip`: the tiles, the levels (later the bits that change), the place of each change;
* for the batch: the key ranges, the first change of each key, the ranks; the counts of each tile; the totals
  and the sums, which are copied back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.changes import ElementKind, coded_ranks
from ...io.checksum import POLYNOMIAL, combined, power, times
from ..interface import CheckedBlock, DeviceBlock, DevicePart, Misfit, PlacedChanges
from . import layout
from .device import Device, HostMemory, Mark, Memory

Words = NDArray[np.uint32]

# Elements of a part whose sums the host joins at once.
_MOST_ELEMENTS = 1 << 24
# Parts whose checksums are computed in one launch have at most this many tiles.
_MOST_TILES = 1 << 16


def _aligned(size: int) -> int:
    return -(-size // layout.ALIGNMENT) * layout.ALIGNMENT


# ------------------------------------------------------------------------------------------------ checksums


@cache
def sum_tables(item: int) -> Words:
    """Returns the tables of the kernels for elements of ``item`` bytes: a `SumTables`, as words."""
    ahead = power(8 * item * layout.WARP)
    bits = [times(ahead, 1 << bit) for bit in range(32)]
    factor = np.zeros((4, 256), np.uint32)
    for byte in range(4):
        for bit in range(8):
            factor[byte] ^= np.where(np.arange(256) >> bit & 1, bits[8 * byte + bit], 0).astype(np.uint32)
    weights = np.zeros((2, layout.WARP), np.uint32)
    for word in range(-(-item // 4)):
        for lane in range(layout.WARP):
            weights[word, lane] = power(8 * item * (layout.WARP - lane) - 32 * word)
    return np.concatenate([factor.reshape(-1), weights.reshape(-1)])


@cache
def _powers_of_tiles(item: int) -> Words:
    """Returns the factor of a sum with 0, 1, 2, … whole tiles after it."""
    ahead, one = power(8 * item * layout.TILE_ELEMENTS), power(0)
    out = np.empty(_MOST_ELEMENTS // layout.TILE_ELEMENTS, np.uint32)
    for i in range(len(out)):
        out[i] = one
        one = times(ahead, one)
    return out


def _products(a: Words, b: Words) -> Words:
    """Returns products modulo the polynomial of the CRC, like `io.checksum.times`."""
    product, b = np.zeros_like(a), b.copy()
    for bit in reversed(range(32)):
        product ^= np.where(a >> np.uint32(bit) & np.uint32(1), b, np.uint32(0))
        b = (b >> np.uint32(1)) ^ np.where(b & np.uint32(1), np.uint32(POLYNOMIAL), np.uint32(0))
    return product


def joined_sums(sums: Words, elements: NDArray[np.int64], item: int) -> list[int]:
    """Returns the sum of each part, given the sums of its tiles.

    Args:
        sums: of all tiles of the parts, in order.
        elements: number of elements of each part, at least 1 and at most `_MOST_ELEMENTS`.
        item: bytes per element.
    """
    if not len(elements):
        return []
    tiles = -(-elements // layout.TILE_ELEMENTS)
    stops = np.cumsum(tiles)
    after = np.repeat(stops, tiles) - np.arange(len(sums)) - 2  # whole tiles before the last
    weighted = _products(sums, _powers_of_tiles(item)[np.maximum(after, 0)])
    weighted[stops - 1] = 0
    whole = np.bitwise_xor.reduceat(weighted, stops - tiles)
    rest = elements - (tiles - 1) * layout.TILE_ELEMENTS
    factors = np.array([power(8 * item * count) for count in rest.tolist()], np.uint32)
    joined: list[int] = (_products(whole, factors) ^ sums[stops - 1]).tolist()
    return joined


@cache
def _crc_of_zeros(size: int) -> int:
    ones = 0xFFFFFFFF
    return times(power(8 * size), ones) ^ ones


# ---------------------------------------------------------------------------------------------------- plans


class _Range(NamedTuple):
    """A range of keys of a block: its first key, the number of keys, and the index of its first tile."""

    block: int
    key: int
    keys: int
    tile: int
    tiles: int


def _ranges_of(counts: NDArray[np.int64] | None) -> list[tuple[int, int]]:
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
class _Plan:
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
    ranges: list[_Range]
    counted: int
    changes: int
    item: int

    @property
    def kept_sizes(self) -> tuple[int, int, int]:
        """Bytes of the kept tiles, levels and places."""
        return _kept_sizes(len(self.tiles), self.changes, self.item)

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


def _kept_sizes(tiles: int, changes: int, item: int) -> tuple[int, int, int]:
    return _aligned(tiles * layout.CHANGE_TILE.itemsize), _aligned(changes * item), _aligned(4 * changes)


def _plan_of(blocks: Sequence[DeviceBlock], item: int) -> _Plan:
    """Plans the memory of a batch."""
    tiles: list[NDArray[np.void]] = []
    own: list[list[slice]] = []
    ranges: list[_Range] = []
    at = counted = changes = 0
    for number, block in enumerate(blocks):
        found, slices = _tiles_of(block.parts, item), []
        for key, keys in _ranges_of(block.counts) or [(0, 0)]:
            some = found.copy()
            if keys:
                some["range"] = len(ranges)
                ranges.append(_Range(number, key, keys, at, len(some)))
                counted += len(some) * keys
            tiles.append(some)
            slices.append(slice(at, at + len(some)))
            at += len(some)
        own.append(slices)
        changes += len(block.levels) if block.counts is not None else 0
    return _Plan(np.concatenate(tiles), own, ranges, counted, changes, item)


# ------------------------------------------------------------------------------------------------- the queue


@dataclass
class Placed:
    """Changes on the device. Implements `interface.PlacedChanges`.

    Attributes:
        memory: the tiles, the bits that change, the place of each change.
        tiles, changes, item: how many there are, and the bytes per element.
    """

    memory: Memory
    tiles: int
    changes: int
    item: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of the three arrays."""
        return _kept_sizes(self.tiles, self.changes, self.item)

    @property
    def nbytes(self) -> int:
        """Implements `interface.PlacedChanges`."""
        return sum(self.sizes)


@dataclass
class Pending:
    """A running batch. Implements `interface.PendingBlocks`.

    Attributes:
        device: the queue.
        tables: address of the `SumTables`.
        slot: its pinned memory, which the batch uses until `wait`.
        blocks: the blocks.
        plan: the memory of the batch.
        last: for each range, the rank of the last change of each key, uint32 [keys].
        placed: the kept memory.
        memory: other memory on the device.
        nbytes: bytes of both.
        mark: the end of the batch in the queue.
    """

    device: Device
    tables: int
    slot: _Slot
    blocks: Sequence[DeviceBlock]
    plan: _Plan
    last: list[Words]
    placed: Placed
    memory: Memory | None
    nbytes: int
    mark: Mark | None = None

    def find(self) -> None:
        """Launches the kernels that find the changes."""
        assert self.memory is not None
        plan, kept, own = self.plan, self.placed.memory.address, self.memory.address
        tiles_size, levels_size, _ = plan.kept_sizes
        ranges_size, starts_size, _ = plan.copied_sizes
        totals_size, sums_size, _ = plan.returned_sizes
        sums, count = own + sum(plan.copied_sizes) + totals_size, len(plan.tiles)
        blocks = -(-count // layout.WARPS)
        self.device.launch(f"count_keys_{plan.item}", blocks, [kept, count, own, sums, self.tables])
        if not plan.ranges:
            return
        self.device.launch("sum_keys", len(plan.ranges) * layout.KEY_GROUPS, [own])
        patterns, places = kept + tiles_size, kept + tiles_size + levels_size
        ranks = own + ranges_size + starts_size
        arguments = [kept, count, own, ranks, patterns, places, sums + sums_size, self.tables]
        self.device.launch(f"place_changes_{plan.item}", blocks, arguments)

    def wait(self) -> tuple[list[CheckedBlock], PlacedChanges | None]:
        """Implements `interface.PendingBlocks`."""
        assert self.mark is not None
        self.mark.wait()
        totals_size, sums_size, _ = self.plan.returned_sizes
        memory = self.slot.memory
        assert memory is not None
        raw = memory.bytes
        totals = raw[:totals_size].view(np.uint32)
        count = 4 * len(self.plan.tiles)
        sums = raw[totals_size : totals_size + count].view(np.uint32)
        flipped = raw[totals_size + sums_size : totals_size + sums_size + count].view(np.uint32)
        out = self._checked(totals, sums, flipped)
        self.memory, self.slot.busy = None, False
        return out, self.placed if self.plan.changes else None

    def _checked(self, totals: Words, sums: Words, flipped: Words) -> list[CheckedBlock]:
        misfits: dict[int, Misfit] = {}
        at = 0
        for one, last in zip(self.plan.ranges, self.last, strict=True):
            misfit = _misfit_of(self.blocks[one.block], one, last, totals[at : at + one.keys])
            # As by the other engines, which stop at a dense bucket without levels.
            if misfit is not None and misfits.get(one.block) is not Misfit.FEWER:
                misfits[one.block] = misfit
            at += one.keys
        item = self.plan.item
        sizes = [np.array([part.elements for part in block.parts], np.int64) for block in self.blocks]
        own = [slices[0] for slices in self.plan.own]
        base = np.concatenate([sums[some] for some in own])
        elements = np.concatenate(sizes)
        before = joined_sums(base, elements, item)
        difference = [0] * len(before)
        if self.plan.ranges:
            changed = [np.bitwise_xor.reduce([flipped[some] for some in slices]) for slices in self.plan.own]
            difference = joined_sums(np.concatenate(changed), elements, item)
        crcs = [one ^ _crc_of_zeros(size * item) for one, size in zip(before, elements.tolist(), strict=True)]
        results = [crc ^ one for crc, one in zip(crcs, difference, strict=True)]
        out, first = [], 0
        for number, block in enumerate(self.blocks):
            stop = first + len(block.parts)
            out.append(CheckedBlock(crcs[first:stop], results[first:stop], misfits.get(number)))
            first = stop
        return out


def _misfit_of(block: DeviceBlock, one: _Range, last: Words, totals: Words) -> Misfit | None:
    """Returns why the changes of a range of keys do not fit the elements, of which there are ``totals``."""
    assert block.counts is not None
    counts = block.counts[one.key : one.key + one.keys]
    coded, dense = counts >> 1, counts & 1 == 1
    if np.any(dense & (coded < totals)):
        return Misfit.FEWER
    left = np.where(dense, coded > totals, (coded > 0) & (last >= totals))
    return Misfit.LEFT if left.any() else None


@dataclass
class _Slot:
    """Pinned memory, which grows on demand, and whether a batch uses it."""

    memory: HostMemory | None = None
    busy: bool = False


class Changes:
    """A queue for changes. Implements `interface.DeviceChanges`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._tables: dict[int, Memory] = {}
        self._slots = [_Slot(), _Slot()]

    def finish(self) -> None:
        """Implements `interface.DeviceChanges`."""
        self._device.mark().wait()

    def _staging(self, size: int) -> tuple[_Slot, HostMemory]:
        """Returns pinned memory that no batch uses, of at least ``size`` bytes."""
        slot = next(slot for slot in self._slots if not slot.busy)
        if slot.memory is None or len(slot.memory.bytes) < size:
            slot.memory = None  # frees the old memory first
            slot.memory = self._device.pin(size)
        return slot, slot.memory

    def _tables_for(self, item: int) -> int:
        """Returns the address of the tables for elements of ``item`` bytes."""
        if item not in self._tables:
            data = sum_tables(item).view(np.uint8)
            memory, staging = self._device.allocate(len(data)), self._device.pin(len(data))
            staging.bytes[:] = data
            self._device.copy(memory.address, staging.address, len(data))
            self.finish()  # the pinned memory is freed on return
            self._tables[item] = memory
        return self._tables[item].address

    def checksums(self, parts: Sequence[DevicePart], item: int) -> list[int]:
        """Implements `interface.DeviceChanges`."""
        pieces = [
            part._replace(
                address=part.address + start * item, elements=min(_MOST_ELEMENTS, part.elements - start)
            )
            for part in parts
            for start in range(0, part.elements, _MOST_ELEMENTS)
        ]
        found: list[int] = []
        while len(found) < len(pieces):
            some: list[DevicePart] = []
            tiles = 0
            for piece in pieces[len(found) :]:
                tiles += -(-piece.elements // layout.TILE_ELEMENTS)
                if some and tiles > _MOST_TILES:
                    break
                some.append(piece)
            found += self._checksums(some, item)
        out = []
        numbers = iter(zip(found, pieces, strict=True))
        for part in parts:
            crc, left = 0, part.elements
            while left:
                one, piece = next(numbers)
                crc = combined(crc, one, piece.elements * item)
                left -= piece.elements
            out.append(crc)
        return out

    def _checksums(self, parts: Sequence[DevicePart], item: int) -> list[int]:
        nothing = np.zeros(0, np.uint32)
        pending = self.start([DeviceBlock([part], None, nothing, nothing) for part in parts], _plain(item))
        checked, _ = pending.wait()
        return [one.bases[0] for one in checked]

    def bytes_of(self, block: DeviceBlock, kind: ElementKind) -> int:
        """Implements `interface.DeviceChanges`."""
        tiles = sum(-(-part.elements // layout.TILE_ELEMENTS) for part in block.parts)
        ranges = _ranges_of(block.counts)
        changes = len(block.levels) if ranges else 0
        keys = sum(keys for _, keys in ranges)
        each = layout.CHANGE_TILE.itemsize + 8
        return tiles * (max(len(ranges), 1) * each + 4 * keys) + changes * (8 + kind.bits // 8) + 8 * keys

    def start(self, blocks: Sequence[DeviceBlock], kind: ElementKind) -> Pending:
        """Implements `interface.DeviceChanges`."""
        plan = _plan_of(blocks, kind.bits // 8)
        tables = self._tables_for(plan.item)
        kept, copied, returned = sum(plan.kept_sizes), sum(plan.copied_sizes), sum(plan.returned_sizes)
        size = copied + 4 * plan.counted + returned
        # Without the places, which the device writes.
        own = kept - plan.kept_sizes[2]
        slot, staging = self._staging(max(own + copied, returned))
        placed = Placed(self._device.allocate(kept), len(plan.tiles), plan.changes, plan.item)
        memory = self._device.allocate(size)
        counts = memory.address + copied + returned
        last = _fill(staging.bytes, own, plan, blocks, kind, memory.address, counts)
        slot.busy = True
        pending = Pending(self._device, tables, slot, blocks, plan, last, placed, memory, kept + size)
        self._device.copy(placed.memory.address, staging.address, own)
        self._device.copy(memory.address, staging.address + own, copied)
        pending.find()
        self._device.copy(staging.address, memory.address + copied, returned)
        pending.mark = self._device.mark()
        return pending

    def flip(self, changes: PlacedChanges) -> None:
        """Implements `interface.DeviceChanges`."""
        assert isinstance(changes, Placed)
        if not changes.changes:
            return
        tiles_size, patterns_size, _ = changes.sizes
        address = changes.memory.address
        places = address + tiles_size + patterns_size
        arguments = [address, places, address + tiles_size, changes.changes, changes.item]
        self._device.launch("flip_elements", -(-changes.changes // layout.THREADS), arguments)

    def fetch(self, changes: PlacedChanges) -> Bytes:
        """Implements `interface.DeviceChanges`."""
        assert isinstance(changes, Placed)
        header = np.array([changes.tiles, changes.changes, changes.item], np.int64).view(np.uint8)
        _, staging = self._staging(changes.nbytes)
        self._device.copy(staging.address, changes.memory.address, changes.nbytes)
        self.finish()
        return np.concatenate([header, staging.bytes[: changes.nbytes]])

    def put(self, data: Bytes) -> Placed:
        """Implements `interface.DeviceChanges`."""
        tiles, changes, item = data[:24].view(np.int64).tolist()
        size = len(data) - 24
        placed = Placed(self._device.allocate(size), tiles, changes, item)
        _, staging = self._staging(size)
        staging.bytes[:size] = data[24:]
        self._device.copy(placed.memory.address, staging.address, size)
        self.finish()
        return placed


def _plain(item: int) -> ElementKind:
    return ElementKind(8 * item, 0)


def _fill(
    out: Bytes,
    at: int,
    plan: _Plan,
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
