"""Agreement between processes: all of them succeed, or all of them raise an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import ProcessError

T = TypeVar("T")
# Sends an object to all processes. Returns those of all processes, in their order.
Exchange = Callable[[object], list[Any]]


def agreed(exchange: Exchange, work: Callable[[], T], outcome: str) -> list[T]:
    """Calls a function in each process. All processes call this together.

    Args:
        exchange: exchanges objects between the processes.
        work: the function. Its result can be pickled.
        outcome: what the error says about the whole run, such as ``"nothing was changed"``.

    Returns:
        The results of all processes, in their order.

    Raises:
        ProcessError: the function failed in another process. An error of this process is raised unchanged.
    """
    failure: BaseException | None = None
    result: T | None = None
    try:
        result = work()
    except BaseException as error:  # raised below, when all processes know
        failure = error
    received = exchange((None if failure is None else f"{type(failure).__name__}: {failure}", result))
    if failure is not None:
        raise failure
    for number, (words, _) in enumerate(received):
        if words is not None:
            raise ProcessError(f"process {number} of {len(received)} failed; {outcome}: {words}")
    return [found for _, found in received]
