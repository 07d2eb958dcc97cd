"""Structures of the tensors that a delta stores in parts (SPEC.md 28.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..coding.codetable import CodeTable
from ..coding.quantisers import KINDS as QUANTISERS
from ..coding.quantisers import Exact, Quantiser, Table, Uniform
from ..dtypes import DTYPES, FACTOR_DTYPES, Dtype
from ..errors import fault, placed
from .entry import CHUNK_RECORD, TensorEntry, Vector
from .fields import Fields, place_of, require_absent, required
from .stream_maps import (
    OVERS,
    ROLES,
    FingerprintsEntry,
    ImportanceEntry,
    MaskEntry,
    ScaleEntry,
    factor_dtype,
    word,
)

PARTS_FEATURE = "delta-parts"
# The parts of a tensor besides its weights, in the order of a writer.
MASK, IMPORTANCE, VECTORS = PARTS = ("mask", "importance", "vectors")
_ONE = np.float32(1)
_QUANTISER_WORDS = tuple(QUANTISERS)


@dataclass(frozen=True)
class ImportanceStructure:
    """How the importance of a tensor is coded, without steps and code tables.

    Attributes:
        over, role: as in chapter 13 of SPEC.md.
        quantiser: the kind of its quantiser; None for factors.
        count: the number of centroids of a table; else 0.
        dtype: the dtype of factors or of exact importances; else None.
    """

    over: str
    role: str
    quantiser: str | None = None
    count: int = 0
    dtype: Dtype | None = None

    @property
    def stored(self) -> Dtype | None:
        """The dtype of the part `importance`; None for factors, which have no such part."""
        if self.quantiser is None:
            return None
        return self.dtype if self.dtype is not None else DTYPES["F32"]

    def to_map(self) -> dict[str, object]:
        """Returns the map `importance` of a structure."""
        out: dict[str, object] = {"over": self.over, "role": self.role}
        if self.quantiser is not None:
            out["quantiser"] = self.quantiser
        if self.quantiser == Table.NAME:
            out["count"] = self.count
        return out if self.dtype is None else {**out, "dtype": self.dtype.name}

    @classmethod
    def from_map(cls, source: Fields) -> ImportanceStructure:
        """Reads the map `importance` of a structure."""
        over, role = word(source, "over", OVERS, "R-IMP-001"), word(source, "role", ROLES, "R-IMP-002")
        if over == "factors":
            dtype = factor_dtype(source, "R-IMP-003")
            require_absent(source, ("quantiser", "count"), "is not allowed with factors")
            return cls(over, role, dtype=dtype)
        quantiser, count = _quantiser(source)
        if quantiser != Exact.NAME:
            require_absent(source, ("dtype",), f"is not allowed with the quantiser {quantiser}")
            return cls(over, role, quantiser, count)
        name = required(source, "dtype", str)
        if name not in FACTOR_DTYPES:
            words = f"dtype is {name!r}, must be one of {', '.join(FACTOR_DTYPES)}"
            raise fault(
                "R-IMP-003" if name in DTYPES else "R-TEN-003", words, offset=place_of(source, "dtype")
            )
        return cls(over, role, quantiser, dtype=DTYPES[name])

    @classmethod
    def of(cls, entry: ImportanceEntry) -> ImportanceStructure:
        """Returns the structure of an importance in a file."""
        if entry.quantiser is None:
            return cls(entry.over, entry.role, dtype=entry.dtype)
        dtype = entry.quantiser.dtype if isinstance(entry.quantiser, Exact) else None
        return cls(entry.over, entry.role, entry.quantiser.NAME, entry.quantiser.centroids, dtype)


@dataclass(frozen=True)
class Structure:
    """What the parts of a tensor mean: its dtype, quantisers, scale and importance, without their numbers.

    Attributes:
        dtype: the dtype of the tensor.
        masked: whether it has a mask.
        quantiser: the kind of its quantiser.
        count: the number of centroids of a table; else 0.
        scale: which positions share a scale factor, or None.
        importance: how its importance is coded, or None.
    """

    dtype: Dtype
    masked: bool
    quantiser: str
    count: int = 0
    scale: ScaleEntry | None = None
    importance: ImportanceStructure | None = None

    @property
    def weights(self) -> Dtype:
        """The dtype of the part `weights`."""
        return self.dtype if self.quantiser == Exact.NAME else DTYPES["F32"]

    @property
    def steps(self) -> int:
        """The number of steps at the start of the part `vectors`."""
        importance = self.importance is not None and self.importance.quantiser == Uniform.NAME
        return int(self.quantiser == Uniform.NAME) + int(importance)

    def vector_list(self, shape: tuple[int, ...]) -> list[Vector]:
        """Returns the vectors of the part `vectors`, after the steps, in order."""
        return self.entry("", shape).vector_list()

    def numbers(self, shape: tuple[int, ...]) -> int:
        """Returns the number of elements of the part `vectors`."""
        return self.steps + sum(vector.size for vector in self.vector_list(shape))

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[Dtype, tuple[int, ...]]]:
        """Returns part -> its dtype and shape, besides the weights. The part `mask` may be absent."""
        out: dict[str, tuple[Dtype, tuple[int, ...]]] = {}
        if self.masked and self.quantiser == Exact.NAME:
            out[MASK] = DTYPES["BOOL"], shape
        stored = None if self.importance is None else self.importance.stored
        if stored is not None:
            out[IMPORTANCE] = stored, shape
        numbers = self.numbers(shape)
        return {**out, VECTORS: (DTYPES["F32"], (numbers,))} if numbers else out

    def entry(
        self,
        name: str,
        shape: tuple[int, ...],
        steps: tuple[np.float32, np.float32] = (_ONE, _ONE),
        greatest: tuple[int, int] = (0, 0),
    ) -> TensorEntry:
        """Returns the entry of such a tensor, without chunks, and with tables of one level.

        Args:
            name, shape: its name and shape.
            steps: the steps of fingerprints and importance, used if their quantiser is uniform.
            greatest: their greatest levels, the levels of the tables.
        """
        quantiser = _made(self.quantiser, self.count, self.dtype, steps[0])
        importance = None
        if self.importance is not None:
            own = self.importance
            if own.quantiser is None:
                importance = ImportanceEntry(own.over, own.role, dtype=own.dtype)
            else:
                made = _made(own.quantiser, own.count, own.dtype or DTYPES["F32"], steps[1])
                importance = ImportanceEntry(own.over, own.role, made, _table(greatest[1]))
        return TensorEntry(
            name,
            self.dtype,
            shape,
            "fingerprint",
            32,
            1,
            np.zeros(0, CHUNK_RECORD),
            mask=MaskEntry("octets", 0, _table(0)) if self.masked else None,
            fingerprints=FingerprintsEntry(quantiser, _table(greatest[0])),
            scale=self.scale,
            importance=importance,
        )

    def to_map(self) -> dict[str, object]:
        """Returns the map of the structure."""
        out: dict[str, object] = {
            "dtype": self.dtype.name,
            "mask": int(self.masked),
            "quantiser": self.quantiser,
        }
        if self.quantiser == Table.NAME:
            out["count"] = self.count
        if self.scale is not None:
            out["scale"] = self.scale.to_map()
        return out if self.importance is None else {**out, "importance": self.importance.to_map()}

    @classmethod
    def from_map(cls, source: Fields) -> Structure:
        """Reads the map of a structure."""
        dtype = DTYPES.get(required(source, "dtype", str))
        if dtype is None:
            raise fault("R-TEN-003", f"unknown dtype {source['dtype']!r}", offset=place_of(source, "dtype"))
        if not dtype.is_float:
            words = f"a tensor of {dtype.name} has no parts"
            raise fault("R-TEN-010", words, offset=place_of(source, "dtype"))
        masked = required(source, "mask", int)
        if masked not in (0, 1):
            raise fault("R-DLT-019", f"mask is {masked}, must be 0 or 1", offset=place_of(source, "mask"))
        quantiser, count = _quantiser(source)
        scale = None
        if "scale" in source:
            fields = required(source, "scale", dict)
            if quantiser == Exact.NAME:
                require_absent(source, ("scale",), "is not allowed with the quantiser exact")
            scale = ScaleEntry.from_map(fields)
            if scale.per != "group":
                require_absent(fields, ("size",), "needs per group")
        importance = None
        if "importance" in source:
            importance = ImportanceStructure.from_map(required(source, "importance", dict))
        return cls(dtype, masked == 1, quantiser, count, scale, importance)

    @classmethod
    def of(cls, entry: TensorEntry) -> Structure | None:
        """Returns the structure of a tensor of a file. None for one that is no more than its elements."""
        if entry.fingerprints is None:
            return None
        quantiser = entry.fingerprints.quantiser
        if entry.mask is None and isinstance(quantiser, Exact) and entry.importance is None:
            return None
        importance = None if entry.importance is None else ImportanceStructure.of(entry.importance)
        masked = entry.mask is not None
        return cls(entry.dtype, masked, quantiser.NAME, quantiser.centroids, entry.scale, importance)


class Listed(Protocol):
    """What `require_parts` needs of a tensor of a delta's list."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def kind(self) -> str:
        """How base and result differ in it."""

    @property
    def dtype(self) -> Dtype:
        """Its dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def structure(self) -> Structure | None:
        """Its structure, if it is the weights of a tensor in parts."""


def require_parts(tensors: Sequence[Listed], separator: str, at: int | None) -> None:
    """Checks that a delta lists the parts of each tensor that has a structure (R-DLT-018).

    Args:
        tensors: the list of the delta.
        separator: what stands between the name of a tensor and that of a part.
        at: the offset of the structures, for errors; None if they are in several files.
    """
    known = {tensor.name: tensor for tensor in tensors if tensor.kind != "removed"}
    for tensor in tensors:
        structure = tensor.structure
        if structure is None:
            continue
        if tensor.kind not in ("unchanged", "changed") or tensor.dtype != structure.weights:
            words = f"the weights of a tensor in parts are {tensor.kind} and {tensor.dtype.name}"
            raise fault("R-DLT-018", words, tensor=tensor.name, offset=at)
        needed = structure.parts(tensor.shape)
        for part in PARTS:
            name = part_name(tensor.name, separator, part)
            found = known.get(name)
            if found is None and (part not in needed or part == MASK):
                continue
            if found is None or found.structure is not None or (found.dtype, found.shape) != needed.get(part):
                words = f"the part {part} of a tensor is missing, not needed, or has another dtype or shape"
                raise fault("R-DLT-018", words, tensor=name, offset=at)


def part_name(tensor: str, separator: str, part: str) -> str:
    """Returns the name of a part of a tensor; "" is the part `weights`."""
    return f"{tensor}{separator}{part}" if part else tensor


def _quantiser(source: Fields) -> tuple[str, int]:
    """Reads the kind of a quantiser, and the number of its centroids (0 without)."""
    kind = word(source, "quantiser", _QUANTISER_WORDS, "R-QNT-001")
    if kind != Table.NAME:
        require_absent(source, ("count",), f"is not allowed with the quantiser {kind}")
        return kind, 0
    count = required(source, "count", int)
    with placed(base=place_of(source, "count")):
        return kind, Table(count).count


def _made(kind: str, count: int, dtype: Dtype, step: np.float32) -> Quantiser:
    if kind == Exact.NAME:
        return Exact(dtype)
    return Uniform(step) if kind == Uniform.NAME else Table(count)


def _table(level: int) -> CodeTable:
    """Returns a code table with one level."""
    return CodeTable(level, b"\0", (), 1, None)
