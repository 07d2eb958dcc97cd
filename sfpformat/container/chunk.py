"""Chunks (SPEC.md chapter 15): reads and writes the segment index, vectors and raw elements; places planes.

Reader and writer both use `quantities` for the contents of a segment index, so that they cannot disagree.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import Bytes, as_bytes, read_fields, write_fields
from ..coding.codetable import CodeTable
from ..coding.mask import level_counts
from ..coding.planes import Counts, Planes, StreamSpan
from ..errors import fault
from .entry import CHUNK_ALIGNMENT, TensorEntry

PART_ALIGNMENT = 16
TAIL_BYTES = 16  # readable bytes after the last plane, so that wide loads stay inside the chunk
MAX_INDEX_WIDTH = 32  # R-IDX-001
_QUANTITY = struct.Struct("<IB3s")  # minimum, width, reserved
_ZEROS = np.zeros(CHUNK_ALIGNMENT + PART_ALIGNMENT, np.uint8)
_ZEROS.flags.writeable = False


def align(x: int, k: int) -> int:
    """Returns the least multiple of k that is at least x."""
    return -(-x // k) * k


def chunk_length(end: int) -> int:
    """Returns the length of a chunk whose last part ends at the aligned offset ``end``."""
    return align(end + TAIL_BYTES, CHUNK_ALIGNMENT)


def quantities(entry: TensorEntry) -> list[tuple[str, str]]:
    """Returns the quantities of the segment index, in order, as (stream, what) (SPEC.md 15.2).

    ``what`` is ``codes``, ``trims``, ``prefix`` or ``residual``; the survivors are ("survivors", "").
    """
    out = [("survivors", "")] if entry.mask is not None else []
    for stream, table in entry.streams().items():
        if table.code_count > 1:
            out.append((stream, "codes"))
        if stream in entry.trimmed_streams():
            out.append((stream, "trims"))
        if table.classes > 1:
            out.append((stream, "prefix"))
        if table.constant_extra is None:
            out.append((stream, "residual"))
    return out


def greatest_head(entry: TensorEntry, segments: int) -> int:
    """Returns the greatest possible size of the header and segment index of a chunk, in bytes."""
    each = _QUANTITY.size + MAX_INDEX_WIDTH // 8 * segments + 2 * PART_ALIGNMENT
    return len(quantities(entry)) * each + PART_ALIGNMENT + TAIL_BYTES


@dataclass(frozen=True)
class ChunkIndex:
    """The checked segment index of a chunk, and the offsets of its planes.

    Attributes:
        positions, survivors: number in each segment.
        counts: stream -> number of levels in each segment.
        codes: stream -> number of each segment's code or window.
        trims: stream -> number of residual bits that each segment omits.
        bits: (stream, plane) -> bits of each segment in that plane.
        starts: (stream, plane) -> bit offset of the plane in the chunk.
    """

    positions: Counts
    survivors: Counts
    counts: dict[str, Counts]
    codes: dict[str, Counts]
    trims: dict[str, Counts]
    bits: dict[tuple[str, str], Counts]
    starts: dict[tuple[str, str], int]

    def values(self, stream: str, what: str) -> Counts:
        """Returns the values of a quantity other than the survivors."""
        if what == "codes":
            return self.codes[stream]
        return self.trims[stream] if what == "trims" else self.bits[stream, what]

    def span(self, stream: str, first: int, stop: int) -> StreamSpan:
        """Returns the location of the levels of the segments from ``first`` up to (excluding) ``stop``."""
        prefix, residual = self.bits[stream, "prefix"], self.bits[stream, "residual"]
        return StreamSpan(
            self.counts[stream][first:stop],
            self.codes[stream][first:stop],
            self.trims[stream][first:stop],
            self.starts[stream, "prefix"] + int(prefix[:first].sum()),
            prefix[first:stop],
            self.starts[stream, "residual"] + int(residual[:first].sum()),
            residual[first:stop],
        )


# ---------------------------------------------------------------------------------------------- reading


def read_index(data: Bytes, entry: TensorEntry, k: int) -> ChunkIndex:
    """Reads and checks the segment index and the padding of chunk ``k``.

    Args:
        data: all bytes of the chunk.
        entry: the tensor's entry.
        k: number of the chunk.

    Raises:
        InvalidFileError: by R-CHK-001 to -003, R-IDX-001 to -006, R-PLN-004; offsets relative to the chunk.
    """
    index, ends = parse_head(data, entry, k)
    if chunk_length(ends[-1]) != len(data):
        raise fault("R-CHK-001", f"the chunk has {len(data)} bytes, its parts need {chunk_length(ends[-1])}")
    for (_, plane), start in index.starts.items():
        bits = int(index.bits[_, plane].sum())
        _require_zero(data, start + bits, align((start + bits + 7) // 8, PART_ALIGNMENT), "R-PLN-004")
    _require_zero(data, ends[-1] * 8, len(data), "R-CHK-003")
    return index


def parse_head(data: Bytes, entry: TensorEntry, k: int) -> tuple[ChunkIndex, list[int]]:
    """Reads the index of a chunk from its first bytes. Returns it and the aligned ends of the planes.

    Args:
        data: the first bytes of the chunk; need not include the planes. The chunk's length is in the entry.
        entry: the tensor's entry.
        k: number of the chunk.

    Raises:
        InvalidFileError: by R-CHK-002, -003, R-IDX-001 to -006; offsets relative to the chunk.
    """
    length = int(entry.chunks["length"][k])
    first, stop = entry.segments_of_chunk(k)
    positions = entry.segment_positions(first, stop)
    names = quantities(entry)
    pos = align(_QUANTITY.size * len(names), PART_ALIGNMENT)
    if pos + TAIL_BYTES > length:
        raise fault("R-IDX-003", "the header does not fit into its chunk")
    values: dict[tuple[str, str], Counts] = {}
    for i, name in enumerate(names):
        at = i * _QUANTITY.size
        minimum, width, zero = _QUANTITY.unpack(data[at : at + _QUANTITY.size].tobytes())
        if any(zero):
            raise fault("R-CHK-002", "a reserved byte of the header is not zero", offset=at + 5)
        if width > MAX_INDEX_WIDTH:
            raise fault("R-IDX-001", f"index fields have {width} bits, must have at most 32", offset=at + 4)
        size = (len(positions) * width + 7) // 8
        if pos + size + TAIL_BYTES > min(length, len(data)):
            raise fault("R-IDX-003", "the segment index does not fit into its chunk", offset=at)
        values[name] = read_fields(data, pos * 8, width, len(positions)).astype(np.int64) + minimum
        _require_zero(data, pos * 8 + len(positions) * width, pos + size, "R-IDX-004")
        _require_zero(data, (pos + size) * 8, align(pos + size, PART_ALIGNMENT), "R-CHK-003")
        pos = align(pos + size, PART_ALIGNMENT)
    _require_zero(data, _QUANTITY.size * len(names) * 8, align(_QUANTITY.size * len(names), 16), "R-CHK-003")
    survivors = values.get(("survivors", ""), positions)
    beyond = np.flatnonzero(survivors > positions)
    if len(beyond):
        s = int(beyond[0])
        words = f"a segment has {int(survivors[s])} survivors in {int(positions[s])} positions"
        raise fault("R-IDX-002", words)
    return _locate_planes(entry, positions, survivors, values, pos, length)


def _locate_planes(
    entry: TensorEntry,
    positions: Counts,
    survivors: Counts,
    values: dict[tuple[str, str], Counts],
    pos: int,
    length: int,
) -> tuple[ChunkIndex, list[int]]:
    """Computes the offsets of the planes, from ``pos``. Checks codes and trims, and that the planes fit.

    Raises:
        InvalidFileError: by R-IDX-003, R-IDX-005 or R-IDX-006.
    """
    counts = stream_counts(entry, positions, survivors)
    none = np.zeros(len(positions), np.int64)
    codes = {stream: values.get((stream, "codes"), none) for stream in entry.streams()}
    trims = {stream: values.get((stream, "trims"), none) for stream in entry.streams()}
    bits: dict[tuple[str, str], Counts] = {}
    starts: dict[tuple[str, str], int] = {}
    ends = [pos]
    for stream, table in entry.streams().items():
        if codes[stream].max() >= max(table.code_count, 1):
            raise fault("R-IDX-005", f"a segment uses a code or window of the {stream} that does not exist")
        if trims[stream].max() >= max(table.least_extra, 1):
            raise fault("R-IDX-006", f"a trim of {trims[stream].max()} bits in the {stream} is too large")
        for plane in ("prefix", "residual"):
            name = (stream, plane)
            bits[name] = (
                values[name] if name in values else _implied_bits(table, plane, counts[stream], trims[stream])
            )
            starts[name] = pos * 8
            pos = align(pos + (int(bits[name].sum()) + 7) // 8, PART_ALIGNMENT)
            if pos + TAIL_BYTES > length:
                raise fault("R-IDX-003", f"the {stream} {plane} plane does not fit into its chunk")
            ends.append(pos)
    return ChunkIndex(positions, survivors, counts, codes, trims, bits, starts), ends


def _implied_bits(table: CodeTable, plane: str, counts: Counts, trims: Counts) -> Counts:
    """Returns the bits of each segment in a plane that has no quantity in the index."""
    if plane == "prefix":
        return np.zeros(len(counts), np.int64)
    assert table.constant_extra is not None
    return counts * (table.constant_extra - trims)


def excess_in_index(data: Bytes, entry: TensorEntry, index: ChunkIndex) -> Iterator[tuple[str, str]]:
    """Yields clause and reason for each field of a chunk's header that is not canonical (R-CAN-002, -003)."""
    for i, (stream, what) in enumerate(quantities(entry)):
        at = i * _QUANTITY.size
        minimum, width, _ = _QUANTITY.unpack(data[at : at + _QUANTITY.size].tobytes())
        values = index.survivors if stream == "survivors" else index.values(stream, what)
        name = f"{stream} {what}".strip()
        if minimum != values.min():
            yield (
                "R-CAN-002",
                f"the minimum of {name} is stored as {minimum}, but the least value is {values.min()}",
            )
        elif width != int(values.max() - minimum).bit_length():
            yield "R-CAN-003", f"the width of {name} is {width}, more than needed"


