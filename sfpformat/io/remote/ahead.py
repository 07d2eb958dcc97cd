"""Reads planned ranges of remote files ahead of the decoder, within a bound on memory.

Theory of operation: the plan is a list of blocks, in the order of the reads. A block merges ranges that are
close to each other, and long ranges are cut. Requests for the first blocks run concurrently; when all planned
bytes of a block have been read, its memory is released, and the next request starts. A read that needs a
block whose request has not started starts it, whatever the bound says: reads in any order end.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple, Protocol

from ..closing import Closing

# Unneeded bytes between two ranges that are fetched with them: another request takes longer.
MOST_GAP = 64 << 10
# Bytes of a request. Less, and its latency counts; more, and its bytes wait for the last one.
MOST_BLOCK = 8 << 20
# Bytes of the first two requests of a plan. The next two have twice as many, and so on: concurrent requests
# share the bandwidth, and equal ones would all end late, so that decoding would begin late.
FIRST_BLOCK = 1 << 20
# Requests at a time of a plan; servers limit the bandwidth of each connection.
MOST_REQUESTS = 16
# Bytes in memory that have arrived or were requested, and are not decoded yet, if the caller does not say.
DEFAULT_MEMORY = 256 << 20


class Fetching(Protocol):
    """A remote file, for a plan."""

    def submit(self, start: int, stop: int) -> Future[bytes]:
        """Starts a request, as `ranges.Ranges.submit`."""

    def add_plan(self, plan: ReadAhead) -> None:
        """Serves reads from the plan."""

    def remove_plan(self, plan: ReadAhead) -> None:
        """Ends `add_plan`."""


class Range(NamedTuple):
    """Bytes of a file that will be read once: from ``start`` up to, not including, ``stop``."""

    file: Fetching
    start: int
    stop: int


@dataclass(frozen=True)
class Progress:
    """How much of a plan has been read by the decoder.

    Attributes:
        done: bytes that have arrived and were read.
        total: bytes of the plan.
        seconds: time since the plan began.
    """

    done: int
    total: int
    seconds: float

    @property
    def gigabytes_per_second(self) -> float:
        """The mean rate since the plan began, in 10^9 bytes per second."""
        return self.done / max(self.seconds, 1e-9) / 1e9


@dataclass(eq=False)
class _Block:
    """Bytes that one request fetches.

    Attributes:
        file, start, stop: the bytes.
        unread: planned bytes that have not been read yet. Ranges that overlap count several times.
        future: the request, if it has started.
        released: whether all was read, or the block is no longer needed.
    """

    file: Fetching
    start: int
    stop: int
    unread: int = 0
    future: Future[bytes] | None = field(default=None, repr=False)
    released: bool = False


class ReadAhead(Closing):
    """A plan, and its requests. A context manager, which cancels the rest. Thread-safe."""

    def __init__(
        self,
        ranges: Iterable[Range],
        memory: int = DEFAULT_MEMORY,
        report: Callable[[Progress], None] | None = None,
    ) -> None:
        """Starts the first requests.

        Args:
            ranges: the ranges, in the order in which they will be read, file by file. Each will be read once.
            memory: the greatest number of bytes that are requested or have arrived, and are not read.
            report: called when the bytes of a block have been read, by the thread that read them.
        """
        self._memory, self._report, self._begin = memory, report, time.monotonic()
        self._lock = threading.RLock()
        self._held = self._requests = self._next = self._done = 0
        self._is_starting = False
        by_file: dict[int, list[Range]] = {}
        for one in ranges:
            if one.start < one.stop:
                by_file.setdefault(id(one.file), []).append(one)
        self._blocks = [block for some in by_file.values() for block in _blocks(some)]
        self._blocks_of: dict[int, list[_Block]] = {}
        for block in sorted(self._blocks, key=_start_of):
            self._blocks_of.setdefault(id(block.file), []).append(block)
        self._total = sum(block.stop - block.start for block in self._blocks)
        self._files = [some[0].file for some in by_file.values()]
        for file in self._files:
            file.add_plan(self)
        with self._lock:
            self._start_next()

    @property
    def progress(self) -> Progress:
        """How much has been read."""
        return Progress(self._done, self._total, time.monotonic() - self._begin)

    def has(self, file: Fetching, start: int, stop: int) -> bool:
        """Returns whether the plan has all bytes of a range, none of them released."""
        with self._lock:
            return self._covering(file, start, stop) is not None

    def read(self, file: Fetching, start: int, stop: int) -> bytes | memoryview | None:
        """Returns the bytes of a range, when they have arrived. None if the plan does not have all of them.

        Raises:
            RemoteError, OSError: a request failed.
        """
        with self._lock:
            blocks = self._covering(file, start, stop)
            if blocks is None:
                return None
            for block in blocks:
                if block.future is None:
                    self._request(block)
            futures = [block.future for block in blocks if block.future is not None]
        parts = []
        try:
            for block, future in zip(blocks, futures, strict=True):
                own = slice(max(start - block.start, 0), stop - block.start)
                parts.append(memoryview(future.result())[own])
        except CancelledError:  # the plan was closed meanwhile
            return None
        with self._lock:
            for block, part in zip(blocks, parts, strict=True):
                block.unread -= len(part)
                if block.unread <= 0 and not block.released:
                    self._release(block)
                    self._done += block.stop - block.start
                    if self._report is not None:
                        self._report(self.progress)
            self._start_next()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def forget(self, file: Fetching, start: int, stop: int) -> None:
        """Releases the blocks inside a range: nothing in it will be read again."""
        with self._lock:
            for block in self._blocks_of.get(id(file), ()):
                if start <= block.start and block.stop <= stop:
                    self._release(block)
            self._start_next()

    def close(self) -> None:
        """Cancels requests, and releases all memory."""
        for file in self._files:
            file.remove_plan(self)
        with self._lock:
            self._next = len(self._blocks)
            for block in self._blocks:
                self._release(block)

    def _covering(self, file: Fetching, start: int, stop: int) -> list[_Block] | None:
        blocks = self._blocks_of.get(id(file), [])
        first = bisect_right(blocks, start, key=_start_of) - 1
        found, at = [], start
        for block in blocks[max(first, 0) :]:
            if block.start > at or block.stop <= at or block.released:
                return None
            found.append(block)
            at = block.stop
            if at >= stop:
                return found
        return None

    def _start_next(self) -> None:
        """Starts requests for the next blocks, as far as the bounds allow. The caller holds the lock."""
        if self._is_starting:  # called by `_ended` of a request that ended at once
            return
        self._is_starting = True
        try:
            while self._next < len(self._blocks) and self._requests < MOST_REQUESTS:
                block = self._blocks[self._next]
                if block.future is None and not block.released:
                    if self._held and self._held + block.stop - block.start > self._memory:
                        break
                    self._request(block)
                self._next += 1
        finally:
            self._is_starting = False

    def _request(self, block: _Block) -> None:
        self._held += block.stop - block.start
        self._requests += 1
        block.future = block.file.submit(block.start, block.stop)
        block.future.add_done_callback(self._ended)

    def _ended(self, _: Future[bytes]) -> None:
        with self._lock:
            self._requests -= 1
            self._start_next()

    def _release(self, block: _Block) -> None:
        if block.released:
            return
        block.released = True
        if block.future is not None:
            block.future.cancel()
            block.future = None
            self._held -= block.stop - block.start


def _blocks(ranges: list[Range]) -> list[_Block]:
    """Merges and cuts the ranges of one file into disjoint blocks, in the order of the ranges."""
    spans: list[list[int]] = []  # start and stop, in the order of the ranges
    known: list[list[int]] = []  # the same lists, ascending
    for _, start, stop in ranges:
        at = start
        while at < stop:
            place = bisect_right(known, at, key=itemgetter(0))
            if place and known[place - 1][1] > at:  # planned before
                at = known[place - 1][1]
                continue
            end = min(stop, known[place][0]) if place < len(known) else stop
            last = spans[-1] if spans else None
            if last is not None and place and known[place - 1] is last and _is_merged(last, at, end):
                last[1] = end
            else:
                spans.append([at, end])
                known.insert(place, spans[-1])
            at = end
    blocks: list[_Block] = []
    for start, stop in spans:
        while start < stop:
            size = min(FIRST_BLOCK << min(len(blocks) // 2, 30), MOST_BLOCK)
            blocks.append(_Block(ranges[0].file, start, min(start + size, stop)))
            start += size
    by_start = sorted(blocks, key=_start_of)
    for _, start, stop in ranges:
        for block in by_start[bisect_right(by_start, start, key=_start_of) - 1 :]:
            if block.start >= stop:
                break
            block.unread += min(stop, block.stop) - max(start, block.start)
    return blocks


def _is_merged(span: list[int], start: int, stop: int) -> bool:
    """Returns whether a range that begins after the end of a span is fetched with it."""
    return start == span[1] or (start - span[1] <= MOST_GAP and stop - span[0] <= MOST_BLOCK)


def _start_of(block: _Block) -> int:
    return block.start
