"""Thread pools. Threads run in parallel because numpy, compiled kernels and checksums release the GIL."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """A thread pool that yields results in order, and works a few items ahead. Starts at the first use."""

    def __init__(self, threads: int = 1) -> None:
        """Stores the number of threads. Does not start them.

        Args:
            threads: number of threads. With 1, the calling thread works.
        """
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yields the result of ``work`` for each item, in order. Works a few items ahead.

        An exception is raised at the position of its item, and so does not depend on timing.

        Args:
            work: a function that all threads call.
            items: the items. Only the calling thread iterates over them.
        """
        rest = iter(items)
        first = list(islice(rest, 2))
        if self._threads <= 1 or len(first) < 2:
            yield from map(work, chain(first, rest))
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads)
        ahead: deque[Future[R]] = deque()
        try:
            for item in chain(first, rest):
                ahead.append(self._pool.submit(work, item))
                if len(ahead) > self._threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

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
