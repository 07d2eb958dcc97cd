"""Ranges of a file on a server of HTTP, by the session of fsspec's file system, with its settings.

Rules: a body is read only after its status and headers were checked, so that a server that ignores the range
does not send the whole file. Every answer is compared with the first one: length, ETag, time of change.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from ...errors import RemoteError
from .location import Location, first_line
from .ranges import HEAD, TAIL, Start, changed, require_own_loop, require_size

# "Content-Range": first and last byte, or * for an unsatisfiable range; length of the file.
CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")


class _Version(NamedTuple):
    """What identifies the contents of a file: length, strong or weak ETag, and time of change, if known."""

    length: int
    etag: str | None
    modified: str | None


class HttpRanges:
    """A file on a server of HTTP."""

    def __init__(self, location: Location) -> None:
        """Sends nothing yet.

        Raises:
            OptionError: the file system belongs to an event loop of the caller.
        """
        require_own_loop(location.fs)
        self._location, self._fs = location, location.fs
        self._version: _Version | None = None

    @property
    def location(self) -> Location:
        """The location of the file."""
        return self._location

    def start(self) -> Start:
        return asyncio.run_coroutine_threadsafe(self._start(), self._fs.loop).result()

    async def _start(self) -> Start:
        head, tail = await asyncio.gather(
            self._first(f"bytes=0-{HEAD - 1}", HEAD),
            self._first(f"bytes=-{TAIL}", TAIL),
            return_exceptions=True,
        )
        if isinstance(head, BaseException):
            raise head
        self._version, data = head
        if isinstance(
            tail, BaseException
        ):  # servers may lack ranges from the end; the next round does without
            return Start(self._version.length, data, b"")
        self._require_same(tail[0])
        return Start(self._version.length, data, tail[1])

    async def _first(self, wanted: str, most: int) -> tuple[_Version, bytes]:
        """Requests a range of at most ``most`` bytes. Returns the file's version and the bytes."""
        async with self._answer(wanted) as answer:
            if answer.status == 416 and _version_of(answer, 0) is not None:  # an empty file
                return _Version(0, None, None), b""
            start, stop, version = self._checked(answer)
            if stop - start > most or (wanted.startswith("bytes=-") and stop != version.length):
                raise RemoteError(f"{self._location}: the server answers {wanted!r} with another range")
            return version, await self._body(answer, start, stop)

    def submit(self, start: int, stop: int) -> Future[bytes]:
        return asyncio.run_coroutine_threadsafe(self._fetch(start, stop), self._fs.loop)

    async def _fetch(self, start: int, stop: int) -> bytes:
        async with self._answer(f"bytes={start}-{stop - 1}") as answer:
            if answer.status == 416:
                raise changed(self._location, "it is shorter")
            got_start, got_stop, version = self._checked(answer)
            self._require_same(version)
            if (got_start, got_stop) != (start, stop):
                raise RemoteError(
                    f"{self._location}: the server answers bytes {start:,} to {stop - 1:,} with bytes "
                    f"{got_start:,} to {got_stop - 1:,}"
                )
            return await self._body(answer, start, stop)

    @asynccontextmanager
    async def _answer(self, wanted: str) -> AsyncIterator[Any]:
        """Sends a request and yields the answer, whose body is not read yet. Names the file in exceptions."""
        import aiohttp

        settings = dict(self._fs.kwargs)
        headers = {**settings.pop("headers", {}), "Range": wanted, "Accept-Encoding": "identity"}
        etag = None if self._version is None else self._version.etag
        if etag is not None and not etag.startswith("W/"):  # If-Match never matches a weak one
            headers["If-Match"] = etag
        try:
            session = await self._fs.set_session()
            async with session.get(
                self._fs.encode_url(self._location.path), headers=headers, **settings
            ) as answer:
                yield answer
        except TimeoutError as error:
            raise RemoteError(f"{self._location}: the server did not answer in time") from error
        except aiohttp.ClientPayloadError as error:
            raise RemoteError(f"{self._location}: the transfer broke off: {first_line(error)}") from error
        except aiohttp.ClientError as error:
            raise RemoteError(f"{self._location}: {type(error).__name__}: {first_line(error)}") from error

    def _checked(self, answer: Any) -> tuple[int, int, _Version]:
        """Returns the range of an answer, start and stop, and the file's version.

        Raises:
            FileNotFoundError, PermissionError, RemoteError: the answer has no such range.
        """
        status, where = answer.status, self._location
        if status in (404, 410):
            raise FileNotFoundError(errno.ENOENT, f"no such file (the server answers {status})", str(where))
        if status in (401, 403):
            raise PermissionError(errno.EACCES, f"access is denied (the server answers {status})", str(where))
        if status == 412:
            raise changed(where, "another ETag")
        if status == 200:
            raise RemoteError(
                f"{where}: the server ignores ranges and would send the whole file; download the file"
            )
        if status != 206:
            raise RemoteError(f"{where}: the server answers {status} {answer.reason}")
        if answer.headers.get("Content-Encoding", "identity") not in ("identity", ""):
            raise RemoteError(f"{where}: the server compresses ranges; it must send the bytes as they are")
        found = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        version = _version_of(answer)
        if found is None or found[1] is None or version is None:
            raise RemoteError(f"{where}: the server does not state the range and the length of the file")
        return int(found[1]), int(found[2]) + 1, version

    def _require_same(self, version: _Version) -> None:
        """Raises RemoteError if an answer is of another version of the file than the first one."""
        assert self._version is not None
        names = ("length", "ETag", "time of change")
        for name, before, now in zip(names, self._version, version, strict=True):
            if before != now and None not in (before, now):  # proxies may drop headers
                raise changed(self._location, f"another {name}")

    async def _body(self, answer: Any, start: int, stop: int) -> bytes:
        """Reads the body of an answer, and at most one part more than the range."""
        parts, size = [], 0
        async for part in answer.content.iter_any():
            parts.append(part)
            size += len(part)
            if size > stop - start:
                break
        return require_size(b"".join(parts), start, stop, self._location)

    def require_unchanged(self) -> None:
        async def ask() -> None:
            version, _ = await self._first("bytes=0-0", 1)
            self._require_same(version)

        asyncio.run_coroutine_threadsafe(ask(), self._fs.loop).result()

    def close(self) -> None:
        """Does nothing: fsspec keeps the session for other files."""


def _version_of(answer: Any, length: int | None = None) -> _Version | None:
    """Returns the version of the file in an answer. None if the length is unknown, or is not ``length``."""
    found = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if found is None or (length is not None and int(found[3]) != length):
        return None
    return _Version(int(found[3]), answer.headers.get("ETag"), answer.headers.get("Last-Modified"))
