"""Parses and checks the header and the segment index of a chunk (SPEC.md 15.1, 15.2).

Fast path of `container.chunk.read_index`: returns False on any problem. The caller then falls back to the
reference, which raises the fault.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...container.chunk import MAX_INDEX_WIDTH, PART_ALIGNMENT, TAIL_BYTES
from ...container.entry import CHUNK_ALIGNMENT
from ..translation import COUNT_POSITIONS, COUNT_PRUNED, COUNT_SURVIVORS, STREAMS
from .compiling import Int, kernel
from .unaligned import load32, load64

# Columns of `shapes` that determine a segment index; each row of `shapes` describes a stream.
#   PRESENT_OF      whether the tensor has the stream
#   COUNT_RULE_OF   the rule for the number of levels of a segment: one of the COUNT_ constants
#   CODES_OF        number of codes or windows, 0 for one class
#   TRIMMED_OF      whether the index has trims
#   CONSTANT_OF     residual bits of all used classes, or -1 if they differ
#   LEAST_OF        the smallest number of residual bits of a used class
PRESENT_OF, COUNT_RULE_OF, CODES_OF, TRIMMED_OF, CONSTANT_OF, LEAST_OF = range(6)

# Rows of the matrix that `read_index` fills: survivors, then for each stream the rows named here.
ROW_SURVIVORS = 0
ROWS_A_STREAM = 7
COUNTS, CODES, TRIMS, PREFIX_START, PREFIX_BITS, RESIDUAL_START, RESIDUAL_BITS = range(ROWS_A_STREAM)
ROWS = 1 + ROWS_A_STREAM * len(STREAMS)


@kernel
def row_of(stream: Int, quantity: Int) -> Int:
    """Returns the row of a stream's quantity."""
    return 1 + ROWS_A_STREAM * stream + quantity


@kernel
def _aligned(x: Int, k: Int) -> Int:
    return (x + k - 1) // k * k


@kernel
def _zero_bytes(data: Bytes, start: Int, stop: Int) -> bool:
    """Returns whether the bytes from ``start`` to ``stop`` - 1 are zero."""
    seen: Int = np.uint8(0)
    for i in range(start, stop):
        seen |= data[i]
    return seen == 0


@kernel
def _zero_bits(data: Bytes, start: Int, stop: Int) -> bool:
    """Returns whether the bits from bit ``start`` to the end of byte ``stop`` - 1 are zero."""
    first = start >> 3
    if start & 7:
        if first < stop and data[first] >> (start & 7):
            return False
        first += 1
    return _zero_bytes(data, first, stop)


@kernel
def _read_quantity(data: Bytes, number: Int, pos: Int, values: NDArray[np.int64]) -> Int:
    """Parses a quantity whose fields begin at byte ``pos``. Returns the end of its part, or -1 on a fault."""
    at = 8 * number
    minimum, width = np.int64(load32(data, at)), np.int64(data[at + 4])
    if data[at + 5] or data[at + 6] or data[at + 7] or width > MAX_INDEX_WIDTH:
        return -1
    n = values.size
    size = (n * width + 7) // 8
    if pos + size + TAIL_BYTES > data.size:
        return -1
    # Every load is in bounds: at least TAIL_BYTES follow the fields.
    mask = np.uint64((1 << width) - 1)
    for i in range(n):
        bit = pos * 8 + i * width
        values[i] = np.int64((load64(data, bit >> 3) >> np.uint64(bit & 7)) & mask) + minimum
    end = _aligned(pos + size, PART_ALIGNMENT)
    if not _zero_bits(data, pos * 8 + n * width, end):
        return -1
    return end


@kernel
def _fill_counts(
    rule: Int, positions: NDArray[np.int64], survivors: NDArray[np.int64], counts: NDArray[np.int64]
) -> None:
    for s in range(counts.size):
        if rule == COUNT_POSITIONS:
            counts[s] = positions[s]
        elif rule == COUNT_SURVIVORS:
            counts[s] = survivors[s]
        elif rule == COUNT_PRUNED:
            counts[s] = positions[s] - survivors[s]
        else:
            counts[s] = (positions[s] + 7) // 8


@kernel
def read_index(
    data: Bytes, shapes: NDArray[np.int64], positions: NDArray[np.int64], index: NDArray[np.int64]
) -> bool:
    """Parses the header and index of a chunk. False if anything breaks SPEC.md.

    Args:
        data: uint8, the whole chunk, at least 64 bytes.
        shapes: int64 [3, 6 or more].
        positions: int64 [n], number of positions of each segment.
        index: int64 [ROWS, n], filled.
    """
    n = positions.size
    masked = shapes[0, PRESENT_OF] != 0
    quantities = 1 if masked else 0
    for stream in range(3):
        if shapes[stream, PRESENT_OF]:
            codes, trimmed, constant = (
                shapes[stream, CODES_OF],
                shapes[stream, TRIMMED_OF],
                shapes[stream, CONSTANT_OF],
            )
            quantities += (codes > 1) + (trimmed != 0) + (codes > 0) + (constant < 0)
    pos = _aligned(8 * quantities, PART_ALIGNMENT)
    if pos + TAIL_BYTES > data.size or not _zero_bytes(data, 8 * quantities, pos):
        return False
    survivors = index[ROW_SURVIVORS]
    number = 0
    if masked:
        pos = _read_quantity(data, 0, pos, survivors)
        if pos < 0:
            return False
        number = 1
        for s in range(n):
            if survivors[s] > positions[s]:
                return False
    else:
        for s in range(n):
            survivors[s] = positions[s]
    for stream in range(3):
        base = row_of(stream, 0)
        index[base : base + ROWS_A_STREAM] = 0
        if not shapes[stream, PRESENT_OF]:
            continue
        _fill_counts(shapes[stream, COUNT_RULE_OF], positions, survivors, index[base + COUNTS])
        codes, trimmed, constant = (
            shapes[stream, CODES_OF],
            shapes[stream, TRIMMED_OF],
            shapes[stream, CONSTANT_OF],
        )
        for quantity, is_there in (
            (CODES, codes > 1),
            (TRIMS, trimmed != 0),
            (PREFIX_BITS, codes > 0),
            (RESIDUAL_BITS, constant < 0),
        ):
            if is_there:
                pos = _read_quantity(data, number, pos, index[base + quantity])
                if pos < 0:
                    return False
                number += 1
        for s in range(n):
            if index[base + CODES, s] >= max(codes, 1) or index[base + TRIMS, s] >= max(
                shapes[stream, LEAST_OF], 1
            ):
                return False
            if constant >= 0:
                width = constant - index[base + TRIMS, s]
                index[base + RESIDUAL_BITS, s] = index[base + COUNTS, s] * width
    for stream in range(3):
        if not shapes[stream, PRESENT_OF]:
            continue
        base = row_of(stream, 0)
        for start, bits in ((PREFIX_START, PREFIX_BITS), (RESIDUAL_START, RESIDUAL_BITS)):
            at = pos * 8
            for s in range(n):
                index[base + start, s] = at
                at += index[base + bits, s]  # below 2^56: 2^19 segments of less than 2^34 bits
            pos = _aligned((at + 7) // 8, PART_ALIGNMENT)
            if pos + TAIL_BYTES > data.size or not _zero_bits(data, at, pos):
                return False
    return _aligned(pos + TAIL_BYTES, CHUNK_ALIGNMENT) == data.size and _zero_bytes(data, pos, data.size)
