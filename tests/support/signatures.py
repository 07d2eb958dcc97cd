"""The parameters of the functions in a Python file, which is not imported."""

from __future__ import annotations

import ast
from pathlib import Path


def parameters(path: Path) -> dict[str, list[str]]:
    """Name of a function, or of class and method -> its parameters. Does not import the file."""
    out: dict[str, list[str]] = {}

    def add(prefix: str, node: ast.FunctionDef) -> None:
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        out[prefix + node.name] = [one.arg for one in every if one.arg not in ("self", "cls")]

    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            add("", node)
        elif isinstance(node, ast.ClassDef):
            targets = [one.target for one in node.body if isinstance(one, ast.AnnAssign)]
            fields = [one.id for one in targets if isinstance(one, ast.Name)]
            out[f"{node.name}.__new__"] = fields
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    add(f"{node.name}.", inner)
    return out
