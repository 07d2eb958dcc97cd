"""Chooses the Huffman codes of a stream: their number, the segments that share one, and the code lengths.

Theory of operation: one pass over the levels counts the symbols of every segment. All further choices use
these counts, which are kept if they fit in `KEPT_BYTES`. For a larger tensor only a sample is kept, and a
second pass over the levels assigns a code to each segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..coding.classes import Histogram, Layout
from ..coding.codetable import EMPTY_TABLE, MAX_CLASSES, MAX_SYMBOLS, CodeTable, PrefixCode
from ..coding.counts import Costs, Rows
from ..coding.planes import AnyLevels, Counts
from ..coding.quantisers import patterns_to_levels
from ..engines import Engine
from ..io.threads import Workers
from ..options import Options

T = TypeVar("T")

MAX_CODES_TRIED = 8
# Number of segments, evenly spaced, from which codes are built.
_SAMPLE_SEGMENTS = 4096
# The greatest size of the kept symbol counts of a tensor, in bytes.
KEPT_BYTES = 1 << 26
# Approximate cost of one quantity in the segment index, in bits per segment.
INDEX_BITS = 9


@dataclass(frozen=True)
class LevelBlocks:
    """The levels of a stream, chunk by chunk. Can be iterated several times.

    Attributes:
        segments: number of segments of the stream.
        blocks: the positions of each chunk, and the number of positions in each of its segments.
        make: returns the levels of a chunk, and the number of levels in each of its segments. Several threads
            may call it.
        exact: whether ``make`` returns bit patterns instead of levels (exact streams).
        workers: the threads that make and process the levels.
    """

    segments: int
    blocks: Iterable[tuple[slice, Counts]]
    make: Callable[[slice, Counts], tuple[AnyLevels, Counts]]
    exact: bool = False
    workers: Workers = field(default_factory=Workers)

    def map(self, work: Callable[[AnyLevels, Counts], T]) -> Iterator[T]:
        """Yields the result of ``work`` for the levels, or bit patterns, of each chunk, in order."""
        return self.workers.map(lambda block: work(*self.make(*block)), self.blocks)

    def map_levels(self, work: Callable[[AnyLevels, Counts], T]) -> Iterator[T]:
        """Yields the result of ``work`` for the levels of each chunk, in order; converts bit patterns."""
        if not self.exact:
            return self.map(work)
        return self.map(lambda patterns, counts: work(patterns_to_levels(patterns), counts))


@dataclass(frozen=True)
class Choice:
    """The coding of a stream.

    Attributes:
        table: the code table.
        codes: the number of the code of each segment, uint8 [segments].
        bits: estimate of the bits of the stream, including its table and index.
        trim: whether segments have trims.
    """

    table: CodeTable
    codes: NDArray[np.uint8]
    bits: int
    trim: bool = False


@dataclass(frozen=True)
class SymbolCounts:
    """The symbol counts of a stream's segments.

    Attributes:
        total: sum over all segments, shape [symbols].
        sample: counts of some segments, evenly spaced, shape [segments sampled, symbols].
        segments: number of segments of the stream.
        rows: counts of all segments, shape [segments, symbols], or None if they were not kept.
    """

    total: Histogram
    sample: Rows
    segments: int
    rows: Rows | None

    @classmethod
    def of(cls, total: Histogram, rows: Rows) -> SymbolCounts:
        """Returns the counts of a stream from the counts of all segments and their sum."""
        return cls(total, rows[:: _every(len(rows))], len(rows), rows)

    def summed(self, starts: NDArray[np.int64]) -> SymbolCounts:
        """Returns the counts of groups of consecutive symbols.

        Args:
            starts: first symbol of each group. Symbols before the first group do not occur.
        """
        total = np.add.reduceat(self.total, starts)
        rows = None if self.rows is None else _summed(self.rows, starts)
        sample = _summed(self.sample, starts) if rows is None else rows[:: _every(self.segments)]
        return SymbolCounts(total, sample, self.segments, rows)


def _summed(rows: Rows, starts: NDArray[np.int64]) -> Rows:
    first = int(starts[0])
    if first + len(starts) == rows.shape[1]:
        return rows[:, first:]
    return np.add.reduceat(rows, starts, axis=1, dtype=np.int32)


def _every(segments: int) -> int:
    return max(-(-segments // _SAMPLE_SEGMENTS), 1)


class SymbolCounter:
    """Collects the symbol counts of a stream, chunk by chunk. If they exceed `KEPT_BYTES`, keeps a sample."""

    def __init__(self, segments: int) -> None:
        self._segments = segments
        self._parts: list[tuple[int, Rows]] = []  # first symbol, counts
        self._totals: list[tuple[int, Histogram]] = []  # first symbol, counts
        self._bytes = self._seen = 0
        self._whole = True

    def add(self, first: int, rows: Rows, totals: Histogram | None = None) -> None:
        """Adds the counts of a chunk.

        Args:
            first: the symbol of column 0.
            rows: counts of each segment.
            totals: sum over all segments of the chunk, if the caller has it; None computes it.
        """
        self._totals.append((first, total_of(rows) if totals is None else totals))
        self._bytes += rows.nbytes
        if self._whole and self._bytes > KEPT_BYTES:
            self._whole, seen = False, 0
            for i, (start, part) in enumerate(self._parts):
                self._parts[i] = start, self._sampled(seen, part)
                seen += len(part)
        self._parts.append((first, rows if self._whole else self._sampled(self._seen, rows)))
        self._seen += len(rows)

    def _sampled(self, seen: int, rows: Rows) -> Rows:
        every = _every(self._segments)
        return rows[-seen % every :: every].copy()

    def counts(self, first: int, symbols: int) -> SymbolCounts:
        """Returns all counts, for ``symbols`` symbols from ``first``."""
        total = np.zeros(symbols, np.int64)
        for start, part in self._totals:
            total[start - first : start - first + len(part)] += part
        if len(self._parts) == 1 and self._parts[0][1].shape[1] == symbols:
            joined = self._parts[0][1]
        else:
            joined, at = np.zeros((sum(len(rows) for _, rows in self._parts), symbols), np.int32), 0
            for start, rows in self._parts:
                joined[at : at + len(rows), start - first : start - first + rows.shape[1]] = rows
                at += len(rows)
        sample = joined[:: _every(self._segments)] if self._whole else joined
        return SymbolCounts(total, sample, self._segments, joined if self._whole else None)


def total_of(rows: Rows) -> Histogram:
    """Returns the sum of the counts of a chunk's segments, int64 [symbols].

    The sum fits in int32, because a chunk has at most 2^24 positions.
    """
    # Widening each row to int64 takes twice as long.
    return np.asarray(rows.sum(0, dtype=np.int32).astype(np.int64))


def count_symbols(blocks: LevelBlocks, layout: Layout, group: int, engine: Engine) -> SymbolCounts:
    """Counts the symbols of a layout in one pass over the levels."""
    counter = SymbolCounter(blocks.segments)
    for rows in blocks.map_levels(lambda levels, each: engine.count_symbols(levels, each, layout, group)):
        counter.add(0, rows)
    return counter.counts(0, len(layout.extra) ** group)


def choose_codes(
    blocks: LevelBlocks,
    counts: SymbolCounts,
    layout: Layout,
    group: int,
    options: Options,
    engine: Engine,
    order: NDArray[np.int64] | None = None,
    most: int = MAX_CODES_TRIED,
) -> Choice | None:
    """Chooses the codes for a layout of several classes: number, assignment to segments, and code lengths.

    Args:
        blocks: the stream.
        counts: counts of the layout's symbols.
        layout: the classes.
        group: levels per symbol, 1 or 2.
        options: the caller's choices.
        engine: the engine that counts and clusters.
        order: a weight for each symbol; the first clustering sorts segments by their mean weight. None uses
            the class numbers.
        most: the greatest number of codes, unless the options set it.

    Returns:
        The choice, or None if a code cannot have so many classes or used symbols, or if only one is used.
    """
    classes = len(layout.extra)
    used = int(np.count_nonzero(counts.total))
    if classes > MAX_CLASSES[group] or not 2 <= used <= min(MAX_SYMBOLS, 1 << options.code_limit):
        return None
    numbers = np.arange(classes**group)
    if order is None:
        order = numbers if group == 1 else numbers % classes + numbers // classes
    costs = engine.cluster(counts.sample, order, options.codes or most, counts.segments)
    codes, totals = _assigned(blocks, counts, layout, group, engine, costs)
    lengths = engine.lengths_of_codes(totals, options.code_limit)
    table = CodeTable(layout.base, layout.extra, tuple(PrefixCode(row.tobytes()) for row in lengths), group)
    extra = np.frombuffer(layout.extra, np.uint8).astype(np.int64)
    residual = extra if group == 1 else extra[numbers % classes] + extra[numbers // classes]
    bits = int((lengths * totals).sum()) + int(counts.total @ residual)
    bits += 8 * classes + 4 * len(lengths) * len(numbers)
    bits += counts.segments * (INDEX_BITS + (len(lengths) - 1).bit_length())
    bits += INDEX_BITS * counts.segments if table.constant_extra is None else 0
    return Choice(table, codes, bits)


def _assigned_chunk(
    levels: AnyLevels, counts: Counts, layout: Layout, group: int, engine: Engine, costs: Costs
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Calls `Engine.assign` for the segments of a chunk."""
    return engine.assign(engine.count_symbols(levels, counts, layout, group), costs)


