"""Decodes into the memory of a device, with a ring of pinned buffers and a second queue for copies.

While the device decodes one batch, the second queue copies the next one to the device, and the CPU reads the
one after that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..interface import Run
from .batch import Running, fill_chunks, plan_batch, run_batch, task_of
from .device import Device, HostMemory
from .driver import CudaDevice
from .loaded import Recipes
from .recipe import Recipe

# Opens a queue. Arguments: the index of a device, and the handle of the stream that the queue uses, or None
# for a new stream. Tests replace it.
open_device: Callable[[int, int | None], Device] = CudaDevice
_MOST_COPYING = 8  # threads that copy to pinned memory; more do not raise the bandwidth


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

    def start_runs(self, runs: Sequence[Run[int]], threads: int) -> _Slot:
        """Implements `device_interface.DeviceQueue`."""
        slot = self._slots[self._turn % self.depth]
        assert slot.running is None, "more batches are pending than there are buffers"
        plan = plan_batch([task_of(run, self.recipes, run.out) for run in runs])
        if slot.staging is None or len(slot.staging.bytes) < plan.size:
            # Room for a slightly larger next batch.
            slot.staging = self.device.pin(plan.size + plan.size // 4)
        fill_chunks(plan, slot.staging, min(threads, _MOST_COPYING))
        slot.running = run_batch(self.device, plan, slot.staging, self._copying)
        self._turn += 1
        return slot

    def abandon(self) -> None:
        """Implements `device_interface.DeviceQueue`."""
        self._copying.mark().wait()
        self.device.mark().wait()
        self._slots = [_Slot() for _ in range(self.depth)]
