"""Ranges of a file of a repository on the Hugging Face hub, by huggingface_hub: its token and its retries.

`HfFileSystem` waits for each request and lists folders first, so this module uses the functions below it. The
revision is replaced by its commit at opening: later requests, and other files of the same folder, have the
same version.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from ...errors import RemoteError
from .http import CONTENT_RANGE
from .location import Location, first_line
from .ranges import HEAD, TAIL, THREADS, Start, require_size

# How users give a token, for messages.
_LOGIN = "'hf auth login', or the variable HF_TOKEN"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The first part of paths of `HfFileSystem`, for each type of repository.
_FOLDERS = {"model": "", "dataset": "datasets/", "space": "spaces/", "kernel": "kernels/"}


def is_hub(location: Location) -> bool:
    """Returns whether a location is in a repository of the hub. Buckets have no revisions."""
    protocol = location.fs.protocol
    names = (protocol,) if isinstance(protocol, str) else protocol
    return "hf" in names and not location.path.startswith("buckets/")


class HubRanges:
    """A file of a repository."""

    def __init__(self, location: Location) -> None:
        self._location, self._fs = location, location.fs
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="sfp-hub")
        self._url = ""

    @property
    def location(self) -> Location:
        """The location of the file. Has the commit after `start`."""
        return self._location

    def start(self) -> Start:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        with _errors_named(self._location):
            found = self._fs.resolve_path(self._location.path)
            at: dict[str, Any] = {"repo_type": found.repo_type, "endpoint": self._fs.endpoint}
            commit = found.revision
            if not _COMMIT.fullmatch(commit):
                url = hf_hub_url(found.repo_id, found.path_in_repo, revision=commit, **at)
                commit = get_hf_file_metadata(url, token=self._fs.token).commit_hash
                if commit is None:
                    raise RemoteError(f"{self._location}: the hub does not state the commit of the revision")
            self._url = hf_hub_url(found.repo_id, found.path_in_repo, revision=commit, **at)
        self._location = Location(
            self._fs, f"{_FOLDERS[found.repo_type]}{found.repo_id}@{commit}/{found.path_in_repo}"
        )
        tail = self._pool.submit(self._get, f"bytes=-{TAIL}")
        head, _, length = self._get(f"bytes=0-{HEAD - 1}")
        try:
            data, start, _ = tail.result()
        except RemoteError:  # servers may lack ranges from the end; the next round does without
            return Start(length, head, b"")
        return Start(length, head, require_size(data, start, length, self._location))

    def submit(self, start: int, stop: int) -> Future[bytes]:
        def fetch() -> bytes:
            data, got, _ = self._get(f"bytes={start}-{stop - 1}")
            if got != start:
                raise RemoteError(f"{self._location}: the hub answers byte {start:,} with byte {got:,}")
            return require_size(data, start, stop, self._location)

        return self._pool.submit(fetch)

    def _get(self, wanted: str) -> tuple[bytes, int, int]:
        """Requests a range. Returns its bytes, their offset, and the length of the file."""
        from huggingface_hub import constants, utils

        library: Any = utils  # which declares the names that it exports lazily

        headers = {
            **library.build_hf_headers(token=self._fs.token),
            "Range": wanted,
            "Accept-Encoding": "identity",
        }
        with _errors_named(self._location):
            answer = library.http_backoff(
                "GET", self._url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
            library.hf_raise_for_status(answer)
            found = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status_code != 206 or found is None or found[1] is None:
                raise RemoteError(
                    f"{self._location}: the hub ignores ranges (it answers {answer.status_code})"
                )
            return answer.content, int(found[1]), int(found[3])

    def require_unchanged(self) -> None:
        """Does nothing: a commit does not change."""

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _errors_named(location: Location) -> Iterator[None]:
    """Context manager that turns exceptions of huggingface_hub into errors that name the file.

    Raises:
        FileNotFoundError: there is no such repository, revision or file.
        PermissionError: the repository is gated, or the token has no access.
        RemoteError: in place of any other exception.
    """
    try:
        yield
    except RemoteError:
        raise
    except Exception as error:
        raise _named(error, location) from error


def _named(error: Exception, location: Location) -> OSError:
    """Returns the error that names the file, for an exception of huggingface_hub."""
    kind = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "Gated" in kind:
        words = "the repository is gated: ask for access on its page, and log in"
        return PermissionError(errno.EACCES, f"{words} ({_LOGIN})", str(location))
    if status == 401:
        words = f"there is no such repository, or it is private: log in ({_LOGIN})"
        if "invalid credentials" in str(error).lower():
            words = f"the hub does not know the token; log in again ({_LOGIN})"
        return PermissionError(errno.EACCES, words, str(location))
    if status == 403:
        return PermissionError(errno.EACCES, f"the token has no access ({first_line(error)})", str(location))
    if isinstance(error, FileNotFoundError) or status == 404:
        words = "there is no such repository, or the token has no access to it"
        if "Entry" in kind:
            words = "the repository has no such file at this revision"
        elif "Revision" in kind or "revision" in str(error):
            words = "the repository has no such revision"
        return FileNotFoundError(errno.ENOENT, words, str(location))
    return RemoteError(f"{location}: {kind}: {first_line(error)}")
