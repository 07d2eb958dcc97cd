"""Writes the shards of a checkpoint, in one process or in several, on machines that share a folder.

Rules: shards are written under names that end in ``.finished``. When all are complete, they are renamed to
their final names, the index last. Therefore a failed pack does not change an older model of the same name. A
pack that was killed, or that ran out of disk space, can be resumed. A record beside a finished shard has the
key of the job, so that every process, and a later pack of the whole checkpoint, accepts it. The state file
``STEM.sfp.index.json.partial`` records the job and the finished shards of one process that packs all. The
process that packs all, or that renames them, holds a lock on it.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..decode.reader import SfpFile
from ..decode.shard_index import ShardIndex, index_name, shard_name
from ..errors import SfpError, SfpWarning
from ..io.atomic import AtomicFile, rename_all, replacing
from ..io.filesystem import LockedFileError, UnnamedFileError, beside, open_locked, remove, remove_locked
from ..io.safetensors import SafetensorsError, strict_json
from ..limits import Limits
from .console import Progress
from .errors import path_in_errors
from .pack_files import Job, pack_file

_FINISHED = ".finished"


def shard_paths(stem: Path, count: int) -> list[Path]:
    """Returns the paths of ``count`` shards.

    Args:
        stem: the common path of the shards, without the number.
    """
    return [stem.with_name(shard_name(stem.name, number, count)) for number in range(1, count + 1)]


def pack_shards(job: Job, stem: Path, progress: Progress) -> int:
    """Writes a shard for each file of the checkpoint, and the index, or resumes an interrupted run.

    Args:
        stem: the common path of the shards, without the number.

    Returns:
        The number of tensors that earlier runs had written.

    Raises:
        CommandError, OptionError: the pack failed. No partial output remains.
        OSError, KeyboardInterrupt: finished shards, if any, remain; the message says how to resume.
    """
    files = list(job.model.files)
    targets = shard_paths(stem, len(files))
    with path_in_errors(stem.with_name(index_name(stem.name))):
        state = _State(stem, len(files), job.key, job.limits)
    resumed = 0
    try:
        for file_name, target in zip(files, targets, strict=True):
            names = job.model.names_in(file_name)
            finished = _finished(target)
            if state.has(finished, target):
                resumed += len(names)
                progress.advance(sum(job.model.specs[name].nbytes for name in names))
                continue
            metadata = job.model.metadata_of(file_name)
            resumed += pack_file(job, names, metadata, finished, progress, like=target)
            with path_in_errors(finished):
                state.add(finished)
        _rename_shards(job, stem, dict(zip(files, targets, strict=True)))
    except KeyboardInterrupt:
        state.close()
        raise
    except (OSError, MemoryError) as error:
        if not state.count and not isinstance(error, UnnamedFileError):
            state.discard()
            raise
        state.close()
        if isinstance(error, OSError) and state.count:
            error.strerror = (
                f"{error.strerror or error}; {state.count} of {len(files)} shards are finished and kept: "
                "run the same command to resume"
            )
        raise
    except BaseException:
        state.discard()
        raise
    state.remove()
    return resumed


def _finished(target: Path) -> Path:
    """Returns the temporary name of a complete file, before it is renamed."""
    return beside(target, _FINISHED)


def _rename_shards(job: Job, stem: Path, targets: dict[str, Path]) -> None:
    """Renames all shards to their final names, and writes the index (R-SHD-003)."""
    waiting = {target: _finished(target) for target in targets.values() if _finished(target).exists()}
    weight_map = {
        name: target.name for file_name, target in targets.items() for name in job.model.names_in(file_name)
    }
    total = 0
    for target in targets.values():
        with SfpFile(waiting.get(target, target), limits=job.limits) as file:
            total += sum(file.entry(name).decoded_bytes for name in file)
    index = stem.with_name(index_name(stem.name))
    with path_in_errors(index):
        new = AtomicFile(index, path=_finished(index))
        with new.file:
            new.file.write(ShardIndex(weight_map, {"total_size": total}).to_bytes())
            new.finish()
        rename_all([(finished, target) for target, finished in waiting.items()], (new.path, index))
    for target in targets.values():
        remove(_record(target))


def pack_one(job: Job, stem: Path, number: int, progress: Progress) -> int:
    """Writes one shard, unless a process of the same job has finished it. Does not rename it.

    Args:
        job: the job.
        stem: the common path of the shards, without the number.
        number: the number of the shard; the first has number 1.
        progress: advances by the bytes of each tensor.

    Returns:
        The number of tensors that earlier runs had written.

    Raises:
        LockedFileError: another process is writing this shard.
        CommandError, OptionError, OSError, KeyboardInterrupt: as for `pack_file`.
    """
    files = list(job.model.files)
    target = shard_paths(stem, len(files))[number - 1]
    finished, names = _finished(target), job.model.names_in(files[number - 1])
    if _has_record(target, job.key, job.limits):
        progress.advance(sum(job.model.specs[name].nbytes for name in names))
        return len(names)
    metadata = job.model.metadata_of(files[number - 1])
    resumed = pack_file(job, names, metadata, finished, progress, like=target)
    with path_in_errors(finished), replacing(_record(target)) as file:
        crc = _directory_crc(finished, job.limits)
        file.write(json.dumps({"key": job.key, "crc": crc}).encode())
    return resumed


def finish_shards(job: Job, stem: Path) -> bool:
    """Renames all shards to their final names, and writes the index, if all are finished.

    Returns:
        Whether this process did so. If not, shards are not finished, or another process does it or did it.

    Raises:
        OSError: a file cannot be renamed. The finished shards remain.
    """
    files = list(job.model.files)
    targets = shard_paths(stem, len(files))
    if not _all_recorded(job, targets):
        return False
    with path_in_errors(stem.with_name(index_name(stem.name))):
        try:
            state = _State(stem, len(files), job.key, job.limits)
        except LockedFileError:
            return False
        if not _all_recorded(job, targets):  # another process renamed them meanwhile
            state.remove()
            return False
        try:
            _rename_shards(job, stem, dict(zip(files, targets, strict=True)))
        except BaseException:
            state.close()
            raise
        state.remove()
    return True


def _all_recorded(job: Job, targets: list[Path]) -> bool:
    return all(_has_record(target, job.key, job.limits) for target in targets)


def _record(target: Path) -> Path:
    """Returns the path of the record of a finished shard."""
    return beside(_finished(target), ".json")


def _has_record(target: Path, key: str, limits: Limits) -> bool:
    """Returns whether a shard of a job is complete, under its temporary name or its final name.

    Raises:
        OSError: the record or the shard exists, but cannot be read.
    """
    try:
        record = json.loads(_record(target).read_bytes())
    except (FileNotFoundError, ValueError):  # none, or not written to its end
        return False
    if not isinstance(record, dict) or record.get("key") != key:
        return False
    for path in (_finished(target), target):
        with contextlib.suppress(FileNotFoundError, SfpError):
            if _directory_crc(path, limits) == record.get("crc"):
                return True
    return False


def _directory_crc(path: Path, limits: Limits) -> int:
    with SfpFile(path, limits=limits) as file:
        return file.preamble.directory_crc


class _State:
    """A locked file with the finished shards of a job: a line of JSON for the job, then one per shard."""

    def __init__(self, stem: Path, count: int, key: str, limits: Limits) -> None:
        """Opens the state of an interrupted run with the same key, or starts a new one.

        Removes the temporary files of a different job, with a warning.

        Raises:
            LockedFileError: another process is writing this model.
            OSError: the state cannot be written. Files of an earlier run remain.
        """
        self._stem, self._key, self._limits = stem, key, limits
        self._path = beside(stem.with_name(index_name(stem.name)), ".partial")
        self._shards = count
        self._crcs: dict[str, int] = {}
        self._file, _ = open_locked(self._path)
        try:
            lines = self._read()
            header = next(lines, {})
            if header == {"key": key, "count": count}:
                for line in lines:
                    self._crcs[line["shard"]] = line["crc"]
            else:
                if type(header.get("count")) is int and 0 <= header["count"] < 100_000:
                    warnings.warn(
                        f"the files of {self._path.name}, which an interrupted pack with other options or "
                        "inputs left, are discarded",
                        SfpWarning,
                        stacklevel=2,
                    )
                    self._remove_shards(header["count"])
                self._file.seek(0)
            os.ftruncate(self._file.fileno(), self._file.tell())
            if not self._file.tell():
                self._append({"key": key, "count": count})
        except BaseException:
            if self._crcs:
                self.close()
            else:
                self.remove()
            raise

    def _read(self) -> Iterator[dict[str, Any]]:
        """Yields the lines of an earlier run. Stops at the first damaged line, and seeks to its start."""
        while line := self._file.readline():
            start = self._file.tell() - len(line)
            try:
                fields = strict_json(line, "the state of the pack")
            except SafetensorsError:
                fields = {}
            job = type(fields.get("key")) is str and type(fields.get("count")) is int
            shard = type(fields.get("shard")) is str and type(fields.get("crc")) is int
            if not line.endswith(b"\n") or not (shard if start else job):
                self._file.seek(start)
                return
            yield fields

    def _append(self, fields: dict[str, object]) -> None:
        self._file.write(json.dumps(fields).encode() + b"\n")
        self._file.flush()

    @property
    def count(self) -> int:
        """The number of finished shards."""
        return len(self._crcs)

    def has(self, finished: Path, target: Path) -> bool:
        """Returns whether a shard is complete, under its temporary name or its final name."""
        if _has_record(target, self._key, self._limits):
            return True
        crc = self._crcs.get(finished.name)
        for path in (finished, target):
            try:
                if crc is not None and _directory_crc(path, self._limits) == crc:
                    return True
            except (OSError, SfpError):
                pass
        return False

    def add(self, finished: Path) -> None:
        """Records a finished shard."""
        crc = _directory_crc(finished, self._limits)
        self._append({"shard": finished.name, "crc": crc})
        self._crcs[finished.name] = crc

    def _remove_shards(self, count: int) -> None:
        """Removes the temporary files of a model of ``count`` shards, except finished shards of this job."""
        for number in range(1, count + 1):
            target = self._stem.with_name(shard_name(self._stem.name, number, count))
            if _has_record(target, self._key, self._limits):
                continue
            finished = _finished(target)
            for path in (finished, beside(finished, ".partial"), beside(finished, ".partial.journal")):
                remove(path)
            remove(_record(target))
        index = self._stem.with_name(index_name(self._stem.name))
        remove(_finished(index))
        remove(beside(index, ".replaced"))

    def close(self) -> None:
        """Closes the state file, and keeps everything for a later run."""
        with contextlib.suppress(OSError):
            self._file.close()

    def remove(self) -> None:
        """Removes the state file, because the job is done or has failed."""
        remove_locked(self._file, self._path)

    def discard(self) -> None:
        """Removes the state file and all temporary files, because the job has failed."""
        self._remove_shards(self._shards)
        self.remove()