def stream_counts(entry: TensorEntry, positions: Counts, survivors: Counts) -> dict[str, Counts]:
    """Returns stream -> number of levels in each segment."""
    out = {}
    if entry.mask is not None:
        out["mask"] = level_counts(entry.mask.kind, entry.mask.polarity, positions, survivors)
    out["fingerprints"] = survivors
    if entry.importance is not None and entry.importance.table is not None:
        out["importance"] = survivors if entry.importance.over == "survivors" else positions
    return out


def _require_zero(data: Bytes, start_bit: int, stop: int, clause: str) -> None:
    """Raises ``clause`` unless the bits from ``start_bit`` up to byte ``stop`` are zero."""
    first = start_bit // 8
    if start_bit % 8 and first < stop:
        if data[first] >> (start_bit % 8):
            raise fault(clause, "padding bits are not zero", offset=first)
        first += 1
    nonzero = np.flatnonzero(data[first:stop])
    if len(nonzero):
        raise fault(clause, "padding bytes are not zero", offset=first + int(nonzero[0]))


# ---------------------------------------------------------------------------------------------- writing


def build_chunk(entry: TensorEntry, survivors: Counts, planes: dict[str, Planes]) -> list[Bytes]:
    """Returns the bytes of a chunk as a list of consecutive parts. The planes are not copied.

    Args:
        entry: the tensor's entry; only its streams are used.
        survivors: number of survivors in each segment of the chunk.
        planes: stream -> its planes over the segments of the chunk.
    """
    header, fields = b"", []
    for name in quantities(entry):
        quantity = _quantity(survivors, planes, *name)
        minimum = int(quantity.min())
        width = int(quantity.max() - minimum).bit_length()
        header += _QUANTITY.pack(minimum, width, bytes(3))
        fields.append(write_fields((quantity - minimum).astype(np.uint64), width))
    parts, end = [], 0
    for part in (as_bytes(header), *fields, *_data_of(entry, planes)):
        padding = -len(part) % PART_ALIGNMENT
        parts += [part, _ZEROS[:padding]] if padding else [part]
        end += len(part) + padding
    parts.append(_ZEROS[: chunk_length(end) - end])
    return parts


