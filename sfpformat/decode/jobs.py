"""Plans decoding: lists, before chunks are read, which segments are decoded into which arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..container.entry import TensorEntry

# A tensor, the number of one of its chunks, and the runs of segments to decode: first, stop, output array.
Job = tuple[TensorEntry, int, list[tuple[int, int, NDArray[Any]]]]

# A gap of at most this many segments between two needed ones is decoded too: the reference engine takes about
# as long to start a run as to decode this many segments.
_JOIN_GAP = 3
# The greatest output of a batch of chunks that are read and decoded together, in bytes. A thread then runs
# about a millisecond without Python code, and decodes bytes that are still in its cache from the checksum.
BATCH_BYTES = 2 << 20


def jobs_of_range(entry: TensorEntry, out: NDArray[Any], low: int, high: int) -> list[Job]:
    """Returns the jobs that decode the positions from ``low`` up to, not including, ``high`` into ``out``.

    Args:
        entry: the tensor's entry.
        out: one element per position.
        low: the first position of a segment.
        high: the end of a segment or of the tensor.
    """
    segment, size = entry.segment, entry.segment * entry.chunk
    jobs: list[Job] = []
    for k in range(low // size, -(-high // size)):
        start, stop = max(low, k * size), min(high, (k + 1) * size)
        first, last = (start - k * size) // segment, -(-(stop - k * size) // segment)
        jobs.append((entry, k, [(first, last, out[start - low : stop - low])]))
    return jobs


def batches(jobs: list[Job], threads: int) -> Iterator[list[Job]]:
    """Yields consecutive jobs in batches: about four per thread; at most `BATCH_BYTES`, or one job."""
    sizes = [sum([out.nbytes for _, _, out in runs]) for _, _, runs in jobs]
    most = min(BATCH_BYTES, sum(sizes) // (4 * threads))
    batch: list[Job] = []
    size = 0
    for job, more in zip(jobs, sizes, strict=True):
        if batch and size + more > most:
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += more
    if batch:
        yield batch


def joined(jobs: list[Job]) -> list[Job]:
    """Merges the jobs of one chunk, so that the chunk is read once. All jobs are of one tensor."""
    by_chunk: dict[int, Job] = {}
    for entry, k, runs in jobs:
        by_chunk.setdefault(k, (entry, k, []))[2].extend(runs)
    return list(by_chunk.values())


def fill_gaps(segments: NDArray[np.int64]) -> NDArray[np.int64]:
    """Adds the segments in short gaps: decoding them takes less time than starting a new run.

    Args:
        segments: numbers of segments, ascending.

    Returns:
        All numbers, ascending.
    """
    gaps = np.diff(segments) - 1
    short = np.flatnonzero((gaps > 0) & (gaps <= _JOIN_GAP))
    if not len(short):
        return segments
    filling = [np.arange(segments[i] + 1, segments[i + 1]) for i in short]
    return np.sort(np.concatenate([segments, *filling]))
