"""Prefix and residual planes (SPEC.md chapter 9): converts levels to bits and back, for segments of a chunk.

Theory of operation: segments are consecutive bit sequences without padding, so that a run of segments can be
decoded as one sequence and then be checked against the segment index. bitarray decodes the prefix plane to
symbol ranks; numpy does everything else, on whole arrays. This module is the reference implementation; the
other engines must return the same levels and the same faults.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from bitarray import bitarray
from bitarray.util import canonical_decode
from numpy.typing import NDArray

from ..errors import fault
from .bits import Bytes, read_bits, read_fields, segment_sums, write_bits, write_fields
from .codetable import CodeTable, PrefixCode
from .windows import Symbols, decode_windows, encode_windows

Levels = NDArray[np.uint64]
AnyLevels = NDArray[np.unsignedinteger]  # levels in an encoder: any sufficient width
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class StreamSpan:
    """The location of the levels of a run of consecutive segments in the bytes of a chunk.

    Attributes:
        counts: number of levels in each segment.
        codes: number of each segment's code or window.
        trims: number of residual bits that each segment omits.
        prefix_bits, residual_bits: bits of each segment in the two planes.
        prefix_start, residual_start: bit offsets of the run in the chunk.
    """

    counts: Counts
    codes: Counts
    trims: Counts
    prefix_start: int
    prefix_bits: Counts
    residual_start: int
    residual_bits: Counts


@dataclass(frozen=True)
class Planes:
    """The planes of a stream for some segments, and the segments' entries in the segment index."""

    codes: Counts
    trims: Counts
    prefix: Bytes
    prefix_bits: Counts
    residual: Bytes
    residual_bits: Counts


