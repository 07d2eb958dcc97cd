"""Whether a barrier that is missing would be noticed without a GPU: ``python -m kernels.barriers``.

In a copy of the repository each barrier of the kernels is taken away in turn, and the test that runs every
kernel on the host must fail.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .shim import FOLDER

_COPIED = ("kernels", "sfpformat", "tests", "pyproject.toml")
_TEST = ("tests/test_cuda_decode.py", "-k", "every_kernel_decodes")


def barriers(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """Each barrier: its file, and where its call begins and ends in the text."""
    for path in sorted(folder.glob("*.cu*")):
        for found in re.finditer(r"__sync(?:warp|threads)\(\)(?=;)", path.read_text()):
            yield path, found.start(), found.end()


def is_noticed(root: Path, path: Path, start: int, stop: int) -> bool:
    """Whether the test fails without a barrier."""
    text = path.read_text()
    path.write_text(text[:start] + text[stop:])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *_TEST]
    done = subprocess.run(command, cwd=root, capture_output=True, check=False)
    path.write_text(text)
    return done.returncode != 0


def main() -> int:
    """The command."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in _COPIED:
            source = FOLDER.parent / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, root / name)
        missed = 0
        for path, start, stop in list(barriers(root / "kernels")):
            noticed = is_noticed(root, path, start, stop)
            missed += not noticed
            line = path.read_text()[:start].count("\n") + 1
            print(f"{path.name}, line {line}: {'noticed' if noticed else 'MISSED'}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
