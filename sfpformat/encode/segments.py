"""Chooses the default number of positions per segment, and of segments per chunk."""

from __future__ import annotations

from functools import lru_cache

from ..container.entry import MAX_CHUNK_POSITIONS
from ..options import Options

# Above this density of survivors a tensor is dense: the planner also tries coding without a mask.
DENSE = 0.6
# Approximate number of positions in a default segment of a dense tensor. With fewer survivors, segments are
# longer, so that the segment index stays a small part of the data (figures in tests/figures/README.md). Dense
# exact tensors have segments of twice this size, because their codes differ less from segment to segment.
SEGMENT = 1536


def default_segment(columns: int, density: float, exact: bool, options: Options) -> int:
    """Returns the number of positions per segment: whole rows or an equal part of a row if possible.

    Args:
        columns: positions per row.
        density: survivors per position, from 0 to 1.
        exact: whether the quantiser is `Exact`.
        options: the caller's choices; with fixed width a segment has at most one row.
    """
    usual = SEGMENT * next(k for k in (1, 2, 4, 8) if density * k >= 0.5 or k == 8)
    if exact and density > DENSE:
        usual = 2 * SEGMENT
    return _segment_near(columns, options.segment_near or usual, options.is_plain)


@lru_cache(maxsize=256)
def _segment_near(columns: int, wanted: int, of_one_row: bool) -> int:
    """Returns a segment size near ``wanted``: whole rows or an equal part of a row; else ``wanted``.

    Args:
        columns: positions per row.
        wanted: the preferred size.
        of_one_row: whether a segment may have at most one row.
    """
    parts = [columns // k for k in range(1, columns // 32 + 1) if columns % k == 0]
    rows = [] if of_one_row else [columns * k for k in range(2, 64)]
    fits = [s for s in parts + rows if s % 32 == 0]
    near = [s for s in fits if wanted <= 2 * s <= 4 * wanted] or (fits if of_one_row else [])
    return min(near, key=lambda s: (max(s, wanted) * 1000 // min(s, wanted), s)) if near else wanted


def default_chunk(columns: int, segment: int, options: Options) -> int:
    """Returns the number of segments per chunk. With fixed width, chunks have whole rows if possible."""
    chunk = max(options.chunk // segment, 1)
    if not options.is_plain or not columns or columns % segment or columns > MAX_CHUNK_POSITIONS:
        return chunk
    row = columns // segment
    return max(chunk // row, 1) * row
