"""Opens deltas, and decodes the changes of their blocks."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ..coding.changes import NEVER, Patterns, kind_of, open_buckets
from ..coding.quantisers import patterns_to_levels
from ..container.delta_map import DeltaTensor, Pool
from ..decode.delta_maps import joined_map, maps_of
from ..decode.reader import SfpFile
from ..decode.selection import Selection
from ..decode.shards import ShardedFile
from ..engines import Engine, Misfit, get_engine
from ..errors import OptionError, fault, placed
from ..io.closing import Closing
from ..io.paths import is_index, is_path, model_path
from ..io.source import Readable
from ..limits import DEFAULT_LIMITS, Limits
from ..names import quoted
from .tensors import Spec

# Gaps and levels are decoded for several blocks at once, up to this number of them.
_WINDOW = 1 << 20


class Part(NamedTuple):
    """The part of a block that belongs to one tensor.

    Attributes:
        member: index of the tensor in its pool.
        start, stop: the elements of the tensor, ``stop`` exclusive.
    """

    member: int
    start: int
    stop: int


class Found(NamedTuple):
    """The coded elements of a part.

    Attributes:
        positions: their positions in the part, ascending, uint32 [n].
        values: their patterns in the result, [n].
    """

    positions: NDArray[np.uint32]
    values: Patterns


class _Window(NamedTuple):
    """The decoded gaps and levels of consecutive blocks ``first`` to ``stop`` - 1."""

    first: int
    stop: int
    gaps: NDArray[np.uint32]
    levels: Patterns


class PoolChanges:
    """The changes of a pool, block by block. Thread-safe.

    Attributes:
        pool: the pool's map.
        members: its tensors.
        kind: how differences of its elements are computed.
        blocks: the number of blocks.
        changed: levels of each block, an upper bound on its changes, int64 [blocks].
        offset: offset of the map `delta`, for errors.
    """

    def __init__(self, file: SfpFile, pool: Pool, members: list[DeltaTensor], block: int) -> None:
        """Reads the counts of all buckets.

        Raises:
            InvalidFileError: the file is damaged, or the counts do not fit gaps and differences.
        """
        self.pool, self.members, self._file, self._block = pool, members, file, block
        self.offset = file.preamble.directory_offset  # of the map, for errors
        self.kind = kind_of(members[0].dtype)
        ends = list(accumulate(member.elements for member in members))
        self._starts = [0, *ends[:-1]]
        self._elements = ends[-1]
        self.blocks = -(-self._elements // block)
        self._counts = _numbers(file.get_tensor(pool.counts)).astype(np.int64).reshape(-1, self.kind.keys)
        coded, sparse = self._counts >> 1, np.where(self._counts & 1, 0, self._counts >> 1)
        self.changed = coded.sum(1)
        self._first_level = np.concatenate([[0], np.cumsum(self.changed)])
        self._first_gap = np.concatenate([[0], np.cumsum(sparse.sum(1))])
        sizes = {pool.differences: int(self._first_level[-1]), pool.gaps: int(self._first_gap[-1])}
        for name, size in sizes.items():
            if file.entry(name).positions != size:
                words = f"it has {file.entry(name).positions} numbers, but the counts need {size}"
                raise fault("R-DLT-010", words, tensor=name, offset=self.offset)
        self._window: _Window | None = None
        self._lock = threading.Lock()

    def parts(self, block: int) -> list[Part]:
        """Returns the parts of a block, in the order of its elements."""
        low, high = block * self._block, min((block + 1) * self._block, self._elements)
        out = []
        member = bisect_right(self._starts, low) - 1
        while low < high:
            start = self._starts[member]
            stop = min(start + self.members[member].elements, high)
            if stop > low:
                out.append(Part(member, low - start, stop - start))
            low = max(stop, low)
            member += 1
        return out

    def blocks_of(self, member: int, start: int = 0, stop: int | None = None) -> range:
        """Returns the blocks that have the elements ``start`` to ``stop`` - 1 of a tensor."""
        stop = self.members[member].elements if stop is None else stop
        if stop <= start:
            return range(0)
        low, high = self._starts[member] + start, self._starts[member] + stop
        return range(low // self._block, -(-high // self._block))

    def blocks_with(self, member: int, selection: Selection) -> NDArray[np.int64]:
        """Returns the blocks that have the selected positions of a tensor, ascending."""
        if not selection.size:
            return np.zeros(0, np.int64)
        width, run = self.width, selection.run
        low, high = min(run[0], run[-1]), max(run[0], run[-1])
        starts = selection.starts * width + self._starts[member]
        elements = Selection(selection.shape, starts, range(low * width, (high + 1) * width))
        return elements.segments(self._block)

    @property
    def width(self) -> int:
        """The number of elements of a position: 2 for complex numbers, else 1."""
        return self.members[0].dtype.itemsize * 8 // self.kind.bits

    def find(
        self, block: int, base: Iterable[Patterns], engine: Engine, last: int | None = None
    ) -> Iterator[Found]:
        """Yields the coded elements of each part of a block, before it asks ``base`` for the next part.

        Args:
            block: number of the block.
            base: the elements of each of `parts` in the base.
            engine: finds the elements.
            last: the last block that the caller needs. None stands for all that follow.

        Raises:
            InvalidFileError: the file is damaged, or does not fit the base's elements.
        """
        counts, gaps, levels = self.numbers_of(block, last)
        buckets = open_buckets(counts, gaps, 0, 0)
        size = int(self.changed[block])
        positions, values = np.empty(size, np.uint32), np.empty(size, self.kind.pattern)
        at = 0
        for part in base:
            found = engine.place_changes(part, self.kind, buckets, gaps, levels, positions[at:], values[at:])
            if found < 0:
                words = misfit_words(block, Misfit.FEWER)
                raise fault("R-DLT-011", words, tensor=self.pool.differences, offset=self.offset)
            yield Found(positions[at : at + found], values[at : at + found])
            at += found
        if not np.array_equal(buckets.level, buckets.last):
            words = misfit_words(block, Misfit.LEFT)
            raise fault("R-DLT-011", words, tensor=self.pool.differences, offset=self.offset)

    def numbers_of(
        self, block: int, last: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.uint32], Patterns]:
        """Returns the counts, gaps and levels of a block; ``last`` as for `find`.

        Raises:
            InvalidFileError: the file is damaged.
        """
        gaps, levels = self._numbers_of(block, self.blocks - 1 if last is None else last)
        return self._counts[block], gaps, levels

    def coded(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Patterns]:
        """Returns the coded elements of a block, in the order of keys and positions.

        Returns:
            The key of each, int64 [n]; its number among the elements of its key in the block, int64 [n]; and
            its level, [n].
        """
        gaps, levels = self._numbers_of(block, self.blocks - 1)
        coded = self._counts[block] >> 1
        key = np.repeat(np.arange(self.kind.keys), coded)
        first = np.repeat(np.cumsum(coded) - coded, coded)
        rank = np.arange(len(key)) - first  # those of dense buckets
        sparse = (self._counts[block] & 1 == 0)[key]
        steps = np.cumsum(gaps.astype(np.int64) + 1)
        of_sparse = np.where(self._counts[block] & 1, 0, coded)
        before = np.concatenate([[0], steps])[np.cumsum(of_sparse) - of_sparse]
        rank[sparse] = steps - 1 - before[key[sparse]]
        return key, rank, levels

    def dense_counts(self, block: int) -> NDArray[np.int64]:
        """Returns the number of levels of each dense bucket of a block; a great number for sparse ones."""
        counts = self._counts[block]
        return np.where(counts & 1, counts >> 1, NEVER)

    def _numbers_of(self, block: int, last: int) -> tuple[NDArray[np.uint32], Patterns]:
        """Returns the gaps and levels of a block. Decodes those of blocks up to ``last`` with them."""
        with self._lock:
            if self._window is None or not self._window.first <= block < self._window.stop:
                self._window = None  # releases its memory before the next one is decoded
                self._window = self._decoded(block, last)
            window = self._window
        gap, level = self._first_gap[window.first], self._first_level[window.first]
        return (
            window.gaps[self._first_gap[block] - gap : self._first_gap[block + 1] - gap],
            window.levels[self._first_level[block] - level : self._first_level[block + 1] - level],
        )

    def _decoded(self, block: int, last: int) -> _Window:
        first = self._first_level
        stop = max(min(bisect_right(first, int(first[block]) + _WINDOW) - 1, last + 1), block + 1)
        gaps = self._file.get_slice(self.pool.gaps)
        levels = self._file.get_slice(self.pool.differences)
        return _Window(
            block,
            stop,
            _numbers(gaps[int(self._first_gap[block]) : int(self._first_gap[stop])]),
            _numbers(levels[int(first[block]) : int(first[stop])]),
        )


def misfit_words(block: int, why: Misfit) -> str:
    """Returns why the changes of a block do not fit the base's elements (R-DLT-011)."""
    return why.value.replace("bucket", f"bucket of block {block}", 1)


