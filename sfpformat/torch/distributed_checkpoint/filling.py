"""Fills the tensors of a load plan with decoded elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from ...coding.bits import Bytes
from ...decode.reader import SfpFile
from ...decode.selection import Selection
from ...decode.shards import ShardedFile
from ...decode.tensor import TensorDecoder
from ..loading import fits, loses_values, warn_of_lost_values
from ..tensors import Array, count_write, memory_of, torch_dtype
from . import objects
from .boxes import elements_of
from .reading_plan import Cut, Piece, Round


class Filling:
    """Fills the tensors of a plan: with own pieces first, then round by round with those of others, too."""

    def __init__(
        self,
        file: SfpFile | ShardedFile,
        plan: LoadPlan,
        planner: LoadPlanner,
        source: Callable[[ReadItem], str],
        rank: int,
    ) -> None:
        """Takes what is to be filled.

        Args:
            file: the open file.
            plan, planner: the plan of this process, and what resolves its items.
            source: returns the name of the tensor of the file that an item needs.
            rank: the number of this process.
        """
        self._file, self._plan, self._planner, self._source = file, plan, planner, source
        self._rank = rank
        self._targets: dict[int, _Target] = {}
        self._lost: list[str] = []

    def start(self, pieces: list[Piece]) -> None:
        """Gives the planner the objects and the tensors without elements, and decodes the own pieces."""
        metadata = self._file.metadata()
        for number, item in enumerate(self._plan.items):
            name = item.storage_index.fqn
            if item.type is LoadItemType.BYTE_IO:
                self._planner.load_bytes(item, objects.data_of(name, metadata[objects.KEY + name]))
            elif not item.lengths.numel():
                self._target(self._source(item), number)
        self._decode(pieces, {})

    def go_on(
        self, last: Round | None, received: Mapping[int, Bytes], each: Round, sends: dict[int, Bytes]
    ) -> None:
        """Fills in what the last round received, and decodes the pieces of a round.

        Args:
            last: the last round, or None.
            received: the bytes that each process sent in it.
            each: the round.
            sends: the bytes for each other process are added.
        """
        self._take(last, received)
        parts: dict[int, list[Bytes]] = {}
        self._decode(each.pieces, parts)
        for to, some in parts.items():
            sends[to] = np.concatenate(some)

    def sizes(self, each: Round) -> dict[int, int]:
        """Returns how many bytes each other process sends in a round."""
        out: dict[int, int] = {}
        for source, name, cut in each.arrivals:
            size = (cut.stop - cut.first) * self._file.entry(name).dtype.itemsize
            out[source] = out.get(source, 0) + size
        return out

    def finish(self, last: Round | None, received: Mapping[int, Bytes]) -> None:
        """Fills in what the last round received. Warns of values that the dtypes of tensors cannot hold."""
        self._take(last, received)
        warn_of_lost_values(self._lost)

    def _decode(self, pieces: list[Piece], sends: dict[int, list[Bytes]]) -> None:
        for piece in pieces:
            entry = self._file.entry(piece.tensor)
            run = range(piece.high - piece.low)
            selection = Selection((len(run),), np.array([piece.low]), run)
            values = self._file.decode(entry, selection, entry.dtype.numpy, TensorDecoder.weights_into)
            for cut in piece.cuts:
                box = cut.box.selection(entry.shape)
                some = elements_of(values, piece.low, box, cut.first, cut.stop)
                if cut.box.rank == self._rank:
                    self._fill(piece.tensor, cut, some)
                else:
                    sends.setdefault(cut.box.rank, []).append(some.view(np.uint8))

    def _take(self, last: Round | None, received: Mapping[int, Bytes]) -> None:
        at = dict.fromkeys(received, 0)
        for source, name, cut in last.arrivals if last is not None else ():
            dtype = self._file.entry(name).dtype.numpy
            start = at[source]
            at[source] = start + (cut.stop - cut.first) * dtype.itemsize
            self._fill(name, cut, received[source][start : at[source]].copy().view(dtype))

    def _fill(self, name: str, cut: Cut, values: Array) -> None:
        target = self._target(name, cut.box.item)
        target.flat[cut.first : cut.stop] = values
        target.left -= cut.stop - cut.first
        if not target.left:
            self._complete(cut.box.item, target)

    def _target(self, name: str, number: int) -> _Target:
        target = self._targets.get(number)
        if target is None:
            item = self._plan.items[number]
            target = _Target(self._planner.resolve_tensor(item), self._file.entry(name).dtype.name, item)
            if target.left:
                self._targets[number] = target
            else:
                self._complete(number, target)
        return target

    def _complete(self, number: int, target: _Target) -> None:
        if target.finish():
            self._lost.append(target.item.dest_index.fqn)
        self._planner.commit_tensor(target.item, target.tensor)
        self._targets.pop(number, None)


class _Target:
    """A tensor of the planner, and an array for its elements.

    Attributes:
        tensor: the tensor, which the planner made.
        item: the item that requested it.
        flat: the elements, [n]: the memory of the tensor, or an array that is copied to it at the end.
        left: the number of elements that are missing.
    """

    def __init__(self, tensor: torch.Tensor, dtype: str, item: ReadItem) -> None:
        self.tensor, self.item = tensor.detach(), item
        self.left = item.lengths.numel()
        self._own: torch.Tensor | None = None
        if fits(self.tensor, self.tensor, dtype):
            self.flat: Array = memory_of(self.tensor).reshape(-1)
        else:
            self._own = torch.empty(self.left, dtype=torch_dtype(dtype))
            self.flat = memory_of(self._own)

    def finish(self) -> bool:
        """Copies the elements to the tensor. Returns whether its dtype cannot represent some of them."""
        if self._own is None:
            count_write(self.tensor)
            return False
        values = self._own.reshape(tuple(self.item.lengths))
        self.tensor.copy_(values)
        return loses_values(values, self.tensor)
