"""Chooses the classes of streams of numbers from the counts of one pass over their levels."""

from __future__ import annotations

import numpy as np

from ..coding.classes import (
    CLASS_COST,
    FRACTION,
    Histogram,
    Layout,
    add_histograms,
    entropy_bits,
    histogram,
)
from ..coding.codetable import MAX_CLASSES, MAX_SYMBOLS
from ..coding.counts import Rows
from ..coding.planes import AnyLevels, Counts
from ..engines import Engine
from ..errors import OptionError
from ..options import Options
from .codes import (
    MAX_CODES_TRIED,
    Choice,
    LevelBlocks,
    SymbolCounter,
    SymbolCounts,
    choose_codes,
    count_symbols,
    no_levels,
    one_class,
    total_of,
)
from .windows import choose_windows
from .zeros import cheaper_with_zeros

# The greatest number of classes for pairs: its square is the number of symbols, of which 256 may be used.
_PAIR_CLASSES = 20
# Group -> number of classes. If one class per number gives at most this many classes and there are many
# levels, no other layout is tried: it could only save a part of the table.
_FEW_CLASSES = {1: 64, 2: _PAIR_CLASSES}
_MANY_LEVELS = 1 << 16
# In a stream of numbers with a greater range, numbers are not counted in each segment.
_MOST_COLUMNS = 1024
# Above this entropy in bits, pairs are not tried: the gain is too small for the time.
_PAIR_BITS = 3


def choose_numbers(
    blocks: LevelBlocks,
    bound: int,
    options: Options,
    engine: Engine,
    *,
    signed: bool,
    zero_first: bool = False,
) -> Choice:
    """Chooses the table of a stream of numbers: dyadic classes, of single levels or of pairs.

    A signed level is 2m + s, for the magnitude number m and the sign s.

    Args:
        blocks: the stream.
        bound: no class may reach this level.
        options: the caller's choices.
        engine: the engine that counts.
        signed: whether levels have signs.
        zero_first: whether the number 0 is the magnitude 0, so that its levels +0 and -0 differ.

    Raises:
        OptionError: a number is 2^24 or more, or reaches the bound, or no layout is possible with the code
            lengths of the options.
    """
    sign = 1 if signed else 0
    counts = _number_counts(blocks, sign, engine)
    if not counts.total.any():
        return no_levels(blocks)
    greatest = int(np.flatnonzero(counts.total)[-1])
    if greatest >= bound >> sign:
        raise OptionError(
            f"a weight is {greatest} steps, but with the greatest scale factor only weights below "
            f"{bound >> sign} steps are finite; use a smaller step, more bits, or no scale factors"
        )
    if options.is_plain:
        plain = _plain_layout(counts.total, bound, sign)
        if plain is not None:
            return one_class(blocks, plain, int(counts.total.sum()))
    if options.window is not None:
        windows = _windows(blocks, counts, signed, options.window, engine)
        if windows is not None:
            return windows
    best: Choice | None = None
    for group in _groups(counts.total, options):
        for layout in _layouts(counts.total, bound >> sign, signed, group, options, engine):
            found = _choice(blocks, counts, layout, sign, group, options, engine)
            if found and (best is None or found.bits < best.bits):
                best = found
    if best is None and options.group == 2:
        single = options.but(group=1)
        return choose_numbers(blocks, bound, single, engine, signed=signed, zero_first=zero_first)
    if best is None:
        raise OptionError("no class layout fits this stream; increase code_limit")
    if zero_first and counts.total[0]:
        widths, first = range(1, 0, -1), int(counts.total[0])
        return cheaper_with_zeros(best, blocks, widths, bound, options, engine, MAX_CODES_TRIED, first)
    return best


def _plain_layout(counts: Histogram, bound: int, sign: int) -> Layout | None:
    """Returns a layout of one class for all numbers, as small as possible. None if it exceeds the bound."""
    used = np.flatnonzero(counts)
    first, stop = int(used[0]) << sign, int(used[-1] + 1) << sign
    bits = (stop - first - 1).bit_length()
    return Layout(first, bytes([bits])) if first + (1 << bits) <= bound else None


