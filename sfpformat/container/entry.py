"""A tensor's entry in the directory (SPEC.md chapter 7) and the geometry that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..coding.codetable import CodeTable
from ..coding.planes import Counts
from ..coding.quantiser import (
    Exact,
    Quantiser,
    Table,
    Uniform,
    fingerprint_bound,
    importance_bound,
    require_finite_step,
)
from ..dtypes import DTYPES, Dtype
from ..errors import fault, placed
from ..limits import Limits
from .fields import optional, required
from .messagepack import Map
from .streams import FingerprintsEntry, ImportanceEntry, MaskEntry, ScaleEntry, word

MAX_POSITIONS = 1 << 48  # R-TEN-005
MAX_SEGMENT = 1 << 16  # R-TEN-006
MAX_CHUNK_POSITIONS = 1 << 24  # R-TEN-007
CHUNK_ALIGNMENT = 64  # R-LAY-002

# u32 length, u32 CRC-32
CHUNK_RECORD = np.dtype([("length", "<u4"), ("crc", "<u4")])

_RECORDS: dict[str, Any] = {
    "fingerprints": FingerprintsEntry,
    "mask": MaskEntry,
    "scale": ScaleEntry,
    "importance": ImportanceEntry,
}
_RAW_FORBIDS = ("mask", "fingerprints", "scale", "importance", "vectors")
_KNOWN_KEYS = frozenset(("name", "dtype", "shape", "coding", "segment", "chunk", "chunks", *_RAW_FORBIDS))


class Vector(NamedTuple):
    """A vector of the vector chunk: its name, number of elements and dtype."""

    name: str
    size: int
    dtype: Dtype


@dataclass(frozen=True)
class TensorEntry:
    """Everything the directory says about one tensor; valid once it exists.

    Attributes:
        name, shape: the tensor's.
        dtype: of the decoded tensor.
        coding: ``raw`` or ``fingerprint``.
        segment: S, positions a segment.
        chunk: C, segments a chunk.
        chunks: a `CHUNK_RECORD` for each chunk.
        vectors: the record of the vector chunk, shape [1], or None.
        mask, fingerprints, scale, importance: the streams' records, or None.
        other: keys that this version does not know; under a record's name those inside its map.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    coding: str
    segment: int
    chunk: int
    chunks: NDArray[np.void]
    vectors: NDArray[np.void] | None = None
    mask: MaskEntry | None = None
    fingerprints: FingerprintsEntry | None = None
    scale: ScaleEntry | None = None
    importance: ImportanceEntry | None = None
    other: dict[str, object] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------- geometry

    @cached_property
    def positions(self) -> int:
        """N, the number of positions."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix (SPEC.md chapter 2)."""
        return self.shape[0] if len(self.shape) >= 2 and self.positions else 1

    @cached_property
    def columns(self) -> int:
        """Columns of the tensor seen as a matrix."""
        return self.positions // self.rows

    @property
    def decoded_bytes(self) -> int:
        """Size of the decoded tensor."""
        return self.positions * self.dtype.itemsize

    @property
    def segments(self) -> int:
        """Number of segments."""
        return -(-self.positions // self.segment)

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of all chunks, the vector chunk included."""
        lengths = int(self.chunks["length"].sum(dtype=np.int64))
        return lengths + (int(self.vectors["length"][0]) if self.vectors is not None else 0)

    def segments_of_chunk(self, k: int) -> tuple[int, int]:
        """First segment of chunk k and the one after its last."""
        return k * self.chunk, min((k + 1) * self.chunk, self.segments)

    def segment_positions(self, first: int, stop: int) -> Counts:
        """Positions of the segments from ``first`` up to ``stop``."""
        counts = np.full(stop - first, self.segment, np.int64)
        if stop == self.segments and stop > first:
            counts[-1] = self.positions - self.segment * (self.segments - 1)
        return counts

    def streams(self) -> dict[str, CodeTable]:
        """The code tables of the streams that the tensor has, in the order of their planes."""
        return dict(self._streams)

    @cached_property
    def _streams(self) -> dict[str, CodeTable]:
        out = {}
        if self.mask is not None:
            out["mask"] = self.mask.table
        if self.fingerprints is not None:
            out["fingerprints"] = self.fingerprints.table
        if self.importance is not None and self.importance.table is not None:
            out["importance"] = self.importance.table
        return out

    @cached_property
    def _trimmed(self) -> frozenset[str]:
        records = {"fingerprints": self.fingerprints, "importance": self.importance}
        return frozenset(
            stream
            for stream, record in records.items()
            if record is not None and isinstance(record.quantiser, Exact) and record.quantiser.trim
        )

    def trimmed_streams(self) -> frozenset[str]:
        """The streams whose segments have trims."""
        return self._trimmed

    def vector_list(self) -> list[Vector]:
        """The vectors of the vector chunk, in their order (SPEC.md 15.3)."""
        out = []
        if self.fingerprints is not None and isinstance(self.fingerprints.quantiser, Table):
            out.append(Vector("fingerprint centroids", self.fingerprints.quantiser.count, DTYPES["F32"]))
        if self.scale is not None:
            counts = {
                "tensor": 1,
                "row": self.rows,
                "column": self.columns,
                "group": -(-self.positions // max(self.scale.size, 1)),
            }
            count = counts[self.scale.per] if self.positions else 0
            out.append(Vector("scale", count, self.scale.dtype))
        if self.importance is not None:
            if isinstance(self.importance.quantiser, Table):
                out.append(Vector("importance centroids", self.importance.quantiser.count, DTYPES["F32"]))
            if self.importance.dtype is not None:
                rows, columns = (self.rows, self.columns) if self.positions else (0, 0)
                out.append(Vector("importance rows", rows, self.importance.dtype))
                out.append(Vector("importance columns", columns, self.importance.dtype))
        return out

    def has_vectors(self) -> bool:
        """Whether there is a vector of at least one element (R-TEN-009)."""
        return any(vector.size for vector in self.vector_list())

    # -------------------------------------------------------------------------------------- writing

    def to_map(self) -> dict[str, object]:
        """The map of the directory."""
        out: dict[str, object] = {
            **self.other,
            "name": self.name,
            "dtype": self.dtype.name,
            "shape": list(self.shape),
            "coding": self.coding,
            "segment": self.segment,
            "chunk": self.chunk,
            "chunks": self.chunks.tobytes(),
        }
        if self.vectors is not None:
            out["vectors"] = self.vectors.tobytes()
        for key in _RECORDS:
            record = getattr(self, key)
            if record is not None:
                unknown: Any = self.other.get(key, {})
                out[key] = {**unknown, **record.to_map()}
        return out

    # -------------------------------------------------------------------------------------- reading

    @classmethod
    def from_map(cls, source: Map, limits: Limits) -> TensorEntry:
        """Reads an entry and checks all that the directory alone can show."""
        name = required(source, "name", str)
        if not name:
            raise fault("R-TEN-002", "a tensor without a name", offset=source.at["name"])
        limits.require("name_bytes", len(name.encode()), source.at["name"])
        dtype = DTYPES.get(required(source, "dtype", str))
        if dtype is None:
            raise fault("R-TEN-003", f"unknown dtype {source['dtype']!r}", offset=source.at["dtype"])
        coding = word(source, "coding", ("raw", "fingerprint"), "R-TEN-004")
        shape, cutting = _shape(source, limits), _cutting(source)
        chunks = _records(source, "chunks")
        vectors = _records(source, "vectors") if "vectors" in source else None
        other = {key: value for key, value in source.items() if key not in _KNOWN_KEYS}
        records: dict[str, Any] = {}
        if coding == "fingerprint":
            records = _streams(source)
            other |= _unknown_inside(records, source)
        entry = cls(name, dtype, shape, coding, *cutting, chunks, vectors, **records, other=other)
        with placed(base=source.offset):
            entry.require_valid(source)
        return entry

    def require_valid(self, source: Map | None = None) -> None:
        """Checks what needs more than one field of the entry."""
        expected = -(-self.segments // self.chunk)
        if len(self.chunks) != expected:
            raise fault("R-TEN-008", f"{len(self.chunks)} chunk records, must be {expected}")
        if self.coding == "raw":
            for key in _RAW_FORBIDS:
                if source is not None and key in source:
                    raise fault("R-TEN-011", f"coding raw with {key!r}")
            return
        self.require_valid_streams()
        if (self.vectors is not None) != self.has_vectors():
            raise fault("R-TEN-009", "a vector chunk without vectors, or vectors without one")

    def require_valid_streams(self) -> None:
        """Checks the streams of a fingerprint tensor against each other and its dtype."""
        if not self.dtype.is_float:
            raise fault("R-TEN-010", f"coding fingerprint with dtype {self.dtype.name}")
        assert self.fingerprints is not None
        quantiser, table = self.fingerprints.quantiser, self.fingerprints.table
        if isinstance(quantiser, Exact):
            if quantiser.dtype != self.dtype and self.dtype.name not in quantiser.dtype.widens_to:
                raise fault("R-QNT-002", f"{quantiser.dtype.name} does not widen to {self.dtype.name}")
            if self.scale is not None:
                raise fault("R-SCL-005", "a scale with the quantiser exact")
        table.require_top(fingerprint_bound(quantiser, self.dtype))
        if isinstance(quantiser, Uniform):
            require_finite_step(quantiser, (table.top - 1) // 2, "R-QNT-006")
        self._require_valid_importance()

    def _require_valid_importance(self) -> None:
        if self.importance is None or self.importance.table is None:
            return
        quantiser: Quantiser | None = self.importance.quantiser
        assert quantiser is not None
        self.importance.table.require_top(importance_bound(quantiser))
        if isinstance(quantiser, Uniform):
            require_finite_step(quantiser, self.importance.table.top - 1, "R-IMP-006")


def _shape(source: Map, limits: Limits) -> tuple[int, ...]:
    sizes = required(source, "shape", list)
    at = source.at["shape"]
    if not all(isinstance(size, int) for size in sizes):
        raise fault("R-DIR-003", "a size in shape is not an integer", offset=at)
    limits.require("rank", len(sizes), at)
    if math.prod(size for size in sizes if size) > MAX_POSITIONS:
        raise fault("R-TEN-005", f"shape {sizes} has more than 2^48 positions", offset=at)
    return tuple(sizes)


def _cutting(source: Map) -> tuple[int, int]:
    """S and C."""
    segment, chunk = required(source, "segment", int), required(source, "chunk", int)
    if segment % 32 or not 32 <= segment <= MAX_SEGMENT:
        raise fault(
            "R-TEN-006",
            f"segments of {segment} positions, must be a multiple of 32 up to {MAX_SEGMENT}",
            offset=source.at["segment"],
        )
    if chunk < 1 or segment * chunk > MAX_CHUNK_POSITIONS:
        raise fault("R-TEN-007", f"chunks of {chunk} segments of {segment}", offset=source.at["chunk"])
    return segment, chunk


def _records(source: Map, key: str) -> NDArray[np.void]:
    """Chunk records: those of `chunks`, or the one of `vectors`."""
    data = required(source, key, bytes)
    at = source.at[key]
    if key == "vectors" and len(data) != CHUNK_RECORD.itemsize:
        raise fault("R-TEN-012", f"vectors of {len(data)} bytes, must be 8", offset=at)
    if len(data) % CHUNK_RECORD.itemsize:
        raise fault("R-TEN-008", f"chunk records of {len(data)} bytes", offset=at)
    records = np.frombuffer(data, CHUNK_RECORD)
    lengths = records["length"]
    # Of multiples of 64 only 0 is less than 64.
    if (lengths & (CHUNK_ALIGNMENT - 1)).any() or not lengths.all():
        raise fault("R-LAY-002", "a chunk's length is not a multiple of 64", offset=at)
    return records


def _streams(source: Map) -> dict[str, Any]:
    """The streams' records, by the attribute that takes them."""
    required(source, "fingerprints", Map)
    maps = {key: optional(source, key, Map) for key in _RECORDS}
    return {key: _RECORDS[key].from_map(fields) for key, fields in maps.items() if fields is not None}


def _unknown_inside(records: dict[str, Any], source: Map) -> dict[str, object]:
    """The keys in the records' maps that this version does not know, by record (R-DIR-005)."""
    out: dict[str, object] = {}
    for key, record in records.items():
        known, fields = record.keys(), required(source, key, Map)
        if fields.keys() - known:
            out[key] = {name: value for name, value in fields.items() if name not in known}
    return out
