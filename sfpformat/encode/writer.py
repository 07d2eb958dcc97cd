"""Writing `.sfp` files, tensor by tensor, in the memory of a chunk beyond the tensor at hand.

Rules: what is written goes to a temporary file, which is synced and takes the target's name in one step
(R-STR-005). Whatever fails before, the old file is as it was and nothing is left behind.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import Bytes
from ..coding.mask import Mask
from ..container import messagepack
from ..container.directory import Directory
from ..container.entry import CHUNK_RECORD, TensorEntry
from ..container.messagepack import depth_of
from ..container.preamble import SIZE, Preamble
from ..engines import get_engine
from ..errors import ClosedFileError, FileFault, OptionError, SfpError
from ..io.checksum import crc32
from ..io.threads import Workers
from ..limits import DEFAULT_LIMITS, Limits
from ..names import quoted, require_mapping
from ..options import Options, require_options
from .chunks import ChunkJob, chunk_jobs, encode_chunk, encode_vectors
from .plan import Importance, Plan, plan_tensor
from .resume import ResumableSink
from .sink import Target, open_sink

_DEPTH_OF_ENTRIES = 2  # the directory and its list of tensors


class Writer:
    """Writes a file; a context manager that finishes the file when all went well, and else leaves no trace.

    ``with Writer("model.sfp") as w: w.add("w", array)``
    """

    def __init__(
        self,
        target: Target,
        *,
        metadata: dict[str, str] | None = None,
        engine: str | None = None,
        threads: int | None = None,
        resume_key: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """Begins a file.

        Args:
            target: a path, or a seekable binary object, which is written from its start, or a sink.
            metadata: strings of the caller's own.
            engine: as in `sfpformat.open`.
            threads: how many may encode; None takes the number of cores. The bytes do not depend on it.
            resume_key: what tells this job from others. With it a writer that was killed leaves a partial
                file, and the next with the same key goes on after its last complete tensor: see `done`.
            limits: those of the readers: what they would refuse is not written. Readers need the same ones
                where they are not the default.

        Raises:
            OptionError: metadata that are not strings; a target that cannot be written.
            OSError: the temporary file cannot be made.
        """
        self._metadata = _checked_metadata(metadata or {})
        self._limits = limits
        self._directory_bytes = sum(len(f"{key}{value}".encode()) for key, value in self._metadata.items())
        self._engine_name, self._engine = engine, get_engine(engine, weights=0)
        self._weights = self._chosen_for = 0
        self._workers = Workers(threads or os.cpu_count() or 1)
        self._require_room("the metadata")
        self._sink = open_sink(target, resume_key, limits)
        self._entries: dict[str, TensorEntry] = {}
        if isinstance(self._sink, ResumableSink):
            self._entries = {entry.name: entry for entry in self._sink.entries}
        self._open = True
        self._whole = True  # no tensor is written in part

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            # An interrupted job can go on later; one that failed would fail again.
            self.abort(keep=isinstance(error, KeyboardInterrupt))

    @property
    def done(self) -> tuple[str, ...]:
        """The names of the tensors written so far, those of an earlier, resumed writer included."""
        return tuple(self._entries)

    def add(
        self,
        name: str,
        array: NDArray[np.generic],
        options: Options | None = None,
        *,
        mask: Mask | None = None,
        importance: Importance | None = None,
        other: Mapping[str, object] | None = None,
    ) -> TensorEntry:
        """Writes a tensor.

        Args:
            name: its name, not used before in this file.
            array: any shape; a dtype of SPEC.md 25.1 (BF16 and FP8 as `ml_dtypes` has them).
            options: how to encode it; the default is lossless.
            mask: bool, the array's shape, True for survivors; without it what is not zero survives.
            importance: float, the array's shape, finite and not negative; or two vectors, a number a row
                and a number a column.
            other: more keys of the tensor's entry in the directory (R-DIR-005): names that begin with ``x-``;
                their values are maps, lists, strings, bytes and integers from 0 to 2^64 - 1. Readers give
                them back as `TensorInfo.unknown`.

        Returns:
            The tensor's entry in the directory.

        Raises:
            OptionError: the options do not fit the tensor, the name is taken, or readers would refuse the
                tensor by their limits. The writer can go on, unless that shows only when all is encoded.
            OSError: the file cannot be written, and cannot be finished any more.
            ClosedFileError: it is finished already.
        """
        array = np.asanyarray(array)
        self._require_addable(name, array.ndim, array.nbytes)
        options = require_options(options, f"the options of {name!r}")
        _require_arrays(name, mask, importance)
        self._choose_engine(array.size)
        keys = _checked_keys(name, {} if other is None else other, self._limits)
        plan = plan_tensor(name, array, options, self._engine, mask, importance, self._limits, self._workers)
        entry = replace(plan.entry, other=keys) if keys else plan.entry
        self._require_depth(entry)
        return self._add(entry, encode_vectors(plan), self._encoded(plan))

    def add_encoded(self, entry: TensorEntry, vectors: Bytes | None, chunks: Iterable[Bytes]) -> TensorEntry:
        """Writes a tensor as another file has it, nothing is encoded again.

        Args:
            entry: of the other file's directory, under the name that the tensor is to have here.
            vectors, chunks: what `SfpFile.read_checked` gives for -1, where there are vectors, and 0, 1, ....

        Returns:
            The tensor's entry in this file's directory.

        Raises:
            OptionError: the name is taken, or readers would refuse the tensor by their limits. The writer can
                go on.
            OSError: the file cannot be written, and cannot be finished any more.
            ClosedFileError: it is finished already.
        """
        self._require_addable(entry.name, len(entry.shape), entry.decoded_bytes)
        what = f"tensor {quoted(entry.name)}"
        self._limits.require_written_tensor(entry.decoded_bytes, entry.stored_bytes, what)
        self._require_depth(entry)
        return self._add(entry, vectors, ([chunk] for chunk in chunks))

    def _add(self, entry: TensorEntry, vectors: Bytes | None, chunks: Iterable[list[Bytes]]) -> TensorEntry:
        """Writes the chunks of a tensor, each in parts, and notes the entry, with the chunks' records."""
        self._whole = False
        vector_record = None if vectors is None else self._append([vectors])
        records = [self._append(chunk) for chunk in chunks]
        there = np.concatenate(records) if records else np.zeros(0, CHUNK_RECORD)
        entry = replace(entry, chunks=there, vectors=vector_record)
        entry.require_valid()
        what = f"tensor {quoted(entry.name)}"
        self._limits.require_written_tensor(entry.decoded_bytes, entry.stored_bytes, what)
        # Much of the directory is names and the records of chunks: a file of too many is refused early.
        self._directory_bytes += len(entry.name.encode()) + there.nbytes
        self._require_room(what)
        self._entries[entry.name] = entry
        self._sink.tensor_done(entry)
        self._whole = True
        return entry

    def _require_addable(self, name: str, rank: int, decoded: int) -> None:
        """Raises an error where a tensor cannot be added, before anything of it is written."""
        self._require_usable()
        require_name(name, self._limits)
        if name in self._entries:
            raise OptionError(f"tensor {quoted(name)} was already written")
        what = f"tensor {quoted(name)}"
        self._limits.require_written("tensors", len(self._entries) + 1, what)
        self._limits.require_written("rank", rank, what)
        self._limits.require_written("tensor_bytes", decoded, what)

    def _require_depth(self, entry: TensorEntry) -> None:
        """Raises `OptionError` where an entry is nested deeper than readers allow."""
        if entry.other or self._limits.depth < DEFAULT_LIMITS.depth:  # what this version writes is not deep
            depth = _DEPTH_OF_ENTRIES + depth_of(entry.to_map())
            self._limits.require_written("depth", depth, f"tensor {quoted(entry.name)}")

    def _require_room(self, what: str) -> None:
        """Raises `OptionError` where the directory is larger than readers allow."""
        self._limits.require_written("directory_bytes", self._directory_bytes, what)

    def _choose_engine(self, weights: int) -> None:
        """Looks for a faster engine when much more is to be written than what the last was chosen for."""
        self._weights += weights
        if self._weights > 2 * self._chosen_for:
            self._engine = get_engine(self._engine_name, self._weights)
            self._chosen_for = self._weights

    def _encoded(self, plan: Plan) -> Iterator[list[Bytes]]:
        """The chunks of a plan in order, some encoded ahead where there are threads."""

        def work(job: ChunkJob) -> list[Bytes]:
            return encode_chunk(plan, self._engine, job)

        return self._workers.map(work, chunk_jobs(plan))

    def _require_usable(self) -> None:
        if not self._open:
            raise ClosedFileError("the writer is closed")
        if not self._whole:
            raise SfpError("a tensor was written only in part: the file cannot be finished")

    def _append(self, chunk: list[Bytes]) -> NDArray[np.void]:
        """Writes a chunk, given in parts, and returns its record, shape [1]."""
        length = sum(map(len, chunk))
        if length >= 1 << 32:
            raise OptionError(f"a chunk of {length} bytes; the format ends below 4 GiB")
        checksum = 0
        for part in chunk:
            checksum = crc32(part.data, checksum)
            self._sink.append(part.data)
        return np.array([(length, checksum)], CHUNK_RECORD)

    def close(self) -> None:
        """Writes the directory and makes the file the target."""
        if not self._open:
            return
        try:
            self._require_usable()
            self._workers.stop()
            directory = Directory(self._entries, self._metadata)
            offset = SIZE + sum(entry.stored_bytes for entry in self._entries.values())
            data = directory.to_bytes()
            self._limits.require_written("directory_bytes", len(data), "the file")
            preamble = Preamble(offset, len(data), offset + len(data), crc32(data))
            self._sink.append(data)
            self._sink.commit(preamble.to_bytes())
        except BaseException as error:
            self.abort(keep=isinstance(error, KeyboardInterrupt))
            raise
        self._open = False

    def abort(self, *, keep: bool = False) -> None:
        """Gives up; the target stays as it was. ``keep`` leaves the partial file of a resumable writer."""
        if self._open:
            self._open = False
            self._workers.stop()
            self._sink.abort(keep)


