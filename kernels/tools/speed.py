"""Measures the time of decoding and of products on a GPU, and compares it with the floor.

The floor is the time to read and write the necessary bytes at the copy rate of the device.
"""

from __future__ import annotations

import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import sfpformat
from sfpformat import PRESETS, Exact, Options, Table
from sfpformat.deltas.reading import Delta
from sfpformat.engines import DeviceBlock, DevicePart
from sfpformat.engines.cuda.changes import Changes
from sfpformat.engines.cuda.device import Device
from sfpformat.numpy import save

from .ondevice import Multiplication, OnDevice

BF16 = np.dtype(ml_dtypes.bfloat16)
SIDE = 8192  # rows and columns of the matrices
BATCHES = (1, 2, 4, 8)
_ROUNDS = 20
# Total size of the copies of a matrix through which products cycle: more bytes than any cache of a device.
_BEYOND_CACHES = 200 << 20
_HEAD_START = 20_000_000  # cycles that the device waits while the host fills its queue

GPU = PRESETS["gpu"]
FOUR_BITS = GPU.but(quantiser=Table(centroids=8))
# Name -> dtype, share of survivors, options.
MATRICES: dict[str, tuple[Any, float, Options]] = {
    "BF16, preset gpu": (BF16, 1.0, GPU),
    "BF16, preset gpu, several codes": (BF16, 1.0, GPU.but(codes=8)),
    "BF16, default": (BF16, 1.0, Options()),
    "BF16, preset speed": (BF16, 1.0, PRESETS["speed"]),
    "BF16, preset speed, segments of 512": (BF16, 1.0, PRESETS["speed"].but(segment=512)),
    "F32, preset speed": (np.dtype(np.float32), 1.0, PRESETS["speed"]),
    "F32, preset gpu": (np.dtype(np.float32), 1.0, GPU),
    "BF16, 50 % pruned, preset gpu": (BF16, 0.5, GPU),
    "BF16, 50 % pruned, exact, preset gpu": (BF16, 0.5, GPU.but(quantiser=Exact())),
    "BF16, 50 % pruned, 4 bits, preset gpu": (BF16, 0.5, FOUR_BITS),
    "BF16, 50 % pruned, 4 bits, default": (BF16, 0.5, Options(Table(centroids=8))),
    "BF16, 50 % pruned, 4 bits, preset fused": (BF16, 0.5, FOUR_BITS.but(fixed_width=True)),
    "BF16, 90 % pruned, 4 bits, preset gpu": (BF16, 0.1, FOUR_BITS),
}

Works = Sequence[Callable[[], object]]
# Runs the works in sequence, repeatedly, and returns the milliseconds per work on the device.
Clock = Callable[[Works], float]


def milliseconds(works: Works) -> float:
    """Returns the median milliseconds per work, on torch's current stream.

    Each round is queued before it starts.
    """
    torch: Any = importlib.import_module("torch")
    times: list[float] = []
    for i in range(_ROUNDS + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_HEAD_START)
        begin.record()
        for work in works:
            work()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end) / len(works))
    return statistics.median(times)


def copy_rate(clock: Clock = milliseconds) -> float:
    """Returns the bytes per second that a copy within the device reads and writes in total."""
    torch: Any = importlib.import_module("torch")
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * int(source.nbytes) / (clock([lambda: target.copy_(source)]) / 1e3)


