"""Fast path for dense lossless tensors: plans them from one compiled pass over the weights.

Makes the same choices as `planner.Planner`, whose many steps take most of the time of tensors of less than a
million weights. Returns None if a tensor might need another choice; the caller then uses the planner.
"""

from __future__ import annotations

from dataclasses import replace

from ..coding.exact_encoding import Patterns
from ..coding.planes import AnyLevels, Counts
from ..coding.quantisers import Exact, float_patterns, may_be_narrower
from ..container.stream_maps import FingerprintsEntry
from ..engines import Engine
from ..io.threads import Workers
from ..options import Lossless, Options
from .blocks import Blocks, CodedBlocks, segment_counts
from .codes import LevelBlocks
from .exact_survey import survey_dense
from .exact_tables import choose_exact
from .level_sources import MAX_DISTINCT, ExactSource, may_be_values
from .planner import NEARLY_ALL, Plan
from .segments import default_chunk, default_segment

# With several threads, tensors of more chunks are planned by all threads.
_MOST_CHUNKS = 4


def plan_dense(raw: Plan, options: Options, engine: Engine, workers: Workers) -> Plan | None:
    """Plans a tensor without a mask and importance as bit patterns in its own dtype, if that is the choice.

    Args:
        raw: the plan for coding raw, of a float dtype.
        options: the caller's choices.
        engine: the engine that counts.
        workers: the threads that count.

    Returns:
        The plan with the estimate of its bits, the same as those of `Planner.plan`; or None.
    """
    entry, flat, dtype = raw.entry, raw.flat, raw.entry.dtype
    if dtype.itemsize not in (2, 4) or not len(flat) or options.code_limit < 8:
        return None
    if not isinstance(options.quantiser, Lossless) or options.mask != "auto":
        return None
    patterns: Patterns = float_patterns(flat, dtype)
    if options.narrow and may_be_narrower(patterns, dtype):
        return None
    segment = options.segment or default_segment(entry.columns, 1.0, True, options)
    blocks = Blocks(len(flat), segment, default_chunk(entry.columns, segment, options))
    size = blocks.segment * blocks.chunk
    if workers.threads > 1 and len(flat) > _MOST_CHUNKS * size:
        return None
    magnitudes = engine.few_magnitudes(patterns, MAX_DISTINCT)
    if magnitudes is not None and may_be_values(magnitudes, flat):
        return None
    counts = segment_counts(len(flat), segment)
    survey = survey_dense(patterns, counts, size, dtype, options, engine)
    if survey is None or (len(flat) - survey.lowest) / len(flat) <= NEARLY_ALL:
        return None
    quantiser = Exact(dtype)
    coded = CodedBlocks(ExactSource(flat, dtype, dtype, None, engine), None, engine)

    def levels(block: slice, positions: Counts) -> tuple[AnyLevels, Counts]:
        return patterns[block], positions

    stream = LevelBlocks(len(counts), blocks, levels, True, workers)
    choice = choose_exact(stream, dtype, quantiser.fingerprint_bound(dtype), options, engine, survey)
    entry = replace(
        entry,
        coding="fingerprint",
        segment=segment,
        chunk=blocks.chunk,
        fingerprints=FingerprintsEntry(Exact(dtype, choice.trim), choice.table),
    )
    return Plan(entry, flat, blocks, coded, {"fingerprints": choice.codes}, bits=choice.bits)
