"""Applies deltas to arrays in place: first makes all checks, then all changes (R-DLT-015)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..coding.changes import Patterns, kind_of
from ..container.delta_map import DeltaMap, DeltaTensor
from ..dtypes import Dtype, of_numpy
from ..errors import FileFault, MismatchError, placed
from ..io.checksum import combined, crc32
from ..io.source import Readable
from ..io.threads import for_each
from ..limits import DEFAULT_LIMITS, Limits
from ..names import quoted, require_mapping
from .checksums import checksum_of
from .journal import Journal
from .reading import Delta, Found, Part, PoolChanges
from .tensors import Array, ArrayTensors, patterns_of

# Changes are kept from check to application up to this many bytes; those of further blocks are found again.
_KEPT_BYTES = 16 << 20
# Bytes of the changes that all threads work on at a time.
_WORKING_BYTES = 24 << 20


def apply_delta(
    target: MutableMapping[str, Array],
    delta: Readable | Delta,
    *,
    engine: str | None = None,
    threads: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> DeltaMap:
    """Changes arrays by name from the base of a delta to its result, in place. Changes all of them or none.

    ``apply_delta(arrays, "step-18.sfp")``

    Makes all checks before the first change. Writes into the arrays of changed tensors, and of replaced
    tensors that keep dtype and shape; other replaced and added tensors become new arrays in ``target``.
    Besides these arrays, needs at most 64 MB of memory, for elements of up to 16 bits and blocks of the
    default size. Wider elements and larger blocks need more. So do arrays that share memory: their changes
    are kept until all checks are made.

    Args:
        target: name -> array, in C order and writable. It must have exactly the tensors of the base.
        delta: the delta, as for `sfpformat.open`, or an open `Delta`.
        engine, threads, limits: same as for `sfpformat.open`.

    Returns:
        What the delta says about the tensors.

    Raises:
        BaseMismatchError: the target is not the base of the delta: it is another model, it is the result
            already, or deltas between are missing. Nothing was changed.
        MismatchError: an array cannot be changed in place. Nothing was changed.
        InvalidFileError, UnsupportedError, LimitError: the delta is damaged. Nothing was changed.
        OptionError: the file is not a delta, or stores masks, levels or importances.
        OSError: the delta cannot be read, or old elements cannot be kept in a temporary file. Nothing was
            changed: what was changed before the error is restored.
        PartlyChangedError: elements could not be restored after such an error. Names their tensors.
    """
    require_mapping(target, "target")
    if not isinstance(delta, Delta):
        with Delta(delta, limits=limits, engine=engine, threads=threads) as opened:
            return apply_delta(target, opened, threads=threads)
    delta.require_elements()
    delta.require_base(ArrayTensors(target).specs)
    in_place = {t.name for t in delta.map.tensors if t.name in target and stays_in_place(t, target[t.name])}
    change = Change(delta, _views_of(target, delta.map), in_place, threads or os.cpu_count() or 1)
    change.check()
    new = {
        tensor.name: delta.stored(tensor)
        for tensor in delta.map.tensors
        if tensor.kind in ("replaced", "added") and tensor.name not in change.in_place
    }

    def finish() -> None:
        change.apply()
        for name, array in new.items():
            target[name] = array
        for tensor in delta.map.tensors:
            if tensor.kind == "removed":
                del target[tensor.name]

    uninterrupted(finish)
    return delta.map


def _views_of(target: Mapping[str, Array], map_: DeltaMap) -> dict[str, Patterns]:
    """Returns the patterns of the arrays of a target; those to be changed in place share its memory.

    Raises:
        MismatchError: an array cannot be changed in place.
    """
    out: dict[str, Patterns] = {}
    for tensor in map_.tensors:
        array = target.get(tensor.name)
        if array is None:
            continue
        if tensor.kind == "changed" or stays_in_place(tensor, array):
            require_changeable(tensor.name, array, tensor)
            out[tensor.name] = memory_patterns(array, tensor.dtype)
        else:
            dtype = of_numpy(array.dtype)
            assert dtype is not None
            out[tensor.name] = patterns_of(array, dtype)
    return out


def stays_in_place(tensor: DeltaTensor, array: Array) -> bool:
    """Returns whether a replaced tensor is written into the array of the base."""
    return tensor.kind == "replaced" and (array.dtype, array.shape) == (tensor.dtype.numpy, tensor.shape)


def memory_patterns(array: Array, dtype: Dtype) -> Patterns:
    """Returns the patterns of an array that can be changed in place, in its memory."""
    return array.reshape(-1).view(kind_of(dtype).pattern)


def require_changeable(name: str, array: Array, tensor: DeltaTensor) -> None:
    """Raises MismatchError unless an array can be changed in place."""
    flags = array.flags
    if not (flags.c_contiguous and flags.writeable and array.dtype == tensor.dtype.numpy):
        raise MismatchError(
            f"tensor {quoted(name)}: to be changed in place, the array must be {tensor.dtype.numpy}, "
            "in C order, writable"
        )


def uninterrupted(work: Callable[[], None]) -> None:
    """Calls ``work`` to its end, even if the user interrupts it; raises `KeyboardInterrupt` afterwards."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised again below
            failure.append(error)

    worker = threading.Thread(target=run)
    worker.start()
    interrupted: KeyboardInterrupt | None = None
    while worker.is_alive():
        try:
            worker.join()
        except KeyboardInterrupt as error:
            interrupted = error
    if failure:
        raise failure[0]
    if interrupted is not None:
        raise interrupted


