"""A tensor's entry in the directory (SPEC.md chapter 7), and its geometry: segments and chunks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..coding.codetable import CodeTable
from ..coding.planes import Counts
from ..coding.quantisers import Exact, NumberQuantiser, Quantiser
from ..dtypes import DTYPES, Dtype
from ..errors import FileFault, fault
from ..limits import Limits
from .fields import Fields, place_of, require_absent, required
from .stream_maps import FingerprintsEntry, ImportanceEntry, MaskEntry, ScaleEntry, word

MAX_POSITIONS = 1 << 48  # R-TEN-005
MAX_SEGMENT = 1 << 16  # R-TEN-006
MAX_CHUNK_POSITIONS = 1 << 24  # R-TEN-007
CHUNK_ALIGNMENT = 64  # R-LAY-002

# u32 length, u32 CRC-32
CHUNK_RECORD = np.dtype([("length", "<u4"), ("crc", "<u4")])
_ALIGNED = bytes(range(0, 256, CHUNK_ALIGNMENT))

_RECORDS: dict[str, Any] = {
    "fingerprints": FingerprintsEntry,
    "mask": MaskEntry,
    "scale": ScaleEntry,
    "importance": ImportanceEntry,
}
_FINGERPRINT_KEYS = ("mask", "fingerprints", "scale", "importance", "vectors")  # absent with coding raw
_KNOWN_KEYS = frozenset(
    ("name", "dtype", "shape", "coding", "segment", "chunk", "chunks", *_FINGERPRINT_KEYS)
)


class Vector(NamedTuple):
    """A vector of the vector chunk: name, number of elements, dtype."""

    name: str
    size: int
    dtype: Dtype


@dataclass(frozen=True)
class TensorEntry:
    """The directory entry of a tensor. `from_map` returns only valid entries.

    Attributes:
        name, shape: name and shape of the tensor.
        dtype: the dtype of the decoded tensor.
        coding: ``raw`` or ``fingerprint``.
        segment: S, positions per segment.
        chunk: C, segments per chunk.
        chunks: a `CHUNK_RECORD` for each chunk.
        vectors: the record of the vector chunk, shape [1], or None.
        mask, fingerprints, scale, importance: the streams' records, or None.
        other: keys that this version does not know, with their values. For unknown keys inside a record's
            map: the name of the record -> a dict of them.
        positions: N, the number of positions.
        segments: the number of segments.
        stored_bytes: size of all chunks, vector chunk included.
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

    positions: int = field(init=False, repr=False, compare=False)
    segments: int = field(init=False, repr=False, compare=False)
    stored_bytes: int = field(init=False, repr=False, compare=False)

    # ------------------------------------------------------------------------------------- geometry

    def __post_init__(self) -> None:
        positions = math.prod(self.shape)
        stored = sum(self.chunks["length"].tolist())
        if self.vectors is not None:
            stored += int(self.vectors["length"][0])
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "segments", -(-positions // self.segment))
        object.__setattr__(self, "stored_bytes", stored)

    @property
    def rows(self) -> int:
        """Number of rows of the tensor as a matrix (SPEC.md chapter 2)."""
        return self.shape[0] if len(self.shape) >= 2 and self.positions else 1

    @property
    def columns(self) -> int:
        """Number of columns of the tensor as a matrix."""
        return self.positions // self.rows

    @property
    def decoded_bytes(self) -> int:
        """Size of the decoded tensor, in bytes."""
        return self.positions * self.dtype.itemsize

    def segments_of_chunk(self, k: int) -> tuple[int, int]:
        """Returns the first segment of chunk k, and the one after its last."""
        return k * self.chunk, min((k + 1) * self.chunk, self.segments)

    def positions_of_chunk(self, k: int) -> tuple[int, int]:
        """Returns the first position of chunk k, and its number of positions."""
        start = k * self.chunk * self.segment
        return start, min(self.chunk * self.segment, self.positions - start)

    def segment_positions(self, first: int, stop: int) -> Counts:
        """Returns the number of positions in each segment from ``first`` up to, not including, ``stop``."""
        counts = np.full(stop - first, self.segment, np.int64)
        if stop == self.segments and stop > first:
            counts[-1] = self.positions - self.segment * (self.segments - 1)
        return counts

    def streams(self) -> dict[str, CodeTable]:
        """Returns stream -> code table, in the order of their planes."""
        out = {}
        if self.mask is not None:
            out["mask"] = self.mask.table
        if self.fingerprints is not None:
            out["fingerprints"] = self.fingerprints.table
        if self.importance is not None and self.importance.table is not None:
            out["importance"] = self.importance.table
        return out

    def exact_streams(self) -> dict[str, Exact]:
        """Returns stream -> quantiser, for the exact streams."""
        records = {"fingerprints": self.fingerprints, "importance": self.importance}
        return {
            stream: record.quantiser
            for stream, record in records.items()
            if record is not None and isinstance(record.quantiser, Exact)
        }

    def trimmed_streams(self) -> list[str]:
        """Returns the streams whose segments have trims."""
        return [stream for stream, quantiser in self.exact_streams().items() if quantiser.trim]

    def vector_list(self) -> list[Vector]:
        """Returns the vectors of the vector chunk, in order (SPEC.md 15.3)."""
        out = []
        if self.fingerprints is not None and self.fingerprints.quantiser.centroids:
            out.append(Vector("fingerprint centroids", self.fingerprints.quantiser.centroids, DTYPES["F32"]))
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
            if self.importance.quantiser is not None and self.importance.quantiser.centroids:
                out.append(Vector("importance centroids", self.importance.quantiser.centroids, DTYPES["F32"]))
            if self.importance.dtype is not None:
                rows, columns = (self.rows, self.columns) if self.positions else (0, 0)
                out.append(Vector("importance rows", rows, self.importance.dtype))
                out.append(Vector("importance columns", columns, self.importance.dtype))
        return out

    def has_vectors(self) -> bool:
        """Returns whether a vector has at least one element, the condition of the key `vectors`."""
        return any(vector.size for vector in self.vector_list())

    # -------------------------------------------------------------------------------------- writing

    def to_map(self) -> dict[str, object]:
        """Returns the entry's map in the directory."""
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
    def from_map(cls, source: Fields, limits: Limits) -> TensorEntry:
        """Reads an entry and makes all checks that need only the directory.

        Raises:
            InvalidFileError, UnsupportedError, LimitError: the entry is damaged or refused.
        """
        name = required(source, "name", str)
        if not name:
            raise fault("R-TEN-002", "the name of a tensor is empty", offset=place_of(source, "name"))
        size = len(name.encode())
        if size > limits.name_bytes:
            limits.require("name_bytes", size, place_of(source, "name"))
        dtype = DTYPES.get(required(source, "dtype", str))
        if dtype is None:
            raise fault("R-TEN-003", f"unknown dtype {source['dtype']!r}", offset=place_of(source, "dtype"))
        coding = word(source, "coding", ("raw", "fingerprint"), "R-TEN-004")
        if coding == "raw":
            require_absent(source, _FINGERPRINT_KEYS, "is not allowed with coding raw")
        shape = _shape(source, limits)
        segment, chunk = _segment_and_chunk(source)
        chunks = _records(source, "chunks")
        vectors = _records(source, "vectors") if "vectors" in source else None
        records = _streams(source) if coding == "fingerprint" else {}
        other = _unknown(records, source)
        entry = cls(name, dtype, shape, coding, segment, chunk, chunks, vectors, **records, other=other)
        try:
            entry.require_valid()
        except FileFault as error:
            error.place(None, place_of(source))
            raise
        return entry

    def require_valid(self) -> None:
        """Checks the fields of the entry against each other.

        Raises:
            InvalidFileError, UnsupportedError: the fields do not fit together.
        """
        expected = -(-self.segments // self.chunk)
        if len(self.chunks) != expected:
            raise fault("R-TEN-008", f"the tensor has {len(self.chunks)} chunk records, must have {expected}")
        if self.coding == "raw":
            return
        self.require_valid_streams()
        if self.vectors is None and self.has_vectors():
            raise fault("R-DIR-002", "the key 'vectors' is missing")
        if self.vectors is not None and not self.has_vectors():
            raise fault("R-DIR-007", "the key 'vectors' is not allowed for a tensor without vectors")

    def require_valid_streams(self) -> None:
        """Checks the streams of a fingerprint tensor against each other and against its dtype."""
        if not self.dtype.is_float:
            raise fault("R-TEN-010", f"coding fingerprint does not support dtype {self.dtype.name}")
        assert self.fingerprints is not None
        quantiser, table = self.fingerprints.quantiser, self.fingerprints.table
        if not quantiser.widens_to(self.dtype):
            raise fault(
                "R-QNT-002", f"values of {quantiser} cannot be converted to {self.dtype.name} without loss"
            )
        if self.scale is not None and not isinstance(quantiser, NumberQuantiser):
            words = f"the key 'scale' is not allowed with the quantiser {quantiser.NAME}"
            raise fault("R-DIR-007", words)
        table.require_top(quantiser.fingerprint_bound(self.dtype))
        _require_finite(quantiser, (table.top - 1) // 2, "R-QNT-006")
        self._require_valid_importance()

    def _require_valid_importance(self) -> None:
        if self.importance is None or self.importance.table is None:
            return
        quantiser: Quantiser | None = self.importance.quantiser
        assert quantiser is not None
        self.importance.table.require_top(quantiser.importance_bound())
        _require_finite(quantiser, self.importance.table.top - 1, "R-IMP-006")


def _require_finite(quantiser: Quantiser, greatest_number: int, clause: str) -> None:
    """Raises ``clause`` if the directory gives a magnitude that is not finite."""
    if not np.isfinite(quantiser.known_magnitude(greatest_number)):
        raise fault(clause, f"{quantiser}: the magnitude of {greatest_number} is not finite")


def _shape(source: Fields, limits: Limits) -> tuple[int, ...]:
    sizes = required(source, "shape", list)
    for size in sizes:
        if not isinstance(size, int):
            raise fault("R-DIR-003", "a size in shape is not an integer", offset=place_of(source, "shape"))
    if len(sizes) > limits.rank:
        limits.require("rank", len(sizes), place_of(source, "shape"))
    if math.prod([size for size in sizes if size]) > MAX_POSITIONS:
        words = f"shape {sizes} has more than 2^48 positions"
        raise fault("R-TEN-005", words, offset=place_of(source, "shape"))
    return tuple(sizes)


def _segment_and_chunk(source: Fields) -> tuple[int, int]:
    """Reads S and C, the sizes of segments and chunks."""
    segment, chunk = required(source, "segment", int), required(source, "chunk", int)
    if segment % 32 or not 32 <= segment <= MAX_SEGMENT:
        raise fault(
            "R-TEN-006",
            f"segment is {segment}, must be a multiple of 32 from 32 to {MAX_SEGMENT}",
            offset=place_of(source, "segment"),
        )
    if chunk < 1 or segment * chunk > MAX_CHUNK_POSITIONS:
        words = f"chunk is {chunk}, must be 1 to {MAX_CHUNK_POSITIONS // segment} with segment {segment}"
        raise fault("R-TEN-007", words, offset=place_of(source, "chunk"))
    return segment, chunk


def _records(source: Fields, key: str) -> NDArray[np.void]:
    """Reads the chunk records of the key ``chunks``, or the single record of the key ``vectors``."""
    data = required(source, key, bytes)
    if key == "vectors" and len(data) != 8:
        raise fault("R-TEN-012", f"vectors has {len(data)} bytes, must have 8", offset=place_of(source, key))
    if len(data) % 8:
        words = f"{key} has {len(data)} bytes, must have a multiple of 8"
        raise fault("R-TEN-008", words, offset=place_of(source, key))
    records = np.frombuffer(data, CHUNK_RECORD)
    # The lowest byte of a length is sufficient to test for a multiple of 64.
    if data[0::8].translate(None, _ALIGNED) or not all(records["length"].tolist()):
        words = "a chunk's length is 0 or not a multiple of 64"
        raise fault("R-LAY-002", words, offset=place_of(source, key))
    return records


def _streams(source: Fields) -> dict[str, Any]:
    """Reads the streams' records. Returns attribute -> record."""
    required(source, "fingerprints", dict)
    maps = {key: required(source, key, dict) for key in _RECORDS if key in source}
    return {key: _RECORDS[key].from_map(fields) for key, fields in maps.items()}


def _unknown(records: dict[str, Any], source: Fields) -> dict[str, object]:
    """Returns the unknown keys of the entry and of its records' maps, as `TensorEntry.other` (R-DIR-005).

    Raises:
        InvalidFileError: a map has a key whose condition does not hold (R-DIR-007).
    """
    out: dict[str, object] = {}
    if not _KNOWN_KEYS.issuperset(source):
        out = {key: value for key, value in source.items() if key not in _KNOWN_KEYS}
    for key, record in records.items():
        fields, known = required(source, key, dict), record.keys
        if len(fields) > len(known):  # all known keys are present
            others = {name: value for name, value in fields.items() if name not in known}
            misplaced = [name for name in others if name in record.KEYS]
            require_absent(fields, misplaced, f"is not allowed in {key!r} with the other keys of this map")
            out[key] = others
    return out