def require_name(name: str, limits: Limits = DEFAULT_LIMITS) -> None:
    """Refuses what cannot be a tensor's name in a file (R-TEN-002, R-MSG-003, R-LIM-001).

    Raises:
        OptionError: it cannot.
    """
    if not isinstance(name, str):
        raise OptionError(f"{name!r} cannot be a tensor's name: it is a {type(name).__name__}, not a string")
    if not name:
        raise OptionError("a tensor has an empty name, which .sfp does not allow; rename it")
    if not is_text(name):
        raise OptionError(
            f"{quoted(name)} cannot be a tensor's name: names are UTF-8 without U+0000; rename it"
        )
    limits.require_written("name_bytes", len(name.encode()), f"tensor {quoted(name)}")


def _checked_keys(name: str, other: Mapping[str, object], limits: Limits) -> dict[str, object]:
    """More keys of an entry, refused where no reader would take them.

    Raises:
        OptionError: a name does not begin with ``x-``, or a value has a type that the directory has not.
    """
    require_mapping(other, f"other keys of {quoted(name)}")
    keys = dict(other)
    if not keys:
        return keys
    for key in keys:
        if not isinstance(key, str) or not key.startswith("x-"):
            raise OptionError(f"tensor {quoted(name)}: the key {quoted(key)} does not begin with 'x-'")
    try:
        as_deep_as_an_entry: dict[str, object] = {"": {"": keys}}
        messagepack.decode(messagepack.encode(as_deep_as_an_entry), limits)
    except (FileFault, TypeError, ValueError, OverflowError) as error:
        said = error.detail if isinstance(error, FileFault) else error
        raise OptionError(f"tensor {quoted(name)}: other keys cannot be written: {said}") from None
    return keys


def _require_arrays(name: str, mask: object, importance: object) -> None:
    """Refuses a mask or an importance that is no array.

    Raises:
        OptionError: one is something else.
    """
    if not (mask is None or isinstance(mask, np.ndarray)):
        raise OptionError(f"the mask of {name!r} is a {type(mask).__name__}, not an array")
    if isinstance(importance, tuple) and len(importance) != 2:
        raise OptionError(f"the importance of {name!r} is {len(importance)} vectors, not rows and columns")
    for vector in importance if isinstance(importance, tuple) else (importance,):
        if not (importance is None or isinstance(vector, np.ndarray)):
            raise OptionError(f"the importance of {name!r} is a {type(vector).__name__}, not an array")


def _checked_metadata(metadata: dict[str, str]) -> dict[str, str]:
    require_mapping(metadata, "metadata")
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str) and is_text(key + value)):
            raise OptionError(f"metadata must be strings of UTF-8 without U+0000: {key!r}: {value!r}")
    return dict(metadata)


def is_text(text: str) -> bool:
    """Whether the directory can hold a string (R-MSG-003)."""
    try:
        return "\0" not in text and bool(text.encode() or True)
    except UnicodeEncodeError:
        return False
