"""The fast engine's decoding.

Rules: a kernel either gives the right result or says no. Whoever says no hands over to the reference, which
gives the result or the fault; there is no second judgement of what is valid.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.codetable import CodeTable
from ...coding.planes import Levels, StreamSpan
from ...coding.planes import decode_levels as decode_levels_plainly
from ..interface import Run
from . import batch, chunks
from .lookup import lengths_of
from .recipe import make_recipe, row_of_run, stream_shape

__all__ = ["decode_levels", "decode_runs", "make_recipe"]

# Memory of each thread: `tables` for the tables of the tensor that it decodes, half a megabyte a stream at
# most, and `filled` for which tensor that is and which of them are there.
_thread = threading.local()


def decode_runs(runs: Sequence[Run]) -> list[bool]:
    """See `Engine.decode_runs`."""
    good = np.zeros(len(runs), np.bool_)
    room = max([run.recipe.room for run in runs])
    tables: NDArray[np.uint8] | None = getattr(_thread, "tables", None)
    if tables is None or len(tables) < room:
        _thread.tables = tables = np.empty(room, np.uint8)
        _thread.filled = np.zeros(chunks.FILLED, np.int64)
    batch.decode_runs(np.array([row_of_run(run) for run in runs], np.int64), tables, _thread.filled, good)
    return cast(list[bool], good.tolist())


def decode_levels(data: Bytes, span: StreamSpan, table: CodeTable) -> Levels:
    """As `coding.planes.decode_levels`."""
    levels = np.empty(int(span.counts.sum()), np.uint64)
    if len(levels) and _is_inside(data, span, table):
        shape = np.array(stream_shape(table, len(levels)), np.int64)
        if chunks.decode_levels(
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
            levels,
        ):
            return levels
    return decode_levels_plainly(data, span, table)


def _is_inside(data: Bytes, span: StreamSpan, table: CodeTable) -> bool:
    """Whether the planes end 8 bytes before the data do, with residuals of the implied sizes."""
    constant = table.constant_extra
    prefix_end = span.prefix_start + int(span.prefix_bits.sum())
    residual_end = span.residual_start + int(span.residual_bits.sum())
    if max(prefix_end, residual_end) // 8 + 8 > len(data):
        return False
    return constant is None or np.array_equal(span.residual_bits, span.counts * (constant - span.trims))
