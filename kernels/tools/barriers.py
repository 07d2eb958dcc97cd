"""Checks that tests without a GPU detect a missing barrier: ``python -m kernels.tools.barriers``.

Works in a copy of the repository. Removes each barrier of the kernels, and each wait for copies, in turn; the
tests that run every kernel on the host must fail. Skips barriers that are marked as being for other blocks or
before a shuffle: the host runs one block after the other, and its lanes wait at a shuffle.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .shim import SOURCE

_COPIED = ("conformance", "kernels", "sfpformat", "tests", "pyproject.toml")
_FILES = ("tests/cuda/test_decode.py", "tests/cuda/test_product.py", "tests/cuda/test_deltas.py")
_TESTS = (*_FILES, "-k", "every_kernel or unit_vectors or several_slices")
_WAITS = "__syncwarp", "__syncthreads", "wait_for_copies", r"wait_for_all_but<\d>"
_LEFT_ALONE = r";  // (?:for other blocks|before a shuffle)"
_CALL = re.compile(rf"(?<= )(?:{'|'.join(_WAITS)})\(\)(?=;)(?!{_LEFT_ALONE})")


def barriers(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """Yields for each barrier its file, and the start and end of its call in the text."""
    for path in sorted(folder.glob("*.cu*")):
        for found in _CALL.finditer(path.read_text()):
            yield path, found.start(), found.end()


def fails(root: Path) -> bool:
    """Returns whether the tests fail in a copy of the repository.

    Raises:
        RuntimeError: the tests did not run.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *_TESTS]
    parts = (str(root), str(root / "conformance"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(parts)}
    done = subprocess.run(command, cwd=root, capture_output=True, check=False, env=environment, text=True)
    if done.returncode > 1:
        raise RuntimeError(done.stdout + done.stderr)
    return done.returncode == 1


def is_noticed(root: Path, path: Path, start: int, stop: int) -> bool:
    """Returns whether the tests fail without a barrier. Restores the file."""
    text = path.read_text()
    path.write_text(text[:start] + text[stop:])
    noticed = fails(root)
    path.write_text(text)
    return noticed


def main() -> int:
    """Runs the command. Returns the exit code: 1 if a missing barrier was not detected."""
    parser = argparse.ArgumentParser(prog="python -m kernels.tools.barriers", description=__doc__)
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="source files, such as product.cuh (default: all)"
    )
    wanted = parser.parse_args().files
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in _COPIED:
            source = SOURCE.parents[1] / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, root / name)
        if fails(root):
            print("the tests fail with all barriers in place: nothing can be concluded", file=sys.stderr)
            return 1
        missed = 0
        for path, start, stop in list(barriers(root / SOURCE.relative_to(SOURCE.parents[1]))):
            if wanted and path.name not in wanted:
                continue
            noticed = is_noticed(root, path, start, stop)
            missed += not noticed
            line = path.read_text()[:start].count("\n") + 1
            print(f"{path.name}, line {line}: {'noticed' if noticed else 'MISSED'}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
