"""The interface of a device: memory, copies, launches and marks, in one queue.

Rules: everything except `HostMemory.bytes` and `Mark.wait` is asynchronous: it joins a queue and returns at
once. Device memory that is released is freed when the queue has reached that point. Pinned memory must be
kept until the queue no longer uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ...coding.bits import Bytes


class Memory(Protocol):
    """Device memory, at a multiple of 256 bytes. It is freed with the last reference to this object."""

    @property
    def address(self) -> int:
        """The address of its first byte."""


class HostMemory(Protocol):
    """Pinned host memory, which the device reads and writes asynchronously."""

    @property
    def address(self) -> int:
        """The address of its first byte."""

    @property
    def bytes(self) -> Bytes:
        """Its contents, writable."""


class Mark(Protocol):
    """A point in the queue."""

    def wait(self) -> None:
        """Blocks until all earlier work in the queue is done."""


class Device(Protocol):
    """A queue of work on a device."""

    def allocate(self, size: int) -> Memory:
        """Allocates device memory; its contents are undefined."""

    def pin(self, size: int) -> HostMemory:
        """Allocates pinned host memory."""

    def copy(self, to: int, source: int, size: int) -> None:
        """Copies bytes between addresses of the device or of pinned memory."""

    def launch(self, kernel: str, blocks: int, arguments: Sequence[int]) -> None:
        """Launches a kernel with `layout.THREADS` threads per block.

        Args:
            kernel: its name.
            blocks: the number of blocks.
            arguments: unsigned; a kernel takes all 64 bits of an address, the low 32 bits of a count.
        """

    def mark(self) -> Mark:
        """Returns a mark at the current end of the queue."""

    def wait_for(self, mark: Mark) -> None:
        """Makes later work in this queue wait for a mark of another queue of the device."""
