"""Chooses windows instead of prefix codes for a stream (SPEC.md chapter 8)."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..coding.classes import Layout
from ..coding.codetable import MAX_WINDOWED_CLASSES, CodeTable
from ..coding.planes import AnyLevels, Counts
from ..coding.windows import best_windows
from ..engines import Engine
from .codes import INDEX_BITS, Choice, LevelBlocks, SymbolCounts

# Windows are used if at most 1/_MOST_ESCAPED of the levels are outside. This bounds the size: an escaped
# level takes the bits of a symbol, and up to 8 for its class.
_MOST_ESCAPED = 8


def choose_windows(
    blocks: LevelBlocks, counts: SymbolCounts, layout: Layout, width: int, engine: Engine
) -> Choice | None:
    """Chooses the window of each segment: the one that contains most of its levels (R-CAN-010).

    Args:
        blocks: the stream.
        counts: counts of the layout's classes.
        layout: at least two classes.
        width: bits of a symbol; fewer are used if the layout has fewer classes than a window.
        engine: the engine that counts.

    Returns:
        The choice; None if the layout has more classes than a table with windows can have, or if too many
        levels are outside.
    """
    classes = len(layout.extra)
    if classes > MAX_WINDOWED_CLASSES:
        return None
    width = min(width, (classes + 1).bit_length() - 1)
    table = CodeTable(layout.base, layout.extra, window=width)
    if counts.rows is not None:
        windows, outside = best_windows(counts.rows, width)
    else:
        work = partial(_windows_of_chunk, layout=layout, width=width, engine=engine)
        parts = list(blocks.map_levels(work))
        windows = np.concatenate([part for part, _ in parts])
        outside = np.concatenate([part for _, part in parts])
    levels, escaped = int(counts.total.sum()), int(outside.sum())
    if escaped * _MOST_ESCAPED > levels:
        return None
    bits = levels * width + escaped * table.escape_bits + 8 * classes
    bits += int(counts.total @ table.class_extra.astype(np.int64))
    bits += counts.segments * (INDEX_BITS + (table.code_count - 1).bit_length())
    bits += INDEX_BITS * counts.segments if table.constant_extra is None else 0
    return Choice(table, windows, bits)


def _windows_of_chunk(
    levels: AnyLevels, counts: Counts, layout: Layout, width: int, engine: Engine
) -> tuple[NDArray[np.uint8], Counts]:
    """Calls `best_windows` for the segments of a chunk."""
    return best_windows(engine.count_symbols(levels, counts, layout, 1), width)
