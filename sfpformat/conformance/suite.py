"""The golden files and what the manifest says of each (`conformance/manifest.schema.json`)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import SfpError

Json = dict[str, Any]

# The level at which a case is asked: what must be read, what must be refused, what is hostile or latitude;
# and level 4, writing.
LEVELS = {"valid": 1, "invalid": 2, "hostile": 3, "latitude": 3, "future": 3}
ENCODERS_LEVEL = 4


class SuiteError(SfpError):
    """The suite is not there, or not whole."""


@dataclass(frozen=True)
class Case:
    """A golden file.

    Attributes:
        id, kind, profile, description: as in the manifest.
        clauses: those that it is about, the first one most of all.
        features: what a reader must know for it, in words.
        roles: which programs it is for.
        path: of the file.
        sha256: its digest, as hex.
        limits: limits in force that are not the defaults.
        expect: `accept`, `reject`, `canonical`, as in the manifest.
    """

    id: str
    kind: str
    profile: str
    description: str
    clauses: tuple[str, ...]
    features: frozenset[str]
    roles: frozenset[str]
    path: Path
    sha256: str
    limits: dict[str, int]
    expect: Json

    @property
    def level(self) -> int:
        """1 to 3, see `LEVELS`."""
        return LEVELS[self.kind]

    @property
    def accepted(self) -> bool:
        """Whether it may be accepted."""
        return "accept" in self.expect

    @property
    def faults(self) -> list[Json]:
        """The faults by which it may be refused."""
        return list(self.expect.get("reject", ()))

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
        """What a valid file holds."""
        description = json.loads(_read(self.path.with_suffix(".json")))
        return Contents(description, _read(self.path.with_suffix(".bin")))


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        description: `metadata` and `tensors`, whose arrays are places in ``arrays``.
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
        return self.arrays[place["offset"] : place["offset"] + place["bytes"]]


@dataclass(frozen=True)
class Suite:
    """All golden files.

    Attributes:
        folder: where the manifest is.
        cases: in the manifest's order.
        clauses: of the document, in its order.
        untestable: clauses that no single file shows, each with the reason.
    """

    folder: Path
    cases: tuple[Case, ...]
    clauses: tuple[str, ...]
    untestable: dict[str, str] = field(default_factory=dict)

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
        return cls(folder, cases, tuple(manifest["clauses"]), manifest["untestable"])


def _case(folder: Path, entry: Json) -> Case:
    return Case(
        id=entry["id"],
        kind=entry["kind"],
        profile=entry["profile"],
        description=entry["description"],
        clauses=tuple(entry["clauses"]),
        features=frozenset(entry["features"]),
        roles=frozenset(entry["roles"]),
        path=folder / entry["file"],
        sha256=entry["sha256"],
        limits=entry.get("limits", {}),
        expect=entry["expect"],
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SuiteError(
            f"{path}: {error.strerror}; the suite is the folder conformance/ of the source"
        ) from None
