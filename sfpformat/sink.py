"""Where a writer's bytes go: a temporary file that takes its target's name at the end, or a binary object.

A resumable sink has fixed names, ``TARGET.partial`` and ``TARGET.partial.journal``. The journal is a sequence
of MessagePack values: the job's key, then the entry of each tensor that is complete. After a crash the next
writer with the same key checks what the journal names against its checksums, drops the rest, and goes on.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO, Protocol

import msgpack
import numpy as np

from .atomic import AtomicFile, open_locked, real_target, rename
from .checksum import crc32
from .container import messagepack
from .container.entry import TensorEntry
from .container.fields import typed
from .container.messagepack import Map
from .container.preamble import SIZE
from .errors import OptionError, SfpError
from .limits import DEFAULT_LIMITS
from .source import Buffer


class Sink(Protocol):
    """Takes the bytes of a file in order, and the preamble last."""

    def append(self, data: Buffer) -> None:
        """Writes behind what was written before."""

    def tensor_done(self, entry: TensorEntry) -> None:
        """Notes that all chunks of a tensor are written."""

    def commit(self, preamble: bytes) -> None:
        """Writes the preamble and makes the file the target."""

    def abort(self, keep: bool) -> None:
        """Gives up; with ``keep`` what was written stays for a later writer, where the sink can."""


class FileSink:
    """A temporary file with a name of its own beside the target."""

    def __init__(self, target: Path) -> None:
        self._new = AtomicFile(target)
        try:
            self.append(bytes(SIZE))
        except BaseException:
            self._new.abort()
            raise

    def append(self, data: Buffer) -> None:
        self._new.file.write(data)

    def tensor_done(self, entry: TensorEntry) -> None:
        pass

    def commit(self, preamble: bytes) -> None:
        self._new.file.seek(0)
        self._new.file.write(preamble)
        self._new.commit()

    def abort(self, keep: bool) -> None:
        self._new.abort()


class MemorySink:
    """Memory: the parts of a file, put together when all are there.

    Attributes:
        data: the file, once it is committed.
    """

    def __init__(self) -> None:
        self.data = b""
        self._parts: list[Buffer] = []

    def append(self, data: Buffer) -> None:
        self._parts.append(data)

    def tensor_done(self, entry: TensorEntry) -> None:
        pass

    def commit(self, preamble: bytes) -> None:
        self.data = b"".join([preamble, *self._parts])
        self._parts = []

    def abort(self, keep: bool) -> None:
        self._parts = []


class StreamSink:
    """A seekable binary object of the caller's, written from its start; a failure leaves it half written."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        stream.seek(0)
        stream.write(bytes(SIZE))

    def append(self, data: Buffer) -> None:
        self._stream.write(data)

    def tensor_done(self, entry: TensorEntry) -> None:
        pass

    def commit(self, preamble: bytes) -> None:
        end = self._stream.tell()
        self._stream.truncate()
        self._stream.seek(0)
        self._stream.write(preamble)
        self._stream.seek(end)
        self._stream.flush()

    def abort(self, keep: bool) -> None:
        pass


class ResumableSink:
    """A temporary file that survives the death of its writer, and its journal.

    Attributes:
        entries: the tensors that an earlier writer with the same key left complete, in order.
    """

    def __init__(self, target: Path, key: str) -> None:
        """Takes up what an earlier writer left, or begins.

        Args:
            key: tells the job: what is written from what with which options. Another key begins anew.

        Raises:
            LockedFileError: another process is writing this target.
            OSError: there is no space, or no permission; nothing is left behind.
        """
        self._target = target
        self._path = target.with_name(target.name + ".partial")
        self._journal_path = target.with_name(target.name + ".partial.journal")
        self._file = open_locked(self._path)
        self._journal: BinaryIO | None = None
        try:
            self.entries, end = self._complete_tensors(key)
            self._file.truncate(end)
            self._file.seek(end)
            self._journal = self._journal_path.open("wb")
            self._journal.write(msgpack.packb(key))
            for entry in self.entries:
                self._journal.write(messagepack.encode(entry.to_map()))
            self._journal.flush()
        except BaseException as error:
            self.abort(keep=isinstance(error, KeyboardInterrupt))
            raise

    def _complete_tensors(self, key: str) -> tuple[list[TensorEntry], int]:
        """The journal's tensors whose bytes are all there and match, and where they end."""
        if os.fstat(self._file.fileno()).st_size < SIZE or not self._journal_path.exists():
            self._file.truncate(0)
            self._file.write(bytes(SIZE))
            return [], SIZE
        entries: list[TensorEntry] = []
        with self._journal_path.open("rb") as journal, contextlib.suppress(*_CUT_OFF):
            unpacker = msgpack.Unpacker(journal)
            if unpacker.unpack() != key:
                return [], SIZE
            self._file.seek(SIZE)
            for fields in unpacker:
                decoded = messagepack.decode(messagepack.encode(fields), DEFAULT_LIMITS)
                entry = TensorEntry.from_map(typed(decoded, Map, "an entry", 0), DEFAULT_LIMITS)
                if not self._matches(entry):
                    break
                entries.append(entry)
        return entries, SIZE + sum(entry.stored_bytes for entry in entries)

    def _matches(self, entry: TensorEntry) -> bool:
        records = [entry.chunks] if entry.vectors is None else [entry.vectors, entry.chunks]
        for record in np.concatenate(records):
            data = self._file.read(int(record["length"]))
            if len(data) != record["length"] or crc32(data) != record["crc"]:
                return False
        return True

    def append(self, data: Buffer) -> None:
        self._file.write(data)

    def tensor_done(self, entry: TensorEntry) -> None:
        assert self._journal is not None
        self._file.flush()
        self._journal.write(messagepack.encode(entry.to_map()))
        self._journal.flush()

    def commit(self, preamble: bytes) -> None:
        assert self._journal is not None
        self._journal.close()
        self._file.seek(0)
        self._file.write(preamble)
        self._file.flush()
        os.fsync(self._file.fileno())
        rename(self._path, self._target)
        self._journal_path.unlink(missing_ok=True)
        self._file.close()

    def abort(self, keep: bool) -> None:
        if self._journal is not None:
            with contextlib.suppress(OSError):
                self._journal.close()
        if not keep:
            self._path.unlink(missing_ok=True)
            self._journal_path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._file.close()


# What reading a journal raises whose last record was cut off or damaged: work goes on from before it.
_CUT_OFF = (msgpack.exceptions.UnpackException, ValueError, TypeError, AttributeError, SfpError)


def open_sink(target: str | os.PathLike[str] | BinaryIO | MemorySink, resume_key: str | None) -> Sink:
    """The sink for whatever a writer was given."""
    if isinstance(target, (str, os.PathLike)):
        path = real_target(target)
        return FileSink(path) if resume_key is None else ResumableSink(path, resume_key)
    if resume_key is not None:
        raise OptionError("only a path can be resumed")
    return target if isinstance(target, MemorySink) else StreamSink(target)
