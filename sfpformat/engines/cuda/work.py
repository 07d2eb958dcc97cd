"""Implements `Engine.decode_runs` on a device: copies chunks to it, and weights back to host memory.

Each thread has its own queue. `pinned_loading` decodes tensors that stay on the device.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from ...coding.quantisers import F32
from ...container.entry import TensorEntry
from ..interface import Run
from . import pinned_loading, recipe
from .batch import fill_chunks, plan_batch, run_batch, task_of
from .device import Device, HostMemory
from .loaded import Recipes
from .recipe import Recipe

__all__ = ["decode_runs", "make_recipe"]

_OUT_UNIT = 256
_thread = threading.local()


class _Queue:
    """A thread's queue, its recipes on the device, and pinned memory that grows on demand."""

    def __init__(self) -> None:
        self.device: Device = pinned_loading.open_device(0, None)
        self.recipes = Recipes(self.device)
        self._staging: HostMemory | None = None

    def staging(self, size: int) -> HostMemory:
        """Returns pinned memory of at least ``size`` bytes.

        Reuses the previous memory if it is large enough.
        """
        if self._staging is None or len(self._staging.bytes) < size:
            self._staging = self.device.pin(size)
        return self._staging


def _own_queue() -> _Queue:
    queue: _Queue | None = getattr(_thread, "queue", None)
    if queue is None:
        _thread.queue = queue = _Queue()
    return queue


def make_recipe(entry: TensorEntry, vectors: dict[str, F32], weights: int) -> Recipe | None:
    """Implements `Engine.make_recipe`."""
    return recipe.make_recipe(entry, vectors)


def decode_runs(runs: Sequence[Run[NDArray[Any]]]) -> list[bool]:
    """Implements `Engine.decode_runs`."""
    queue = _own_queue()
    queue.recipes.load([run.recipe for run in runs])
    offsets, size = [], 0
    for run in runs:
        offsets.append(size)
        size += -(-run.out.nbytes // _OUT_UNIT) * _OUT_UNIT
    out = queue.device.allocate(size)
    tasks = [task_of(run, queue.recipes, out.address + at) for run, at in zip(runs, offsets, strict=True)]
    plan = plan_batch(tasks)
    staging = queue.staging(plan.size + size)
    fill_chunks(plan, staging)
    good = run_batch(queue.device, plan, staging).good()
    done = [(run, at) for run, at, is_good in zip(runs, offsets, good, strict=True) if is_good]
    for run, at in done:  # copies only runs that were decoded
        queue.device.copy(staging.address + plan.size + at, out.address + at, run.out.nbytes)
    queue.device.mark().wait()
    for run, at in done:
        raw = staging.bytes[plan.size + at : plan.size + at + run.out.nbytes]
        run.out[:] = raw.view(run.out.dtype)
    return good
