"""`SfpStorageReader`: loads `.sfp` files by ``torch.distributed.checkpoint``."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ...coding.bits import Bytes
from ...decode.opening import open_any
from ...decode.reader import SfpFile
from ...decode.shards import ShardedFile
from ...errors import ClosedFileError, MismatchError, OptionError
from ...limits import DEFAULT_LIMITS, Limits
from ..groups import Group
from ..tensors import torch_dtype
from ..ties import aliases_in
from . import objects
from .boxes import Box
from .filling import Filling
from .reading_plan import Round, Share, plan_reading

_OUTCOME = "some tensors may have new values already; load again before you use them"


class SfpStorageReader(StorageReader):
    """Loads a model or a checkpoint from `.sfp` files into tensors and DTensors of any layout.

    ``dcp.load(state, storage_reader=SfpStorageReader("model.sfp"))``

    Reads the tensors that the planner requests: of sharded ones, each process reads about its share of the
    bytes. Chunks are the unit of reading: if several processes need elements of a chunk, one of them reads
    it, compares its checksum, and sends the others their elements. So all checks of `sfpformat.open` are
    made, and the processes of a group together read each chunk once, also those of replicated tensors.

    After an error, tensors of ``state`` may have values of the file or their old values.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        process_group: Any = None,
        limits: Limits = DEFAULT_LIMITS,
        threads: int | None = None,
        engine: str | None = None,
    ) -> None:
        """Opens nothing yet.

        Args:
            path: path of the file, of the ``.sfp.index.json`` of a model in shards, or of a folder that has
                one of these, such as that of `SfpStorageWriter`. None: ``checkpoint_id`` of ``dcp.load``.
            process_group: the group that is passed to ``dcp.load``. None stands for all processes.
            limits, threads, engine: same as for `sfpformat.open`. The CPU decodes, also for tensors of a GPU.
        """
        self.checkpoint_id = path
        self._group = process_group
        self._settings: dict[str, Any] = {"limits": limits, "threads": threads, "engine": engine}
        self._file: SfpFile | ShardedFile | None = None
        self._kept: dict[str, str] = {}  # other name of a tied tensor -> its name in the file

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Called by torch at the start of a load."""
        self.close()
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id

    def close(self) -> None:
        """Closes the file. The next load opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def read_metadata(self) -> Metadata:
        """Opens the file, and returns its tensors and objects.

        Raises:
            OptionError: there is no path, or the file is a delta.
            InvalidFileError, UnsupportedError, LimitError, SafetensorsError: a file is damaged or refused.
            MismatchError: this version of torch lacks a dtype.
            OSError: a file cannot be read.
        """
        if self.checkpoint_id is None:
            raise OptionError("pass a path to SfpStorageReader, or checkpoint_id to dcp.load")
        self.close()
        file = self._file = open_any(self.checkpoint_id, **self._settings)
        metadata = file.metadata()
        self._kept = aliases_in(metadata, file)
        out: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            name: _tensor_metadata(file, self._kept.get(name, name)) for name in [*file, *self._kept]
        }
        for key in metadata:
            if key.startswith(objects.KEY):
                out[key.removeprefix(objects.KEY)] = BytesStorageMetadata()
        return Metadata(state_dict_metadata=out, storage_meta=StorageMeta(checkpoint_id=self.checkpoint_id))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, **_: object) -> None:
        """Called by torch; does nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Returns the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Chooses which process reads which chunks."""
        file = self._opened()
        boxes: dict[str, list[Box]] = {}
        for rank, plan in enumerate(plans):
            for number, item in enumerate(plan.items):
                if item.type is LoadItemType.TENSOR:
                    box = Box(rank, number, tuple(item.storage_offsets), tuple(item.lengths))
                    boxes.setdefault(self._source(item), []).append(box)
        wanted = {name: boxes[name] for name in file if name in boxes}
        shares = plan_reading(wanted, len(plans), file.entry)
        for share in shares:
            share.identity = file.identity
        return [replace(plan, storage_data=share) for plan, share in zip(plans, shares, strict=True)]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads the own share, and fills the tensors of the own plan.

        Raises:
            OptionError: ``process_group`` is not the group of the load.
            InvalidFileError, LimitError, OSError: the file is damaged, refused, or cannot be read.
            MismatchError: an object is damaged, or the processes see different files.
            ProcessError: another process failed.
        """
        try:
            self._read(plan, planner)
        finally:
            self.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Returns whether the file exists."""
        return os.path.exists(checkpoint_id)

    def _opened(self) -> SfpFile | ShardedFile:
        if self._file is None:
            raise ClosedFileError("the checkpoint is closed; pass the reader to dcp.load")
        return self._file

    def _source(self, item: ReadItem) -> str:
        """Returns the name of the tensor of the file that an item needs."""
        name: str = item.storage_index.fqn
        return self._kept.get(name, name)

    def _read(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        share: Share = plan.storage_data
        members = Group.of_plans(self._group, share.count)
        file = self._opened()
        filling = Filling(file, plan, planner, self._source, members.rank)

        def start() -> None:
            if file.identity != share.identity:
                raise MismatchError(
                    f"{self.checkpoint_id} is another file than in process 0; wait until it is written"
                )
            filling.start(share.own)

        members.agreed(start, _OUTCOME)
        last: Round | None = None
        received: dict[int, Bytes] = {}
        for each in share.rounds:
            sends: dict[int, Bytes] = {}
            members.agreed(partial(filling.go_on, last, received, each, sends), _OUTCOME)
            received = members.swap(sends, filling.sizes(each))
            last = each
        members.agreed(partial(filling.finish, last, received), _OUTCOME)


def _tensor_metadata(file: SfpFile | ShardedFile, name: str) -> TensorStorageMetadata:
    info = file.info(name)
    size = torch.Size(info.shape)
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
    return TensorStorageMetadata(TensorProperties(dtype=torch_dtype(info.dtype)), size, [chunk])
