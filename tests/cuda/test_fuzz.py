"""The kernels under the sanitisers for addresses and undefined behaviour; `kernels.tools.fuzz` does more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from kernels.tools import fuzz, shim
from kernels.tools.changes import Comparison, random_comparison
from sfpformat.engines import get_engine
from sfpformat.engines.cuda import kernel_source
from sfpformat.engines.cuda.recipe import KERNELS, kernel_of
from sfpformat.engines.device_interface import Content

from ..support.programs import needs

pytestmark = needs("g++")

ROOT = Path(__file__).parents[2]

# Reads a byte after the end of allocated memory. The sanitiser must report it; otherwise it is not active.
OUTSIDE = """
import ctypes
from kernels.tools import fuzz, shim
device = shim.HostDevice(shim.build(shim.CHECKED), poison=True)
memory, elsewhere = device.allocate(64), device.allocate(64)
device.copy(elsewhere.address, memory.address + 1, 64)
device.finish()
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=fuzz.checked_environment(), capture_output=True, text=True
    )


def test_damaged_chunks_give_the_fault_of_the_reference_and_no_access_outside() -> None:
    done = run("-m", "kernels.tools.fuzz", "--inputs", "400", "--seed", "7", "--golden", "40")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "chunks of golden files" in done.stdout
    assert "400 damaged inputs gave the result of the reference" in done.stdout


def test_the_sanitiser_reports_an_access_outside() -> None:
    done = run("-c", OUTSIDE)
    assert done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr


def test_chunks_for_every_kernel_are_damaged() -> None:
    samples = fuzz.samples(get_engine("python"))
    damaged = {kernel_of(sample.decoder.entry) for sample in samples}
    contents = {content for sample in samples for content in fuzz.contents_of(sample)}
    damaged |= {KERNELS[content] for content in contents if content is not Content.WEIGHTS}
    others = {"fill_tables", "index_chunks", "place_matrix", "multiply_bf16", "multiply_f16", "multiply_f32"}
    others |= {f"{kernel}_{item}" for kernel in ("count_keys", "place_changes") for item in (1, 2, 4, 8)}
    others |= {"sum_keys", "flip_elements"}
    assert damaged | others == set(kernel_source.kernels())
    device, rng = shim.HostDevice(), np.random.default_rng(0)
    multiplied = [sample.compare(sample.data) for sample in fuzz.product_samples(device)]
    assert all(multiplied)
    comparison = Comparison(device)
    fit = {random_comparison(comparison, rng, damaged=True) for _ in range(20)}
    assert fit == {False, True}
    assert others - set(device.launched) == {"fill_tables"}  # no stream has a code
