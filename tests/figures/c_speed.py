"""Measures the decoding speed of the reader in C and of the engines of the package, each on one thread.

    python -m tests.figures.c_speed              # a random model of 64 MiB of weights, half of it pruned
    python -m tests.figures.c_speed MODEL.sfp    # any other model

A round opens a file in memory and decodes all its weights. Times are processor times, the least of some
rounds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

import sfpformat
import sfpformat.numpy

from ..support import c_reader

ROUNDS = 7
_SIDE, _TENSORS = 2048, 8


def made_up() -> bytes:
    """A model of BF16 matrices of normal weights, of which every second one is pruned to 50 %."""
    rng = np.random.default_rng(0)
    tensors = {}
    for number in range(_TENSORS):
        weights = rng.normal(scale=0.02, size=(_SIDE, _SIDE)).astype(np.float32)
        if number % 2:
            weights[np.abs(weights) < np.median(np.abs(weights))] = 0
        tensors[f"layer.{number}"] = weights.astype(ml_dtypes.bfloat16)
    return sfpformat.numpy.save(tensors)


def engine_seconds(data: bytes, engine: str) -> tuple[int, float]:
    """Returns the decoded bytes and the least processor time of an engine of the package."""
    least, decoded = float("inf"), 0
    for _ in range(ROUNDS):
        start = time.process_time()
        with sfpformat.open(data, engine=engine, threads=1) as file:
            decoded = sum(array.nbytes for array in file.get_tensors().values())
        least = min(least, time.process_time() - start)
    return decoded, least


def c_seconds(data: bytes) -> tuple[int, float]:
    """Returns the same for the reader in C, which it compiles."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.sfp")
        path.write_bytes(data)
        words = [str(c_reader.built("all", Path(folder))), "time", str(path), str(ROUNDS)]
        answer = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
    return int(answer["bytes"]), float(answer["seconds"])


def main(words: list[str]) -> int:
    """The command."""
    data = Path(words[0]).read_bytes() if words else made_up()
    for name, (decoded, seconds) in (
        ("C", c_seconds(data)),
        ("numba", engine_seconds(data, "numba")),
    ):
        rate = decoded / seconds / 1e9
        print(f"{name}: {decoded / 1e6:.1f} MB of weights in {seconds:.3f} s, {rate:.2f} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
