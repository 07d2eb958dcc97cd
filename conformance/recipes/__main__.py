"""Writes the golden files and their manifest, or checks that they are what the recipes give."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

from tests.clauses import clauses_of_spec

from . import suite
from .untestable import UNTESTABLE

FOLDER = Path(__file__).parent.parent
EXAMPLES = """\
examples:
  write cases/ and manifest.json again:   python -m conformance.recipes
  say what would change, write nothing:   python -m conformance.recipes --check
"""


def clause_digests() -> dict[str, str]:
    """Clause -> digest of its text, by which a clause that was changed is noticed."""
    return {
        clause.id: hashlib.sha256(f"{clause.writer}|{clause.reader}|{clause.code}".encode()).hexdigest()[:16]
        for clause in clauses_of_spec()
    }


def files() -> dict[str, bytes]:
    """Path in the suite -> bytes, for every golden file, its contents, and the manifest."""
    cases = suite().cases.values()
    out = {}
    for case in cases:
        out[case.file] = case.data
        if case.contents is not None:
            words = json.dumps(case.contents.description, ensure_ascii=False)
            out[case.contents_file + ".json"] = (words + "\n").encode()
            out[case.contents_file + ".bin"] = case.contents.data
    head = {"$schema": "manifest.schema.json", "suite": 1, "format": "1.0", "clauses": clause_digests()}
    head["untestable"] = UNTESTABLE
    listed = ",\n".join(json.dumps(case.manifest(), ensure_ascii=False) for case in cases)
    text = json.dumps(head, ensure_ascii=False, indent=1)[:-2] + ',\n "cases": [\n' + listed + "\n]}\n"
    out["manifest.json"] = text.encode()
    return out


def differences(made: dict[str, bytes]) -> list[str]:
    """The paths at which the folder is not what the recipes give."""
    there = {p.relative_to(FOLDER).as_posix() for p in (FOLDER / "cases").rglob("*") if p.is_file()}
    there |= {"manifest.json"} & {p.name for p in FOLDER.iterdir()}
    changed = [p for p in there & set(made) if (FOLDER / p).read_bytes() != made[p]]
    return sorted([*(there ^ set(made)), *changed])


def main(words: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        "python -m conformance.recipes",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="exit status 1 where a file would change")
    args = parser.parse_args(words)
    made = files()
    if args.check:
        wrong = differences(made)
        print("\n".join(wrong) or f"{len(made)} files are what the recipes give")
        return 1 if wrong else 0
    shutil.rmtree(FOLDER / "cases", ignore_errors=True)
    for path, data in made.items():
        (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / path).write_bytes(data)
    print(f"{len(made)} files, {sum(map(len, made.values())):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
