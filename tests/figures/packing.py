"""Packing a checkpoint in eight shards: one worker and two, by loky, Dask and Ray; killed workers.

``python -m tests.figures.packing FOLDER`` makes a checkpoint of random BF16 weights, 4 GB, in the folder, and
packs it losslessly once for each row. Then it removes what it wrote. The folder needs room
for the checkpoint and two models (9 GB). ``--megabytes 80`` is a trial.

Seconds are those of the shards, from the first call to the index, without the start of the workers.
Processor seconds and the greatest resident memory are measured in the workers. Each row runs in a process of
its own. Rows whose library is not installed are named and left out: Dask is ``distributed`` (``pip install
'.[dev]'``), Ray is ``pip install ray``. Linux only.

A killed worker gets the signal 9 while it writes a shard, when another shard is finished. Dask and Ray's own
tasks then run the shard again by themselves. loky, and Ray behind joblib, give up; the row calls again.
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sfpformat import pack_shard, shard_count

SHARDS, TENSORS, COLUMNS = 8, 4, 4096


class Task(NamedTuple):
    """What a worker reports of a shard: its process, the seconds of its processor, and its peak in bytes."""

    pid: int
    seconds: float
    peak: int


@dataclass
class Row:
    """A measured row: what it says, seconds, calls that were needed, and the reports of the workers."""

    words: str
    seconds: float = 0.0
    calls: int = 1
    killed: int = 0
    tasks: list[Task] = field(default_factory=list)


def pack(source: str, target: str, number: int, threads: int | None) -> Task:
    """Packs a shard in a worker. Leaves its process id beside the model, for the row that kills it."""
    Path(target).with_name(f"{number}.pid").write_text(str(os.getpid()))
    before = time.process_time()
    pack_shard(source, target, number=number, threads=threads)
    return Task(os.getpid(), time.process_time() - before, _peak())


def _peak() -> int:
    """Returns the peak of resident memory of this process, in bytes. `getrusage` includes that of parents."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


# ------------------------------------------------------------------------------------------------ workers

Arguments = tuple[str, str, int, int | None]


def _ready(_: int) -> int:
    """Imports what packing needs, and stays busy for long enough that each worker gets a call."""
    import sfpformat.cli.pack
    import sfpformat.engines.numba  # noqa: F401

    time.sleep(0.5)
    return os.getpid()


def in_this_process(workers: int, calls: list[Arguments], started: Callable[[], None]) -> list[Task]:
    """No workers: one shard after another."""
    _ready(0)
    started()
    return [pack(*one) for one in calls]


def by_joblib(workers: int, calls: list[Arguments], started: Callable[[], None]) -> list[Task]:
    """joblib with loky, or with the backend that is the default here."""
    import joblib

    with joblib.Parallel(workers, batch_size=1) as parallel:
        parallel(joblib.delayed(_ready)(i) for i in range(workers))
        started()
        found: list[Task] = parallel(joblib.delayed(pack)(*one) for one in calls)
    return found


def by_dask(workers: int, calls: list[Arguments], started: Callable[[], None]) -> list[Task]:
    """joblib with Dask's own LocalCluster."""
    import distributed
    import joblib

    with (
        distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config("dask"),
    ):
        return by_joblib(workers, calls, started)


def by_ray(workers: int, calls: list[Arguments], started: Callable[[], None]) -> list[Task]:
    """joblib with Ray's backend."""
    import joblib
    import ray
    from ray.util.joblib import register_ray

    register_ray()
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        with joblib.parallel_config("ray"):
            return by_joblib(workers, calls, started)
    finally:
        ray.shutdown()


def by_ray_tasks(workers: int, calls: list[Arguments], started: Callable[[], None]) -> list[Task]:
    """Ray's own tasks, which it repeats after a lost worker."""
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        ray.get([ray.remote(_ready).remote(i) for i in range(workers)])
        started()
        found: list[Task] = ray.get([ray.remote(pack).options(max_retries=3).remote(*one) for one in calls])
        return found
    finally:
        ray.shutdown()


class Kind(NamedTuple):
    """A row of the table.

    Attributes:
        words: what it says.
        run: runs the calls.
        package: the package that it needs.
        workers, threads: how many workers, and threads in each; None is all.
        kill: whether a worker is killed.
    """

    words: str
    run: Callable[[int, list[Arguments], Callable[[], None]], list[Task]]
    package: str
    workers: int
    threads: int | None
    kill: bool = False


ROWS = {
    "own": Kind("this process, all threads", in_this_process, "sfpformat", 1, None),
    "own-1": Kind("this process, one thread", in_this_process, "sfpformat", 1, 1),
    "loky-1": Kind("loky, 1 worker of one thread", by_joblib, "joblib", 1, 1),
    "loky-2": Kind("loky, 2 workers of one thread", by_joblib, "joblib", 2, 1),
    "dask-1": Kind("Dask, 1 worker of one thread", by_dask, "distributed", 1, 1),
    "dask-2": Kind("Dask, 2 workers of one thread", by_dask, "distributed", 2, 1),
    "ray-1": Kind("Ray, 1 worker of one thread", by_ray, "ray", 1, 1),
    "ray-2": Kind("Ray, 2 workers of one thread", by_ray, "ray", 2, 1),
    "loky-killed": Kind("loky, 2 workers, one killed", by_joblib, "joblib", 2, 1, kill=True),
    "dask-killed": Kind("Dask, 2 workers, one killed", by_dask, "distributed", 2, 1, kill=True),
    "ray-killed": Kind("Ray's tasks, 2 workers, one killed", by_ray_tasks, "ray", 2, 1, kill=True),
}


