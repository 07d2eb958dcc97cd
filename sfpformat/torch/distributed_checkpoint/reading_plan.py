"""Plans which process reads which chunks, and to which processes it sends their elements.

A chunk is read whole and its checksum is compared (R-LAY-004), also if a process needs few of its elements.
If several processes need elements of a chunk, one of them reads it and sends the others theirs. So no
checksum is skipped, and together the processes read each chunk once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...container.entry import TensorEntry
from .balance import divided
from .boxes import Box, elements_before, position_at

# Bytes of elements that a process decodes before it sends them.
ROOM = 32 << 20


class Cut(NamedTuple):
    """Consecutive elements of a box: ``first`` to ``stop`` - 1 in the order of the box."""

    box: Box
    first: int
    stop: int


class Piece(NamedTuple):
    """Consecutive positions of a tensor, which one process decodes.

    Attributes:
        tensor: the tensor's name.
        low, high: the positions, ``high`` exclusive.
        cuts: the elements of all boxes among them.
    """

    tensor: str
    low: int
    high: int
    cuts: tuple[Cut, ...]


class Arrival(NamedTuple):
    """Elements that another process sends: the process, the tensor, and which elements."""

    source: int
    tensor: str
    cut: Cut


class Round(NamedTuple):
    """Pieces that a process decodes and sends at a time, and what it receives, in the order of sending."""

    pieces: list[Piece]
    arrivals: list[Arrival]


@dataclass
class Share:
    """What one process does.

    Attributes:
        count: the number of processes.
        identity: that of the file for which this was planned; see `SfpFile.identity`.
        own: the pieces that no other process needs.
        rounds: the exchange of the others. All processes have the same number of rounds.
    """

    count: int
    identity: object = None
    own: list[Piece] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)


class _Chunks(NamedTuple):
    """Consecutive chunks of a tensor that the same processes need: ``first`` to ``stop`` - 1."""

    tensor: str
    first: int
    stop: int
    members: tuple[int, ...]


class _Tensor:
    """A tensor, the boxes of it that processes need, and how many elements of each are before each chunk."""

    def __init__(self, entry: TensorEntry, boxes: Sequence[Box]) -> None:
        self.entry, self.boxes = entry, boxes
        count, size = len(entry.chunks), entry.segment * entry.chunk
        self.edges: NDArray[np.int64] = np.minimum(np.arange(count + 1) * size, entry.positions)
        self.selections = [box.selection(entry.shape) for box in boxes]
        self.before = [elements_before(selection, self.edges) for selection in self.selections]
        self.lengths = [int(length) for length, _ in entry.chunks.tolist()]

    def members(self) -> list[tuple[int, ...]]:
        """Returns the processes that need elements of each chunk."""
        needed: list[set[int]] = [set() for _ in self.lengths]
        for box, before in zip(self.boxes, self.before, strict=True):
            for chunk in np.flatnonzero(np.diff(before)).tolist():
                needed[chunk].add(box.rank)
        return [tuple(sorted(ranks)) for ranks in needed]

    def piece(self, first: int, stop: int) -> Piece:
        """Returns a piece with the needed elements of chunks."""
        cuts, ends = [], []
        for box, selection, before in zip(self.boxes, self.selections, self.before, strict=True):
            low, high = int(before[first]), int(before[stop])
            if low < high:
                cuts.append(Cut(box, low, high))
                ends.append(position_at(selection, low))
                ends.append(position_at(selection, high - 1))
        return Piece(self.entry.name, min(ends), max(ends) + 1, tuple(cuts))

    def pieces(self, first: int, stop: int, room: int) -> list[Piece]:
        """Returns the pieces of consecutive chunks, each of at most ``room`` bytes or of one chunk."""
        size = int(self.edges[1] - self.edges[0]) * self.entry.dtype.itemsize
        step = max(room // max(size, 1), 1)
        return [self.piece(at, min(at + step, stop)) for at in range(first, stop, step)]


def plan_reading(
    wanted: Mapping[str, Sequence[Box]], count: int, entry_of: Callable[[str], TensorEntry], room: int = ROOM
) -> list[Share]:
    """Plans reading.

    Args:
        wanted: tensor -> the boxes that processes need, in the order of the file.
        count: the number of processes.
        entry_of: returns the entry of a tensor.
        room: bytes of elements that a process decodes before it sends them.

    Returns:
        The share of each process.
    """
    tensors = {name: _Tensor(entry_of(name), boxes) for name, boxes in wanted.items()}
    taken = _taken(tensors, count)
    shares = [Share(count) for _ in range(count)]
    shared: list[list[Piece]] = [[] for _ in range(count)]
    for name, tensor in tensors.items():
        for rank, first, stop in sorted(taken[name], key=lambda part: part[1]):
            for piece in tensor.pieces(first, stop, room):
                alone = all(cut.box.rank == rank for cut in piece.cuts)
                (shares[rank].own if alone else shared[rank]).append(piece)
    sizes = {name: tensor.entry.dtype.itemsize for name, tensor in tensors.items()}
    rounds = [_rounds_of(pieces, sizes, room) for pieces in shared]
    for number in range(max(map(len, rounds))):
        own = [some[number] if number < len(some) else [] for some in rounds]
        for rank, share in enumerate(shares):
            arrivals = [
                Arrival(source, piece.tensor, cut)
                for source, pieces in enumerate(own)
                if source != rank
                for piece in pieces
                for cut in piece.cuts
                if cut.box.rank == rank
            ]
            share.rounds.append(Round(own[rank], arrivals))
    return shares


def _taken(tensors: Mapping[str, _Tensor], count: int) -> dict[str, list[tuple[int, int, int]]]:
    """Returns for each tensor which process reads which chunks: process, first, one past the last."""
    loads = [0] * count
    out: dict[str, list[tuple[int, int, int]]] = {name: [] for name in tensors}
    shared: list[tuple[int, _Chunks]] = []
    for name, tensor in tensors.items():
        for chunks in _same_members(name, tensor.members()):
            size = sum(tensor.lengths[chunks.first : chunks.stop])
            if len(chunks.members) == 1:
                loads[chunks.members[0]] += size
                out[name].append((chunks.members[0], chunks.first, chunks.stop))
            else:
                shared.append((size, chunks))
    # The largest first, so that the small ones make the loads equal.
    for _, chunks in sorted(shared, key=lambda pair: -pair[0]):
        lengths = tensors[chunks.tensor].lengths[chunks.first : chunks.stop]
        for rank, first, stop in divided(loads, chunks.members, lengths):
            out[chunks.tensor].append((rank, chunks.first + first, chunks.first + stop))
    return out


def _same_members(name: str, members: list[tuple[int, ...]]) -> Iterable[_Chunks]:
    """Yields consecutive chunks that the same processes need. Omits chunks that none needs."""
    for ranks, group in groupby(range(len(members)), key=members.__getitem__):
        numbers = list(group)
        if ranks:
            yield _Chunks(name, numbers[0], numbers[-1] + 1, ranks)


def _rounds_of(pieces: list[Piece], sizes: Mapping[str, int], room: int) -> list[list[Piece]]:
    """Divides pieces into rounds of at most ``room`` bytes, or of one piece."""
    out: list[list[Piece]] = []
    left = 0
    for piece in pieces:
        size = (piece.high - piece.low) * sizes[piece.tensor]
        if not out or size > left:
            out.append([])
            left = room
        out[-1].append(piece)
        left -= size
    return out
