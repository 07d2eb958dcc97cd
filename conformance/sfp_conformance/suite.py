"""The golden files and their manifest (`conformance/manifest.schema.json`)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sfpformat.errors import SfpError

Json = dict[str, Any]

# The first letter of an id -> the kind of the case; the kind -> its level. Level 1: must be accepted.
# Level 2: must be refused. Level 3: hostile files, latitude, later versions. Level 4: writing.
KINDS = {"y": "valid", "n": "invalid", "h": "hostile", "i": "latitude", "f": "future", "e": "job"}
LEVELS = {"valid": 1, "invalid": 2, "hostile": 3, "latitude": 3, "future": 3, "job": 4}
_ROLES = {"reader": "decoder", "validator": "validator", "writer": "encoder"}


class SuiteError(SfpError):
    """The suite is missing, incomplete or inconsistent."""


@dataclass(frozen=True)
class Case:
    """A golden file, or a job for an encoder.

    Attributes:
        id: class letter, area and number of its first clause, and a short description.
        kind: one of the values of `KINDS`.
        profile: the smallest profile that covers the case.
        why: what is special about the file, or wrong with it.
        clauses: the clauses that the case tests; the main one first.
        features: the features that a reader must support for it.
        roles: the roles of programs that it tests: `decoder`, `validator`, `encoder`.
        path: path of the file, or of the job.
        sha256: the SHA-256 of that file, as hex.
        base: path of the base to which the file, a delta, is applied; None if it is decoded alone.
        keys: the keys that are looked up in the keyed tables of the file; None for other cases.
        limits: limits in force that differ from the defaults.
        seconds: time limit for an answer.
        memory: bytes that a program may use beyond its memory at rest; None for no limit.
        accepted: whether a program may accept the file.
        faults: faults that a program may report: `error`, `clause`, `tensor`, and first and last `offset`.
        canonical: the required answer about canonical form; None for either.
        not_canonical_by: the clauses of canonical form that the file breaks.
        written: SHA-256 of the canonical file, as hex, if the job determines its bytes; else None.
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
    base: Path | None = None
    keys: tuple[bytes, ...] | None = None

    @property
    def level(self) -> int:
        """The level, 1 to 4 (`LEVELS`)."""
        return LEVELS[self.kind]

    @property
    def stem(self) -> Path:
        """The path of the files that accompany the case, without the suffix."""
        return self.path.with_name(self.id)

    def data(self) -> bytes:
        """Reads the file.

        Raises:
            SuiteError: the file cannot be read, or its SHA-256 differs from the manifest.
        """
        data = _read(self.path)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise SuiteError(f"{self.path}: its digest differs from the manifest; install the suite again")
        return data

    @cached_property
    def contents(self) -> Contents:
        """The contents of a valid file, or the contents that a job asks for."""
        return Contents(json.loads(_read(Path(f"{self.stem}.json"))), _read(Path(f"{self.stem}.bin")))


@dataclass(frozen=True)
class Contents:
    """The contents of a file.

    Attributes:
        description: `metadata` and `tensors`. An array is given by offset and size in ``arrays``. Sizes,
            offsets and shapes are strings of digits.
        arrays: all arrays, little-endian, concatenated.
    """

    description: Json
    arrays: bytes

    @property
    def tensors(self) -> list[Json]:
        """The tensors, in file order."""
        return list(self.description["tensors"])

    def array(self, place: Json) -> bytes:
        """Returns the bytes of an array."""
        start = int(place.get("offset", 0))
        return self.arrays[start : start + int(place["bytes"])]

    def arrays_of(self, tensor: Json) -> dict[str, bytes]:
        """Returns the arrays of a tensor: `values`, and `mask` and `importance` if it has them."""
        out = {"values": self.array(tensor)}
        return out | {what: self.array(tensor[what]) for what in ("mask", "importance") if what in tensor}


def shape_of(tensor: Json) -> list[int]:
    """Returns a tensor's shape."""
    return [int(size) for size in tensor["shape"]]


@dataclass(frozen=True)
class Suite:
    """All golden files.

    Attributes:
        folder: the folder of the manifest.
        cases: the cases, in manifest order.
        clauses: the clauses of SPEC.md, in its order.
    """

    folder: Path
    cases: tuple[Case, ...]
    clauses: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path) -> Suite:
        """Reads the manifest of a folder.

        Raises:
            SuiteError: the manifest cannot be read, or has an unknown layout.
        """
        manifest = json.loads(_read(folder / "manifest.json"))
        if manifest.get("suite") != 1:
            raise SuiteError(f"{folder}: this runner does not support the version of this suite")
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
        base=folder / entry["base"] if "base" in entry else None,
        keys=tuple(map(bytes.fromhex, entry["keys"])) if "keys" in entry else None,
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SuiteError(
            f"{path}: {error.strerror}; the suite is the folder conformance/ of the source"
        ) from None
