"""Counts symbols in each segment, and clusters segments of similar statistics (encoder, SPEC.md chapter 8).

Segments of similar statistics share a code. A few rounds of k-means find them; the distance is the length of
a segment under a code. All numbers are integers, so that every platform and every engine finds the same
clusters; below 2^53 they are exact in float64, whose matrix product is fast. This module is the reference
implementation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .classes import FRACTION, Layout, log2_fixed
from .codetable import CodeTable, PrefixCode, code_lengths
from .planes import AnyLevels, Counts, symbol_counts, symbols_of_classes

# Symbol counts of segments, shape [segments, symbols].
Rows = NDArray[np.int32]
# Cost of each symbol in each code, in bits times 2^COST_FRACTION, shape [codes, symbols]. The cost of a
# segment is below 2^31: a segment has at most 2^16 levels, and every cost is below 2^14.
Costs = NDArray[np.int32]

COST_FRACTION = 8
ROUNDS = 4
NUMBERS_OF_CODES = (1, 2, 4, 8, 16)
_ROWS_AT_A_TIME = 1024


def count_classes(levels: AnyLevels, counts: Counts, width: int, first: int, classes: int) -> Rows:
    """Counts how often each class of 2^width levels occurs in each segment.

    Args:
        levels: the levels of whole segments; all are in the counted classes.
        counts: number of levels in each segment.
        width: at most 56.
        first: number of the first counted class. Class c contains the 2^width levels from c * 2^width on.
        classes: number of counted classes.

    Returns:
        The counts, shape [segments, classes].
    """
    numbers = (levels >> levels.dtype.type(width)).astype(np.int64) - first
    return _count(numbers, counts, classes)


def count_symbols(levels: AnyLevels, counts: Counts, layout: Layout, group: int) -> Rows:
    """Counts the symbols of a layout of two or more classes in each segment: [segments, symbols]."""
    classes = len(layout.extra)
    any_code = PrefixCode(b"\1\1" + bytes(classes**group - 2))  # a table must have a code
    found = CodeTable(layout.base, layout.extra, (any_code,), group).class_of(levels)
    symbols = symbols_of_classes(found, counts, classes, group)
    return _count(symbols, symbol_counts(counts, group), classes**group)


def _count(numbers: NDArray[np.int64], counts: Counts, columns: int) -> Rows:
    row = np.repeat(np.arange(len(counts)), counts)
    flat = np.bincount(row * columns + numbers, minlength=len(counts) * columns)
    return flat.reshape(len(counts), columns).astype(np.int32)


# ------------------------------------------------------------------------------------------------ clusters


def cluster(sample: Rows, order: NDArray[np.int64], most: int, segments: int) -> Costs:
    """Clusters segments into codes. Returns the symbol costs for the cheapest number of codes.

    Args:
        sample: symbol counts of some segments.
        order: a number for each symbol, below 2^16. The segments are sorted by its mean, which separates
            segments of small levels from segments of large levels, to form the initial clusters.
        most: the greatest number of codes.
        segments: number of segments that the sample represents.
    """
    size, symbols = sample.shape
    wide = sample.astype(np.int64)
    means = ((wide @ order) << COST_FRACTION) // np.maximum(wide.sum(1), 1)
    exact = sample.astype(np.float64)
    rank = np.argsort(means * size + np.arange(size))
    best: tuple[int, Costs] | None = None
    for number in NUMBERS_OF_CODES:
        if number > most or number > max(size // 2, 1):
            break
        chosen = np.zeros(size, np.int64)
        chosen[rank] = np.arange(size) * number // size
        for _ in range(ROUNDS if number > 1 else 1):
            members = (chosen == np.arange(number)[:, None]).astype(np.float64)
            costs = symbol_costs((members @ exact).astype(np.int64))
            chosen, bits = _cheapest(exact, costs)
        side = size * (number - 1).bit_length() + number * symbols * 4 * size // segments
        whole = int(bits.sum()) + (side << COST_FRACTION)
        if best is not None and whole >= best[0]:
            break
        best = whole, costs
    assert best is not None
    return best[1]


def symbol_costs(totals: NDArray[np.int64]) -> Costs:
    """Returns -log2 of each symbol's share in each code, of counts 4n + 1, so that no share is zero."""
    counts = totals * 4 + 1
    bits = log2_fixed(counts.sum(1))[:, None] - log2_fixed(counts.reshape(-1)).reshape(counts.shape)
    return (bits >> (FRACTION - COST_FRACTION)).astype(np.int32)


def _cheapest(rows: NDArray[np.float64], costs: Costs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the cheapest code of each segment, and its cost. If several are cheapest, the first."""
    bits = rows @ costs.T.astype(np.float64)
    return bits.argmin(1), bits.min(1).astype(np.int64)


def assign(rows: Rows, costs: Costs) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Assigns the cheapest code to every segment. If several are cheapest, the first.

    Returns:
        The code of each segment, and the symbol counts of each code, shape [codes, symbols].
    """
    codes = np.zeros(len(rows), np.uint8)
    totals = np.zeros(costs.shape, np.int64)
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        part = rows[start : start + _ROWS_AT_A_TIME]
        chosen, _ = _cheapest(part.astype(np.float64), costs)
        codes[start : start + len(part)] = chosen
        for code in range(len(costs)):
            totals[code] += part[chosen == code].sum(0)
    return codes, totals


def lengths_of_codes(totals: NDArray[np.int64], limit: int) -> NDArray[np.uint8]:
    """Returns the code lengths for each row of symbol counts, shape [codes, symbols] (R-CAN-005)."""
    return np.stack([np.frombuffer(code_lengths(row, limit), np.uint8) for row in totals])
