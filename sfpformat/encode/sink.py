"""Where a writer's bytes go: a temporary file that takes its target's name at the end, or a binary object."""

from __future__ import annotations

import fcntl
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..container.entry import TensorEntry
from ..container.preamble import SIZE
from ..errors import OptionError
from ..io.atomic import AtomicFile, real_target
from ..io.source import Buffer
from ..limits import DEFAULT_LIMITS, Limits
from .resume import ResumableSink


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


class CountingSink:
    """Counts the bytes of a file, and gives each tensor away when it is complete.

    Attributes:
        size: of the file so far, in bytes.
    """

    def __init__(self, take: Callable[[TensorEntry, bytes], None]) -> None:
        """Begins.

        Args:
            take: called with the entry of each tensor and the bytes of its chunks.
        """
        self.size = 0
        self._take = take
        self._parts: list[Buffer] = []

    def append(self, data: Buffer) -> None:
        self.size += memoryview(data).nbytes
        self._parts.append(data)

    def tensor_done(self, entry: TensorEntry) -> None:
        self._take(entry, b"".join(self._parts))
        self._parts = []

    def commit(self, preamble: bytes) -> None:
        self.size += len(preamble)

    def abort(self, keep: bool) -> None:
        self._parts = []


class StreamSink:
    """A seekable binary object of the caller's, written from its start; a failure leaves it half written."""

    def __init__(self, stream: BinaryIO) -> None:
        """Begins at the start of the stream.

        Raises:
            OptionError: the stream cannot be written at any place: it is text, read-only, closed, a pipe, or
                was opened to append.
            OSError: it cannot be written.
        """
        _require_writable(stream)
        self._stream = stream
        stream.seek(0)
        self.append(bytes(SIZE))
        self._require_place(SIZE)

    def append(self, data: Buffer) -> None:
        view = memoryview(data)
        while len(view):  # an unbuffered stream may take less than it is given
            count: int | None = self._stream.write(view)
            if count is None and isinstance(self._stream, io.RawIOBase):
                raise BlockingIOError("the stream takes nothing now, and does not wait")
            if count is None:  # objects of other libraries say nothing
                return
            if not 0 < count <= len(view):
                raise OSError(f"the stream took {count} of {len(view)} bytes")
            view = view[count:]

    def tensor_done(self, entry: TensorEntry) -> None:
        pass

    def commit(self, preamble: bytes) -> None:
        end = self._stream.tell()
        self._stream.truncate()
        self._stream.seek(0)
        self.append(preamble)
        self._require_place(SIZE)
        self._stream.seek(end)
        self._stream.flush()

    def _require_place(self, place: int) -> None:
        """Refuses a stream that writes elsewhere than at its position."""
        if self._stream.tell() != place:
            raise OptionError("the stream writes elsewhere than where it stands; open it with mode 'wb'")

    def abort(self, keep: bool) -> None:
        pass


def _require_writable(stream: Any) -> None:
    """Raises `OptionError` where a stream says that it cannot be written at any place."""
    if isinstance(stream, io.TextIOBase) or not all(
        hasattr(stream, method) for method in ("write", "seek", "tell", "truncate", "flush")
    ):
        kind = type(stream).__name__
        raise OptionError(f"cannot write to a {kind}: give a path, or a binary stream opened with mode 'wb'")
    if getattr(stream, "closed", False):
        raise OptionError("the stream is closed")
    if hasattr(stream, "writable") and not stream.writable():
        raise OptionError("the stream was opened for reading only; open it with mode 'wb'")
    if hasattr(stream, "seekable") and not stream.seekable():
        raise OptionError("the stream cannot seek (a pipe or socket?); write to io.BytesIO or a path first")
    if _appends(stream):
        raise OptionError("the stream was opened to append; open it with mode 'wb'")


def _appends(stream: Any) -> bool:
    """Whether the system puts what is written at the end, wherever the stream stands."""
    mode = getattr(stream, "mode", "")
    if isinstance(mode, str) and "a" in mode:
        return True
    try:
        return bool(fcntl.fcntl(stream.fileno(), fcntl.F_GETFL) & os.O_APPEND)
    except (AttributeError, OSError, ValueError, TypeError):  # no file of the system's
        return False


Target = str | os.PathLike[str] | BinaryIO | MemorySink | CountingSink | ResumableSink


def open_sink(target: Target, resume_key: str | None, limits: Limits = DEFAULT_LIMITS) -> Sink:
    """The sink for what a writer was given.

    Raises:
        OptionError: it cannot be written, or not be resumed.
        OSError: the temporary file cannot be made.
    """
    if isinstance(target, (str, os.PathLike)):
        path = real_target(target)
        return FileSink(path) if resume_key is None else ResumableSink(path, resume_key, limits=limits)
    if resume_key is not None:
        raise OptionError("only a path can be resumed")
    return target if isinstance(target, (MemorySink, CountingSink, ResumableSink)) else StreamSink(target)