@cache
def _normal(side: int) -> NDArray[np.float32]:
    """Returns normal weights with a different spread for each row."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((side, side), np.float32) * np.float32(0.02)
    weights *= np.exp2(rng.normal(size=(side, 1)) / 4).astype(np.float32)
    return weights


def matrix_of(dtype: Any, density: float, side: int) -> Any:
    """Returns normal weights, with the smallest pruned."""
    weights = _normal(side)
    if density < 1:
        threshold = np.quantile(np.abs(weights[:: max(side // 128, 1)]), 1 - density)
        weights = np.where(np.abs(weights) < threshold, np.float32(0), weights)
    return weights.astype(dtype)


def decoding(
    name: str, device: Device, rate: float, side: int, clock: Clock = milliseconds
) -> dict[str, Any]:
    """Checks the decoded weights of a matrix, and times decoding: index and weights together."""
    dtype, density, options = MATRICES[name]
    with sfpformat.open(save({"w": matrix_of(dtype, density, side)}, options=options)) as file:
        entry = file.entry("w")
        there = OnDevice(file, entry, device)
        assert there.weights() == file.get_tensor("w").tobytes(), "other weights"
    taken = clock([there.decode])
    floor = (entry.stored_bytes + entry.decoded_bytes) / rate * 1e3
    return {
        "kernel": there.kernel,
        "bits_a_weight": 8 * entry.stored_bytes / entry.positions,
        "ms": taken,
        "floor_ms": floor,
        "share_of_floor": floor / taken,
        "output_bytes_a_second": entry.decoded_bytes / taken * 1e3,
        "weights_a_second": entry.positions / taken * 1e3,
    }


def products(device: Device, rate: float, side: int, clock: Clock = milliseconds) -> list[dict[str, Any]]:
    """Times BF16 products with a matrix of 4 bits and 50 % survivors, and torch's with the dense matrix."""
    torch: Any = importlib.import_module("torch")
    array = matrix_of(BF16, 0.5, side)
    data = save({"w": array}, options=FOUR_BITS.but(fixed_width=True))
    with sfpformat.open(data) as file:
        entry = file.entry("w")
        copies = max(_BEYOND_CACHES // entry.stored_bytes, 1) if side >= 4096 else 1
        there = [OnDevice(file, entry, device) for _ in range(copies)]
    placed = [own.place("BF16") for own in there]
    dense = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).cuda()
    found = []
    for batch in BATCHES:
        x = np.random.default_rng(batch).standard_normal((batch, side)).astype(BF16)
        own = [Multiplication(device, each, x, None).start for each in placed if each is not None]
        assert len(own) == copies, "not multiplied"
        there_x = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).cuda()
        taken = clock(own)
        beside = clock([partial(torch.nn.functional.linear, there_x, dense)] * 2)
        floor = entry.stored_bytes / rate * 1e3
        found.append(
            {
                "batch": batch,
                "bits_a_weight": 8 * entry.stored_bytes / entry.positions,
                "ms": taken,
                "dense_ms": beside,
                "times_as_fast": beside / taken,
                "share_of_floor": floor / taken,
            }
        )
    return found


