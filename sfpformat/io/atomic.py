"""Atomic file writes: a file appears complete or not at all.

Rules: a new file is written in the folder of its target, under an unused random name. It gets the owner,
group, access list and mode of the file that it replaces, or the defaults of a new file. Symbolic links are
followed. Other hard links to a replaced file keep the old contents. After an error, the temporary file is
removed; after SIGKILL, it remains as ``.NAME.….partial``. Later writes of the same target warn about it, and
leave it, because a process of another machine may be writing it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from ..errors import OptionError, SfpWarning
from ..names import listed
from .filesystem import beside, create, creation_mode, remove, rename, sync, take_attributes


def real_target(target: str | os.PathLike[str]) -> Path:
    """Returns the final path of a new file: the target with symbolic links resolved.

    Raises:
        OptionError: the path exists and is not a file.
    """
    path = Path(os.path.realpath(target))
    if path.exists() and not path.is_file():
        raise OptionError(f"{target} cannot be replaced, because it is not a regular file; give another path")
    return path


# A temporary file that nobody has written for this many seconds is reported as left by a killed process.
_IDLE_SECONDS = 60
_RANDOM_BYTES = 6


def warn_of_leftovers(target: Path) -> None:
    """Warns about temporary files of a target that nobody has written lately.

    Args:
        target: the final path, links resolved.
    """
    suffix = f".{'0' * 2 * _RANDOM_BYTES}.partial"
    start = beside(target, suffix, prefix=".").name.removesuffix(suffix)
    pattern = re.compile(rf"{re.escape(start)}\.[0-9a-f]{{{2 * _RANDOM_BYTES}}}\.partial")
    left = []
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - _IDLE_SECONDS:
                left.append(entry.name)
    if left:
        warnings.warn(
            f"{target.parent}: an earlier write of {target.name} was killed and left {listed(sorted(left))}; "
            "delete it, unless another process is writing it",
            SfpWarning,
            stacklevel=2,
        )


class AtomicFile:
    """A temporary file in the folder of its target. `commit` replaces the target in one step.

    Attributes:
        target: the final path.
        path: the path of the temporary file.
        file: the temporary file, empty and open for writing.
    """

    def __init__(self, target: Path, *, path: Path | None = None) -> None:
        """Creates the temporary file.

        Args:
            target: the final path, links resolved.
            path: the path of the temporary file. An old file at this path is overwritten; the caller must
                prevent other processes from writing to it. None uses a random name.

        Warns: a killed process left a temporary file of this target.

        Raises:
            OSError: the temporary file cannot be created.
        """
        self.target = target
        mode = creation_mode(target)
        if path is not None:
            self.path = path
            self.file: BinaryIO = os.fdopen(create(path, os.O_WRONLY | os.O_TRUNC, mode), "wb")
            return
        warn_of_leftovers(target)
        while True:
            self.path = beside(target, f".{secrets.token_hex(_RANDOM_BYTES)}.partial", prefix=".")
            with contextlib.suppress(FileExistsError):
                self.file = os.fdopen(create(self.path, os.O_WRONLY | os.O_EXCL, mode), "wb")
                return

    def finish(self) -> None:
        """Copies the target's attributes, syncs the file to disk and closes it. Does not rename it."""
        self.file.flush()
        take_attributes(self.file.fileno(), self.target)
        sync(self.file.fileno())
        self.file.close()

    def commit(self) -> None:
        """Finishes the file and replaces the target."""
        self.finish()
        rename(self.path, self.target)

    def abort(self) -> None:
        """Removes the temporary file. The target is unchanged."""
        with contextlib.suppress(OSError):
            self.file.close()
        remove(self.path)


@contextlib.contextmanager
def replacing(target: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Context manager that writes a new file and replaces the target at the end of the block.

    An error in the block removes the new file.

    ``with replacing("model.sfp") as file: file.write(data)``

    Args:
        target: the path of the file to replace; links are followed.

    Raises:
        OptionError: the target exists and is not a file.
        OSError: the file cannot be written. The target is unchanged.
    """
    new = AtomicFile(real_target(target))
    try:
        yield new.file
        new.commit()
    except BaseException:
        new.abort()
        raise


class ReplacedTogether:
    """Context manager that writes several files and their index, and replaces the old ones together.

    At the end of the block, it calls `rename_all`. After an error in the block, it removes the new files, and
    no old file has changed.
    """

    def __init__(self, index: Path) -> None:
        """Creates the temporary file of the index.

        Args:
            index: path of the index; links are followed.

        Raises:
            OptionError: the path exists and is not a file.
            OSError: the temporary file cannot be created.
        """
        self._new = [AtomicFile(real_target(index))]

    @property
    def index(self) -> BinaryIO:
        """The temporary file of the index, open for writing."""
        return self._new[0].file

    def add(self, target: str | os.PathLike[str]) -> BinaryIO:
        """Creates another new file and returns it, open for writing.

        Raises:
            OptionError: the target exists and is not a file.
            OSError: the temporary file cannot be created.
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
                rename_all(others, index)
                self._new = []
        finally:
            for new in self._new:
                new.abort()


_Pair = tuple[Path, Path]


def rename_all(files: Sequence[_Pair], index: _Pair) -> None:
    """Renames synced files to their final names, and the index that lists them last.

    If a target and the index exist, this function first moves the old index away, so that readers never find
    an index of old and new files together. If the first file cannot be renamed, it restores the old index,
    and nothing has changed.

    Args:
        files: the current path and the final path of each file.
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
