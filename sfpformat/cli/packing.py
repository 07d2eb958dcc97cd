"""Writing a checkpoint as `.sfp`: one file, or shards and their index, either of which can be resumed.

Rules: shards are written under names that end in ``.finished``; only when all are complete do they take
their own names, and the index comes last. So a pack that fails leaves an older model of the same name as it
was, and one that is killed can go on. The state file ``STEM.sfp.index.json.partial`` names the job and the
finished shards; it is locked while a pack is at work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import open_locked, replacing
from ..errors import SfpError
from ..reader import SfpFile
from ..safetensors import SafetensorsError, strict_json
from ..shards import ShardIndex, index_name, shard_name
from ..writer import Writer
from .console import Progress
from .models import Model
from .rules import Treatment
from .treat import Share, importance_of, treated
from .trouble import about

_FINISHED = ".finished"


@dataclass(frozen=True)
class Job:
    """A checkpoint and what is done to it.

    Attributes:
        model: the checkpoint.
        treatments: tensor name -> what is done to it.
        shares: of the tensors that are pruned over the model.
        importances: a model with tensors of the same names, or None.
        metadata: the caller's own, which override the checkpoint's.
        key: the same for the same sources, options and version only.
    """

    model: Model
    treatments: dict[str, Treatment]
    shares: dict[str, Share]
    importances: Model | None
    metadata: dict[str, str]
    key: str


def job_key(model: Model, importances: Model | None, options: object) -> str:
    """SHA-256, as hex, over what decides the bytes of the output.

    Args:
        options: all options and versions; what JSON does not have counts as its text.
    """
    sources = []
    for source in (model, importances):
        for path, file in zip(source.paths(), source.files.values(), strict=True) if source else ():
            status = os.stat(path)
            sources.append([path.name, status.st_size, status.st_mtime_ns, file.header.sha256])
    text = json.dumps([sources, options], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def pack_file(job: Job, names: list[str], metadata: dict[str, str], target: Path, progress: Progress) -> int:
    """Writes tensors to one file, or goes on where an earlier run with the same key was stopped.

    Returns:
        How many tensors an earlier run had written.

    Raises:
        Trouble, OptionError, OSError: nothing is left behind.
        KeyboardInterrupt: the partial file is kept; the message says how to go on.
    """
    with about(target):
        writer = Writer(target, metadata={**metadata, **job.metadata}, resume_key=job.key)
        done = set(writer.done)
        for name in done:
            progress.advance(job.model.specs[name].nbytes)
        try:
            with writer:
                for name in names:
                    if name not in done:
                        progress.at(name)
                        _add(job, name, writer)
                        progress.advance(job.model.specs[name].nbytes)
        except KeyboardInterrupt as error:
            error.args = (
                f"interrupted; {len(writer.done)} of {len(names)} tensors of {target.name} are kept in "
                f"{target.name}.partial: the same command goes on from there",
            )
            raise
    return len(done)


def _add(job: Job, name: str, writer: Writer) -> None:
    treatment, importance = job.treatments[name], importance_of(name, job.importances)
    array = treated(name, job.model.read(name), treatment, job.shares.get(name))
    writer.add(name, array, treatment.options, importance=importance)


# ---------------------------------------------------------------------------------------------- shards


def pack_shards(job: Job, stem: Path, progress: Progress) -> tuple[list[Path], int]:
    """Writes a shard for each file of the checkpoint, and the index.

    Args:
        stem: the path of the shards, up to what numbers them.

    Returns:
        The shards, and how many tensors earlier runs had written.

    Raises:
        As `pack_file`.
    """
    files = list(job.model.files)
    targets = [
        stem.with_name(shard_name(stem.name, number, len(files))) for number in range(1, len(files) + 1)
    ]
    state = _State(stem, len(files), job.key)
    resumed = 0
    try:
        for file_name, target in zip(files, targets, strict=True):
            names = job.model.names_in(file_name)
            finished = target.with_name(target.name + _FINISHED)
            if state.has(finished, target):
                resumed += len(names)
                progress.advance(sum(job.model.specs[name].nbytes for name in names))
                continue
            metadata = job.model.metadata_of(file_name)
            resumed += pack_file(job, names, metadata, finished, progress)
            state.add(finished)
        _take_names(job, stem, dict(zip(files, targets, strict=True)))
    except KeyboardInterrupt:
        state.close()
        raise
    except BaseException:
        state.discard()
        raise
    state.remove()
    return targets, resumed


def _take_names(job: Job, stem: Path, targets: dict[str, Path]) -> None:
    """Gives all shards their names, and writes the index (R-SHD-003)."""
    for target in targets.values():
        finished = target.with_name(target.name + _FINISHED)
        if finished.exists():
            os.replace(finished, target)
    weight_map = {
        name: target.name for file_name, target in targets.items() for name in job.model.names_in(file_name)
    }
    total = 0
    for target in targets.values():
        with SfpFile(target) as file:
            total += sum(file.entry(name).decoded_bytes for name in file)
    with replacing(stem.with_name(index_name(stem.name))) as file:
        file.write(ShardIndex(weight_map, {"total_size": total}).to_bytes())


def _directory_crc(path: Path) -> int:
    with SfpFile(path) as file:
        return file.preamble.directory_crc


class _State:
    """The finished shards of a job, in a locked file."""

    def __init__(self, stem: Path, count: int, key: str) -> None:
        """Takes up the state of an earlier run with the same key, or begins; what another job left goes.

        Raises:
            LockedFileError: another process is writing this model.
        """
        self._stem, self._count, self._key = stem, count, key
        self._path = stem.with_name(index_name(stem.name) + ".partial")
        self._file = open_locked(self._path)
        fields = self._read()
        self._crcs: dict[str, int] = {}
        if fields.get("key") == key:
            self._crcs = fields["shards"]
        elif fields:
            self._remove_shards(fields["count"])
        self._write()

    def _read(self) -> dict[str, Any]:
        """What an earlier run wrote, or nothing where that makes no sense."""
        data = self._file.read()
        try:
            fields = strict_json(data, "the state of the pack") if data else {}
        except SafetensorsError:
            return {}
        shards, count = fields.get("shards"), fields.get("count")
        good = isinstance(shards, dict) and all(type(crc) is int for crc in shards.values())
        return fields if good and type(count) is int and 0 <= count < 100_000 else {}

    def _write(self) -> None:
        fields = {"key": self._key, "count": self._count, "shards": self._crcs}
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(fields).encode())
        self._file.flush()

    def has(self, finished: Path, target: Path) -> bool:
        """Whether a shard is complete, be it that it has its own name already."""
        crc = self._crcs.get(finished.name)
        for path in (finished, target):
            try:
                if crc is not None and _directory_crc(path) == crc:
                    return True
            except (OSError, SfpError):
                pass
        return False

    def add(self, finished: Path) -> None:
        """Notes a finished shard."""
        self._crcs[finished.name] = _directory_crc(finished)
        self._write()

    def _remove_shards(self, count: int) -> None:
        for number in range(1, count + 1):
            for end in (_FINISHED, _FINISHED + ".partial", _FINISHED + ".partial.journal"):
                name = shard_name(self._stem.name, number, count) + end
                self._stem.with_name(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Leaves everything for a later run."""
        self._file.close()

    def remove(self) -> None:
        """The job is done."""
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what could not be written is not wanted any more
            self._file.close()

    def discard(self) -> None:
        """The job failed: nothing of it stays."""
        self._remove_shards(self._count)
        self.remove()
