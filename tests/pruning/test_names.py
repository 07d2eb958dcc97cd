"""The names of `sfpformat.pruning`: complete, imported lazily, and without torch before that."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sfpformat.pruning

NUMPY_ALONE = ("repruning", "grades", "masks", "thresholds")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_lazy_names_match_their_modules_and_the_type_checker() -> None:
    source = Path(sfpformat.pruning.__file__).read_text(encoding="utf-8")
    seen = {
        alias.name: node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert seen == sfpformat.pruning._MODULE_OF
    assert sorted(sfpformat.pruning.__all__) == sorted(seen)
    for name, module in seen.items():
        found = getattr(sfpformat.pruning, name)
        __import__(f"sfpformat.pruning.{module}")
        assert found is getattr(sys.modules[f"sfpformat.pruning.{module}"], name)
        assert name in dir(sfpformat.pruning)
    absent = "guess"
    with pytest.raises(AttributeError, match=absent):
        getattr(sfpformat.pruning, absent)


def test_a_lazy_name_is_the_same_object_after_its_module_is_imported() -> None:
    for name in sfpformat.pruning._MODULE_OF:
        assert name not in sfpformat.pruning._NAMES, f"{name} is a module too"


def test_names_that_need_only_numpy_do_not_import_torch() -> None:
    names = [name for module in NUMPY_ALONE for name in sfpformat.pruning._NAMES[module]]
    ended = run(
        f"import sys; from sfpformat.pruning import {', '.join(names)}; print('torch' in sys.modules)"
    )
    assert ended.stdout == "False\n", ended.stderr


@pytest.mark.parametrize("module", ["sfpformat.torch", "sfpformat.pruning"])
def test_without_torch_an_import_raises_with_what_to_install(module: str) -> None:
    ended = run(f"import sys; sys.modules['torch'] = None; from {module} import save_model, prune")
    assert ended.stderr.splitlines()[-1].endswith("needs torch: pip install 'sfpformat[torch]'")
