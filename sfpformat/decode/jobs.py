"""Which segments of which chunks are decoded to where: lists of jobs, made before anything is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..container.entry import TensorEntry

# A chunk of a tensor, and the runs of its segments that are wanted: first, stop, and where they go.
Job = tuple[TensorEntry, int, list[tuple[int, int, NDArray[Any]]]]

# Segments between two that are needed are decoded too when they are at most this many: starting a run in the
# reference engine takes as long as decoding about as many.
_JOIN_GAP = 3
# Chunks are read and decoded together while their output takes at most so many bytes: a thread then works for
# a millisecond without a word of Python, and what was read for the checksums is in its cache still.
BATCH_BYTES = 2 << 20


def jobs_of_range(entry: TensorEntry, out: NDArray[Any], low: int, high: int) -> list[Job]:
    """The jobs that decode the positions from ``low`` up to ``high`` into ``out``.

    Args:
        low: where a segment begins.
        high: where a segment or the tensor ends.
    """
    segment, size = entry.segment, entry.segment * entry.chunk
    jobs: list[Job] = []
    for k in range(low // size, -(-high // size)):
        start, stop = max(low, k * size), min(high, (k + 1) * size)
        first, last = (start - k * size) // segment, -(-(stop - k * size) // segment)
        jobs.append((entry, k, [(first, last, out[start - low : stop - low])]))
    return jobs


def batches(jobs: list[Job], threads: int) -> Iterator[list[Job]]:
    """The jobs in their order, some together: enough for every thread, few enough for a cache."""
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
    """The jobs of a tensor with the runs of one chunk together, so that it is read once."""
    by_chunk: dict[int, Job] = {}
    for entry, k, runs in jobs:
        by_chunk.setdefault(k, (entry, k, []))[2].extend(runs)
    return list(by_chunk.values())


def fill_gaps(segments: NDArray[np.int64]) -> NDArray[np.int64]:
    """Adds the segments of gaps so short that decoding them costs less than starting a new run."""
    gaps = np.diff(segments) - 1
    short = np.flatnonzero((gaps > 0) & (gaps <= _JOIN_GAP))
    if not len(short):
        return segments
    filling = [np.arange(segments[i] + 1, segments[i + 1]) for i in short]
    return np.sort(np.concatenate([segments, *filling]))
