"""Lists the clauses of SPEC.md and the tests of each.

A test names its clauses with the decorator `clauses`. The listing reads SPEC.md and the source of the tests,
and imports neither the tests nor the package::

    python -m tests.support.clauses            # every clause and its tests
    python -m tests.support.clauses --missing  # the clauses without a test; exit status 1 if there are any
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

from conformance.clauses import IN_CHUNKS, ROOT, SPEC, Clause, clauses_of_spec, table_rows

__all__ = ["IN_CHUNKS", "ROOT", "SPEC", "Clause", "clauses", "clauses_of_spec", "table_rows"]


# Clauses that no test of this package can check -> the reason.
UNTESTED: dict[str, str] = {}

F = TypeVar("F", bound=Callable[..., object])


def clauses(*ids: str) -> Callable[[F], F]:
    """Marks a test with the clauses of SPEC.md that it checks. Only the listing reads the mark."""

    def mark(function: F) -> F:
        return function

    return mark


@dataclass(frozen=True)
class MarkedTest:
    """A test function: its place, the clauses that it names, and the strings in its body and data."""

    place: str
    ids: tuple[str, ...]
    strings: frozenset[str]


def marked_tests() -> list[MarkedTest]:
    """Returns all test functions that name clauses."""
    folder = ROOT / "tests"
    found = []
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.FunctionDef):
                marks = [mark for mark in node.decorator_list if _is_mark(mark)]
                constants = [arg for mark in marks for arg in mark.args if isinstance(arg, ast.Constant)]
                ids = [str(constant.value) for constant in constants]
                if ids:
                    place = f"{path.relative_to(folder.parent)}:{node.lineno} {node.name}"
                    rest = [n for n in ast.iter_child_nodes(node) if n not in marks]
                    found.append(MarkedTest(place, tuple(ids), _strings(rest)))
    return found


def _is_mark(node: ast.expr) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "clauses"


def _strings(nodes: list[ast.AST]) -> frozenset[str]:
    inner = (leaf for node in nodes for leaf in ast.walk(node))
    return frozenset(
        leaf.value for leaf in inner if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)
    )


def missing(spec: list[Clause], tests: list[MarkedTest]) -> list[str]:
    """Returns the clauses that no test names and that are not in `UNTESTED`."""
    named = {clause for test in tests for clause in test.ids}
    return [clause.id for clause in spec if clause.id not in named and clause.id not in UNTESTED]


def main(arguments: list[str]) -> int:
    """Runs the command. Returns the exit status."""
    spec, tests = clauses_of_spec(), marked_tests()
    gaps = missing(spec, tests)
    if "--missing" in arguments:
        print("\n".join(gaps))
        return 1 if gaps else 0
    for clause in spec:
        print(clause.id, UNTESTED.get(clause.id, ""))
        for test in tests:
            if clause.id in test.ids:
                print(f"    {test.place}")
    return 1 if gaps else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
