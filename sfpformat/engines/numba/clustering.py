"""Clusters segments by statistics, and computes code lengths (`coding.counts`, `coding.codetable`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.classes import FRACTION, LOG2, LOG2_BITS, Histogram
from ...coding.counts import COST_FRACTION, ROUNDS, Costs, Rows
from .compiling import Int, allocating_kernel
from .unaligned import leading_zeros

_MOST_BITS = 64


@allocating_kernel
def log2(count: Int) -> Int:
    """Implements `coding.classes.log2_fixed`."""
    exponent = np.int64(63) - np.int64(leading_zeros(np.uint64(count)))
    shift = exponent - LOG2_BITS
    mantissa = count >> shift if shift >= 0 else count << -shift
    return (exponent << FRACTION) + LOG2[mantissa - (1 << LOG2_BITS)]


@allocating_kernel
def cheapest_classes(
    counts: Histogram, end: Int, points: NDArray[np.int64], class_cost: Int, widths: Bytes
) -> Int:
    """Computes the classes of `coding.classes.best_layout`.

    Args:
        counts: int64, how often each number occurs; 0 from ``end`` on.
        end: one past the greatest number that occurs.
        points: int64, from `coding.classes.boundaries`.
        class_cost: cost of a class, in fixed-point bits.
        widths: uint8, set to the widths of the classes, from the last class to the first.

    Returns:
        The number of classes.
    """
    size = points.size
    below = np.empty(size, np.int64)  # how often numbers below each point occur
    number, total = np.int64(0), np.int64(0)
    for i in range(size):
        while number < min(points[i], end):
            total += counts[number]
            number += 1
        below[i] = total
    log_total = log2(total)
    best, came = np.full(size, -1, np.int64), np.zeros(size, np.int64)
    best[0] = 0
    for i in range(size - 1):
        if best[i] < 0:
            continue
        j, e = i, np.int64(0)
        while points[i] + (np.int64(1) << e) <= points[size - 1]:
            target = points[i] + (np.int64(1) << e)
            while points[j] < target:
                j += 1
            if points[j] == target:
                n = below[j] - below[i]
                bits = best[i] + (n * e << FRACTION) + class_cost
                if n:
                    bits += n * (log_total - log2(n))
                if best[j] < 0 or bits < best[j]:
                    best[j], came[j] = bits, e
            e += 1
    finish: Int = np.int64(-1)
    for j in range(size):
        if best[j] >= 0 and points[j] >= end and (finish < 0 or best[j] < best[finish]):
            finish = j
    found = 0
    while finish > 0:
        widths[found] = came[finish]
        begin = points[finish] - (np.int64(1) << came[finish])
        while points[finish] > begin:
            finish -= 1
        found += 1
    return found


@allocating_kernel
def _fill_costs(totals: NDArray[np.int64], costs: Costs) -> None:
    """Implements `coding.counts.symbol_costs`: fills ``costs`` (int32)."""
    codes, symbols = totals.shape
    for code in range(codes):
        whole = np.int64(0)
        for symbol in range(symbols):
            whole += totals[code, symbol] * 4 + 1
        log_whole = log2(whole)
        for symbol in range(symbols):
            bits = log_whole - log2(totals[code, symbol] * 4 + 1)
            costs[code, symbol] = np.int32(bits >> (FRACTION - COST_FRACTION))


@allocating_kernel
def _cheapest(row: Rows, costs: Costs) -> tuple[Int, Int]:
    """Returns the cheapest code of a segment, and its cost. If several are cheapest, returns the first."""
    best, least = 0, np.int32(0x7FFFFFFF)
    for code in range(costs.shape[0]):
        bits = np.int32(0)
        for symbol in range(row.size):
            bits = np.int32(bits + np.int32(row[symbol] * costs[code, symbol]))
        if bits < least:
            best, least = code, bits
    return best, np.int64(least)


@allocating_kernel
def cluster(
    sample: Rows, order: NDArray[np.int64], tried: NDArray[np.int64], segments: Int, costs: Costs
) -> Int:
    """Implements `coding.counts.cluster`.

    Args:
        sample: int32 [n, symbols], C order.
        order: int64 [symbols].
        tried: int64, numbers of codes to try, ascending from 1.
        segments: number of segments that the sample represents.
        costs: int32 [greatest of ``tried``, symbols]; the first rows are set to the costs of the codes.

    Returns:
        The best number of codes.
    """
    size, symbols = sample.shape
    means = np.empty(size, np.int64)
    for i in range(size):
        levels: Int
        weighted, levels = np.int64(0), np.int64(0)
        for symbol in range(symbols):
            weighted += sample[i, symbol] * order[symbol]
            levels += sample[i, symbol]
        means[i] = (weighted << COST_FRACTION) // max(levels, 1) * size + i
    rank = np.argsort(means)
    chosen = np.empty(size, np.int64)
    found = np.empty((tried[-1], symbols), np.int32)
    best, least = 0, np.int64(-1)
    for number in tried:
        for i in range(size):
            chosen[rank[i]] = i * number // size
        bits = np.int64(0)
        for _ in range(ROUNDS if number > 1 else 1):
            totals = np.zeros((number, symbols), np.int64)
            for i in range(size):
                own = totals[chosen[i]]
                for symbol in range(symbols):
                    own[symbol] += sample[i, symbol]
            _fill_costs(totals, found)
            bits = np.int64(0)
            for i in range(size):
                chosen[i], cost = _cheapest(sample[i], found[:number])
                bits += cost
        code_bits = 0
        while (number - 1) >> code_bits:
            code_bits += 1
        side = size * code_bits + number * symbols * 4 * size // segments
        whole = bits + (side << COST_FRACTION)
        if least >= 0 and whole >= least:
            break
        best, least = number, whole
        costs[:number] = found[:number]
    return best


@allocating_kernel
def assign(rows: Rows, costs: Costs, codes: Bytes, totals: NDArray[np.int64]) -> None:
    """Implements `coding.counts.assign`: fills ``codes`` (uint8) and ``totals`` (int64, initially zero)."""
    for s in range(rows.shape[0]):
        code, _ = _cheapest(rows[s], costs)
        codes[s] = code
        own = totals[code]
        for symbol in range(rows.shape[1]):
            own[symbol] += rows[s, symbol]


@allocating_kernel
def fill_lengths(counts: Histogram, limit: Int, lengths: Bytes) -> None:
    """Computes the code lengths of one code (`coding.codetable.code_lengths`).

    Args:
        counts: int64 [symbols]; at least two and at most 2^limit are not 0.
        limit: the maximum code length.
        lengths: uint8 [symbols], initially zero; filled.
    """
    symbols = counts.size
    # Keys for sorting by count, then by symbol: counts are below 2^48, symbols below 2^12.
    keys = np.empty(symbols, np.int64)
    n = 0
    for symbol in range(symbols):
        if counts[symbol]:
            keys[n] = counts[symbol] << 12 | symbol
            n += 1
    keys = np.sort(keys[:n])
    merged, following = np.empty(2 * n, np.int64), np.empty(2 * n, np.int64)
    is_item = np.zeros((limit, 2 * n), np.uint8)
    for i in range(n):
        merged[i] = keys[i] >> 12
    is_item[0, :n] = 1
    size = n
    for step in range(1, limit):
        pairs, i, p, to = size // 2, 0, 0, 0
        while i < n or p < pairs:
            pair = merged[2 * p] + merged[2 * p + 1] if p < pairs else np.int64(0)
            if p == pairs or (i < n and keys[i] >> 12 <= pair):
                following[to] = keys[i] >> 12
                is_item[step, to] = 1
                i += 1
            else:
                following[to] = pair
                p += 1
            to += 1
        merged, following = following, merged
        size = to
    taken = 2 * n - 2
    for back in range(limit):
        step = limit - 1 - back
        chosen = 0
        for i in range(taken):
            chosen += is_item[step, i]
        for i in range(chosen):
            lengths[keys[i] & 4095] += np.uint8(1)
        taken = 2 * (taken - chosen)


@allocating_kernel
def fill_all_lengths(totals: NDArray[np.int64], limit: Int, lengths: Bytes) -> None:
    """Applies `fill_lengths` to each code; ``totals`` int64 and ``lengths`` uint8 [codes, symbols]."""
    for code in range(totals.shape[0]):
        fill_lengths(totals[code], limit, lengths[code])
