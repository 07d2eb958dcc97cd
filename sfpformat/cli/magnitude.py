"""Pruning by magnitude, exact and in bounded memory.

Theory of operation: the bit pattern of a magnitude grows with it. The greatest pattern that is pruned is
found digit by digit of 16 bits, the highest first: a pass counts how often each digit occurs among the
patterns that begin with the digits found so far. Float32 takes two passes, float64 four. Of equal magnitudes
as many as are needed go, the first in the order of tensors and positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Dtype, of_numpy

Patterns = NDArray[np.unsignedinteger]
# Elements looked at at once: their patterns take some MB, whatever the tensor's size.
BLOCK = 1 << 20
_DIGIT_BITS = 16


@dataclass(frozen=True)
class Threshold:
    """All magnitudes with patterns under ``pattern`` go, and the first ``ties`` of those equal to it."""

    pattern: int
    ties: int
    equal: int


def key_bits(dtypes: Iterable[Dtype]) -> int:
    """Bits of the patterns that the magnitudes of all these float dtypes can be compared by: 32 or 64."""
    return 64 if any(dtype.bits == 64 for dtype in dtypes) else 32


def count_of(fraction: float, positions: int) -> int:
    """How many positions a fraction is: the nearest number, of two the greater."""
    return min(math.floor(fraction * positions + 0.5), positions)


def patterns(array: NDArray[np.generic], bits: int) -> Iterator[Patterns]:
    """The magnitudes of a float array as patterns of 32 or 64 bits, block by block."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        with np.errstate(invalid="ignore"):  # a signalling NaN that is widened
            block = flat[start : start + BLOCK].astype(f"f{bits // 8}")
        pattern: Patterns = block.view(f"u{bits // 8}")
        pattern &= pattern.dtype.type((1 << (bits - 1)) - 1)
        yield pattern


def find_threshold(blocks: Callable[[], Iterator[Patterns]], count: int, bits: int) -> Threshold:
    """The threshold at which exactly ``count`` magnitudes go.

    Args:
        blocks: gives all patterns, each time it is called.
        count: from 0 to the number of patterns.
        bits: of the patterns.
    """
    if count == 0:
        return Threshold(0, 0, 0)
    prefix, left = 0, count
    for shift in range(bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = np.zeros(1 << _DIGIT_BITS, np.int64)
        for block in blocks():
            high = block >> np.asarray(shift, block.dtype)
            digits = high & np.asarray((1 << _DIGIT_BITS) - 1, block.dtype)
            if shift + _DIGIT_BITS < bits:
                digits = digits[high >> np.asarray(_DIGIT_BITS, block.dtype) == prefix]
            counts += np.bincount(digits.astype(np.int64), minlength=len(counts))
        upto = np.cumsum(counts)
        digit = int(np.searchsorted(upto, left))
        left -= int(upto[digit] - counts[digit])
        prefix = prefix << _DIGIT_BITS | digit
    return Threshold(prefix, left, int(counts[digit]))


def count_equal(array: NDArray[np.generic], threshold: Threshold, bits: int) -> int:
    """How many magnitudes of an array lie at the threshold."""
    return sum(int(np.count_nonzero(block == threshold.pattern)) for block in patterns(array, bits))


def prune_below(array: NDArray[np.generic], threshold: Threshold, ties: int, bits: int) -> int:
    """Sets what goes to +0, in place.

    Args:
        array: contiguous, float.
        ties: how many of those at the threshold go in this array, the first.

    Returns:
        How many positions went.
    """
    flat = array.reshape(-1)
    gone = 0
    for i, block in enumerate(patterns(array, bits)):
        goes = block < threshold.pattern
        if ties:
            equal = np.flatnonzero(block == threshold.pattern)[:ties]
            goes[equal] = True
            ties -= len(equal)
        part = flat[i * BLOCK : i * BLOCK + len(goes)]
        part[goes] = 0
        gone += int(np.count_nonzero(goes))
    return gone


def prune_fraction(array: NDArray[np.generic], fraction: float) -> int:
    """Sets the given fraction of an array's positions to +0, in place; returns how many."""
    dtype = of_numpy(array.dtype)
    assert dtype is not None
    bits = key_bits([dtype])
    count = count_of(fraction, array.size)
    threshold = find_threshold(lambda: patterns(array, bits), count, bits)
    return prune_below(array, threshold, threshold.ties, bits)


def prune_pattern(array: NDArray[np.generic], keep: int, of: int, dim: int) -> int:
    """Keeps the ``keep`` greatest of every ``of`` neighbours along a dimension, in place; counts what went.

    Of equal magnitudes the last stay.

    Args:
        array: contiguous, float.
        dim: a dimension whose size is a multiple of ``of``.
    """
    if not array.size:
        return 0
    dtype = of_numpy(array.dtype)
    assert dtype is not None
    bits = key_bits([dtype])
    # [groups, members of a group, what lies after the dimension]
    groups = array.reshape(-1, of, math.prod(array.shape[dim + 1 :]))
    width = min(groups.shape[2], max(BLOCK // of, 1))
    step = max(BLOCK // (of * width), 1)
    for start in range(0, len(groups), step):
        for left in range(0, groups.shape[2], width):
            part = groups[start : start + step, :, left : left + width]
            keys = np.concatenate(list(patterns(part, bits))).reshape(part.shape)
            going = np.argsort(keys, axis=1, kind="stable")[:, : of - keep]
            np.put_along_axis(part, going, part.dtype.type(0), axis=1)
    return array.size // of * (of - keep)
