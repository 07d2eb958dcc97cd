"""Work done for many items, in threads: numpy, compiled kernels and checksums let each other run."""

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
    """Threads that work ahead of the caller, who takes the results in order. They start when first needed."""

    def __init__(self, threads: int = 1) -> None:
        """Starts nothing.

        Args:
            threads: how many work side by side; with 1 the caller does the work.
        """
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """What ``work`` gives for each item, in order; a few items are worked on ahead.

        A failure is raised in its turn, so what is raised does not depend on timing.

        Args:
            work: called from any of the threads.
            items: gone through by the caller's thread.
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
        """Ends the threads, when what they are working on is done."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def for_each(work: Callable[[T], object], items: Iterable[T], threads: int) -> None:
    """Calls ``work`` with each item; the calling thread works too.

    Items are handed out in order. After a failure no more are; of several failures that of the first item is
    raised, so what is raised does not depend on timing.

    Args:
        work: called from any of the threads.
        items: gone through by one thread at a time.
        threads: how many work side by side.
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
        except BaseException as error:  # KeyboardInterrupt too: it is raised again below
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
