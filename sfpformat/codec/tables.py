"""Choosing the classes of a tensor's streams from what one pass over their levels counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

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
)
from ..coding.codetable import EMPTY_TABLE, MAX_CLASSES, MAX_SYMBOLS
from ..coding.mask import Mask, encode_mask
from ..coding.planes import Counts, Levels, greatest_trims
from ..dtypes import Dtype
from ..errors import OptionError
from .codes import Choice, LevelBlocks, choose_codes
from .options import Options

# Classes of paired levels: the square of this must leave room for 256 used symbols in a short table.
_PAIR_CLASSES = 20
# A further mantissa bit joins the class of an exact stream only where it saves this part of the whole:
# residuals of whole bytes decode faster.
_MANTISSA_GAIN = 0.0075
# About what trims cost in the segment index, in bits a segment.
_TRIM_BITS = 5


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
