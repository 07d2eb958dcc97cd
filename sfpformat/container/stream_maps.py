"""The maps of a tensor entry that describe its streams: mask, fingerprints, scale, importance.

See SPEC.md chapters 8 and 10 to 13. Each record has `to_map` and `from_map`, `KEYS` (all keys that SPEC.md
defines for its map) and `keys` (the keys that this record has). This module makes the checks that need only
one map; `container.entry` makes the checks that need the tensor's dtype or size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

from ..coding.codetable import CodeTable, PrefixCode, pack_lengths, require_shape, unpack_lengths
from ..coding.mask import BITMAP, KINDS
from ..coding.quantisers import KINDS as QUANTISERS
from ..coding.quantisers import Exact, Quantiser
from ..dtypes import DTYPES, FACTOR_DTYPES, Dtype
from ..errors import FileFault, fault
from .fields import Fields, place_of, required

T = TypeVar("T")

SCALES = ("tensor", "row", "column", "group")
OVERS = ("survivors", "all", "factors")
ROLES = ("multiplier", "metadata")

# The keys of a code table, of a mask by its kind, and of a stream with any quantiser.
_TABLE_KEYS = ("base", "extra", "codes", "group")
_ALL_TABLE_KEYS = (*_TABLE_KEYS, "window")
_MASK_KEYS = {"runs": ("kind", "polarity"), "octets": ("kind",)}
_ALL_STREAM_KEYS = (
    "quantiser",
    *(key for kind in QUANTISERS.values() for key in kind.KEYS),
    *_ALL_TABLE_KEYS,
)


def _table_keys(table: CodeTable) -> tuple[str, ...]:
    """Returns the keys of a code table."""
    return _TABLE_KEYS if table.window is None else _ALL_TABLE_KEYS


def _stream_keys(quantiser: Quantiser, table: CodeTable) -> tuple[str, ...]:
    """Returns the keys of the map of a stream with a quantiser."""
    return ("quantiser", *quantiser.KEYS, *_table_keys(table))


def word(source: Fields, key: str, words: tuple[str, ...], clause: str) -> str:
    """Returns the string of a key. Raises ``clause`` unless it is one of ``words``."""
    value = required(source, key, str)
    if value not in words:
        raise fault(
            clause,
            f"{key} is {value!r}, which this version does not support; it supports {', '.join(words)}",
            offset=place_of(source, key),
        )
    return value


def table_to_map(table: CodeTable) -> dict[str, object]:
    """Returns the keys of a code table, with their values."""
    window = {} if table.window is None else {"window": table.window}
    return {
        "base": table.base,
        "extra": table.extra,
        "codes": [pack_lengths(code.length) for code in table.codes],
        "group": table.group,
        **window,
    }


def table_from_map(source: Fields) -> CodeTable:
    """Reads the code table of a stream's map."""
    base, extra = required(source, "base", int), required(source, "extra", bytes)
    lengths, group = required(source, "codes", list), required(source, "group", int)
    window = required(source, "window", int) if "window" in source else None
    for code in lengths:
        if not isinstance(code, bytes):
            raise fault("R-DIR-003", "an item of codes is not binary", offset=place_of(source, "codes"))
    at = None  # the key whose offset a fault gets; None: the map's offset
    try:
        require_shape(extra, group, len(lengths), window)
        at, symbols = "codes", len(extra) ** group
        codes = tuple([PrefixCode(unpack_lengths(code, symbols)) for code in lengths])
        at = None
        return CodeTable(base, extra, codes, group, window)
    except FileFault as error:
        error.place(None, place_of(source, at))
        raise


def quantiser_to_map(quantiser: Quantiser) -> dict[str, object]:
    """Returns the quantiser's name and its keys, with their values."""
    return {"quantiser": quantiser.NAME, **quantiser.to_map()}


def quantiser_from_map(source: Fields) -> Quantiser:
    """Reads the quantiser of a stream's map."""
    kind = word(source, "quantiser", tuple(QUANTISERS), "R-QNT-001")
    return QUANTISERS[kind].from_map(StreamFields(source))


class StreamFields(NamedTuple):
    """The map of a stream, with the interface `StreamMap` of `coding.quantisers`."""

    source: Fields

    def required(self, key: str, kind: type[T]) -> T:
        """Returns the value of a required key."""
        return required(self.source, key, kind)

    def place(self, key: str) -> int:
        """Returns the byte offset of the value of a key."""
        return place_of(self.source, key)


def factor_dtype(source: Fields, clause: str) -> Dtype:
    """Reads the dtype of scales or factors. Raises ``clause`` for a dtype that is not allowed."""
    name = required(source, "dtype", str)
    if name not in FACTOR_DTYPES:
        raise fault(
            clause,
            f"dtype is {name!r}, must be one of {', '.join(FACTOR_DTYPES)}",
            offset=place_of(source, "dtype"),
        )
    return DTYPES[name]


