"""New files: their mode and owner, and file systems that lack some calls."""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from sfpformat import OptionError, SfpWarning, Writer
from sfpformat.encode.resume import ResumableSink
from sfpformat.io.atomic import AtomicFile, ReplacedTogether, replacing
from sfpformat.io.filesystem import LockedFileError, beside
from sfpformat.numpy import load_file, save_file

from ..cli.test_main import make, run, sharded
from ..support.clauses import clauses

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="modes, owners and calls are those of POSIX")

OLD = b"an older file"
ONE = np.ones((4, 8), np.float32)
ABSENT = [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS]
NOT_ALLOWED = [errno.EPERM, errno.EACCES, *ABSENT]


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    """The umask of most systems."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A path with an older file."""
    path = tmp_path / "model.sfp"
    path.write_bytes(OLD)
    return path


def mode_of(path: Path) -> int:
    """The mode of a file, without its kind."""
    return stat.S_IMODE(path.stat().st_mode)


def by_writer(path: Path) -> None:
    """Writes a file with a writer."""
    save_file({"a": ONE}, path)


def by_resumable_writer(path: Path) -> None:
    """Writes a file with a resumable writer."""
    with Writer(path, resume_key="job") as writer:
        writer.add("a", ONE)


def by_block(path: Path) -> None:
    """Writes a file with `replacing`."""
    with replacing(path) as file:
        file.write(b"new")


WAYS: list[Callable[[Path], None]] = [by_writer, by_resumable_writer, by_block]


def raising(number: int, only: Callable[..., bool] = lambda *_: True) -> Callable[[Any], Callable[..., Any]]:
    """Returns a wrapper that makes a system call fail if a condition on its arguments holds."""

    def broken(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **more: Any) -> Any:
            if only(*words):
                raise OSError(number, os.strerror(number))
            return real(*words, **more)

        return call

    return broken


def is_folder(file: Any, *_: object) -> bool:
    """Whether a descriptor is that of a folder."""
    return stat.S_ISDIR(os.fstat(file).st_mode)


# ---------------------------------------------------------------------------------------- mode and owner


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o640, 0o444, 0o666])
@pytest.mark.parametrize("write", WAYS)
def test_a_replaced_file_keeps_its_mode(target: Path, write: Callable[[Path], None], mode: int) -> None:
    target.chmod(mode)
    write(target)
    assert target.read_bytes() != OLD
    assert mode_of(target) == mode


@pytest.mark.parametrize("write", WAYS)
def test_a_new_file_has_the_mode_of_the_umask(
    tmp_path: Path, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.umask(0o027)

    def touched(mask: int) -> int:
        raise AssertionError("the umask belongs to all threads of the process")

    with monkeypatch.context() as patch:
        patch.setattr(os, "umask", touched)
        write(tmp_path / "new")
    assert mode_of(tmp_path / "new") == 0o640


def test_the_temporary_file_for_a_private_file_is_private_from_the_start(target: Path) -> None:
    target.chmod(0o600)
    for new in (Writer(target), Writer(target, resume_key="job")):
        with new as writer:
            writer.add("a", ONE)
            assert {mode_of(path) for path in target.parent.iterdir()} == {0o600}
    target.chmod(0o664)
    with Writer(target) as writer:
        writer.add("a", ONE)
    assert mode_of(target) == 0o664


def test_files_of_other_threads_are_created_with_the_umask(target: Path) -> None:
    stop, modes = threading.Event(), set()

    def make_files() -> None:
        for number in range(10_000):
            if stop.is_set():
                return
            path = target.with_name(str(number))
            path.touch()
            modes.add(mode_of(path))

    thread = threading.Thread(target=make_files)
    thread.start()
    for _ in range(50):
        by_block(target)
    stop.set()
    thread.join()
    assert modes == {0o644}


needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give files away"
)


@needs_root
@pytest.mark.parametrize("write", WAYS)
def test_a_replaced_file_keeps_owner_and_group(target: Path, write: Callable[[Path], None]) -> None:
    os.chown(target, 1234, 2345)
    target.chmod(0o660)
    write(target)
    status = target.stat()
    assert (status.st_uid, status.st_gid, mode_of(target)) == (1234, 2345, 0o660)


