"""The golden files and what the manifest says of each (`conformance/manifest.schema.json`)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sfpformat.errors import SfpError

Json = dict[str, Any]

# The first letter of an id -> what the case is, and the level at which it is asked: what must be read, what
# must be refused, what is hostile or latitude or of a later version; and level 4, writing.
KINDS = {"y": "valid", "n": "invalid", "h": "hostile", "i": "latitude", "f": "future", "e": "job"}
LEVELS = {"valid": 1, "invalid": 2, "hostile": 3, "latitude": 3, "future": 3, "job": 4}
_ROLES = {"reader": "decoder", "validator": "validator", "writer": "encoder"}


class SuiteError(SfpError):
    """The suite is not there, or not whole."""


@dataclass(frozen=True)
class Case:
    """A golden file, or a job for an encoder.

    Attributes:
        id: class, area and number of its first clause, words.
        kind: one of `KINDS`.
        profile: the least that has all it needs.
        why: what is special about it, or wrong with it.
        clauses: those that it is about, the first one most of all.
        features: what a reader must know for it, in words.
        roles: which programs it is for.
        path: of the file, or of the job.
        sha256: its digest, as hex.
        limits: limits in force that are not the defaults.
        seconds: a program may take for an answer.
        memory: bytes that it may take beyond what it has at rest, or None for any.
        accepted: whether it may be accepted.
        faults: by which it may be refused: `error`, `clause`, `tensor`, and the `offset`s from and to.
        canonical: what a validator must say of canonical form, or None for either.
        not_canonical_by: the clauses of canonical form that it does not keep.
        written: of a job that leaves no choice, the SHA-256 of the canonical file, as hex; else None.
    """

    id: str
    kind: str
    profile: str
    why: str
    clauses: tuple[str, ...]
    features: frozenset[str]
    roles: frozenset[str]
    path: Path
    sha256: str
    limits: dict[str, int]
    seconds: float
    memory: int | None
    accepted: bool
    faults: tuple[Json, ...]
    canonical: bool | None
    not_canonical_by: tuple[str, ...]
    written: str | None

    @property
    def level(self) -> int:
        """1 to 4, see `LEVELS`."""
        return LEVELS[self.kind]

    @property
    def stem(self) -> Path:
        """The path of what lies beside it, without the suffix."""
        return self.path.with_name(self.id)

    def data(self) -> bytes:
        """The file.

        Raises:
            SuiteError: it is not what the manifest says.
        """
        data = _read(self.path)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise SuiteError(f"{self.path}: not the file that the manifest lists; get the suite anew")
        return data

    @cached_property
    def contents(self) -> Contents:
        """What a valid file holds, or what a job asks for."""
        return Contents(json.loads(_read(Path(f"{self.stem}.json"))), _read(Path(f"{self.stem}.bin")))


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        description: `metadata` and `tensors`, whose arrays are places in ``arrays``; numbers are strings.
        arrays: little-endian, one after another.
    """

    description: Json
    arrays: bytes

    @property
    def tensors(self) -> list[Json]:
        """The tensors, in the file's order."""
        return list(self.description["tensors"])

    def array(self, place: Json) -> bytes:
        """The bytes of an array."""
        start = int(place.get("offset", 0))
        return self.arrays[start : start + int(place["bytes"])]

    def arrays_of(self, tensor: Json) -> dict[str, bytes]:
        """The arrays of a tensor: `values`, and where they are `mask` and `importance`."""
        out = {"values": self.array(tensor)}
        return out | {what: self.array(tensor[what]) for what in ("mask", "importance") if what in tensor}


def shape_of(tensor: Json) -> list[int]:
    """A tensor's shape."""
    return [int(size) for size in tensor["shape"]]


@dataclass(frozen=True)
class Suite:
    """All golden files.

    Attributes:
        folder: where the manifest is.
        cases: in the manifest's order.
        clauses: of the document, in its order.
    """

    folder: Path
    cases: tuple[Case, ...]
    clauses: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path) -> Suite:
        """Reads the manifest of a folder.

        Raises:
            SuiteError: there is none.
        """
        manifest = json.loads(_read(folder / "manifest.json"))
        if manifest.get("suite") != 1:
            raise SuiteError(f"{folder}: a suite of a layout that this runner does not know")
        cases = tuple(_case(folder, entry) for entry in manifest["cases"])
        return cls(folder, cases, tuple(manifest["clauses"]))


def _case(folder: Path, entry: Json) -> Case:
    expected = entry["expected"]
    canonical = expected.get("canonical", {})
    faults = [{**fault, "error": fault["code"]} for fault in expected.get("errors", ())]
    return Case(
        id=entry["id"],
        kind=KINDS[entry["class"]],
        profile=entry["profile"],
        why=entry["why"],
        clauses=tuple(entry["clauses"]),
        features=frozenset(entry["features"]),
        roles=frozenset(_ROLES[role] for role in entry["roles"]),
        path=folder / entry["file"],
        sha256=entry["sha256"],
        limits=entry["limits"].get("in_force", {}),
        seconds=entry["limits"]["seconds"],
        memory=entry["limits"].get("memory_bytes"),
        accepted=expected["outcome"] in ("accept", "either"),
        faults=tuple(faults),
        canonical=canonical.get("is"),
        not_canonical_by=tuple(canonical.get("clauses", ())),
        written=expected.get("written", {}).get("sha256"),
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SuiteError(
            f"{path}: {error.strerror}; the suite is the folder conformance/ of the source"
        ) from None
