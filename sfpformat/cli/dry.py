"""Dry run of ``sfp pack``: encodes all tensors, measures sizes and errors, and writes nothing."""

from __future__ import annotations

import numpy as np

from ..container.entry import TensorEntry
from ..decode.reader import SfpFile
from ..encode.sink import CountingSink, MemorySink
from ..encode.writer import Writer
from .console import Progress
from .outcome import Outcome, outcome
from .pack_files import Job, add_tensor
from .rules import TensorConfig


def sizes_of_file(
    job: Job, asked: dict[str, TensorConfig], names: list[str], metadata: dict[str, str], progress: Progress
) -> tuple[list[Outcome], int]:
    """Returns the outcome of each tensor, and the size of the file that `pack_files.pack_file` would write.

    Args:
        asked: tensor name -> configuration, before budgets were shared.
        job: the job.
        names, metadata: same as for `pack_files.pack_file`.
        progress: advances by the bytes of each tensor.
    """
    outcomes: list[Outcome] = []

    def take(entry: TensorEntry, chunks: bytes) -> None:
        with _file_of(entry, chunks, job) as file:
            outcomes.append(outcome(job, asked[entry.name], file, entry.name, compare=False))

    sink = CountingSink(take)
    weights = sum(job.model.specs[name].elements for name in names)
    merged = {**metadata, **job.metadata}
    with Writer(sink, metadata=merged, limits=job.limits, weights=weights) as writer:
        for name in names:
            add_tensor(job, name, writer, progress)
    return outcomes, sink.size


def _file_of(entry: TensorEntry, chunks: bytes, job: Job) -> SfpFile:
    """Returns a file in memory that contains one encoded tensor.

    Args:
        entry: the directory entry of the tensor.
        chunks: its vectors, if any, and its chunks.
        job: the job.
    """
    records = ([] if entry.vectors is None else [entry.vectors]) + [entry.chunks]
    parts, at = [], 0
    for length in (int(size) for record in records for size in record["length"]):
        parts.append(np.frombuffer(chunks, np.uint8, length, at))
        at += length
    vectors = parts.pop(0) if entry.vectors is not None else None
    target = MemorySink()
    with Writer(target, limits=job.limits) as writer:
        writer.add_encoded(entry, vectors, parts)
    return SfpFile(target.data, limits=job.limits)