@needs_root
@pytest.mark.parametrize("number", NOT_ALLOWED)
@pytest.mark.parametrize(("mode", "left"), [(0o660, 0o600), (0o664, 0o644), (0o640, 0o600), (0o666, 0o666)])
def test_rights_of_a_group_that_cannot_be_kept_are_dropped(
    target: Path, number: int, mode: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chown(target, -1, 2345)
    target.chmod(mode)
    monkeypatch.setattr(os, "fchown", raising(number)(os.fchown))
    by_writer(target)
    assert mode_of(target) == left


def access_list(bits: int) -> bytes:
    """A POSIX access list: another user has these rights, the owner rw, all others none."""
    nobody = 0xFFFFFFFF
    rows = [(0x01, 6, nobody), (0x02, bits, 1234), (0x04, 0, nobody), (0x10, bits, nobody), (0x20, 0, nobody)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)


@pytest.mark.skipif(not hasattr(os, "setxattr"), reason="access lists are read so on Linux only")
@pytest.mark.parametrize("refused", [False, True])
def test_an_access_list_is_kept_or_no_access_is_added(
    target: Path, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "system.posix_acl_access"
    try:
        os.setxattr(target, name, access_list(6))
    except OSError:
        pytest.skip("this file system has no access lists")
    assert mode_of(target) == 0o660  # the group's bits are the mask of the list, not the group's
    if refused:
        monkeypatch.setattr(os, "setxattr", raising(errno.ENOTSUP)(os.setxattr))
    by_writer(target)
    if refused:
        assert mode_of(target) == 0o600
    else:
        assert os.getxattr(target, name) == access_list(6)


def test_a_hard_link_keeps_the_old_contents_and_a_symbolic_link_is_followed(target: Path) -> None:
    other, link = target.with_name("other"), target.with_name("link")
    os.link(target, other)
    link.symlink_to(target.name)
    by_writer(link)
    assert link.is_symlink()
    assert load_file(target).keys() == {"a"}
    assert other.read_bytes() == OLD


def test_every_command_keeps_file_modes(tmp_path: Path) -> None:
    """Includes shards and indices, for pack, unpack and prune."""
    source, out = sharded(tmp_path / "in", cuts=2), tmp_path / "out"
    out.mkdir()

    def write_all() -> None:
        assert run("pack", source, "-o", out / "m.sfp") == 0
        assert run("pack", source, "-o", out / "one.sfp", "--single") == 0
        assert run("unpack", out / "m.sfp.index.json", "-o", out / "s.safetensors", "--sharded") == 0
        assert run("unpack", out / "one.sfp", "-o", out / "t.safetensors") == 0

    write_all()
    names = {path.name for path in out.iterdir()}
    assert len(names) == 8
    assert {mode_of(path) for path in out.iterdir()} == {0o644}
    for path in out.iterdir():
        path.chmod(0o600)
    write_all()
    assert {path.name for path in out.iterdir()} == names
    assert {mode_of(path) for path in out.iterdir()} == {0o600}


# ---------------------------------------------------------------------------------- file systems that lack


@pytest.mark.parametrize("number", [*ABSENT, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("write", WAYS)
def test_a_folder_that_does_not_support_sync_is_no_error(
    target: Path, write: Callable[[Path], None], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", raising(number, is_folder)(os.fsync))
    write(target)
    assert target.read_bytes() != OLD
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_folder_that_cannot_be_read_is_no_error(
    target: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", raising(number, lambda path, *_: Path(path).is_dir())(os.open))
    by_writer(target)
    assert load_file(target).keys() == {"a"}


@pytest.mark.parametrize("write", WAYS)
def test_a_failed_folder_sync_raises_and_the_new_file_is_in_place(
    target: Path, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", raising(errno.EIO, is_folder)(os.fsync))
    with pytest.raises(OSError, match="the new file has its final name"):
        write(target)
    assert target.read_bytes() != OLD
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("number", ABSENT)
@pytest.mark.parametrize("write", WAYS)
def test_a_file_that_does_not_support_sync_is_no_error(
    target: Path, write: Callable[[Path], None], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", raising(number)(os.fsync))
    write(target)
    assert target.read_bytes() != OLD


@pytest.mark.parametrize("number", NOT_ALLOWED)
@pytest.mark.parametrize("write", WAYS)
def test_a_mode_that_cannot_be_changed_is_no_error(
    target: Path, write: Callable[[Path], None], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.chmod(0o640)
    monkeypatch.setattr(os, "fchmod", raising(number)(os.fchmod))
    write(target)
    assert target.read_bytes() != OLD
    assert mode_of(target) == 0o600
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("number", [*ABSENT, errno.ENOLCK])
def test_a_file_that_cannot_be_locked_is_written_with_a_warning(
    target: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filelock, "lock_descriptor", raising(number)(filelock.lock_descriptor))
    with pytest.warns(SfpWarning, match="model.sfp.partial cannot be locked"):
        by_resumable_writer(target)
    assert load_file(target).keys() == {"a"}
    assert list(target.parent.iterdir()) == [target]


@clauses("R-STR-005")
@pytest.mark.parametrize("place", [70, -1])
def test_a_file_that_another_process_changed_without_locks_is_refused(
    target: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filelock, "lock_descriptor", raising(errno.ENOSYS)(filelock.lock_descriptor))
    with pytest.warns(SfpWarning, match="cannot be locked"):
        writer = Writer(target, resume_key="job")
    writer.add("a", ONE)
    sink = writer._file.sink
    assert isinstance(sink, ResumableSink)
    append = sink.append

    def append_and_lose(data: bytes) -> None:
        append(data)
        with beside(target, ".partial").open("r+b") as file:
            file.seek(place, os.SEEK_SET if place > 0 else os.SEEK_END)
            file.write(b"\xff")

    # Our buffered bytes would overwrite those of the other process.
    monkeypatch.setattr(sink, "append", append_and_lose)
    monkeypatch.setattr(sink._file, "truncate", lambda *_: None)
    sink._file.flush()
    with pytest.raises(LockedFileError, match="changed by another process"):
        writer.close()
    assert target.read_bytes() == OLD
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EACCES])
@pytest.mark.parametrize("write", WAYS)
def test_a_briefly_busy_target_is_replaced(
    target: Path, write: Callable[[Path], None], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [2]

    def busy(*_: object) -> bool:
        left[0] -= 1
        return left[0] >= 0

    monkeypatch.setattr(os, "replace", raising(number, busy)(os.replace))
    monkeypatch.setattr("sfpformat.io.filesystem._WAITS", (0.0, 0.0))
    write(target)
    assert target.read_bytes() != OLD
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.ENOSPC])
def test_a_target_that_stays_busy_keeps_the_finished_work(
    target: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfpformat.io.filesystem._WAITS", (0.0,))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", raising(number)(os.replace))
        with pytest.raises(OSError, match=r"complete.*remains as model\.sfp\.partial"):
            by_resumable_writer(target)
        assert target.read_bytes() == OLD
        for write in (by_writer, by_block):
            with pytest.raises(OSError, match=os.strerror(number)):
                write(target)
        names = ["model.sfp", "model.sfp.partial", "model.sfp.partial.journal"]
        assert sorted(os.listdir(target.parent)) == names
    with Writer(target, resume_key="job") as writer:
        assert writer.done == ("a",)
    assert load_file(target)["a"].tobytes() == ONE.tobytes()
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("write", WAYS)
def test_a_rename_that_succeeds_but_reports_an_error_counts_as_done(
    target: Path, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def lossy(source: Path, goal: Path) -> None:
        real(source, goal)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(os, "replace", lossy)
    write(target)
    assert target.read_bytes() != OLD
    assert list(target.parent.iterdir()) == [target]


def test_a_file_that_cannot_be_removed_is_named_in_a_warning(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "unlink", raising(errno.EIO)(os.unlink))
    with pytest.warns(SfpWarning, match=r"partial\.journal could not be removed"):
        by_resumable_writer(target)
    assert load_file(target).keys() == {"a"}


# --------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("write", WAYS)
def test_the_longest_name_can_be_written(tmp_path: Path, write: Callable[[Path], None]) -> None:
    for name in ("x" * 251 + ".sfp", "é" * 125 + ".sfp"):
        path = tmp_path / name
        write(path)
        assert list(tmp_path.iterdir()) == [path]
        path.unlink()


def test_shortened_names_of_different_files_differ(tmp_path: Path) -> None:
    long = [beside(tmp_path / ("x" * 250 + end), ".partial") for end in ("a", "b")]
    assert long[0] != long[1]
    assert beside(tmp_path / "m", ".partial") == tmp_path / "m.partial"


@pytest.mark.parametrize("suffix", [".partial", ".partial.journal"])
def test_a_link_in_place_of_a_partial_file_is_not_followed(target: Path, suffix: str) -> None:
    victim = target.with_name("victim")
    victim.write_bytes(OLD)
    beside(target, suffix).symlink_to(victim)
    with pytest.raises(OSError, match="Too many levels"):
        Writer(target, resume_key="job")
    assert victim.read_bytes() == OLD
    assert target.read_bytes() == OLD


# --------------------------------------------------------------------------------------- several together


def write_together(index: Path, *paths: Path) -> None:
    """New files with an index."""
    with ReplacedTogether(index) as new:
        for path in paths:
            new.add(path).write(b"new")
        new.index.write(b"new")


@clauses("R-SHD-003")
@pytest.mark.parametrize("fails", range(4))
def test_files_renamed_together_are_never_mixed_with_an_old_index(
    tmp_path: Path, fails: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a", "b", "index"]
    for name in names:
        (tmp_path / name).write_bytes(OLD)
    calls = iter(range(9))
    monkeypatch.setattr(os, "replace", raising(errno.EIO, lambda *_: next(calls) == fails)(os.replace))
    with pytest.raises(OSError, match="Input/output"):
        write_together(tmp_path / "index", *(tmp_path / name for name in names[:2]))
    assert sorted(os.listdir(tmp_path)) == (["a", "b"] if fails > 1 else names)
    found = [(tmp_path / name).read_bytes() for name in names[:2]]
    assert found.count(b"new") == max(fails - 1, 0)


def test_a_failure_of_one_file_keeps_all_old_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(OLD)
    (tmp_path / "index").write_bytes(OLD)
    with pytest.raises(OptionError, match="not a regular file"):
        write_together(tmp_path / "index", tmp_path / "a", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": OLD, "index": OLD}


def test_a_temporary_file_never_overwrites_an_existing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = iter(["1", "1", "2"])
    monkeypatch.setattr("sfpformat.io.atomic.secrets.token_hex", lambda _: next(words))
    first, second = AtomicFile(tmp_path / "m"), AtomicFile(tmp_path / "m")
    assert sorted(os.listdir(tmp_path)) == [".m.1.partial", ".m.2.partial"]
    first.abort()
    second.abort()


def test_a_target_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="not a regular file"), replacing(tmp_path):
        pass
    assert make(tmp_path / "m").exists()


@pytest.mark.parametrize("name", ["model.sfp", "m" * 245 + ".sfp"])
def test_a_file_that_a_killed_write_left_is_named_by_the_next_write(name: str, tmp_path: Path) -> None:
    target = tmp_path / name
    left = AtomicFile(target)  # as after SIGKILL: neither committed nor aborted
    left.file.close()
    (tmp_path / f".{name[:9]}.0123456789ab.other").touch()
    by_writer(target)  # no warning: another process may be writing it
    os.utime(left.path, (0, 0))
    with pytest.warns(SfpWarning, match="was killed and left") as found:
        by_writer(target)
    assert f"{left.path.name[-25:]}'" in str(found[0].message)
    assert left.path.exists()
    left.path.unlink()
    by_writer(target)
