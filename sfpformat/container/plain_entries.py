"""Fast path for the entries of plain tensors: raw, or lossless in the tensor's own dtype without a mask.

The directory of a dense model has hundreds of them. This module checks the requirements of SPEC.md chapters
7, 8 and 11 in a few passes over all entries, which takes a quarter of the time of creating a `TensorEntry`
for each. `plain_tensors` returns their contents, or None on any problem or unusual entry; the caller then
uses `TensorEntry.from_map`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import MAX_FIELD_BITS
from ..coding.codetable import (
    MAX_CLASSES,
    MAX_CODE_BITS,
    MAX_CODES,
    MAX_SYMBOLS,
    MAX_WINDOW_BITS,
    MAX_WINDOWED_CLASSES,
)
from ..dtypes import DTYPES, Dtype
from ..limits import Limits
from .entry import CHUNK_ALIGNMENT, CHUNK_RECORD, MAX_CHUNK_POSITIONS, MAX_POSITIONS, MAX_SEGMENT
from .fields import Fields

Numbers = NDArray[np.int64]

# The keys of the maps, in the order of a directory.
_RAW_KEYS = ("chunk", "chunks", "coding", "dtype", "name", "segment", "shape")
_EXACT_KEYS = ("chunk", "chunks", "coding", "dtype", "fingerprints", "name", "segment", "shape")
_STREAM_KEYS = ("base", "codes", "dtype", "extra", "group", "quantiser", "trim")
_STREAM_KEYS_WITH_WINDOW = (*_STREAM_KEYS, "window")
_EXTRAS = bytes(range(MAX_FIELD_BITS + 1))


class PlainTable(NamedTuple):
    """The code table of a lossless tensor with group 1.

    Attributes:
        base: first level of class 0.
        extra: residual bits of each class.
        codes: number of codes; 0 with windows.
        lengths: code lengths of all codes, concatenated, one byte per class.
        trim: whether segments have trims.
        window: bits of a symbol in a window; None: the stream has prefix codes.
    """

    base: int
    extra: bytes
    codes: int
    lengths: bytes
    trim: bool
    window: int | None


class Outline(NamedTuple):
    """Dtype, shape, decoded bytes and stored bytes of a tensor, to check limits and allocate memory."""

    dtype: Dtype
    shape: tuple[int, ...]
    decoded_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class PlainTensors:
    """Plain tensors in columns.

    Attributes:
        names, dtypes, shapes: lists with an item for each tensor.
        positions, segment, chunk: int64 [n], for each tensor the number that `TensorEntry` has.
        tables: the code table of each tensor; None for raw tensors.
        first_chunk: int64 [n + 1], index of each tensor's first chunk among all chunks.
        lengths, checksums: int64 [m], of all chunks.
    """

    names: list[str]
    dtypes: list[Dtype]
    shapes: list[tuple[int, ...]]
    positions: Numbers
    segment: Numbers
    chunk: Numbers
    tables: list[PlainTable | None]
    first_chunk: Numbers
    lengths: Numbers
    checksums: Numbers

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def outline(self, name: str) -> Outline | None:
        """Returns the outline of a tensor, or None if it is not one of the plain tensors."""
        i = self._numbers.get(name)
        if i is None:
            return None
        size = int(self.positions[i]) * self.dtypes[i].itemsize
        return Outline(self.dtypes[i], self.shapes[i], size, int(self.stored_bytes[i]))

    @cached_property
    def itemsize(self) -> Numbers:
        """Bytes per element of each tensor."""
        return np.asarray(np.array([dtype.bits for dtype in self.dtypes], np.int64) // 8)

    @cached_property
    def stored_bytes(self) -> Numbers:
        """Bytes of the chunks of each tensor."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])[self.first_chunk]
        return np.asarray(np.diff(ends))


def looks_plain(entry: Fields) -> bool:
    """Returns whether an entry has the keys, coding and quantiser of a plain tensor."""
    keys = tuple(entry)
    if keys == _RAW_KEYS:
        return entry["coding"] == "raw"
    stream = entry.get("fingerprints")
    return (
        keys == _EXACT_KEYS
        and entry["coding"] == "fingerprint"
        and type(stream) is dict
        and tuple(stream) in (_STREAM_KEYS, _STREAM_KEYS_WITH_WINDOW)
        and stream["quantiser"] == "exact"
        and stream["dtype"] == entry["dtype"]
        and stream["group"] == 1
    )


