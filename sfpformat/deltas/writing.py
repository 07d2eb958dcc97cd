"""Writes deltas (SPEC.md chapter 28), tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import reduce
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..coding.changes import NOTHING, Changes, ElementKind, Extent, Patterns, kind_of
from ..container.delta_map import MAX_BLOCK, DeltaMap, DeltaTensor, Pool
from ..container.delta_parts import part_name
from ..decode.parts import Parts
from ..dtypes import DTYPES, Dtype
from ..encode.arguments import require_name
from ..encode.sink import Target
from ..encode.writer import Writer
from ..engines import Engine, get_engine
from ..errors import ClosedFileError, OptionError
from ..io.checksum import crc32
from ..limits import DEFAULT_LIMITS, Limits
from ..names import quoted
from .checksums import checksum_of, joined, of_parts
from .tensors import Array, Spec, patterns_of, spec_of

# Elements per block: many enough that its changes fill segments of one exponent, few enough for many threads
# (figures in tests/figures/README.md).
BLOCK = 1 << 22
# A pool with more bytes of differences is closed. This bounds the memory of the writer. To keep the bytes of
# the file independent of threads, it is checked after this many elements, when all blocks so far are coded.
_POOL_BYTES, _CHECKED = 1 << 28, 1 << 26
# If more than one in this many elements of a bucket changed, the bucket is dense.
_DENSE = 2


class Coded(NamedTuple):
    """The coded differences of a block.

    Attributes:
        counts: for each key 2 × number of levels + (1 if dense), uint32 [keys].
        gaps: uint32 [gaps].
        levels: [levels].
    """

    counts: NDArray[np.uint32]
    gaps: NDArray[np.uint32]
    levels: Patterns


@dataclass
class _OpenPool:
    """A pool to which tensors are added.

    Attributes:
        dtype: the dtype of its tensors.
        tensors: number of its tensors.
        unchecked: elements since its size was last compared with `_POOL_BYTES`.
        room: elements left in the current block.
        parts: the parts of the current block: elements in the base and in the result.
        extent: the extent of their changes.
        coded: the coded blocks.
    """

    dtype: Dtype
    room: int
    tensors: int = 0
    unchecked: int = 0
    parts: list[tuple[Patterns, Patterns]] = field(default_factory=list)
    extent: Extent = NOTHING
    coded: list[Future[Coded] | Coded] = field(default_factory=list)


class DeltaWriter:
    """Writes a delta. A context manager: after an exception in its block, the target is unchanged.

    ``with DeltaWriter("d.sfp") as w: w.add("weight", old, new)``
    """

    def __init__(
        self,
        target: Target,
        *,
        base_name: str | None = None,
        metadata: dict[str, str] | None = None,
        block: int = BLOCK,
        separator: str = "/",
        shard: int | None = None,
        engine: str | None = None,
        threads: int | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """Starts a file.

        Args:
            target: same as for `Writer`.
            base_name: a name of the base, for people. It is not checked.
            metadata: the strings of the result.
            block: elements per block, 1 to 2^24. A reader needs the base's elements of whole blocks.
            separator: what stands between the names of a tensor and of its parts, for `add_parts`. No other
                tensor may have the name of a part.
            shard: the number of the shard, from 1, if the delta has several; see `write_delta_index`. None
                for a delta in one file.
            engine, threads, limits: same as for `Writer`.

        Raises:
            OptionError: an argument is invalid, or the target cannot be written.
            EngineError: the engine is unknown or not available.
            OSError: the temporary file cannot be created.
        """
        if not isinstance(block, int) or not 1 <= block <= MAX_BLOCK:
            raise OptionError(f"block is {block!r}, must be a number from 1 to {MAX_BLOCK}")
        if shard is not None and (not isinstance(shard, int) or shard < 1):
            raise OptionError(f"shard is {shard!r}, must be a number from 1")
        if base_name is not None and (not isinstance(base_name, str) or "\0" in base_name):
            raise OptionError(f"base_name is {base_name!r}, must be a string without U+0000")
        self._threads = threads or os.cpu_count() or 1
        self._writer = Writer(target, metadata=metadata, engine=engine, threads=threads, limits=limits)
        self._pool_of_threads = ThreadPoolExecutor(self._threads) if self._threads > 1 else None
        self._base_name, self._block, self._engine, self._limits = base_name, block, engine, limits
        self._tensors: list[DeltaTensor] = []
        self._elements = 0  # of all compared tensors
        self._names: set[str] = set()
        self._written: DeltaMap | None = None
        self._separator = separator
        # The tensors of the shards of a model must have different names (R-SHD-001).
        self._of_shard = "" if shard is None else f".{shard}"
        self._open_pools: dict[str, _OpenPool] = {}
        self._pools: list[Pool] = []  # those that are written
        self._open = True

    def __enter__(self) -> DeltaWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def add(
        self,
        name: str,
        base: Array | None,
        new: Array | None,
        *,
        whole: Parts | None = None,
        other: Mapping[str, object] | None = None,
        copy: bool = False,
    ) -> DeltaTensor:
        """Adds a tensor. Compares it with its base; threads code the differences later.

        The writer reads the arrays until it is closed, so the caller must not change them. With ``copy``, it
        takes copies, and a training loop can go on.

        Args:
            name: its name, which no other tensor has.
            base: the tensor in the base, or None if the result adds it.
            new: the tensor in the result, or None if the result does not have it.
            whole: the tensor of the result with its mask, levels and importance, so that it is stored whole;
                ``new`` has its elements.
            other: additional keys for the entry of a tensor that is stored whole; same as for `Writer.add`.
            copy: whether to copy the arrays of a changed tensor.

        Raises:
            OptionError: the name is invalid or taken, or an array has no dtype of the format.
            OSError: the file cannot be written.
            ClosedFileError: the writer is closed.
        """
        if not self._open:
            raise ClosedFileError("the writer is closed")
        require_name(name, self._limits)
        if name in self._names:
            raise OptionError(f"tensor {quoted(name)} was already added")
        tensor, extent = self._compared(name, base, new, forced=other is not None or whole is not None)
        self._limits.require_written("tensors", len(self._tensors) + 1, f"tensor {quoted(name)}")
        if tensor.kind == "changed":
            assert base is not None
            assert new is not None
            old, now = patterns_of(base, tensor.dtype), patterns_of(new, tensor.dtype)
            self._add_changed(tensor, *((old.copy(), now.copy()) if copy else (old, now)), extent)
        elif tensor.kind in ("replaced", "added") and whole is not None:
            self._writer.add_parts(name, whole, other=other)
        elif tensor.kind in ("replaced", "added"):
            assert new is not None
            self._writer.add(name, new, other=other)
        self._names.add(name)
        self._tensors.append(tensor)
        return tensor

    def add_parts(self, name: str, base: Parts, new: Parts) -> None:
        """Adds a tensor in parts: how its mask, levels, importance and vectors differ from those of the base.

        Args:
            name: its name.
            base, new: the tensor in base and result, with weights of equal dtype and shape.

        Raises:
            OptionError, OSError, ClosedFileError: as in `add`.
        """
        at, old, now = len(self._tensors), base.arrays(), new.arrays()
        for part in sorted(old.keys() | now.keys()):
            self.add(part_name(name, self._separator, part), old.get(part), now.get(part))
        self._tensors[at] = replace(self._tensors[at], structure=new.structure)

    @property
    def described(self) -> DeltaMap:
        """What the file says about the tensors. Only after `close`.

        Raises:
            OptionError: the writer is not closed, or was aborted.
        """
        if self._written is None:
            raise OptionError("the delta is not written yet; close the writer first")
        return self._written

    def _compared(
        self, name: str, base: Array | None, new: Array | None, *, forced: bool
    ) -> tuple[DeltaTensor, Extent]:
        """Compares a tensor with its base. With ``forced``, a tensor that both have counts as replaced."""
        old, now = (None if array is None else spec_of(name, array) for array in (base, new))
        spec = now or old
        if spec is None:
            raise OptionError(f"tensor {quoted(name)} is neither in the base nor in the result")
        if base is None or new is None or old != now:
            kind = "added" if base is None else "removed" if new is None else "replaced"
            checksums = self._checksum(base, old), self._checksum(new, now)
            return DeltaTensor(name, kind, *spec, *checksums), NOTHING
        patterns = patterns_of(base, spec.dtype), patterns_of(new, spec.dtype)
        crc_base, crc_new, extent = self._checksums(*patterns, kind_of(spec.dtype))
        kind = "replaced" if forced else "changed" if extent.most else "unchanged"
        return DeltaTensor(name, kind, *spec, crc_base, crc_new), extent

    def _checksum(self, array: Array | None, spec: Spec | None) -> int:
        """Returns the CRC-32 of a tensor, 0 for none."""
        if array is None or spec is None:
            return 0
        return checksum_of(patterns_of(array, spec.dtype), self._threads)

    def _checksums(self, base: Patterns, new: Patterns, kind: ElementKind) -> tuple[int, int, Extent]:
        """Returns the CRC-32 of two tensors of equal size, and the extent of their changes."""
        first, second = base.view(np.uint8), new.view(np.uint8)
        self._elements += len(base)
        engine = get_engine(self._engine, self._elements)

        def compared(part: slice) -> tuple[int, int, Extent]:
            a, b = (array[part].view(base.dtype) for array in (first, second))
            crc = crc32(a.data)
            return crc, *engine.compare(a, b, kind, crc)

        found = of_parts(compared, len(first), self._threads)
        crc_base = joined((crc for crc, _, _ in found), len(first))
        crc_new = joined((crc for _, crc, _ in found), len(first))
        return crc_base, crc_new, reduce(Extent.joined, (extent for _, _, extent in found), NOTHING)

    def _add_changed(self, tensor: DeltaTensor, base: Patterns, new: Patterns, extent: Extent) -> None:
        name = tensor.dtype.name
        pool = self._open_pools.get(name)
        if pool is not None and pool.unchecked > _CHECKED:
            pool.unchecked = 0
            if _size_of(pool) > _POOL_BYTES:
                self._finish_pool(self._open_pools.pop(name))
                pool = None
        if pool is None:
            pool = self._open_pools[name] = _OpenPool(tensor.dtype, self._block)
        pool.tensors += 1
        pool.unchecked += len(base)
        at = 0
        while at < len(base):
            size = min(pool.room, len(base) - at)
            pool.parts.append((base[at : at + size], new[at : at + size]))
            pool.extent = pool.extent.joined(extent._replace(most=min(extent.most, size)))
            at += size
            pool.room -= size
            if pool.room == 0:
                self._finish_block(pool)

    def _finish_block(self, pool: _OpenPool) -> None:
        block = pool.parts, pool.extent, pool.dtype, get_engine(self._engine, self._elements)
        pool.parts, pool.extent, pool.room = [], NOTHING, self._block
        if self._pool_of_threads is None:
            pool.coded.append(code_block(*block))
            return
        waiting = [job for job in pool.coded if isinstance(job, Future) and not job.done()]
        if len(waiting) > 2 * self._threads:  # bounds the memory of the arrays that jobs keep
            waiting[0].result()
        pool.coded.append(self._pool_of_threads.submit(code_block, *block))

    def _finish_pool(self, pool: _OpenPool) -> None:
        if pool.parts:
            self._finish_block(pool)
        self._pools.append(self._write_pool(len(self._pools), pool))

    def close(self) -> None:
        """Completes the file. Does nothing if the writer is closed.

        Raises:
            OptionError: the file exceeds the limits.
            OSError: the file cannot be written or renamed.
        """
        if not self._open:
            return
        try:
            for pool in list(self._open_pools.values()):
                self._finish_pool(pool)
            has_parts = any(tensor.structure is not None for tensor in self._tensors)
            separator = self._separator if has_parts else None
            written = DeltaMap(
                tuple(self._tensors), tuple(self._pools), self._block, self._base_name, {}, separator
            )
            self._writer.set_delta(written)
            self._writer.close()
        except BaseException:
            self.abort()
            raise
        self._written = written
        self._open = False
        self._stop()

    def _write_pool(self, number: int, pool: _OpenPool) -> Pool:
        kind = kind_of(pool.dtype)
        blocks = [_result_of(job) for job in pool.coded]
        names = [
            self._unused_name(f"{pool.dtype.name}{self._of_shard}.{number}.{word}")
            for word in ("counts", "gaps", "differences")
        ]
        counts = _joined([block.counts for block in blocks], np.dtype("<u4"))
        gaps = _joined([block.gaps for block in blocks], np.dtype("<u4"))
        levels = _joined([block.levels for block in blocks], kind.pattern)
        pool.coded = []
        self._writer.add_numbers(names[0], counts, DTYPES["F32"], (len(blocks), kind.keys))
        self._writer.add_numbers(names[1], gaps, DTYPES["F32"], (len(gaps),))
        self._writer.add_numbers(names[2], levels, kind.stored, (len(levels),))
        return Pool(pool.dtype.name, pool.tensors, *names)

    def _unused_name(self, name: str) -> str:
        while name in self._writer.done or name in self._names:
            name += "_"
        return name

    def abort(self) -> None:
        """Aborts. The target is unchanged."""
        if self._open:
            self._open = False
            self._writer.abort()
            self._stop()

    def _stop(self) -> None:
        if self._pool_of_threads is not None:
            self._pool_of_threads.shutdown(cancel_futures=True)


def _result_of(job: Future[Coded] | Coded) -> Coded:
    return job.result() if isinstance(job, Future) else job


def _size_of(pool: _OpenPool) -> int:
    """Returns the bytes of the blocks of a pool that are coded so far."""
    return sum(sum(array.nbytes for array in _result_of(job)) for job in pool.coded)


def _joined(
    parts: list[NDArray[np.unsignedinteger]] | list[NDArray[np.uint32]], dtype: np.dtype[np.unsignedinteger]
) -> NDArray[np.unsignedinteger]:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False)


def code_block(parts: list[tuple[Patterns, Patterns]], extent: Extent, dtype: Dtype, engine: Engine) -> Coded:
    """Codes the differences of a block (SPEC.md 28.2).

    Args:
        parts: the block's elements in the base and in the result, one part after another.
        extent: the extent of their changes.
        dtype: the dtype of the tensors.
        engine: finds the changes.

    Raises:
        OptionError: the elements changed after their extent was found.
    """
    kind = kind_of(dtype)
    found = engine.find_changes(parts, kind, extent)
    if found is None:
        raise OptionError("arrays changed after they were added; close the writer first, or use copy=True")
    order = np.argsort(found.keys, kind="stable")
    return _coded(Changes(found.keys[order], found.ranks[order], found.levels[order], found.elements))


def _coded(changes: Changes) -> Coded:
    """Codes changes that are sorted by key and rank."""
    keys, rank, elements = changes.keys, changes.ranks.astype(np.int64), changes.elements
    changed = np.bincount(keys, minlength=len(elements))
    dense = (_DENSE * changed > elements) & (changed > 0)
    coded = np.where(dense, elements, changed)
    first = np.cumsum(coded) - coded
    before = np.cumsum(changed) - changed
    inside = np.where(dense[keys], rank, np.arange(len(keys)) - before[keys])
    levels = np.zeros(int(coded.sum()), changes.levels.dtype)
    levels[first[keys] + inside] = changes.levels
    sparse = ~dense[keys]
    gaps, of_key = rank[sparse], keys[sparse]
    follows = of_key[1:] == of_key[:-1]
    steps = gaps.copy()
    steps[1:][follows] -= gaps[:-1][follows] + 1
    return Coded((2 * coded + dense).astype(np.uint32), steps.astype(np.uint32), levels)
