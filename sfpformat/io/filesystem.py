"""Writes files safely, also on systems and file systems that lack some system calls.

Rules: calls that a system or a file system does not support (sync of a folder, lock, change of mode or owner)
are skipped. Every other error is raised. No function changes the umask of the process.

Windows neither renames nor removes an open file, so that a locked file is closed first. On other systems, the
lock is held until the file has its final name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import sys
import time
import warnings
from pathlib import Path
from typing import BinaryIO

from ..errors import SfpError, SfpWarning

# Errors of file systems for unsupported calls.
_ABSENT = frozenset((errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP))
# The same, and errors for missing permissions.
_NOT_ALLOWED = _ABSENT | {errno.EPERM, errno.EACCES}
_NO_LOCKS = _ABSENT | {errno.ENOLCK}
# Errors of network file systems for a rename while another process has the target open.
_BUSY = frozenset((errno.EBUSY, errno.EACCES, errno.ETXTBSY))
_OPEN = (
    "Windows does not replace an open or read-only file; close all readers and models of it, and try again"
)
_WAITS = (0.05, 0.1, 0.2, 0.4)  # seconds between attempts to rename
_MODE_BITS = 0o777
_LONGEST_NAME = 255  # bytes of a file's name on all common file systems
_ACCESS_LIST = "system.posix_acl_access"


class LockedFileError(SfpError):
    """Another process is writing the same file."""


class UnnamedFileError(OSError):
    """A complete file could not be renamed. It remains for the next run of the same job."""


def beside(target: Path, suffix: str, *, prefix: str = "") -> Path:
    """Returns the path of a file in the target's folder, named like the target with prefix and suffix.

    If the name is too long for a file, cuts the target's name and adds a hash of it.
    """
    name = prefix + target.name + suffix
    if len(os.fsencode(name)) > _LONGEST_NAME:
        room = _LONGEST_NAME - len(os.fsencode(prefix + suffix)) - 17
        start, digest = target.name, hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
        while len(os.fsencode(start)) > room:  # cuts whole characters, because macOS and Windows refuse parts
            start = start[:-1]
        name = f"{prefix}{start}-{digest}{suffix}"
    return target.with_name(name)


def create(path: Path, flags: int, mode: int) -> int:
    """Opens a file, creates it if it does not exist, and returns its descriptor.

    Args:
        path: the path of the file.
        flags: flags for `os.open`, such as ``os.O_WRONLY | os.O_EXCL``.
        mode: the mode of a new file, before the umask.

    Raises:
        OSError: the file cannot be opened, or is a symbolic link.
    """
    no_link = getattr(os, "O_NOFOLLOW", 0)
    if not no_link and path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    return os.open(path, flags | os.O_CREAT | no_link | getattr(os, "O_BINARY", 0), mode)


def creation_mode(target: Path, like: Path | None = None) -> int:
    """Returns the mode for creating a new file: the default, or a private mode if it replaces a file."""
    return 0o666 if _replaced(target, like) is None else 0o600


def _replaced(target: Path, like: Path | None) -> Path | None:
    """Returns the file whose attributes a new file gets: ``like``, else ``target``, if it exists."""
    return next((path for path in (like, target) if path is not None and path.exists()), None)


def take_attributes(file: int, target: Path, like: Path | None = None) -> None:
    """Copies owner, group, access list and mode of the replaced file to a new file, as far as permitted.

    Never grants more rights than the old file: if the group or the access list cannot be copied, the group
    gets at most the rights of all others. Changes nothing without an old file.

    Args:
        file: the descriptor of the new file.
        target: the final path of the new file.
        like: the file whose attributes are copied, if it exists; else ``target``.

    Raises:
        OSError: an error other than a missing permission or an unsupported call.
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
    if not hasattr(os, "fchmod"):
        return
    try:
        os.fchmod(file, mode)
    except OSError as error:
        if error.errno not in _NOT_ALLOWED:
            raise


def _allowed_to_change_owner(file: int, user: int, group: int) -> bool:
    if not hasattr(os, "fchown"):
        return False
    try:
        os.fchown(file, user, group)
    except OSError as error:
        if error.errno not in _NOT_ALLOWED:
            raise
        return False
    return True


