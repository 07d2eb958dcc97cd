"""Applies deltas to models of which each process holds a part (SPEC.md chapter 28).

Which elements a delta changes depends on the base's elements of a whole block. The processes therefore
exchange how many elements of each key their parts have. This is a small part of the bytes of the block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import xor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..coding.changes import Patterns, from_levels, keys_of
from ..container.delta_map import DeltaMap, DeltaTensor
from ..decode.selection import select
from ..dtypes import DTYPES, of_numpy
from ..errors import MismatchError, OptionError, fault
from ..io.checksum import combined, crc32
from ..names import listed, quoted
from .agreement import Exchange, agreed
from .applying import memory_patterns, require_changeable, uninterrupted
from .reading import Delta, PoolChanges
from .tensors import Array, Spec, patterns_of, selected

T = TypeVar("T")

_RANK_BITS = 40  # a block has fewer elements


@dataclass(frozen=True)
class Slice:
    """The part of a tensor that this process holds.

    Attributes:
        array: its elements, in C order and writable.
        shape: the shape of the whole tensor.
        start: the index of its first element in the whole tensor.
    """

    array: Array
    shape: tuple[int, ...]
    start: tuple[int, ...]


class _Box(NamedTuple):
    """A part of a tensor that some processes hold, and its runs: consecutive elements of the tensor.

    Attributes:
        starts: the first element of each run, ascending, int64 [runs].
        length: elements per run.
        ranks: the processes that hold it, ascending.
    """

    starts: NDArray[np.int64]
    length: int
    ranks: tuple[int, ...]


class _Pieces(NamedTuple):
    """The pieces of a block: runs of boxes, cut at the block's ends, in the order of elements.

    Attributes (arrays, [pieces]):
        member: index of the tensor in the pool.
        owner: the first process that holds the piece.
        own: whether this process holds it.
        local: its first element in the box, if this process holds it.
        size: number of its elements.
    """

    member: NDArray[np.int64]
    owner: NDArray[np.int64]
    own: NDArray[np.bool_]
    local: NDArray[np.int64]
    size: NDArray[np.int64]


def apply_to_slices(slices: Mapping[str, Slice], delta: Delta, exchange: Exchange, rank: int) -> DeltaMap:
    """Changes the parts of the base that this process holds to those of the result, in place.

    All processes call this function, with the same delta and the same names. Together they hold each element
    of the base; several may hold the same part. Makes all checks before the first change: all processes
    change their parts, or none does. Needs memory for the changes of the own parts, for a copy of the largest
    part, and about 40 bytes for each own element of a block.

    Args:
        slices: name -> the part of each tensor of the base.
        delta: the delta. It must not add, remove or reshape tensors.
        exchange: exchanges objects between the processes.
        rank: the number of this process, from 0.

    Returns:
        What the delta says about the tensors.

    Raises:
        BaseMismatchError: the parts are not the base of the delta. No process changed anything.
        OptionError: the processes have other deltas or names, their parts overlap or leave elements out, or
            the delta changes the structure. No process changed anything.
        MismatchError: an array cannot be changed in place. No process changed anything.
        InvalidFileError, LimitError: the delta is damaged. No process changed anything.
        ProcessError: another process failed. No process changed anything.
        OSError: the delta cannot be read. No process changed anything.
    """
    change = _SlicedChange(slices, delta, exchange, rank)
    change.check()
    uninterrupted(change.apply)
    return delta.map


class _SlicedChange:
    def __init__(self, slices: Mapping[str, Slice], delta: Delta, exchange: Exchange, rank: int) -> None:
        self._slices, self._delta, self._exchange, self._rank = slices, delta, exchange, rank
        self._boxes: dict[str, list[_Box]] = {}
        # Name -> positions in the flattened part, and patterns.
        self._found: dict[str, list[tuple[NDArray[np.int64], Patterns]]] = {}
        self._stored: dict[str, Array] = {}

    def check(self) -> None:
        """Makes all checks, and finds the changes of the own parts."""
        layouts = self._agreed(self._layout)
        self._boxes = _boxes_of(layouts)
        whole = {name: (dtype, shape) for name, (dtype, shape, _, _) in layouts[0][1].items()}
        specs = {name: Spec(DTYPES[dtype], shape) for name, (dtype, shape) in whole.items()}
        self._delta.require_elements()
        self._delta.require_base(specs)
        views = {name: patterns_of(part.array, specs[name].dtype) for name, part in self._slices.items()}
        tensors = {tensor.name: tensor for tensor in self._delta.map.tensors}
        sums = self._agreed(lambda: {name: self._checksum(name, view) for name, view in views.items()})
        for tensor in tensors.values():
            for found in self._totals(tensor.name, sums):
                self._delta.require_checksum(tensor, found)
        for pool in self._agreed_pools():
            for block in range(pool.blocks):
                self._find(pool, block, views)
        sums = self._agreed(lambda: self._result_checksums(views))
        for tensor in tensors.values():
            if tensor.kind != "unchanged":
                for found in self._totals(tensor.name, sums):
                    self._delta.require_result(tensor, found)

    def apply(self) -> None:
        """Makes all changes. `check` has succeeded."""
        tensors = {tensor.name: tensor for tensor in self._delta.map.tensors}
        for name, changes in self._found.items():
            view = memory_patterns(self._slices[name].array, tensors[name].dtype)
            for positions, values in changes:
                view[positions] = values
        for name, array in self._stored.items():
            self._slices[name].array[...] = array

    def _agreed(self, work: Callable[[], T]) -> list[T]:
        return agreed(self._exchange, work, "nothing was changed")

    def _layout(self) -> tuple[object, dict[str, tuple[Any, ...]]]:
        """Returns the identity of the delta, and dtype, shape, start and size of each part."""
        out = {}
        known = {tensor.name: tensor for tensor in self._delta.map.tensors}
        new = [tensor.name for tensor in known.values() if tensor.kind in ("added", "removed")]
        for name, part in self._slices.items():
            dtype = of_numpy(part.array.dtype)
            if dtype is None:
                raise OptionError(f"tensor {quoted(name)}: the format has no dtype {part.array.dtype}")
            tensor = known.get(name)
            kind = "unchanged" if tensor is None else tensor.kind
            same = tensor is not None and tensor.dtype == dtype
            if tensor is not None and kind == "replaced" and not (same and tensor.shape == part.shape):
                new.append(name)
                continue
            if tensor is not None and kind != "unchanged" and same:  # `require_base` reports another dtype
                require_changeable(name, part.array, tensor)
            out[name] = (dtype.name, part.shape, part.start, part.array.shape)
        if new:
            raise OptionError(
                f"the delta adds, removes or reshapes {listed(new)}, which parts of tensors cannot"
            )
        return self._delta.file.identity, out

    def _box(self, name: str) -> _Box | None:
        """Returns the box of the own part; None if it has no elements."""
        return next((box for box in self._boxes[name] if self._rank in box.ranks), None)

    def _agreed_pools(self) -> list[PoolChanges]:
        found: list[PoolChanges] = []
        self._agreed(lambda: found.extend(self._delta.pools()))
        return found

    def _checksum(self, name: str, view: Patterns) -> int:
        """Returns what the own part contributes to the checksum of its tensor.

        The checksum of a tensor is the exclusive or of those of its parts, each multiplied for the bytes
        after it.
        """
        box = self._box(name)
        if box is None:
            return 0
        array = self._slices[name].array
        width = len(view) // array.size
        size = box.length * width * view.itemsize
        data = view.view(np.uint8)
        starts = (box.starts * array.itemsize).tolist()
        total, end = 0, 0
        for number, start in enumerate(starts):
            part = crc32(data[number * size : (number + 1) * size].data)
            total = combined(total, part, start + size - end)
            end = start + size
        whole = math.prod(self._slices[name].shape) * array.itemsize
        return combined(total, 0, whole - end)

    def _totals(self, name: str, sums: list[dict[str, int]]) -> set[int]:
        """Returns the checksum of a tensor; several if processes that hold the same part differ."""
        boxes = self._boxes[name]
        first = [sums[box.ranks[0]][name] for box in boxes]
        total = reduce(xor, first, 0)
        others = (
            total ^ mine ^ sums[rank][name]
            for box, mine in zip(boxes, first, strict=True)
            for rank in box.ranks
        )
        return {total, *others}

    def _result_checksums(self, views: Mapping[str, Patterns]) -> dict[str, int]:
        out = {}
        for tensor in self._delta.map.tensors:
            if tensor.kind == "changed":
                view = views[tensor.name].copy()
                for positions, values in self._found.get(tensor.name, ()):
                    view[positions] = values
                out[tensor.name] = self._checksum(tensor.name, view)
            elif tensor.kind == "replaced":
                array = self._read_stored(tensor)
                self._stored[tensor.name] = array
                out[tensor.name] = self._checksum(tensor.name, patterns_of(array, tensor.dtype))
        return out

    def _read_stored(self, tensor: DeltaTensor) -> Array:
        part = self._slices[tensor.name]
        pairs = zip(part.start, part.array.shape, strict=True)
        index = tuple(slice(start, start + size) for start, size in pairs)
        return selected(self._delta.file, tensor.name, select(tensor.shape, index))

    def _find(self, pool: PoolChanges, block: int, views: Mapping[str, Patterns]) -> None:
        """Finds the changes of the own elements of a block. All processes call this for all blocks."""
        pieces = self._pieces(pool, block)
        number = max(len(pieces.size), 1)
        own = np.flatnonzero(pieces.own)
        sizes = pieces.size[own]
        flat = [
            views[pool.members[member].name][low : low + size]
            for member, low, size in zip(
                pieces.member[own].tolist(), pieces.local[own].tolist(), sizes.tolist(), strict=True
            )
        ]
        elements = np.concatenate([np.zeros(0, pool.kind.pattern), *flat])
        # Groups of own elements: by key, then by piece, then by position.
        groups = keys_of(elements, pool.kind).astype(np.int64) * number + np.repeat(own, sizes)
        order = np.argsort(groups, kind="stable")
        ids, counts = _run_lengths(groups[order])
        counted = pieces.owner[ids % number] == self._rank
        coded: list[tuple[NDArray[np.int64], NDArray[np.int64], Patterns]] = []

        def read() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            coded.append(pool.coded(block))
            return ids[counted], counts[counted]

        received = self._agreed(read)
        all_ids = np.concatenate([one for one, _ in received])
        ascending = np.argsort(all_ids, kind="stable")
        all_ids = all_ids[ascending]
        all_counts = np.concatenate([one for _, one in received])[ascending]
        keys = all_ids // number
        of_key = np.bincount(keys, all_counts, pool.kind.keys).astype(np.int64)
        before = np.cumsum(all_counts) - all_counts - (np.cumsum(of_key) - of_key)[keys]
        key, rank, levels = coded[0]
        if bool((rank >= of_key[key]).any()) or bool((pool.dense_counts(block) < of_key).any()):
            words = f"the coded elements of block {block} do not fit the number of its elements"
            raise fault("R-DLT-011", words, tensor=pool.pool.differences, offset=pool.offset)
        first = np.cumsum(counts) - counts
        inside = np.arange(len(order)) - np.repeat(first, counts)
        ranks = np.repeat(before[np.searchsorted(all_ids, ids)], counts) + inside
        mine = (np.repeat(ids // number, counts) << _RANK_BITS) | ranks  # ascending
        wanted = (key << _RANK_BITS) | rank
        at = np.searchsorted(mine, wanted)
        hit = at < len(mine)
        hit[hit] = mine[at[hit]] == wanted[hit]
        places = order[at[hit]]
        values = from_levels(elements[places], levels[hit], pool.kind)
        self._keep(pool, pieces, own, places, values)

    def _keep(
        self,
        pool: PoolChanges,
        pieces: _Pieces,
        own: NDArray[np.int64],
        places: NDArray[np.int64],
        values: Patterns,
    ) -> None:
        """Stores changes, given their places among the own elements of the block."""
        ends = np.cumsum(pieces.size[own])
        piece = np.searchsorted(ends, places, side="right")
        local = pieces.local[own][piece] + places - (ends - pieces.size[own])[piece]
        members = pieces.member[own][piece]
        for member in np.unique(members).tolist():
            some = members == member
            self._found.setdefault(pool.members[member].name, []).append((local[some], values[some]))

    def _pieces(self, pool: PoolChanges, block: int) -> _Pieces:
        found: list[tuple[NDArray[np.int64], ...]] = []
        for part in pool.parts(block):
            of_part = []
            for box in self._boxes[pool.members[part.member].name]:
                starts, length = box.starts * pool.width, box.length * pool.width
                first = int(np.searchsorted(starts, part.start - length, side="right"))
                stop = int(np.searchsorted(starts, part.stop))
                low = np.maximum(starts[first:stop], part.start)
                high = np.minimum(starts[first:stop] + length, part.stop)
                local = np.arange(first, stop) * length + low - starts[first:stop]
                like = np.ones(len(low), np.int64)
                is_own = like * (self._rank in box.ranks)
                of_part.append((like * part.member, like * box.ranks[0], is_own, local, high - low, low))
            joined = [np.concatenate(column) for column in zip(*of_part, strict=True)]
            order = np.argsort(joined[-1], kind="stable")
            found.append(tuple(column[order] for column in joined[:-1]))
        member, owner, own, local, size = (np.concatenate(column) for column in zip(*found, strict=True))
        return _Pieces(member, owner, own.astype(np.bool_), local, size)


def _run_lengths(ascending: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the different values of an ascending array, and how often each occurs."""
    starts = np.flatnonzero(np.diff(ascending, prepend=-1))
    return ascending[starts], np.diff(starts, append=len(ascending))


