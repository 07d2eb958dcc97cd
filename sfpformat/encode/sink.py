"""Sinks for a writer's bytes: a temporary file that replaces its target at the end, memory, or a stream."""

from __future__ import annotations

import io
import os
import sys
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
    """Receives the bytes of a file in order, and the preamble last."""

    def append(self, data: Buffer) -> None:
        """Appends data."""

    def tensor_done(self, entry: TensorEntry) -> None:
        """Records that all chunks of a tensor are written."""

    def commit(self, preamble: bytes) -> None:
        """Writes the preamble and completes the file. A temporary file replaces its target."""

    def abort(self, keep: bool) -> None:
        """Aborts. If ``keep`` is true and the sink supports it, keeps the partial file to resume later."""


class FileSink:
    """A temporary file in the target's folder, with a random name."""

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
    """A file in memory.

    Attributes:
        data: the bytes of the file after `commit`; empty before.
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
    """Counts the bytes of a file, and passes each complete tensor to a callback.

    Attributes:
        size: size of the file so far, in bytes. Includes the preamble only after `commit`.
    """

    def __init__(self, take: Callable[[TensorEntry, bytes], None]) -> None:
        """Starts with an empty file.

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
    """A seekable binary object of the caller, written from its start. After an error it is partly written."""

    def __init__(self, stream: BinaryIO) -> None:
        """Writes placeholder bytes for the preamble at the start of the stream.

        Raises:
            OptionError: the stream does not support positional writes: it is a text stream, read-only,
                closed, a pipe, or opened to append.
            OSError: the stream cannot be written.
        """
        _require_writable(stream)
        self._stream = stream
        stream.seek(0)
        self.append(bytes(SIZE))
        self._require_place(SIZE)

    def append(self, data: Buffer) -> None:
        view = memoryview(data)
        while len(view):  # an unbuffered stream may write fewer bytes than requested
            count: int | None = self._stream.write(view)
            if count is None and isinstance(self._stream, io.RawIOBase):
                raise BlockingIOError(
                    "the stream is non-blocking and accepts no bytes now; use a blocking stream"
                )
            if count is None:  # objects of some libraries do not return the count
                return
            if not 0 < count <= len(view):
                raise OSError(f"the stream reported {count} written bytes of {len(view)}")
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
        """Raises `OptionError` if the stream did not write at its position."""
        if self._stream.tell() != place:
            raise OptionError("the stream does not write at its position; open it with mode 'wb'")

    def abort(self, keep: bool) -> None:
        pass


def _require_writable(stream: Any) -> None:
    """Raises `OptionError` if a stream does not support positional binary writes."""
    if isinstance(stream, io.TextIOBase) or not all(
        hasattr(stream, method) for method in ("write", "seek", "tell", "truncate", "flush")
    ):
        kind = type(stream).__name__
        raise OptionError(f"cannot write to a {kind}; pass a path, or a binary stream opened with mode 'wb'")
    if getattr(stream, "closed", False):
        raise OptionError("the stream is closed")
    if hasattr(stream, "writable") and not stream.writable():
        raise OptionError("the stream was opened for reading only; open it with mode 'wb'")
    if hasattr(stream, "seekable") and not stream.seekable():
        raise OptionError(
            "the stream cannot seek (is it a pipe or socket?); write to io.BytesIO or to a path first"
        )
    if _appends(stream):
        raise OptionError("the stream was opened to append; open it with mode 'wb'")


def _appends(stream: Any) -> bool:
    """Returns whether the stream is in append mode, and so ignores its position when it writes."""
    mode = getattr(stream, "mode", "")
    if isinstance(mode, str) and "a" in mode:
        return True
    if sys.platform == "win32":  # no call returns the mode; `_require_place` detects most of these streams
        return False
    try:
        import fcntl

        return bool(fcntl.fcntl(stream.fileno(), fcntl.F_GETFL) & os.O_APPEND)
    except (
        ImportError,
        AttributeError,
        OSError,
        ValueError,
        TypeError,
    ):  # not a file of the operating system
        return False


Target = str | os.PathLike[str] | BinaryIO | MemorySink | CountingSink | ResumableSink


def open_sink(target: Target, resume_key: str | None, limits: Limits = DEFAULT_LIMITS) -> Sink:
    """Returns the sink for a writer's target.

    Args:
        target: a path, a stream, or a sink.
        resume_key: identifies the job of a resumable writer, only for paths. None: not resumable.
        limits: limits of the readers.

    Raises:
        OptionError: the target cannot be written, or a target with a ``resume_key`` is not a path.
        LockedFileError: another process is writing this target.
        OSError: the temporary file cannot be created.
    """
    if isinstance(target, (str, os.PathLike)):
        path = real_target(target)
        return FileSink(path) if resume_key is None else ResumableSink(path, resume_key, limits=limits)
    if resume_key is not None:
        raise OptionError("resume_key needs a path as the target, not a stream")
    return target if isinstance(target, (MemorySink, CountingSink, ResumableSink)) else StreamSink(target)
