"""Runs the tests of the compiled kernels with a check of every access to an array, and records the sources.

It compiles all kernels again, which takes minutes. So a test only compares the record with the sources::

    python -m tests.support.bounds_check
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile

from sfpformat.engines.numba.compiling import compiled_sources

from .clauses import ROOT

FOLDER = ROOT / "tests" / "engines"
RECORD = FOLDER / "bounds_checked.txt"
CHECKED = tuple(
    FOLDER / f"test_numba_{part}.py" for part in ("changes", "encode", "decode", "windows", "keyed")
)


def sources_digest() -> str:
    """Returns a digest of the sources of the kernels, and of the tests that run with checks."""
    digest = hashlib.sha256()
    for path in (*compiled_sources(), *CHECKED):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()


def main() -> int:
    """Runs the command. Returns the exit status of the tests."""
    digest = sources_digest()
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHECKED],
            cwd=ROOT,
            env={
                **os.environ,
                "SFPFORMAT_CHECKED": "1",
                "NUMBA_BOUNDSCHECK": "1",
                "NUMBA_CACHE_DIR": cache,
                "CI": "true",
            },
        )
    if done.returncode == 0:
        RECORD.write_text(f"{digest}\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
