"""The layers of the package: no import leads upward, and imports form no cycle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest

from .support.clauses import ROOT

# From the bottom up. A module may import from its own layer and from those before it.
LAYERS = (
    ("dtypes", "errors"),
    ("limits", "names"),
    ("coding",),
    ("container", "io", "options"),
    ("engines",),
    ("decode",),
    ("encode",),
    ("deltas", "keyed"),
    ("", "numpy", "sklearn", "torch"),  # "" is the package's own __init__
    ("hf", "pruning"),
    ("serving",),
    ("demo",),
    ("bench",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


@cache
def imports() -> dict[str, dict[str, bool]]:
    """Module -> the modules of the package that it imports -> whether as soon as it is imported itself."""
    paths = {}
    for path in (ROOT / "sfpformat").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    out: dict[str, dict[str, bool]] = {}
    for module, path in paths.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found = out.setdefault(module, {})
        for node, at_once in _import_statements(ast.parse(path.read_text("utf-8")), True):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                target = whole if whole in paths else base
                if target in paths and target != module:
                    found[target] = found.get(target, False) or at_once
    return out


def _import_statements(node: ast.AST, at_once: bool) -> Iterator[tuple[ast.ImportFrom, bool]]:
    """The ``from`` imports under a node, and whether each is run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom):
            yield child, at_once
        lazy = isinstance(child, ast.FunctionDef) or (
            isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        )
        yield from _import_statements(child, at_once and not lazy)


def room(module: str) -> str:
    """The folder or module directly in the package that a module is in; "" is the package itself."""
    return module.split(".")[1] if "." in module else ""


def test_every_folder_has_a_layer_and_every_layer_a_folder() -> None:
    assert {room(module) for module in imports()} == LEVEL.keys()


def test_no_import_leads_upward() -> None:
    upward = [
        (module, target)
        for module, targets in imports().items()
        for target in targets
        if LEVEL[room(target)] > LEVEL[room(module)]
    ]
    assert not upward


def test_no_imports_form_a_cycle_lazy_ones_included() -> None:
    graph = {module: list(targets) for module, targets in imports().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")
