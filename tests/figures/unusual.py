"""Speed with many small tensors, and with weights that have few bits or few values.

``python -m tests.figures.unusual`` prints, as JSON, one row per line:

* loading 200,000 tensors of 1 to 64 F32 weights, with each engine and with safetensors, and sizes of files; *
packing 16 million weights of BF16, of both FP8 dtypes, and of F32 with 256 values, with each number of
threads up
  to that of the processor, in millions of weights per second, and bits per weight.

Each time is the best of three, in one process, with files in the page cache: by the clock, and of the
processor, which other work on the machine affects less. Needs safetensors and Numba.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from sfpformat.numpy import load_file, save, save_file

RUNS = 3
TENSORS, MOST_WEIGHTS = 200_000, 64
WEIGHTS = 16_000_000
VALUES = 256


def best_of(action: Callable[..., object], *args: object) -> tuple[float, float]:
    """Returns the least seconds of some runs: by the clock, and of the processor."""
    times = []
    for _ in range(RUNS):
        start, busy = time.perf_counter(), time.process_time()
        action(*args)
        times.append((time.perf_counter() - start, time.process_time() - busy))
    clock, processor = zip(*times, strict=True)
    return min(clock), min(processor)


def show(**row: object) -> None:
    """Prints a row."""
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


def load_many(folder: Path) -> None:
    """Rows of loading many small tensors."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, MOST_WEIGHTS + 1, TENSORS).tolist()
    tensors = {f"layer.{i}.weight": rng.standard_normal(n).astype(np.float32) for i, n in enumerate(sizes)}
    ours, theirs = folder / "many.sfp", folder / "many.safetensors"
    save_file(tensors, ours)
    safetensors.numpy.save_file(tensors, theirs)
    del tensors
    clock, processor = best_of(safetensors.numpy.load_file, theirs)
    row = {"tensors": TENSORS, "seconds": clock, "processor_seconds": processor}
    show(load="safetensors", **row, bytes=theirs.stat().st_size)
    for engine in ("python", "numba"):
        load_with = partial(load_file, engine=engine)
        load_with(ours)  # compiled before it is timed
        clock, processor = best_of(load_with, ours)
        row |= {"seconds": clock, "processor_seconds": processor}
        show(load=engine, **row, bytes=ours.stat().st_size)


def kinds() -> dict[str, NDArray[np.generic]]:
    """Weights to pack, by what they are."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(WEIGHTS, np.float32) * np.float32(0.02)
    codebook = np.sort(rng.standard_normal(VALUES).astype(np.float32))
    return {
        "BF16": normal.astype(ml_dtypes.bfloat16),
        "F8_E4M3": (normal * 400).astype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": normal.astype(ml_dtypes.float8_e5m2),
        f"F32 of {VALUES} values": codebook[rng.integers(0, VALUES, WEIGHTS)],
    }


def pack() -> None:
    """Rows of packing."""
    for kind, weights in kinds().items():
        for threads in range(1, (os.cpu_count() or 1) + 1):
            pack_with = partial(save, engine="numba", threads=threads)
            bits = 8 * len(pack_with({"w": weights})) / WEIGHTS  # compiled before it is timed
            clock, processor = best_of(pack_with, {"w": weights})
            row = {
                "millions_a_second": WEIGHTS / clock / 1e6,
                "processor_ns_a_weight": processor / WEIGHTS * 1e9,
            }
            show(pack=kind, threads=threads, **row, bits_a_weight=bits)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed where tensors are small or weights have few values.")
    parser.add_argument("what", nargs="*", choices=["load", "pack", []], help="all where none is given")
    what = parser.parse_args().what or ["load", "pack"]
    if "load" in what:
        with tempfile.TemporaryDirectory() as name:
            load_many(Path(name))
    if "pack" in what:
        pack()


if __name__ == "__main__":
    main()