def _number_counts(blocks: LevelBlocks, sign: int, engine: Engine) -> SymbolCounts:
    """Counts each number from 0. Includes counts per segment if all numbers are below `_MOST_COLUMNS`.

    Raises:
        OptionError: a number is 2^24 or more.
    """

    def count(levels: AnyLevels, counts: Counts) -> tuple[Histogram, Rows | None]:
        greatest = int(levels.max()) >> sign if len(levels) else -1
        if greatest >= 1 << 24:
            raise OptionError("a weight is 2^24 steps or more; use a larger step, or the quantiser Exact()")
        if greatest >= _MOST_COLUMNS:
            return histogram(levels >> levels.dtype.type(sign)), None
        rows = engine.count_classes(levels, counts, sign, 0, greatest + 1)
        return total_of(rows), rows

    counter = SymbolCounter(blocks.segments)
    total, wide = np.zeros(0, np.int64), False
    for totals, rows in blocks.map(count):
        total = add_histograms(total, totals)
        wide = wide or rows is None
        if rows is not None and not wide:
            counter.add(0, rows, totals)
    if wide:
        return SymbolCounts(total, np.zeros((0, len(total)), np.int32), blocks.segments, None)
    return counter.counts(0, len(total))


def _groups(total: Histogram, options: Options) -> tuple[int, ...]:
    """Returns the group sizes to try (levels per symbol)."""
    if options.group:
        return (options.group,)
    bits = entropy_bits(total) / (int(total.sum()) << FRACTION)
    return (1, 2) if bits <= _PAIR_BITS else (1,)


def _layouts(
    counts: Histogram, limit: int, signed: bool, group: int, options: Options, engine: Engine
) -> list[Layout]:
    """Returns the layouts to try."""
    singles = _singles(counts, signed)
    many = int(counts.sum()) >= _MANY_LEVELS
    if many and singles is not None and len(singles.extra) <= _FEW_CLASSES[group]:
        return [singles]
    fitting = _fitting_layout(counts, limit, signed, group, options, engine)
    return [layout for layout in {fitting: None, singles: None} if layout is not None]


def _choice(
    blocks: LevelBlocks,
    counts: SymbolCounts,
    layout: Layout,
    sign: int,
    group: int,
    options: Options,
    engine: Engine,
) -> Choice | None:
    """Returns the best choice for a layout, or None if it has too many classes.

    Args:
        counts: counts of the numbers, not of the symbols.
    """
    if len(layout.extra) == 1:
        return one_class(blocks, layout, int(counts.total.sum()))
    if len(layout.extra) > MAX_CLASSES[group]:
        return None
    if group == 2 or not len(counts.sample):
        of_symbols = count_symbols(blocks, layout, group, engine)
    else:
        of_symbols = _of_classes(counts, layout, sign)
    return choose_codes(blocks, of_symbols, layout, group, options, engine)


def _of_classes(counts: SymbolCounts, layout: Layout, sign: int) -> SymbolCounts:
    """Returns the counts of the classes of a layout, from the counts of all numbers."""
    sizes = np.int64(1) << (np.frombuffer(layout.extra, np.uint8).astype(np.int64) - sign)
    return counts.summed((layout.base >> sign) + np.cumsum(sizes) - sizes)


def _windows(
    blocks: LevelBlocks, counts: SymbolCounts, signed: bool, width: int, engine: Engine
) -> Choice | None:
    """Returns the choice with windows of one class per number; None if that is not possible or too large."""
    layout = _singles(counts.total, signed)
    if layout is None or len(layout.extra) == 1 or not len(counts.sample):
        return None
    of_classes = _of_classes(counts, layout, 1 if signed else 0)
    return choose_windows(blocks, of_classes, layout, width, engine)


def _fitting_layout(
    counts: Histogram, limit: int, signed: bool, group: int, options: Options, engine: Engine
) -> Layout | None:
    """Returns the best layout with at most as many classes as the group allows, or None."""
    most = _PAIR_CLASSES if group == 2 else min(MAX_SYMBOLS, 1 << options.code_limit)
    for doubling in range(16):
        layout = engine.best_layout(counts, signed, limit, CLASS_COST << doubling)
        if len(layout.extra) <= most:
            return layout
    return None


def _singles(counts: Histogram, signed: bool) -> Layout | None:
    """Returns a layout of one class per number, or None if that gives too many classes.

    With such a layout, all residuals have one width, so that the index does not store their lengths.
    """
    used = np.flatnonzero(counts)
    sign = 1 if signed else 0
    if used[-1] - used[0] >= MAX_SYMBOLS:
        return None
    return Layout(int(used[0]) << sign, bytes([sign]) * int(used[-1] - used[0] + 1))
