"""The file that one process writes for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from ...coding.bits import Bytes
from ...encode.writer import Writer
from ...io.atomic import AtomicFile, real_target
from ...options import Options
from ..tensors import Array, array_of
from . import objects
from .writing_plan import Round, Whole


class Shard(NamedTuple):
    """A file that a process wrote under a temporary name.

    Attributes:
        temporary, final: its paths.
        tensors: the names of its tensors.
        total: bytes of their elements.
    """

    temporary: str
    final: str
    tensors: tuple[str, ...]
    total: int


class ShardFile:
    """The file of this process. A context manager, which removes it unless `keep` was called."""

    def __init__(
        self,
        target: Path,
        rank: int,
        plan: SavePlan,
        planner: SavePlanner,
        options: Mapping[str, Options],
    ) -> None:
        """Creates nothing yet.

        Args:
            target: its final path.
            rank: the number of this process.
            plan, planner: the plan of this process, and what resolves its items.
            options: the options of each tensor.
        """
        self._target, self._rank = target, rank
        self._plan, self._planner, self._options = plan, planner, options
        self._file: AtomicFile | None = None
        self._writer: Writer | None = None
        self._arrays: dict[int, Array] = {}  # item -> the own part of a tensor of the round
        self._names: list[str] = []
        self._total = 0
        self._kept = False

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._kept:
            return
        if self._writer is not None:
            self._writer.abort()
        if self._file is not None:
            self._file.abort()

    def start(self, metadata: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        """Creates the file. Its metadata have the objects of the plan, too."""
        texts = dict(metadata)
        for item in self._plan.items:
            if item.type is WriteItemType.BYTE_IO:
                data: Any = self._planner.resolve_data(item)
                texts[objects.KEY + item.index.fqn] = objects.text_of(item.index.fqn, data)
        self._file = AtomicFile(real_target(self._target))
        self._writer = Writer(self._file.file, metadata=texts, **settings)

    def gather(self, each: Round, outgoing: dict[int, Bytes]) -> None:
        """Reads the own parts of a round. Adds to ``outgoing`` the bytes for each other process."""
        own = [part.item for tensor in each.tensors for part in tensor.parts if part.rank == self._rank]
        numbers = dict.fromkeys([*own, *(number for items in each.sends.values() for number in items)])
        self._arrays = {number: self._part(number) for number in numbers}
        for to, items in each.sends.items():
            outgoing[to] = np.concatenate(
                [self._arrays[number].reshape(-1).view(np.uint8) for number in items]
            )

    def _part(self, number: int) -> Array:
        item = self._plan.items[number]
        tensor: Any = self._planner.resolve_data(item)
        return array_of(tensor, item.index.fqn)

    def sizes(self, each: Round) -> dict[int, int]:
        """Returns how many bytes each other process sends in a round."""
        out: dict[int, int] = {}
        for tensor in each.tensors:
            for part in tensor.parts:
                if part.rank != self._rank and part.elements:
                    out[part.rank] = out.get(part.rank, 0) + part.elements * tensor.itemsize
        return out

    def add(self, each: Round, received: Mapping[int, Bytes]) -> None:
        """Adds the tensors of a round to the file.

        Args:
            each: the round.
            received: the bytes from each other process, in the order of tensors and parts.
        """
        assert self._writer is not None
        at = dict.fromkeys(received, 0)
        for tensor in each.tensors:
            array = self._joined(tensor, received, at)
            self._writer.add_later(tensor.name, array, self._options[tensor.name])
            self._names.append(tensor.name)
            self._total += tensor.nbytes
        self._arrays = {}

    def _joined(self, tensor: Whole, received: Mapping[int, Bytes], at: dict[int, int]) -> Array:
        """Returns a whole tensor. Advances ``at``, the offset of each process's next part."""
        if len(tensor.parts) == 1 and tensor.parts[0].rank == self._rank:
            return self._arrays[tensor.parts[0].item].reshape(tensor.shape)
        out: Array = np.empty(tensor.shape, tensor.dtype.numpy)
        for part in tensor.parts:
            if part.rank == self._rank:
                out[part.slices] = self._arrays[part.item]
            elif part.elements:
                start = at[part.rank]
                at[part.rank] = start + part.elements * tensor.itemsize
                values = received[part.rank][start : at[part.rank]].copy().view(tensor.dtype.numpy)
                out[part.slices] = values.reshape(part.size)
        return out

    def finish(self) -> None:
        """Completes the file on disk, under its temporary name."""
        assert self._writer is not None
        assert self._file is not None
        self._writer.close()
        self._file.finish()

    def keep(self) -> WriteResult:
        """Leaves the file to the coordinator, which renames it. Returns what the coordinator needs."""
        assert self._file is not None
        self._kept = True
        path = self._file.path
        shard = Shard(str(path), str(self._file.target), tuple(self._names), self._total)
        return WriteResult(MetadataIndex(self._target.name), path.stat().st_size, shard)
