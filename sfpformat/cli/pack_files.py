"""Writes a checkpoint as `.sfp`, as one file or as shards with an index. An interrupted run can be resumed.

Rules: shards are written under names that end in ``.finished``. When all are complete, they are renamed to
their final names, the index last. Therefore a failed pack does not change an older model of the same name. A
pack that was killed, or that ran out of disk space, can be resumed. The state file
``STEM.sfp.index.json.partial`` records the job and the finished shards. A running pack holds a lock on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..container.entry import TensorEntry
from ..decode.reader import SfpFile
from ..decode.shard_index import ShardIndex, index_name, shard_name
from ..encode.arguments import Given
from ..encode.plan import plan_tensor
from ..encode.resume import ResumableSink
from ..encode.weights import is_packed_storage, not_weights
from ..encode.writer import Writer
from ..encode.zeros import zeros_of
from ..engines import get_engine
from ..errors import SfpError, SfpWarning
from ..io.atomic import AtomicFile, rename_all
from ..io.filesystem import UnnamedFileError, beside, open_locked, remove, remove_locked
from ..io.safetensors import SafetensorsError, strict_json
from ..io.threads import Workers, default_threads
from ..limits import DEFAULT_LIMITS, Limits
from ..options import Options
from .console import Progress
from .errors import path_in_errors
from .model_files import Model, sub_byte_keys
from .prepare import Share, importance_of, prune_and_cast
from .rules import TensorConfig

# The cost of -0 is measured if at least 1 in this many elements of a tensor are -0.
_MANY_ZEROS = 100
_FINISHED = ".finished"


class NegativeZeros(NamedTuple):
    """The -0 of a tensor.

    Attributes:
        number: number of -0; 0 if the tensor is quantised, unless ``positive``.
        positive: whether they are written as +0.
        saving: estimate of the bytes that writing +0 would save; 0 if -0 are few, or become +0 already.
    """

    number: int = 0
    positive: bool = False
    saving: int = 0


@dataclass(frozen=True)
class Job:
    """A checkpoint and the configuration of its tensors.

    Attributes:
        model: the checkpoint.
        configs: tensor name -> its configuration.
        shares: tensor name -> its part in pruning by a cutoff over the model.
        importances: a model with the importances under the names of the tensors, or None.
        metadata: the caller's metadata, which override those of the checkpoint.
        key: identifies sources, options and version; only a run with the same key can resume the job.
        limits: the limits of readers.
        zeros: tensor name -> its -0, for the tensors examined so far.
    """

    model: Model
    configs: dict[str, TensorConfig]
    shares: dict[str, Share]
    importances: Model | None
    metadata: dict[str, str]
    key: str
    limits: Limits = DEFAULT_LIMITS
    zeros: dict[str, NegativeZeros] = field(default_factory=dict)

    @cached_property
    def packed_storage(self) -> frozenset[str]:
        """Names of the float tensors whose elements are packed integers, not float numbers."""
        reasons = not_weights(self.model.specs.values())
        return frozenset(name for name in reasons if is_packed_storage(self.model.specs[name], reasons))


def job_key(model: Model, importances: Model | None, options: object) -> str:
    """Returns the SHA-256, in hex, of everything that determines the bytes of the output.

    Source files are identified by name, size, modification time and header.

    Args:
        model, importances: the sources.
        options: all options and versions; values without a JSON form are converted to text.
    """
    sources = []
    for source in (model, importances):
        for path, file in zip(source.paths(), source.files.values(), strict=True) if source else ():
            status = os.stat(path)
            sources.append([path.name, status.st_size, status.st_mtime_ns, file.header.sha256])
    text = json.dumps([sources, options], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def pack_file(
    job: Job,
    names: list[str],
    metadata: dict[str, str],
    target: Path,
    progress: Progress,
    like: Path | None = None,
) -> int:
    """Writes tensors to one file, or resumes an interrupted run with the same key.

    Args:
        job: the job.
        names: the names of the tensors to write, in order.
        metadata: metadata of the checkpoint.
        target: path of the file.
        progress: advances by the bytes of each tensor.
        like: if it exists, the new file gets its owner and mode; else those of ``target``.

    Returns:
        The number of tensors that an earlier run had written.

    Raises:
        CommandError, OptionError, OSError: the pack failed. Any partial file that remains is in the message.
        KeyboardInterrupt: the partial file remains; the message says how to resume.
    """
    with path_in_errors(target):
        sink = ResumableSink(target, job.key, like=like, limits=job.limits)
        elements = sum(job.model.specs[name].elements for name in names)
        writer = Writer(sink, metadata={**metadata, **job.metadata}, limits=job.limits, weights=elements)
        done = set(writer.done)
        for name in done:
            progress.advance(job.model.specs[name].nbytes)
        try:
            with writer:
                for name in names:
                    if name not in done:
                        add_tensor(job, name, writer, progress)
        except KeyboardInterrupt as error:
            error.args = (
                f"interrupted; {len(writer.done)} of {len(names)} tensors of {target.name} are kept in "
                f"{target.name}.partial: run the same command to resume",
            )
            raise
    return len(done)


def add_tensor(job: Job, name: str, writer: Writer, progress: Progress) -> None:
    """Reads, prunes, casts and encodes one tensor of a job, in a thread of the writer.

    Args:
        job: the job.
        name: name of the tensor.
        writer: the writer of the file.
        progress: advances when the tensor is written.
    """
    config, spec = job.configs[name], job.model.specs[name]
    zeros = _TensorZeros(job, name)

    def read() -> Given:
        given = _given(job, name)
        zeros.count(given)
        return given

    def done(entry: TensorEntry) -> None:
        job.zeros[name] = zeros.result(entry)
        progress.advance(spec.nbytes)

    progress.at(name)
    keys = sub_byte_keys(spec)
    writer.add_read(name, read, spec.nbytes, spec.elements, config.options, other=keys, done=done)


def _given(job: Job, name: str) -> Given:
    """Reads a tensor and its importance; prunes and casts the tensor."""
    array = prune_and_cast(name, job.model.read(name), job.configs[name], job.shares.get(name))
    return Given(array, None, importance_of(name, job.importances))


def is_quantised(options: Options, entry: TensorEntry) -> bool:
    """Returns whether the requested lossy quantiser coded the weights of an encoded tensor."""
    asked, fingerprints = options.lossy, entry.fingerprints
    return asked is not None and fingerprints is not None and fingerprints.quantiser.NAME == asked.NAME


class _TensorZeros:
    """Counts the -0 of a tensor, and estimates the saving of ``--zeros positive``."""

    def __init__(self, job: Job, name: str) -> None:
        self._job, self._config, self._name = job, job.configs[name], name
        self._negative = 0
        self._many: Given | None = None  # the tensor, if the saving is estimated

    def count(self, given: Given) -> None:
        """Counts the -0 of the tensor before encoding. Keeps the arrays if -0 are many."""
        array, self._negative = given.array, zeros_of(given.array).negative
        is_few = not self._negative or self._negative * _MANY_ZEROS < array.size
        if not is_few and self._config.options.zeros != "positive" and self._config.zeros_option_applies:
            self._many = given

    def result(self, entry: TensorEntry) -> NegativeZeros:
        """Returns the -0 of the tensor, given its directory entry after encoding."""
        options = self._config.options
        positive = options.zeros == "positive"
        count = self._negative if positive or not is_quantised(options, entry) else 0
        given, self._many = self._many, None
        if given is None or not count or self._name in self._job.packed_storage:
            return NegativeZeros(count, positive)
        array = given.array
        engine, workers = get_engine(weights=array.size), Workers(default_threads())
        try:
            wanted = options.but(zeros="positive")
            plan = plan_tensor("", array, wanted, engine, importance=given.importance, workers=workers)
        finally:
            workers.stop()
        return NegativeZeros(count, positive, max(entry.stored_bytes - plan.bits // 8, 0))


def count_zeros(job: Job, entries: Iterable[TensorEntry]) -> None:
    """Counts the -0 of tensors that an earlier run wrote, and records the counts in ``job.zeros``."""
    for entry in entries:
        if entry.name in job.zeros:
            continue
        zeros = _TensorZeros(job, entry.name)
        zeros.count(_given(job, entry.name))
        job.zeros[entry.name] = zeros.result(entry)


# ---------------------------------------------------------------------------------------------- shards


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
        self._stem, self._limits = stem, limits
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
        """Removes all temporary files of a model of ``count`` shards."""
        for number in range(1, count + 1):
            finished = _finished(self._stem.with_name(shard_name(self._stem.name, number, count)))
            for path in (finished, beside(finished, ".partial"), beside(finished, ".partial.journal")):
                remove(path)
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
