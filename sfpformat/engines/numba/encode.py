"""The encoding functions of the engine: bit-identical to the functions of the same names in `coding`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.classes import Histogram, Layout, boundaries
from ...coding.codetable import MAX_CODE_BITS, CodeTable
from ...coding.counts import NUMBERS_OF_CODES, Costs, Rows
from ...coding.mask import Mask
from ...coding.mask import encode_mask as encode_mask_plainly
from ...coding.planes import AnyLevels, Counts, Levels, Planes
from ...coding.quantisers import F32
from ...coding.quantisers import uniform_levels as uniform_levels_plainly
from ...coding.windows import encode_windows
from . import clustering, counting, packing

# Code tables whose levels are below this use a look-up table from level to class.
_MOST_LOOKED_UP = 1 << 16
_NO_LOOKUP = np.zeros(0, np.uint16)


def patterns_to_levels(patterns: NDArray[np.unsignedinteger]) -> AnyLevels:
    """Implements `coding.quantisers.patterns_to_levels`."""
    levels = np.empty_like(patterns, subok=False)
    counting.patterns_to_levels(np.ascontiguousarray(patterns), 8 * patterns.itemsize - 1, levels)
    return levels


def uniform_levels(weights: F32, factors: F32 | None, step: np.float32, thresholds: F32) -> AnyLevels:
    """Implements `coding.quantisers.uniform_levels`."""
    weights = np.ascontiguousarray(weights)
    each, widest = np.zeros(0, np.float32) if factors is None else factors, 0.0
    if factors is None and len(weights):
        widest = 2 * float(max(weights.max(), -weights.min())) / float(step)
    dtypes: tuple[type[np.unsignedinteger], ...] = (np.uint8, np.uint16, np.uint32)
    for dtype in dtypes:
        most = np.iinfo(dtype).max
        if widest > most:
            continue
        levels = np.empty(len(weights), dtype)
        greatest = counting.uniform_levels(weights, each, step, thresholds, levels)
        if greatest <= most:
            return levels.astype(np.min_scalar_type(greatest), copy=False)
    return uniform_levels_plainly(weights, factors, step, thresholds)  # raises the error


def survivors(mask: Mask, positions: Counts) -> Counts:
    """Implements `coding.mask.survivors`."""
    found = np.empty(len(positions), np.int64)
    counting.survivors(np.ascontiguousarray(mask).view(np.uint8), positions, found)
    return found


def chosen(values: NDArray[Any], mask: Mask) -> NDArray[Any]:
    """Implements `coding.mask.chosen`."""
    out = np.empty(len(values) + 1, values.dtype)
    ones = np.ascontiguousarray(mask).view(np.uint8)
    return out[: counting.chosen(np.ascontiguousarray(values), ones, out)]


def encode_mask(kind: str, polarity: int, mask: Mask, positions: Counts) -> tuple[AnyLevels, Counts]:
    """Implements `coding.mask.encode_mask`."""
    if kind == "octets":
        return encode_mask_plainly(kind, polarity, mask, positions)
    levels, counts = np.empty(len(mask) + 1, np.uint16), np.empty(len(positions), np.int64)
    found = counting.runs(np.ascontiguousarray(mask).view(np.uint8), positions, polarity, levels, counts)
    return levels[:found].copy(), counts  # a copy, because the buffer is usually much larger


def count_classes(levels: AnyLevels, counts: Counts, width: int, first: int, classes: int) -> Rows:
    """Implements `coding.counts.count_classes`."""
    rows = np.empty((len(counts), classes), np.int32)
    counting.count_classes(np.ascontiguousarray(levels), counts, width, first, rows)
    return rows


def count_symbols(levels: AnyLevels, counts: Counts, layout: Layout, group: int) -> Rows:
    """Implements `coding.counts.count_symbols`."""
    extra = np.frombuffer(layout.extra, np.uint8)
    rows = np.zeros((len(counts), len(extra) ** group), np.int32)
    base, constant, lookup, firsts = _class_tables(layout.base, extra)
    counting.count_symbols(np.ascontiguousarray(levels), counts, base, constant, lookup, firsts, group, rows)
    return rows


def best_layout(counts: Histogram, signed: bool, bound: int, class_cost: int) -> Layout:
    """Implements `coding.classes.best_layout`."""
    used = np.flatnonzero(counts)
    first, end = int(used[0]), int(used[-1]) + 1
    points = np.array(boundaries(first, end, bound))
    widths = np.empty(len(points), np.uint8)
    found = clustering.cheapest_classes(counts, end, points, class_cost, widths)
    sign = 1 if signed else 0
    return Layout(first << sign, (widths[:found][::-1] + np.uint8(sign)).tobytes())


def cluster(sample: Rows, order: NDArray[np.int64], most: int, segments: int) -> Costs:
    """Implements `coding.counts.cluster`."""
    tried = [n for n in NUMBERS_OF_CODES if n <= most and n <= max(len(sample) // 2, 1)]
    costs = np.empty((tried[-1], sample.shape[1]), np.int32)
    found = clustering.cluster(
        np.ascontiguousarray(sample), order, np.array(tried, np.int64), segments, costs
    )
    return costs[:found]


def assign(rows: Rows, costs: Costs) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Implements `coding.counts.assign`."""
    codes, totals = np.empty(len(rows), np.uint8), np.zeros(costs.shape, np.int64)
    clustering.assign(np.ascontiguousarray(rows), np.ascontiguousarray(costs), codes, totals)
    return codes, totals