@dataclass
class _Checked:
    """The result of checking a block.

    Attributes:
        parts: its parts.
        bases, results: CRC-32 of each part in the base and in the result.
        fault: why the delta does not fit the base's elements, or None.
    """

    parts: list[Part]
    bases: list[int] = field(default_factory=list)
    results: list[int] = field(default_factory=list)
    fault: FileFault | None = None


class Change:
    """Checks and applies a delta to the patterns of arrays.

    Attributes:
        views: name -> the patterns of a tensor of the base, [elements]. Those of changed tensors are written.
        in_place: names of the replaced tensors that are written, too.
    """

    def __init__(self, delta: Delta, views: dict[str, Patterns], in_place: set[str], threads: int) -> None:
        self._delta, self.views, self.in_place, self._threads = delta, views, in_place, threads
        self._found: dict[tuple[int, int], list[Found]] = {}  # pool, block -> its changes
        self._room = _KEPT_BYTES
        self._lock = threading.Lock()
        self._shared = self._shares_memory()

    def check(self) -> None:
        """Makes all checks: of the base, of the delta, and of the result's checksums. Changes nothing.

        Raises:
            BaseMismatchError, InvalidFileError, LimitError: a check failed.
        """
        of_pools = {tensor.name for members in self._delta.map.members() for tensor in members}
        for tensor in self._delta.map.tensors:
            if tensor.name in self.views and tensor.name not in of_pools:
                self._delta.require_checksum(tensor, checksum_of(self.views[tensor.name], self._threads))
        for number, pool in enumerate(self._delta.pools()):
            self._check_pool(number, pool)
        for tensor in self._delta.map.tensors:
            if tensor.kind in ("replaced", "added"):
                check_stored(self._delta, tensor)

    def _shares_memory(self) -> bool:
        """Returns whether two tensors, such as tied weights, have the same memory.

        Their changes are then kept until they are made: after the changes of one, those of the other could
        not be found again.

        Raises:
            MismatchError: two tensors share memory, but the delta does not change them in the same way.
        """
        listed = {tensor.name: tensor for tensor in self._delta.map.tensors}
        places = sorted((_address(view), view.nbytes, name) for name, view in self.views.items() if view.size)
        shared = False
        end, last = 0, ""
        for address, size, name in places:
            if address < end:
                one, other = listed[last], listed[name]
                same = (address, size) == (_address(self.views[last]), self.views[last].nbytes)
                written = {"changed", "replaced"} & {one.kind, other.kind}
                if written and not (same and one.result == other.result):
                    words = "share memory, but differ in the result of the delta"
                    raise MismatchError(f"{quoted(last)} and {quoted(name)} {words}")
                shared |= same
            if address + size > end:
                end, last = address + size, name
        return shared

    def _check_pool(self, number: int, pool: PoolChanges) -> None:
        checked = [_Checked(pool.parts(block)) for block in range(pool.blocks)]

        def block(index: int) -> None:
            self._check_block(number, pool, index, checked[index])

        for_each(block, range(pool.blocks), self._threads_for(pool))
        bases = of_members(pool, ((one.parts, one.bases) for one in checked))
        for member, base in zip(pool.members, bases, strict=True):
            self._delta.require_checksum(member, base)
        for one in checked:
            if one.fault is not None:
                raise one.fault
        results = of_members(pool, ((one.parts, one.results) for one in checked))
        for member, result in zip(pool.members, results, strict=True):
            self._delta.require_result(member, result)

    def _check_block(self, number: int, pool: PoolChanges, block: int, out: _Checked) -> None:
        found: list[Found] = []
        views = self._parts(pool, out.parts)
        parts = iter(views)

        def checked() -> Iterator[Patterns]:
            for part in parts:
                out.bases.append(crc32(part.data))
                yield part  # the processor's cache still has it

        try:
            for part, changes in zip(views, pool.find(block, checked(), self._delta.engine), strict=True):
                out.results.append(self._delta.engine.crc32_with(part, *changes, out.bases[-1]))
                found.append(changes)
        except FileFault as error:  # a wrong base is reported first
            out.fault = error
            out.bases.extend(crc32(part.data) for part in parts)
            return
        size = sum(changes.positions.nbytes + changes.values.nbytes for changes in found)
        with self._lock:
            if self._shared or self._room >= size:
                self._room -= size
                self._found[number, block] = found

    def _threads_for(self, pool: PoolChanges) -> int:
        """Returns a number of threads whose blocks fit into memory."""
        largest = int(pool.changed.max(initial=0)) * (4 + pool.kind.bits // 8)
        return max(min(self._threads, pool.blocks, _WORKING_BYTES // max(largest, 1)), 1)

    def _parts(self, pool: PoolChanges, parts: list[Part]) -> list[Patterns]:
        return [self.views[pool.members[part.member].name][part.start : part.stop] for part in parts]

    def apply(self) -> None:
        """Makes all changes, or none. `check` has succeeded, and the arrays have not changed since.

        Changes that were not kept are decoded again. Makes these first, and keeps the old elements, to
        restore them if the delta can no longer be read.

        Raises:
            InvalidFileError, OSError: the delta cannot be read again. Nothing is changed.
            PartlyChangedError: in addition, elements could not be restored.
        """
        with Journal() as journal:
            try:
                self._apply_unkept(journal)
                self._apply_replaced(journal)
            except BaseException:
                journal.restore()
                raise
        self._apply_kept()

    def _apply_unkept(self, journal: Journal) -> None:
        for number, pool in enumerate(self._delta.pools()):

            def block(index: int, pool: PoolChanges = pool) -> None:
                parts = pool.parts(index)
                base = self._parts(pool, parts)
                found = pool.find(index, base, self._delta.engine)
                for part, view, changes in zip(parts, base, found, strict=True):
                    journal.keep(pool.members[part.member].name, view, changes.positions)
                    self._delta.engine.write_changes(view, *changes)

            blocks = [index for index in range(pool.blocks) if (number, index) not in self._found]
            for_each(block, blocks, self._threads_for(pool))

    def _apply_replaced(self, journal: Journal) -> None:
        replaced = {
            tensor.name: self.views[tensor.name].view(tensor.dtype.numpy).reshape(tensor.shape)
            for tensor in self._delta.map.tensors
            if tensor.name in self.in_place
        }
        for name, array in replaced.items():
            journal.keep(name, self.views[name])
            self._delta.file.read_into({name: array})

    def _apply_kept(self) -> None:
        """Makes the changes that are in memory, which cannot fail."""
        written: set[int] = set()
        for number, pool in enumerate(self._delta.pools()):
            owned = []
            for member in pool.members:  # of arrays that share memory, changes one
                address = _address(self.views[member.name])
                owned.append(address not in written)
                written.add(address)

            def block(
                index: int, number: int = number, pool: PoolChanges = pool, owned: list[bool] = owned
            ) -> None:
                parts, found = pool.parts(index), self._found[number, index]
                for part, view, changes in zip(parts, self._parts(pool, parts), found, strict=True):
                    if owned[part.member]:
                        self._delta.engine.write_changes(view, *changes)

            blocks = [index for index in range(pool.blocks) if (number, index) in self._found]
            for_each(block, blocks, self._threads_for(pool))


def check_stored(delta: Delta, tensor: DeltaTensor) -> None:
    """Checks a tensor that is stored whole, in parts of a few rows.

    Raises:
        InvalidFileError, LimitError: the tensor is damaged, or exceeds a limit.
    """
    rows = tensor.shape[0] if tensor.shape else 1
    size = max((1 << 22) * max(rows, 1) // max(tensor.nbytes, 1), 1)
    crc = 0
    with placed(tensor=tensor.name):
        lazy = delta.file.get_slice(tensor.name)
        for row in range(0, rows, size) if tensor.shape else (0,):
            part = lazy[row : row + size] if tensor.shape else lazy[...]
            data = patterns_of(part, tensor.dtype)
            crc = crc32(data.data, crc)
    delta.require_result(tensor, crc)


def of_members(pool: PoolChanges, blocks: Iterable[tuple[list[Part], list[int]]]) -> list[int]:
    """Returns the CRC-32 of each tensor of a pool, given the parts of all blocks and their CRC-32."""
    out = [0] * len(pool.members)
    for parts, checksums in blocks:
        for part, crc in zip(parts, checksums, strict=True):
            size = (part.stop - part.start) * pool.kind.bits // 8
            out[part.member] = combined(out[part.member], crc, size)
    return out


def _address(view: NDArray[np.generic]) -> int:
    return int(view.__array_interface__["data"][0]) if view.size else 0
