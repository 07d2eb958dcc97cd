"""Encodes exact streams from bit patterns: bit-identical to the same functions of `coding.exact_encoding`."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ...coding.codetable import MAX_CODE_BITS, CodeTable
from ...coding.counts import Rows
from ...coding.exact_encoding import Patterns
from ...coding.planes import Counts, Planes
from . import encode, packing, patterns
from .counting import COUNTERS
from .vectors import STEP_BYTES
from .window_packing import pack_windows


def count_exact(values: Patterns, counts: Counts, width: int, first: int, classes: int) -> Rows:
    """Implements `coding.exact_encoding.count_exact`."""
    rows = np.empty((len(counts), classes), np.int32)
    counters = np.empty((COUNTERS, classes), np.int32)
    values = np.ascontiguousarray(values)
    patterns.count_classes(values, values.view(np.uint8), counts, width, first, counters, rows)
    return rows


def exact_zeros(values: Patterns, counts: Counts) -> Counts:
    """Implements `coding.exact_encoding.exact_zeros`."""
    zeros = np.empty(len(counts), np.int64)
    patterns.shared_zeros(np.ascontiguousarray(values), counts, zeros)
    return zeros


def encode_exact(values: Patterns, counts: Counts, codes: Counts, trims: Counts, table: CodeTable) -> Planes:
    """Implements `coding.exact_encoding.encode_exact`."""
    width = table.constant_width
    bits = 8 * values.itemsize
    known = width is not None and table.group == 1 and values.itemsize in (2, 4) and table.classes > 1
    if width is None or not known or not 0 < width < bits or table.base & ((1 << width) - 1):
        return encode.encode_levels(encode.patterns_to_levels(values), counts, codes, trims, table)
    values = np.ascontiguousarray(values)
    if table.window is None:
        prefix, prefix_bits = _prefix_plane(values, counts, codes, table, width)
    else:
        prefix, prefix_bits = pack_windows(values, counts, codes, table)
    plane, sizes = (
        np.empty(-(-len(values) * width // 8) + STEP_BYTES, np.uint8),
        np.empty(len(counts), np.int64),
    )
    used = patterns.pack_residuals(values, values.view(np.uint8), counts, trims, width, plane, sizes)
    return Planes(codes, trims, prefix, prefix_bits, plane[:used], sizes)


def _prefix_plane(
    values: Patterns, counts: Counts, codes: Counts, table: CodeTable, width: int
) -> tuple[NDArray[np.uint8], Counts]:
    words, pairs = _tables(table, 8 * values.itemsize - width)
    plane = np.empty(-(-len(values) * MAX_CODE_BITS // 8) + 8, np.uint8)
    sizes, first = np.empty(len(counts), np.int64), table.base >> width
    used = patterns.pack_prefix(
        values, values.view(np.uint8), counts, codes, first, width, words, pairs, plane, sizes
    )
    return plane[:used].copy(), sizes  # a copy, because the buffer is usually much larger


@lru_cache(maxsize=4)
def _tables(table: CodeTable, class_bits: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Returns the codewords of classes and of pairs of classes (`patterns.pack_prefix`).

    There are no pairs if their table would have more than 2^`patterns.MAX_PAIR_BITS` entries.
    """
    lengths = np.frombuffer(b"".join([code.length for code in table.codes]), np.uint8)
    words = np.zeros((len(table.codes), table.classes), np.uint32)
    packing.fill_words(lengths.reshape(words.shape), words)
    many = 2 * class_bits > patterns.MAX_PAIR_BITS
    pairs = np.empty((len(table.codes), 0 if many else 1 << 2 * class_bits), np.uint32)
    if not many:
        patterns.fill_pairs(words, table.base >> (table.constant_width or 0), class_bits, pairs)
    return words, pairs