def lengths_of_codes(totals: NDArray[np.int64], limit: int) -> NDArray[np.uint8]:
    """Implements `coding.counts.lengths_of_codes`."""
    lengths = np.zeros(totals.shape, np.uint8)
    clustering.fill_all_lengths(np.ascontiguousarray(totals), limit, lengths)
    return lengths


def encode_levels(
    levels: AnyLevels, counts: Counts, codes: Counts, trims: Counts, table: CodeTable
) -> Planes:
    """Implements `coding.planes.encode_levels`."""
    levels = np.ascontiguousarray(levels)
    extra = table.class_extra
    base, constant, lookup, firsts = _class_tables(table.base, extra)
    prefix, prefix_bits = _prefix_plane(levels, counts, codes, table, base, constant, lookup, firsts)
    widest = int(extra.max())
    plane, sizes = np.empty(-(-len(levels) * widest // 8) + 8, np.uint8), np.empty(len(counts), np.int64)
    if 0 <= constant <= packing.MOST_TOGETHER and not trims.any():
        used = packing.pack_residuals_of_one_width(levels, counts, base, constant, plane, sizes)
    else:
        used = packing.pack_residuals(
            levels, counts, trims, base, constant, lookup, firsts, extra, plane, sizes
        )
    return Planes(codes, trims, prefix, prefix_bits, plane[:used], sizes)


def _prefix_plane(
    levels: AnyLevels,
    counts: Counts,
    codes: Counts,
    table: CodeTable,
    base: np.uint64,
    constant: int,
    lookup: NDArray[np.uint16],
    firsts: Levels,
) -> tuple[Bytes, Counts]:
    if table.classes == 1:
        return np.zeros(0, np.uint8), np.zeros(len(counts), np.int64)
    if table.window is not None:
        return encode_windows(table.class_of(levels), counts, codes, table)
    lengths = np.frombuffer(b"".join([code.length for code in table.codes]), np.uint8)
    words = np.zeros((len(table.codes), table.classes**table.group), np.uint32)
    packing.fill_words(lengths.reshape(words.shape), words)
    symbols = -(-len(levels) // table.group) + len(counts)
    plane = np.empty(-(-symbols * MAX_CODE_BITS // 8) + 8, np.uint8)
    sizes = np.empty(len(counts), np.int64)
    if table.group == 1 and constant >= 0 and not int(base) & ((1 << constant) - 1):
        first = int(base) >> constant
        used = packing.pack_prefix_of_one_width(levels, counts, codes, first, constant, words, plane, sizes)
    else:
        used = packing.pack_prefix(
            levels, counts, codes, base, constant, lookup, firsts, table.group, words, plane, sizes
        )
    return plane[:used], sizes


def _class_tables(base: int, extra: NDArray[np.uint8]) -> tuple[np.uint64, int, NDArray[np.uint16], Levels]:
    """Returns base, constant, look-up table and first levels, the arguments of `counting.class_of`."""
    sizes = np.uint64(1) << extra.astype(np.uint64)
    ends = np.cumsum(sizes) + np.uint64(base)
    firsts = ends - sizes
    if (extra == extra[0]).all():
        return np.uint64(base), int(extra[0]), _NO_LOOKUP, firsts
    if int(ends[-1]) > _MOST_LOOKED_UP:
        return np.uint64(base), -1, _NO_LOOKUP, firsts
    lookup = np.zeros(int(ends[-1]), np.uint16)
    lookup[base:] = np.repeat(np.arange(len(extra), dtype=np.uint16), sizes.astype(np.int64))
    return np.uint64(base), -1, lookup, firsts