def symbol_counts(counts: Counts, group: int) -> Counts:
    """Returns the number of symbols in each segment. Every segment starts a new symbol (R-PLN-002)."""
    return -(-counts // group)


# ---------------------------------------------------------------------------------------------- decoding


def decode_levels(data: Bytes, span: StreamSpan, table: CodeTable) -> Levels:
    """Decodes the levels of a run of segments.

    Args:
        data: the bytes of the chunk; the caller has checked that the planes are inside.
        span: the location of the run.
        table: the stream's code table.

    Raises:
        InvalidFileError: E_LAYOUT by R-PLN-003, E_RESERVED by R-PLN-002, E_RANGE by R-PLN-005.
    """
    if table.classes == 1:
        residuals = _decode_residuals(data, span, table, None)
        return residuals + np.uint64(table.base) if table.base else residuals
    if table.window is None:
        classes = _classes_of_symbols(_decode_prefix_plane(data, span, table), span.counts, table)
    else:
        bits = Symbols(span.counts, span.codes, span.prefix_start, span.prefix_bits)
        classes = decode_windows(data, bits, table)
    levels = _decode_residuals(data, span, table, classes)
    levels += table.first[classes]
    return levels


def _decode_residuals(
    data: Bytes, span: StreamSpan, table: CodeTable, classes: NDArray[np.uint16] | None
) -> Levels:
    """Decodes the residuals of the run and restores trimmed bits. ``classes`` is None for a single class."""
    constant, trimmed = table.constant_extra, bool(span.trims.any())
    if constant is not None and not trimmed:
        return read_fields(data, span.residual_start, constant, int(span.counts.sum()))
    trims = np.repeat(span.trims, span.counts)
    extra = constant if constant is not None else table.class_extra[classes].astype(np.int64)
    residuals, ends = read_bits(data, span.residual_start, extra - trims)
    _require_ends(ends, span.counts, span.residual_bits, "residual")
    return with_trimmed_bits(residuals, trims) if trimmed else residuals


def with_trimmed_bits(residuals: Levels, trims: Counts) -> Levels:
    """Inserts ``trims`` zero bits above the lowest bit of each residual (SPEC.md chapter 9)."""
    one = np.uint64(1)
    return (residuals & one) | (residuals >> one) << (trims.astype(np.uint64) + one)


def without_trimmed_bits(residuals: Levels, trims: Counts) -> Levels:
    """Removes ``trims`` bits above the lowest bit of each residual; the inverse of `with_trimmed_bits`."""
    one = np.uint64(1)
    return (residuals & one) | (residuals >> (trims.astype(np.uint64) + one)) << one


def greatest_trims(levels: AnyLevels, counts: Counts, extra: int) -> Counts:
    """Returns the greatest trim of each segment if all classes have ``extra`` residual bits (R-CAN-009)."""
    return trims_of(shared_zeros(levels, counts), extra)


def shared_zeros(levels: AnyLevels, counts: Counts) -> Counts:
    """Returns how many bits directly above the lowest bit are zero in all levels of each segment.

    Considers all bits of the dtype except the lowest. Returns 0 for a segment without levels.
    """
    zeros = np.zeros(len(counts), np.int64)
    some = counts > 0
    if some.any():
        one, top = levels.dtype.type(1), levels.dtype.type(1 << (8 * levels.itemsize - 1))
        starts = (np.cumsum(counts) - counts)[some]
        joined = np.bitwise_or.reduceat(levels, starts) >> one | top  # ``top`` bounds the result
        zeros[some] = np.frexp((joined & (~joined + one)).astype(np.float64))[1] - 1
    return zeros


def trims_of(zeros: Counts, extra: int) -> Counts:
    """Returns `greatest_trims` from the result of `shared_zeros`."""
    return np.minimum(zeros, max(extra - 1, 0))


def _decode_prefix_plane(data: Bytes, span: StreamSpan, table: CodeTable) -> NDArray[np.uint16]:
    """Decodes the symbols of the run.

    Joins the bits of all segments with the same code, to call bitarray once per code, not once per segment.

    Raises:
        InvalidFileError: by R-PLN-003.
    """
    start, bits = span.prefix_start, int(span.prefix_bits.sum())
    plane = bitarray(buffer=data[start // 8 : (start + bits + 7) // 8], endian="little")
    plane = plane[start % 8 : start % 8 + bits]
    symbols = symbol_counts(span.counts, table.group)
    used = np.unique(span.codes)
    if len(used) == 1:
        code = table.codes[int(used[0])]
        return _decode_symbols(plane, code, symbols, span.prefix_bits)
    out = np.empty(int(symbols.sum()), np.uint16)
    ends = np.cumsum(span.prefix_bits)
    for number in used:
        chosen = span.codes == number
        part = bitarray(endian="little")
        for stop, size in zip(ends[chosen].tolist(), span.prefix_bits[chosen].tolist(), strict=True):
            part += plane[stop - size : stop]
        decoded = _decode_symbols(part, table.codes[int(number)], symbols[chosen], span.prefix_bits[chosen])
        out[np.repeat(chosen, symbols)] = decoded
    return out


def _decode_symbols(plane: bitarray, code: PrefixCode, symbols: Counts, bits: Counts) -> NDArray[np.uint16]:
    """Decodes the symbols of segments that share a code. ``plane`` has exactly their bits."""
    try:
        ranks = np.frombuffer(
            bytes(canonical_decode(plane, code.codes_of_length, range(len(code.symbols)))), np.uint8
        )
    except ValueError:
        raise fault("R-PLN-003", "the prefix plane ends inside a codeword") from None
    # A complete code decodes any bits to symbols, so only the number of symbols and the ends need a check.
    if len(ranks) != symbols.sum():
        raise fault(
            "R-PLN-003",
            f"the prefix plane has {len(ranks)} symbols, the segments need {symbols.sum()}",
        )
    _require_ends(np.cumsum(code.symbol_bits[ranks], dtype=np.int64), symbols, bits, "prefix")
    return code.symbols[ranks]


def _require_ends(ends: Counts, counts: Counts, bits: Counts, plane: str) -> None:
    """Checks that each segment has the number of bits in the index (R-PLN-003)."""
    last = np.cumsum(counts)
    found = np.zeros(len(last) + 1, np.int64)
    if len(ends):
        found[1:] = np.where(last > 0, ends[last - 1], 0)
    wrong = np.flatnonzero(np.diff(found) != bits)
    if len(wrong):
        s = int(wrong[0])
        raise fault(
            "R-PLN-003",
            f"a segment ends after {int(found[s + 1] - found[s])} bits of the {plane} plane, "
            f"its index entry has {int(bits[s])}",
        )


def _classes_of_symbols(symbols: NDArray[np.uint16], counts: Counts, table: CodeTable) -> NDArray[np.uint16]:
    """Returns the class of each level. For g = 2, checks and removes the padding of odd segments."""
    if table.group == 1:
        return symbols
    pairs = np.empty((len(symbols), 2), np.uint16)
    pairs[:, 0], pairs[:, 1] = symbols % table.classes, symbols // table.classes
    odd = counts % 2 == 1
    if not odd.any():
        return pairs.reshape(-1)
    last_symbols = np.cumsum(symbol_counts(counts, 2))[odd] - 1
    if pairs[last_symbols, 1].any():
        raise fault("R-PLN-002", "the last symbol of a segment has a second class other than 0")
    keep = np.ones((len(symbols), 2), bool)
    keep[last_symbols, 1] = False
    return pairs[keep]


# ---------------------------------------------------------------------------------------------- encoding


def encode_levels(
    levels: AnyLevels, counts: Counts, codes: Counts, trims: Counts, table: CodeTable
) -> Planes:
    """Encodes the planes of whole segments; the inverse of `decode_levels`.

    Args:
        levels: the levels of all segments, each at least ``table.base`` and below ``table.top``.
        counts: number of levels in each segment.
        codes: number of each segment's code or window.
        trims: number of residual bits to omit in each segment; these bits are all zero.
        table: the stream's code table.
    """
    classes = table.class_of(levels)
    prefix, prefix_bits = _encode_prefix_plane(classes, counts, codes, table)
    residuals = levels - table.first[classes]
    constant = table.constant_extra
    if constant is not None and not trims.any():
        residual, residual_bits = write_fields(residuals, constant), counts * constant
    else:
        omitted = np.repeat(trims, counts)
        widths = table.class_extra[classes].astype(np.int64) - omitted
        residual, ends = write_bits(without_trimmed_bits(residuals, omitted), widths)
        residual_bits = segment_sums(np.diff(ends, prepend=0), counts)
    return Planes(codes, trims, prefix, prefix_bits, residual, residual_bits)


def symbols_of_classes(
    classes: NDArray[np.uint16], counts: Counts, table_classes: int, group: int
) -> NDArray[np.int64]:
    """Returns the symbols for the classes of whole segments (SPEC.md chapter 8)."""
    if group == 1:
        return classes.astype(np.int64)
    symbols = symbol_counts(counts, 2)
    pairs = np.zeros(int(symbols.sum()) * 2, np.int64)
    # Index of each level: its own index plus the padding of the odd segments before it.
    odd_before = np.concatenate(([0], np.cumsum(counts % 2)[:-1])) if len(counts) else counts
    pairs[np.arange(len(classes)) + np.repeat(odd_before, counts)] = classes
    return pairs[0::2] + pairs[1::2] * table_classes


def _encode_prefix_plane(
    classes: NDArray[np.uint16], counts: Counts, codes: Counts, table: CodeTable
) -> tuple[Bytes, Counts]:
    if table.classes == 1:
        return np.zeros(0, np.uint8), np.zeros(len(counts), np.int64)
    if table.window is not None:
        return encode_windows(classes, counts, codes, table)
    symbols = symbols_of_classes(classes, counts, table.classes, table.group)
    # The codeword of each symbol in each code as a number, whose lowest bit is written first.
    words = np.zeros((len(table.codes), table.classes**table.group), np.uint64)
    widths = np.zeros(words.shape, np.uint8)
    for i, code in enumerate(table.codes):
        words[i, code.symbols] = [int(word[::-1], 2) for word in code.codewords]
        widths[i, code.symbols] = code.symbol_bits
    per_segment = symbol_counts(counts, table.group)
    at = np.repeat(codes, per_segment) * words.shape[1] + symbols
    bits = widths.reshape(-1)[at]
    plane, _ = write_bits(words.reshape(-1)[at], bits)
    return plane, segment_sums(bits, per_segment)