def _data_of(entry: TensorEntry, planes: dict[str, Planes]) -> Iterator[Bytes]:
    """Yields the planes of all streams, in order."""
    for stream in entry.streams():
        yield planes[stream].prefix
        yield planes[stream].residual


def _quantity(survivors: Counts, planes: dict[str, Planes], stream: str, what: str) -> Counts:
    """Returns the values of a quantity of the segment index."""
    if stream == "survivors":
        return survivors
    return {
        "codes": planes[stream].codes,
        "trims": planes[stream].trims,
        "prefix": planes[stream].prefix_bits,
        "residual": planes[stream].residual_bits,
    }[what]


# --------------------------------------------------------------------------------------- vector chunk, raw


def vector_places(entry: TensorEntry) -> tuple[list[int], int]:
    """Returns the offset of each vector in the vector chunk, and the chunk's length (SPEC.md 15.3)."""
    pos, places = 0, []
    for vector in entry.vector_list():
        places.append(pos)
        pos = align(pos + vector.size * vector.dtype.itemsize, PART_ALIGNMENT)
    return places, align(pos, CHUNK_ALIGNMENT)


def read_vectors(data: Bytes, entry: TensorEntry) -> dict[str, NDArray[np.float32]]:
    """Reads a vector chunk. Returns name -> vector, as float32. Checks the layout, not the values.

    Raises:
        InvalidFileError: by R-VEC-001 or R-VEC-002.
    """
    places, length = vector_places(entry)
    if len(data) != length:
        raise fault("R-VEC-001", f"the vector chunk has {len(data)} bytes, must be {length}")
    out, end = {}, 0
    for vector, start in zip(entry.vector_list(), places, strict=True):
        _require_zero(data, end * 8, start, "R-VEC-002")
        end = start + vector.size * vector.dtype.itemsize
        out[vector.name] = data[start:end].view(vector.dtype.numpy).astype(np.float32)
    _require_zero(data, end * 8, length, "R-VEC-002")
    return out


