"""Decodes into the memory of a device, with a ring of pinned buffers and a second queue for copies.

While the device decodes one batch, the second queue copies the next one to the device, and the CPU reads the
one after that from the file straight into pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...coding.bits import Bytes
from ..device_interface import DeviceRun
from .batch import Coming, Plan, Running, Task, plan_batch, run_batch
from .device import Device, HostMemory
from .driver import CudaDevice
from .loaded import Recipes
from .recipe import Recipe

# Opens a queue. Arguments: the index of a device, and the handle of the stream that the queue uses, or None
# for a new stream. Tests replace it.
open_device: Callable[[int, int | None], Device] = CudaDevice


@dataclass
class _Slot:
    """Pinned memory and the batch that uses it. Implements `device_interface.Pending`."""

    staging: HostMemory | None = None
    running: Running | None = None

    def good(self) -> list[bool]:
        """Implements `device_interface.Pending`."""
        assert self.running is not None
        running, self.running = self.running, None
        return running.good()


@dataclass
class _Batch:
    """A planned batch. Implements `device_interface.DeviceBatch`."""

    queue: Queue
    slot: _Slot
    plan: Plan

    @property
    def places(self) -> Sequence[Bytes]:
        """Implements `device_interface.DeviceBatch`."""
        assert self.slot.staging is not None
        return [self.slot.staging.bytes[at : at + length] for at, length in self.plan.places]

    def start(self) -> _Slot:
        """Implements `device_interface.DeviceBatch`."""
        return self.queue.start(self)


class Queue:
    """A queue on the caller's stream, and one for copies. Implements `device_interface.DeviceQueue`.

    Attributes:
        depth: number of pinned buffers: for the batches that are being read, copied and decoded.
        device: the queue on the caller's stream.
        recipes: the recipes that are on the device.
    """

    depth = 3

    def __init__(self, device: Device, open_copying: Callable[[], Device]) -> None:
        """Creates a queue.

        Args:
            device: the queue that decodes.
            open_copying: opens the queue for copies to the device, at first use.
        """
        self.device, self.recipes = device, Recipes(device)
        self._open_copying = open_copying
        self._slots = [_Slot() for _ in range(self.depth)]
        self._turn = 0

    @cached_property
    def _copying(self) -> Device:
        return self._open_copying()

    def prepare(self, recipes: Sequence[Recipe]) -> None:
        """Implements `device_interface.DeviceQueue`."""
        self.recipes.load(recipes)

    def plan_runs(self, runs: Sequence[DeviceRun]) -> _Batch:
        """Implements `device_interface.DeviceQueue`."""
        slot = self._slots[self._turn % self.depth]
        assert slot.running is None, "more batches are pending than there are buffers"
        plan = plan_batch([self._task_of(run) for run in runs])
        if slot.staging is None or len(slot.staging.bytes) < plan.size:
            # Room for a slightly larger next batch.
            slot.staging = self.device.pin(plan.size + plan.size // 4)
        return _Batch(self, slot, plan)

    def _task_of(self, run: DeviceRun) -> Task:
        at = self.recipes.address(run.recipe)
        return Task(run.recipe, at, Coming(run.length), run.total, run.start, run.first, run.stop, run.out)

    def start(self, batch: _Batch) -> _Slot:
        """Starts a batch of this queue, of which the caller has read the chunks."""
        slot = batch.slot
        assert slot is self._slots[self._turn % self.depth], "the batch has ended"
        assert slot.staging is not None
        slot.running = run_batch(self.device, batch.plan, slot.staging, self._copying)
        self._turn += 1
        return slot

    def abandon(self) -> None:
        """Implements `device_interface.DeviceQueue`."""
        self._copying.mark().wait()
        self.device.mark().wait()
        self._slots = [_Slot() for _ in range(self.depth)]
