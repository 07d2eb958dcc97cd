"""What a case is, and how each is proven before it is written.

Rules: a valid file is read by the plain reader, which gives its expected contents; whether it is canonical
the package's validator says. An invalid file is a valid one, its twin, with one edit; the plain reader must
refuse it by the clause that its name says. Clause and error code come from SPEC.md's tables.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sfpformat.limits import DEFAULT_LIMITS
from sfpformat.validate import validate
from tests import slow_reader
from tests.clauses import clauses_of_spec
from tests.forge import Forge

Edit = Callable[[Forge], object]
Json = dict[str, Any]
# What a reader that does not refuse these would break besides: reading outside the file, memory for what is
# not there, returning part of a tensor, naming no code.
KEPT_BY = {
    "R-PRE-007": ("R-LAY-005", "R-STR-002", "R-STR-003"),
    "R-LAY-003": ("R-LAY-005",),
    "R-MSG-007": ("R-MSG-008",),
    "R-LAY-004": ("R-STR-001",),
    "R-LIM-002": ("R-LIM-003",),
}
# What the first letter of an id says.
KINDS = {"y": "valid", "n": "invalid", "i": "latitude", "h": "hostile", "f": "future"}
KIND_OF_TAG = {"hostile": "h", "future": "f"}

# Areas, and single clauses, whose faults lie in a tensor's chunks; those of others in preamble or directory.
IN_CHUNKS = ("R-PLN", "R-CHK", "R-IDX", "R-VEC", "R-RAW", "R-LAY-004", "R-MSK-004", "R-MSK-005", "R-MSK-006")
IN_CHUNKS += ("R-QNT-005", "R-QNT-007", "R-SCL-004", "R-SCL-006", "R-IMP-004", "R-IMP-005")


@dataclass
class Case:
    """A golden file and what the manifest says of it."""

    id: str
    clauses: list[str]
    description: str
    data: bytes
    features: list[str]
    expect: Json
    twin: str | None = None
    limits: dict[str, int] = field(default_factory=dict)
    contents: Contents | None = None

    @property
    def file(self) -> str:
        """Its path in the suite."""
        return f"cases/{self.id.split('-')[1]}/{self.id}.sfp"

    @property
    def contents_file(self) -> str:
        """The path of its contents in the suite, without the suffix."""
        return self.file.removesuffix(".sfp")

    def manifest(self) -> Json:
        """Its entry in the manifest."""
        twin = {} if self.twin is None else {"twin": self.twin}
        limits = {"limits": self.limits} if self.limits else {}
        return {
            "id": self.id,
            "kind": KINDS[self.id[0]],
            "file": self.file,
            "bytes": len(self.data),
            "sha256": hashlib.sha256(self.data).hexdigest(),
            "clauses": self.clauses,
            "roles": ["decoder", "validator"] + ["encoder"] * (self.contents is not None and not self.limits),
            "profile": "full" if set(self.features) & NOT_CORE else "core",
            "features": self.features,
            "description": self.description,
            **twin,
            **limits,
            "expect": self.expect,
        }


class Suite:
    """The cases, in order."""

    def __init__(self) -> None:
        self.cases: dict[str, Case] = {}
        self.codes = {clause.id: clause.code for clause in clauses_of_spec()}

    def valid(
        self,
        name: str,
        description: str,
        data: bytes,
        *clauses: str,
        limits: Mapping[str, int] | None = None,
    ) -> str:
        """Adds a file that must be accepted, and gives its id.

        Args:
            name: its id without the kind: area and number of the clause that it is most about, a slug.
            description: what is special about it.
            data: the file.
            clauses: others that it is about.
            limits: those in force that are not the defaults.
        """
        report = validate(data, limits=replace(DEFAULT_LIMITS, **(limits or {})))
        assert report.ok, report.faults
        notes = sorted({note[1 : note.index("]")] for note in report.notes})
        expect: Json = {"accept": True, "canonical": report.canonical, "not_canonical_by": notes}
        about = [clause for clause in notes if clause not in clauses]
        clauses = (*clauses, "R-CAN-001", *about)
        out = self._add("y", name, description, data, data, clauses, expect)
        self.cases[out].limits = dict(limits or {})
        self.cases[out].contents = contents(data)
        return out

    def invalid(
        self,
        name: str,
        description: str,
        twin: str,
        edit: Edit,
        *,
        tensor: str | None = None,
        plainly: str | None = "",
        tags: Iterable[str] = (),
        limits: Mapping[str, int] | None = None,
    ) -> str:
        """Adds a file that must be refused by the clause in its name: a valid file after one edit.

        Args:
            name: as in `valid`; its clause is the one that is broken.
            description: what is wrong.
            twin: id of the valid file.
            edit: breaks it, by changing the pieces or by giving the bytes.
            tensor: the tensor that the fault belongs to.
            plainly: the clause that the plain reader names where that is another, just as right; None where
                it cannot be asked, as of limits, which it has none of.
            tags: ``hostile`` for what is meant to exhaust memory or time, ``future`` for what a later
                document might allow.
            limits: as in `valid`.
        """
        base = self.cases[twin].data
        assert is_as_put_together(base), f"{twin} is not put together as it was"
        forge = Forge.of(base)
        data = edited(forge, edit)
        clause = clause_of(name)
        assert data != base or limits, f"{name}: nothing was changed"
        if plainly is not None:
            named = refusing_clause(data)
            assert named == (plainly or clause), f"{name}: the plain reader names {named}"
        found = {"error": self.codes[clause], "clause": clause, "tensor": tensor}
        found["offset"] = place(forge, clause, tensor, len(data))
        [kind] = {KIND_OF_TAG[tag] for tag in tags} or {"n"}
        out = self._add(kind, name, description, data, base, (), {"reject": [found]})
        self.cases[out].twin = twin
        self.cases[out].limits = dict(limits or {})
        kept = self.cases[twin].clauses
        kept += [each for each in self.cases[out].clauses if each not in kept]
        return out

    def either(
        self, name: str, description: str, twin: str, edit: Edit, *clauses: str, accept: bool = False
    ) -> str:
        """Adds a file on which the document leaves the reader a choice.

        Args:
            name, description, twin, edit: as in `invalid`.
            clauses: other clauses by which it may be refused.
            accept: whether it may be accepted too.
        """
        forge = Forge.of(self.cases[twin].data)
        data = edited(forge, edit)
        allowed = [clause_of(name), *clauses]
        expect: Json = {
            "reject": [{"error": self.codes[c], "clause": c, "offset": [0, len(data)]} for c in allowed]
        }
        if accept:
            expect["accept"] = True
        else:
            assert refusing_clause(data) in allowed, f"{name}: the plain reader names {refusing_clause(data)}"
        out = self._add("i", name, description, data, self.cases[twin].data, clauses, expect)
        self.cases[out].twin = twin
        return out

    def _add(
        self,
        kind: str,
        name: str,
        description: str,
        data: bytes,
        described: bytes,
        clauses: Iterable[str],
        expect: Json,
    ) -> str:
        case_id = f"{kind}-{name}"
        assert case_id not in self.cases, f"{case_id} comes twice"
        about = list(dict.fromkeys([clause_of(name), *clauses]))
        if kind != "y" and self.codes[about[0]] == "E_RESERVED":
            about.append("R-CNV-005")  # of which all such clauses are instances
        if kind != "y":
            about += [clause for clause in KEPT_BY.get(about[0], ()) if clause not in about]
        unknown = set(about) - set(self.codes)
        assert not unknown, unknown
        self.cases[case_id] = Case(case_id, about, description, data, features_of(described), expect)
        return case_id


def edited(forge: Forge, edit: Edit) -> bytes:
    """The file after an edit: the bytes that it gives, or else the file put together again."""
    given = edit(forge)
    return given if isinstance(given, bytes) else forge.build()


def clause_of(name: str) -> str:
    """The clause in a case's name."""
    area, number, _ = name.split("-", 2)
    return f"R-{area}-{number}"


