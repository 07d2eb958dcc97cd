"""Plans decoding: lists which segments of which chunks are decoded into which arrays, before reading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..container.entry import TensorEntry

# A tensor, the number of one of its chunks, and the runs of segments to decode: first, stop, output array.
Job = tuple[TensorEntry, int, list[tuple[int, int, NDArray[Any]]]]

# A gap of at most this many unneeded segments is decoded too: starting a run in the reference engine takes
# about as long as decoding this many segments.
_JOIN_GAP = 3
# The greatest output of a batch of chunks that are read and decoded together, in bytes. A thread then runs
# about a millisecond without Python code, and the bytes read for the checksums are still in its cache.
BATCH_BYTES = 2 << 20


def jobs_of_range(entry: TensorEntry, out: NDArray[Any], low: int, high: int) -> list[Job]:
    """Returns the jobs that decode the positions from ``low`` up to, not including, ``high`` into ``out``.

    Args:
        entry: of the tensor.
        out: one element per position.
        low: the beginning of a segment.
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
    """Yields batches of consecutive jobs: about four per thread, of at most `BATCH_BYTES` if over one job."""
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
    """Adds the segments in short gaps, because decoding them costs less than starting a new run."""
    gaps = np.diff(segments) - 1
    short = np.flatnonzero((gaps > 0) & (gaps <= _JOIN_GAP))
    if not len(short):
        return segments
    filling = [np.arange(segments[i] + 1, segments[i + 1]) for i in short]
    return np.sort(np.concatenate([segments, *filling]))
