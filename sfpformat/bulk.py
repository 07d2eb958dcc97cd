"""All chunks of many plain tensors at once (see `container.plain`): what loading a whole model is.

Rules: this way names no fault. Where anything is not as it should be, it gives up, and whoever asked goes the
way of jobs, which gives the weights or the fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .codec.jobs import BATCH_BYTES
from .container.plain import Numbers, PlainTensors
from .engines import PlainPlan, PlainRuns
from .parallel import for_each
from .stored import StoredChunks


class _Region(NamedTuple):
    """Neighbouring chunks in the file.

    Attributes:
        first, stop: their numbers among all chunks that are asked for.
        offset: where in the file the first begins.
        records: length and checksum of each.
    """

    first: int
    stop: int
    offset: int
    records: list[tuple[int, int]]


class Bulk:
    """Decodes whole plain tensors of a file; used by any number of threads."""

    def __init__(self, tensors: PlainTensors, plan: PlainPlan, stored: StoredChunks) -> None:
        self._tensors, self._plan, self._stored = tensors, plan, stored
        known = plan.known.tolist()
        self._number = {name: i for i, name in enumerate(tensors.names) if known[i]}

    def __contains__(self, name: str) -> bool:
        return name in self._number

    @cached_property
    def _offsets(self) -> Numbers:
        """File offset of every chunk."""
        tensors = self._tensors
        before = np.cumsum(tensors.lengths) - tensors.lengths
        starts = np.array([self._stored.start(name) for name in tensors.names], np.int64)
        counts = np.diff(tensors.first_chunk)
        first = np.append(before, 0)[tensors.first_chunk[:-1]]
        return np.asarray(before + np.repeat(starts - first, counts))

    def read_into(self, out: Mapping[str, NDArray[np.generic]], threads: int) -> bool:
        """Decodes some of its tensors into arrays of their dtypes and shapes, C order; if all is well."""
        numbers = np.array([self._number[name] for name in out], np.int64)
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
        """The numbers of all chunks of some tensors, and what to do with them."""
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
        """The regions that each batch fetches."""
        offsets, lengths = self._offsets[chunks], self._tensors.lengths[chunks]
        checksums = self._tensors.checksums[chunks].tolist()
        apart = offsets[1:] != offsets[:-1] + lengths[:-1]
        cuts = np.flatnonzero(apart | (np.diff(batch_of) != 0)) + 1
        records = list(zip(lengths.tolist(), checksums, strict=True))
        batches: dict[int, list[_Region]] = {}
        for first, stop in pairwise([0, *cuts.tolist(), len(chunks)]):
            region = _Region(first, stop, int(offsets[first]), records[first:stop])
            batches.setdefault(int(batch_of[first]), []).append(region)
        return list(batches.values())

    def _do(self, batch: list[_Region], prepared: Any) -> bool:
        """Fetches and decodes a batch; whether all is well."""
        regions = []
        for region in batch:
            data = self._stored.read_region(region.offset, region.records)
            if data is None:
                return False
            regions.append((region.first, region.stop, data))
        return self._plan.decode(prepared, regions)
