"""Chooses the code tables of rows, and the number of check bits of each class.

A key that is not in the table gets random bits. They are a row whose greatest class is c with the probability
q(c) of `class_probabilities`, and each check bit halves it. A check bit of class c costs a bit for each key
of that class, and saves half of the error that unknown keys still cause by it. `check_sizes` spends bits
where a bit saves most: a class of greater weights gets a longer check.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..coding.classes import best_layout, histogram
from ..coding.codetable import MAX_CODE_BITS, MAX_SYMBOLS, CodeTable, PrefixCode, code_lengths
from ..coding.keyed.rows import RowCode
from ..container.keyed_map import MAX_CHECK_BITS
from ..encode.quantise import F64

_MOST_CLASSES = 4096  # R-TAB-001


def table_of(levels: NDArray[np.uint64], bound: int, *, signed: bool) -> CodeTable:
    """Returns the code table of levels: a class for each level if there are few, else classes of several.

    Args:
        levels: shape [n].
        bound: all levels of all classes are below this.
        signed: whether the lowest bit of a level is a sign.
    """
    if not len(levels):
        return CodeTable(0, b"\0")
    first, last = int(levels.min()), int(levels.max())
    if last - first < _MOST_CLASSES:
        counts = histogram(levels - np.uint64(first))
        if np.count_nonzero(counts) <= MAX_SYMBOLS:
            return _coded(first, bytes(len(counts)), counts)
    numbers = histogram(levels >> np.uint64(signed))
    layout = best_layout(numbers, signed, bound >> signed)
    table = CodeTable(layout.base, layout.extra, (_flat(len(layout.extra)),) if len(layout.extra) > 1 else ())
    counts = np.bincount(table.class_of(levels), minlength=table.classes)
    return _coded(layout.base, layout.extra, counts)


def _flat(classes: int) -> PrefixCode:
    """Returns any code of some classes, for a table whose classes are counted before it has its own code."""
    return PrefixCode(code_lengths(np.ones(classes, np.int64)))


def _coded(base: int, extra: bytes, counts: NDArray[np.integer]) -> CodeTable:
    if len(extra) == 1:
        return CodeTable(base, extra)
    if np.count_nonzero(counts) == 1:
        only = int(np.flatnonzero(counts)[0])
        return CodeTable(base + sum(1 << e for e in extra[:only]), extra[only : only + 1])
    return CodeTable(base, extra, (PrefixCode(code_lengths(counts, MAX_CODE_BITS)),))


def level_shares(table: CodeTable) -> F64:
    """Returns the probability of each class of a table in random bits: float64 [K]."""
    if not table.codes:
        return np.ones(1)
    lengths = np.frombuffer(table.codes[0].length, np.uint8)
    return np.asarray(np.where(lengths > 0, 0.5 ** lengths.astype(np.float64), 0.0))


def _gap_shares(code: RowCode) -> F64:
    """Returns the probability of each gap from 0 to C in random bits: float64 [C + 1]."""
    gaps = np.zeros(code.outputs + 1)
    if code.gaps is None:
        gaps[0] = 1.0
        return gaps
    each, first = level_shares(code.gaps), code.gaps.first.astype(np.int64)
    for c, extra in enumerate(code.gaps.extra):
        gaps[first[c] : first[c] + (1 << extra)] = each[c] * 0.5**extra
    return gaps


def class_probabilities(code: RowCode) -> F64:
    """Returns the probability that random bits are a row whose greatest class is c: float64 [K].

    Check bits do not count. The probability of a row without weights is missing from the sum.
    """
    below = np.cumsum(level_shares(code.levels))  # of a class of at most c
    gaps = _gap_shares(code)
    # Row o: the probability that the classes from output o on are at most c.
    rest = np.ones((code.outputs + 1, len(below)))
    for o in range(code.outputs - 1, -1, -1):
        inside = code.outputs - o
        ended = float(np.cumsum(gaps[inside:])[-1])
        rest[o] = ended + np.add.reduce(gaps[:inside, None] * rest[o + 1 :], axis=0) * below
    none = 0.0 if code.gaps is None else float(gaps[code.outputs])
    return np.asarray(np.maximum(np.diff(rest[0], prepend=none), 0.0))


def expected_parts(code: RowCode) -> dict[str, float]:
    """Returns the bits of weights, gaps, checks and importance of a row, as the code tables expect them.

    A codeword of n bits is expected with the probability 2^-n. Rows without weights do not count.
    """
    probabilities = class_probabilities(code)
    some = max(float(np.cumsum(probabilities)[-1]), 1e-300)
    checks = probabilities * np.frombuffer(code.checks, np.uint8)
    gaps = _gap_shares(code)
    levels, reads = np.zeros(code.outputs + 1), np.zeros(code.outputs + 1)  # expected from each output on
    for o in range(code.outputs - 1, -1, -1):
        inside = gaps[: code.outputs - o]
        levels[o] = np.add.reduce(inside * (1 + levels[o + 1 :]))
        reads[o] = 1 + np.add.reduce(inside * reads[o + 1 :])
    each = {name: _expected_bits(table) for name, table in (("w", code.levels), ("g", code.gaps))}
    return {
        "weights": float(levels[0]) * each["w"] / some,
        "gaps": float(reads[0]) * each["g"],
        "checks": float(np.cumsum(checks)[-1]) / some,
        "importance": _expected_bits(code.importance),
    }


def _expected_bits(table: CodeTable | None) -> float:
    """Returns the expected bits of a codeword and its residual; 0 for no table."""
    if table is None:
        return 0.0
    lengths = table.codes[0].length if table.codes else bytes(table.classes)
    bits = np.frombuffer(lengths, np.uint8).astype(np.float64) + table.class_extra
    return float(np.cumsum(level_shares(table) * bits)[-1])


@dataclass(frozen=True)
class Budget:
    """How many check bits to spend. Exactly one field is given.

    Attributes:
        check_bits: this number for every class.
        false_positive_cost: as many as pay: a bit per key for each unit of expected error, times this.
        expected_error: the fewest with at most this expected error of an unknown key.
        total_bits: the most with at most this number of bits in all rows.
    """

    check_bits: int | None = None
    false_positive_cost: float | None = None
    expected_error: float | None = None
    total_bits: float | None = None


def check_sizes(shares: F64, harm: F64, keys: NDArray[np.int64], bits: int, budget: Budget) -> bytes:
    """Returns the number of check bits of each class.

    Args:
        shares: from `class_probabilities`.
        harm: the error that a false match with a row of each class causes: float64 [K].
        keys: the number of keys of each class.
        bits: the bits of all rows without checks.
        budget: how many to spend.
    """
    if budget.check_bits is not None:
        return bytes([budget.check_bits]) * len(shares)
    sizes = [0] * len(shares)
    errors = (shares * harm).tolist()
    costs = np.maximum(keys, 1).tolist()
    total = max(int(keys.sum()), 1)
    error, used = sum(errors), float(bits)
    # The class that saves most per bit is first. Python's floats: the same on every machine.
    waiting = [
        (-saved / 2 / cost, c) for c, (saved, cost) in enumerate(zip(errors, costs, strict=True)) if saved
    ]
    heapq.heapify(waiting)
    while waiting:
        gain, c = waiting[0]
        saved = errors[c] / 2
        if budget.expected_error is not None and error <= budget.expected_error:
            break
        if budget.false_positive_cost is not None and -gain * budget.false_positive_cost * total < 1:
            break
        heapq.heappop(waiting)
        if sizes[c] == MAX_CHECK_BITS:
            continue
        if budget.total_bits is not None and used + costs[c] > budget.total_bits:
            continue  # a class of fewer keys may still fit
        sizes[c] += 1
        used += costs[c]
        error -= saved
        errors[c] = saved
        heapq.heappush(waiting, (-saved / 2 / costs[c], c))
    return bytes(sizes)
