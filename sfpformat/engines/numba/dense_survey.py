"""Surveys a dense lossless tensor in one compiled call (`engines.interface.Engine.survey_dense`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.classes import Histogram
from ...coding.counts import Rows
from ...coding.exact_encoding import Patterns
from ...coding.planes import Counts
from ..interface import DenseSurvey
from .clustering import log2
from .compiling import Int, allocating_kernel
from .counting import COUNTERS
from .patterns import count_classes, shared_zeros

# Columns of the statistics of a width: entropy, used classes, first and last used class.
_STATISTICS = 4


def survey_dense(
    patterns: Patterns, counts: Counts, chunk: int, width: int, fine: int, part: int, least: int
) -> DenseSurvey:
    """Implements `interface.Engine.survey_dense`."""
    patterns = np.ascontiguousarray(patterns)
    bits = 8 * patterns.itemsize
    rows = np.empty((len(counts), 1 << (bits - width)), np.int32)
    totals, zeros = np.zeros(rows.shape[1], np.int64), np.empty(len(counts), np.int64)
    widths = np.zeros((width - fine + 1 if fine < width else 0, _STATISTICS), np.int64)
    classes = 1 << (bits - fine)
    counters = np.empty((COUNTERS, classes), np.int32)
    some, histogram = np.empty((1, classes), np.int32), np.zeros(classes, np.int64)
    sampled = _survey(
        patterns,
        patterns.view(np.uint8),
        counts,
        chunk,
        width,
        fine,
        part,
        least,
        counters,
        some,
        histogram,
        rows,
        totals,
        zeros,
        widths,
    )
    return DenseSurvey(rows, totals, zeros, int(sampled), widths.tolist())


@allocating_kernel
def _survey(
    patterns: Patterns,
    raw: Bytes,
    counts: Counts,
    chunk: Int,
    width: Int,
    fine: Int,
    part: Int,
    least: Int,
    counters: Rows,
    some: Rows,
    histogram: Histogram,
    rows: Rows,
    totals: Histogram,
    zeros: Counts,
    widths: NDArray[np.int64],
) -> Int:
    """Fills the arrays of a `DenseSurvey`, and returns the number of sampled levels.

    Args:
        patterns, counts, chunk, width, fine, part, least: same as for `survey_dense`.
        raw: the same memory as ``patterns``.
        counters, some: int32 [4, fine classes], [1, fine classes], scratch memory.
        histogram: int64 [fine classes], zero, scratch memory.
        rows, totals, zeros, widths: filled; ``totals`` is zero.
    """
    item, sampled = np.int64(patterns.itemsize), np.int64(0)
    if widths.shape[0]:
        each = np.empty(1, np.int64)
        for start in range(0, patterns.size, chunk):
            stop = min(start + chunk, patterns.size)
            each[0] = min(max((stop - start) // part, least), stop - start)
            end = start + each[0]
            count_classes(patterns[start:end], raw[item * start : item * end], each, fine, 0, counters, some)
            for k in range(histogram.size):
                histogram[k] += some[0, k]
            sampled += each[0]
        for i in range(widths.shape[0]):
            size = histogram.size >> i
            if i:  # the classes of the next width: the sums of two neighbours
                for k in range(size):
                    histogram[k] = histogram[2 * k] + histogram[2 * k + 1]
            _fill_statistics(histogram[:size], sampled, widths[i])
    count_classes(patterns, raw, counts, width, 0, counters[:, : rows.shape[1]].copy(), rows)
    for s in range(rows.shape[0]):
        for k in range(rows.shape[1]):
            totals[k] += rows[s, k]
    shared_zeros(patterns, counts, zeros)
    return sampled


@allocating_kernel
def _fill_statistics(counts: Histogram, total: Int, found: NDArray[np.int64]) -> None:
    """Fills the statistics of a width: `coding.classes.entropies`, used classes, first and last of them."""
    found[:] = 0
    found[0] = total * log2(total)
    for k in range(counts.size):
        if counts[k]:
            found[0] -= counts[k] * log2(counts[k])
            if found[1] == 0:
                found[2] = k
            found[1] += 1
            found[3] = k