def no_levels(blocks: LevelBlocks) -> Choice:
    """Returns the choice for a stream without levels."""
    return Choice(EMPTY_TABLE, np.zeros(blocks.segments, np.uint8), 0)


def one_class(blocks: LevelBlocks, layout: Layout, levels: int) -> Choice:
    """Returns the choice for one class: no codes, ``levels`` residuals of one width."""
    table = CodeTable(layout.base, layout.extra)
    return Choice(table, np.zeros(blocks.segments, np.uint8), levels * layout.extra[0] + 8)


def _assigned(
    blocks: LevelBlocks, counts: SymbolCounts, layout: Layout, group: int, engine: Engine, costs: Costs
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Returns the cheapest code of each segment, and the symbol counts of each code, shape [codes, symbols].

    A code with fewer than two used symbols is removed, and its segments are assigned again. Codes are
    numbered in the order of the first segment that uses each (R-CAN-008).
    """
    while True:
        if counts.rows is not None:
            codes, totals = engine.assign(counts.rows, costs)
        else:
            parts = list(
                blocks.map_levels(
                    partial(_assigned_chunk, layout=layout, group=group, engine=engine, costs=costs)
                )
            )
            codes = np.concatenate([part for part, _ in parts])
            totals = np.stack([part for _, part in parts]).sum(0)
        poor = np.count_nonzero(totals, axis=1) < 2
        if not poor.any() or len(costs) == 1:
            break
        costs = costs[~poor] if not poor.all() else costs[:1]
    if len(costs) == 1:
        return codes, totals
    used, first = np.unique(codes, return_index=True)
    order = used[np.argsort(first)]
    number = np.zeros(256, np.uint8)
    number[order] = np.arange(len(order))
    return number[codes], totals[order]
