"""Simulates encoding and decoding of a large checkpoint on a machine of many cores.

Measures the costs of the tasks on this machine: a time per tensor and a time per chunk, which hold Python's
lock (GIL), and a time per weight in kernels, which do not. Then simulates the pipeline of `Writer.add_later`,
with the rules of `sfpformat.encode.pipeline`, on 1 to 64 threads, and a disk that reads or writes one thing
at a time. The checkpoint is one of 70 G weights in BF16; 10 of its 80 layers are simulated.

    python -m tests.figures.parallel --disk 3

With a model, compares two threads with one instead, for this package and ZipNN in turns, and one thread with
ZipNN by processor time; prints medians and quartiles.

    python -m tests.figures.parallel --model model.safetensors
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import heappop, heappush

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sfpformat import Options
from sfpformat.bench.measure import Spread, rotated
from sfpformat.bench.peers import ZipnnPacker
from sfpformat.encode.chunks import chunk_jobs, encode_chunk
from sfpformat.encode.pipeline import has_room
from sfpformat.encode.plan import plan_tensor
from sfpformat.encode.planner import Plan
from sfpformat.engines import Engine, get_engine
from sfpformat.io.safetensors import SafetensorsFile
from sfpformat.io.threads import Workers
from sfpformat.numpy import load, save

THREADS = (1, 2, 4, 8, 16, 32, 64)
CHUNK = 1 << 18  # positions of a chunk, by default
BYTES = 2  # of a weight in BF16
RATIO = 0.66  # size of the file over that of the weights
_LAYERS, _SIMULATED_LAYERS = 80, 10
# The weights of the tensors of a layer with 64 heads, 8 of keys and values, and an inner width of 28,672.
LAYER = (8192 * 8192, 8192 * 1024, 8192 * 1024, 8192 * 8192, *(3 * (8192 * 28672,)), 8192, 8192)
# Weights and positions of a chunk, from which the three times of a task are computed.
_MEASURED = ((6144, CHUNK), (1 << 20, CHUNK), (1 << 20, 1 << 14))
_REPEATS = 5


@dataclass(frozen=True)
class Costs:
    """The times of a task, in seconds.

    Attributes:
        tensor: per tensor, with the GIL.
        chunk: per chunk, with the GIL.
        weight: per weight, without the GIL.
    """

    tensor: float
    chunk: float
    weight: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Costs:
        """Computes the costs from the times of the tensors of `_MEASURED`."""
        rows = [(1, -(-weights // chunk), weights) for weights, chunk in _MEASURED]
        found = np.linalg.solve(np.array(rows, np.float64), np.array(seconds))
        return cls(*(max(float(each), 0.0) for each in found))


@dataclass
class Machine:
    """The simulated machine, and how long its parts were busy.

    Attributes:
        threads: number of threads.
        disk: bytes per second.
        gil: whether the times per tensor and chunk exclude each other.
        busy: part -> seconds.
    """

    threads: int
    disk: float
    gil: bool = True
    busy: dict[str, float] = field(default_factory=lambda: {"threads": 0.0, "GIL": 0.0, "disk": 0.0})
    _gil_free: float = 0.0
    _disk_free: float = 0.0

    def run(self, now: float, locked: float, free: float) -> float:
        """Returns the end of a task that begins now on a thread, with and then without the GIL."""
        start = max(now, self._gil_free) if self.gil else now
        if self.gil:
            self._gil_free = start + locked
        self.busy["GIL"] += locked if self.gil else 0.0
        self.busy["threads"] += locked + free
        return start + locked + free

    def transfer(self, now: float, size: float) -> float:
        """Returns the end of reading or writing ``size`` bytes that begins now, or when the disk is free."""
        seconds = size / self.disk
        self._disk_free = max(self._disk_free, now) + seconds
        self.busy["disk"] += seconds
        return self._disk_free

    def bottleneck(self, seconds: float) -> str:
        """Returns the busiest part, and its share of the whole time."""
        share = {name: busy / seconds for name, busy in self.busy.items()}
        share["threads"] /= self.threads
        name = max(share, key=lambda each: share[each])
        return f"{name} {share[name]:.0%}"


@dataclass
class _Tensor:
    """A tensor in the simulation: its number, its weights, and its next phase."""

    number: int
    weights: int
    phase: int = 0
    left: int = 0  # unfinished tasks of the phase

    @property
    def size(self) -> int:
        return BYTES * self.weights


def simulate(machine: Machine, sizes: Iterable[int], phases: Sequence[Costs], *, writes: bool) -> float:
    """Returns the seconds until all tensors are done.

    Each tensor is read; each phase has one task for the tensor and then one task for each chunk; with
    ``writes``, tensors are written in order.

    Args:
        machine: the machine.
        sizes: the weights of each tensor.
        phases: the costs of each phase.
        writes: whether encoded tensors are written; `has_room` then limits how many are unfinished.
    """
    waiting = deque(_Tensor(number, weights) for number, weights in enumerate(sizes))
    unfinished: list[_Tensor] = []
    events: list[tuple[float, int, str, _Tensor]] = []
    ready: list[tuple[int, int, float, float, _Tensor]] = []  # number, order, locked and free seconds
    idle, order, now, encoded = machine.threads, 0, 0.0, set[int]()

    def at(when: float, what: str, tensor: _Tensor) -> None:
        nonlocal order
        order += 1
        heappush(events, (when, order, what, tensor))

    def has_room_for(tensor: _Tensor) -> bool:
        return has_room(tensor.size, [other.size for other in unfinished], machine.threads)

    def begin(tensor: _Tensor) -> None:
        """Makes the task of a tensor's phase ready; ends the tensor after the last phase."""
        nonlocal order
        if tensor.phase == 2 * len(phases):
            at(now, "encoded", tensor)
            return
        costs, chunks = phases[tensor.phase // 2], -(-tensor.weights // CHUNK)
        if tensor.phase % 2 == 0:
            tasks = [(costs.tensor, 0.0)]
        else:
            tasks = [(costs.chunk, costs.weight * tensor.weights / chunks)] * chunks
        tensor.left = len(tasks)
        for locked, free in tasks:
            order += 1
            heappush(ready, (tensor.number, order, locked, free, tensor))

    def write() -> None:
        """Writes the first unfinished tensor."""
        at(machine.transfer(now, RATIO * unfinished[0].size), "written", unfinished[0])

    while waiting or unfinished:
        while waiting and (not unfinished or not writes or has_room_for(waiting[0])):
            tensor = waiting.popleft()
            unfinished.append(tensor)
            at(machine.transfer(now, tensor.size * (1 if writes else RATIO)), "read", tensor)
        now, _, what, tensor = heappop(events)
        if what == "read":
            begin(tensor)
        elif what == "task":
            idle += 1
            tensor.left -= 1
            if not tensor.left:
                tensor.phase += 1
                begin(tensor)
        elif what == "encoded":
            encoded.add(tensor.number)
            if not writes:
                unfinished.remove(tensor)
            elif tensor is unfinished[0]:
                write()
        else:
            unfinished.pop(0)
            if unfinished and unfinished[0].number in encoded:
                write()
        while idle and ready:
            _, _, locked, free, tensor = heappop(ready)
            idle -= 1
            at(machine.run(now, locked, free), "task", tensor)
    return now


# ----------------------------------------------------------------------------------------- measurement


def measured() -> dict[str, Costs]:
    """Measures the costs of planning, encoding and decoding on this machine, in processor time."""
    engine, workers = get_engine("numba"), Workers()
    rng = np.random.default_rng(0)
    every = (rng.standard_normal(1 << 20, np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    empty = save({}, engine="numba", threads=1)
    seconds: dict[str, list[float]] = {"plan": [], "encode": [], "decode": []}
    for weights, chunk in _MEASURED:
        array, options = every[:weights], Options(chunk=chunk)
        plan = plan_tensor("w", array, options, engine)
        data = save({"w": array}, options=options, engine="numba", threads=1)
        seconds["plan"].append(least(partial(plan_tensor, "w", array, options, engine)))
        seconds["encode"].append(least(partial(_encode, plan, engine, workers)))
        opened, decoded = (least(partial(load, each, engine="numba", threads=1)) for each in (empty, data))
        seconds["decode"].append(decoded - opened)
    return {name: Costs.of(each) for name, each in seconds.items()}


def _encode(plan: Plan, engine: Engine, workers: Workers) -> None:
    list(workers.map(partial(encode_chunk, plan, engine), chunk_jobs(plan)))


def least(work: Callable[[], object], repeats: int = _REPEATS) -> float:
    """Returns the least processor time of several calls after a first one, in seconds."""
    work()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def rows(costs: dict[str, Costs], disk: float) -> Iterator[str]:
    """Yields the lines of the table, for a disk of ``disk`` bytes per second."""
    tensors = LAYER * _SIMULATED_LAYERS
    whole = _LAYERS / _SIMULATED_LAYERS
    first: dict[tuple[str, bool], float] = {}
    for task, phases in (("encode", (costs["plan"], costs["encode"])), ("decode", (costs["decode"],))):
        for gil in (True, False):
            yield f"{task}, {'with' if gil else 'without'} the GIL: threads, seconds, speed-up, bottleneck"
            for threads in THREADS:
                machine = Machine(threads, disk, gil)
                seconds = simulate(machine, tensors, phases, writes=task == "encode")
                speedup = first.setdefault((task, gil), seconds) / seconds
                line = f"{threads:4} {seconds * whole:8.0f} {speedup:6.1f}"
                yield f"{line}  {machine.bottleneck(seconds)}"


def compared(path: str, rounds: int) -> Iterator[str]:
    """Yields the lines of the comparison with ZipNN on the tensors of a safetensors file, in BF16."""
    with SafetensorsFile(path) as file:
        tensors = {name: as_bf16(file.read(name)) for name in file.header.tensors}
    arrays = [array for array in tensors.values() if array.nbytes]
    packers = {threads: ZipnnPacker(threads) for threads in (1, 2)}
    shares: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        times: dict[tuple[str, int], tuple[float, float]] = {}
        for which, threads in rotated([(w, t) for w in ("sfp", "ZipNN") for t in (1, 2)], number):
            prepared = packers[threads].prepare(arrays) if which == "ZipNN" else None
            start, processor = time.perf_counter(), time.process_time()
            if prepared is None:
                save(tensors, engine="numba", threads=threads)
            else:
                packers[threads].encode(prepared)
            times[which, threads] = time.perf_counter() - start, time.process_time() - processor
        if number:  # the first round loads kernels
            for which in ("sfp", "ZipNN"):
                share = times[which, 1][0] / times[which, 2][0]
                shares.setdefault(f"{which}, speed with two threads over one", []).append(share)
            share = times["ZipNN", 1][1] / times["sfp", 1][1]
            shares.setdefault("speed with one thread over ZipNN, processor time", []).append(share)
            share = times["sfp", 2][1] / times["sfp", 1][1]
            shares.setdefault("processor time with two threads over one", []).append(share)
    for words, values in shares.items():
        spread = Spread.of(values)
        yield f"{words}: {spread.median:.2f} [{spread.low:.2f}, {spread.high:.2f}]"


def as_bf16(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """Returns a float array in BF16, and others unchanged."""
    return array.astype(ml_dtypes.bfloat16) if array.dtype == np.float32 else array


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.figures.parallel", description=__doc__)
    parser.add_argument("--disk", type=float, default=3, help="disk speed in GB/s")
    parser.add_argument("--chunk-ms", type=float, help="the time of a chunk with the GIL, not measured")
    parser.add_argument("--model", help="a safetensors file: compare with ZipNN, which must be installed")
    parser.add_argument("--rounds", type=int, default=33, help="rounds of the comparison")
    args = parser.parse_args()
    if args.model is not None:
        for line in compared(args.model, args.rounds):
            print(line)
        return 0
    costs = measured()
    for name, each in costs.items():
        if args.chunk_ms is not None:
            costs[name] = each = replace(each, chunk=args.chunk_ms / 1000)
        print(
            f"{name}: {each.tensor * 1e3:.2f} ms per tensor, {each.chunk * 1e3:.3f} ms per chunk, "
            f"{each.weight * 1e9:.2f} ns per weight"
        )
    for line in rows(costs, args.disk * 1e9):
        print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
