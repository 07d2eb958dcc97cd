"""What a command tells its user when it cannot go on."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import SfpError

PathLike = str | os.PathLike[str]


class Trouble(Exception):
    """One line for the user, and the exit code."""

    def __init__(self, words: str, code: int = 2) -> None:
        super().__init__(words)
        self.code = code


@contextmanager
def about(path: PathLike) -> Iterator[None]:
    """Adds the file to what is raised inside."""
    try:
        yield
    except SfpError as error:
        raise Trouble(f"{path}: {error}") from error
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def require_file(path: PathLike) -> None:
    """Refuses what cannot be read at any place: pipes, devices, folders.

    Raises:
        Trouble: it is not a file.
        OSError: it is not there, or may not be looked at.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Trouble(f"{path}: not a file that can be read at any place (a folder, pipe or device)")


def checked_target(target: PathLike, sources: list[Path]) -> Path:
    """The file that a command will replace, with links followed.

    Raises:
        Trouble: it is one of the sources, something else than a file, or in no folder.
    """
    path = Path(os.path.realpath(target))
    if path.exists() and not path.is_file():
        raise Trouble(f"{target}: cannot be replaced, it is not a file")
    if not path.parent.is_dir():
        raise Trouble(f"{target}: there is no folder {path.parent}")
    for source in sources:
        if path.exists() and path.samefile(source):
            raise Trouble(f"{target}: is what is read; give -o another name")
    return path
