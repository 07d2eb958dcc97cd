"""What decoding needs of a device: memory, copies, launches and marks, in one order of events.

Rules: everything but `HostMemory.bytes` and `Mark.wait` only joins a queue and comes back at once. Memory of
the device that is let go of stays until the queue has passed that point; pinned memory must be kept so long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ...coding.bits import Bytes


class Memory(Protocol):
    """Memory of the device, at a multiple of 256 bytes; it is freed when nobody holds this any more."""

    @property
    def address(self) -> int:
        """Where it begins."""


class HostMemory(Protocol):
    """Memory of the host that the device copies from and to while the host works."""

    @property
    def address(self) -> int:
        """Where it begins."""

    @property
    def bytes(self) -> Bytes:
        """What is there."""


class Mark(Protocol):
    """A point in the queue."""

    def wait(self) -> None:
        """Comes back when everything before it is done."""


class Device(Protocol):
    """A queue of work on a device."""

    def allocate(self, size: int) -> Memory:
        """Some bytes of memory, with whatever was there."""

    def pin(self, size: int) -> HostMemory:
        """Some bytes of the host's memory."""

    def copy(self, to: int, source: int, size: int) -> None:
        """Copies bytes between addresses of the device or of pinned memory."""

    def launch(self, kernel: str, blocks: int, arguments: Sequence[int]) -> None:
        """Runs a kernel, `layout.THREADS` threads a block.

        Args:
            kernel: its name.
            blocks: how many.
            arguments: unsigned; a kernel takes all 64 bits of an address, the lower 32 of a count.
        """

    def mark(self) -> Mark:
        """This point in the queue."""

    def wait_for(self, mark: Mark) -> None:
        """Lets what follows in the queue wait for a mark of another queue of the device."""
