"""Locations of files behind URLs, which fsspec or huggingface_hub read."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from ...errors import OptionError, RemoteError

# A scheme has two characters or more: "C://" is a path of Windows. "a::b://" is a chain of fsspec.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z][A-Za-z0-9+.-]+)*://")


class OpenFile(Protocol):
    """What ``fsspec.open(url, ...)`` returns: a file system with its settings, and a path in it."""

    fs: Any
    path: str


def is_url(value: object) -> bool:
    """Returns whether a value is the URL of a file, as a string."""
    return isinstance(value, str) and _URL.match(value) is not None


def location_of(value: object) -> Location | None:
    """Returns the location that a URL, an fsspec ``OpenFile`` or a `Location` names; None for other values.

    Raises:
        OptionError: fsspec, or the package that it needs for the scheme, is not installed, or the URL has an
            unknown scheme.
    """
    if isinstance(value, Location):
        return value
    if is_url(value):
        return Location(*_file_system(str(value)))
    if type(value).__name__ == "OpenFile" and type(value).__module__ == "fsspec.core":
        file: Any = value
        if file.compression is not None:
            raise OptionError("an OpenFile with compression has no random access; open it without")
        return Location(file.fs, file.path)
    return None


def _file_system(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system for a URL, and the path in it."""
    scheme = url.partition(":")[0]
    try:
        import fsspec
    except ModuleNotFoundError:
        raise OptionError(
            f"{scheme}:// needs fsspec, which is not installed: pip install 'sfpformat[remote]'"
        ) from None
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = {"hf": "hub", "http": "remote", "https": "remote"}.get(scheme)
        how = f"; pip install 'sfpformat[{extra}]'" if extra else ""
        raise OptionError(f"{scheme}:// cannot be read: {error}{how}") from error
    except ValueError as error:
        raise OptionError(f"{shown(url)}: {error}") from error
    if scheme == "hf" and "/" not in path:
        raise OptionError(
            f"{url} names no repository: hf://organisation/name, or hf://organisation/name@revision/model.sfp"
        )
    return fs, path


def shown(url: str) -> str:
    """Returns a URL for messages, without user, password and query, which may be secret."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class Location:
    """A file of one of fsspec's file systems. Its text is a URL without secrets.

    Attributes:
        fs: the file system.
        path: the path in it; for HTTP, the URL.
    """

    def __init__(self, fs: Any, path: str) -> None:
        self.fs = fs
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Location, (self.fs, self.path)

    def __str__(self) -> str:
        return shown(str(self.fs.unstrip_protocol(self.path)))

    def __repr__(self) -> str:
        return str(self)

    @property
    def is_http(self) -> bool:
        """Whether the path is a URL of HTTP, whose query is not a part of the name."""
        return self.path.startswith(("http://", "https://"))

    @property
    def name(self) -> str:
        """The name of the file, without its folder."""
        path = unquote(urlsplit(self.path).path) if self.is_http else self.path
        return path.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The suffix of the name, such as ``".sfp"``."""
        return PurePosixPath(self.name).suffix

    def with_name(self, name: str) -> Location:
        """Returns the location of another file in the same folder. A query, such as a token, is kept."""
        if not self.is_http:
            return Location(self.fs, f"{self.path.rpartition('/')[0]}/{name}")
        parts = urlsplit(self.path)
        path = f"{parts.path.rpartition('/')[0]}/{quote(name)}"
        return Location(self.fs, urlunsplit(parts._replace(path=path)))

    def is_folder(self) -> bool:
        """Asks the server whether this is a folder. HTTP has none: a path without a file gets its own error.

        Raises:
            FileNotFoundError, PermissionError, RemoteError: the server refuses.
        """
        if self.is_http:
            return False
        with errors_named(self):
            return bool(self.fs.isdir(self.path))

    def names(self) -> list[str]:
        """Returns the names of the files in this folder.

        Raises:
            FileNotFoundError, PermissionError, RemoteError: the server refuses.
        """
        with errors_named(self):
            found = self.fs.ls(self.path, detail=True)
        return [entry["name"].rpartition("/")[2] for entry in found if entry["type"] == "file"]

    def folder(self) -> Location:
        """Returns the folder of this file."""
        return Location(self.fs, self.path.rpartition("/")[0])

    def inside(self, name: str) -> Location:
        """Returns the location of a file in this folder."""
        return Location(self.fs, self.path.rstrip("/") + "/").with_name(name)


@contextmanager
def errors_named(where: object) -> Iterator[None]:
    """Context manager that turns exceptions of a library into errors that name the file.

    Raises:
        FileNotFoundError, PermissionError: the server says so.
        RemoteError: in place of any other exception of the library.
    """
    try:
        yield
    except (RemoteError, OptionError):
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such file", str(where)) from error
    except PermissionError as error:
        raise PermissionError(errno.EACCES, f"access is denied ({first_line(error)})", str(where)) from error
    except Exception as error:  # each file system raises its own
        raise RemoteError(f"{where}: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    return next(iter(str(error).splitlines()), "no message")
