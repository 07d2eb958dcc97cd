"""Peak memory of ``sfp pack`` on a checkpoint that is larger than the allowed memory.

``python -m tests.figures.memory [options of sfp pack]`` writes a synthetic checkpoint of 2 GB in four shards,
of F32 tensors of 64 MiB, to a temporary folder, packs it, and prints the peak memory of the packing process
and the goal: the largest tensor plus 300 MB.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sfpformat.dtypes import DTYPES
from sfpformat.io.atomic import replacing
from sfpformat.io.safetensors import TensorSpec, write_tensors

SHARDS, TENSORS_A_SHARD = 4, 8
SHAPE = (4096, 4096)


def make_checkpoint(folder: Path) -> int:
    """Writes the shards and their index; returns the bytes of all tensors."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal(SHAPE, np.float32) * np.float32(0.02)
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        specs = [
            TensorSpec(f"layer.{shard}.{i}.weight", DTYPES["F32"], SHAPE) for i in range(TENSORS_A_SHARD)
        ]
        arrays = (np.roll(block, shard * TENSORS_A_SHARD + i, axis=1) for i in range(TENSORS_A_SHARD))
        with replacing(folder / name) as file:
            write_tensors(file, specs, {}, arrays)
        weight_map |= {spec.name: name for spec in specs}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return SHARDS * TENSORS_A_SHARD * block.nbytes


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_checkpoint(folder)
        command = [
            sys.executable,
            "-m",
            "sfpformat.cli",
            "pack",
            str(folder),
            "-o",
            str(folder / "model.sfp"),
        ]
        start = time.perf_counter()
        subprocess.run([*command, *sys.argv[1:]], check=True)
        seconds = time.perf_counter() - start
    # On Linux in KiB; the checkpoint was made in this process and is not counted.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    goal = SHAPE[0] * SHAPE[1] * 4 + 300_000_000
    result = {"checkpoint bytes": size, "peak bytes": peak, "goal": goal, "seconds": round(seconds, 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