@dataclass(frozen=True)
class MaskEntry:
    """How the mask is coded. ``polarity`` is 0 for octets, which have no polarity."""

    KEYS: ClassVar[frozenset[str]] = frozenset((*_MASK_KEYS["runs"], *_ALL_TABLE_KEYS))

    kind: str
    polarity: int
    table: CodeTable

    @property
    def is_bitmap(self) -> bool:
        """Whether chunks contain the mask's bits unchanged."""
        return self.kind == "octets" and (self.table.base, self.table.extra) == BITMAP

    def to_map(self) -> dict[str, object]:
        """Returns the map `mask`."""
        polarity = {"polarity": self.polarity} if self.kind == "runs" else {}
        return {"kind": self.kind, **polarity, **table_to_map(self.table)}

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the result of `to_map`, computed without it."""
        return (*_MASK_KEYS[self.kind], *_table_keys(self.table))

    @classmethod
    def from_map(cls, source: Fields) -> MaskEntry:
        """Reads the map `mask`."""
        kind = word(source, "kind", KINDS, "R-MSK-001")
        polarity = 0
        if kind == "runs":
            polarity = required(source, "polarity", int)
            if polarity not in (0, 1):
                words = f"polarity is {polarity}, must be 0 or 1"
                raise fault("R-MSK-002", words, offset=place_of(source, "polarity"))
        table = table_from_map(source)
        try:
            table.require_top(256 if kind == "octets" else 1 << 16)
        except FileFault as error:
            error.place(None, place_of(source))
            raise
        return cls(kind, polarity, table)


@dataclass(frozen=True)
class FingerprintsEntry:
    """How the surviving weights are coded."""

    KEYS: ClassVar[frozenset[str]] = frozenset(_ALL_STREAM_KEYS)

    quantiser: Quantiser
    table: CodeTable

    def to_map(self) -> dict[str, object]:
        """Returns the map `fingerprints`."""
        return {**quantiser_to_map(self.quantiser), **table_to_map(self.table)}

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the result of `to_map`, computed without it."""
        return _stream_keys(self.quantiser, self.table)

    @classmethod
    def from_map(cls, source: Fields) -> FingerprintsEntry:
        """Reads the map `fingerprints`."""
        return cls(quantiser_from_map(source), table_from_map(source))


@dataclass(frozen=True)
class ScaleEntry:
    """Which positions share a scale factor. ``size`` is G if ``per`` is ``group``, else 0."""

    KEYS: ClassVar[frozenset[str]] = frozenset(("per", "size", "dtype"))

    per: str
    size: int
    dtype: Dtype

    def to_map(self) -> dict[str, object]:
        """Returns the map `scale`."""
        size = {"size": self.size} if self.per == "group" else {}
        return {"per": self.per, **size, "dtype": self.dtype.name}

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the result of `to_map`, computed without it."""
        return ("per", "size", "dtype") if self.per == "group" else ("per", "dtype")

    @classmethod
    def from_map(cls, source: Fields) -> ScaleEntry:
        """Reads the map `scale`."""
        per = word(source, "per", SCALES, "R-SCL-001")
        size = 0
        if per == "group":
            size = required(source, "size", int)
            if size < 1:
                raise fault(
                    "R-SCL-002", f"size is {size}, must be at least 1", offset=place_of(source, "size")
                )
        return cls(per, size, factor_dtype(source, "R-SCL-003"))


@dataclass(frozen=True)
class ImportanceEntry:
    """How the importance is coded: as a stream (quantiser and table), or as factors of a dtype."""

    KEYS: ClassVar[frozenset[str]] = frozenset(("over", "role", *_ALL_STREAM_KEYS))

    over: str
    role: str
    quantiser: Quantiser | None = None
    table: CodeTable | None = None
    dtype: Dtype | None = None

    def to_map(self) -> dict[str, object]:
        """Returns the map `importance`."""
        out: dict[str, object] = {"over": self.over, "role": self.role}
        if self.dtype is not None:
            return {**out, "dtype": self.dtype.name}
        assert self.quantiser is not None
        assert self.table is not None
        return {**out, **quantiser_to_map(self.quantiser), **table_to_map(self.table)}

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the result of `to_map`, computed without it."""
        if self.quantiser is None:
            return ("over", "role", "dtype")
        assert self.table is not None
        coded = _stream_keys(self.quantiser, self.table)
        return ("over", "role", *coded)

    @classmethod
    def from_map(cls, source: Fields) -> ImportanceEntry:
        """Reads the map `importance`."""
        over = word(source, "over", OVERS, "R-IMP-001")
        role = word(source, "role", ROLES, "R-IMP-002")
        if over == "factors":
            return cls(over, role, dtype=factor_dtype(source, "R-IMP-003"))
        quantiser = quantiser_from_map(source)
        if isinstance(quantiser, Exact) and quantiser.dtype.name not in FACTOR_DTYPES:
            words = f"dtype is {quantiser.dtype.name!r}, must be one of {', '.join(FACTOR_DTYPES)}"
            raise fault("R-IMP-003", words, offset=place_of(source, "dtype"))
        return cls(over, role, quantiser, table_from_map(source))
