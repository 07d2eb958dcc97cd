"""Pickling of open files: unpickling opens the file again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ..errors import MismatchError
from ..io.remote.location import Location
from ..limits import Limits


@dataclass(frozen=True)
class Settings:
    """The arguments of `sfpformat.open` with which a file or a model in shards was opened."""

    limits: Limits
    engine: str | None
    threads: int | None


class _Reopenable(Protocol):
    """A file, or a model in shards."""

    @property
    def identity(self) -> object:
        """A value that changes whenever the contents change."""

    def close(self) -> None:
        """Closes the file or the model."""


F = TypeVar("F", bound=_Reopenable)


def reopened(
    kind: Callable[..., F], readable: str | bytes | Location, settings: Settings, identity: object
) -> F:
    """Opens a pickled file or model again.

    Args:
        kind: class of the object.
        readable: path, location, or bytes, of the file.
        settings: the arguments with which it was opened.
        identity: identity of its contents at the time of pickling.

    Raises:
        MismatchError: the contents have changed since pickling.
        InvalidFileError, UnsupportedError, LimitError, OSError: as in `sfpformat.open`.
    """
    file = kind(readable, limits=settings.limits, engine=settings.engine, threads=settings.threads)
    if file.identity != identity:
        file.close()
        raise MismatchError(f"{readable!r} has changed since the open file was pickled; open it again")
    return file
