"""Exact pruning by magnitude, in place and in bounded memory. Needs only numpy.

Theory of operation: bit patterns of magnitudes are ordered like the magnitudes. A radix search finds the
greatest pattern that is pruned, 16 bits per pass, highest digit first: a pass counts each digit among the
patterns that begin with the digits found so far. Float32 takes two passes, float64 four. Among equal
magnitudes at the cutoff, the first in the order of tensors and positions are pruned, as many as needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Dtype, of_numpy
from .thresholds import count_of_share

Patterns = NDArray[np.unsignedinteger]
# Elements per block: their patterns take a few MB, for tensors of any size.
BLOCK = 1 << 20
_DIGIT_BITS = 16


@dataclass(frozen=True)
class Cutoff:
    """The greatest pruned magnitude.

    All patterns below ``pattern`` are pruned, and the first ``ties`` of the ``equal`` patterns at it.
    """

    pattern: int
    ties: int
    equal: int


def key_bits(dtypes: Iterable[Dtype]) -> int:
    """Returns the bits of patterns that can compare magnitudes of all these float dtypes: 32 or 64."""
    return 64 if any(dtype.bits == 64 for dtype in dtypes) else 32


def patterns(array: NDArray[np.generic], bits: int) -> Iterator[Patterns]:
    """Yields the magnitudes of a float array as patterns of 32 or 64 bits, block by block."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        with np.errstate(invalid="ignore"):  # widening a signalling NaN
            block = flat[start : start + BLOCK].astype(f"f{bits // 8}")
        pattern: Patterns = block.view(f"u{bits // 8}")
        pattern &= pattern.dtype.type((1 << (bits - 1)) - 1)
        yield pattern


def find_cutoff(blocks: Callable[[], Iterator[Patterns]], count: int, bits: int) -> Cutoff:
    """Returns the cutoff that prunes exactly ``count`` magnitudes.

    Args:
        blocks: yields all patterns; called once per pass.
        count: from 0 to the number of patterns.
        bits: bits of the patterns.
    """
    if count == 0:
        return Cutoff(0, 0, 0)
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
    return Cutoff(prefix, left, int(counts[digit]))


def count_equal(array: NDArray[np.generic], cutoff: Cutoff, bits: int) -> int:
    """Returns the number of magnitudes of an array that are equal to the cutoff."""
    return sum(int(np.count_nonzero(block == cutoff.pattern)) for block in patterns(array, bits))


def prune_below(array: NDArray[np.generic], cutoff: Cutoff, ties: int, bits: int) -> int:
    """Sets the pruned positions to +0, in place.

    Args:
        array: contiguous, float.
        ties: prunes the first ``ties`` magnitudes that are equal to the cutoff.

    Returns:
        The number of pruned positions.
    """
    flat = array.reshape(-1)
    gone = 0
    for i, block in enumerate(patterns(array, bits)):
        goes = block < cutoff.pattern
        if ties:
            equal = np.flatnonzero(block == cutoff.pattern)[:ties]
            goes[equal] = True
            ties -= len(equal)
        part = flat[i * BLOCK : i * BLOCK + len(goes)]
        part[goes] = 0
        gone += int(np.count_nonzero(goes))
    return gone


def prune_fraction(array: NDArray[np.generic], fraction: float) -> int:
    """Sets the given fraction of an array's positions to +0, in place; returns their number."""
    dtype = of_numpy(array.dtype)
    assert dtype is not None
    bits = key_bits([dtype])
    count = count_of_share(fraction, array.size)
    cutoff = find_cutoff(lambda: patterns(array, bits), count, bits)
    return prune_below(array, cutoff, cutoff.ties, bits)


def prune_pattern(array: NDArray[np.generic], keep: int, of: int, dim: int) -> int:
    """Keeps the ``keep`` greatest of every ``of`` neighbours along a dimension, in place.

    Keeps the last ones of equal magnitudes. Returns the number of pruned positions.

    Args:
        array: contiguous, float.
        dim: a dimension whose size is a multiple of ``of``.
    """
    if not array.size:
        return 0
    dtype = of_numpy(array.dtype)
    assert dtype is not None
    bits = key_bits([dtype])
    # [groups, members of a group, product of the dimensions after it]
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
