"""A sink that resumes an interrupted write: ``TARGET.partial`` and ``TARGET.partial.journal``.

The journal is a sequence of MessagePack values: the job's key, then the entry of each complete tensor. After
a crash, the next writer with the same key checks the tensors in the journal by their checksums, discards the
rest of the file, and continues.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import msgpack
import numpy as np

from ..container import messagepack
from ..container.entry import TensorEntry
from ..container.fields import typed
from ..container.messagepack import Map
from ..container.preamble import SIZE, Preamble
from ..errors import SfpError, SfpWarning
from ..io.checksum import crc32
from ..io.filesystem import (
    LockedFileError,
    UnnamedFileError,
    beside,
    create,
    creation_mode,
    open_locked,
    remove,
    remove_locked,
    rename_locked,
    sync,
    take_attributes,
)
from ..io.source import Buffer
from ..limits import DEFAULT_LIMITS, Limits

# Exceptions from a journal whose last record is cut off or damaged. Writing resumes before that record.
_CUT_OFF = (msgpack.exceptions.UnpackException, ValueError, TypeError, AttributeError, SfpError)


class ResumableSink:
    """A temporary file and its journal, which remain if the writer is killed.

    Attributes:
        entries: entries of the complete tensors, including those of an earlier writer with the same key.
    """

    def __init__(
        self, target: Path, key: str, *, like: Path | None = None, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        """Resumes an earlier write, or starts a new one.

        Args:
            target: the final path of the file, links resolved.
            key: identifies the job: its input, output and options. A different key starts a new file.
            like: the file whose owner and mode are copied, if it exists; else ``target``.
            limits: limits for reading the entries in the journal.

        Warns: the partial file of an earlier write with another key is discarded.

        Raises:
            LockedFileError: another process is writing this target.
            OSError: the files cannot be written. The partial file and the journal are removed.
        """
        self._target, self._like, self._limits = target, like, limits
        self._path = beside(target, ".partial")
        self._journal_path = beside(target, ".partial.journal")
        mode = creation_mode(target, like)
        self._file, self._locked = open_locked(self._path, mode)
        self._journal: BinaryIO | None = None
        self._finished = False  # complete and synced, but not renamed
        try:
            self.entries, end = self._complete_tensors(key)
            os.ftruncate(self._file.fileno(), end)
            self._file.seek(end)
            journal = create(self._journal_path, os.O_WRONLY | os.O_TRUNC, mode)
            self._journal = os.fdopen(journal, "wb")
            self._journal.write(msgpack.packb(key))
            for entry in self.entries:
                self._journal.write(messagepack.encode(entry.to_map()))
            self._journal.flush()
        except BaseException as error:
            self.abort(keep=isinstance(error, KeyboardInterrupt))
            raise

    def _complete_tensors(self, key: str) -> tuple[list[TensorEntry], int]:
        """Returns the journal's leading tensors whose checksums match, and the file offset of their end."""
        if os.fstat(self._file.fileno()).st_size < SIZE or not self._journal_path.exists():
            os.ftruncate(self._file.fileno(), 0)
            self._file.write(bytes(SIZE))
            return [], SIZE
        entries: list[TensorEntry] = []
        with self._journal_path.open("rb") as journal, contextlib.suppress(*_CUT_OFF):
            unpacker = msgpack.Unpacker(journal)
            if unpacker.unpack() != key:
                warnings.warn(
                    f"{self._path.name}, which an interrupted write with other options or inputs left, is "
                    "discarded",
                    SfpWarning,
                    stacklevel=2,
                )
                return [], SIZE
            self._file.seek(SIZE)
            for fields in unpacker:
                decoded = messagepack.decode(messagepack.encode(fields), self._limits)
                entry = TensorEntry.from_map(typed(decoded, Map, "an entry", 0), self._limits)
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
        self.entries.append(entry)

    def commit(self, preamble: bytes) -> None:
        assert self._journal is not None
        with contextlib.suppress(OSError):  # the journal is no longer needed
            self._journal.close()
        end = self._file.tell()
        self._file.seek(0)
        self._file.write(preamble)
        self._file.flush()
        if not self._locked:
            self._require_own(preamble, end)
        take_attributes(self._file.fileno(), self._target, self._like)
        sync(self._file.fileno())
        self._finished = True
        try:
            rename_locked(self._file, self._path, self._target)
        except OSError as error:
            if not self._path.exists():
                raise
            words = f"{error.strerror}: the new file is complete, but could not be renamed. It remains as "
            words += f"{self._path.name}; run the same job again to rename it"
            raise UnnamedFileError(error.errno, words, os.fspath(self._target)) from error
        remove(self._journal_path)
        with contextlib.suppress(OSError):  # the file is already synced
            self._file.close()

    def _require_own(self, preamble: bytes, end: int) -> None:
        """Reads the file again and compares all checksums. Called if the file system has no locks.

        Raises:
            LockedFileError: another process has changed the file.
        """
        self._file.seek(SIZE)
        own = all(map(self._matches, self.entries))
        rest = self._file.read() if own else b""
        if crc32(rest) != Preamble.from_bytes(preamble, end).directory_crc:
            raise LockedFileError(f"{self._path.name} was changed by another process; write the file again")

    def abort(self, keep: bool) -> None:
        if self._journal is not None:
            with contextlib.suppress(OSError):
                self._journal.close()
        if not keep and not (self._finished and self._path.exists()):
            remove(self._journal_path)
            remove_locked(self._file, self._path)
        with contextlib.suppress(OSError):
            self._file.close()
