"""Applies deltas to tensors in the memory of a device, all or nothing (R-DLT-015).

The device compares checksums of the base, finds the changed elements of each block and the checksum of the
result. It keeps the place of each change, and the bits that it flips. Only after all checks does it flip
them; to restore the base, it flips them again.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple

import numpy as np

from ..coding.bits import as_bytes
from ..coding.changes import kind_of
from ..container.delta_map import DeltaTensor
from ..dtypes import Dtype
from ..engines import CheckedBlock, DeviceBlock, DeviceChanges, DevicePart, PendingBlocks, PlacedChanges
from ..errors import FileFault, PartlyChangedError, fault
from ..io.closing import Closing
from ..names import listed
from .applying import check_stored, of_members
from .reading import Delta, Part, PoolChanges, misfit_words

# Memory of the device for changes: of the batches that it works on, unless a block needs more; and of those
# that are kept. Further changes are kept in a temporary file, of which the host has this much in memory.
_WORKING_BYTES = 24 << 20
_KEPT_BYTES = 16 << 20
_IN_MEMORY = 16 << 20
# Batches that the device works on while the host decodes the next, and the most blocks and elements of each.
_RUNNING = 2
_MOST_BLOCKS = 1 << 10
_MOST_ELEMENTS = 1 << 28


class DeviceTensor(NamedTuple):
    """A contiguous tensor in the memory of a device.

    Attributes:
        address: the address of its first element.
        dtype: its dtype.
        nbytes: its size in bytes.
    """

    address: int
    dtype: Dtype
    nbytes: int


class _Kept(NamedTuple):
    """Changes that are kept: on the device, or from an offset in the temporary file on."""

    tensors: tuple[str, ...]
    changes: PlacedChanges | None
    offset: int
    nbytes: int


class _Running(NamedTuple):
    """A batch that the device works on."""

    blocks: Sequence[int]
    pending: PendingBlocks


class DeviceChange(Closing):
    """Checks and applies a delta to tensors in the memory of a device. A context manager.

    Attributes:
        tensors: name -> a tensor of the base. All changed ones, which are written, and others.
        others: name -> a function that returns the CRC-32 of a tensor of the base that is elsewhere.
    """

    def __init__(
        self,
        delta: Delta,
        tensors: Mapping[str, DeviceTensor],
        others: Mapping[str, Callable[[], int]],
        changes: DeviceChanges,
    ) -> None:
        self._delta, self.tensors, self.others, self._changes = delta, tensors, others, changes
        with ExitStack() as stack:
            self._file = stack.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY))
            self._stack = stack.pop_all()  # `close` closes the file
        self._kept: list[_Kept] = []
        self._room = _KEPT_BYTES
        self._done = 0  # kept changes that were made

    def close(self) -> None:
        """Forgets all changes."""
        self._kept = []
        self._stack.close()

    def check(self) -> None:
        """Makes all checks: of the base, of the delta, and of the result's checksums. Changes nothing.

        Raises:
            BaseMismatchError, InvalidFileError, LimitError: a check failed.
            OSError: the delta cannot be read, or the temporary file cannot be written.
        """
        try:
            self._check()
        except BaseException:
            # Running copies use memory that the caller frees next. A device that failed raised its error.
            with suppress(Exception):
                self._changes.finish()
            raise

    def _check(self) -> None:
        of_pools = {tensor.name for members in self._delta.map.members() for tensor in members}
        rest = [tensor for tensor in self._delta.map.tensors if tensor.name not in of_pools]
        own = self._checksums([tensor for tensor in rest if tensor.name in self.tensors])
        for tensor in rest:
            if tensor.name in own:
                self._delta.require_checksum(tensor, own[tensor.name])
            elif tensor.name in self.others:
                self._delta.require_checksum(tensor, self.others[tensor.name]())
        written: set[int] = set()
        for pool in self._delta.pools():
            self._check_pool(pool, written)
        for tensor in self._delta.map.tensors:
            if tensor.kind in ("replaced", "added"):
                check_stored(self._delta, tensor)

    def _checksums(self, tensors: Sequence[DeltaTensor]) -> dict[str, int]:
        """Returns the CRC-32 of tensors of the base."""
        by_width: dict[int, dict[str, DevicePart]] = {}
        out = {tensor.name: 0 for tensor in tensors}
        for name in out:
            own = self.tensors[name]
            item = kind_of(own.dtype).bits // 8
            if own.nbytes:
                part = DevicePart(own.address, own.nbytes // item, False, own.dtype.name == "BOOL")
                by_width.setdefault(item, {})[name] = part
        for item, parts in by_width.items():
            out |= zip(parts, self._changes.checksums(list(parts.values()), item), strict=True)
        return out

    def _check_pool(self, pool: PoolChanges, written: set[int]) -> None:
        """Checks a pool. ``written``: the addresses of all tensors that are changed; of several, one is."""
        owned = []
        for member in pool.members:
            address = self.tensors[member.name].address
            owned.append(address not in written)
            written.add(address)
        parts = [pool.parts(block) for block in range(pool.blocks)]
        checked: dict[int, CheckedBlock] = {}
        faults: dict[int, FileFault] = {}
        running: deque[_Running] = deque()
        at = 0
        while at < pool.blocks or running:
            batch: list[DeviceBlock] = []
            if at < pool.blocks and len(running) < _RUNNING:
                batch = self._batch(pool, parts, at, owned, not running, faults)
            if batch:
                numbers = range(at, at + len(batch))
                running.append(_Running(numbers, self._changes.start(batch, pool.kind)))
                at += len(batch)
                continue
            checked |= self._finished(pool, parts, running.popleft())
        for block, one in checked.items():
            if one.misfit is not None:
                words = misfit_words(block, one.misfit)
                faults[block] = fault("R-DLT-011", words, tensor=pool.pool.differences, offset=pool.offset)
        bases = of_members(pool, ((parts[block], checked[block].bases) for block in range(pool.blocks)))
        for tensor, base in zip(pool.members, bases, strict=True):
            self._delta.require_checksum(tensor, base)
        for block in sorted(faults):
            raise faults[block]
        results = of_members(pool, ((parts[block], checked[block].results) for block in range(pool.blocks)))
        for tensor, result in zip(pool.members, results, strict=True):
            self._delta.require_result(tensor, result)

    def _batch(
        self,
        pool: PoolChanges,
        parts: Sequence[Sequence[Part]],
        first: int,
        owned: Sequence[bool],
        alone: bool,
        faults: dict[int, FileFault],
    ) -> list[DeviceBlock]:
        """Returns the blocks from ``first`` on that fit into memory.

        If the device works on no other batch (``alone``), returns at least one. Adds the faults of blocks
        whose numbers cannot be read.
        """
        out: list[DeviceBlock] = []
        room, elements = _WORKING_BYTES // _RUNNING, _MOST_ELEMENTS
        for block in range(first, min(first + _MOST_BLOCKS, pool.blocks)):
            one = self._block(pool, block, parts[block], owned, faults)
            room -= self._changes.bytes_of(one, pool.kind)
            elements -= sum(part.elements for part in one.parts)
            if min(room, elements) < 0 and (out or not alone):
                break
            out.append(one)
        return out

    def _block(
        self,
        pool: PoolChanges,
        block: int,
        parts: Sequence[Part],
        owned: Sequence[bool],
        faults: dict[int, FileFault],
    ) -> DeviceBlock:
        item = pool.kind.bits // 8
        places = []
        for part in parts:
            address = self.tensors[pool.members[part.member].name].address + part.start * item
            places.append(DevicePart(address, part.stop - part.start, owned[part.member]))
        nothing = DeviceBlock(places, None, np.zeros(0, np.uint32), np.zeros(0, pool.kind.pattern))
        try:
            counts, gaps, levels = pool.numbers_of(block)
        except FileFault as error:  # a wrong base is reported first
            faults[block] = error
            return nothing
        return DeviceBlock(places, counts, gaps, levels) if counts.any() else nothing

    def _finished(
        self, pool: PoolChanges, parts: Sequence[Sequence[Part]], one: _Running
    ) -> dict[int, CheckedBlock]:
        """Waits for a batch, and keeps its changes. Returns block -> its checks."""
        results, placed = one.pending.wait()
        self._keep(pool, [parts[block] for block in one.blocks], placed)
        return dict(zip(one.blocks, results, strict=True))

    def _keep(
        self, pool: PoolChanges, blocks: Sequence[Sequence[Part]], placed: PlacedChanges | None
    ) -> None:
        if placed is None:
            return
        members = sorted({part.member for parts in blocks for part in parts})
        names = tuple(pool.members[member].name for member in members)
        if placed.nbytes <= self._room:
            self._room -= placed.nbytes
            self._kept.append(_Kept(names, placed, 0, placed.nbytes))
            return
        data = self._changes.fetch(placed)
        self._kept.append(_Kept(names, None, self._file.seek(0, 2), len(data)))
        self._file.write(data.data)

    def apply(self, changes: DeviceChanges) -> None:
        """Makes all changes, or none. `check` has succeeded, and the tensors have not changed since.

        Args:
            changes: a queue of the calling thread, on the same stream.

        Raises:
            OSError, EngineError: the temporary file cannot be read, or the device failed. The elements were
                restored.
            PartlyChangedError: in addition, elements could not be restored.
        """
        try:
            # Those in the file first, because reading can fail.
            self._kept.sort(key=lambda one: one.changes is not None)
            for one in self._kept:
                self._flip(changes, one)
                self._done += 1
            changes.finish()
        except BaseException:
            self.restore(changes)
            raise

    def restore(self, changes: DeviceChanges) -> None:
        """Restores the elements that were changed.

        Raises:
            PartlyChangedError: some could not be restored. Names their tensors.
        """
        failed: list[str] = []
        for one in reversed(self._kept[: self._done]):
            try:
                self._flip(changes, one)
                changes.finish()
            except Exception:  # the others are still restored
                failed += one.tensors
        self._done = 0
        if failed:
            names = tuple(sorted(set(failed)))
            raise PartlyChangedError(
                f"the delta was applied to a part of {listed(names)}, which cannot be restored on the "
                "device; load the tensors again. All others have the elements of the base",
                names,
            )

    def _flip(self, changes: DeviceChanges, kept: _Kept) -> None:
        placed = kept.changes
        if placed is None:
            self._file.seek(kept.offset)
            data = self._file.read(kept.nbytes)
            if len(data) != kept.nbytes:
                raise OSError("the temporary file is too short")
            placed = changes.put(as_bytes(data))
        changes.flip(placed)
