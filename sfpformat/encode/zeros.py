"""Classes for zeros alone: where a stream has many -0, they need no residual bits (SPEC.md chapter 8).

The level of +0 is 0 and that of -0 is 1, so two classes of one level each go before those of all other
levels. What multiplies weights by a mask leaves -0 where a negative weight was; in a class with small weights
every one of them would take the residual bits of a weight.

Only streams with -0 are looked at, so that others keep their tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import MAX_FIELD_BITS
from ..coding.classes import CLASS_COST, Histogram, Layout, add_histograms
from ..coding.codetable import MAX_CLASSES, MAX_CODE_BITS, MAX_SYMBOLS
from ..coding.exact import Patterns
from ..coding.magnitudes import magnitude_bits
from ..coding.planes import AnyLevels, Counts
from ..coding.quantisers import float_patterns
from ..dtypes import of_numpy
from ..engines import Engine
from ..options import Options
from .codes import Choice, LevelBlocks, choose_codes, count_symbols, one_class

# Levels before those of weights: +0 and -0.
_ZEROS = 2
# A table whose classes differ in their residual bits decodes slower: it must save this part of a stream.
_GAIN = 64
# The most classes of weights, by group; of pairs the second is tried where the first gives too many symbols.
_MOST_CLASSES = {1: (MAX_SYMBOLS - _ZEROS,), 2: (18, 14)}
# Positions looked at together.
_BLOCK = 1 << 18


class Zeros(NamedTuple):
    """How many zeros there are, by their signs."""

    positive: int
    negative: int


def zeros_of(array: NDArray[np.generic]) -> Zeros:
    """The zeros of an array; none of a dtype that is not float."""
    positive = negative = 0
    for patterns in _blocks_of_patterns(array):
        positive += len(patterns) - int(np.count_nonzero(patterns))
        negative += int(np.count_nonzero(patterns == _negative_zero(patterns)))
    return Zeros(positive, negative)


def with_positive_zeros(flat: NDArray[np.generic]) -> NDArray[np.generic]:
    """A float array with +0 for -0, shape [n]; the same array where it has none."""
    if not zeros_of(flat).negative:
        return flat
    flat = flat.copy()
    for patterns in _blocks_of_patterns(flat):
        patterns[patterns == _negative_zero(patterns)] = 0
    return flat


def _blocks_of_patterns(array: NDArray[np.generic]) -> Iterator[Patterns]:
    """The bit patterns of an array of a float dtype of the format, block by block; none of any other."""
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
    """A choice, or one with classes for zeros alone where that is clearly smaller.

    Args:
        choice: of the stream.
        blocks: its levels.
        widths: residual bits of the classes of weights that may be, the best first.
        bound: on the levels of a table.
        most: codes, where the options do not say how many.
        first: how many levels are in the class of the zeros: there are no more zeros.
    """
    # A -0 takes no more now than the longest code and the longest residual.
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
            continue  # the last class would reach beyond the bound; narrower ones may not
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
    """How often the levels of weights occur, 2^width of them together from the first that is no zero on."""

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
    """The best codes of a layout with classes for zeros."""
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
    """Classes for the zeros that occur, and at most so many for the weights; None where that cannot be."""
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
    """Residual bits of classes, those of too many in several classes."""
    return b"".join([bytes([min(w, MAX_FIELD_BITS)]) * (1 << max(w - MAX_FIELD_BITS, 0)) for w in widths])


def _unused(levels: int) -> bytes:
    """Residual bits of as few classes as cover so many levels, which do not occur."""
    whole, rest = divmod(levels, 1 << MAX_FIELD_BITS)
    bits = [bit for bit in reversed(range(MAX_FIELD_BITS)) if rest >> bit & 1]
    return bytes([MAX_FIELD_BITS] * whole + bits)
