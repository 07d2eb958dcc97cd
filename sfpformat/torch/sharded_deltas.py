"""Writes deltas of models whose processes hold parts of their tensors, as DTensors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..container.delta_map import DeltaMap
from ..decode.reader import SfpFile
from ..decode.shard_index import shard_name
from ..decode.shards import ShardedFile
from ..deltas.indices import rename_with_index
from ..deltas.result import DeltaFile
from ..deltas.tensors import OpenTensors, Spec, Tensors
from ..deltas.writing import DeltaWriter
from ..errors import OptionError
from ..io.atomic import AtomicFile, real_target
from ..io.filesystem import rename
from ..io.paths import INDEX_SUFFIX, SUFFIX
from ..names import listed
from .groups import Group, is_distributed
from .tensors import Array, array_of

_INDEX = SUFFIX + INDEX_SUFFIX
_OUTCOME = "no delta was written"


def write_sharded_delta(
    path: object,
    base: Mapping[str, torch.Tensor] | SfpFile | ShardedFile | DeltaFile | str | os.PathLike[str],
    new: Mapping[str, torch.Tensor],
    group: Any,
    **options: Any,
) -> DeltaMap:
    """Writes how the tensors of a model in several processes differ from those of a base.

    All processes call this function. It gathers one tensor at a time, and each process compares some of the
    tensors. All processes write their files, or none does.

    Args:
        path: the file to write by the first process, or the index of files that all processes write.
        base: a state dict, whose tensors may be DTensors, or an open file or a path.
        new: the result, with DTensors. Tensors that are not DTensors are whole in all processes.
        group: the processes.
        options: the other arguments of `DeltaWriter`.

    Returns:
        What the delta says about the tensors, in all processes.

    Raises:
        OptionError: ``path`` is no path, or the processes have different tensors.
        ProcessError: another process failed.
        OptionError, InvalidFileError, OSError: as in `write_delta`. No process wrote anything.
    """
    members = Group(group)
    shards = Path(path) if isinstance(path, (str, os.PathLike)) and str(path).endswith(_INDEX) else None
    with ExitStack() as stack:
        old: dict[str, torch.Tensor] | Tensors = {}
        target: Path | None = None

        def prepare() -> list[tuple[str, int]]:
            nonlocal old, target
            if isinstance(base, Mapping):
                old = dict(base)
                sizes = {name: tensor.nbytes for name, tensor in old.items()}
            else:
                opened = stack.enter_context(OpenTensors(base))
                old = opened.tensors
                sizes = {name: _nbytes(spec) for name, spec in old.specs.items()}
                if options["base_name"] is None:
                    options["base_name"] = opened.name
            target = _target(path, shards, members)
            return list((sizes | {name: tensor.nbytes for name, tensor in new.items()}).items())

        layouts = members.agreed(prepare, _OUTCOME)
        _require_same(layouts)
        owners = _owners(layouts[0], members.count if shards is not None else 1)
        return _Work(members, old, new, owners).run(target, shards, options)


def _nbytes(spec: Spec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _require_same(layouts: list[list[tuple[str, int]]]) -> None:
    """Raises OptionError unless all processes have tensors of the same names and sizes, in the same order."""
    for number, layout in enumerate(layouts):
        if layout != layouts[0]:
            differ = sorted({name for name, _ in set(layout) ^ set(layouts[0])})
            words = listed(differ) if differ else "the order of the tensors"
            raise OptionError(f"processes 0 and {number} differ in {words}; all must pass the same tensors")


def _owners(sizes: list[tuple[str, int]], count: int) -> dict[str, int]:
    """Returns the process that compares each tensor, so that all compare about as many bytes."""
    loads = [0] * count
    out = {}
    for name, size in sizes:
        out[name] = loads.index(min(loads))
        loads[out[name]] += size
    return out


def _target(path: object, shards: Path | None, members: Group) -> Path | None:
    """Returns the path of the file that this process writes; None if it writes none."""
    if shards is not None:
        stem = shards.name.removesuffix(_INDEX)
        return shards.with_name(shard_name(stem, members.rank + 1, members.count))
    if not isinstance(path, (str, os.PathLike)):
        raise OptionError("the model has DTensors: give the path of a file or of an index")
    return Path(path) if members.rank == 0 else None


class _Work:
    """Compares tensors, and writes the file of this process."""

    def __init__(
        self,
        members: Group,
        old: dict[str, torch.Tensor] | Tensors,
        new: Mapping[str, torch.Tensor],
        owners: Mapping[str, int],
    ) -> None:
        self._members, self._old, self._new, self._owners = members, old, new, owners

    def run(self, target: Path | None, shards: Path | None, options: dict[str, Any]) -> DeltaMap:
        """Writes the delta. All processes get what it says."""
        file: AtomicFile | None = None

        def create() -> None:
            nonlocal file
            file = None if target is None else AtomicFile(real_target(target))

        def finish() -> tuple[Path, Path] | None:
            if file is None:
                return None
            file.finish()
            return file.path, file.target

        try:
            self._members.agreed(create, _OUTCOME)
            found = self._compare(file, None if shards is None else self._members.rank + 1, options)
            files = [pair for pair in self._members.agreed(finish, _OUTCOME) if pair is not None]

            def publish() -> DeltaMap | None:
                if self._members.rank:
                    return None
                if shards is not None:
                    return rename_with_index(files, shards)
                rename(*files[0])
                return found

            written = self._members.agreed(publish, _OUTCOME)[0]
            assert written is not None
            return written
        finally:
            if file is not None:
                file.abort()

    def _compare(
        self, file: AtomicFile | None, shard: int | None, options: dict[str, Any]
    ) -> DeltaMap | None:
        """Gathers all tensors in turn, and adds the own ones to the file.

        After an error, still takes part in gathering, for which other processes wait.
        """
        failure: BaseException | None = None
        writer: DeltaWriter | None = None

        def attempt(work: Callable[[], object]) -> None:
            nonlocal failure
            if failure is None:
                try:
                    work()
                except BaseException as error:  # raised below, when all processes know
                    failure = error

        def start() -> None:
            nonlocal writer
            writer = DeltaWriter(file.file, shard=shard, **options) if file is not None else None

        def add(name: str, old: torch.Tensor | None, new: torch.Tensor | None) -> None:
            before = self._old_array(name) if old is None else array_of(old, name)
            assert writer is not None
            writer.add(name, before, None if new is None else array_of(new, name))

        def finish() -> None:
            if failure is not None:
                raise failure
            if writer is not None:
                writer.close()

        attempt(start)
        try:
            for name, owner in self._owners.items():
                old = self._old.get(name) if isinstance(self._old, dict) else None
                parts = [whole(tensor) for tensor in (old, self._new.get(name))]
                if owner == self._members.rank:
                    attempt(partial(add, name, *parts))
            self._members.agreed(finish, _OUTCOME)
        except BaseException:
            if writer is not None:
                writer.abort()
            raise
        return writer.described if writer is not None else None

    def _old_array(self, name: str) -> Array | None:
        """Returns a tensor of a base that is not in DTensors; None if it has none of this name."""
        if isinstance(self._old, dict) or name not in self._old.specs:
            return None
        return self._old.read(name)


def whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Returns a whole tensor; gathers a DTensor, which all processes of its mesh do together."""
    if tensor is None or not is_distributed(tensor):
        return tensor
    gathered: Any = tensor.detach()
    with torch.no_grad():
        full: torch.Tensor = gathered.full_tensor()
    return full
