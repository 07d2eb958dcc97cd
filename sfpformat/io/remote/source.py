"""The source of a remote file: random access to its bytes, each fetched once."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future
from itertools import pairwise
from typing import ClassVar

from ...errors import ClosedFileError, fault
from .ahead import MOST_BLOCK, Range, ReadAhead
from .http import HttpRanges
from .hub import HubRanges, is_hub
from .location import Location
from .ranges import FileSystemRanges, Ranges


def ranges_of(location: Location) -> Ranges:
    """Returns the requests for the kind of server that a file is on."""
    if is_hub(location):
        return HubRanges(location)
    # Not `isinstance`: a cache of fsspec passes questions about itself on to the file system below it.
    if any(kind.__name__ == "HTTPFileSystem" for kind in type(location.fs).__mro__):
        return HttpRanges(location)
    return FileSystemRanges(location)


class RemoteSource:
    """A file behind a URL. Implements `io.source.Source`. Thread-safe.

    Opening takes one round of requests: the first bytes, and the last ones, which are kept. A read is served
    from these, from a `ReadAhead`, or by a request of its own.

    Attributes:
        length: number of bytes.
        location: the location; the revision of a repository is a commit.
    """

    is_remote: ClassVar[bool] = True

    def __init__(self, location: Location) -> None:
        """Fetches length, start and end of the file.

        Raises:
            FileNotFoundError, PermissionError: the server says so.
            RemoteError: the server's answer is unusable.
            OptionError: the location is a folder, or its library is not installed.
        """
        self._ranges = ranges_of(location)
        try:
            self.length, self._head, self._tail = self._ranges.start()
        except BaseException:
            self._ranges.close()
            raise
        self.location = self._ranges.location
        self._plans: tuple[ReadAhead, ...] = ()
        self._lock = threading.Lock()
        self._is_open = True

    def read(self, offset: int, size: int) -> bytes | memoryview:
        """Reads bytes, as `Source.read`.

        Raises:
            InvalidFileError: the file is shorter (E_TRUNCATED).
            ClosedFileError: the source is closed.
            FileNotFoundError, PermissionError, RemoteError: a request failed.
        """
        self._require_open()
        stop, kept = offset + size, self.length - len(self._tail)
        if stop > self.length:
            present = max(self.length - offset, 0)
            raise fault("R-PRE-007", f"only {present} of {size} bytes could be read", offset=present)
        if not size:
            return b""
        if stop <= len(self._head):
            return self._head[offset:stop]
        if offset >= kept:
            return memoryview(self._tail)[offset - kept : stop - kept]
        data = self._fetched(offset, min(stop, kept))
        return data if stop <= kept else b"".join((data, self._tail[: stop - kept]))

    def read_into(self, out: memoryview, offset: int) -> None:
        """Fills ``out`` with the bytes from ``offset`` on; raises what `read` does."""
        out[:] = self.read(offset, len(out))

    def _fetched(self, start: int, stop: int) -> bytes | memoryview:
        """Returns bytes before the tail: from a plan, or by new requests."""
        for plan in self._plans:
            data = plan.read(self, start, stop)
            if data is not None:
                return data
        self._require_open()
        cuts = [*range(start, stop, MOST_BLOCK), stop]
        parts = [self.submit(first, last) for first, last in pairwise(cuts)]
        try:
            return b"".join([part.result() for part in parts]) if len(parts) > 1 else parts[0].result()
        except CancelledError:
            raise ClosedFileError(f"{self.location} was closed during a read") from None
        finally:
            for part in parts:
                part.cancel()

    def unplanned(self, ranges: Iterable[tuple[int, int]]) -> list[Range]:
        """Returns the parts of ranges that are neither kept nor in a plan."""
        self._require_open()
        kept = self.length - len(self._tail)
        clipped = ((start, min(stop, kept)) for start, stop in ranges if start < kept)
        plans = self._plans
        return [
            Range(self, start, stop)
            for start, stop in clipped
            if not any(plan.has(self, start, stop) for plan in plans)
        ]

    def forget(self, start: int, stop: int) -> None:
        """Releases what plans have of a range that will not be read again."""
        for plan in self._plans:
            plan.forget(self, start, stop)

    def require_unchanged(self) -> None:
        """Raises RemoteError if the server now has another version of the file."""
        self._ranges.require_unchanged()

    def submit(self, start: int, stop: int) -> Future[bytes]:
        """Starts a request."""
        return self._ranges.submit(start, stop)

    def add_plan(self, plan: ReadAhead) -> None:
        with self._lock:
            self._plans = (*self._plans, plan)

    def remove_plan(self, plan: ReadAhead) -> None:
        with self._lock:
            self._plans = tuple(other for other in self._plans if other is not plan)

    def reopenable(self) -> Location:
        """Returns the location, which opens the same file in another process."""
        self._require_open()
        return self.location

    def close(self) -> None:
        """Cancels all requests."""
        self._is_open = False
        for plan in self._plans:
            plan.close()
        self._ranges.close()

    def _require_open(self) -> None:
        if not self._is_open:
            raise ClosedFileError(f"{self.location if hasattr(self, 'location') else 'the file'} is closed")


def read_whole(location: Location, most: int) -> tuple[bytes, Location]:
    """Reads a small file, such as an index.

    Args:
        location: the file.
        most: the greatest number of bytes.

    Returns:
        Its bytes, or the first ``most + 1`` of a longer file; and its location, with a commit for a revision.

    Raises:
        FileNotFoundError, PermissionError, RemoteError, OptionError: as in `RemoteSource`.
    """
    source = RemoteSource(location)
    try:
        return bytes(source.read(0, min(source.length, most + 1))), source.location
    finally:
        source.close()
