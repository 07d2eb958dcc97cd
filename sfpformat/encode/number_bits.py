"""Estimates how many bits the numbers of a quantiser take, from how often each occurs.

All sums are of integers, so that they do not depend on a platform.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..coding.classes import FRACTION, LOG2, LOG2_BITS, Histogram, entropy_bits, log2_fixed
from .number_counts import NumberCounts

_CLASS_BITS = 10  # numbers of more bits are counted by this many leading bits
_MOST_IN_PAIRS = 8  # with more different numbers, a Huffman code of pairs takes about the entropy
_FEW_NUMBERS = 64  # for at most this many numbers, sums in Python are faster than in numpy
_LOGARITHMS: list[int] = LOG2.tolist()


def log2_of(number: int) -> int:
    """Returns the result of `log2_fixed` for one positive integer."""
    exponent = number.bit_length() - 1
    shift = exponent - LOG2_BITS
    mantissa = number >> shift if shift >= 0 else number << -shift
    return (exponent << FRACTION) + _LOGARITHMS[mantissa - (1 << LOG2_BITS)]


def rise_of_bits(counts: Histogram) -> NDArray[np.float64]:
    """Returns how many more bits each number takes than the one below it, at least 0, shape [n - 1].

    The bits are from the order-0 entropy.

    Args:
        counts: how often each number from 0 on occurs, shape [n].
    """
    # One is added to each count, so that numbers that are not in the sample have a finite cost.
    if len(counts) <= _FEW_NUMBERS:
        logarithms = [log2_of(count + 1) / (1 << FRACTION) for count in counts.tolist()]
        costs = [(number > 0) - logarithm for number, logarithm in enumerate(logarithms)]
        return np.array([max(b - a, 0.0) for a, b in pairwise(costs)], np.float64)
    bits = -log2_fixed(counts + 1) / float(1 << FRACTION) + (np.arange(len(counts)) > 0)
    return np.clip(np.diff(bits), 0, None)


def numbers_bits(counts: NumberCounts) -> int:
    """Returns about how many bits (times 2^16) numbers with signs take.

    The sum of three parts: the entropy of which numbers are 0, the entropy of the other numbers, and their
    signs. The second part is at least half a bit per number if there are several different ones, because a
    code of pairs takes at least one bit per pair.

    Args:
        counts: how often each number occurs.
    """
    others = slice(int(counts.zeros > 0), None)
    numbers, often = counts.numbers[others], counts.often[others]
    alive = int(often.sum())
    least = alive << (FRACTION - 1) if len(often) > 1 else 0
    classes, residuals = _in_classes(numbers, often)
    few = len(classes) <= _FEW_NUMBERS
    entropy = _entropy(classes.tolist()) if few else entropy_bits(classes)
    rest = max(entropy + (residuals << FRACTION), least) + (alive << FRACTION)
    return zeros_bits(counts) + rest


def zeros_bits(counts: NumberCounts, more: int = 0) -> int:
    """Returns the entropy (times 2^16) of which numbers are 0, with ``more`` zeros than in the counts."""
    zeros, alive = counts.zeros + more, int(counts.often.sum()) - counts.zeros
    return _entropy([zeros, alive])


def _entropy(counts: list[int]) -> int:
    """Returns the result of `entropy_bits`, which takes longer for a few counts."""
    total = sum(counts)
    return total * log2_of(total) - sum(n * log2_of(n) for n in counts if n) if total else 0


def pairs_bits(counts: NumberCounts) -> int:
    """Returns how many bits (times 2^16) numbers and signs (of non-zero ones) take with a code of pairs.

    The code is a Huffman code. It is well above the entropy if one number is much more frequent than the
    others: 0.68 bits per number instead of 0.54 if seven in eight are 0. Returns 0 if many different numbers
    occur, because the entropy is then close.
    """
    often: list[int] = counts.often.tolist()
    if len(often) > _MOST_IN_PAIRS or counts.numbers[-1] >= 1 << _CLASS_BITS:
        return 0
    total = sum(often)
    pairs = [one * other for one in often for other in often]
    heapify(pairs)
    length = 0  # sum of code length * count over all pairs; total^2 pairs
    while len(pairs) > 1:
        joined = heappop(pairs) + heappop(pairs)
        length += joined
        heappush(pairs, joined)
    return (length << FRACTION) // max(2 * total, 1) + ((total - counts.zeros) << FRACTION)


def _in_classes(numbers: NDArray[np.int64], often: NDArray[np.int64]) -> tuple[Histogram, int]:
    """Joins great numbers into classes. Returns the histogram of the classes, and all residual bits.

    A sample of n weights cannot show an entropy above log2 n, which is too low if there are many different
    numbers. Numbers of a class are assumed to be equally frequent.

    Args:
        numbers: the numbers that occur, at least 1, ascending.
        often: how often each occurs.
    """
    if not len(numbers) or numbers[-1] <= 1 << _CLASS_BITS:
        return often, 0
    numbers = numbers - 1
    widths = np.maximum(np.frexp(numbers.astype(np.float64))[1].astype(np.int64) - _CLASS_BITS, 0)
    classes = (numbers >> widths) + (widths << (_CLASS_BITS - 1))
    joined = np.bincount(classes, weights=often.astype(np.float64)).astype(np.int64)  # exact below 2^53
    return joined, int(often @ widths)
