"""Everything that needs a GPU, in one command: ``python -m kernels.check``.

* the engine against the reference: files of every kind, and damaged ones;
* ``--sanitize``: the same under compute-sanitizer's memcheck, racecheck, initcheck and synccheck;
* how long decoding takes for matrices of 67 M weights, beside the floor: the bytes that must be read and
  written, at the rate at which this device copies;
* a file to tensors on the device, beside safetensors;
* DFloat11 and nvCOMP where they are installed.

Results go to ``kernels/results`` as JSON and as a table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import sfpformat
from sfpformat import Options
from sfpformat.container.entry import TensorEntry
from sfpformat.engines.cuda.batch import Task, fill_chunks, plan_batch
from sfpformat.engines.cuda.device import Device
from sfpformat.engines.cuda.driver import CudaDevice, why_not
from sfpformat.engines.cuda.layout import WARPS
from sfpformat.engines.cuda.loaded import Recipes
from sfpformat.engines.cuda.recipe import make_recipe
from sfpformat.errors import FileFault
from sfpformat.numpy import save

from . import fuzz

RESULTS = Path(__file__).parent / "results"
SIDE = 8192  # of the matrices that are timed
ROUNDS = 30
DAMAGED = 2000
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
BF16 = np.dtype(ml_dtypes.bfloat16)

# Name -> dtype, share of survivors, options.
MATRICES: dict[str, tuple[Any, float, Options]] = {
    "BF16, default": (BF16, 1.0, Options()),
    "BF16, one code of 8 bits, segments of 512": (BF16, 1.0, Options(codes=1, code_limit=8, segment=512)),
    "BF16, codes of 8 bits, segments of 512": (BF16, 1.0, Options(code_limit=8, segment=512)),
    "BF16, one code of 12 bits, segments of 512": (BF16, 1.0, Options(codes=1, segment=512)),
    "F32, one code of 8 bits, segments of 512": (
        np.dtype(np.float32),
        1.0,
        Options(codes=1, code_limit=8, segment=512, trim=False),
    ),
    "BF16, 50 % pruned, exact": (BF16, 0.5, Options(segment=512)),
    "BF16, 50 % pruned, 4 bits": (BF16, 0.5, Options(quantiser="uniform", bits=4.0, segment=512)),
    "BF16, 90 % pruned, 4 bits": (BF16, 0.1, Options(quantiser="uniform", bits=4.0, segment=512)),
}


# ------------------------------------------------------------------------------------------------- identity


def outcome(data: bytes, engine: str) -> Any:
    """The bits of a file's tensors, or its fault."""
    try:
        with sfpformat.open(data, engine=engine, threads=1) as file:
            return [array.tobytes() for array in file.get_tensors().values()]
    except FileFault as fault:
        return fault.code, fault.clause, fault.offset


def files_to_compare(damaged: int) -> Iterator[bytes]:
    """Files of every kind, small and of many tiles; then damaged ones, their checksums mended."""
    small = [data for _, data in fuzz.files()]
    yield from small
    yield from (data for _, data in fuzz.files(24, 700, chunk=1 << 13))
    rng = np.random.default_rng(3)
    for i in range(damaged):
        yield fuzz.damaged_file(small[i % len(small)], rng)


def compare_with_reference(damaged: int = DAMAGED) -> int:
    """How many files the engine gave as the reference; raises AssertionError at one that it did not."""
    count = 0
    for data in files_to_compare(damaged):
        assert outcome(data, "cuda") == outcome(data, "python"), f"file {count} differs"
        count += 1
    return count


def sanitize() -> dict[str, str]:
    """Tool of compute-sanitizer -> what it says at the end."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"compute-sanitizer": "not installed"}
    said = {}
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "kernels.check"]
        done = subprocess.run(
            [*command, "--only-identity", "--damaged", "60"], capture_output=True, text=True, check=False
        )
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        said[tool] = f"exit {done.returncode}: {' '.join(last)}"
    return said


# --------------------------------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class Speed:
    """What was measured of a matrix: bytes of its chunks and weights, milliseconds, the floor's share."""

    matrix: str
    kernel: str
    stored: int
    decoded: int
    index_ms: float
    decode_ms: float
    floor_ms: float
    share_of_floor: float
    weights_a_second: float


