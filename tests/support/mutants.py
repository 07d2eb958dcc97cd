"""Mutant readers: disables each check of the reference reader in turn; a golden file must then fail.

A check is an ``if`` whose body raises `fault` with a clause, or a call of a function that checks something
for a clause. In the compiled code of the function, the condition becomes False, or the call is removed. Then
reader and validator process the cases of the clause. A case kills the mutant if its result differs from the
manifest::

    python -m tests.support.mutants            # surviving mutants; exit status 1 if there are any
    python -m tests.support.mutants --verbose  # every mutant, with the case that kills it
"""

from __future__ import annotations

import ast
import importlib
import signal
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfpformat.decode.validate import validate
from sfpformat.errors import FileFault

from .clauses import ROOT
from .conformance_cases import Case, cases, data_of, limits_of, refusal, refusal_of_result
from .reader_modules import reader_modules

_SECONDS = 5.0  # for one file, because a reader without a check may not terminate

# Checks that another check repeats for every possible file: function and clause -> the other check.
REPEATED = {
    ("CodeTable.__post_init__", "R-TAB-004"): "the bytes of `codes` are measured before they are lengths",
    ("require_bits", "R-IDX-003"): "the index is checked against the chunk before its planes are read",
    ("_directory_faults", "R-LIM-002"): "the reader has refused the file by then; this bounds what is read",
    ("_require_numbers", "R-DLT-020"): "a level without a number is above every bound of its table",
    ("parse_head", "R-IDX-003"): "where header or index do not fit, neither do the planes behind them",
}


@dataclass(frozen=True)
class Mutant:
    """A check that can be disabled.

    Attributes:
        module: name of its module in the package.
        function: qualified name of its function.
        line: its line number.
        clauses: the clauses by which it refuses files.
    """

    module: str
    function: str
    line: int
    clauses: tuple[str, ...]

    @property
    def place(self) -> str:
        """The place of the check, for the report."""
        return f"sfpformat/{self.module.replace('.', '/')}.py:{self.line} {self.function}"


def mutants() -> list[Mutant]:
    """Returns all checks, in the order of the modules."""
    out = []
    for module in reader_modules():
        for function, node in _checks(_tree(module)):
            out.append(Mutant(module, function, node.lineno, _clauses_of(node)))
    return out


def _tree(module: str) -> ast.Module:
    path = ROOT / "sfpformat" / Path(*module.split(".")).with_suffix(".py")
    return ast.parse(path.read_text("utf-8"), str(path))


def _checks(tree: ast.AST, inside: tuple[str, ...] = ()) -> Iterator[tuple[str, ast.If | ast.Expr]]:
    """Yields each check with its function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield from _checks(node, (*inside, node.name))
            continue
        if isinstance(node, (ast.If, ast.Expr)) and _clauses_of(node) and inside:
            yield ".".join(inside), node
        yield from _checks(node, inside)


def _clauses_of(node: ast.If | ast.Expr) -> tuple[str, ...]:
    """Returns the clauses by which a check refuses files. A nested ``if`` is a check of its own."""
    if isinstance(node, ast.If):
        return tuple(c for s in node.body if isinstance(s, ast.Raise) for c in _constants(s))
    if not isinstance(node.value, ast.Call):
        return ()
    called = node.value.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    if not name.lstrip("_").startswith("require"):
        return ()
    owner = called.value if isinstance(called, ast.Attribute) else None
    limits = isinstance(owner, ast.Name | ast.Attribute) and ast.unparse(owner).endswith("limits")
    return ("R-LIM-002",) if limits else _constants(node)


def _constants(node: ast.AST) -> tuple[str, ...]:
    """Returns the clauses in the strings of a node."""
    found = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    return tuple(value for value in found if isinstance(value, str) and value.startswith("R-"))


@contextmanager
def disabled(mutant: Mutant) -> Iterator[None]:
    """Context in which the check is disabled."""
    tree = _tree(mutant.module)
    for function, node in _checks(tree):
        if (function, node.lineno) == (mutant.function, mutant.line):
            if isinstance(node, ast.If):
                node.test = ast.copy_location(ast.Constant(False), node.test)
            else:
                node.value = ast.copy_location(ast.Constant(None), node.value)
    code = compile(tree, mutant.place, "exec", dont_inherit=True)
    for name in mutant.function.split("."):
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)
    target = _function(mutant)
    kept = target.__code__
    target.__code__ = code
    try:
        yield
    finally:
        target.__code__ = kept


def _function(mutant: Mutant) -> Any:
    """Returns the function object without decorators. Does not find functions inside of functions."""
    found: Any = importlib.import_module(f"sfpformat.{mutant.module}")
    for name in mutant.function.split("."):
        found = vars(found)[name] if isinstance(found, type) else getattr(found, name)
    found = getattr(found, "__func__", found)
    found = found.fget if isinstance(found, property) else found
    return getattr(found, "__wrapped__", found)


def killer(mutant: Mutant, by_clause: dict[str, list[Case]]) -> str | None:
    """Returns the first case of the mutant's clauses whose result differs from the manifest."""
    with disabled(mutant):
        for clause in mutant.clauses:
            for case in by_clause.get(clause, ()):
                if _is_judged_otherwise(case):
                    return str(case["id"])
    return None


def _is_judged_otherwise(case: Case) -> bool:
    data, limits = data_of(case), limits_of(case)
    right = {(error["code"], error["clause"]) for error in case["expected"].get("errors", ())}
    try:
        with _within(_SECONDS):
            if "base" in case:
                refused = refusal_of_result(case)
                return refused is None or (refused.code, refused.clause) not in right
            found = refusal(data, limits)
            report = validate(data, limits=limits, engine="python")
    except FileFault:
        return False
    except Exception:  # a reader without a check may raise anything
        return True
    faults = {(fault.code, fault.clause) for fault in report.faults}
    return found is None or (found.code, found.clause) not in right or not right & faults


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after some seconds."""

    def ring(*_: object) -> None:
        raise TimeoutError

    kept = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)


def cases_by_clause() -> dict[str, list[Case]]:
    """Returns the cases that must be refused, by their first clause, small files first."""
    out: dict[str, list[Case]] = {}
    for case in sorted(cases("nhf"), key=lambda case: int(case["bytes"])):
        if case["expected"]["outcome"] != "accept":
            out.setdefault(case["clauses"][0], []).append(case)
    return out


def survivors(every: list[Mutant], *, verbose: bool = False) -> list[Mutant]:
    """Returns the mutants that no case kills."""
    by_clause, out = cases_by_clause(), []
    for mutant in every:
        found = killer(mutant, by_clause)
        if found is None:
            out.append(mutant)
        if verbose:
            print(f"{mutant.place}: {', '.join(mutant.clauses)}: {found or 'survives'}")
    return out


def is_repeated(mutant: Mutant) -> bool:
    """Returns whether another check refuses the same files by the same clause."""
    return any((mutant.function, clause) in REPEATED for clause in mutant.clauses)


def main(words: list[str]) -> int:
    """Runs the command. Returns the exit status."""
    every = mutants()
    left = survivors(every, verbose="--verbose" in words)
    wrong = [mutant for mutant in left if not is_repeated(mutant)]
    for mutant in wrong:
        print(f"survives: {mutant.place}: {', '.join(mutant.clauses)}")
    print(
        f"{len(every)} mutants: {len(every) - len(left)} killed, {len(left) - len(wrong)} repeated by others"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
