"""Tensors of few values: finds the distinct magnitudes, and maps values to numbers such as table levels.

All functions use bit patterns, so that no value is rounded. The patterns of magnitudes have the order of the
magnitudes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .exact_encoding import Patterns

# Patterns per block. The first block is small: it is sufficient for most tensors. Later blocks are larger.
_FIRST_BLOCK, _BLOCK = 1 << 12, 1 << 18


def few_magnitudes(patterns: Patterns, most: int) -> Patterns | None:
    """Returns the patterns of all distinct magnitudes, ascending. None if there are more than ``most``.

    Args:
        patterns: bit patterns of floats, with the sign in the highest bit, shape [n].
        most: at least 1.
    """
    low = magnitude_bits(patterns.dtype)
    found: Patterns = np.zeros(0, patterns.dtype)
    for start, stop in _growing_blocks(len(patterns)):
        found = np.union1d(found, _unseen(patterns[start:stop] & low, found))
        if len(found) > most:
            return None
    return found


def magnitude_bits(dtype: np.dtype[np.unsignedinteger]) -> np.unsignedinteger:
    """Returns the mask of all bits of a pattern except the sign."""
    return dtype.type((1 << (8 * dtype.itemsize - 1)) - 1)


def _growing_blocks(size: int) -> Iterator[tuple[int, int]]:
    start, block = 0, _FIRST_BLOCK
    while start < size:
        yield start, min(start + block, size)
        start, block = start + block, min(2 * block, _BLOCK)


def _unseen(magnitudes: Patterns, known: Patterns) -> Patterns:
    """Returns the magnitudes that are not in ``known``, which is ascending. Faster than sorting all."""
    if not len(known):
        return magnitudes
    at = np.minimum(np.searchsorted(known, magnitudes), len(known) - 1)
    return np.asarray(magnitudes[known[at] != magnitudes])


def translate(
    patterns: Patterns, magnitudes: Patterns, meanings: NDArray[np.unsignedinteger]
) -> NDArray[np.unsignedinteger]:
    """Maps each value to a number, by the index of its magnitude and its sign.

    Args:
        patterns: bit patterns of floats, shape [n].
        magnitudes: the patterns of all their magnitudes, ascending, at most 2^15.
        meanings: element 2m is the result for magnitude m, element 2m + 1 for its negative.

    Returns:
        The results, in the dtype of ``meanings``, shape [n].
    """
    if patterns.itemsize <= 2:
        return np.asarray(translation(magnitudes, meanings)[patterns])
    number = np.searchsorted(magnitudes, patterns & magnitude_bits(patterns.dtype))
    negative = patterns >> patterns.dtype.type(8 * patterns.itemsize - 1)
    return np.asarray(meanings[2 * number + negative.astype(np.int64)])


def translation(magnitudes: Patterns, meanings: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    """Returns a look-up table, pattern -> meaning, for patterns of one or two bytes; 0 if there is none."""
    bits = 8 * magnitudes.itemsize
    table = np.zeros(1 << bits, meanings.dtype)
    table[magnitudes] = meanings[0::2]
    table[magnitudes.astype(np.int64) | 1 << (bits - 1)] = meanings[1::2]
    return table
