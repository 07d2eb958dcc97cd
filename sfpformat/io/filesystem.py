"""Steps of writing a file safely, on file systems that lack some of the calls.

Rules: a call that a file system does not have (a sync of a folder, a lock, a change of the mode) is done
without; every other error is raised. Nothing here touches the umask of the process.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import sys
import time
import warnings
from pathlib import Path
from typing import BinaryIO

from ..errors import SfpError, SfpWarning

# What file systems answer to calls that they do not have.
_ABSENT = frozenset((errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP))
# The same, or that they do not let this user do it.
_NOT_ALLOWED = _ABSENT | {errno.EPERM, errno.EACCES}
_NO_LOCKS = _ABSENT | {errno.ENOLCK}
# Network file systems refuse a rename so while another process has the target open.
_BUSY = frozenset((errno.EBUSY, errno.EACCES, errno.ETXTBSY))
_WAITS = (0.05, 0.1, 0.2, 0.4)  # seconds between attempts to rename
_MODE_BITS = 0o777
_LONGEST_NAME = 255  # bytes of a file's name on all common file systems
_ACCESS_LIST = "system.posix_acl_access"


class LockedFileError(SfpError):
    """Another process is writing the same file."""


class UnnamedFileError(OSError):
    """A file is complete, but could not take its name; it is kept for the next run of the same job."""


def beside(target: Path, suffix: str, *, prefix: str = "") -> Path:
    """The path of a file that belongs to a target: its name with prefix and suffix.

    Where that is longer than a name can be, the target's name is cut and a hash of it added.
    """
    name = prefix + target.name + suffix
    if len(os.fsencode(name)) > _LONGEST_NAME:
        room = _LONGEST_NAME - len(os.fsencode(prefix + suffix)) - 17
        whole = os.fsencode(target.name)
        name = prefix + os.fsdecode(whole[:room]) + "-" + hashlib.sha256(whole).hexdigest()[:16] + suffix
    return target.with_name(name)


def create(path: Path, flags: int, mode: int) -> int:
    """A descriptor of a file that is made where it is not there; a symbolic link is not followed.

    Args:
        path: of the file.
        flags: of `os.open`, such as ``os.O_WRONLY | os.O_EXCL``.
        mode: of a file that is made, less the umask.

    Raises:
        OSError: it cannot be opened.
    """
    return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)


def creation_mode(target: Path, like: Path | None = None) -> int:
    """The mode to make a new file with: any new file's, or private where it is to replace another."""
    return 0o666 if _replaced(target, like) is None else 0o600


def _replaced(target: Path, like: Path | None) -> Path | None:
    """The file whose owner and mode a new one takes."""
    return next((path for path in (like, target) if path is not None and path.exists()), None)


def take_attributes(file: int, target: Path, like: Path | None = None) -> None:
    """Gives a new file owner, group, access list and mode of the file that it replaces, as far as is allowed.

    Nobody gets more than the old file gave: where the group or the access list cannot be kept, the group gets
    no more than all others. Without an old file nothing changes.

    Args:
        file: the descriptor of the new file.
        target: the path that it will take.
        like: the file to take them from, where it exists; else ``target``.

    Raises:
        OSError: an error that is none of permission.
    """
    path = _replaced(target, like)
    if path is None:
        return
    old, new = os.stat(path), os.fstat(file)
    mode = stat.S_IMODE(old.st_mode) & _MODE_BITS
    if old.st_uid != new.st_uid:
        _allowed_to_change_owner(file, old.st_uid, -1)
    kept = old.st_gid == new.st_gid or _allowed_to_change_owner(file, -1, old.st_gid)
    if not _copied_access_list(path, file) or not kept:
        mode &= ~0o070 | (mode & 0o007) << 3
    if stat.S_IMODE(os.fstat(file).st_mode) & _MODE_BITS == mode:
        return
    try:
        os.fchmod(file, mode)
    except OSError as error:
        if error.errno not in _NOT_ALLOWED:
            raise


def _allowed_to_change_owner(file: int, user: int, group: int) -> bool:
    try:
        os.fchown(file, user, group)
    except OSError as error:
        if error.errno not in _NOT_ALLOWED:
            raise
        return False
    return True


def _copied_access_list(source: Path, file: int) -> bool:
    """Whether a file has the POSIX access list of another now, or neither has one."""
    if sys.platform != "linux":
        return True
    try:
        rights: bytes | None = os.getxattr(source, _ACCESS_LIST)
    except OSError:
        rights = None
    try:
        if rights is not None:
            os.setxattr(file, _ACCESS_LIST, rights)
        elif _ACCESS_LIST in os.listxattr(file):  # inherited from the folder
            os.removexattr(file, _ACCESS_LIST)
    except OSError:
        return rights is None
    return True


def sync(file: int) -> None:
    """Makes the contents of a file last, where the file system can."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise


def rename(source: Path, target: Path) -> None:
    """Gives a synced file its name in one step, and makes the step last.

    Raises:
        OSError: the target is as it was; or, where the message says so, it is replaced.
    """
    own = os.stat(source)
    for wait in (*_WAITS, None):
        try:
            os.replace(source, target)
            break
        except OSError as error:
            if _is_at(target, own):  # a server did it, and its answer was lost
                break
            if wait is None or error.errno not in _BUSY:
                raise
            time.sleep(wait)
    _sync_folder(target)


def _is_at(path: Path, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), status)
    except OSError:
        return False


def _sync_folder(path: Path) -> None:
    """Makes the names in the folder of a path last, where the file system can and lets this user."""
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in _NOT_ALLOWED:
            words = f"{error.strerror}; the new file is in place, but a crash of the machine may undo that"
            raise OSError(error.errno, words, os.fspath(path)) from error


def remove(path: Path) -> None:
    """Removes a file that is not wanted any more, if it is there; a warning says where that failed."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(
            f"{path} could not be removed: {error.strerror}; it can be deleted", SfpWarning, stacklevel=2
        )


def open_locked(path: Path, mode: int = 0o666) -> tuple[BinaryIO, bool]:
    """The file, made where it is not there, open for reading and writing, and locked until it is closed.

    Args:
        path: of the file, which is no symbolic link.
        mode: of a file that is made, less the umask.

    Returns:
        The file, and whether it is locked. Some file systems have no locks; a warning says so.

    Raises:
        LockedFileError: another process has it.
        OSError: it cannot be opened.
    """
    while True:
        number, made = _open_or_make(path, mode)
        file = os.fdopen(number, "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have renamed or removed the file between our two steps.
            if _is_at(path, os.fstat(file.fileno())):
                return file, True
        except BlockingIOError:
            file.close()
            raise LockedFileError(f"{path.name} is locked: another process is writing it") from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                warnings.warn(
                    f"{path.name} cannot be locked on this file system: write it from one process at a time",
                    SfpWarning,
                    stacklevel=2,
                )
                return file, False
            file.close()
            if made:
                remove(path)
            error.filename = os.fspath(path)
            raise
        file.close()


def _open_or_make(path: Path, mode: int) -> tuple[int, bool]:
    """A descriptor for reading and writing, and whether the file was made."""
    try:
        return create(path, os.O_RDWR | os.O_EXCL, mode), True
    except FileExistsError:
        return create(path, os.O_RDWR, mode), False
