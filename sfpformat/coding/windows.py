"""Windows: symbols of a fixed width instead of codewords (SPEC.md chapters 8 and 9).

Window j covers 2^w - 1 consecutive classes from class j on. A segment stores w bit planes, one bit for each
level in each, and after them the classes of its escaped levels: those outside its window. All positions of
bits follow from counts, so that a decoder needs no table and no search. This module is the reference
implementation, on whole arrays; the other engines must return the same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import fault
from .bits import Bytes, segment_sums
from .codetable import CodeTable

Counts = NDArray[np.int64]
Classes = NDArray[np.uint16]


class Symbols(NamedTuple):
    """The location of the symbols of a run of segments in the bytes of a chunk.

    Attributes:
        counts: number of levels in each segment.
        windows: number of each segment's window.
        start: bit offset of the first segment's symbols.
        bits: bits of each segment, int64 [n].
    """

    counts: Counts
    windows: Counts
    start: int
    bits: Counts


def decode_windows(data: Bytes, symbols: Symbols, table: CodeTable) -> Classes:
    """Decodes the class of each level of a run of segments.

    Args:
        data: the bytes of the chunk; the caller has checked that the prefix plane is inside.
        symbols: the location of the run.
        table: the stream's code table, with windows.

    Raises:
        InvalidFileError: E_LAYOUT by R-PLN-003, E_RANGE by R-PLN-005.
    """
    assert table.window is not None
    counts, sizes, width = symbols.counts, symbols.bits, table.window
    start, size, starts = symbols.start, int(sizes.sum()), np.cumsum(sizes) - sizes
    # The symbols may be longer than the plane; the comparison of sizes below refuses such a segment.
    plane = np.zeros(max(size, int((starts + counts * width).max(initial=0))), np.uint8)
    bits = np.unpackbits(data[start // 8 : (start + size + 7) // 8], bitorder="little")
    plane[:size] = bits[start % 8 : start % 8 + size]
    found = np.zeros(int(counts.sum()), np.uint16)
    for bit, places in enumerate(_places_of_symbols(starts, counts, width)):
        found |= plane[places].astype(np.uint16) << np.uint16(bit)
    escaped = found == (1 << width) - 1
    number = segment_sums(escaped, counts)
    wrong = np.flatnonzero(counts * width + number * table.escape_bits != sizes)
    if len(wrong):
        s = int(wrong[0])
        needed = int(counts[s]) * width + int(number[s]) * table.escape_bits
        raise fault(
            "R-PLN-003",
            f"a segment ends after {needed} bits of the prefix plane, its index entry has {int(sizes[s])}",
        )
    found += np.repeat(symbols.windows, counts).astype(np.uint16)
    classes = np.zeros(int(number.sum()), np.uint16)
    for bit, places in enumerate(_places_of_escapes(starts + counts * width, number, table.escape_bits)):
        classes |= plane[places].astype(np.uint16) << np.uint16(bit)
    if (classes >= table.classes).any():
        words = f"an escaped level has class {classes.max()}, the stream has {table.classes} classes"
        raise fault("R-PLN-005", words)
    found[escaped] = classes
    return found


def encode_windows(
    classes: Classes, counts: Counts, windows: Counts, table: CodeTable
) -> tuple[Bytes, Counts]:
    """Encodes the prefix plane of whole segments; the inverse of `decode_windows`.

    Args:
        classes: the class of each level.
        counts: number of levels in each segment.
        windows: number of each segment's window.
        table: the stream's code table, with windows.

    Returns:
        The plane, and the bits of each segment.
    """
    assert table.window is not None
    width, last = table.window, (1 << table.window) - 1
    symbols = classes.astype(np.int64) - np.repeat(windows, counts)
    escaped = (symbols < 0) | (symbols >= last)
    symbols[escaped] = last
    number = segment_sums(escaped, counts)
    sizes = counts * width + number * table.escape_bits
    starts = np.cumsum(sizes) - sizes
    plane = np.zeros(int(sizes.sum()), np.uint8)
    for bit, places in enumerate(_places_of_symbols(starts, counts, width)):
        plane[places] = symbols >> bit & 1
    escapes = classes[escaped]
    for bit, places in enumerate(_places_of_escapes(starts + counts * width, number, table.escape_bits)):
        plane[places] = escapes >> bit & 1
    return np.packbits(plane, bitorder="little"), sizes


def _places_of_symbols(starts: Counts, counts: Counts, width: int) -> list[Counts]:
    """Returns for each bit of a symbol its offset for all levels."""
    inside = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return [np.repeat(starts + bit * counts, counts) + inside for bit in range(width)]


def _places_of_escapes(starts: Counts, number: Counts, width: int) -> list[Counts]:
    """Returns for each bit of an escaped class its offset for all escaped levels."""
    inside = np.arange(int(number.sum())) - np.repeat(np.cumsum(number) - number, number)
    first = np.repeat(starts, number) + inside * width
    return [first + bit for bit in range(width)]


def levels_outside(rows: NDArray[np.integer], width: int) -> NDArray[np.int32]:
    """Returns how many levels of each segment are outside each window, shape [segments, windows].

    Args:
        rows: counts of the classes in each segment, shape [segments, classes].
        width: bits of a symbol.
    """
    size = (1 << width) - 1
    before = np.zeros((len(rows), rows.shape[1] + 1), np.int32)
    np.cumsum(rows, axis=1, out=before[:, 1:])
    return before[:, -1:] - before[:, size:] + before[:, :-size]


def best_windows(rows: NDArray[np.integer], width: int) -> tuple[NDArray[np.uint8], Counts]:
    """Returns the window that contains most levels of each segment, and its levels outside (R-CAN-010).

    Arguments: those of `levels_outside`.
    """
    outside = levels_outside(rows, width)
    windows = outside.argmin(axis=1)
    return windows.astype(np.uint8), outside[np.arange(len(rows)), windows].astype(np.int64)
