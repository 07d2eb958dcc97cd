"""Fast path for loading whole models: decodes all chunks of many `container.plain_entries` at once.

Rules: this module raises no `FileFault`. On any problem it returns None or False; the caller then decodes the
tensors by jobs, which return the weights or raise the error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..container.chunk import are_raw_lengths, has_zero_padding
from ..container.plain_entries import Numbers, PlainTensors
from ..engines import PlainPlan, PlainRuns
from ..io.threads import for_each
from .array_memory import SHARING
from .jobs import BATCH_BYTES
from .stored_chunks import StoredChunks
from .tensor import Values


class _Region(NamedTuple):
    """Chunks that are consecutive in the file.

    Attributes:
        first, stop: index of the first chunk among all requested chunks, and one past the last.
        offset: file offset of the first chunk.
        records: length and checksum of each chunk.
    """

    first: int
    stop: int
    offset: int
    records: list[tuple[int, int]]


def _regions(offsets: Numbers, lengths: Numbers, checksums: Numbers, batch_of: Numbers) -> list[_Region]:
    """Splits chunks into regions. A new region begins at a gap in the file, and at a new batch."""
    apart = offsets[1:] != offsets[:-1] + lengths[:-1]
    cuts = np.flatnonzero(apart | (np.diff(batch_of) != 0)) + 1
    records = list(zip(lengths.tolist(), checksums.tolist(), strict=True))
    bounds = pairwise([0, *cuts.tolist(), len(records)])
    return [_Region(first, stop, int(offsets[first]), records[first:stop]) for first, stop in bounds]


class SmallRaw:
    """Reads small raw tensors of a file. Thread-safe.

    Copies each tensor from the bytes that were read to a new array. This takes a third of the time of
    allocating an array and passing its address to an engine.

    Attributes:
        numbers: name -> index of the tensors that it supports: raw, one chunk, less than
            `array_memory.SHARING` bytes, and not BOOL, whose elements must be checked.
    """

    def __init__(self, tensors: PlainTensors, stored: StoredChunks) -> None:
        self._tensors, self._stored = tensors, stored
        self._sizes = tensors.positions * tensors.itemsize
        chunks = np.diff(tensors.first_chunk)
        small = np.flatnonzero((self._sizes < SHARING) & (chunks == 1)).tolist()
        self.numbers = {
            tensors.names[i]: i
            for i in small
            if tensors.tables[i] is None and tensors.dtypes[i].name != "BOOL"
        }

    def read(self, names: Sequence[str]) -> dict[str, Values] | None:
        """Reads tensors, each into its own memory. Returns None on any problem."""
        tensors = self._tensors
        numbers = np.array([self.numbers[name] for name in names], np.int64)
        chunks = tensors.first_chunk[numbers]
        lengths, sizes = tensors.lengths[chunks], self._sizes[numbers]
        if not are_raw_lengths(lengths, sizes):
            return None
        offsets = np.array(self._stored.starts(names), np.int64)
        regions = _regions(offsets, lengths, tensors.checksums[chunks], np.cumsum(lengths) // BATCH_BYTES)
        out: dict[str, Values] = {}
        for first, stop, offset, records in regions:
            own = slice(first, stop)
            data = self._stored.read_region(offset, records)
            if data is None or not has_zero_padding(data, lengths[own], sizes[own]):
                return None
            starts = offsets[own] - offset
            places = zip(starts.tolist(), (starts + sizes[own]).tolist(), strict=True)
            for name, number, (start, end) in zip(names[own], numbers[own].tolist(), places, strict=True):
                memory = bytearray(data.data[start:end])
                out[name] = np.ndarray(tensors.shapes[number], tensors.dtypes[number].numpy, memory)
        return out


class Bulk:
    """Decodes whole plain tensors of a file together. Thread-safe.

    Attributes:
        numbers: name -> index of the tensors that the engine's plan supports.
    """

    def __init__(self, tensors: PlainTensors, plan: PlainPlan, stored: StoredChunks) -> None:
        self._tensors, self._plan, self._stored = tensors, plan, stored
        known = np.flatnonzero(plan.known).tolist()
        self.numbers = {tensors.names[i]: i for i in known}

    @cached_property
    def _offsets(self) -> Numbers:
        """The file offset of every chunk."""
        tensors = self._tensors
        before = np.cumsum(tensors.lengths) - tensors.lengths
        starts = np.array(self._stored.starts(tensors.names), np.int64)
        counts = np.diff(tensors.first_chunk)
        first = np.append(before, 0)[tensors.first_chunk[:-1]]
        return np.asarray(before + np.repeat(starts - first, counts))

    def read_into(self, out: Mapping[str, NDArray[np.generic]], threads: int) -> bool:
        """Decodes tensors into arrays of their dtypes and shapes, in C order.

        Args:
            out: name -> array; every name is a key of ``numbers``.
            threads: the greatest number of threads.

        Returns:
            Whether all tensors were decoded. If not, the arrays may be partly written.
        """
        numbers = np.array([self.numbers[name] for name in out], np.int64)
        places = np.array([array.__array_interface__["data"][0] for array in out.values()], np.int64)
        chunks, runs = self._runs(numbers, places)
        if not len(chunks):
            return True
        prepared = self._plan.prepare(runs)
        most = max(min(BATCH_BYTES, int(runs.out_size.sum()) // (4 * threads)), 1)
        batch_of = (np.cumsum(runs.out_size) - runs.out_size) // most
        batches = self._batches(chunks, batch_of)
        good: list[bool] = []
        for_each(lambda batch: good.append(self._do(batch, prepared)), batches, min(threads, len(batches)))
        return all(good)

    def _runs(self, numbers: Numbers, places: Numbers) -> tuple[Numbers, PlainRuns]:
        """Returns the indices of all chunks of some tensors, and the runs that decode them.

        Args:
            numbers: index of each tensor.
            places: address of each tensor's array.
        """
        tensors = self._tensors
        counts = np.diff(tensors.first_chunk)[numbers]
        which = np.repeat(np.arange(len(numbers)), counts)
        k = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        tensor = numbers[which]
        chunks = tensors.first_chunk[tensor] + k
        size, item = (tensors.segment * tensors.chunk)[tensor], tensors.itemsize[tensor]
        start = k * size
        total = np.minimum(size, tensors.positions[tensor] - start)
        out = places[which] + start * item
        return chunks, PlainRuns(tensor, total, start, tensors.lengths[chunks], out, total * item)

    def _batches(self, chunks: Numbers, batch_of: Numbers) -> list[list[_Region]]:
        """Groups the chunks into batches, each a list of the regions to read."""
        tensors = self._tensors
        batches: dict[int, list[_Region]] = {}
        for region in _regions(
            self._offsets[chunks], tensors.lengths[chunks], tensors.checksums[chunks], batch_of
        ):
            batches.setdefault(int(batch_of[region.first]), []).append(region)
        return list(batches.values())

    def _do(self, batch: list[_Region], prepared: Any) -> bool:
        """Reads and decodes a batch. Returns whether all of it was decoded."""
        regions = []
        for region in batch:
            data = self._stored.read_region(region.offset, region.records)
            if data is None:
                return False
            regions.append((region.first, region.stop, data))
        return self._plan.decode(prepared, regions)
