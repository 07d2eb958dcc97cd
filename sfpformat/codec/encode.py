"""From a plan to the bytes of its chunks."""

from __future__ import annotations

from collections.abc import Iterator

from ..coding.bits import as_bytes
from ..coding.mask import encode_mask
from ..coding.planes import segment_sums
from ..container.chunk import build_chunk, build_raw, build_vectors
from ..engines import Engine
from .plan import Plan


def encode_vectors(plan: Plan) -> bytes | None:
    """The vector chunk, or None where the tensor has no vectors."""
    return build_vectors(plan.entry, plan.vectors) if plan.entry.has_vectors() else None


def encode_chunks(plan: Plan, engine: Engine) -> Iterator[bytes]:
    """The chunks, one by one."""
    first = 0
    for block, counts in plan.blocks:
        if plan.fingerprints is None:
            yield build_raw(as_bytes(plan.flat[block].tobytes()))
            continue
        entry, codes = (
            plan.entry,
            {
                stream: numbers[first : first + len(counts)].astype("int64")
                for stream, numbers in plan.codes.items()
            },
        )
        first += len(counts)
        mask = None if plan.survives is None else plan.survives(block)
        survivors = counts if mask is None else segment_sums(mask, counts)
        planes = {}
        if mask is not None:
            assert entry.mask is not None
            levels, runs = encode_mask(entry.mask.kind, entry.mask.polarity, mask, counts)
            planes["mask"] = engine.encode_levels(levels, runs, codes["mask"], entry.mask.table)
        assert entry.fingerprints is not None
        planes["fingerprints"] = engine.encode_levels(
            plan.fingerprints.levels(block, mask),
            survivors,
            codes["fingerprints"],
            entry.fingerprints.table,
        )
        if plan.importance is not None:
            assert entry.importance is not None
            assert entry.importance.table is not None
            few = mask is not None and plan.importance.over_survivors
            planes["importance"] = engine.encode_levels(
                plan.importance.levels(block, mask),
                survivors if few else counts,
                codes["importance"],
                entry.importance.table,
            )
        yield build_chunk(entry, survivors, planes)
