"""The tests of the Numba engine once more, with kernels that check the bounds of arrays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfpformat.engines.numba.compiling import kernel
from sfpformat.engines.numba.unaligned import load64

from ..support.clauses import ROOT

FOLDER = Path(__file__).parent
# One process for all files: compiling the kernels takes longer than running the tests.
CHECKED = (Path(__file__), FOLDER / "test_numba_decode.py", FOLDER / "test_numba_encode.py")


@kernel
def load_one(array: Any, offset: int) -> Any:
    return load64(array, offset)


def test_bounds_checked_kernels_access_no_array_out_of_bounds(tmp_path: Path) -> None:
    if os.environ.get("SFPFORMAT_CHECKED"):  # this is that process
        with pytest.raises(IndexError):
            load_one(np.zeros(8, np.uint8), 1)
        return
    checked = {
        **os.environ,
        "SFPFORMAT_CHECKED": "1",
        "NUMBA_BOUNDSCHECK": "1",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHECKED],
        cwd=ROOT,
        env=checked,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
