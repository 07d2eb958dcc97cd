"""Requests for ranges of bytes of a remote file. One class for each kind of server."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from ...errors import OptionError, RemoteError
from .location import Location, errors_named

HEAD = 64  # bytes of the first request: the preamble
# Bytes of the second request, the end of the file. The directory of a model with 300 tensors has about 30 KB.
TAIL = 128 << 10
THREADS = 16  # for libraries that wait for each answer
# What file systems call the version of a file, in the results of `info`.
_VERSION_KEYS = (
    *("ETag", "etag", "version_id", "versionId", "VersionId", "generation", "md5Hash", "content_md5"),
    *("LastModified", "last_modified", "mtime", "updated", "modified", "created"),
)


class Start(NamedTuple):
    """The result of the first round of requests.

    Attributes:
        length: number of bytes of the file.
        head: its first bytes, at most `HEAD`.
        tail: its last bytes; empty if the server does not support ranges from the end.
    """

    length: int
    head: bytes
    tail: bytes


class Ranges(Protocol):
    """A remote file that is read by ranges, from any thread."""

    @property
    def location(self) -> Location:
        """The location of the file. After `start`, the revision of a repository is a commit."""

    def start(self) -> Start:
        """Fetches length, head and tail, in one round of concurrent requests. Called once, before the rest.

        Raises:
            FileNotFoundError, PermissionError, RemoteError: the server refuses, or its answer is unusable.
        """

    def submit(self, start: int, stop: int) -> Future[bytes]:
        """Starts a request for the bytes from ``start`` up to, not including, ``stop``.

        The result has exactly these bytes, or raises `RemoteError`.
        """

    def require_unchanged(self) -> None:
        """Asks the server whether the file has changed since `start`.

        Raises:
            RemoteError: it has changed.
        """

    def close(self) -> None:
        """Ends threads."""


def require_size(data: bytes, start: int, stop: int, where: object) -> bytes:
    """Returns the answer to a request, after a check of its length.

    Raises:
        RemoteError: it has more or fewer bytes than the range.
    """
    if len(data) == stop - start:
        return data
    if len(data) < stop - start:
        raise RemoteError(
            f"{where}: only {len(data):,} of {stop - start:,} bytes from byte {start:,} arrived; "
            "the file was changed, or the transfer broke off"
        )
    raise RemoteError(
        f"{where}: {len(data):,} bytes arrived for a range of {stop - start:,}: the server ignores ranges; "
        "download the file"
    )


def require_own_loop(fs: Any) -> None:
    """Raises OptionError if a file system belongs to an event loop of the caller."""
    if fs.asynchronous:
        raise OptionError("a file system with asynchronous=True cannot be read here; make it without")


def changed(where: object, what: str) -> RemoteError:
    """Returns the error for a file that is no longer the one that was opened."""
    return RemoteError(f"{where} has changed since it was opened ({what}); open it again")


class FileSystemRanges:
    """A file of any of fsspec's file systems: asynchronous ones by their loop, all others by threads."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._version: dict[str, str] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._is_async = bool(getattr(location.fs, "async_impl", False))
        if self._is_async:
            require_own_loop(location.fs)

    @property
    def location(self) -> Location:
        """The location of the file."""
        return self._location

    def start(self) -> Start:
        with errors_named(self._location):
            info = self._location.fs.info(self._location.path)
        if info.get("type") == "directory":
            raise OptionError(f"{self._location} is a folder; name a file in it")
        if type(info.get("size")) is not int:
            raise RemoteError(f"{self._location}: the server does not state the length of the file")
        self._version, length = _version_of(info), info["size"]
        tail = max(length - TAIL, 0)
        both = [self.submit(0, min(HEAD, length))] if tail else []
        both.append(self.submit(tail, length))
        data = [future.result() for future in both]
        return Start(length, data[0][:HEAD], data[-1])

    def submit(self, start: int, stop: int) -> Future[bytes]:
        fs, path = self._location.fs, self._location.path
        if self._is_async:
            import asyncio

            async def fetch() -> bytes:
                with errors_named(self._location):
                    data = await fs._cat_file(path, start=start, end=stop)
                return require_size(data, start, stop, self._location)

            return asyncio.run_coroutine_threadsafe(fetch(), fs.loop)

        def read() -> bytes:
            with errors_named(self._location):  # without a cache, which would read ahead for each range
                data = bytes(fs.cat_file(path, start=start, end=stop, cache_type="none"))
            return require_size(data, start, stop, self._location)

        return self._in_thread(read)

    def _in_thread(self, read: Callable[[], bytes]) -> Future[bytes]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="sfp-remote")
        return self._pool.submit(read)

    def require_unchanged(self) -> None:
        with errors_named(self._location):
            self._location.fs.invalidate_cache(self._location.fs._parent(self._location.path))
            now = _version_of(self._location.fs.info(self._location.path))
        different = [key for key in self._version if now.get(key) != self._version[key]]
        if different:
            raise changed(self._location, f"another {different[0]}")

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _version_of(info: dict[str, Any]) -> dict[str, str]:
    """Returns what identifies the contents of a file, from the result of `info`."""
    return {key: str(info[key]) for key in ("size", *_VERSION_KEYS) if info.get(key) is not None}
