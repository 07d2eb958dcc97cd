"""Chooses the classes of a stream (the encoder's side of SPEC.md chapter 8).

All decisions use integers: counts, and logarithms in fixed point. Therefore the same levels give the same
table on every platform, with any mathematical library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

Histogram = NDArray[np.int64]

FRACTION = 16  # bits after the binary point in fixed-point logarithms
LOG2_BITS = 12
# log2(1 + i / 4096) in fixed point. Rounding removes the differences between mathematical libraries.
LOG2 = np.array(
    [round(math.log2(1 + i / (1 << LOG2_BITS)) * (1 << FRACTION)) for i in range(1 << LOG2_BITS)],
    np.int64,
)
_SMALL = 1 << 14
# Cost of a class in the directory, in bits times 2^16: a byte of `extra` and a byte of `length`.
CLASS_COST = 16 << FRACTION
# Class boundaries: every number below this; from here on, numbers with at most 7 significant bits.
_FINE_NUMBERS = 128


def log2_fixed(counts: Histogram) -> NDArray[np.int64]:
    """Returns log2 of positive integers, times 2^16, with a precision of about 12 bits of the mantissa."""
    if counts.size and counts.max() < _SMALL:
        return np.asarray(_small_logarithms()[counts])
    return _log2_fixed(counts)


@cache
def _small_logarithms() -> NDArray[np.int64]:
    """Returns a table of `log2_fixed` for the integers below `_SMALL`. The entry of 0 has no meaning."""
    return _log2_fixed(np.maximum(np.arange(_SMALL), 1))


def _log2_fixed(counts: Histogram) -> NDArray[np.int64]:
    exponent = np.frexp(counts.astype(np.float64))[1] - 1  # exact: counts are below 2^53
    shift = exponent.astype(np.int64) - LOG2_BITS
    mantissa = np.where(shift >= 0, counts >> np.maximum(shift, 0), counts << np.maximum(-shift, 0))
    return np.asarray((exponent.astype(np.int64) << FRACTION) + LOG2[mantissa - (1 << LOG2_BITS)])


def entropy_bits(counts: Histogram) -> int:
    """Returns the order-0 entropy of a histogram, in bits times 2^16."""
    total = int(counts.sum())
    if 0 < total < _SMALL * 64 and counts.max() < _SMALL:  # zeros add nothing
        whole = int(log2_fixed(np.array([total]))[0])
        return total * whole - int(counts @ _small_logarithms()[counts])
    used = counts[counts > 0].astype(np.int64)
    if len(used) < 2:
        return 0
    each = int(log2_fixed(np.array([total]))[0]) - log2_fixed(used)
    if total < 1 << 40:  # the sum stays below 2^63
        return int(used @ each)
    return sum(int(n) * int(bits) for n, bits in zip(used, each, strict=True))


def entropies(histograms: list[Histogram]) -> list[int]:
    """Returns `entropy_bits` of several histograms of the same levels, each with at least one entry."""
    total = int(histograms[0].sum())
    if not 0 < total < 1 << 40:
        return [entropy_bits(counts) for counts in histograms]
    joined = np.concatenate(histograms)
    at = np.flatnonzero(joined)
    used = joined[at]
    starts = np.searchsorted(at, [0, *accumulate(map(len, histograms[:-1]))])
    sums = np.add.reduceat(used * log2_fixed(used), starts)
    whole = total * int(log2_fixed(np.array([total]))[0])
    return [whole - part for part in sums.tolist()]


def histogram(levels: NDArray[np.integer], size: int = 0) -> Histogram:
    """Returns how often each level from 0 occurs: int64 [at least ``size``]."""
    return np.bincount(levels.astype(np.int64), minlength=size).astype(np.int64)


def add_histograms(a: Histogram, b: Histogram) -> Histogram:
    """Returns the sum of two histograms of any lengths."""
    out = np.zeros(max(len(a), len(b)), np.int64)
    out[: len(a)] += a
    out[: len(b)] += b
    return out


@dataclass(frozen=True)
class Layout:
    """The classes of a code table without codes: the first level, and the residual bits of each class."""

    base: int
    extra: bytes

    @property
    def top(self) -> int:
        """One past the last level."""
        return self.base + sum(1 << e for e in self.extra)


def constant_layout(class_counts: Histogram, width: int) -> Layout:
    """Returns a layout of classes of 2^width levels each, from the first used class to the last."""
    used = np.flatnonzero(class_counts)
    return Layout(int(used[0]) << width, bytes([width]) * int(used[-1] - used[0] + 1))


def best_layout(counts: Histogram, signed: bool, bound: int, class_cost: int = CLASS_COST) -> Layout:
    """Returns the classes of least estimated cost, by dynamic programming over their boundaries.

    A class has 2^e numbers. If they occur n times among N levels, it costs n (log2(N/n) + e) bits, and
    ``class_cost`` for its bytes in the directory.

    Args:
        counts: how often each number occurs. A number is a level, or with ``signed`` the two levels 2m and
            2m + 1.
        signed: whether each class has one more residual bit, the sign.
        bound: all numbers of all classes are below this.
        class_cost: cost of a class in the directory, in bits times 2^16.
    """
    used = np.flatnonzero(counts)
    first, end = int(used[0]), int(used[-1]) + 1
    points = boundaries(first, end, bound)
    ends = np.array(points)
    below = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
    total = int(below[-1])
    log_total = int(log2_fixed(np.array([total]))[0])
    # The end and the cost of every possible class.
    exponents = np.arange((points[-1] - first).bit_length())
    targets = ends[:-1, None] + (1 << exponents)
    at = np.minimum(np.searchsorted(ends, targets), len(points) - 1)
    begins, which = np.nonzero(ends[at] == targets)
    n = below[np.minimum(targets, end)] - below[np.minimum(ends[:-1], end)][:, None]
    costs = np.where(n > 0, n * (log_total - log2_fixed(np.maximum(n, 1))), 0)
    costs += (n * exponents << FRACTION) + class_cost
    best: list[int | None] = [0] + [None] * (len(points) - 1)
    came = [(0, 0)] * len(points)  # index of the point where the last class begins, and its exponent
    ways = zip(
        *(part.tolist() for part in (begins, at[begins, which], costs[begins, which], which)), strict=True
    )
    for i, j, bits, e in ways:
        so_far, known = best[i], best[j]
        if so_far is not None and (known is None or so_far + bits < known):
            best[j], came[j] = so_far + bits, (i, e)
    finish = min((bits, j) for j, bits in enumerate(best) if bits is not None and points[j] >= end)[1]
    widths = []
    while finish:
        finish, e = came[finish]
        widths.append(e)
    sign = 1 if signed else 0
    return Layout(first << sign, bytes(e + sign for e in reversed(widths)))


def boundaries(first: int, end: int, bound: int) -> list[int]:
    """Returns a short list of possible class boundaries, ascending, from which classes can always be made.

    Args:
        first: the least number that occurs.
        end: one past the greatest.
        bound: no boundary is greater.
    """
    points = {first, end}
    point, step = first, 1
    while point < end:
        octave = range(point, min(first + _FINE_NUMBERS * step, end), step)
        points.update(octave)
        point, step = octave[-1] + step, 2 * step
    points.add(min(point, bound))
    # Descending powers of two from the last coarse point to the end.
    coarse = max(p for p in points if p < end) if end > first else first
    rest = end - coarse
    for e in reversed(range(rest.bit_length())):
        if rest >> e & 1:
            coarse += 1 << e
            points.add(coarse)
    return sorted(p for p in points if p <= bound)
