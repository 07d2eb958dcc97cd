"""From a plan to the bytes of its chunks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..coding.bits import as_bytes
from ..coding.mask import encode_mask
from ..coding.planes import Counts, Levels, Planes, greatest_trims, segment_sums
from ..container.chunk import build_chunk, build_raw, build_vectors
from ..engines import Engine
from .plan import Plan


def encode_vectors(plan: Plan) -> bytes | None:
    """The vector chunk, or None where the tensor has no vectors."""
    return build_vectors(plan.entry, plan.vectors) if plan.entry.has_vectors() else None


def encode_chunks(plan: Plan, engine: Engine) -> Iterator[bytes]:
    """The chunks, one by one."""
    first = 0
    for block, positions in plan.blocks:
        if plan.fingerprints is None:
            yield build_raw(as_bytes(plan.flat[block].tobytes()))
            continue
        mask = None if plan.survives is None else plan.survives(block)
        survivors = positions if mask is None else segment_sums(mask, positions)
        streams = {"fingerprints": (plan.fingerprints.levels(block, mask), survivors)}
        if mask is not None:
            assert plan.entry.mask is not None
            streams["mask"] = encode_mask(plan.entry.mask.kind, plan.entry.mask.polarity, mask, positions)
        if plan.importance is not None:
            few = plan.importance.over_survivors
            levels = plan.importance.levels(block, mask)
            streams["importance"] = (levels, survivors if few else positions)
        planes = {stream: _encode_stream(plan, engine, stream, first, *streams[stream]) for stream in streams}
        yield build_chunk(plan.entry, survivors, planes)
        first += len(positions)


def _encode_stream(
    plan: Plan, engine: Engine, stream: str, first: int, levels: Levels, counts: Counts
) -> Planes:
    """The planes of a stream over the segments of a chunk, ``first`` being the number of the first."""
    table = plan.entry.streams()[stream]
    codes = plan.codes[stream][first : first + len(counts)].astype(np.int64)
    trims = np.zeros(len(counts), np.int64)
    if stream in plan.entry.trimmed_streams():
        trims = greatest_trims(levels, counts, table.least_extra)
    return engine.encode_levels(levels, counts, codes, trims, table)
