"""Tensors of few values: which magnitudes occur, and what each value means, such as a level of a table.

Everything is done on bit patterns, so that no value is rounded; patterns of magnitudes ascend as these do.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .exact import Patterns

# Patterns looked at together: the first few, which suffice for most tensors, then more and more.
_FIRST_BLOCK, _BLOCK = 1 << 12, 1 << 18


def few_magnitudes(patterns: Patterns, most: int) -> Patterns | None:
    """The patterns of all magnitudes that occur, ascending; None where they are more than ``most``.

    Args:
        patterns: of floats, sign highest, shape [n].
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
    """The bits of a pattern that are not its sign."""
    return dtype.type((1 << (8 * dtype.itemsize - 1)) - 1)


def _growing_blocks(size: int) -> Iterator[tuple[int, int]]:
    start, block = 0, _FIRST_BLOCK
    while start < size:
        yield start, min(start + block, size)
        start, block = start + block, min(2 * block, _BLOCK)


def _unseen(magnitudes: Patterns, known: Patterns) -> Patterns:
    """Those that are not in ``known``, which ascend: to look a number up is faster than to sort it."""
    if not len(known):
        return magnitudes
    at = np.minimum(np.searchsorted(known, magnitudes), len(known) - 1)
    return np.asarray(magnitudes[known[at] != magnitudes])


def translate(
    patterns: Patterns, magnitudes: Patterns, meanings: NDArray[np.unsignedinteger]
) -> NDArray[np.unsignedinteger]:
    """What each value means, by the number of its magnitude and its sign.

    Args:
        patterns: of floats, shape [n].
        magnitudes: the patterns of all their magnitudes, ascending, at most 2^15.
        meanings: at 2m that of magnitude m, at 2m + 1 that of its negative.

    Returns:
        In the dtype of ``meanings``, shape [n].
    """
    if patterns.itemsize <= 2:
        return np.asarray(translation(magnitudes, meanings)[patterns])
    number = np.searchsorted(magnitudes, patterns & magnitude_bits(patterns.dtype))
    negative = patterns >> patterns.dtype.type(8 * patterns.itemsize - 1)
    return np.asarray(meanings[2 * number + negative.astype(np.int64)])


def translation(magnitudes: Patterns, meanings: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    """Pattern -> meaning, for patterns of one or two bytes; 0 for those that do not occur."""
    bits = 8 * magnitudes.itemsize
    table = np.zeros(1 << bits, meanings.dtype)
    table[magnitudes] = meanings[0::2]
    table[magnitudes.astype(np.int64) | 1 << (bits - 1)] = meanings[1::2]
    return table
