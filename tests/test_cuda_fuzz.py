"""The kernels under the sanitisers of addresses and of undefined behaviour; `kernels.fuzz` does more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kernels import fuzz

ROOT = Path(__file__).parent.parent

# Reads a byte after some memory, which the sanitiser must see: else it is not there.
OUTSIDE = """
import ctypes
from kernels import fuzz, shim
device = shim.HostDevice(shim.build(shim.CHECKED), poison=True)
memory, elsewhere = device.allocate(64), device.allocate(64)
device.copy(elsewhere.address, memory.address + 1, 64)
device.finish()
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=fuzz.checked_environment(), capture_output=True, text=True
    )


def test_damaged_chunks_are_judged_as_by_the_reference_and_nothing_else_is_touched() -> None:
    done = run("-m", "kernels.fuzz", "--inputs", "400", "--seed", "7")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "400 damaged inputs judged as by the reference" in done.stdout


def test_the_sanitiser_sees_an_access_outside() -> None:
    done = run("-c", OUTSIDE)
    assert done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr
