"""Finds and makes the changes of a delta in the memory of a device: `device_interface.DeviceChanges`.

A batch of blocks is one copy to the device, three launches, and one copy back. ``kernels/source/changes.cuh``
says how the kernels work, and `change_plans` which memory they use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...coding.bits import Bytes
from ...coding.changes import ElementKind
from ...io.checksum import combined
from ..device_interface import CheckedBlock, DeviceBlock, DevicePart, Misfit, PlacedChanges
from . import layout
from .change_checksums import MOST_ELEMENTS, Words, crc_of_zeros, joined_sums, sum_tables
from .change_plans import Plan, fill, misfit_of, plan_of, ranges_of, sizes_kept
from .device import Device, HostMemory, Mark, Memory

# Parts whose checksums are computed in one launch have at most this many tiles.
_MOST_TILES = 1 << 16


@dataclass
class Placed:
    """Changes on the device. Implements `device_interface.PlacedChanges`.

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
        return sizes_kept(self.tiles, self.changes, self.item)

    @property
    def nbytes(self) -> int:
        """Implements `device_interface.PlacedChanges`."""
        return sum(self.sizes)


@dataclass
class Pending:
    """A running batch. Implements `device_interface.PendingBlocks`.

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
    plan: Plan
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
        """Implements `device_interface.PendingBlocks`."""
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
            misfit = misfit_of(self.blocks[one.block], one, last, totals[at : at + one.keys])
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
        crcs = [one ^ crc_of_zeros(size * item) for one, size in zip(before, elements.tolist(), strict=True)]
        results = [crc ^ one for crc, one in zip(crcs, difference, strict=True)]
        out, first = [], 0
        for number, block in enumerate(self.blocks):
            stop = first + len(block.parts)
            out.append(CheckedBlock(crcs[first:stop], results[first:stop], misfits.get(number)))
            first = stop
        return out


@dataclass
class _Slot:
    """Pinned memory, which grows on demand, and whether a batch uses it."""

    memory: HostMemory | None = None
    busy: bool = False


class Changes:
    """A queue for changes. Implements `device_interface.DeviceChanges`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._tables: dict[int, Memory] = {}
        self._slots = [_Slot(), _Slot()]

    def finish(self) -> None:
        """Implements `device_interface.DeviceChanges`."""
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
        """Implements `device_interface.DeviceChanges`."""
        pieces = [
            part._replace(
                address=part.address + start * item, elements=min(MOST_ELEMENTS, part.elements - start)
            )
            for part in parts
            for start in range(0, part.elements, MOST_ELEMENTS)
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
        """Implements `device_interface.DeviceChanges`."""
        tiles = sum(-(-part.elements // layout.TILE_ELEMENTS) for part in block.parts)
        ranges = ranges_of(block.counts)
        changes = len(block.levels) if ranges else 0
        keys = sum(keys for _, keys in ranges)
        each = layout.CHANGE_TILE.itemsize + 8
        return tiles * (max(len(ranges), 1) * each + 4 * keys) + changes * (8 + kind.bits // 8) + 8 * keys

    def start(self, blocks: Sequence[DeviceBlock], kind: ElementKind) -> Pending:
        """Implements `device_interface.DeviceChanges`."""
        plan = plan_of(blocks, kind.bits // 8)
        tables = self._tables_for(plan.item)
        kept, copied, returned = sum(plan.kept_sizes), sum(plan.copied_sizes), sum(plan.returned_sizes)
        size = copied + 4 * plan.counted + returned
        # Without the places, which the device writes.
        own = kept - plan.kept_sizes[2]
        slot, staging = self._staging(max(own + copied, returned))
        placed = Placed(self._device.allocate(kept), len(plan.tiles), plan.changes, plan.item)
        memory = self._device.allocate(size)
        counts = memory.address + copied + returned
        last = fill(staging.bytes, own, plan, blocks, kind, memory.address, counts)
        slot.busy = True
        pending = Pending(self._device, tables, slot, blocks, plan, last, placed, memory, kept + size)
        self._device.copy(placed.memory.address, staging.address, own)
        self._device.copy(memory.address, staging.address + own, copied)
        pending.find()
        self._device.copy(staging.address, memory.address + copied, returned)
        pending.mark = self._device.mark()
        return pending

    def flip(self, changes: PlacedChanges) -> None:
        """Implements `device_interface.DeviceChanges`."""
        assert isinstance(changes, Placed)
        if not changes.changes:
            return
        tiles_size, patterns_size, _ = changes.sizes
        address = changes.memory.address
        places = address + tiles_size + patterns_size
        arguments = [address, places, address + tiles_size, changes.changes, changes.item]
        self._device.launch("flip_elements", -(-changes.changes // layout.THREADS), arguments)

    def fetch(self, changes: PlacedChanges) -> Bytes:
        """Implements `device_interface.DeviceChanges`."""
        assert isinstance(changes, Placed)
        header = np.array([changes.tiles, changes.changes, changes.item], np.int64).view(np.uint8)
        _, staging = self._staging(changes.nbytes)
        self._device.copy(staging.address, changes.memory.address, changes.nbytes)
        self.finish()
        return np.concatenate([header, staging.bytes[: changes.nbytes]])

    def put(self, data: Bytes) -> Placed:
        """Implements `device_interface.DeviceChanges`."""
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