def copy_rate() -> float:
    """Bytes a second that a copy within the device reads and writes together."""
    torch: Any = importlib.import_module("torch")
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * int(source.nbytes) / (median_ms(lambda: target.copy_(source)) / 1e3)


def median_ms(work: Callable[[], object]) -> float:
    """The median time of something on torch's current stream, in milliseconds."""
    torch: Any = importlib.import_module("torch")
    times: list[float] = []
    for i in range(ROUNDS + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def matrix_of(dtype: Any, density: float, side: int) -> Any:
    """Normal weights of a spread that differs from row to row, the least pruned."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((side, side), np.float32) * np.float32(0.02)
    weights *= np.exp2(rng.normal(size=(side, 1)) / 4).astype(np.float32)
    if density < 1:
        weights[np.abs(weights) < np.quantile(np.abs(weights[::64]), 1 - density)] = 0
    return weights.astype(dtype)


class OnDevice:
    """A tensor's chunks on the device, ready to be decoded again and again."""

    def __init__(self, file: sfpformat.SfpFile, entry: TensorEntry, device: Device, where: str) -> None:
        """Copies all that kernels read.

        Args:
            where: torch's name of the device.
        """
        torch: Any = importlib.import_module("torch")
        self.device = device
        recipe = make_recipe(entry, file.decoder(entry).vectors)
        assert recipe is not None
        self.recipe, self._recipes = recipe, Recipes(self.device)
        self._recipes.load([recipe])
        self.out = torch.empty(entry.decoded_bytes, dtype=torch.uint8, device=where)
        at, size = self._recipes.address(recipe), entry.chunk * entry.segment
        tasks = []
        for k, data in enumerate(file.read_chunks([(entry, k) for k in range(len(entry.chunks))])):
            first, stop = entry.segments_of_chunk(k)
            total = min(size, entry.positions - k * size)
            place = self.out.data_ptr() + k * size * entry.dtype.itemsize
            tasks.append(Task(recipe, at, data, total, k * size, 0, stop - first, place))
        self._plan = plan_batch(tasks)
        self._hold(self._plan.size)

    def _hold(self, size: int) -> None:
        plan, device = self._plan, self.device
        staging, self._own = device.pin(size), device.allocate(size)
        self._index, self._errors = (
            device.allocate(4 * plan.index_words),
            device.allocate(4 * plan.error_words),
        )
        fill_chunks(plan, staging)
        plan.jobs["data"] += np.uint64(self._own.address)
        at = plan.jobs_at
        self._parts: dict[str, tuple[np.uint64, int]] = {}
        for name, records in (("", plan.jobs), *plan.parts.items()):
            staging.bytes[at : at + records.nbytes] = records.view(np.uint8).reshape(-1)
            self._parts[name] = np.uint64(self._own.address + at), len(records)
            at += records.nbytes
        staging.bytes[plan.status_at : size] = 0
        device.copy(self._own.address, staging.address, size)
        device.mark().wait()

    def index(self) -> None:
        """Launches the first kernel."""
        jobs, count = self._parts[""]
        places = (self._index.address, self._own.address + self._plan.status_at)
        self.device.launch("index_chunks", count, [jobs, *map(np.uint64, places)])

    def decode(self) -> None:
        """Launches the second."""
        jobs, _ = self._parts[""]
        parts, warps = self._parts[self.recipe.kernel]
        places = (self._index.address, self._own.address + self._plan.status_at, self._errors.address)
        arguments = [jobs, parts, *map(np.uint64, places)]
        self.device.launch(self.recipe.kernel, warps // WARPS, arguments)


def speed_of(name: str, rate: float, side: int) -> Speed:
    """Times a matrix, after its weights were compared."""
    torch: Any = importlib.import_module("torch")
    dtype, density, options = MATRICES[name]
    with sfpformat.open(save({"w": matrix_of(dtype, density, side)}, options=options)) as file:
        entry = file.entry("w")
        device = CudaDevice(0, torch.cuda.current_stream().cuda_stream)
        there = OnDevice(file, entry, device, "cuda")
        there.index()
        there.decode()
        assert there.out.cpu().numpy().tobytes() == file.get_tensor("w").tobytes(), f"{name}: other weights"
        index, decode = median_ms(there.index), median_ms(there.decode)
        floor = (entry.stored_bytes + entry.decoded_bytes) / rate * 1e3
    return Speed(
        name,
        there.recipe.kernel,
        entry.stored_bytes,
        entry.decoded_bytes,
        index,
        decode,
        floor,
        floor / (index + decode),
        entry.positions / (index + decode) * 1e3,
    )


def loading(side: int) -> dict[str, float]:
    """Seconds from a file in the page cache to tensors on the device: this package, and safetensors."""
    torch: Any = importlib.import_module("torch")
    doors: dict[str, Any] = {"sfp": importlib.import_module("sfpformat.torch")}
    doors["safetensors"] = importlib.import_module("safetensors.torch")
    tensors = {f"t{i}": torch.from_numpy(matrix_of(np.float32, 1.0, side)).bfloat16() for i in range(4)}
    times = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, door in doors.items():
            path = Path(folder) / name
            door.save_file(tensors, path)
            runs = []
            for _ in range(5):
                begun = time.perf_counter()
                found = door.load_file(path, device="cuda")
                torch.cuda.synchronize()
                runs.append(time.perf_counter() - begun)
            assert all(torch.equal(found[key].cpu(), tensors[key]) for key in tensors)
            times[name] = statistics.median(runs)
    return times


def nvcomp_ms(side: int) -> float | None:
    """Milliseconds in which nvCOMP's ANS decodes the exponents of a BF16 matrix; None without nvCOMP."""
    try:
        nvcomp: Any = importlib.import_module("nvidia.nvcomp")
    except ImportError:
        return None
    torch: Any = importlib.import_module("torch")
    bits = matrix_of(BF16, 1.0, side).view(np.uint16)
    exponents = torch.from_numpy((bits >> 7).astype(np.uint8)).cuda()
    stream = torch.cuda.current_stream().cuda_stream
    codec = nvcomp.Codec(algorithm="ANS", data_type="|u1", cuda_stream=stream)
    coded = codec.encode(nvcomp.as_array(exponents, cuda_stream=stream))
    return median_ms(lambda: codec.decode(coded))


# -------------------------------------------------------------------------------------------------- command


def table_of(speeds: list[Speed], rate: float) -> str:
    """The speeds as a table."""
    lines = [
        f"Copying within the device: {rate / 1e12:.2f} TB/s, read and written.",
        "",
        "| matrix | kernel | bits a weight | index, ms | decode, ms | floor, ms | share | G weights/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for speed in speeds:
        weights = speed.weights_a_second * (speed.index_ms + speed.decode_ms) / 1e3
        bits = 8 * speed.stored / weights
        lines.append(
            f"| {speed.matrix} | `{speed.kernel}` | {bits:.2f} | {speed.index_ms:.3f} | "
            f"{speed.decode_ms:.3f} | {speed.floor_ms:.3f} | {speed.share_of_floor:.0%} | "
            f"{speed.weights_a_second / 1e9:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m kernels.check", description=__doc__)
    parser.add_argument("--damaged", type=int, default=DAMAGED, help=f"damaged files ({DAMAGED})")
    parser.add_argument("--side", type=int, default=SIDE, help=f"rows and columns of what is timed ({SIDE})")
    parser.add_argument("--only-identity", action="store_true", help="no speeds, no results")
    parser.add_argument("--sanitize", action="store_true", help="under compute-sanitizer too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args()
    reason = why_not()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    print(f"{compare_with_reference(args.damaged):,} files as by the reference", flush=True)
    if args.only_identity:
        return 0
    torch: Any = importlib.import_module("torch")
    rate = copy_rate()
    speeds = [speed_of(name, rate, args.side) for name in MATRICES]
    print(table_of(speeds, rate), flush=True)
    results = {
        "device": torch.cuda.get_device_name(),
        "copy_bytes_a_second": rate,
        "speeds": [asdict(speed) for speed in speeds],
        "loading_seconds": loading(args.side // 2),
        "nvcomp_ans_exponents_ms": nvcomp_ms(args.side),
        "sanitizer": sanitize() if args.sanitize else {},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    stem = str(results["device"]).lower().replace(" ", "-")
    (args.out / f"{stem}.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.out / f"{stem}.md").write_text(table_of(speeds, rate))
    print(json.dumps({key: value for key, value in results.items() if key != "speeds"}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
