"""The engine for GPUs against the reference on whatever device there is: bits, faults, products, tools."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sfpformat
from sfpformat import PRESETS
from sfpformat.engines.cuda.device import Device
from sfpformat.errors import FileFault, SfpError
from sfpformat.numpy import save

from .inputs import damaged_file, files
from .ondevice import NUMPY, SUMMING, Multiplication, OnDevice, excess

# Golden files, where this is a clone.
CASES = Path(__file__).parent.parent / "conformance" / "cases"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_FUSED = PRESETS["fused"].but(quantiser="table", centroids=8)
# Rows, columns, survivors a position, scale, rows of x: of every kind that the kernels tell apart.
_PRODUCTS: tuple[tuple[int, int, float, Any, int], ...] = (
    (64, 1024, 0.5, None, 1),
    (150, 3200, 0.5, None, 3),
    (130, 2048, 0.1, "row", 8),
    (70, 1152, 1.0, 128, 2),
    (1000, 4096, 0.5, None, 8),
)


def outcome(data: bytes, engine: str) -> Any:
    """The bits of a file's tensors, or its fault."""
    try:
        with sfpformat.open(data, engine=engine, threads=1) as file:
            return [array.tobytes() for array in file.get_tensors().values()]
    except FileFault as fault:
        return fault.code, fault.clause, fault.offset
    except SfpError as error:  # a limit, say
        return type(error).__name__, str(error)


def golden_files(every: int = 1) -> Iterator[bytes]:
    """The golden files that are single files, or every so many of them."""
    for path in sorted(CASES.rglob("*.sfp"))[::every]:
        yield path.read_bytes()


def files_to_compare(damaged: int, every: int = 1) -> Iterator[bytes]:
    """Golden files; files of every kind, small and of many tiles; damaged ones, their checksums mended."""
    yield from golden_files(every)
    small = [data for _, data in files(every=every)]
    yield from small
    yield from (data for _, data in files(24, 700, chunk=1 << 13, every=every))
    rng = np.random.default_rng(3)
    for i in range(damaged):
        yield damaged_file(small[i % len(small)], rng)


def compare_with_reference(damaged: int, every: int = 1) -> int:
    """How many files the engine gave as the reference; raises AssertionError at one that it did not."""
    count = 0
    for data in files_to_compare(damaged, every):
        assert outcome(data, "cuda") == outcome(data, "python"), f"file {count} differs"
        count += 1
    return count


def compare_products(device: Device, every: int = 1) -> list[dict[str, Any]]:
    """What products of several shapes came to, of the largest too where ``every`` is 1.

    Raises:
        AssertionError: one is off, or does not always have the same bits.
    """
    found = []
    for rows, columns, density, scale, batch in _PRODUCTS[: None if every == 1 else -1]:
        rng = np.random.default_rng(rows)
        dense = rng.standard_normal((rows, columns), np.float32) * (rng.random((rows, columns)) < density)
        for name, dtype in NUMPY.items():
            data = save({"w": dense.astype(dtype)}, options=_FUSED.but(scale=scale))
            with sfpformat.open(data) as file:
                there, weight = OnDevice(file, file.entry("w"), device), file.get_tensor("w")
            placed = there.place(name)
            assert placed is not None, f"{name} {rows}×{columns}: not multiplied"
            x, bias = (
                rng.standard_normal((batch, columns)).astype(dtype),
                rng.standard_normal(rows).astype(dtype),
            )
            product = Multiplication(device, placed, x, bias)
            result = product.result()
            off = excess(result, x, weight, bias)
            assert off <= SUMMING, f"{name} {rows}×{columns}: off by {off}"
            assert all(product.result().tobytes() == result.tobytes() for _ in range(5)), (
                f"{name}: other bits"
            )
            unit = Multiplication(device, placed, np.eye(batch, columns, 7).astype(dtype), None).result()
            assert unit.tobytes() == (weight.T[7 : 7 + batch] + 0).tobytes(), f"{name}: other weights"
            found.append({"dtype": name, "shape": [rows, columns], "batch": batch, "off": off})
    return found


def sanitize(tool: str, arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """What a tool of compute-sanitizer says of some identity checks.

    Raises:
        RuntimeError: it is not installed, it found something, or there was not enough time.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise RuntimeError("compute-sanitizer is not installed")
    command = [
        program,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "kernels.check",
        *arguments,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done within {seconds:.0f} s") from None
    last = (done.stdout + done.stderr).strip().splitlines()[-3:]
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {' | '.join(last)}")
    return {"said": " | ".join(last)}
