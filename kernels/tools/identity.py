"""Compares the CUDA engine with the reference on a device: bits, faults, masks, products, deltas, layers."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sfpformat
from sfpformat import PRESETS, Options, Table
from sfpformat.engines.cuda.device import Device
from sfpformat.errors import FileFault, SfpError
from sfpformat.io.checksum import crc32
from sfpformat.numpy import save

from .changes import Comparison, random_comparison
from .inputs import damaged_file, files
from .ondevice import NUMPY, SUMMING, Multiplication, OnDevice, excess

# Golden files; only a clone has them.
CASES = Path(__file__).parents[2] / "conformance" / "cases"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_FUSED = PRESETS["fused"].but(quantiser=Table(centroids=8))
# Rows, columns, share of survivors, scale, rows of x: every kind that the product kernels distinguish.
_PRODUCTS: tuple[tuple[int, int, float, Any, int], ...] = (
    (64, 1024, 0.5, None, 1),
    (150, 3200, 0.5, None, 3),
    (130, 2048, 0.1, "row", 8),
    (70, 1152, 1.0, 128, 2),
    (1000, 4096, 0.5, None, 8),
)


def outcome(data: bytes, engine: str) -> Any:
    """Returns the bits of a file's tensors, or its fault."""
    try:
        with sfpformat.open(data, engine=engine, threads=1) as file:
            return [array.tobytes() for array in file.get_tensors().values()]
    except FileFault as fault:
        return fault.code, fault.clause, fault.offset
    except SfpError as error:  # for example a limit
        return type(error).__name__, str(error)


def golden_files(every: int = 1) -> Iterator[bytes]:
    """Yields every ``every``-th of the golden files that are single files."""
    for path in sorted(CASES.rglob("*.sfp"))[::every]:
        yield path.read_bytes()


def files_to_compare(damaged: int, every: int = 1) -> Iterator[bytes]:
    """Yields golden files, files of every kind, small and large, and damaged files with correct checksums."""
    yield from golden_files(every)
    small = [data for _, data in files(every=every)]
    yield from small
    yield from (data for _, data in files(24, 700, chunk=1 << 13, every=every))
    rng = np.random.default_rng(3)
    for i in range(damaged):
        yield damaged_file(small[i % len(small)], rng)


def compare_with_reference(damaged: int, every: int = 1) -> int:
    """Compares the engine with the reference on many files. Returns the number of files.

    Raises:
        AssertionError: some files differ; the message describes the first.
    """
    count, first, others = 0, "", 0
    for data in files_to_compare(damaged, every):
        found, expected = outcome(data, "cuda"), outcome(data, "python")
        if found != expected:
            others += 1
            first = first or f"file {count}: {_short(found)}, by the reference {_short(expected)}"
        count += 1
    assert not others, f"{others} of {count} files differ; {first}"
    return count


def compare_contents(damaged: int, every: int = 1, where: str = "cuda") -> int:
    """Compares masks and importances decoded on a device with the reference's. Returns the number of files.

    Raises:
        AssertionError: some differ; the message names the first.
    """
    api: Any = importlib.import_module("sfpformat.torch")

    def contents(data: bytes, device: str, engine: str) -> Any:
        found: list[Any] = []
        try:
            with api.safe_open(data, device=device, engine=engine, threads=1) as file:
                for name in file:
                    for part in (file.get_mask(name), file.get_importance(name)):
                        found.append(None if part is None else part.cpu().numpy().tobytes())
        except FileFault as fault:
            return found, (fault.code, fault.clause, fault.offset)
        except SfpError as error:  # for example a limit
            return found, (type(error).__name__, str(error))
        return found

    count = 0
    for data in files_to_compare(damaged, every):
        found, expected = contents(data, where, "cuda"), contents(data, "cpu", "python")
        assert found == expected, f"file {count}: another mask or importance, or another fault"
        count += 1
    return count


def _short(found: Any) -> str:
    """Describes the outcome of a file briefly."""
    if isinstance(found, tuple):
        return " ".join(map(str, found))
    return f"tensors of {', '.join(map(str, map(len, found)))} bytes with CRC {crc32(b''.join(found)):08x}"


