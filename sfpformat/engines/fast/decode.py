"""The fast engine's decoding.

Rules: a kernel either gives the right result or says no. Whoever says no hands over to the reference, which
gives the result or the fault; there is no second judgement of what is valid.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.codetable import CodeTable
from ...coding.planes import Levels, StreamSpan
from ...coding.planes import decode_levels as decode_levels_plainly
from . import chunks
from .lookup import fill_tables
from .recipe import STOP_OF, Recipe, make_recipe, stream_shape

__all__ = ["decode_levels", "decode_values", "make_recipe"]


def decode_values(
    recipe: Recipe, data: Bytes, total: int, start: int, first: int, stop: int, out: NDArray[np.generic]
) -> bool:
    """The weights of a run of segments of a chunk.

    Args:
        recipe: the tensor's.
        data: all bytes of the chunk.
        total: positions of the chunk.
        start: position in the tensor of the chunk's first.
        first, stop: the run, numbered within the chunk.
        out: the positions of the run, contiguous.

    Returns:
        Whether ``out`` now has the weights; if not, it means nothing.
    """
    return bool(
        chunks.decode_values(
            data,
            total,
            start,
            first,
            stop,
            recipe.whole,
            recipe.shapes,
            recipe.tables,
            recipe.patterns,
            recipe.magnitudes,
            recipe.scale,
            recipe.importances,
            recipe.rows,
            recipe.columns,
            out.view(np.uint8),
        )
    )


def decode_levels(data: Bytes, span: StreamSpan, table: CodeTable) -> Levels:
    """As `coding.planes.decode_levels`."""
    levels = np.empty(int(span.counts.sum()), np.uint64)
    if len(levels) and _is_inside(data, span, table):
        shape = np.array(stream_shape(table, len(levels)), np.int64)
        tables = np.empty(shape[STOP_OF], np.uint8)
        if fill_tables(table, int(shape[STOP_OF - 3]), tables) and chunks.decode_levels(
            data,
            span.prefix_start,
            span.prefix_bits,
            span.residual_start,
            span.residual_bits,
            span.counts,
            span.codes,
            span.trims,
            shape,
            tables,
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
