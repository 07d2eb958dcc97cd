"""Files that appear whole or not at all, and files that one process at a time may write."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import OptionError, SfpError


class LockedFileError(SfpError):
    """Another process is writing the same file."""


def real_target(target: str | os.PathLike[str]) -> Path:
    """The path that a new file will take, links followed.

    Raises:
        OptionError: something else than a file is there.
    """
    path = Path(os.path.realpath(target))
    if path.exists() and not path.is_file():
        raise OptionError(f"{target} cannot be replaced: it is not a file")
    return path


class AtomicFile:
    """A temporary file beside its target, which it replaces in one step when it is committed.

    Attributes:
        file: open for writing, empty at first.
    """

    def __init__(self, target: Path) -> None:
        """Makes the temporary file.

        Raises:
            OSError: it cannot be made.
        """
        self._target = target
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        self._path = Path(name)
        self.file: BinaryIO = os.fdopen(handle, "wb")

    def commit(self) -> None:
        """Syncs the file, gives it the mode of a new file, and its name."""
        self.file.flush()
        os.fchmod(self.file.fileno(), 0o666 & ~_umask())
        os.fsync(self.file.fileno())
        self.file.close()
        rename(self._path, self._target)

    def abort(self) -> None:
        """Removes the file; the target is as it was."""
        with contextlib.suppress(OSError):
            self.file.close()
        self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(target: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that takes the target's name at the end of the block; after an error nothing is left.

    Raises:
        OSError: it cannot be written; the target is as it was.
    """
    new = AtomicFile(real_target(target))
    try:
        yield new.file
        new.commit()
    except BaseException:
        new.abort()
        raise


def rename(source: Path, target: Path) -> None:
    """Gives a synced file its name in one step, and makes the step last."""
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def open_locked(path: Path) -> BinaryIO:
    """The file, made where it is not there, open for reading and writing, and locked until it is closed.

    Raises:
        LockedFileError: another process has it.
        OSError: it cannot be opened.
    """
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had the lock may have renamed or removed the file between our two steps.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except BlockingIOError:
            file.close()
            raise LockedFileError(f"{path.name} is locked: another process is writing it") from None
        except BaseException:
            file.close()
            raise
        file.close()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
