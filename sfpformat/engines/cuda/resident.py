"""A tensor whose chunks stay on the device, where it can be decoded and multiplied repeatedly.

Theory of operation: constant data are copied once: recipe, jobs, warps. A call allocates memory for the
segment index and the error words, launches the kernels, and returns without waiting. The first caller checks
once whether the data are valid; unchanged data stay valid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...container.entry import TensorEntry
from ..device_interface import Operands, ResidentRun
from . import layout
from .batch import OnDevice, Places, Plan, Task, launch, plan_batch
from .device import Device, Memory
from .pinned_loading import Queue
from .product import Product
from .recipe import Recipe


class Resident:
    """A tensor with coding ``fingerprint`` whose concatenated chunks are on a device."""

    def __init__(self, queue: Queue, recipe: Recipe, entry: TensorEntry, at: int) -> None:
        """Copies jobs and warps to the device.

        Args:
            queue: a queue of the device.
            recipe: the tensor's recipe; the queue must have loaded it.
            entry: the tensor's entry; the tensor must not be empty.
            at: address of its first chunk, a multiple of 16; the memory must outlive this object, unchanged.
        """
        self.entry, self._recipe, self._recipes, self._at = entry, recipe, queue.recipes, at
        self._whole = _Work(queue.device, self.plan_runs(self._every_run()))

    def _every_run(self) -> list[ResidentRun]:
        size, runs = self.entry.chunk * self.entry.segment * self.entry.dtype.itemsize, []
        for k in range(len(self.entry.chunks)):
            first, stop = self.entry.segments_of_chunk(k)
            runs.append((k, 0, stop - first, k * size))
        return runs

    def plan_runs(self, runs: Sequence[ResidentRun]) -> Plan:
        """Plans a batch of runs; their output offsets are relative to the output address."""
        entry, tasks = self.entry, []
        ends = np.cumsum(entry.chunks["length"], dtype=np.int64)
        at = self._recipes.address(self._recipe)
        for k, first, stop, out in runs:
            length, (start, total) = int(entry.chunks["length"][k]), entry.positions_of_chunk(k)
            data = OnDevice(self._at + int(ends[k]) - length, length)
            tasks.append(Task(self._recipe, at, data, total, start, first, stop, out))
        return plan_batch(tasks)

    def decode(self, queue: Queue, out: int) -> None:
        """Enqueues decoding of all weights to an address, a multiple of 16."""
        self._whole.start(queue.device, out)

    def is_good(self, queue: Queue, out: int) -> bool:
        """Decodes and waits. Returns whether every segment is valid; if not, the weights are undefined."""
        return self._whole.judge(queue.device, out)

    def decode_runs(self, queue: Queue, runs: Sequence[ResidentRun], out: int) -> bool:
        """Decodes runs of segments and waits. Returns whether all are valid."""
        return _Work(queue.device, self.plan_runs(runs)).judge(queue.device, out)

    def place(self, queue: Queue, product: Product) -> Placed | None:
        """Prepares the tensor for multiplication, and waits. None if a segment is invalid."""
        placed = Placed(queue.device, product, self._at, self.entry)
        good = self._whole.judge(queue.device, None, placed.matrix)
        return placed if good else None


class _Work:
    """Jobs and warps on the device, and a status word per job: zero until a problem is found."""

    def __init__(self, device: Device, plan: Plan) -> None:
        records = [plan.jobs, *plan.parts.values()]
        self._status_at = sum(some.nbytes for some in records)
        size = self._status_at + 4 * len(plan.jobs)
        self._plan, staging = plan, device.pin(size)
        self._memory = device.allocate(size)
        self._parts: dict[str, tuple[int, int]] = {}
        at = 0
        for name, some in (("", plan.jobs), *plan.parts.items()):
            staging.bytes[at : at + some.nbytes] = some.view(np.uint8).reshape(-1)
            self._parts[name] = self._memory.address + at, len(some)
            at += some.nbytes
        staging.bytes[at:size] = 0
        device.copy(self._memory.address, staging.address, size)
        device.mark().wait()  # the pinned memory is freed on return

    def start(self, device: Device, out: int | None, matrix: Memory | None = None) -> None:
        """Launches all kernels.

        Args:
            out: output address, or None to decode no weights.
            matrix: a `layout.MATRIX` to prepare, or None.
        """
        jobs, plan = len(self._plan.jobs), self._plan
        # One allocation: it is most of the CPU cost of a call.
        memory = device.allocate(4 * (plan.index_words + plan.error_words))
        errors = memory.address + 4 * plan.index_words
        status = self._memory.address + self._status_at
        places = Places(self._parts[""][0], memory.address, status, errors)
        parts = {name: part for name, part in self._parts.items() if name and out is not None}
        launch(device, places, jobs, parts, out or 0)
        if matrix is not None:
            device.launch("place_matrix", jobs, [places.jobs, matrix.address, places.index, places.status])

    def judge(self, device: Device, out: int | None, matrix: Memory | None = None) -> bool:
        """Calls `start` and waits. Returns whether all jobs were valid in all calls of `start` so far.

        Resets the status words if not.
        """
        self.start(device, out, matrix)
        status, words = self._memory.address + self._status_at, device.pin(4 * len(self._plan.jobs))
        device.copy(words.address, status, len(words.bytes))
        device.mark().wait()
        good = not words.bytes.any()
        if not good:
            words.bytes[:] = 0
            device.copy(status, words.address, len(words.bytes))
            device.mark().wait()
        return good


class Placed:
    """A matrix that is prepared for multiplication.

    Attributes:
        product: the host's data of the matrix.
        matrix: its `layout.MATRIX`, on the device.
    """

    def __init__(self, device: Device, product: Product, at: int, entry: TensorEntry) -> None:
        """Copies the record and the factors; the kernel ``place_matrix`` computes the rest."""
        self.product = product
        sizes = [layout.MATRIX.itemsize, 4 * product.chunks, 4 * product.rows * product.units]
        factors = product.factors
        if factors is not None:
            sizes.append(factors.nbytes)
        starts = np.cumsum([0, *(-(-size // layout.ALIGNMENT) * layout.ALIGNMENT for size in sizes)])
        self._memory = device.allocate(int(starts[-1]))
        self.matrix: Memory = self._memory  # the record is the first
        record = product.record.copy()
        record["data"], record["bytes"] = at, int(entry.chunks["length"].sum())
        for name, start in zip(("masks", "places", "scale"), starts[1:-1], strict=False):
            record[name] = self._memory.address + int(start)
        staging = device.pin(record.nbytes + (0 if factors is None else factors.nbytes))
        staging.bytes[: record.nbytes] = _octets(record)
        device.copy(self._memory.address, staging.address, record.nbytes)
        if factors is not None:
            staging.bytes[record.nbytes :] = _octets(factors)
            at = self._memory.address + int(starts[3])
            device.copy(at, staging.address + record.nbytes, factors.nbytes)
        device.mark().wait()  # the pinned memory is freed on return

    def multiply(self, queue: Queue, operands: Operands) -> None:
        """Enqueues y = x @ matrix.T + bias."""
        product, item = self.product, 4 if self.product.parts > 1 else 2
        for first in range(0, operands.batch, product.most):
            batch = min(operands.batch - first, product.most)
            arguments = [
                self.matrix.address,
                operands.x + first * product.columns * item,
                operands.bias,
                operands.y + first * product.rows * item,
                operands.sums,
                operands.done,
                batch,
                product.units_of_slice,
            ]
            queue.device.launch(product.kernel, product.blocks * product.slices, arguments)


def _octets(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    return np.frombuffer(values.tobytes(), np.uint8)