def _numbers(array: NDArray[np.generic]) -> NDArray[np.unsignedinteger]:
    """Returns the numbers of the elements of a tensor (SPEC.md 28.2), of any shape as [n]."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return patterns_to_levels(flat.view(f"<u{flat.itemsize}"))


class Delta(Closing):
    """An open delta, without its base. A context manager.

    Attributes:
        file: the file or the shards, whose tensors are those that the delta stores.
        map: what it says about the tensors of base and result; of shards, what all of them say.
        offset: offset of the map, for errors; None for shards.
        requested: the engine that the caller requested.
    """

    def __init__(
        self,
        readable: Readable,
        *,
        limits: Limits = DEFAULT_LIMITS,
        engine: str | None = None,
        threads: int | None = None,
    ) -> None:
        """Opens a file, or the shards of an index. Same arguments and errors as `sfpformat.open`.

        Raises:
            OptionError: the file is not a delta.
        """
        path = model_path(cast(str, readable)) if is_path(readable) else None
        self.file: SfpFile | ShardedFile
        if path is not None and is_index(path):
            self.file = ShardedFile(path, limits=limits, engine=engine, threads=threads)
        else:
            source = readable if path is None else path
            self.file = SfpFile(source, limits=limits, engine=engine, threads=threads)
        try:
            self._parts = maps_of(self.file)
            self.map = joined_map([map_ for _, map_ in self._parts])
        except BaseException:
            self.file.close()
            raise
        self.offset = self.file.preamble.directory_offset if isinstance(self.file, SfpFile) else None
        self._pools: list[PoolChanges] | None = None
        weights = sum(tensor.elements for tensor in self.map.tensors)
        self.engine, self.requested = get_engine(engine, weights), engine
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the file."""
        self.file.close()

    def metadata(self) -> dict[str, str]:
        """Returns the strings of the result."""
        return self.file.metadata()

    def pools(self) -> list[PoolChanges]:
        """Returns the changes of all pools. Reads the counts of their buckets the first time.

        Raises:
            InvalidFileError: the file is damaged.
            LimitError: a tensor exceeds a limit.
        """
        with self._lock:
            if self._pools is None:
                self._pools = [
                    PoolChanges(file, pool, each, map_.block)
                    for file, map_ in self._parts
                    for pool, each in zip(map_.pools, map_.members(), strict=True)
                ]
            return self._pools

    def require_base(self, specs: Mapping[str, Spec]) -> None:
        """Checks the names, dtypes and shapes of a base (R-DLT-009). Does not read its elements.

        Raises:
            BaseMismatchError: the delta was made from another base.
        """
        for tensor in self.map.tensors:
            found = specs.get(tensor.name)
            if tensor.kind == "added":
                if found is not None:
                    words = "the base has this tensor, which the delta adds; was the delta applied before?"
                    raise fault("R-DLT-009", words, tensor=tensor.name, offset=self.offset)
                continue
            if found is None:
                raise fault(
                    "R-DLT-009", "the base has no such tensor", tensor=tensor.name, offset=self.offset
                )
            if tensor.kind != "replaced" and found != (tensor.dtype, tensor.shape):
                words = f"the base has {found.dtype.name} {list(found.shape)}, the delta needs "
                words += f"{tensor.dtype.name} {list(tensor.shape)}"
                if tensor.structure is not None:
                    words += "; these are levels, so that the base must be the .sfp file"
                raise fault("R-DLT-009", words, tensor=tensor.name, offset=self.offset)
        known = {tensor.name for tensor in self.map.tensors}
        for name in specs:
            if name not in known:
                words = "the delta was made from a base without this tensor"
                raise fault("R-DLT-009", words, tensor=name, offset=self.offset)

    def require_follows(self, before: Delta) -> set[str]:
        """Checks that the base of this delta is the result of the one before, by their checksums (R-DLT-009).

        Returns:
            The names of the tensors that were compared: those that both deltas list as parts, or both do not.

        Raises:
            BaseMismatchError: the base is another one.
        """
        results = {tensor.name: tensor for tensor in before.map.tensors if tensor.kind != "removed"}
        compared = set()
        for tensor in self.map.tensors:
            result = results.get(tensor.name)
            if tensor.kind == "added" or result is None:
                continue
            if (result.structure is None) == (tensor.structure is None):
                self.require_checksum(tensor, result.result)
                compared.add(tensor.name)
        return compared

    def require_elements(self) -> None:
        """Checks that the delta compares only elements, so that it can be applied to arrays.

        Raises:
            OptionError: it stores the mask, levels or importance of a tensor.
        """
        for name in self.map.more_than_elements():
            raise OptionError(
                f"the delta stores mask, levels or importance of {quoted(name)}, which arrays do not have; "
                "open it with its base, or write it with parts=False"
            )

    def require_checksum(self, tensor: DeltaTensor, found: int) -> None:
        """Checks the checksum of a tensor of a base (R-DLT-009).

        Raises:
            BaseMismatchError: the delta was made from another base.
        """
        if found != tensor.base:
            words = f"the base has the checksum {found:08x}, the delta needs {tensor.base:08x}; "
            was_applied = found == tensor.result and tensor.kind in ("changed", "replaced")
            words += "the delta was applied before" if was_applied else "the delta was made from another base"
            raise fault("R-DLT-009", words, tensor=tensor.name, offset=self.offset)

    def require_result(self, tensor: DeltaTensor, found: int) -> None:
        """Checks the checksum of a tensor of the result (R-DLT-012).

        Raises:
            InvalidFileError: it differs.
        """
        if found != tensor.result:
            words = f"the result has the checksum {found:08x}, the delta promises {tensor.result:08x}"
            raise fault("R-DLT-012", words, tensor=tensor.name, offset=self.offset)

    def stored(self, tensor: DeltaTensor) -> NDArray[np.generic]:
        """Returns a replaced or added tensor.

        Raises:
            InvalidFileError: the file is damaged.
            LimitError: the tensor exceeds a limit.
        """
        with placed(tensor=tensor.name):
            return self.file.get_tensor(tensor.name)