def build_vectors(entry: TensorEntry, vectors: dict[str, NDArray[np.generic]]) -> Bytes:
    """Returns the bytes of a vector chunk. Converts each vector to the dtype of its entry."""
    places, length = vector_places(entry)
    out = np.zeros(length, np.uint8)
    for vector, start in zip(entry.vector_list(), places, strict=True):
        raw = as_bytes(vectors[vector.name].astype(vector.dtype.numpy).tobytes())
        out[start : start + len(raw)] = raw
    return out


def read_raw(data: Bytes, entry: TensorEntry, k: int) -> Bytes:
    """Checks a raw chunk and returns the bytes of its elements.

    Raises:
        InvalidFileError: by R-RAW-002, R-RAW-003 or R-RAW-004.
    """
    first, stop = entry.segments_of_chunk(k)
    size = int(entry.segment_positions(first, stop).sum()) * entry.dtype.itemsize
    if len(data) != align(size, CHUNK_ALIGNMENT):
        needed = align(size, CHUNK_ALIGNMENT)
        raise fault("R-RAW-002", f"the chunk has {len(data)} bytes, must have {needed}")
    _require_zero(data, size * 8, len(data), "R-RAW-003")
    if entry.dtype.name == "BOOL":
        wrong = np.flatnonzero(data[:size] > 1)
        if len(wrong):
            raise fault("R-RAW-004", "a BOOL element is a byte other than 0 and 1", offset=int(wrong[0]))
    return data[:size]


def are_raw_lengths(lengths: NDArray[np.int64], sizes: NDArray[np.int64]) -> bool:
    """Returns whether the lengths of raw chunks fit the sizes of their elements, in bytes (R-RAW-002)."""
    return np.array_equal(lengths, -(-sizes // CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT)


def has_zero_padding(data: Bytes, lengths: NDArray[np.int64], sizes: NDArray[np.int64]) -> bool:
    """Returns whether the padding after the elements of raw chunks is zero (R-RAW-003).

    Args:
        data: the consecutive chunks, at least one byte each.
        lengths, sizes: bytes of each chunk and of its elements, which `are_raw_lengths` accepts.
    """
    ends = np.cumsum(lengths)
    padded = sizes < lengths
    # The beginning and the end of each padding, alternating: every second result belongs to a padding.
    turns = np.stack([(ends - lengths + sizes)[padded], ends[padded]], axis=1).reshape(-1)
    return not np.bitwise_or.reduceat(data, turns[turns < len(data)])[0::2].any()


def build_raw(elements: Bytes) -> Bytes:
    """Returns the bytes of a raw chunk: the elements, padded with zeros."""
    out = np.zeros(align(len(elements), CHUNK_ALIGNMENT), np.uint8)
    out[: len(elements)] = elements
    return out