def plain_tensors(entries: Sequence[Fields], limits: Limits) -> PlainTensors | None:
    """Returns the contents of entries that look plain. None unless all of them are valid.

    Args:
        entries: maps of a directory whose encoding was checked: values are unsigned integers of at most 64
            bits, str, bytes, list or dict.
        limits: the limits of the reader.
    """
    names, dtypes = _names(entries, limits), _dtypes(entries)
    sizes = _shapes(entries, limits)
    if names is None or dtypes is None or sizes is None:
        return None
    shapes, positions = sizes
    cut = _segment_and_chunk(entries)
    if cut is None:
        return None
    segment, chunk = cut
    segments = (positions + segment - 1) // segment
    records = _records(entries, (segments + chunk - 1) // chunk)
    tables = _tables(entries, dtypes)
    if records is None or tables is None:
        return None
    first_chunk, lengths, checksums = records
    return PlainTensors(
        names, dtypes, shapes, positions, segment, chunk, tables, first_chunk, lengths, checksums
    )


def _names(entries: Sequence[Fields], limits: Limits) -> list[str] | None:
    names = [name for entry in entries if type(name := entry["name"]) is str]
    fit = len(names) == len(entries) and all(names)
    return names if fit and max(map(len, map(str.encode, names)), default=0) <= limits.name_bytes else None


def _dtypes(entries: Sequence[Fields]) -> list[Dtype] | None:
    dtypes = [DTYPES[name] for entry in entries if type(name := entry["dtype"]) is str and name in DTYPES]
    return dtypes if len(dtypes) == len(entries) else None


def _shapes(entries: Sequence[Fields], limits: Limits) -> tuple[list[tuple[int, ...]], Numbers] | None:
    """Returns the shapes, and the number of positions of each."""
    lists = [shape for entry in entries if type(shape := entry["shape"]) is list]
    if len(lists) != len(entries) or max(map(len, lists), default=0) > limits.rank:
        return None
    if not set(map(type, chain.from_iterable(lists))) <= {int}:
        return None
    shapes = list(map(tuple, lists))
    positions = list(map(math.prod, shapes))
    if max(positions, default=0) > MAX_POSITIONS:
        return None
    # The bound is on the product without zeros (R-TEN-005).
    for shape, product in zip(shapes, positions, strict=True):
        if not product and math.prod([size for size in shape if size]) > MAX_POSITIONS:
            return None
    return shapes, np.array(positions, np.int64)


def _segment_and_chunk(entries: Sequence[Fields]) -> tuple[Numbers, Numbers] | None:
    """Returns S and C, the sizes of segments and chunks."""
    found = []
    for key in ("segment", "chunk"):
        numbers = [n for entry in entries if type(n := entry[key]) is int and 1 <= n <= MAX_CHUNK_POSITIONS]
        if len(numbers) != len(entries):
            return None
        found.append(np.array(numbers, np.int64))
    segment, chunk = found
    fits = (segment % 32 == 0) & (segment <= MAX_SEGMENT) & (segment * chunk <= MAX_CHUNK_POSITIONS)
    return (segment, chunk) if fits.all() else None


def _records(entries: Sequence[Fields], expected: Numbers) -> tuple[Numbers, Numbers, Numbers] | None:
    """Returns the index of each tensor's first record, and the lengths and checksums of all chunks."""
    parts = [part for entry in entries if type(part := entry["chunks"]) is bytes]
    if len(parts) != len(entries):
        return None
    sizes = np.array([len(part) for part in parts], np.int64)
    if not np.array_equal(sizes, 8 * expected):
        return None
    records = np.frombuffer(b"".join(parts), CHUNK_RECORD)
    lengths = records["length"].astype(np.int64)
    if (lengths % CHUNK_ALIGNMENT).any() or not lengths.all():
        return None
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(expected)])
    return first, lengths, records["crc"].astype(np.int64)


def _tables(entries: Sequence[Fields], dtypes: Sequence[Dtype]) -> list[PlainTable | None] | None:
    """Returns the code tables; None for raw tensors."""
    tables: list[PlainTable | None] = [None] * len(entries)
    packed: list[bytes] = []  # the lengths of all codes, two per byte
    for i, (entry, dtype) in enumerate(zip(entries, dtypes, strict=True)):
        if "fingerprints" not in entry:
            continue
        stream = entry["fingerprints"]
        assert isinstance(stream, dict)  # `looks_plain`
        base, extra, codes, trim = stream["base"], stream["extra"], stream["codes"], stream["trim"]
        if not (dtype.is_float and type(base) is int and type(extra) is bytes and type(codes) is list):
            return None
        classes = len(extra)
        if trim not in (0, 1) or type(trim) is not int or not 1 <= classes <= MAX_CLASSES[1]:
            return None
        window = stream.get("window")
        if not (len(codes) == 0 if classes == 1 or window is not None else 1 <= len(codes) <= MAX_CODES):
            return None
        if window is not None and not (
            type(window) is int
            and 1 <= window <= MAX_WINDOW_BITS
            and max((1 << window) - 1, 2) <= classes <= MAX_WINDOWED_CLASSES
        ):
            return None
        same = not extra.strip(extra[:1])
        levels = classes << extra[0] if same else sum([1 << bits for bits in extra])
        if extra.translate(None, _EXTRAS) or base + levels > 1 << dtype.bits:
            return None
        for code in codes:
            if type(code) is not bytes or len(code) != (classes + 1) // 2:
                return None
        packed += codes
        tables[i] = PlainTable(base, extra, len(codes), b"", bool(trim), window)
    return _with_lengths(tables, packed)


def _with_lengths(tables: list[PlainTable | None], packed: list[bytes]) -> list[PlainTable | None] | None:
    """Unpacks and checks the code lengths (R-TAB-005 to -007, -010), and returns the tables with them."""
    if not packed:
        return tables
    pairs = np.frombuffer(b"".join(packed), np.uint8)
    lengths = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)
    sizes = np.array([len(code) for code in packed], np.int64) * 2
    starts = np.cumsum(sizes) - sizes
    classes = [len(table.extra) for table in tables if table is not None for _ in range(table.codes)]
    # A code for an odd number of classes has four padding bits, which must be zero.
    odd = np.array(classes, np.int64) != sizes
    if lengths[(starts + sizes - 1)[odd]].any() or lengths.max() > MAX_CODE_BITS:
        return None
    shares = np.left_shift(1, MAX_CODE_BITS - lengths.astype(np.int64)) * (lengths != 0)
    used = np.add.reduceat((lengths != 0).astype(np.int64), starts)
    if used.min() < 2 or used.max() > MAX_SYMBOLS:
        return None
    if not (np.add.reduceat(shares, starts) == 1 << MAX_CODE_BITS).all():
        return None
    raw, at, out = lengths.tobytes(), iter(starts.tolist()), list[PlainTable | None]()
    for table in tables:
        if table is not None:
            classes_of_table = len(table.extra)
            own = b"".join([raw[start : start + classes_of_table] for start in islice(at, table.codes)])
            table = table._replace(lengths=own)
        out.append(table)
    return out
