"""Choosing the codes of a stream: how many, which segments share one, and their lengths.

Segments of like statistics share a code. They are found by a few rounds of k-means whose distance is the
length of a segment under a code; all on integers, so that every platform finds the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..coding.classes import FRACTION, Histogram, Layout, histogram, log2_fixed
from ..coding.codetable import MAX_CLASSES, MAX_SYMBOLS, CodeTable, PrefixCode, code_lengths
from ..coding.planes import Counts, Levels, symbol_counts, symbols_of_classes
from .options import Options

MAX_CODES_TRIED = 8
_ROUNDS = 6
# Segments that codes are learned from: so many, or fewer where their histograms would be large.
_SAMPLE_SEGMENTS = 4096
_SAMPLE_COUNTS = 1 << 22
# About what a quantity of the segment index costs, in bits a segment.
INDEX_BITS = 9


@dataclass(frozen=True)
class LevelBlocks:
    """A stream's levels, to be gone through as often as needed: for each chunk the levels, and how many each
    of its segments has."""

    segments: int
    start: Callable[[], Iterator[tuple[Levels, Counts]]]

    def __iter__(self) -> Iterator[tuple[Levels, Counts]]:
        return self.start()


@dataclass(frozen=True)
class Choice:
    """A stream's table, each segment's code, about how many bits all of it takes, and whether to trim."""

    table: CodeTable
    codes: NDArray[np.uint8]
    bits: int
    trim: bool = False


def choose_codes(
    blocks: LevelBlocks,
    layout: Layout,
    group: int,
    options: Options,
    weights: NDArray[np.int64] | None = None,
) -> Choice | None:
    """The table of a layout: how many codes, which segments share one, and their lengths.

    Args:
        weights: what orders segments at first, a number for each level's class; None takes the class itself.

    Returns:
        The choice, or None where there are too many symbols for a code.
    """
    classes = len(layout.extra)
    if classes == 1:
        return _one_class(blocks, layout)
    if classes > MAX_CLASSES[group]:
        return None
    stream = _SymbolStream(blocks, layout, group)
    total, sample = stream.count()
    used = int(np.count_nonzero(total))
    if not 2 <= used <= min(MAX_SYMBOLS, 1 << options.code_limit):
        return None
    costs = _best_codes(sample, stream.order(weights), options, stream.segments)
    assigned = stream.assign(costs)
    lengths = [code_lengths(h, options.code_limit) for h in assigned.histograms]
    table = CodeTable(layout.base, layout.extra, tuple(map(PrefixCode, lengths)), group)
    prefix = sum(
        int(np.frombuffer(length, np.uint8).astype(np.int64) @ h)
        for length, h in zip(lengths, assigned.histograms, strict=True)
    )
    side = 8 * classes + 4 * len(lengths) * len(lengths[0])
    side += stream.segments * (INDEX_BITS + (len(lengths) - 1).bit_length())
    side += INDEX_BITS * stream.segments if table.constant_extra is None else 0
    return Choice(table, assigned.codes, prefix + stream.residual_bits + side)


def _one_class(blocks: LevelBlocks, layout: Layout) -> Choice:
    levels = sum(int(counts.sum()) for _, counts in blocks)
    table = CodeTable(layout.base, layout.extra)
    return Choice(table, np.zeros(blocks.segments, np.uint8), levels * layout.extra[0] + 8)


@dataclass(frozen=True)
class _Assignment:
    codes: NDArray[np.uint8]
    histograms: list[Histogram]


class _SymbolStream:
    """A stream's levels as symbols of a layout, counted segment by segment."""

    def __init__(self, blocks: LevelBlocks, layout: Layout, group: int) -> None:
        self._blocks = blocks
        self._bare = CodeTable(layout.base, layout.extra, _any_code(len(layout.extra), group), group)
        self._group = group
        self.symbols = len(layout.extra) ** group
        self.segments = blocks.segments
        self.residual_bits = 0

    def _symbols(self) -> Iterator[tuple[NDArray[np.int64], Counts]]:
        for levels, counts in self._blocks:
            classes = self._bare.class_of(levels)
            yield (
                symbols_of_classes(classes, counts, self._bare.classes, self._group),
                symbol_counts(counts, self._group),
            )

    def count(self) -> tuple[Histogram, NDArray[np.int64]]:
        """The counts of all symbols, and those of each of some segments, evenly spaced."""
        most = max(min(_SAMPLE_SEGMENTS, _SAMPLE_COUNTS // self.symbols), 16)
        every = max(-(-self.segments // most), 1)
        total, sampled, first = np.zeros(self.symbols, np.int64), [], 0
        for symbols, counts in self._symbols():
            whole = self._by_segment(symbols, counts, range(-first % every, len(counts), every))
            sampled.append(whole)
            total += histogram(symbols, self.symbols)
            first += len(counts)
        self.residual_bits = self._residual_bits(total)
        return total, np.concatenate(sampled)

    def _by_segment(
        self, symbols: NDArray[np.int64], counts: Counts, chosen: Iterable[int]
    ) -> NDArray[np.int64]:
        """Symbol counts of some segments, shape [segments chosen, symbols]."""
        numbers = np.full(len(counts), -1)
        chosen = np.fromiter(chosen, np.int64)
        numbers[chosen] = np.arange(len(chosen))
        row = np.repeat(numbers, counts)
        kept = row >= 0
        flat = np.bincount(row[kept] * self.symbols + symbols[kept], minlength=len(chosen) * self.symbols)
        return flat.reshape(len(chosen), self.symbols)

    def _residual_bits(self, total: Histogram) -> int:
        numbers = np.arange(self.symbols)
        extra = self._bare.class_extra.astype(np.int64)
        bits = extra[numbers % self._bare.classes]
        if self._group == 2:
            bits = bits + extra[numbers // self._bare.classes]
        return int(total @ bits)

    def order(self, weights: NDArray[np.int64] | None) -> NDArray[np.int64]:
        """A weight for each symbol that tells segments of small levels from those of large."""
        numbers = np.arange(self.symbols)
        low, high = numbers % self._bare.classes, numbers // self._bare.classes
        if weights is not None:
            return np.asarray(weights[self._bare.base + low])
        return np.asarray(low + high if self._group == 2 else low)

    def assign(self, costs: NDArray[np.int64]) -> _Assignment:
        """Gives every segment its cheapest code, and counts the symbols of each code.

        Args:
            costs: of each symbol in each code, shape [codes, symbols]. A code that ends with fewer than two
                symbols is dropped, and its segments choose among the others.
        """
        while True:
            totals = np.zeros((len(costs), self.symbols), np.int64)
            codes: list[NDArray[np.uint8]] = []
            for symbols, counts in self._symbols():
                each = self._by_segment(symbols, counts, range(len(counts)))
                chosen = (each @ costs.T).argmin(1)
                np.add.at(totals, chosen, each)
                codes.append(chosen.astype(np.uint8))
            poor = np.count_nonzero(totals, axis=1) < 2
            if not poor.any() or len(costs) == 1:
                break
            costs = costs[~poor] if not poor.all() else costs[:1]
        return _in_order_of_use(np.concatenate(codes), totals)


def _any_code(classes: int, group: int) -> tuple[PrefixCode, ...]:
    """Some complete code: a table needs one before its real codes are known."""
    return (PrefixCode(b"\1\1" + bytes(classes**group - 2)),)


def _in_order_of_use(codes: NDArray[np.uint8], totals: NDArray[np.int64]) -> _Assignment:
    """Numbers the codes in the order of the first segment that uses each (R-CAN-008)."""
    used, first = np.unique(codes, return_index=True)
    order = used[np.argsort(first)]
    number = np.zeros(256, np.uint8)
    number[order] = np.arange(len(order))
    return _Assignment(number[codes], [totals[i] for i in order])


def _best_codes(
    sample: NDArray[np.int64], order: NDArray[np.int64], options: Options, segments: int
) -> NDArray[np.int64]:
    """The costs of symbols (bits times 2^16) in the number of codes that is cheapest over all.

    Args:
        sample: symbol counts of some segments, shape [n, symbols].
        order: the symbols' weights.
        options: `codes` is the most to try.
        segments: how many segments the sample stands for.
    """
    best_costs = _costs(sample.sum(0)[None])
    best_bits: int | None = None
    per_symbol = (sample @ order) << 16
    rank = np.argsort(per_symbol // np.maximum(sample.sum(1), 1), kind="stable")
    tried = [n for n in (1, 2, 4, 8, 16) if n <= (options.codes or MAX_CODES_TRIED)]
    for number in tried:
        if number > max(len(sample) // 2, 1):
            break
        chosen = np.zeros(len(sample), np.int64)
        chosen[rank] = np.arange(len(sample)) * number // len(sample)
        for _ in range(_ROUNDS if number > 1 else 1):
            costs = _costs(np.stack([sample[chosen == i].sum(0) for i in range(number)]))
            bits = sample @ costs.T
            chosen = bits.argmin(1)
        whole = int(bits.min(1).sum()) * segments // max(len(sample), 1)
        whole += segments * (number - 1).bit_length() << FRACTION
        whole += number * len(order) * 4 << FRACTION
        if best_bits is None or whole < best_bits:
            best_bits, best_costs = whole, costs
    return best_costs


def _costs(totals: NDArray[np.int64]) -> NDArray[np.int64]:
    """-log2 of each symbol's share, in bits times 2^16; one is added to every count, so none is without."""
    counts = totals * 4 + 1
    return log2_fixed(counts.sum(1))[:, None] - log2_fixed(counts.reshape(-1)).reshape(counts.shape)
