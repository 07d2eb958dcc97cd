"""The array `keyed` of the directory (SPEC.md 17.1): a map for each keyed table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..coding.codetable import CodeTable
from ..coding.keyed.rows import NO_STEP, RowCode
from ..coding.quantisers import F32, Table, Uniform
from ..dtypes import DTYPES
from ..errors import FileFault, fault
from .entry import TensorEntry
from .fields import Fields, place_of, require_absent, required
from .stream_maps import (
    StreamFields,
    quantiser_from_map,
    quantiser_to_map,
    table_from_map,
    table_to_map,
    word,
)

KEYED_FEATURE = "keyed"
MAX_OUTPUTS = 4096  # R-KEY-004
MIN_SEGMENT, MAX_SEGMENT = 8, 1 << 24  # R-KEY-006
MAX_STARTS = 1 << 32  # R-KEY-006
MAX_CHECK_BITS = 32  # R-KEY-010
_TABLE_KEYS = ("base", "extra", "codes", "group", "window")
_LEVEL_KEYS = (*_TABLE_KEYS, "quantiser", "step", "count", "centroids")
_KEYS = frozenset(
    ("name", "bits", "keys", "outputs", "seed", "segment", "starts", "gaps", "levels", "checks", "importance")
)


@dataclass(frozen=True)
class KeyedMap:
    """A keyed table.

    Attributes:
        name: its name.
        bits: the name of the tensor with the bit array.
        keys: the number of keys, as the writer says.
        seed: the seed of the hash.
        segment: Z, the distance of the four positions of a row, in bits.
        starts: the number of possible first positions.
        code: how rows are coded.
        other: keys that this version does not know, with their values (R-DIR-005).
    """

    name: str
    bits: str
    keys: int
    seed: int
    segment: int
    starts: int
    code: RowCode
    other: dict[str, object] = field(default_factory=dict)

    @property
    def array_bytes(self) -> int:
        """The size of the bit array, in bytes."""
        return self.code.array_bytes(self.starts, self.segment)

    @property
    def quantiser(self) -> Uniform | Table:
        """The quantiser of the weights."""
        centroids = self.code.centroids
        return Table(len(centroids)) if len(centroids) else Uniform(self.code.step)

    def to_map(self) -> dict[str, object]:
        """Returns the map in the directory."""
        code = self.code
        levels = {**table_to_map(code.levels), **quantiser_to_map(self.quantiser)}
        if len(code.centroids):
            levels["centroids"] = code.centroids.astype("<f4").tobytes()
        out: dict[str, object] = {
            **self.other,
            "name": self.name,
            "bits": self.bits,
            "keys": self.keys,
            "outputs": code.outputs,
            "seed": self.seed,
            "segment": self.segment,
            "starts": self.starts,
            "levels": levels,
            "checks": code.checks,
        }
        if code.gaps is not None:
            out["gaps"] = table_to_map(code.gaps)
        if code.importance is not None:
            step = Uniform(code.importance_step).to_map()
            out["importance"] = {**table_to_map(code.importance), **step}
        return out

    @classmethod
    def from_map(cls, source: Fields) -> KeyedMap:
        """Reads a map and checks it against itself.

        Raises:
            InvalidFileError, UnsupportedError: the map is damaged or refused.
        """
        name, bits = required(source, "name", str), required(source, "bits", str)
        if not name:
            raise fault("R-TEN-002", "the name of a keyed table is empty", offset=place_of(source, "name"))
        keys, seed = required(source, "keys", int), required(source, "seed", int)
        segment, starts = required(source, "segment", int), required(source, "starts", int)
        if seed >= 1 << 32:
            raise fault("R-KEY-005", f"seed is {seed}, must be below 2^32", offset=place_of(source, "seed"))
        if segment & (segment - 1) or not MIN_SEGMENT <= segment <= MAX_SEGMENT:
            words = f"segment is {segment}, must be a power of two from {MIN_SEGMENT} to {MAX_SEGMENT}"
            raise fault("R-KEY-006", words, offset=place_of(source, "segment"))
        if starts % segment or not segment <= starts <= MAX_STARTS:
            words = f"starts is {starts}, must be a multiple of {segment} from {segment} to 2^32"
            raise fault("R-KEY-006", words, offset=place_of(source, "starts"))
        other = {key: value for key, value in source.items() if key not in _KEYS}
        return cls(name, bits, keys, seed, segment, starts, _row_code(source), other)


def keyed_maps(items: list[object], at: int, entries: Mapping[str, TensorEntry]) -> tuple[KeyedMap, ...]:
    """Reads the array `keyed` and checks it against the entries of the file.

    Args:
        items: the elements of the array.
        at: the offset of the array.
        entries: the entries of the file's tensors, by name.

    Raises:
        InvalidFileError, UnsupportedError: the array is damaged or refused.
    """
    if not items:
        raise fault("R-KEY-002", "the array 'keyed' has no tables", offset=at)
    out: dict[str, KeyedMap] = {}
    used: set[str] = set()
    for item in items:
        if not isinstance(item, dict):
            raise fault("R-DIR-003", "an element of 'keyed' is not a map", offset=at)
        found = KeyedMap.from_map(item)
        if found.name in out:
            raise fault("R-KEY-003", f"two keyed tables are called {found.name!r}", offset=place_of(item))
        if found.bits in used:
            words = f"two keyed tables have the bit array {found.bits!r}"
            raise fault("R-KEY-012", words, offset=place_of(item, "bits"))
        _require_array(item, found, entries)
        out[found.name] = found
        used.add(found.bits)
    return tuple(out.values())


def _require_array(source: Fields, found: KeyedMap, entries: Mapping[str, TensorEntry]) -> None:
    """Checks the tensor with the bit array (R-KEY-011)."""
    at = place_of(source, "bits")
    entry = entries.get(found.bits)
    if entry is None:
        raise fault("R-KEY-011", f"there is no tensor {found.bits!r} for a bit array", offset=at)
    fits = entry.dtype == DTYPES["U8"] and entry.coding == "raw" and entry.shape == (found.array_bytes,)
    if not fits or entry.segment * entry.chunk % 64:
        words = (
            f"the bit array is {entry.dtype.name} {list(entry.shape)}, {entry.coding}, in chunks of "
            f"{entry.segment * entry.chunk} bytes; must be U8 [{found.array_bytes}], raw, in chunks of a "
            "multiple of 64"
        )
        raise fault("R-KEY-011", words, tensor=found.bits, offset=at)


def _row_code(source: Fields) -> RowCode:
    """Reads how rows are coded."""
    outputs = required(source, "outputs", int)
    if not 1 <= outputs <= MAX_OUTPUTS:
        words = f"outputs is {outputs}, must be 1 to {MAX_OUTPUTS}"
        raise fault("R-KEY-004", words, offset=place_of(source, "outputs"))
    gaps = None
    if outputs > 1:
        gaps = _table(required(source, "gaps", dict), outputs + 1)
    else:
        require_absent(source, ("gaps",), "needs more than one output")
    levels, step, centroids = _levels(required(source, "levels", dict))
    checks = required(source, "checks", bytes)
    if len(checks) != levels.classes or max(checks) > MAX_CHECK_BITS:
        words = f"checks has {len(checks)} bytes up to {max(checks, default=0)}, must have {levels.classes} "
        raise fault("R-KEY-010", f"{words}up to {MAX_CHECK_BITS}", offset=place_of(source, "checks"))
    if "importance" not in source:
        return RowCode(outputs, gaps, levels, step, centroids, checks)
    own = required(source, "importance", dict)
    quantiser = Uniform.from_map(StreamFields(own))
    importance = _table(own, quantiser.importance_bound())
    _require_finite(own, quantiser, importance.top - 1, "R-IMP-006")
    return RowCode(outputs, gaps, levels, step, centroids, checks, importance, quantiser.step)


def _levels(source: Fields) -> tuple[CodeTable, np.float32, F32]:
    """Reads the map `levels`. Returns its code table, its step and its centroids."""
    kind = word(source, "quantiser", (Uniform.NAME, Table.NAME), "R-KEY-008")
    quantiser = quantiser_from_map(source)
    keys = {"quantiser", *_TABLE_KEYS, *quantiser.KEYS, *(["centroids"] if kind == Table.NAME else [])}
    require_absent(
        source, [key for key in _LEVEL_KEYS if key not in keys], f"needs another quantiser than {kind!r}"
    )
    table = _table(source, quantiser.fingerprint_bound(DTYPES["F32"]))
    if isinstance(quantiser, Uniform):
        _require_finite(source, quantiser, (table.top - 1) // 2, "R-QNT-006")
        return table, quantiser.step, np.zeros(0, np.float32)
    assert isinstance(quantiser, Table)
    data = required(source, "centroids", bytes)
    centroids = np.frombuffer(data[: len(data) // 4 * 4], "<f4").astype(np.float32)
    good = np.isfinite(centroids).all() and not np.signbit(centroids).any() and (np.diff(centroids) > 0).all()
    if len(data) != 4 * quantiser.count or not good:
        words = f"centroids must be {quantiser.count} finite F32, not negative, ascending"
        raise fault("R-KEY-009", words, offset=place_of(source, "centroids"))
    return table, NO_STEP, centroids


def _table(source: Fields, bound: int) -> CodeTable:
    """Reads a code table whose levels are below ``bound``, with at most one code."""
    table = table_from_map(source)
    if table.group != 1 or len(table.codes) > 1 or table.window is not None:
        words = "a code table of a keyed table must have group 1, at most one code, and no windows"
        raise fault("R-KEY-007", words, offset=place_of(source))
    try:
        table.require_top(bound)
    except FileFault as error:
        error.place(None, place_of(source))
        raise
    return table


def _require_finite(source: Fields, quantiser: Uniform, greatest: int, clause: str) -> None:
    if not np.isfinite(quantiser.known_magnitude(greatest)):
        raise fault(
            clause, f"{quantiser}: the magnitude of {greatest} is not finite", offset=place_of(source)
        )
