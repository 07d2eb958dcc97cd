"""Thread pools. Threads run in parallel because numpy, compiled kernels and checksums release the GIL."""

from __future__ import annotations

import operator
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

from ..errors import OptionError

T = TypeVar("T")
R = TypeVar("R")


def default_threads() -> int:
    """Returns the number of processors that this process may use; the scheduler may allow only some."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def thread_count(threads: int | None) -> int:
    """Returns the number of threads that a caller asks for; None is `default_threads`.

    Raises:
        OptionError: it is not a whole number of at least 1.
    """
    if threads is None:
        return default_threads()
    if isinstance(threads, bool) or not hasattr(threads, "__index__") or threads < 1:
        raise OptionError(f"threads is {threads!r}, must be a whole number of at least 1, or None")
    return operator.index(threads)


class Workers:
    """A thread pool that yields results in order, and works a few items ahead. Starts at the first use.

    Attributes:
        threads: number of threads. With 1, the calling thread works.
    """

    def __init__(self, threads: int = 1) -> None:
        """Stores the number of threads. Does not start them."""
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._local = threading.local()
        self._starting = threading.Lock()

    def submit(self, work: Callable[[], R]) -> Future[R]:
        """Calls ``work`` in a thread of the pool. ``work`` may call `map`."""
        return self._started().submit(work)

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yields the result of ``work`` for each item, in order. Works a few items ahead.

        An exception is raised at the position of its item, and so does not depend on timing. A thread of the
        pool that calls this does the work that no other thread has begun, so that it never waits for threads
        that wait for it.

        Args:
            work: a function that all threads call.
            items: the items. Only the calling thread iterates over them.
        """
        rest = iter(items)
        first = list(islice(rest, 2))
        if self.threads <= 1 or len(first) < 2:
            yield from map(work, chain(first, rest))
            return
        pool, helps = self._started(), hasattr(self._local, "is_worker")
        ahead: deque[tuple[T, Future[R]]] = deque()

        def following() -> R:
            item, future = ahead.popleft()
            return work(item) if helps and future.cancel() else future.result()

        try:
            for item in chain(first, rest):
                ahead.append((item, pool.submit(work, item)))
                if len(ahead) > self.threads:
                    yield following()
            while ahead:
                yield following()
        finally:
            for _, future in ahead:
                future.cancel()

    def _started(self) -> ThreadPoolExecutor:
        with self._starting:  # several threads of a caller may map
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.threads, initializer=self._begin)
            return self._pool

    def _begin(self) -> None:
        self._local.is_worker = True

    def stop(self) -> None:
        """Waits for running work, cancels pending work, and ends the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def for_each(work: Callable[[T], object], items: Iterable[T], threads: int) -> None:
    """Calls ``work`` with each item, in several threads. The calling thread works, too.

    Starts the items in order, and no further items after an exception. If several items raise, raises the
    exception of the first of these items, which does not depend on timing.

    Args:
        work: a function that all threads call.
        items: the items. One thread at a time iterates over them.
        threads: number of threads, including the calling thread.
    """
    if threads <= 1:
        for item in items:
            work(item)
        return
    remaining = enumerate(items)
    lock = threading.Lock()
    failures: list[tuple[int, BaseException]] = []

    def worker() -> None:
        number = -1
        try:
            while True:
                with lock:
                    if failures:
                        return
                    following = next(remaining, None)
                if following is None:
                    return
                number, item = following
                work(item)
        except BaseException as error:  # KeyboardInterrupt too: raised again below
            with lock:
                failures.append((number, error))

    helpers = [threading.Thread(target=worker, daemon=True) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    worker()
    for helper in helpers:
        helper.join()
    if failures:
        raise min(failures, key=lambda failure: failure[0])[1]
