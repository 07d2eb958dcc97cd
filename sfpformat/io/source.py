"""Sources of bytes for readers: a file, bytes, an mmap, any seekable binary object, or a URL."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterable
from typing import Any, BinaryIO, ClassVar, Protocol, cast

import numpy as np

from ..errors import ClosedFileError, OptionError, fault
from .positional import PositionalFile
from .remote.ahead import Range
from .remote.location import Location, OpenFile, location_of

# The greatest size of a file in memory that is pickled, in bytes.
MOST_PICKLED = 1 << 26

Buffer = bytes | bytearray | memoryview
Readable = str | os.PathLike[str] | Buffer | BinaryIO | Location | OpenFile


class Source(Protocol):
    """Random access to the bytes of a file, from any thread.

    Attributes:
        length: number of bytes.
        is_remote: whether reads are requests to a server, so that it is worth planning them.
    """

    length: int
    is_remote: ClassVar[bool]

    def read(self, offset: int, size: int) -> Buffer:
        """Reads ``size`` bytes from ``offset``.

        Raises:
            InvalidFileError: the source has fewer bytes (E_TRUNCATED). Its offset is relative to ``offset``.
            ClosedFileError: the source is closed.
        """

    def read_into(self, out: memoryview, offset: int) -> None:
        """Fills ``out``, writable bytes, with the bytes from ``offset`` on.

        Raises:
            InvalidFileError, ClosedFileError: as in `read`.
        """

    def unplanned(self, ranges: Iterable[tuple[int, int]]) -> list[Range]:
        """Returns what a `ReadAhead` has to fetch of ranges, file offsets with an exclusive stop.

        These are the parts that are neither in memory nor in another `ReadAhead`; none of a local source.
        """

    def forget(self, start: int, stop: int) -> None:
        """Releases what a `ReadAhead` has of a range that will not be read again."""

    def require_unchanged(self) -> None:
        """Checks a remote file after a checksum did not match.

        Raises:
            RemoteError: the file has changed since it was opened.
        """

    def reopenable(self) -> str | bytes | Location:
        """Returns a path, bytes or a location that open the same source in another process.

        Raises:
            OptionError: the source is a stream, or is in memory and has more than `MOST_PICKLED` bytes.
            ClosedFileError: the source is closed.
        """

    def close(self) -> None:
        """Closes the file that the source opened. An object that the caller passed stays open."""


def open_source(readable: Readable) -> Source:
    """Returns the source for a path, URL, bytes, or stream.

    Raises:
        OptionError: ``readable`` has another type, or is a text stream, a pipe, write-only or closed; or a
            package that reads the URL is not installed.
        OSError: the source cannot be read. `RemoteError` is one, too.
    """
    location = location_of(readable)
    if location is not None:
        from .remote.source import RemoteSource  # lazy: most files are local

        return RemoteSource(location)
    if isinstance(readable, (str, os.PathLike)):
        return _FileSource(readable)
    if _is_buffer(readable):
        return _BufferSource(memoryview(cast(Buffer, readable)).cast("B"))
    _require_readable(readable)
    return _ObjectSource(cast(BinaryIO, readable))


def _require_readable(stream: Any) -> None:
    if isinstance(stream, io.TextIOBase) or not (hasattr(stream, "seek") and hasattr(stream, "read")):
        kind = type(stream).__name__
        raise OptionError(f"cannot read a {kind}; pass a path, bytes, or a stream opened with mode 'rb'")
    if getattr(stream, "closed", False):
        raise OptionError("the stream is closed")
    if hasattr(stream, "readable") and not stream.readable():
        raise OptionError("the stream was opened for writing only; open it with mode 'rb'")
    if hasattr(stream, "seekable") and not stream.seekable():
        raise OptionError("the stream cannot seek (is it a pipe or socket?); read it and pass the bytes")


def _is_buffer(value: object) -> bool:
    """Returns whether a value supports the buffer protocol, as an mmap does, which also has `read`."""
    try:
        memoryview(cast(Buffer, value))
    except TypeError:
        return False
    return True


def _require_all(data: Buffer, size: int) -> Buffer:
    if len(data) != size:
        raise fault("R-PRE-007", f"only {len(data)} of {size} bytes could be read", offset=len(data))
    return data


class _Local:
    """What sources on this machine have in common: nothing is fetched ahead, and nothing is checked again."""

    is_remote: ClassVar[bool] = False

    def read(self, offset: int, size: int) -> Buffer:
        raise NotImplementedError

    def read_into(self, out: memoryview, offset: int) -> None:
        out[:] = self.read(offset, len(out))

    def unplanned(self, ranges: Iterable[tuple[int, int]]) -> list[Range]:
        return []

    def forget(self, start: int, stop: int) -> None:
        pass

    def require_unchanged(self) -> None:
        pass


class _FileSource(_Local):
    """A file that the source opens and closes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.path.abspath(path)  # another process may have another working directory
        self._file = PositionalFile(path)
        self.length = self._file.length

    def read(self, offset: int, size: int) -> Buffer:
        # np.empty, because a bytearray would be filled with zeros first.
        view = np.empty(min(size, max(self.length - offset, 0)), np.uint8).data
        return _require_all(view[: self._file.read_into(view, offset)], size)

    def read_into(self, out: memoryview, offset: int) -> None:
        _require_all(out[: self._file.read_into(out, offset)], len(out))

    def reopenable(self) -> str:
        if self._file.closed:
            raise ClosedFileError(f"{self._path} is closed and cannot be pickled")
        return self._path

    def close(self) -> None:
        self._file.close()


class _BufferSource(_Local):
    """Bytes in memory. `read` returns a view, not a copy."""

    def __init__(self, view: memoryview) -> None:
        self._view: memoryview | None = view
        self.length = len(view)

    def read(self, offset: int, size: int) -> Buffer:
        if self._view is None:
            raise ClosedFileError("the file is closed")
        return _require_all(self._view[offset : offset + size], size)

    def reopenable(self) -> bytes:
        if self._view is None:
            raise ClosedFileError("the file is closed and cannot be pickled")
        if self.length > MOST_PICKLED:
            raise OptionError(
                f"a file of {self.length:,} bytes in memory cannot be pickled (limit: {MOST_PICKLED:,}); "
                "open it by its path"
            )
        return bytes(self._view)

    def close(self) -> None:
        self._view = None


class _ObjectSource(_Local):
    """A seekable binary object of the caller. `close` does not close it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream: BinaryIO | None = stream
        self._lock = threading.Lock()
        self.length = stream.seek(0, os.SEEK_END)

    def read(self, offset: int, size: int) -> Buffer:
        if self._stream is None:
            raise ClosedFileError("the file is closed")
        size_there = min(size, max(self.length - offset, 0))
        with self._lock:
            self._stream.seek(offset)
            parts, left = [], size_there
            while left > 0 and (part := self._stream.read(left)):
                parts.append(part)
                left -= len(part)
        return _require_all(b"".join(parts), size)

    def reopenable(self) -> str:
        raise OptionError("a file that is read from a stream cannot be pickled; open it by its path")

    def close(self) -> None:
        self._stream = None
