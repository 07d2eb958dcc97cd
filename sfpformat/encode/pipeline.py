"""Works on several tensors at a time and finishes them in order, in bounded memory.

Theory of operation: threads of a pool plan and encode tensors. The calling thread writes the results, in the
order of the tensors. It starts more work only if the unfinished tensors, except the largest one, have at most
`ROOM` bytes. Their levels, counts and encoded bytes take memory, too: `tests/encode/test_pipeline.py` bounds
all of it to the largest tensor and 300 MB. Threads that work on a tensor share its chunks with idle threads,
so that one large tensor occupies all threads, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from ..io.threads import Workers

R = TypeVar("R")

# The greatest size of all unfinished tensors together, in bytes, without the largest one.
ROOM = 48 << 20
# Smaller tensors, in bytes, are encoded by the calling thread, which saves the change to another thread.
_LEAST_SHARED = 1 << 15
# The greatest number of unfinished tensors, per thread.
_MOST_EACH = 16


class _Unfinished(NamedTuple):
    """A tensor that is not finished yet.

    Attributes:
        future: the result of its work.
        size: size of the tensor in bytes.
        finish: called with the result.
    """

    future: Future[Any]
    size: int
    finish: Callable[[Any], None]


def has_room(size: int, unfinished: Iterable[int], threads: int) -> bool:
    """Returns whether work on a tensor can begin before the unfinished ones are finished.

    Args:
        size: size of the tensor in bytes.
        unfinished: sizes of the unfinished tensors in bytes.
        threads: the number of threads.
    """
    sizes = [size, *unfinished]
    return sum(sizes) - max(sizes) <= ROOM and len(sizes) <= _MOST_EACH * threads


class Pipeline:
    """Calls functions in threads, and others with their results in the calling thread, in order."""

    def __init__(self, workers: Workers) -> None:
        """Starts with no work. The caller stops the workers."""
        self._workers = workers
        self._unfinished: deque[_Unfinished] = deque()

    def __len__(self) -> int:
        """The number of unfinished tensors."""
        return len(self._unfinished)

    def put(self, work: Callable[[], R], size: int, finish: Callable[[R], None]) -> None:
        """Starts work on a tensor, and finishes earlier tensors if they are ready or memory is short.

        Args:
            work: called in any thread.
            size: size of the tensor in bytes.
            finish: called with the result of ``work``, in the calling thread of `put` or `drain`, after those
                of earlier tensors.

        Raises:
            Exception: what ``work`` or ``finish`` of the first failing tensor raised. Later tensors are
                dropped.
        """
        if self._workers.threads <= 1:
            finish(work())
            return
        while self._unfinished and not self._has_room_for(size):
            self._finish_first()
        future = self._workers.submit(work) if size >= _LEAST_SHARED else _called(work)
        self._unfinished.append(_Unfinished(future, size, finish))
        while self._unfinished and self._unfinished[0].future.done():
            self._finish_first()

    def drain(self) -> None:
        """Finishes all tensors.

        Raises:
            Exception: as for `put`.
        """
        while self._unfinished:
            self._finish_first()

    def drop(self) -> None:
        """Drops the unfinished tensors. Work that has begun still runs to its end."""
        while self._unfinished:
            self._unfinished.pop().future.cancel()

    def _has_room_for(self, size: int) -> bool:
        return has_room(size, [tensor.size for tensor in self._unfinished], self._workers.threads)

    def _finish_first(self) -> None:
        first = self._unfinished[0]
        try:
            first.finish(first.future.result())
        except BaseException:
            self.drop()
            raise
        self._unfinished.popleft()


def _called(work: Callable[[], R]) -> Future[R]:
    """Calls ``work`` and returns its result or exception as a future."""
    future: Future[R] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future