def _copied_access_list(source: Path, file: int) -> bool:
    """Copies the POSIX access list, or removes it if the source has none. Returns whether this succeeded."""
    if sys.platform != "linux" or not hasattr(os, "getxattr"):
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
    """Syncs the contents of a file to disk, if the file system supports it."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise


def rename(source: Path, target: Path) -> None:
    """Renames a synced file in one step, and syncs the folder. Retries while the target is busy.

    Raises:
        OSError: the rename failed, and the target is unchanged. Or the folder could not be synced after the
            rename; the message says so. Windows does not replace an open target.
    """
    own = os.stat(source)
    for wait in (*_WAITS, None):
        try:
            os.replace(source, target)
            break
        except OSError as error:
            if _is_at(target, own):  # a server renamed the file, but its answer was lost
                break
            if wait is None or error.errno not in _BUSY or not _is_unchanged(source, own):
                if _fixes_open_files() and isinstance(error, PermissionError) and target.exists():
                    raise PermissionError(error.errno, _OPEN, os.fspath(target)) from error
                raise
            time.sleep(wait)
    _sync_folder(target)


def rename_locked(file: BinaryIO, source: Path, target: Path) -> None:
    """Renames a synced file from `open_locked`. Holds the lock until the end if the system supports that.

    Raises:
        OSError: same as for `rename`.
    """
    if _fixes_open_files():
        file.close()
    rename(source, target)


def _fixes_open_files() -> bool:
    """Returns whether the system refuses to rename and to remove open files."""
    return sys.platform == "win32"


def _is_at(path: Path, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), status)
    except OSError:
        return False


def _is_unchanged(path: Path, status: os.stat_result) -> bool:
    """Returns whether a path is still the same file, with the same size and modification time."""
    try:
        now = os.stat(path)
    except OSError:
        return False
    same = (now.st_size, now.st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    return same and os.path.samestat(now, status)


def _sync_folder(path: Path) -> None:
    """Syncs the folder of a path, if the file system supports it and permits it."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in _NOT_ALLOWED:
            words = (
                f"{error.strerror}; the new file has its final name, but may be lost if the machine crashes"
            )
            raise OSError(error.errno, words, os.fspath(path)) from error


def remove(path: Path) -> None:
    """Removes a file if it exists. Warns instead of raising if this fails."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path} could not be removed: {error.strerror}; delete it", SfpWarning, stacklevel=2)


def remove_locked(file: BinaryIO, path: Path) -> None:
    """Removes a file from `open_locked`, and closes it. Holds the lock until then if the system supports it.

    Warns instead of raising if this fails.
    """
    if not _fixes_open_files():
        remove(path)
    with contextlib.suppress(OSError):  # its contents are no longer needed
        file.close()
    if _fixes_open_files():
        remove(path)


def open_locked(path: Path, mode: int = 0o666) -> tuple[BinaryIO, bool]:
    """Opens a file for reading and writing, and locks it until it is closed. Creates it if needed.

    The lock is advisory. On Windows, other processes cannot read the first byte of a locked file. The system
    releases the lock at the end of the process, even after a crash. There is no separate lock file.

    Args:
        path: the path of the file, not a symbolic link.
        mode: the mode of a new file, before the umask.

    Returns:
        The file, and whether it is locked. On a file system without locks, warns and does not lock.

    Raises:
        LockedFileError: another process holds the lock.
        OSError: the file cannot be opened.
    """
    from filelock import lock_descriptor  # lazy, because only resumable writers need it

    while True:
        number, made = _open_or_make(path, mode)
        file = os.fdopen(number, "r+b")
        try:
            locked = lock_descriptor(file.fileno(), blocking=False)
            # Another process may have renamed or removed the file between open and lock.
            if locked and _is_at(path, os.fstat(file.fileno())):
                return file, True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                warnings.warn(
                    f"{path.name} cannot be locked on this file system; do not write it from two "
                    "processes at the same time",
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
        if not locked:
            raise LockedFileError(
                f"{path.name} is locked: another process is writing it; wait, or stop that process"
            )


def _open_or_make(path: Path, mode: int) -> tuple[int, bool]:
    """Returns a descriptor for reading and writing, and whether the file was created."""
    try:
        return create(path, os.O_RDWR | os.O_EXCL, mode), True
    except FileExistsError:
        return create(path, os.O_RDWR, mode), False
