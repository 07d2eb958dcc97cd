"""Plans sequences of non-negative integers, such as the gaps and differences of a delta (SPEC.md 28.2).

A number is the level of an element with the quantiser `exact`. Unlike weights, numbers have no exponents:
their classes have widths that grow with the number.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ..coding.classes import Layout
from ..coding.codetable import MAX_CLASSES, MAX_CODES
from ..coding.planes import AnyLevels, Counts
from ..coding.quantisers import Exact, levels_to_patterns
from ..container.entry import CHUNK_RECORD, MAX_CHUNK_POSITIONS, TensorEntry
from ..container.stream_maps import FingerprintsEntry
from ..dtypes import Dtype
from ..engines import Engine
from ..io.threads import Workers
from ..options import Options
from .blocks import Blocks, CodedBlocks
from .codes import Choice, LevelBlocks, choose_codes, count_symbols, no_levels, one_class
from .level_sources import ExactSource
from .number_tables import choose_numbers
from .planner import Plan

# Numbers per segment. A segment is the unit that has its own code.
_SEGMENT = 384
_CHUNK = 1 << 16
# All numbers below this are counted one by one; others only by the octave and its fractions.
_COUNTED = 1 << 16
# (number of the highest bits below the leading one that are in the class, levels per symbol).
_OCTAVES = ((0, 2), (0, 1), (1, 1), (2, 1), (3, 1))
_MAX_EXTRA = 56  # R-TAB-002
_FINEST = max(fraction for fraction, _ in _OCTAVES)


def plan_numbers(
    name: str,
    numbers: NDArray[np.unsignedinteger],
    dtype: Dtype,
    shape: tuple[int, ...],
    engine: Engine,
    workers: Workers,
) -> Plan:
    """Chooses how a tensor is encoded whose levels are given.

    Args:
        name: the tensor's name.
        numbers: the levels of its elements, less than 2^(bits of dtype), [n].
        dtype: its dtype, a float type.
        shape: its shape, of n elements.
        engine: the engine that counts.
        workers: threads that count.
    """
    flat = levels_to_patterns(numbers, dtype).view(dtype.numpy)
    chunk = _CHUNK // _SEGMENT
    raw = TensorEntry(
        name,
        dtype,
        shape,
        "raw",
        _SEGMENT,
        min(MAX_CHUNK_POSITIONS // _SEGMENT, chunk),
        np.zeros(0, CHUNK_RECORD),
    )
    blocks = Blocks(len(flat), raw.segment, raw.chunk)
    unpacked = Plan(raw, flat, blocks, bits=flat.nbytes * 8)
    if not len(flat):
        return unpacked

    def levels(block: slice, counts: Counts) -> tuple[AnyLevels, Counts]:
        return numbers[block], counts

    choice = _choice(LevelBlocks(raw.segments, blocks, levels, workers=workers), numbers, dtype, engine)
    if choice is None or choice.bits >= unpacked.bits:
        return unpacked
    fingerprints = FingerprintsEntry(Exact(dtype), choice.table)
    entry = TensorEntry(
        name,
        dtype,
        shape,
        "fingerprint",
        raw.segment,
        raw.chunk,
        raw.chunks,
        fingerprints=fingerprints,
    )
    coded = CodedBlocks(ExactSource(flat, dtype, dtype, None, engine), None, engine)
    return Plan(entry, flat, blocks, coded, {"fingerprints": choice.codes}, bits=choice.bits)


def _choice(
    stream: LevelBlocks, numbers: NDArray[np.unsignedinteger], dtype: Dtype, engine: Engine
) -> Choice | None:
    """Returns the smallest choice of a code table, or None if no table can code the numbers."""
    least, greatest = int(numbers.min()), int(numbers.max())
    if least == greatest == 0:
        return no_levels_but_zeros(stream, len(numbers))
    options = Options(codes=MAX_CODES)
    if greatest < _COUNTED:
        return choose_numbers(stream, 1 << dtype.bits, options, engine, signed=False)
    best: Choice | None = None
    fine = fine_classes(numbers)
    blocks = replace(stream, make=lambda block, counts: (fine[block], counts))
    for fraction, group in _OCTAVES:
        layout = octaves(fraction, least, greatest)
        if len(layout.extra) == 1:
            return one_class(stream, layout, len(numbers)) if layout.top <= 1 << dtype.bits else None
        fits = layout.top <= 1 << dtype.bits and len(layout.extra) <= MAX_CLASSES[group]
        counts = count_symbols(blocks, of_fine_classes(layout), group, engine) if fits else None
        found = counts and choose_codes(stream, counts, layout, group, options, engine)
        if found and (best is None or found.bits < best.bits):
            best = found
    return best


def no_levels_but_zeros(stream: LevelBlocks, levels: int) -> Choice:
    """Returns the choice for a stream of zeros: one class without residual bits."""
    return one_class(stream, Layout(no_levels(stream).table.base, bytes([0])), levels)


def octaves(fraction: int, least: int, greatest: int) -> Layout:
    """Returns classes that divide each octave of numbers into 2^fraction parts.

    The first class has the least number, the last class the greatest. The numbers below 2^(fraction + 1) have
    classes of their own.
    """
    starts, widths = list(range(1 << (fraction + 1))), [0] * (1 << (fraction + 1))
    for octave in range(fraction + 1, 64):
        width = min(octave - fraction, _MAX_EXTRA)
        parts = range(1 << octave, 2 << octave, 1 << width)
        starts += parts
        widths += [width] * len(parts)
        if starts[-1] > greatest:
            break
    first = np.searchsorted(np.array(starts, np.uint64), np.uint64(least), side="right") - 1
    stop = np.searchsorted(np.array(starts, np.uint64), np.uint64(greatest), side="right")
    return Layout(starts[first], bytes(widths[first:stop]))


def fine_classes(numbers: NDArray[np.unsignedinteger]) -> NDArray[np.uint16]:
    """Returns the class of each number in the finest layout of `octaves`, counted from that of 0.

    All other layouts have classes that are several of these. So numbers are compared with the starts of
    classes only once, and counted as small numbers.
    """
    if numbers.itemsize == 8:  # not exact as float64
        return np.asarray(np.searchsorted(_fine_starts(), numbers, side="right") - 1, np.uint16)
    # Exponent and highest bits of the mantissa; those of 2^(_FINEST + 1) are to be this number.
    bits = numbers.astype(np.float64).view(np.int64) >> (52 - _FINEST)
    first = (1023 + _FINEST + 1) << _FINEST
    return np.where(numbers < 2 << _FINEST, numbers, bits - first + (2 << _FINEST)).astype(np.uint16)


@cache
def _fine_starts() -> NDArray[np.uint64]:
    layout = octaves(_FINEST, 0, (1 << 64) - 1)
    widths = np.frombuffer(layout.extra, np.uint8).astype(np.uint64)
    sizes = np.uint64(1) << widths
    return np.asarray(np.cumsum(sizes) - sizes)


def of_fine_classes(layout: Layout) -> Layout:
    """Returns the layout of the numbers of `fine_classes` with the same classes as a layout of `octaves`."""
    widths = np.frombuffer(layout.extra, np.uint8).astype(np.uint64)
    sizes = np.uint64(1) << widths
    starts = np.uint64(layout.base) + np.cumsum(sizes) - sizes
    first, last = (fine_classes(ends).astype(np.int64) for ends in (starts, starts + (sizes - np.uint64(1))))
    return Layout(int(first[0]), bytes(int(size).bit_length() - 1 for size in last - first + 1))
