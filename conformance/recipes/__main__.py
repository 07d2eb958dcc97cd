"""Writes the golden files and their manifest, or checks that they equal what the recipes create."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from sfp_conformance.finds import written

from conformance.clauses import clauses_of_spec

from . import suite
from .suite import Case

FOLDER = Path(__file__).parent.parent


def clause_digests() -> dict[str, str]:
    """Returns clause -> digest of its row in SPEC.md, to detect changes of its text."""
    rows = {c.id: "|".join((c.writer, c.reader, c.code)) for c in clauses_of_spec()}
    return {name: hashlib.sha256(row.encode()).hexdigest()[:16] for name, row in rows.items()}


def regressions(folder: Path) -> list[Any]:
    """Returns the manifest entries of saved finds (`sfp conformance fuzz --save`).

    Raises:
        ValueError: the digest of a file differs from its entry.
    """
    entries = [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.entry.json"))]
    for entry in entries:
        data = (folder / f"{entry['id']}.sfp").read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(f"{entry['id']}: the digest of the file differs from its entry")
    return entries


def files_of(cases: list[Case], digests: dict[str, str]) -> dict[str, bytes]:
    """Returns path in the suite -> bytes: golden files, the files beside them, and the manifest."""
    out = {case.file: case.data for case in cases}
    out |= {f"{case.stem}.json": written(case.contents) for case in cases if case.contents is not None}
    out |= {f"{case.stem}.bin": case.arrays for case in cases if case.arrays is not None}
    head = {"$schema": "manifest.schema.json", "suite": 1, "format": "1.0", "clauses": digests}
    entries = [*(case.manifest() for case in cases), *regressions(FOLDER / "regress")]
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    listed = ",\n".join(lines)
    out["manifest.json"] = (json.dumps(head)[:-1] + ', "cases": [\n' + listed + "\n]}\n").encode()
    return out


def kept_manifest() -> dict[str, Any]:
    """Returns the existing manifest, or an empty one."""
    path = FOLDER / "manifest.json"
    empty: dict[str, Any] = {"clauses": {}, "cases": []}
    return json.loads(path.read_bytes()) if path.exists() else empty


def stale(manifest: dict[str, Any]) -> list[str]:
    """Returns the cases of clauses whose text changed after the manifest was written."""
    now = clause_digests()
    changed = {name for name, digest in manifest["clauses"].items() if now.get(name) != digest}
    return [case["id"] for case in manifest["cases"] if changed & set(case["clauses"])]


def differences(made: dict[str, bytes]) -> list[str]:
    """Returns the paths at which the folder differs from what the recipes create."""
    there = {p.relative_to(FOLDER).as_posix() for p in (FOLDER / "cases").rglob("*") if p.is_file()}
    there |= {"manifest.json"} if (FOLDER / "manifest.json").exists() else set()
    changed = [p for p in there & set(made) if (FOLDER / p).read_bytes() != made[p]]
    return sorted([*(there ^ set(made)), *changed])


def main(words: list[str]) -> int:
    """Runs the command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m conformance.recipes", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a file differs")
    parser.add_argument("--write", action="store_true", help="write the files (the default)")
    parser.add_argument("--reviewed", action="store_true", help="the cases of changed clauses were reviewed")
    given = parser.parse_args(words)
    kept = kept_manifest()
    old = stale(kept)
    if old and not given.reviewed:
        print(f"the text of their clauses changed: {', '.join(old)}\nreview these cases, then use --reviewed")
        return 1
    made = files_of(list(suite().cases.values()), clause_digests())
    if given.check:
        wrong = differences(made)
        print("\n".join(wrong) if wrong else f"{len(made)} files equal what the recipes create")
        return 1 if wrong else 0
    shutil.rmtree(FOLDER / "cases", ignore_errors=True)
    for path, data in made.items():
        (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / path).write_bytes(data)
    print(f"{len(made) - 1} files, {sum(map(len, made.values())):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
