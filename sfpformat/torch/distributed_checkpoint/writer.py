"""`SfpStorageWriter`: saves `.sfp` files by ``torch.distributed.checkpoint``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ...coding.bits import Bytes
from ...decode.shard_index import ShardIndex, index_name, shard_name
from ...dtypes import Dtype
from ...encode.weights import Outline, warn_of_quantised
from ...errors import OptionError
from ...io.atomic import AtomicFile, real_target, rename_all
from ...io.paths import SUFFIX, models_in
from ...limits import DEFAULT_LIMITS, Limits
from ...names import listed, quoted
from ...options import Options, options_by_name
from ..groups import Group
from ..tensors import format_dtype
from .boxes import Box
from .shard_file import Shard, ShardFile
from .writing_plan import Share, Whole, plan_writing

_STEM = "model"
_OUTCOME = "no checkpoint was written"


class _Planned(NamedTuple):
    """What the coordinator tells a process: its share, and the options of all tensors."""

    share: Share
    options: Mapping[str, Options]


class SfpStorageWriter(StorageWriter):
    """Saves a model or a checkpoint in `.sfp` files, one per process, and their index.

    ``dcp.save(state, storage_writer=SfpStorageWriter("step-100/"))``

    Each tensor is written whole by a process that holds a part of it, to which the others send theirs, one
    group of tensors at a time: never the whole model. So the tensors and their bytes do not depend on how
    processes share the model, and everything that reads models in shards reads the folder, such as
    `sfpformat.torch.load_file`. Objects that are no tensors are in the metadata of the files, as JSON text.

    All files appear, the index last, or none. Then removes the shards of an earlier checkpoint in the folder.
    All processes must see the folder.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        options: Options | Mapping[str, Options] | None = None,
        metadata: dict[str, str] | None = None,
        process_group: Any = None,
        limits: Limits = DEFAULT_LIMITS,
        threads: int | None = None,
        engine: str | None = None,
    ) -> None:
        """Creates nothing yet.

        Args:
            path: the folder. It is created if it does not exist. None: ``checkpoint_id`` of ``dcp.save``.
            options: same as for `sfpformat.torch.save_file`, by names of the checkpoint, such as
                ``model.embed.weight``. Lossless by default.
            metadata: str -> str; stored unchanged.
            process_group: the group that is passed to ``dcp.save``. None stands for all processes.
            limits, threads, engine: same as for `sfpformat.torch.save_file`.
        """
        self.checkpoint_id = path
        self._options, self._metadata, self._group = options, dict(metadata or {}), process_group
        self._settings: dict[str, Any] = {"limits": limits, "threads": threads, "engine": engine}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Called by torch at the start of a save."""
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id

    def set_up_storage_writer(
        self, is_coordinator: bool, *_: object, use_collectives: bool = True, **kwargs: object
    ) -> None:
        """Creates the folder.

        Raises:
            OptionError: there is no path, it is a file, or a folder with other `.sfp` files; or the processes
                do not work together.
            OSError: the folder cannot be created.
        """
        if not use_collectives:
            raise OptionError("SfpStorageWriter needs use_collectives=True: it writes tensors whole")
        folder = self._folder()
        if folder.exists() and not folder.is_dir():
            raise OptionError(f"{folder} is a file, not a folder")
        others = _others_in(folder)
        if others:
            raise OptionError(
                f"{folder} has other .sfp files, so that readers could not tell what the checkpoint is: "
                f"{listed(others)}; choose another folder, or remove them"
            )
        folder.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Returns the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Chooses which process writes which tensors.

        Raises:
            OptionError: an option does not fit, the format lacks a dtype, or a plan is incomplete.
        """
        usable = [getattr(plan, "usable", True) for plan in plans]  # of torch 2.6 and later
        if not all(usable):
            if any(usable):
                raise OptionError("the plan changed; use a planner with enable_plan_caching=False")
            return plans  # torch takes the plans of the last save
        tensors, outlines = _tensors_of(plans)
        chosen = options_by_name(self._options, [outline.name for outline in outlines])
        warn_of_quantised(iter(outlines), self._options)
        shares = plan_writing(tensors, len(plans))
        return [
            replace(plan, storage_data=_Planned(share, chosen))
            for plan, share in zip(plans, shares, strict=True)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Exchanges parts with the other processes, and writes the own file under a temporary name.

        Raises:
            OptionError: a tensor or an object cannot be stored, or ``process_group`` is not that of the save.
            ProcessError: another process failed.
            OSError: the file cannot be written.
        """
        planned: _Planned = plan.storage_data
        members = Group.of_plans(self._group, planned.share.count)
        own = self._metadata if members.rank == 0 else {}
        with ShardFile(self._target(members), members.rank, plan, planner, planned.options) as file:
            pending = partial(file.start, own, self._settings)
            for each in planned.share.rounds:
                outgoing: dict[int, Bytes] = {}
                members.agreed(partial(_after, pending, partial(file.gather, each, outgoing)), _OUTCOME)
                pending = partial(file.add, each, members.swap(outgoing, file.sizes(each)))
            members.agreed(partial(_after, pending, file.finish), _OUTCOME)
            result = file.keep()
        done: Future[list[WriteResult]] = Future()
        done.set_result([result])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Renames the files of all processes, and writes the index.

        Raises:
            OSError: a file cannot be renamed or written. The folder has its old checkpoint, or none.
        """
        shards: list[Shard] = [result.storage_data for some in results for result in some]
        index = self._folder() / index_name(_STEM)
        old = _files_of(index)
        new: AtomicFile | None = None
        try:
            names = {Path(shard.final).name: shard.tensors for shard in shards}
            new = AtomicFile(real_target(index))
            new.file.write(ShardIndex.of_files(names, sum(shard.total for shard in shards)).to_bytes())
            new.finish()
            files = [(Path(shard.temporary), Path(shard.final)) for shard in shards]
            rename_all(files, (new.path, new.target))
        finally:
            if new is not None:
                new.abort()
            for shard in shards:  # those that were not renamed
                Path(shard.temporary).unlink(missing_ok=True)
        for name in old - names.keys():
            with suppress(OSError):
                (self._folder() / name).unlink()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Returns whether the path can be a folder."""
        return not Path(checkpoint_id).is_file()

    def _folder(self) -> Path:
        if self.checkpoint_id is None:
            raise OptionError("pass a path to SfpStorageWriter, or checkpoint_id to dcp.save")
        return Path(self.checkpoint_id)

    def _target(self, members: Group) -> Path:
        return self._folder() / shard_name(_STEM, members.rank + 1, members.count)


def _tensors_of(plans: list[SavePlan]) -> tuple[list[Whole], list[Outline]]:
    """Returns the tensors of all plans, with their parts.

    Raises:
        OptionError: the format lacks a dtype.
    """
    parts: dict[str, list[Box]] = {}
    outlines: dict[str, Outline] = {}
    for rank, plan in enumerate(plans):
        for number, item in enumerate(plan.items):
            if item.type is WriteItemType.BYTE_IO:
                continue
            name, data = item.index.fqn, item.tensor_data
            assert data is not None
            parts.setdefault(name, []).append(
                Box(rank, number, tuple(data.chunk.offsets), tuple(data.chunk.sizes))
            )
            outlines[name] = Outline(name, _dtype_of(name, data.properties.dtype), tuple(data.size))
    wholes = [
        Whole(name, outlines[name].shape, outlines[name].dtype, tuple(some)) for name, some in parts.items()
    ]
    return wholes, list(outlines.values())


def _dtype_of(name: str, dtype: torch.dtype) -> Dtype:
    found = format_dtype(dtype)
    if found is None:
        raise OptionError(f"tensor {quoted(name)}: the format does not support the dtype {dtype}")
    return found


def _after(first: Any, second: Any) -> None:
    first()
    second()


def _others_in(folder: Path) -> list[str]:
    """Returns the names of the models in a folder that are not a checkpoint of this class."""
    own = re.compile(rf"{_STEM}-\d+-of-\d+{re.escape(SUFFIX)}|{re.escape(index_name(_STEM))}")
    return [name for name in models_in(folder) if not own.fullmatch(name)] if folder.is_dir() else []


def _files_of(index: Path) -> set[str]:
    """Returns the names of the files of an index; empty if there is no readable index."""
    try:
        return set(ShardIndex.read(index).files())
    except (OSError, ValueError):
        return set()
