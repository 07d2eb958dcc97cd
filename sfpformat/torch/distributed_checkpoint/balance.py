"""Divides work among processes by bytes."""

from __future__ import annotations

from collections.abc import Sequence


def level_of(loads: Sequence[int], more: int) -> tuple[float, int]:
    """Returns the load up to which the least loaded processes can be filled, and how many these are.

    Args:
        loads: bytes of each process, ascending.
        more: bytes to divide.
    """
    total = more
    for count, load in enumerate(loads):
        if count and load * count >= total:
            return total / count, count
        total += load
    return total / len(loads), len(loads)


def divided(loads: list[int], members: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Divides consecutive pieces among processes, so that their loads become as equal as pieces allow.

    Args:
        loads: bytes of each process so far. Those of the pieces are added.
        members: the processes that may take pieces.
        sizes: bytes of each piece.

    Returns:
        Process, first piece, and one past its last, for each process with pieces.
    """
    order = sorted(members, key=lambda rank: (loads[rank], rank))
    order = order[: level_of([loads[rank] for rank in order], sum(sizes))[1]]
    out = []
    at = 0
    for number, rank in enumerate(order):
        left = order[number:]
        level = (sum(loads[other] for other in left) + sum(sizes[at:])) / len(left)
        first = at
        while at < len(sizes) and (
            len(left) == 1 or at == 0 == first or loads[rank] + sizes[at] / 2 <= level
        ):
            loads[rank] += sizes[at]
            at += 1
        if at > first:
            out.append((rank, first, at))
    return out
