"""The maps of a tensor entry that describe its streams: mask, fingerprints, scale, importance.

Each record has `to_map` and `from_map` side by side; what one map alone can get wrong is checked here, what
needs the tensor (its dtype, its size) in `container.entry`. SPEC.md chapters 8 and 10 to 13.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..coding.codetable import (
    CodeTable,
    PrefixCode,
    pack_lengths,
    require_shape,
    unpack_lengths,
)
from ..coding.mask import KINDS
from ..coding.quantiser import Exact, Quantiser, Table, Uniform
from ..dtypes import DTYPES, FACTOR_DTYPES, Dtype
from ..errors import fault, placed
from .fields import required, typed
from .messagepack import Map

SCALES = ("tensor", "row", "column", "group")
OVERS = ("survivors", "all", "factors")
ROLES = ("multiplier", "metadata")


def word(source: Map, key: str, words: tuple[str, ...], clause: str) -> str:
    """A string that must be one of some words."""
    value = required(source, key, str)
    if value not in words:
        raise fault(
            clause,
            f"{key} is {value!r}, this reader knows {', '.join(words)}",
            offset=source.at[key],
        )
    return value


_TABLE_KEYS = frozenset(("base", "extra", "codes", "group"))
_QUANTISER_KEYS = {
    Exact: frozenset(("quantiser", "dtype", "trim")),
    Uniform: frozenset(("quantiser", "step")),
    Table: frozenset(("quantiser", "count")),
}


def table_to_map(table: CodeTable) -> dict[str, object]:
    """The four keys of a code table."""
    return {
        "base": table.base,
        "extra": table.extra,
        "codes": [pack_lengths(code.length) for code in table.codes],
        "group": table.group,
    }


def table_from_map(source: Map) -> CodeTable:
    """The code table of a stream's map."""
    base, extra = required(source, "base", int), required(source, "extra", bytes)
    lengths, group = required(source, "codes", list), required(source, "group", int)
    if not all(isinstance(length, bytes) for length in lengths):
        raise fault("R-DIR-003", "a code is not binary", offset=source.at["codes"])
    with placed(base=source.offset):
        require_shape(extra, group, len(lengths))
    with placed(base=source.at["codes"]):
        codes = tuple(PrefixCode(unpack_lengths(code, len(extra) ** group)) for code in lengths)
    with placed(base=source.offset):
        return CodeTable(base, extra, codes, group)


def quantiser_to_map(quantiser: Quantiser) -> dict[str, object]:
    """The quantiser's name and its keys."""
    if isinstance(quantiser, Exact):
        return {
            "quantiser": "exact",
            "dtype": quantiser.dtype.name,
            "trim": int(quantiser.trim),
        }
    if isinstance(quantiser, Uniform):
        return {"quantiser": "uniform", "step": np.float32(quantiser.step).tobytes()}
    return {"quantiser": "table", "count": quantiser.count}


def quantiser_from_map(source: Map) -> Quantiser:
    """The quantiser of a stream's map."""
    kind = word(source, "quantiser", ("exact", "uniform", "table"), "R-QNT-001")
    if kind == "exact":
        name = required(source, "dtype", str)
        if name not in DTYPES:
            raise fault("R-TEN-003", f"unknown dtype {name!r}", offset=source.at["dtype"])
        trim = required(source, "trim", int)
        if trim not in (0, 1):
            raise fault("R-QNT-008", f"trim is {trim}", offset=source.at["trim"])
        return Exact(DTYPES[name], bool(trim))
    if kind == "uniform":
        step = required(source, "step", bytes)
        with placed(base=source.at["step"]):
            if len(step) != 4:
                raise fault("R-QNT-003", f"a step of {len(step)} bytes, must be 4")
            return Uniform(np.frombuffer(step, "<f4")[0])
    count = required(source, "count", int)
    with placed(base=source.at["count"]):
        return Table(count)


def factor_dtype(source: Map, clause: str) -> Dtype:
    """The dtype of scales or factors."""
    name = required(source, "dtype", str)
    if name not in FACTOR_DTYPES:
        raise fault(clause, f"dtype {name!r}, must be {', '.join(FACTOR_DTYPES)}", offset=source.at["dtype"])
    return DTYPES[name]


