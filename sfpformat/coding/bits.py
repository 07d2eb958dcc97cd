"""Reads and writes bit sequences, LSB-first (SPEC.md R-CNV-002, R-CNV-003), with numpy on whole arrays.

Rules: only this module reads bits, and it checks all offsets against the buffer, so that no caller slices a
buffer by a number from a file. Fields have at most 56 bits, so that one unaligned 8-byte load contains any
field at any bit offset (7 + 56 < 64). This is the reason for the bound of 56 in SPEC.md R-TAB-002.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import fault

Bytes = NDArray[np.uint8]

MAX_FIELD_BITS = 56
# A load of 8 bytes may start at the last byte of a sequence, so 7 readable bytes must follow it. At least 16
# bytes follow a plane (SPEC.md 15.1).
SLACK_BYTES = 7
# For fewer bits than this, packing bit by bit is faster.
_FEW_BITS = 1 << 13


def as_bytes(data: bytes | bytearray | memoryview | Bytes) -> Bytes:
    """Returns the bytes as a one-dimensional uint8 array, without a copy."""
    return np.frombuffer(data, np.uint8)


def _words_at_every_byte(data: Bytes) -> NDArray[np.uint64]:
    """Returns a view of ``data`` whose element i is the little-endian 8-byte word that starts at byte i."""
    count = max(len(data) - SLACK_BYTES, 0)
    return np.ndarray((count,), dtype="<u8", buffer=data, strides=(1,))


def require_bits(data: Bytes, start: int, bits: int) -> None:
    """Raises R-IDX-003 unless ``bits`` bits from bit ``start`` are in ``data``, with `SLACK_BYTES` after."""
    if bits and (start < 0 or bits < 0 or (start + bits + 7) // 8 + SLACK_BYTES > len(data)):
        raise fault("R-IDX-003", "the bits of a plane do not fit into their chunk")


def read_fields(data: Bytes, start: int, width: int, count: int) -> NDArray[np.uint64]:
    """Reads ``count`` unsigned fields of ``width`` bits each, from bit ``start``: uint64 [count].

    Eight fields take ``width`` bytes, so that field j of every group of eight has the same bit offset. This
    allows eight strided passes instead of a gather.

    Raises:
        InvalidFileError: by R-IDX-003.
    """
    require_bits(data, start, width * count)
    out = np.zeros(count, np.uint64)
    if width == 0 or count == 0:
        return out
    if width == 8 and start % 8 == 0:
        out[:] = data[start // 8 : start // 8 + count]
        return out
    words = _words_at_every_byte(data)
    mask = np.uint64((1 << width) - 1)
    for j in range(min(8, count)):
        bit = start + j * width
        part = out[j::8]
        loaded = words[bit >> 3 :: width][: len(part)]
        np.right_shift(loaded, np.uint64(bit & 7), out=part)
        part &= mask
    return out


def read_bits(
    data: Bytes, start: int, widths: NDArray[np.integer]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Reads consecutive unsigned fields of the given widths in bits, from bit ``start``.

    Returns:
        The fields, uint64 [n], and the end of each in bits, relative to ``start``, int64 [n].

    Raises:
        InvalidFileError: by R-IDX-003.
    """
    ends = np.cumsum(widths, dtype=np.int64)
    require_bits(data, start, int(ends[-1]) if len(ends) else 0)
    at = ends - widths + start
    fields = _words_at_every_byte(data)[at >> 3] >> (at & 7).astype(np.uint64)
    fields &= (np.uint64(1) << widths.astype(np.uint64)) - np.uint64(1)
    return fields, ends


def write_fields(values: NDArray[np.unsignedinteger], width: int) -> Bytes:
    """Packs values below 2^width into ``ceil(count * width / 8)`` bytes; the inverse of `read_fields`."""
    count = len(values)
    if width == 0 or count == 0:
        return np.zeros(0, np.uint8)
    if width == 8:
        return values.astype(np.uint8)
    if count * width < _FEW_BITS:
        bytes_of = np.ascontiguousarray(values, "<u8").view(np.uint8).reshape(count, 8)
        bits = np.unpackbits(bytes_of, axis=1, count=width, bitorder="little")
        return np.packbits(bits.reshape(-1), bitorder="little")
    groups = -(-count // 8)
    padded = np.zeros((groups, 8), np.uint64)
    padded.reshape(-1)[:count] = values
    out = np.zeros((groups, width), np.uint8)
    for byte in range(width):
        for j in range(byte * 8 // width, min(7, (byte * 8 + 7) // width) + 1):
            shift = byte * 8 - j * width
            field = padded[:, j]
            moved = field >> np.uint64(shift) if shift >= 0 else field << np.uint64(-shift)
            out[:, byte] |= moved.astype(np.uint8)  # the low eight bits
    return out.reshape(-1)[: (count * width + 7) // 8]


def write_bits(values: NDArray[np.uint64], widths: NDArray[np.integer]) -> tuple[Bytes, NDArray[np.int64]]:
    """Packs each value into a field of its own width; the inverse of `read_bits`.

    Returns:
        The bytes, and the end of each field in bits.
    """
    ends = np.cumsum(widths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    words = np.zeros(total // 64 + 2, "<u8")
    used = np.flatnonzero(widths)
    if len(used):
        values, at = values[used], (ends - widths)[used]
        word, bit = at >> 6, (at & 63).astype(np.uint64)
        # Fields are sorted by their word, so that one reduction joins the fields of each word.
        starts = np.flatnonzero(np.r_[True, word[1:] != word[:-1]])
        words[word[starts]] = np.bitwise_or.reduceat(values << bit, starts)
        # The bits that belong to the next word. Two shifts, because a shift by 64 is undefined.
        over = (values >> np.uint64(1)) >> (np.uint64(63) - bit)
        spill = np.flatnonzero(over)
        words[word[spill] + 1] |= over[spill]  # indices are unique: at most one field crosses a word's end
    return words.view(np.uint8)[: (total + 7) // 8], ends


def segment_sums(
    values: NDArray[np.integer] | NDArray[np.bool_], counts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Returns the sum of the values of each segment. Segments may be empty."""
    before = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
    ends = np.cumsum(counts)
    return np.asarray(before[ends] - before[ends - counts], np.int64)
