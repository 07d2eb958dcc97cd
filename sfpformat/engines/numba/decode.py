"""The decoding functions of the engine.

Rules: a kernel returns either the right result or False. On False the reference decodes, and returns the
result or raises the fault. Only the reference decides whether data are valid.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.codetable import CodeTable
from ...coding.planes import Levels, StreamSpan
from ...coding.planes import decode_levels as decode_levels_plainly
from ..interface import Run
from . import batch, chunk_decoding, streams
from .lookup import lengths_of
from .recipe import STOP_OF, make_recipe, row_of_run, stream_shape
from .working import working_bytes

__all__ = ["decode_levels", "decode_runs", "make_recipe"]

# Memory of each thread: `kept` (`batch.decode_runs`), and `tables_size`, the bytes of it that hold tables.
_thread = threading.local()
# A larger `kept` than this, in bytes, is not kept; only chunks of millions of positions need it.
_MOST_KEPT = 16 << 20


def decode_runs(runs: Sequence[Run[NDArray[Any]]]) -> list[bool]:
    """Implements `Engine.decode_runs`."""
    good = np.zeros(len(runs), np.bool_)
    room = max([run.recipe.room for run in runs])
    most = max([_working_size_of(run) for run in runs])
    kept, tables_size = memory_for(room, most)
    batch.decode_runs(np.array([row_of_run(run) for run in runs], np.int64), kept, tables_size, good)
    return cast(list[bool], good.tolist())


def _working_size_of(run: Run[NDArray[Any]]) -> int:
    segment = run.recipe.segment
    return working_size(-(-run.total // segment), run.stop - run.first, segment)


@cache
def working_size(segments: int, n: int, segment: int) -> int:
    """Returns `working.working_bytes` as an int. Cached, because calls of compiled functions are slow."""
    return int(working_bytes(segments, n, segment))


def memory_for(tables_size: int, working_size: int) -> tuple[NDArray[np.uint8], int]:
    """Returns memory that is large enough, and the size of its tables.

    Reuses this thread's memory if it can.
    """
    kept: NDArray[np.uint8] | None = getattr(_thread, "kept", None)
    if kept is not None and tables_size <= (there := _thread.tables_size):
        tables_size = there
    if kept is not None and 8 * chunk_decoding.FILLED + tables_size + working_size <= len(kept):
        return kept, tables_size
    kept = np.empty(8 * chunk_decoding.FILLED + tables_size + working_size, np.uint8)
    kept[: 8 * chunk_decoding.FILLED] = 0
    if len(kept) <= _MOST_KEPT:
        _thread.kept, _thread.tables_size = kept, tables_size
    return kept, tables_size


def decode_levels(data: Bytes, span: StreamSpan, table: CodeTable) -> Levels:
    """Implements `coding.planes.decode_levels`. Falls back to the reference on any problem."""
    levels = np.empty(int(span.counts.sum()), np.uint64)
    if len(levels) and _is_inside(data, span, table):
        shape = np.array(stream_shape(table, len(levels)), np.int64)
        n, most = len(span.counts), int(span.counts.max())
        if streams.decode_levels(
            data,
            span.prefix_start,
            span.prefix_bits,
            span.residual_start,
            span.residual_bits,
            span.counts,
            span.codes,
            span.trims,
            shape,
            np.frombuffer(lengths_of(table), np.uint8),
            np.empty(shape[STOP_OF], np.uint8),
            np.zeros(chunk_decoding.FILLED_OF, np.int64),
            np.empty((2, n), np.int64),
            most,
            np.empty(working_bytes(n, n, most), np.uint8),
            levels,
        ):
            return levels
    return decode_levels_plainly(data, span, table)


def _is_inside(data: Bytes, span: StreamSpan, table: CodeTable) -> bool:
    """Returns whether the planes end 8 bytes before the data, with residuals of the implied sizes."""
    constant = table.constant_extra
    prefix_end = span.prefix_start + int(span.prefix_bits.sum())
    residual_end = span.residual_start + int(span.residual_bits.sum())
    if max(prefix_end, residual_end) // 8 + 8 > len(data):
        return False
    return constant is None or np.array_equal(span.residual_bits, span.counts * (constant - span.trims))
