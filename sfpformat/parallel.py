"""Work done for many items, in threads: numpy, compiled kernels and checksums let each other run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


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
