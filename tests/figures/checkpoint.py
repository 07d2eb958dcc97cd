"""`torch.distributed.checkpoint`: saving and loading by `.sfp`, by torch's own files, and by safetensors.

``python -m tests.figures.checkpoint`` saves and loads 24 matrices of 2048 × 2048 normally distributed weights
in BF16, 201 MB, in two gloo processes, as DTensors of three layouts. Contenders run round-robin in the same
processes, after one round that is not counted. The table has the median of three rounds, in seconds of the
slower process, and the bytes that each process read by ``read`` while it loaded (Linux: ``rchar``);
safetensors maps its file into memory instead.

``--matrices N`` and ``--rows N`` are other sizes. ``--profile`` prints where process 0 spends its time in
a load of `.sfp`.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sfpformat.torch.distributed_checkpoint import SfpStorageReader, SfpStorageWriter

from ..support.process_group import run_group

dcp: Any = torch.distributed.checkpoint  # torch's own types leave its functions out
WORLD, ROUNDS = 2, 3
LAYOUTS: dict[str, Any] = {"Shard(0)": Shard(0), "Shard(1)": Shard(1), "Replicate": Replicate()}


def contenders() -> dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]]:
    """Name -> the functions that make a reader and a writer for a folder."""
    found: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
        ".sfp, lossless": (SfpStorageReader, SfpStorageWriter),
        "torch's files": (dcp.FileSystemReader, dcp.FileSystemWriter),
    }
    if hasattr(dcp, "HuggingFaceStorageReader"):  # needs safetensors, which saves parts of tensors
        found["safetensors"] = (
            lambda path: dcp.HuggingFaceStorageReader(str(path)),
            lambda path: dcp.HuggingFaceStorageWriter(str(path), save_distributed=True),
        )
    return found


def states(matrices: int, rows: int, layout: Any, *, empty: bool) -> dict[str, Any]:
    """DTensors of a layout; the same weights in each process, or zeros."""
    mesh = init_device_mesh("cpu", (WORLD,))
    generator = torch.Generator().manual_seed(0)
    out: dict[str, Any] = {}
    for i in range(matrices):
        whole = torch.zeros(rows, rows) if empty else torch.randn(rows, rows, generator=generator) * 0.02
        out[f"layers.{i}.weight"] = distribute_tensor(whole.bfloat16(), mesh, [layout])
    return out


def timed(work: Callable[[], Any]) -> tuple[float, int]:
    """Returns the seconds of the slower process, and the bytes that this one read."""
    dist.barrier()
    before, begin = _bytes_read(), time.perf_counter()
    work()
    seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    size = _bytes_read() - before
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds), size


def _bytes_read() -> int:
    words = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(words["rchar"])


def measure(folder: Path, matrices: int, rows: int, *, profile: bool) -> None:
    """Runs in each process; process 0 prints the table."""
    warnings.simplefilter("ignore")
    first, table = dist.get_rank() == 0, []
    for words, layout in LAYOUTS.items():
        full, target = (states(matrices, rows, layout, empty=empty) for empty in (False, True))
        saves: dict[str, list[float]] = {}
        loads: dict[str, list[float]] = {}
        sizes: dict[str, int] = {}
        for turn in range(ROUNDS + 1):
            for name, (reader, writer) in contenders().items():
                path = folder / f"{words}-{name}".replace(" ", "-")
                saved = timed(partial(dcp.save, full, storage_writer=writer(path)))[0]
                for one in target.values():
                    one.zero_()
                loaded, sizes[name] = timed(partial(dcp.load, target, storage_reader=reader(path)))
                if turn:
                    saves.setdefault(name, []).append(saved)
                    loads.setdefault(name, []).append(loaded)
                local = (torch.equal(full[one].to_local(), target[one].to_local()) for one in full)
                if not all(local):
                    raise RuntimeError(f"{name} returns other weights")
        for name in contenders():
            path = folder / f"{words}-{name}".replace(" ", "-")
            stored = sum(file.stat().st_size for file in path.iterdir())
            all_sizes: list[Any] = [None] * WORLD
            dist.all_gather_object(all_sizes, sizes[name])
            read = ", ".join(f"{size / 1e6:,.0f}" for size in all_sizes)
            save, load = statistics.median(saves[name]), statistics.median(loads[name])
            table.append(f"| {words} | {name} | {stored / 1e6:,.0f} | {save:.2f} | {load:.2f} | {read} |")
        if profile:
            _profile(target, folder / f"{words}-.sfp,-lossless", words)
    if first:
        print("| layout | | MB stored | s to save | s to load | MB read: process 0, 1 |")
        print("|---|---|---|---|---|---|")
        print("\n".join(table), flush=True)


def _profile(target: dict[str, Any], path: Path, words: str) -> None:
    work = cProfile.Profile()
    work.runcall(dcp.load, target, storage_reader=SfpStorageReader(path))
    if dist.get_rank() == 0:
        print(f"--- {words}", file=sys.stderr)
        pstats.Stats(work, stream=sys.stderr).sort_stats("cumulative").print_stats(45)


def main() -> None:
    """Runs the command, or one of its processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--matrices", type=int, default=24)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    if args.matrices < 1 or args.rows < WORLD:
        parser.error(f"there is at least 1 matrix with {WORLD} rows")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_group(WORLD, folder, lambda _: measure(folder, args.matrices, args.rows, profile=args.profile))


if __name__ == "__main__":
    main()
