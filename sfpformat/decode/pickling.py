"""Files that are open, pickled: they are opened again where they are unpickled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ..errors import MismatchError
from ..limits import Limits


@dataclass(frozen=True)
class Settings:
    """What a file or a model in shards was opened with, as `sfpformat.open` takes it."""

    limits: Limits
    engine: str | None
    threads: int | None


class _Reopenable(Protocol):
    """A file, or a model in shards."""

    @property
    def identity(self) -> object:
        """Differs where contents do."""

    def close(self) -> None:
        """Closes it."""


F = TypeVar("F", bound=_Reopenable)


def reopened(kind: Callable[..., F], readable: str | bytes, settings: Settings, identity: object) -> F:
    """What was pickled, opened again.

    Args:
        kind: its class.
        readable: its path, or its bytes.
        settings: what it was opened with.
        identity: of its contents then.

    Raises:
        MismatchError: its contents are others now.
        InvalidFileError, UnsupportedError, LimitError, OSError: as `sfpformat.open`.
    """
    file = kind(readable, limits=settings.limits, engine=settings.engine, threads=settings.threads)
    if file.identity != identity:
        file.close()
        raise MismatchError(f"{readable!r} was written anew after it had been pickled; open the new one")
    return file
