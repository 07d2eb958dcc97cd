"""Plans which process writes which tensors, and which parts other processes send to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ...dtypes import Dtype
from ...errors import OptionError
from ...names import quoted
from .boxes import Box

# Bytes of the parts that a process receives at a time, unless one tensor has more.
ROOM = 64 << 20


class Whole(NamedTuple):
    """A tensor that a process writes.

    Attributes:
        name, shape: its name and shape.
        dtype: its dtype.
        parts: the parts that processes hold, which are the whole tensor together.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    parts: tuple[Box, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.itemsize

    def require_complete(self) -> None:
        """Raises OptionError unless the parts have as many elements as the tensor."""
        held = sum(part.elements for part in self.parts)
        if held != math.prod(self.shape):
            raise OptionError(
                f"tensor {quoted(self.name)}: the processes save {held:,} of its {math.prod(self.shape):,} "
                "elements"
            )


class Round(NamedTuple):
    """What a process does at a time.

    Attributes:
        sends: process -> numbers of the own items that it sends there.
        tensors: the tensors that it writes.
    """

    sends: dict[int, list[int]]
    tensors: list[Whole]


@dataclass
class Share:
    """What one process does: ``count`` processes, and rounds, of which all have the same number."""

    count: int
    rounds: list[Round] = field(default_factory=list)


def plan_writing(tensors: Sequence[Whole], count: int, room: int = ROOM) -> list[Share]:
    """Plans writing.

    Args:
        tensors: all tensors, in the order of the files.
        count: the number of processes.
        room: bytes of the parts that a process receives at a time, unless one tensor has more.

    Returns:
        The share of each process.

    Raises:
        OptionError: the parts of a tensor are not the whole tensor.
    """
    for tensor in tensors:
        tensor.require_complete()
    owners = _owners(tensors, count)
    rounds: list[list[list[Whole]]] = [[] for _ in range(count)]
    left = [0] * count
    for tensor in tensors:
        rank = owners[tensor.name]
        received = sum(part.elements * tensor.itemsize for part in tensor.parts if part.rank != rank)
        if not rounds[rank] or received > left[rank]:
            rounds[rank].append([])
            left[rank] = room
        rounds[rank][-1].append(tensor)
        left[rank] -= received
    shares = [Share(count) for _ in range(count)]
    for number in range(max(map(len, rounds))):
        own = [some[number] if number < len(some) else [] for some in rounds]
        for rank, share in enumerate(shares):
            sends = {
                target: [
                    part.item
                    for tensor in some
                    for part in tensor.parts
                    if part.rank == rank and part.elements
                ]
                for target, some in enumerate(own)
                if target != rank
            }
            share.rounds.append(Round({to: items for to, items in sends.items() if items}, own[rank]))
    return shares


def _owners(tensors: Sequence[Whole], count: int) -> Mapping[str, int]:
    """Returns the process that writes each tensor: one that holds a part of it, and writes few bytes."""
    loads = [0] * count
    out = {}
    for tensor in sorted(tensors, key=lambda tensor: -tensor.nbytes):
        ranks = {part.rank for part in tensor.parts} or range(count)
        out[tensor.name] = min(ranks, key=lambda rank: (loads[rank], rank))
        loads[out[tensor.name]] += tensor.nbytes
    return out