def compare_products(device: Device, every: int = 1) -> list[dict[str, Any]]:
    """Checks products of several shapes; the largest only if ``every`` is 1. Returns their errors.

    Raises:
        AssertionError: a product is inaccurate, or its bits differ from run to run.
    """
    found = []
    for rows, columns, density, scale, batch in _PRODUCTS[: None if every == 1 else -1]:
        rng = np.random.default_rng(rows)
        dense = rng.standard_normal((rows, columns), np.float32) * (rng.random((rows, columns)) < density)
        for name, dtype in NUMPY.items():
            data = save(
                {"w": dense.astype(dtype)}, options=_FUSED.but(quantiser=Table(centroids=8, scale=scale))
            )
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


def compare_deltas(device: Device, blocks: int, seed: int = 0) -> int:
    """Compares the changes of random and damaged blocks of deltas. Returns how many of the calls fit.

    Raises:
        AssertionError: device and reference disagree.
    """
    comparison, rng = Comparison(device), np.random.default_rng(seed)
    return sum(random_comparison(comparison, rng, damaged=i % 2 == 1) for i in range(blocks))


def compare_layers(where: str = "cuda") -> int:
    """Compares compressed layers with dense layers on a device. Returns the number of calls compared.

    Raises:
        AssertionError: a result differs.
    """
    torch: Any = importlib.import_module("torch")
    api: Any = importlib.import_module("sfpformat.torch")
    array_of = importlib.import_module("sfpformat.torch.tensors").array_of
    torch.manual_seed(0)
    count = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for options in (_FUSED, PRESETS["gpu"], Options()):
            dense = torch.nn.Linear(1152, 300, dtype=dtype)
            with torch.no_grad():
                dense.weight.mul_(torch.rand(300, 1152) < 0.5)
            layer = api.SfpLinear.of(dense, options).to(where)
            dense.weight = torch.nn.Parameter(api.load(layer.weight_sfp.cpu().numpy().tobytes())["weight"])
            dense = dense.to(where)
            torch.compiler.reset()  # torch limits the number of cached compilations
            compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
            for batch in (1, 8, 33):
                x = torch.randn(batch, 1152, dtype=dtype, device=where, requires_grad=True)
                wanted, found = dense(x), layer(x)
                if options is _FUSED and batch <= 8:
                    off = excess(*(array_of(t.detach().cpu()) for t in (found, x, dense.weight, dense.bias)))
                    assert off <= SUMMING, f"{dtype}, {batch} rows: off by {off}"
                else:
                    assert torch.equal(found, wanted), f"{dtype}, {batch} rows: the weights differ"
                assert torch.equal(compiled(x), found), f"{dtype}, {batch} rows: the compiled layer differs"
                gradient = torch.randn_like(wanted)
                (one,), (other,) = (torch.autograd.grad(y, x, gradient) for y in (found, wanted))
                assert torch.equal(one, other), f"{dtype}, {batch} rows: the gradient differs"
                count += 1
        rows = torch.nn.Embedding(3000, 96, dtype=dtype)
        embedding, ids = api.SfpEmbedding.of(rows).to(where), torch.randint(3000, (7, 5))
        for some in (ids, ids.new_zeros(0), torch.arange(3000)):
            assert torch.equal(embedding(some.to(where)).cpu(), rows(some)), f"{dtype}: other rows"
            count += 1
    return count


def sanitize(tool: str, arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Runs the comparisons under a tool of compute-sanitizer. Returns the last line of its output.

    Raises:
        RuntimeError: the tool is not installed, it reported an error, or it exceeded the time.
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
        "kernels.tools.check",
        *arguments,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not finished within {seconds:.0f} s") from None
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        first = next((i for i, line in enumerate(lines) if line.startswith("========= ") and i), 0)
        raise RuntimeError(f"exit {done.returncode}: {' | '.join([*lines[first : first + 6], lines[-1]])}")
    return {"said": lines[-1]}
