"""Chooses separate classes for zeros, so that many -0 need no residual bits (SPEC.md chapter 8).

The level of +0 is 0 and the level of -0 is 1. Each gets a class of one level, before the classes of all other
levels. Code that multiplies weights by a mask turns negative weights into -0. In a class with small weights,
each -0 would take the residual bits of a weight.

The tables of streams without -0 do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import MAX_FIELD_BITS
from ..coding.classes import CLASS_COST, Histogram, Layout, add_histograms
from ..coding.codetable import MAX_CLASSES, MAX_CODE_BITS, MAX_SYMBOLS
from ..coding.exact_encoding import Patterns
from ..coding.magnitudes import magnitude_bits
from ..coding.planes import AnyLevels, Counts
from ..coding.quantisers import float_patterns
from ..dtypes import of_numpy
from ..engines import Engine
from ..options import Options
from .codes import Choice, LevelBlocks, choose_codes, count_symbols, one_class

# Number of levels before those of non-zero weights: +0 and -0.
_ZEROS = 2
# A table whose classes differ in residual bits decodes more slowly. It must save 1/_GAIN of a stream.
_GAIN = 64
# Group -> limits on the number of classes for non-zero weights, in the order of trial. With pairs, the
# first limit can give too many symbols.
_MOST_CLASSES = {1: (MAX_SYMBOLS - _ZEROS,), 2: (18, 14)}
# Positions processed at a time.
_BLOCK = 1 << 18


class Zeros(NamedTuple):
    """Numbers of positive and negative zeros."""

    positive: int
    negative: int


def zeros_of(array: NDArray[np.generic]) -> Zeros:
    """Counts the zeros of an array of any shape. Returns 0 and 0 for a dtype that is not float."""
    positive = negative = 0
    for patterns in _blocks_of_patterns(array):
        positive += len(patterns) - int(np.count_nonzero(patterns))
        negative += int(np.count_nonzero(patterns == _negative_zero(patterns)))
    return Zeros(positive, negative)


def with_positive_zeros(flat: NDArray[np.generic]) -> NDArray[np.generic]:
    """Returns a float array, shape [n], with +0 for each -0: a copy, or the array itself if it has no -0."""
    if not zeros_of(flat).negative:
        return flat
    flat = flat.copy()
    for patterns in _blocks_of_patterns(flat):
        patterns[patterns == _negative_zero(patterns)] = 0
    return flat


def _blocks_of_patterns(array: NDArray[np.generic]) -> Iterator[Patterns]:
    """Yields the bit patterns of a float array, block by block. Yields nothing for another dtype."""
    dtype = of_numpy(array.dtype)
    if dtype is None or not dtype.is_float:
        return
    flat = np.ascontiguousarray(array, dtype.numpy).reshape(-1)
    for start in range(0, len(flat), _BLOCK):
        yield float_patterns(flat[start : start + _BLOCK], dtype)


def _negative_zero(patterns: Patterns) -> np.unsignedinteger:
    return ~magnitude_bits(patterns.dtype)


def cheaper_with_zeros(
    choice: Choice,
    blocks: LevelBlocks,
    widths: range,
    bound: int,
    options: Options,
    engine: Engine,
    most: int,
    first: int,
) -> Choice:
    """Returns the choice, or one with separate classes for zeros if that is clearly smaller.

    Args:
        choice: the stream's choice so far.
        blocks: the levels of the stream.
        widths: candidates for the residual bits of classes of non-zero weights, the best first.
        bound: no class of a table may reach this level.
        options: the caller's choices.
        engine: the engine that counts.
        most: the greatest number of codes, unless the options set it.
        first: number of levels in the class that contains the zeros, an upper bound on the number of zeros.
    """
    # A -0 takes at most the longest code and the longest residual.
    saved = (MAX_CODE_BITS + max(choice.table.extra)) * _GAIN
    if first * saved < choice.bits:
        return choice
    zeros = _count_zeros(blocks)
    if zeros.negative * saved < choice.bits:
        return choice
    best = choice
    for width in widths:
        rest = _count_rest(blocks, width)
        if len(rest) > (bound - _ZEROS) >> width:
            continue  # the last class would exceed the bound; with narrower classes it may not
        for group in (options.group,) if options.group else (1, 2):
            found = _choice(blocks, zeros, rest, width, bound, group, options, engine, most)
            if found is not None and found.bits < best.bits:
                best = found
        break
    return best if best.bits * _GAIN < choice.bits * (_GAIN - 1) else choice


def _count_zeros(blocks: LevelBlocks) -> Zeros:
    def count(levels: AnyLevels, _: Counts) -> Zeros:
        negative = _negative_zero(levels) if blocks.exact else levels.dtype.type(1)
        return Zeros(len(levels) - int(np.count_nonzero(levels)), int(np.count_nonzero(levels == negative)))

    each = list(blocks.map(count))
    return Zeros(sum(zeros.positive for zeros in each), sum(zeros.negative for zeros in each))


def _count_rest(blocks: LevelBlocks, width: int) -> Histogram:
    """Counts the levels of non-zero weights in groups of 2^width consecutive levels."""

    def count(levels: AnyLevels, _: Counts) -> Histogram:
        rest = levels[levels >= _ZEROS] - levels.dtype.type(_ZEROS)
        return np.bincount((rest >> levels.dtype.type(width)).astype(np.int64)).astype(np.int64)

    total = np.zeros(0, np.int64)
    for each in blocks.map_levels(count):
        total = add_histograms(total, each)
    return total


def _choice(
    blocks: LevelBlocks,
    zeros: Zeros,
    rest: Histogram,
    width: int,
    bound: int,
    group: int,
    options: Options,
    engine: Engine,
    most: int,
) -> Choice | None:
    """Returns the best choice with separate classes for zeros, or None if none is possible."""
    for classes in _MOST_CLASSES[group]:
        layout = _layout(zeros, rest, width, bound, classes, engine)
        if layout is None or len(layout.extra) > MAX_CLASSES[group]:
            continue
        if len(layout.extra) == 1:
            return one_class(blocks, layout, zeros.negative)
        counts = count_symbols(blocks, layout, group, engine)
        found = choose_codes(blocks, counts, layout, group, options, engine, most=most)
        if found is not None:
            return found
    return None


def _layout(
    zeros: Zeros, rest: Histogram, width: int, bound: int, most: int, engine: Engine
) -> Layout | None:
    """Returns a layout with classes for the zeros that occur, and at most ``most`` classes for the rest.

    Returns None if no such layout is found.
    """
    base = 0 if zeros.positive else 1
    of_zeros = bytes(_ZEROS - base)
    if not len(rest):
        return Layout(base, of_zeros)
    for doubling in range(16):
        found = engine.best_layout(rest, False, (bound - _ZEROS) >> width, CLASS_COST << doubling)
        if len(found.extra) <= most:
            widths = _split([width + extra for extra in found.extra])
            return Layout(base, of_zeros + _unused(found.base << width) + widths)
    return None


def _split(widths: list[int]) -> bytes:
    """Returns residual bits of classes. Splits classes of more than `MAX_FIELD_BITS` bits into several."""
    return b"".join([bytes([min(w, MAX_FIELD_BITS)]) * (1 << max(w - MAX_FIELD_BITS, 0)) for w in widths])


def _unused(levels: int) -> bytes:
    """Returns residual bits of the fewest classes that cover a number of unused levels."""
    whole, rest = divmod(levels, 1 << MAX_FIELD_BITS)
    bits = [bit for bit in reversed(range(MAX_FIELD_BITS)) if rest >> bit & 1]
    return bytes([MAX_FIELD_BITS] * whole + bits)
