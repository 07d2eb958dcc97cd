"""Choosing the code tables of a tensor's streams from what one pass over its levels counts.

Segments of like statistics share a code. They are found by a few rounds of k-means whose distance is the
length of a segment under a code; all on integers, so that every platform finds the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import MAX_FIELD_BITS
from ..coding.classes import (
    FRACTION,
    Histogram,
    Layout,
    add_histograms,
    best_layout,
    constant_layout,
    entropy_bits,
    histogram,
    log2_fixed,
)
from ..coding.codetable import (
    EMPTY_TABLE,
    MAX_CLASSES,
    MAX_SYMBOLS,
    CodeTable,
    PrefixCode,
    code_lengths,
)
from ..coding.mask import Mask, encode_mask
from ..coding.planes import Counts, Levels, greatest_trims, symbol_counts, symbols_of_classes
from ..dtypes import Dtype
from ..errors import OptionError
from .options import Options

MAX_CODES_TRIED = 8
_ROUNDS = 6
# Segments that codes are learned from: so many, or fewer where their histograms would be large.
_SAMPLE_SEGMENTS = 4096
_SAMPLE_COUNTS = 1 << 22
# Classes of paired levels: the square of this must leave room for 256 used symbols in a short table.
_PAIR_CLASSES = 20
# A further mantissa bit joins the class of an exact stream only where it saves this part of the whole:
# residuals of whole bytes decode faster.
_MANTISSA_GAIN = 0.0075
# About what a quantity of the segment index costs, in bits a segment.
INDEX_BITS = 9
# And what trims cost.
_TRIM_BITS = 5


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


@dataclass(frozen=True)
class MaskChoice:
    """How the mask is coded."""

    kind: str
    polarity: int
    choice: Choice


# ------------------------------------------------------------------------------------------------- streams


def choose_exact(blocks: LevelBlocks, dtype: Dtype, bound: int, options: Options) -> Choice:
    """The table of an exact stream: classes of one width, by how many mantissa bits join the class.

    No class may reach the stream's ``bound``, not even where no level occurs (R-TAB-008).
    """
    mantissa = dtype.bits - 1 - dtype.exponent_bits
    finest = min(mantissa, 3)
    if options.mantissa_bits is not None:
        finest = min(max(options.mantissa_bits, 1 - dtype.exponent_bits), mantissa)
    width = mantissa + 1 - finest
    counts = _class_counts(blocks, width)
    while _end(counts) << width > bound and width > 1:
        finest, width = finest + 1, width - 1
        counts = _class_counts(blocks, width)
    if not counts.any():
        return _no_levels(blocks)
    fewest = finest if options.mantissa_bits is not None else 0
    best: tuple[float, int, Histogram] | None = None
    for joined in range(finest, -dtype.exponent_bits - 1, -1):
        used = int(np.count_nonzero(counts))
        fits = _end(counts) << width <= bound and _span(counts) <= MAX_CLASSES[1]
        if fits and width <= MAX_FIELD_BITS and used <= min(MAX_SYMBOLS, 1 << options.code_limit):
            bits = entropy_bits(counts) / (1 << FRACTION) + int(counts.sum()) * width
            if best is None or bits < best[0] * (1 + _MANTISSA_GAIN):
                best = min(best[0], bits) if best else bits, width, counts
            if joined <= fewest:
                break
        even = add_histograms(counts, np.zeros(len(counts) + len(counts) % 2, np.int64))
        counts, width = even.reshape(-1, 2).sum(1), width + 1
    if best is None:
        raise OptionError(f"no class layout for {dtype.name} with codes of {options.code_limit} bits")
    _, width, counts = best
    choice = choose_codes(blocks, constant_layout(counts, width), 1, options)
    assert choice is not None
    saved = -_TRIM_BITS * blocks.segments
    for levels, segment_counts in blocks if options.trim else ():
        saved += int(greatest_trims(levels, segment_counts, width) @ segment_counts)
    return replace(choice, bits=choice.bits - saved, trim=True) if saved > 0 else choice


def _class_counts(blocks: LevelBlocks, width: int) -> Histogram:
    """How often each class of 2^width levels occurs."""
    counts = np.zeros(0, np.int64)
    for levels, _ in blocks:
        counts = add_histograms(counts, histogram(levels >> np.uint64(width)))
    return counts


def _end(counts: Histogram) -> int:
    """One past the last class that occurs."""
    return len(np.trim_zeros(counts, "b"))


def _span(counts: Histogram) -> int:
    used = np.flatnonzero(counts)
    return int(used[-1] - used[0]) + 1


def choose_numbers(blocks: LevelBlocks, bound: int, options: Options, *, signed: bool) -> Choice:
    """The table of a stream of numbers (with signs: levels 2m + s): dyadic classes, single or paired."""
    sign = np.uint64(1 if signed else 0)
    counts = np.zeros(0, np.int64)
    for levels, _ in blocks:
        counts = add_histograms(counts, _compact_histogram(levels >> sign))
    if not counts.any():
        return _no_levels(blocks)
    limit = bound >> int(sign)
    best: Choice | None = None
    for group in (options.group,) if options.group else (1, 2):
        fitting = _fitting_layout(counts, limit, signed, group, options)
        singles = _singles(counts, signed)
        for layout in (fitting, singles if singles != fitting else None):
            found = choose_codes(blocks, layout, group, options) if layout else None
            if found and (best is None or found.bits < best.bits):
                best = found
    if best is None and options.group == 2:
        return choose_numbers(blocks, bound, options.but(group=1), signed=signed)
    if best is None:
        raise OptionError("no class layout for this stream; allow longer codes")
    return best


def _compact_histogram(numbers: Levels) -> Histogram:
    if len(numbers) and numbers.max() >= 1 << 24:
        raise OptionError("more than 2^24 quantised magnitudes; use a greater step, or exact")
    return histogram(numbers)


def _fitting_layout(
    counts: Histogram, limit: int, signed: bool, group: int, options: Options
) -> Layout | None:
    """The best layout with as few classes as groups of that size allow."""
    most = _PAIR_CLASSES if group == 2 else min(MAX_SYMBOLS, 1 << options.code_limit)
    for doubling in range(16):
        layout = best_layout(counts, signed=signed, bound=limit, class_cost=(16 << FRACTION) << doubling)
        if len(layout.extra) <= most:
            return layout
    return None


def _singles(counts: Histogram, signed: bool) -> Layout | None:
    """A class for each number: all residuals have one width, so the index need not say how long they are."""
    used = np.flatnonzero(counts)
    sign = 1 if signed else 0
    if used[-1] - used[0] >= MAX_SYMBOLS:
        return None
    return Layout(int(used[0]) << sign, bytes([sign]) * int(used[-1] - used[0] + 1))


def choose_mask(
    masks: Callable[[], Iterator[tuple[Mask, Counts]]],
    segments: int,
    density: float,
    options: Options,
) -> MaskChoice:
    """The kind, polarity and table of a mask; ``density`` is survivors a position."""
    polarity = options.polarity if options.polarity is not None else int(density <= 0.5)

    def blocks(kind: str) -> LevelBlocks:
        return LevelBlocks(
            segments,
            lambda: (encode_mask(kind, polarity, mask, counts) for mask, counts in masks()),
        )

    kind = options.mask
    if kind not in ("runs", "octets"):
        kind = "octets" if 0.08 <= density <= 0.92 else "runs"
    if kind == "runs":
        choice = choose_numbers(blocks("runs"), 1 << 16, options, signed=False)
        return MaskChoice("runs", polarity, choice)
    counts = np.zeros(256, np.int64)
    for levels, _ in blocks("octets"):
        counts += histogram(levels, 256)
    if not counts.any():
        return MaskChoice("octets", 0, _no_levels(blocks("octets")))
    octets = choose_codes(
        blocks("octets"), constant_layout(counts, 0), 1, options, weights=_POPCOUNT
    ) or choose_codes(blocks("octets"), Layout(0, b"\x08"), 1, options)
    assert octets is not None
    return MaskChoice("octets", 0, octets)


_POPCOUNT = np.array([value.bit_count() for value in range(256)], np.int64)


def _no_levels(blocks: LevelBlocks) -> Choice:
    return Choice(EMPTY_TABLE, np.zeros(blocks.segments, np.uint8), 0)


# --------------------------------------------------------------------------------------------------- codes


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