def refusing_clause(data: bytes) -> str | None:
    """The clause by which the plain reader refuses a file."""
    try:
        slow_reader.read(data)
    except slow_reader.Bad as error:
        return str(error)
    return None


def place(forge: Forge, clause: str, tensor: str | None, length: int) -> list[int]:
    """The first and the last offset in the file that a reader may name for a fault."""
    directory_at = 64 + sum(len(part.data) for part in forge.parts)
    if clause.startswith(IN_CHUNKS) and tensor is not None:
        start = forge.start_of(tensor)
        return [start, start + len(forge.part(tensor).data)]
    return [0, length] if tensor is None else [directory_at, length]


# -------------------------------------------------------------------------------------- contents and features


@dataclass(frozen=True)
class Contents:
    """What a valid file holds: a description, and all arrays one after another, which it refers to."""

    description: Json
    data: bytes


def contents(data: bytes) -> Contents:
    """What a valid file holds."""
    file = slow_reader.read(data)
    tensors, arrays = [], bytearray()

    def placed(raw: bytes) -> Json:
        start = len(arrays)
        arrays.extend(raw)
        return {"offset": start, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}

    for entry, (name, tensor) in zip(file.root["tensors"], file.tensors.items(), strict=True):
        out: Json = {"name": name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
        out["values"] = placed(tensor.data)
        if "mask" in entry:
            out["mask"] = placed(bytes(tensor.mask))
        if "importance" in entry:
            raw = b"".join(struct.pack("<I", slow_reader.pattern_of(x, "F32")) for x in known(tensor))
            role = entry["importance"]["role"]
            out["importance"] = {**placed(raw), "role": role}
        tensors.append(out)
    return Contents({"metadata": file.root.get("metadata", {}), "tensors": tensors}, bytes(arrays))


def known(tensor: slow_reader.Tensor) -> Iterable[float]:
    """The importances, 0 where the file keeps none; a -0 stays one."""
    return (0.0 if x is None else x for x in tensor.importance)


def is_as_put_together(data: bytes) -> bool:
    """Whether a file taken apart and put together is the same: so undoing an edit mends what it broke."""
    return Forge.of(data).build() == data


# Features that lie outside the profile `core` (SPEC.md chapter 23).
NOT_CORE = {"uniform", "table", "narrow", "group-2", "scale", "multiplier"}


def features_of(data: bytes) -> list[str]:
    """What a reader must know for a valid file, in words."""
    root, _ = slow_reader.read_directory(data)
    found: set[str] = set()
    for entry in root["tensors"]:
        found |= {entry["coding"], f"dtype-{entry['dtype']}"}
        for stream in slow_reader.streams(entry):
            found |= _stream_features(entry, stream)
        if entry["coding"] == "fingerprint":
            if "scale" in entry:
                found |= {"scale", f"scale-{entry['scale']['per']}"}
            if "importance" in entry:
                importance = entry["importance"]
                found |= {"importance", f"importance-{importance['over']}", importance["role"]}
    return sorted(found)


def _stream_features(entry: Json, stream: str) -> set[str]:
    source = entry[stream]
    found = {f"group-{source['group']}"}
    if stream == "mask":
        found |= {"mask", source["kind"]}
    elif stream == "fingerprints":
        found.add(source["quantiser"])
        if source["quantiser"] == "exact" and source["dtype"] != entry["dtype"]:
            found.add("narrow")
    else:
        found.add(f"importance-by-{source['quantiser']}")
    if len(source["codes"]) > 1:
        found.add("codes")
    if source.get("quantiser") == "exact" and source["trim"]:
        found.add("trim")
    return found
