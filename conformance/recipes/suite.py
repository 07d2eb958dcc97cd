"""Cases, and the checks that each must pass before it is written.

Rules: the slow reader reads each valid file and computes its expected contents. An invalid file is a valid
file, its twin, after one edit. The slow reader must accept the twin and refuse the file by the clause in its
name. Clauses and error codes come from SPEC.md's tables.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sfp_conformance import slow_reader
from sfp_conformance.contents import (
    NOT_CORE,
    Json,
    contents,
    features_of,
    looked_up_contents,
    result_contents,
)
from sfp_conformance.finds import SECONDS, UNKNOWN
from sfp_conformance.forge import Forge

from conformance.clauses import IN_CHUNKS, clauses_of_spec

Edit = Callable[[Forge], object]

HOSTILE_MEMORY = 64 << 20  # bytes that a reader may use for a file that claims more data than it contains


@dataclass
class Case:
    """A golden file or a job for a writer, and its entry in the manifest.

    Attributes:
        id: class, area, number of a clause, and a slug.
        clauses: the clauses that it tests; the first is the one in its name.
        why: its subject or its defect.
        data: the bytes of its file.
        features: what a reader must support.
        expected: the expected verdict.
        recipe: the module that creates it.
        contents: the contents of a valid file, written beside it.
        arrays: concatenated, little-endian: those of a valid file, or the input of a job for a writer.
        twin: id of the valid file from which it was derived.
        flags: tags by which cases can be selected.
        in_force: limits of the reader that differ from the defaults.
        base: id of the file that is the base, if the file is a delta that is applied to a base; the contents
            are then those of the result.
        keys: the keys that are looked up in the keyed tables of the file; the contents are then the answers.
    """

    id: str
    clauses: list[str]
    why: str
    data: bytes
    features: list[str]
    expected: Json
    recipe: str
    contents: Json | None = None
    arrays: bytes | None = None
    twin: str | None = None
    flags: list[str] = field(default_factory=list)
    in_force: dict[str, int] = field(default_factory=dict)
    base: str | None = None
    keys: list[bytes] | None = None

    @property
    def kind(self) -> str:
        """The letter of its kind."""
        return self.id[0]

    @property
    def stem(self) -> str:
        """The path in the suite, without suffix."""
        return f"cases/{self.id.split('-')[1]}/{self.id}"

    @property
    def file(self) -> str:
        """The path of the file in the suite."""
        return f"{self.stem}.{'job.json' if self.kind == 'e' else 'sfp'}"

    @property
    def roles(self) -> list[str]:
        """The roles of the programs that it tests. A validator has no base and no keys."""
        if self.kind == "e":
            return ["writer"]
        return ["reader", "validator"] if self.base is None and self.keys is None else ["reader"]

    def manifest(self) -> Json:
        """Returns the entry in the manifest."""
        hostile = {"memory_bytes": HOSTILE_MEMORY} if self.kind == "h" else {}
        force = {"in_force": self.in_force} if self.in_force else {}
        beside = {} if self.contents is None else {"contents": f"{self.stem}.json"}
        beside |= {} if self.arrays is None else {"arrays": f"{self.stem}.bin"}
        return {
            "id": self.id,
            "class": self.kind,
            "roles": self.roles,
            "since": "1.0",
            "profile": "full" if set(self.features) & NOT_CORE else "core",
            "features": self.features,
            "clauses": self.clauses,
            "file": self.file,
            "bytes": len(self.data),
            "sha256": hashlib.sha256(self.data).hexdigest(),
            **({} if self.base is None else {"base": f"cases/{self.base.split('-')[1]}/{self.base}.sfp"}),
            **({} if self.keys is None else {"keys": [key.hex() for key in self.keys]}),
            **beside,
            "recipe": self.recipe,
            **({} if self.twin is None else {"twin": self.twin}),
            "expected": self.expected,
            "limits": {"seconds": SECONDS, **hostile, **force},
            "why": self.why,
            "flags": self.flags,
        }


class Suite:
    """All cases, in order."""

    def __init__(self) -> None:
        self.cases: dict[str, Case] = {}
        self.codes = {clause.id: clause.code for clause in clauses_of_spec()}
        self.recipe = ""

    def valid(
        self,
        name: str,
        why: str,
        data: bytes,
        *clauses: str,
        canonical: bool | tuple[str, ...] | None = None,
        in_force: dict[str, int] | None = None,
        kind: str = "y",
    ) -> str:
        """Adds a file that must be accepted. Returns its id.

        Args:
            name: its id without the kind: area and number of the main clause, and a slug.
            why: its subject.
            data: the file.
            clauses: further clauses that it tests.
            canonical: for validators: True, or the clauses of canonical form that it breaks.
            in_force: limits of the reader.
            kind: `f` for a file of a later version, `h` for one that needs much time or memory.
        """
        expected: Json = {"outcome": "accept"}
        if canonical is not None:
            notes = [] if isinstance(canonical, bool) else list(canonical)
            expected["canonical"] = {"is": canonical is True, "clauses": notes}
        case = Case(f"{kind}-{name}", [], why, data, features_of(data), expected, self.recipe)
        (case.contents, case.arrays), case.in_force = contents(data), in_force or {}
        return self.add(case, clauses)

    def invalid(
        self,
        name: str,
        why: str,
        twin: str,
        edit: Edit,
        *,
        tensor: str | None = None,
        plainly: str | None = "",
        tags: Iterable[str] = (),
        in_force: dict[str, int] | None = None,
    ) -> str:
        """Adds a file that must be refused by the clause in its name: its twin after an edit. Returns its id.

        Its kind is `h` with the tag `hostile`, `f` if the defect is a word that a later version may define,
        else `n`.

        Args:
            name: as in `valid`; its clause is the one that is broken.
            why: the defect.
            twin: id of the valid file.
            edit: changes the parts of the file, or returns the new bytes.
            tensor: the faulty tensor.
            plainly: the clause that the slow reader names, if it names another correct one; None if it cannot
                check the fault (it has no limits).
            tags: tags by which cases can be selected.
            in_force: limits of the reader.
        """
        base = self.cases[twin].data
        forge = Forge.of(base)
        assert forge.build() == base, f"{twin} is not rebuilt to the same bytes"
        data = edited(forge, edit)
        clause = clause_of(name)
        assert data != base, f"{name}: the edit changed nothing"
        if plainly is not None:
            named = refusing_clause(data)
            assert named == (plainly or clause), f"{name}: the slow reader names {named}"
        code = self.codes[clause]
        kind = "h" if "hostile" in tags else "f" if code in UNKNOWN else "n"
        expected = {
            "outcome": "unsupported" if code in UNKNOWN else "reject",
            "errors": [self.error(clause, tensor, place(forge, clause, tensor, len(data)))],
        }
        case = Case(f"{kind}-{name}", [], why, data, features_of(base), expected, self.recipe)
        case.twin, case.flags, case.in_force = twin, list(tags), in_force or {}
        return self.add(case, ())

    def either(
        self,
        name: str,
        why: str,
        twin: str,
        edit: Edit,
        *clauses: str,
        accept: bool = False,
        tensor: str | None = None,
    ) -> str:
        """Adds a file for which SPEC.md allows several answers of a reader. Returns its id.

        Args:
            name, why, twin, edit, tensor: as in `invalid`.
            clauses: other clauses by which it may be refused.
            accept: whether it may be accepted too.
        """
        forge = Forge.of(self.cases[twin].data)
        data = edited(forge, edit)
        allowed = list(dict.fromkeys([clause_of(name), *clauses]))
        errors = [self.error(c, tensor, [0, len(data)]) for c in allowed]
        expected: Json = {"outcome": "either" if accept else "reject", "errors": errors}
        case = Case(
            f"i-{name}", [], why, data, features_of(self.cases[twin].data), expected, self.recipe, twin=twin
        )
        if accept:
            case.contents, case.arrays = contents(data)
        else:
            named = refusing_clause(data)
            assert named in allowed, f"{name}: the slow reader names {named}"
        return self.add(case, clauses)

    def applied(self, name: str, why: str, data: bytes, base: str, *clauses: str) -> str:
        """Adds a delta that must be applied to a base. Returns its id.

        Args:
            name, why, data, clauses: as in `valid`.
            base: id of the file that is the base.
        """
        expected: Json = {"outcome": "accept"}
        case = Case(f"y-{name}", [], why, data, features_of(data), expected, self.recipe, base=base)
        case.contents, case.arrays = result_contents(data, self.cases[base].data)
        return self.add(case, clauses)

    def looked_up(self, name: str, why: str, data: bytes, keys: list[bytes], *clauses: str) -> str:
        """Adds a file in whose keyed tables keys must be looked up. Returns its id.

        Args:
            name, why, data, clauses: as in `valid`.
            keys: the keys.
        """
        expected: Json = {"outcome": "accept"}
        case = Case(f"y-{name}", [], why, data, features_of(data), expected, self.recipe, keys=keys)
        case.contents, case.arrays = looked_up_contents(data, keys)
        return self.add(case, clauses)

    def misfit(self, name: str, why: str, twin: str, data: bytes, base: str, tensor: str) -> str:
        """Adds a delta whose application to a base must be refused by the clause in its name. Returns its id.

        Args:
            name, why: as in `invalid`.
            twin: id of a case in which the delta, or one that differs in one edit, fits its base.
            data: the delta, a valid file.
            base: id of the file that is the base.
            tensor: the tensor that the error names.
        """
        slow_reader.read(data)
        clause = clause_of(name)
        named = None
        try:
            result_contents(data, self.cases[base].data)
        except slow_reader.Bad as error:
            named = str(error)
        assert named == clause, f"{name}: the slow reader names {named}"
        expected = {"outcome": "reject", "errors": [self.error(clause, tensor, [0, len(data)])]}
        case = Case(
            f"n-{name}", [], why, data, features_of(data), expected, self.recipe, twin=twin, base=base
        )
        return self.add(case, ())

    def error(self, clause: str, tensor: str | None, offset: list[int]) -> Json:
        """Returns an error that a reader may report."""
        return {"code": self.codes[clause], "clause": clause, "tensor": tensor, "offset": offset}

    def add(self, case: Case, clauses: Iterable[str]) -> str:
        """Adds a case under the clause in its name and further clauses. Returns its id."""
        case.id = slugged(case.id)
        assert case.id not in self.cases, f"{case.id} occurs twice"
        case.clauses = list(dict.fromkeys([clause_of(case.id[2:]), *clauses]))
        unknown = set(case.clauses) - set(self.codes)
        assert not unknown, unknown
        self.cases[case.id] = case
        return case.id


def slugged(case_id: str) -> str:
    """Returns the id with a slug of lower-case letters, digits and single hyphens."""
    kind, area, number, slug = case_id.split("-", 3)
    words = re.sub("[^a-z0-9]+", "-", slug.lower().replace("+", "-plus-")).strip("-")
    assert words, f"{case_id} has no slug"
    return f"{kind}-{area}-{number}-{words}"


def edited(forge: Forge, edit: Edit) -> bytes:
    """Returns the file after an edit: the bytes that the edit returns, or else the file built again."""
    given = edit(forge)
    return given if isinstance(given, bytes) else forge.build()


def clause_of(name: str) -> str:
    """Returns the clause in the name of a case."""
    area, number, _ = name.split("-", 2)
    return f"R-{area}-{number}"


def refusing_clause(data: bytes) -> str | None:
    """Returns the clause by which the slow reader refuses a file; None if it accepts the file."""
    try:
        slow_reader.read(data)
    except slow_reader.Bad as error:
        return str(error)
    return None


def place(forge: Forge, clause: str, tensor: str | None, length: int) -> list[int]:
    """Returns the first and the last file offset that a reader may report for a fault."""
    directory_at = 64 + sum(len(part.data) for part in forge.parts)
    if clause.startswith(IN_CHUNKS) and tensor is not None:
        start = forge.start_of(tensor)
        return [start, start + len(forge.part(tensor).data)]
    return [0, length] if tensor is None else [directory_at, length]