def _boxes_of(layouts: list[tuple[object, dict[str, tuple[Any, ...]]]]) -> dict[str, list[_Box]]:
    """Returns the boxes of each tensor. All processes come to the same result or error.

    Raises:
        OptionError: the processes have other deltas, names, dtypes or shapes, or their parts overlap or leave
            elements out.
        MismatchError: a part is not inside its tensor.
    """
    identity, first = layouts[0]
    if any(other != identity for other, _ in layouts):
        raise OptionError("the processes have different deltas; give all of them the same file")
    for number, (_, parts) in enumerate(layouts):
        differ = sorted(set(first) ^ set(parts)) or [
            name for name in first if first[name][:2] != parts[name][:2]
        ]
        if differ:
            raise OptionError(
                f"processes 0 and {number} differ in the names, dtypes or shapes of {listed(differ)}"
            )
    out: dict[str, list[_Box]] = {}
    for name, (_, shape, _, _) in first.items():
        ranks: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for number, (_, parts) in enumerate(layouts):
            _, _, start, size = parts[name]
            if (
                len(start) != len(shape)
                or len(size) != len(shape)
                or any(
                    low < 0 or low + length > most
                    for low, length, most in zip(start, size, shape, strict=True)
                )
            ):
                raise MismatchError(
                    f"tensor {quoted(name)}: process {number} holds a part of shape {list(size)} from "
                    f"{list(start)}, which is not inside {list(shape)}"
                )
            if math.prod(size):
                ranks.setdefault((tuple(start), tuple(size)), []).append(number)
        _require_partition(name, shape, list(ranks))
        out[name] = [_box_of(shape, *box, tuple(held)) for box, held in ranks.items()]
    return out


def _box_of(
    shape: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...], ranks: tuple[int, ...]
) -> _Box:
    index = tuple(slice(low, low + length) for low, length in zip(start, size, strict=True))
    selection = select(shape, index)
    return _Box(selection.starts + selection.run.start, len(selection.run), ranks)


def _require_partition(
    name: str, shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    """Raises OptionError unless each element of a tensor is in exactly one box."""
    for number, (start, size) in enumerate(boxes):
        for other_start, other_size in boxes[:number]:
            dims = zip(start, size, other_start, other_size, strict=True)
            if all(a < c + d and c < a + b for a, b, c, d in dims):
                raise OptionError(
                    f"tensor {quoted(name)}: the parts of processes overlap; parts must be equal or apart"
                )
    held, whole = sum(math.prod(size) for _, size in boxes), math.prod(shape)
    if held != whole:
        raise OptionError(f"tensor {quoted(name)}: the processes hold {held:,} of its {whole:,} elements")
