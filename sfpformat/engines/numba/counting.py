"""Computes levels, and counts the symbols of segments (`coding.counts`, `coding.planes`, `coding.mask`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.counts import Rows
from ...coding.planes import AnyLevels, Counts, Levels
from ...coding.quantisers import F32, MAX_NUMBER
from .compiling import Int, allocating_kernel
from .unaligned import count_ones, load64

# Neighbouring levels often share a class, and an increment waits for the previous one of the same counter.
# Four interleaved sets of counters break this dependency.
COUNTERS = 4


@allocating_kernel
def patterns_to_levels(patterns: AnyLevels, top: Int, levels: AnyLevels) -> None:
    """Fills ``levels``: moves the sign of each pattern from bit ``top`` to the lowest bit."""
    for i in range(patterns.size):
        levels[i] = patterns[i] << 1 | patterns[i] >> top


@allocating_kernel
def uniform_levels(weights: F32, factors: F32, step: np.float32, thresholds: F32, levels: AnyLevels) -> Int:
    """Implements `coding.quantisers.uniform_levels`: fills ``levels``, with the same float32 operations.

    Args:
        factors: float32, one per weight, or empty.

    Returns:
        The greatest level, or 2^40 if a number exceeds `MAX_NUMBER`. If the dtype of ``levels`` cannot hold
        it, ``levels`` is undefined.
    """
    half, zero, most = np.float32(0.5), np.float32(0), np.float32(MAX_NUMBER)
    patterns, one, greatest, last = (
        weights.view(np.uint32),
        np.uint32(1),
        np.uint32(0),
        np.uint32(thresholds.size),
    )
    beyond = np.uint32(0)
    # These loops do not branch on a weight: signs are random, so half of the predictions would be wrong.
    if factors.size or last:
        for i in range(weights.size):
            magnitude = abs(weights[i])
            if factors.size:
                magnitude = magnitude / factors[i] if factors[i] > zero else zero
            steps = magnitude / step
            nearest = np.floor(steps + half)
            beyond |= np.uint32(nearest > most)
            number = np.uint32(np.int32(nearest if nearest < most else most))
            low = number if number < last else last
            if last:
                below = (number == low) & (low > 0) & (steps < thresholds[(low if low else one) - one])
                number -= np.uint32(below)
            level = number + number + (patterns[i] >> np.uint32(31) & np.uint32(number > 0))
            greatest = level if level > greatest else greatest
            levels[i] = level
    else:
        for i in range(weights.size):
            nearest = np.floor(abs(weights[i]) / step + half)
            beyond |= np.uint32(nearest > most)
            number = np.uint32(np.int32(nearest if nearest < most else most))
            level = number + number + (patterns[i] >> np.uint32(31) & np.uint32(number > 0))
            greatest = level if level > greatest else greatest
            levels[i] = level
    return np.int64(1) << 40 if beyond else np.int64(greatest)


@allocating_kernel
def survivors(mask: Bytes, positions: Counts, found: Counts) -> None:
    """Fills ``found`` with the number of survivors of each segment; ``mask`` is uint8, of zeros and ones."""
    at = np.int64(0)
    for s in range(positions.size):
        stop, count = at + positions[s], np.int64(0)
        while at + 8 <= stop:
            count += np.int64(count_ones(load64(mask, at)))
            at += 8
        while at < stop:
            count += mask[at]
            at += 1
        found[s] = count


@allocating_kernel
def runs(mask: Bytes, positions: Counts, minority: Int, levels: AnyLevels, counts: Counts) -> Int:
    """Fills ``levels`` with the runs of whole segments, and ``counts`` with the number of runs of each.

    Args:
        mask: uint8, of zeros and ones.
        positions: int64, number of positions of each segment.
        minority: the value of the positions that end a run.
        levels: uint16, one element more than positions; elements after the last run are undefined.

    Returns:
        The number of levels.
    """
    at, to = np.int64(0), np.int64(0)
    for s in range(positions.size):
        before: Int
        start, stop, before = to, at + positions[s], at - 1
        for i in range(at, stop):
            # Writes for each position, but advances only at the minority: no branch on the mask.
            levels[to] = np.uint16(i - before - 1)
            ends = mask[i] == minority
            before = i if ends else before
            to += np.int64(ends)
        counts[s] = to - start
        at = stop
    return to


@allocating_kernel
def chosen(values: NDArray[Any], mask: Bytes, out: NDArray[Any]) -> Int:
    """Fills ``out`` with the values whose mask is 1, and returns their number.

    ``out`` has one element more than values; elements after the last value are undefined.
    """
    to = np.uint64(0)
    for i in range(values.size):
        out[to] = values[i]
        to += np.uint64(mask[i])
    return np.int64(to)


@allocating_kernel
def count_classes(levels: AnyLevels, counts: Counts, width: Int, first: Int, rows: Rows) -> None:
    """Fills ``rows`` (int32 [segments, classes]): how often each class of 2^width levels occurs.

    Args:
        levels: unsigned, of whole segments; their classes are ``first`` to ``first`` + classes - 1.
        counts: int64, number of levels of each segment.
    """
    classes = rows.shape[1]
    zero, one, two, three = (
        np.empty(classes, np.int32),
        np.empty(classes, np.int32),
        np.empty(classes, np.int32),
        np.empty(classes, np.int32),
    )
    # Unsigned indices, because Numba tests signed ones for negative values.
    shift, least, more = np.uint64(width), np.uint64(first), np.int32(1)
    at = np.uint64(0)
    for s in range(counts.size):
        stop = at + np.uint64(counts[s])
        zero[:], one[:], two[:], three[:] = 0, 0, 0, 0
        while at + np.uint64(COUNTERS) <= stop:
            zero[(np.uint64(levels[at]) >> shift) - least] += more
            one[(np.uint64(levels[at + np.uint64(1)]) >> shift) - least] += more
            two[(np.uint64(levels[at + np.uint64(2)]) >> shift) - least] += more
            three[(np.uint64(levels[at + np.uint64(3)]) >> shift) - least] += more
            at += np.uint64(COUNTERS)
        while at < stop:
            zero[(np.uint64(levels[at]) >> shift) - least] += more
            at += np.uint64(1)
        for c in range(classes):
            rows[s, c] = zero[c] + one[c] + two[c] + three[c]


@allocating_kernel
def class_of(
    level: np.uint64, base: np.uint64, constant: Int, lookup: NDArray[np.uint16], firsts: Levels
) -> Int:
    """Returns the class of a level.

    Args:
        level, base: uint64.
        constant: residual bits of all classes, or -1 if they differ.
        lookup: uint16, level -> class, for code tables with few levels; else empty.
        firsts: uint64, the first level of each class.
    """
    if constant >= 0:
        return np.int64(level - base >> np.uint64(constant))
    if lookup.size:
        return np.int64(lookup[level])
    # Shortcut for the first two classes, which often hold the zeros, the most frequent levels.
    if firsts.size > 2 and level < firsts[2]:
        return np.int64(level >= firsts[1])
    return np.searchsorted(firsts, level, side="right") - 1


@allocating_kernel
def count_symbols(
    levels: AnyLevels,
    counts: Counts,
    base: np.uint64,
    constant: Int,
    lookup: NDArray[np.uint16],
    firsts: Levels,
    group: Int,
    rows: Rows,
) -> None:
    """Fills ``rows`` (int32 [segments, symbols], initially zero): how often each symbol occurs.

    Args:
        levels, counts: same as for `count_classes`.
        base, constant, lookup, firsts: same as for `class_of`.
        group: levels per symbol, 1 or 2.
    """
    classes, at = firsts.size, np.int64(0)
    for s in range(counts.size):
        stop = at + counts[s]
        while at < stop:
            symbol = class_of(np.uint64(levels[at]), base, constant, lookup, firsts)
            at += 1
            if group == 2:
                if at < stop:
                    symbol += classes * class_of(np.uint64(levels[at]), base, constant, lookup, firsts)
                at += 1
            rows[s, symbol] += np.int32(1)
        at = stop
