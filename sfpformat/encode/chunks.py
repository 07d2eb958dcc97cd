"""Encodes the chunks of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import Bytes
from ..coding.planes import AnyLevels, Counts, Planes, trims_of
from ..container.chunk import build_chunk, build_raw, build_vectors
from ..container.entry import CHUNK_RECORD
from ..engines import Engine
from ..errors import OptionError
from ..io.checksum import crc32
from .planner import Plan


class Chunk(NamedTuple):
    """An encoded chunk.

    Attributes:
        parts: its bytes.
        record: its record in the directory, shape [1].
    """

    parts: Sequence[Bytes]
    record: NDArray[np.void]

    @classmethod
    def of(cls, parts: Sequence[Bytes]) -> Chunk:
        """Returns a chunk with its length and checksum.

        Raises:
            OptionError: the chunk has more than 4 GiB - 1.
        """
        length, checksum = sum(map(len, parts)), 0
        if length >= 1 << 32:
            raise OptionError(
                f"a chunk would have {length:,} bytes, but at most 4 GiB - 1 are allowed; use smaller chunks"
            )
        for part in parts:
            checksum = crc32(part.data, checksum)
        return cls(parts, np.array([(length, checksum)], CHUNK_RECORD))


def encode_vectors(plan: Plan) -> Chunk | None:
    """Returns the encoded vector chunk, or None if the tensor has no vectors."""
    return Chunk.of([build_vectors(plan.entry, plan.vectors)]) if plan.entry.has_vectors() else None


@dataclass(frozen=True)
class ChunkJob:
    """A chunk to encode.

    Attributes:
        first: number of its first segment in the tensor.
        block: its positions.
        positions: number of positions in each segment, int64 [segments].
    """

    first: int
    block: slice
    positions: Counts


def chunk_jobs(plan: Plan) -> Iterator[ChunkJob]:
    """Yields the jobs of a tensor's chunks, in order."""
    first = 0
    for block, positions in plan.blocks:
        yield ChunkJob(first, block, positions)
        first += len(positions)


def encode_chunk(plan: Plan, engine: Engine, job: ChunkJob) -> Chunk:
    """Encodes a chunk. Chunks do not depend on each other."""
    if plan.coded is None:
        return Chunk.of([build_raw(plan.flat[job.block].view(np.uint8))])
    survivors = plan.coded.survivors(job.block, job.positions)
    streams = {"fingerprints": (survivors.levels, survivors.counts)}
    if plan.entry.mask is not None:
        kind, polarity = plan.entry.mask.kind, plan.entry.mask.polarity
        streams["mask"] = plan.coded.mask_levels(kind, polarity, job.block, job.positions)
    if plan.importance is not None:
        levels = plan.importance.levels(job.block, plan.coded.mask(job.block))
        streams["importance"] = levels, survivors.counts if plan.importance.over_survivors else job.positions
    planes = {stream: _encode_stream(plan, engine, stream, job.first, *streams[stream]) for stream in streams}
    return Chunk.of(build_chunk(plan.entry, survivors.counts, planes))


def _encode_stream(
    plan: Plan, engine: Engine, stream: str, first: int, levels: AnyLevels, counts: Counts
) -> Planes:
    """Encodes the planes of a stream for the segments of a chunk; ``first`` is the first segment's number."""
    table = plan.entry.streams()[stream]
    codes = plan.codes[stream][first : first + len(counts)].astype(np.int64)
    trims = np.zeros(len(counts), np.int64)
    if stream not in plan.entry.exact_streams():
        return engine.encode_levels(levels, counts, codes, trims, table)
    if stream in plan.entry.trimmed_streams():
        trims = trims_of(engine.exact_zeros(levels, counts), table.least_extra)
    return engine.encode_exact(levels, counts, codes, trims, table)
