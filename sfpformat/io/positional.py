"""Positional reads of files, from any thread."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from io import FileIO

from ..errors import ClosedFileError
from .closing import Closing

_MOST = 1 << 30  # bytes per call; macOS refuses 2^31


class PositionalFile(Closing):
    """A file that several threads can read at any offset.

    Uses `os.preadv` or `os.pread`. Systems without both share one file position, under a lock. Does not map
    the file, because mapped pages would count as memory of the process.

    Attributes:
        length: size of the file when it was opened, in bytes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens a file.

        Raises:
            OSError: the file cannot be opened.
        """
        self._file = FileIO(os.fspath(path))
        self._lock = threading.Lock()
        weakref.finalize(self, self._file.close)  # prevents a ResourceWarning if the caller does not close it
        self.length = os.fstat(self._file.fileno()).st_size

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fills a buffer with the bytes from ``offset``.

        Returns:
            The number of bytes, less than the size of the buffer only at the end of the file.

        Raises:
            ClosedFileError: the file was closed.
            OSError: the file cannot be read.
        """
        if self._file.closed:
            raise ClosedFileError("the file is closed")
        filled = 0
        while filled < len(view):
            got = self._read_some(view[filled : filled + _MOST], offset + filled)
            if got == 0:
                break
            filled += got
        return filled

    def _read_some(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            count: int = os.preadv(self._file.fileno(), [view], offset)
            return count
        if hasattr(os, "pread"):
            data = os.pread(self._file.fileno(), len(view), offset)
            view[: len(data)] = data
            return len(data)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(view)

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._file.closed

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # opened only for reading, so an error loses no data
            self._file.close()
