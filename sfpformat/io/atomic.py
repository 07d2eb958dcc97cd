"""Files that appear whole or not at all.

Rules: a new file is made beside its target, under a random name that no file has. It takes owner, group,
access list and mode of the file that it replaces; where there is none, those of any new file. Symbolic links
are followed; other hard links to a replaced file keep the old contents. After an error nothing is left; a
process that is killed by SIGKILL leaves its ``.NAME.….partial``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from ..errors import OptionError
from .filesystem import beside, create, creation_mode, remove, rename, sync, take_attributes


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
        target: the path that it takes.
        path: where it is until then.
        file: open for writing, empty at first.
    """

    def __init__(self, target: Path, *, path: Path | None = None) -> None:
        """Makes the temporary file.

        Args:
            target: the path that it will take, links followed.
            path: where it is until then, for a caller that keeps others from writing there; what a process
                that was killed left is overwritten. None for a random name.

        Raises:
            OSError: it cannot be made.
        """
        self.target = target
        mode = creation_mode(target)
        if path is not None:
            self.path = path
            self.file: BinaryIO = os.fdopen(create(path, os.O_WRONLY | os.O_TRUNC, mode), "wb")
            return
        while True:
            self.path = beside(target, f".{secrets.token_hex(6)}.partial", prefix=".")
            with contextlib.suppress(FileExistsError):
                self.file = os.fdopen(create(self.path, os.O_WRONLY | os.O_EXCL, mode), "wb")
                return

    def finish(self) -> None:
        """Makes what was written last, and closes the file; only its name is missing."""
        self.file.flush()
        take_attributes(self.file.fileno(), self.target)
        sync(self.file.fileno())
        self.file.close()

    def commit(self) -> None:
        """Finishes the file and replaces the target."""
        self.finish()
        rename(self.path, self.target)

    def abort(self) -> None:
        """Removes the file; the target is as it was."""
        with contextlib.suppress(OSError):
            self.file.close()
        remove(self.path)


@contextlib.contextmanager
def replacing(target: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that takes the target's name at the end of the block; after an error nothing is left.

    Args:
        target: its path; links are followed.

    Raises:
        OptionError: something else than a file is there.
        OSError: it cannot be written; the target is as it was.
    """
    new = AtomicFile(real_target(target))
    try:
        yield new.file
        new.commit()
    except BaseException:
        new.abort()
        raise


class ReplacedTogether:
    """New files that take their names together, and the index that lists them; a context manager.

    See `take_names`; after an error before that all is as it was.
    """

    def __init__(self, index: Path) -> None:
        """Begins with the index.

        Args:
            index: its path; links are followed.

        Raises:
            OptionError: something else than a file is there.
            OSError: its temporary file cannot be made.
        """
        self._new = [AtomicFile(real_target(index))]

    @property
    def index(self) -> BinaryIO:
        """The index, open for writing."""
        return self._new[0].file

    def add(self, target: str | os.PathLike[str]) -> BinaryIO:
        """Another new file, open for writing.

        Raises:
            OptionError: something else than a file is there.
            OSError: its temporary file cannot be made.
        """
        self._new.append(AtomicFile(real_target(target)))
        return self._new[-1].file

    def __enter__(self) -> ReplacedTogether:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                for new in self._new:
                    new.finish()
                index, *others = [(new.path, new.target) for new in self._new]
                take_names(others, index)
                self._new = []
        finally:
            for new in self._new:
                new.abort()


_Pair = tuple[Path, Path]


def take_names(files: Sequence[_Pair], index: _Pair) -> None:
    """Gives synced files their names, and last the index that lists them.

    An old index goes before the first old file does, so that a mixture is never taken for a model; where the
    first file cannot be renamed, the index comes back, and all is as it was.

    Args:
        files: where each is, and the path that it takes.
        index: the same for the index.

    Raises:
        OSError: a file could not be renamed.
    """
    old = beside(index[1], ".replaced")
    moved = index[1].exists() and any(target.exists() for _, target in files)
    try:
        if moved:
            os.replace(index[1], old)
        for source, target in files:
            rename(source, target)
        rename(*index)
    except BaseException:
        if moved and files[0][0].exists() and old.exists():  # no file was renamed
            os.replace(old, index[1])
        raise
    finally:
        remove(old)