@dataclass(frozen=True)
class MaskEntry:
    """How the mask is coded; ``polarity`` is 0 for octets, which have none."""

    kind: str
    polarity: int
    table: CodeTable

    def keys(self) -> frozenset[str]:
        """The keys of its map."""
        return _TABLE_KEYS | ({"kind", "polarity"} if self.kind == "runs" else {"kind"})

    def to_map(self) -> dict[str, object]:
        """The map `mask`."""
        polarity = {"polarity": self.polarity} if self.kind == "runs" else {}
        return {"kind": self.kind, **polarity, **table_to_map(self.table)}

    @classmethod
    def from_map(cls, source: Map) -> MaskEntry:
        """Reads the map `mask`."""
        kind = word(source, "kind", KINDS, "R-MSK-001")
        polarity = 0
        if kind == "runs":
            polarity = required(source, "polarity", int)
            if polarity not in (0, 1):
                raise fault("R-MSK-002", f"polarity is {polarity}", offset=source.at["polarity"])
        elif "polarity" in source:
            raise fault("R-MSK-003", "octets have no polarity", offset=source.at["polarity"])
        table = table_from_map(source)
        with placed(base=source.offset):
            table.require_top(256 if kind == "octets" else 1 << 16)
        return cls(kind, polarity, table)


@dataclass(frozen=True)
class FingerprintsEntry:
    """How the surviving weights are coded."""

    quantiser: Quantiser
    table: CodeTable

    def keys(self) -> frozenset[str]:
        """The keys of its map."""
        return _TABLE_KEYS | _QUANTISER_KEYS[type(self.quantiser)]

    def to_map(self) -> dict[str, object]:
        """The map `fingerprints`."""
        return {**quantiser_to_map(self.quantiser), **table_to_map(self.table)}

    @classmethod
    def from_map(cls, source: Map) -> FingerprintsEntry:
        """Reads the map `fingerprints`."""
        return cls(quantiser_from_map(source), table_from_map(source))


@dataclass(frozen=True)
class ScaleEntry:
    """Which positions share a factor; ``size`` is G with ``per`` = group, else 0."""

    per: str
    size: int
    dtype: Dtype

    def keys(self) -> frozenset[str]:
        """The keys of its map."""
        return frozenset(("per", "size", "dtype") if self.per == "group" else ("per", "dtype"))

    def to_map(self) -> dict[str, object]:
        """The map `scale`."""
        size = {"size": self.size} if self.per == "group" else {}
        return {"per": self.per, **size, "dtype": self.dtype.name}

    @classmethod
    def from_map(cls, source: Map) -> ScaleEntry:
        """Reads the map `scale`."""
        per = word(source, "per", SCALES, "R-SCL-001")
        size = 0
        if per == "group":
            if "size" not in source:
                raise fault("R-SCL-002", "groups without a size", offset=source.offset)
            size = typed(source["size"], int, "size", source.at["size"])
            if size < 1:
                raise fault("R-SCL-002", f"groups of {size}", offset=source.at["size"])
        elif "size" in source:
            raise fault("R-SCL-002", "only groups have a size", offset=source.at["size"])
        return cls(per, size, factor_dtype(source, "R-SCL-003"))


@dataclass(frozen=True)
class ImportanceEntry:
    """How the importance is coded: as a stream (quantiser and table), or as factors of a dtype."""

    over: str
    role: str
    quantiser: Quantiser | None = None
    table: CodeTable | None = None
    dtype: Dtype | None = None

    def keys(self) -> frozenset[str]:
        """The keys of its map."""
        if self.quantiser is None:
            return frozenset(("over", "role", "dtype"))
        return _TABLE_KEYS | _QUANTISER_KEYS[type(self.quantiser)] | {"over", "role"}

    def to_map(self) -> dict[str, object]:
        """The map `importance`."""
        out: dict[str, object] = {"over": self.over, "role": self.role}
        if self.dtype is not None:
            return {**out, "dtype": self.dtype.name}
        assert self.quantiser is not None
        assert self.table is not None
        return {**out, **quantiser_to_map(self.quantiser), **table_to_map(self.table)}

    @classmethod
    def from_map(cls, source: Map) -> ImportanceEntry:
        """Reads the map `importance`."""
        over = word(source, "over", OVERS, "R-IMP-001")
        role = word(source, "role", ROLES, "R-IMP-002")
        if over == "factors":
            return cls(over, role, dtype=factor_dtype(source, "R-IMP-003"))
        quantiser = quantiser_from_map(source)
        if isinstance(quantiser, Exact) and quantiser.dtype.name not in FACTOR_DTYPES:
            raise fault("R-IMP-003", f"dtype {quantiser.dtype.name!r}", offset=source.at["dtype"])
        return cls(over, role, quantiser, table_from_map(source))