def layers(side: int) -> list[dict[str, Any]]:
    """Times whole calls of a compressed and of a dense layer, in seconds, with the overhead of Python."""
    torch: Any = importlib.import_module("torch")
    api: Any = importlib.import_module("sfpformat.torch")
    dense = torch.nn.Linear(side, side, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        dense.weight.copy_(torch.from_numpy(matrix_of(np.float32, 0.5, side)))
    layer = api.SfpLinear.of(dense, FOUR_BITS.but(fixed_width=True)).cuda()
    dense = dense.cuda()
    found = []
    for batch in (1, 8, 64):
        x = torch.randn(batch, side, dtype=torch.bfloat16, device="cuda")
        with torch.inference_mode():
            times = [_seconds_of_calls(module, x) for module in (layer, dense)]
        found.append({"batch": batch, "compressed_s": times[0], "dense_s": times[1]})
    return found


def _seconds_of_calls(module: Any, x: Any, calls: int = 50) -> float:
    torch: Any = importlib.import_module("torch")
    for _ in range(3):
        module(x)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(calls):
        module(x)
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / calls


def loading(side: int) -> dict[str, float]:
    """Times loading from a file in the page cache to tensors on the device: this package and safetensors."""
    torch: Any = importlib.import_module("torch")
    apis: dict[str, Any] = {"sfp": importlib.import_module("sfpformat.torch")}
    apis["safetensors"] = importlib.import_module("safetensors.torch")
    tensors = {f"t{i}": torch.from_numpy(matrix_of(np.float32, 1.0, side)).bfloat16() + i for i in range(4)}
    times = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, api in apis.items():
            path = Path(folder) / name
            more = {"options": GPU} if name == "sfp" else {}
            api.save_file(tensors, path, **more)
            runs = []
            for _ in range(5):
                begun = time.perf_counter()
                found = api.load_file(path, device="cuda")
                torch.cuda.synchronize()
                runs.append(time.perf_counter() - begun)
            assert all(torch.equal(found[key].cpu(), tensors[key]) for key in tensors)
            times[name] = statistics.median(runs)
    return times


# Name -> the change of the weights, relative to their size.
STEPS = {"BF16, a small step": 1e-4, "BF16, a fine-tune": 1e-2}


def deltas(
    name: str, device: Device, rate: float, side: int, clock: Clock = milliseconds, where: str = "cuda"
) -> dict[str, Any]:
    """Times `apply_delta` for a state dict of four matrices on the device, and its kernels.

    Returns:
        ``changed``: the share of the weights; ``kernels_ms``: `count_keys`, `sum_keys` and `place_changes`;
        ``flip_ms``: `flip_elements`; ``floor_ms``: the time to read the weights twice; ``apply_s``: a whole
        call, back and forth in turn, so that no copy is timed; ``over_cpu_s``: the same with
        ``engine="numba"``, which copies the tensors to CPU memory and back.
    """
    torch: Any = importlib.import_module("torch")
    api: Any = importlib.import_module("sfpformat.torch")
    rng = np.random.default_rng(1)
    base, new = {}, {}
    for i in range(4):
        weights = matrix_of(np.float32, 1.0, side) + np.float32(i)
        step = np.float32(STEPS[name]) * rng.standard_normal(weights.shape, np.float32)
        base[f"t{i}"], new[f"t{i}"] = weights.astype(BF16), (weights * (1 + step)).astype(BF16)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / way for way in ("there", "back")]
        for path, (old, now) in zip(paths, ((base, new), (new, base)), strict=True):
            sfpformat.write_delta(path, old, now)
        state = {
            key: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16).to(where) for key, a in base.items()
        }
        times: dict[str, float] = {}
        for label, engine in (("apply_s", None), ("over_cpu_s", "numba")):
            runs = []
            for i in range(6):
                begun = time.perf_counter()
                api.apply_delta(state, paths[i % 2], engine=engine)
                runs.append(time.perf_counter() - begun)
            assert all(
                state[key].cpu().view(torch.int16).numpy().tobytes() == base[key].tobytes() for key in base
            )
            times[label] = statistics.median(runs[2:])
        kernels, flip = _timed_kernels(paths[0], state, device, clock)
    size = sum(array.size for array in base.values())
    changed = sum(int(np.count_nonzero(base[key] != new[key])) for key in base)
    floor = 2 * 2 * size / rate * 1e3
    own = {"changed": changed / size, "kernels_ms": kernels, "flip_ms": flip, "floor_ms": floor}
    return own | times | {"gb_a_second": 2 * size / times["apply_s"] / 1e9}


def _timed_kernels(path: Path, state: dict[str, Any], device: Device, clock: Clock) -> tuple[float, float]:
    """Returns the milliseconds of the kernels that find the changes of a delta, and of `flip_elements`."""
    queue = Changes(device)
    with Delta(path) as delta:
        (pool,) = delta.pools()
        blocks = []
        for number in range(pool.blocks):
            places = [
                DevicePart(
                    state[pool.members[part.member].name].data_ptr() + 2 * part.start, part.stop - part.start
                )
                for part in pool.parts(number)
            ]
            blocks.append(DeviceBlock(places, *pool.numbers_of(number)))
        # Repeated, `find` takes bits to flip for levels: its changes are of no use.
        found = clock([queue.start(blocks, pool.kind).find])
        placed = queue.start(blocks, pool.kind).wait()[1]
    assert placed is not None
    return found, clock([lambda: queue.flip(placed)] * 2)
