"""Writes tensors of a checkpoint to an `.sfp` file. An interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ..container.entry import TensorEntry
from ..encode.arguments import Given
from ..encode.plan import plan_tensor
from ..encode.resume import ResumableSink
from ..encode.weights import is_packed_storage, not_weights
from ..encode.writer import Writer
from ..encode.zeros import zeros_of
from ..engines import get_engine
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
        threads: the greatest number of threads that encode; None uses the available cores.
        zeros: tensor name -> its -0, for the tensors examined so far.
    """

    model: Model
    configs: dict[str, TensorConfig]
    shares: dict[str, Share]
    importances: Model | None
    metadata: dict[str, str]
    key: str
    limits: Limits = DEFAULT_LIMITS
    threads: int | None = None
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
        writer = Writer(
            sink,
            metadata={**metadata, **job.metadata},
            limits=job.limits,
            weights=elements,
            threads=job.threads,
        )
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