def measured(kind: Kind, source: Path, target: Path) -> Row:
    """Packs the shards, and kills a worker if the row says so. Runs in a process of its own."""
    row, begin = Row(kind.words), time.perf_counter()
    numbers = range(1, shard_count(source) + 1)
    calls = [(str(source), str(target), number, kind.threads) for number in numbers]

    def started() -> None:
        nonlocal begin
        begin = time.perf_counter()

    killer = threading.Thread(target=_kill, args=(target.parent, row), daemon=True)
    if kind.kill:
        killer.start()
    while True:
        try:
            row.tasks = kind.run(kind.workers, calls, started if row.calls == 1 else lambda: None)
            break
        except Exception as error:
            if not row.killed or row.calls == 3:
                raise
            print(
                f"{kind.words}: {type(error).__name__} after the kill; the same call again", file=sys.stderr
            )
            row.calls += 1
    row.seconds = time.perf_counter() - begin
    if kind.kill and not row.killed:
        raise RuntimeError(f"{kind.words}: no worker was killed, because all were too fast")
    return row


def _kill(folder: Path, row: Row) -> None:
    """Waits until one shard is finished and another one is half written, and kills its worker."""
    while True:
        time.sleep(0.002)
        finished = list(folder.glob("*.finished"))
        for number in range(1, SHARDS + 1):
            name = f"m-{number:05d}-of-{SHARDS:05d}.sfp.finished.partial"
            partial, pid = folder / name, folder / f"{number}.pid"
            try:
                half = finished and 2 * partial.stat().st_size > finished[0].stat().st_size
            except FileNotFoundError:
                continue
            if half:
                row.killed = int(pid.read_text())
                os.kill(row.killed, signal.SIGKILL)
                return


# ------------------------------------------------------------------------------------------------ command


def make(folder: Path, megabytes: int) -> None:
    """Writes the checkpoint: normally distributed weights in BF16."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    rows = max(megabytes * 1_000_000 // (SHARDS * TENSORS * 2 * COLUMNS), 1)
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        rng = np.random.default_rng(shard)
        tensors = {
            f"w.{shard}.{i}": torch.from_numpy(
                rng.standard_normal((rows, COLUMNS), dtype=np.float32) * 0.02
            ).bfloat16()
            for i in range(TENSORS)
        }
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def table(folder: Path, names: list[str]) -> bool:
    """Prints the table. Returns whether all rows have the same bytes."""
    first = folder / "first"
    print("| | s | processor s | peak MB of a worker | bytes |\n|---|---|---|---|---|")
    alike = True
    for name in names:
        kind, out = ROWS[name], folder / name
        if importlib.util.find_spec(kind.package) is None:
            print(f"{kind.words}: {kind.package} is not installed", file=sys.stderr)
            continue
        out.mkdir()
        words = [sys.executable, "-m", "tests.figures.packing", str(folder), "--row", name]
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
        }  # else Ray writes a token into the home folder
        done = subprocess.run(words, check=False, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"the row {name} failed; its output is in {out}")
        found = json.loads(done.stdout.splitlines()[-1])
        tasks = [Task(*one) for one in found["tasks"]]
        same = _same(first, out)
        alike = alike and same
        again = "" if found["calls"] == 1 else f", {found['calls']} calls"
        print(
            f"| {kind.words}{again} | {found['seconds']:.1f} | {sum(one.seconds for one in tasks):.1f} | "
            f"{max(one.peak for one in tasks) / 1e6:,.0f} | {'same' if same else 'DIFFERENT'} |",
            flush=True,
        )
    shutil.rmtree(first, ignore_errors=True)
    return alike


def _same(first: Path, out: Path) -> bool:
    """Compares the files of a row with those of the first row, and removes them."""
    for path in out.glob("*.pid"):
        path.unlink()
    if not first.exists():
        out.rename(first)
        return True
    names = sorted(path.name for path in first.iterdir())
    same = names == sorted(path.name for path in out.iterdir()) and all(
        filecmp.cmp(first / name, out / name, shallow=False) for name in names
    )
    shutil.rmtree(out)
    return same


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a folder that exists; a folder 'packing' is made in it")
    parser.add_argument("--megabytes", type=int, default=4000, help="size of the checkpoint")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="only these rows")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        row = measured(ROWS[args.row], args.folder / "checkpoint", args.folder / args.row / "m.sfp")
        print(json.dumps(asdict(row)))
        return
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is not a folder")
    if not 1 <= args.megabytes <= 1_000_000:
        parser.error("--megabytes must be between 1 and 1,000,000")
    needed, free = 2.3 * 1e6 * args.megabytes, shutil.disk_usage(args.folder).free
    if free < needed:
        parser.error(f"{args.folder} has {free / 1e9:.1f} GB left, {needed / 1e9:.1f} GB are needed")
    folder = args.folder / "packing"
    if folder.exists():
        parser.error(f"{folder} exists; remove it first")
    folder.mkdir()
    try:
        make(folder / "checkpoint", args.megabytes)
        alike = table(folder, args.rows)
    finally:
        shutil.rmtree(folder)
    if not alike:
        sys.exit("the rows differ in their bytes")


if __name__ == "__main__":
    main()
