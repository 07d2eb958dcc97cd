"""Simulates a system without the features of Linux and POSIX, and makes round trips of files in it.

``python -X warn_default_encoding -m tests.support.other_system KIND FOLDER`` removes modules, functions and
constants that Windows lacks. It then imports every module of the packages, and writes, resumes and reads
files in an empty folder. KIND is ``bare``: a system with the name of Linux, without locks; or ``windows``:
the packages see the name of Windows, files have locks, and open files can be neither renamed nor removed.
"""

from __future__ import annotations

import errno
import importlib
import os
import pkgutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

KINDS = ("bare", "windows")
PACKAGES = ("sfpformat", "sfp_conformance")

MODULES = ("fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty")
# Names that are available only on Unix, according to the documentation of `os` and `signal`.
FUNCTIONS = """
    chown chroot confstr copy_file_range ctermid eventfd eventfd_read eventfd_write fchdir fchmod fchown
    fdatasync fork forkpty fpathconf fstatvfs get_blocking getegid geteuid getgid getgrouplist getgroups
    getloadavg getpgid getpgrp getpriority getresgid getresuid getsid getuid getxattr initgroups killpg
    lchown listxattr lockf major makedev memfd_create minor mkfifo mknod nice openpty pathconf
    pidfd_open pipe2 posix_fadvise posix_fallocate posix_spawn posix_spawnp pread preadv pwrite pwritev
    readv register_at_fork removexattr sched_getaffinity sched_getparam sched_getscheduler
    sched_setaffinity sched_yield sendfile set_blocking setegid seteuid setgid setgroups setpgid
    setpriority setregid setresgid setresuid setreuid setsid setuid setxattr splice statvfs sync sysconf
    tcgetpgrp tcsetpgrp ttyname uname wait wait3 wait4 waitid writev O_ACCMODE O_ASYNC O_CLOEXEC
    O_DIRECT O_DIRECTORY O_DSYNC O_LARGEFILE O_NDELAY O_NOATIME O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH
    O_RSYNC O_SYNC O_TMPFILE
"""
SIGNALS = """
    SIGALRM SIGBUS SIGCHLD SIGCLD SIGCONT SIGHUP SIGIO SIGKILL SIGPIPE SIGPOLL SIGPROF SIGQUIT SIGSTOP
    SIGSYS SIGTRAP SIGTSTP SIGTTIN SIGTTOU SIGURG SIGUSR1 SIGUSR2 SIGVTALRM SIGWINCH SIGXCPU SIGXFSZ
    alarm getitimer pause pthread_kill pthread_sigmask setitimer siginterrupt sigpending sigtimedwait
    sigwait sigwaitinfo
"""


def take_away(kind: str) -> None:
    """Removes the names that the system lacks, and makes folders and open files fail as they do there."""
    modules: dict[str, Any] = sys.modules
    for name in MODULES:
        modules[name] = None
    files: Any = tempfile
    files.TemporaryFile = tempfile.NamedTemporaryFile  # as on Windows
    for module, names in ((os, FUNCTIONS), (signal, SIGNALS)):
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    _refuse_folders()
    if kind == "windows":
        _refuse_open_files()


def _refuse_folders() -> None:
    real, is_folder = os.open, os.path.isdir

    def opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if is_folder(path):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return real(path, flags, *more, **named)

    os.open = opened


def _refuse_open_files() -> None:
    for name in ("replace", "rename", "remove", "unlink"):
        setattr(os, name, _refusing(getattr(os, name)))


def _refusing(real: Callable[..., None]) -> Callable[..., None]:
    def call(*paths: Any, **named: Any) -> None:
        for path in paths:
            if is_open(path):
                raise PermissionError(errno.EACCES, "it is being used by another process", os.fspath(path))
        real(*paths, **named)

    return call


def is_open(path: str | os.PathLike[str]) -> bool:
    """Returns whether this process has a file open or mapped."""
    wanted = os.path.realpath(path)
    if not os.path.exists(wanted):
        return False
    for number in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{number}") == wanted:
                return True
        except FileNotFoundError:  # the descriptor of the list itself
            continue
    return f" {wanted}\n" in Path("/proc/self/maps").read_text("utf-8")


class _Windows(ModuleType):
    """The module `sys` with the name of Windows."""

    platform = "win32"

    def __getattr__(self, name: str) -> Any:
        return getattr(sys, name)


# These import other libraries, which use what is taken away, or are not installed.
_ADAPTERS = (
    "sfpformat.serving.vllm_linear",
    "sfpformat.serving.vllm_loader",
    "sfpformat.torch.weight_sync.callback",
    "sfpformat.torch.weight_sync.vllm_engine",
)


def import_all() -> list[str]:
    """Imports every module of the packages, except adapters to other libraries. Returns their names."""
    names = []

    def not_imported(name: str) -> None:
        if name not in _ADAPTERS:
            raise

    for package in map(importlib.import_module, PACKAGES):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", not_imported):
            if not found.name.endswith("__main__") and found.name not in _ADAPTERS:
                importlib.import_module(found.name)
                names.append(found.name)
    return names


def name_windows() -> None:
    """Makes the modules of the packages see the name of Windows."""
    for name, module in sys.modules.items():
        if name.partition(".")[0] in PACKAGES and getattr(module, "sys", None) is sys:
            setattr(module, "sys", _Windows("sys"))  # noqa: B010


# ------------------------------------------------------------------------------------------ what has to work


def arrays() -> dict[str, Any]:
    """A few tensors."""
    import numpy as np

    rng = np.random.default_rng(1)
    return {
        "a": rng.standard_normal((64, 48), dtype=np.float32),
        "b": np.where(rng.random((32, 40)) < 0.7, 0, rng.standard_normal((32, 40))).astype(np.float32),
        "c": np.arange(500, dtype=np.int64),
    }


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Returns whether tensors are equal bit for bit."""
    return found.keys() == wanted.keys() and all(
        found[name].tobytes() == array.tobytes() for name, array in wanted.items()
    )


def numpy_files(folder: Path) -> None:
    """Files of arrays: written, replaced, and read by several threads."""
    import sfpformat
    from sfpformat.numpy import load_file, save_file

    path = folder / "numpy.sfp"
    for _ in range(2):
        save_file(arrays(), path)
        assert same(load_file(path, threads=2), arrays())
    with sfpformat.open(path) as file, ThreadPoolExecutor(4) as pool:
        wanted = arrays()["a"]
        rows = [*pool.map(lambda row: file.get_slice("a")[row].tobytes(), range(64))]
        assert rows == [row.tobytes() for row in wanted]
    long = folder / ("é" * 125 + ".sfp")
    save_file(arrays(), long)
    assert same(load_file(long), arrays())
    assert sorted(folder.iterdir()) == sorted([path, long])


def torch_files(folder: Path) -> None:
    """A file of torch's tensors."""
    import torch

    from sfpformat.torch import load_file, save_file

    wanted = {name: torch.from_numpy(array) for name, array in arrays().items()}
    save_file(wanted, folder / "torch.sfp")
    found = load_file(folder / "torch.sfp")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def resumed_writer(folder: Path, locks: bool) -> None:
    """A writer is interrupted, and another one resumes its work; a second writer at the same time fails."""
    from sfpformat import SfpError, Writer
    from sfpformat.numpy import load_file

    path = folder / "resumed.sfp"

    def interrupted() -> None:
        with Writer(path, resume_key="job") as writer:
            writer.add("a", arrays()["a"])
            raise KeyboardInterrupt

    assert type(_raised(interrupted)) is KeyboardInterrupt
    assert len(list(folder.iterdir())) == 2
    with Writer(path, resume_key="job") as writer:
        assert writer.done == ("a",)
        if locks:
            error = _raised(lambda: Writer(path, resume_key="job"))
            assert isinstance(error, SfpError)
            assert "another process" in str(error)
        for name in ("b", "c"):
            writer.add(name, arrays()[name])
    assert same(load_file(path), arrays())
    assert list(folder.iterdir()) == [path]


def aborted_writer(folder: Path) -> None:
    """A writer that fails leaves nothing."""
    from sfpformat import Writer

    for key in (None, "job"):

        def failing(key: str | None = key) -> None:
            with Writer(folder / "failed.sfp", resume_key=key) as writer:
                writer.add("a", arrays()["a"])
                raise ValueError

        assert type(_raised(failing)) is ValueError
        assert not list(folder.iterdir())


def commands(folder: Path) -> None:
    """The command on one file and on shards: pack, resume, verify, unpack."""
    from safetensors.numpy import load_file, save_file

    from sfpformat.cli import main

    source, shards = folder / "source", folder / "shards"
    source.mkdir()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts: list[dict[str, Any]] = [{"a": arrays()["a"]}, {"b": arrays()["b"], "c": arrays()["c"]}]
    for name, part in zip(names, parts, strict=True):
        save_file(part, source / name)
    places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = source / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {places!r}}}'.replace("'", '"'), "utf-8")

    def run(*words: object) -> None:
        assert main([str(word) for word in words]) == 0, words

    run("pack", index, "-o", folder / "one.sfp", "--single", "--verify")
    run("verify", folder / "one.sfp")
    run("unpack", folder / "one.sfp", "-o", folder / "one.safetensors")
    assert same(load_file(folder / "one.safetensors"), arrays())
    shards.mkdir()
    for _ in range(2):  # the second run replaces the files of the first
        run("pack", index, "-o", shards / "m.sfp")
        written = sorted(path.name for path in shards.iterdir())
        assert written == ["m-00001-of-00002.sfp", "m-00002-of-00002.sfp", "m.sfp.index.json"]
    _resume_shards(index, shards)
    assert sorted(path.name for path in shards.iterdir()) == written
    run("verify", shards / "m.sfp.index.json")
    run("info", shards)
    run("unpack", shards, "-o", folder / "two.safetensors")
    assert same(load_file(folder / "two.safetensors"), arrays())


def _resume_shards(index: Path, shards: Path) -> None:
    """Interrupts a pack of shards after the first shard, and runs the command again."""
    from sfpformat.cli import main
    from sfpformat.cli import pack_shards as module

    pack_shards: Any = module

    words = ["pack", str(index), "-o", str(shards / "m.sfp")]
    real, calls = pack_shards.pack_file, []

    def interrupted(*args: Any, **named: Any) -> int:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        count: int = real(*args, **named)
        return count

    pack_shards.pack_file = interrupted
    try:
        assert main(words) == 130
        assert (shards / "m-00001-of-00002.sfp.finished").exists()
        assert main(words) == 0
    finally:
        pack_shards.pack_file = real
    assert len(calls) == 3  # the first shard was not written again


def open_target(folder: Path) -> None:
    """On Windows: a file that a reader holds open is not replaced, and the error says so."""
    import sfpformat
    from sfpformat import Writer
    from sfpformat.io import filesystem
    from sfpformat.numpy import load_file, save_file

    path = folder / "held.sfp"
    save_file({"old": arrays()["a"]}, path)
    module: Any = filesystem
    module._WAITS = (0.0,)
    with sfpformat.open(path):
        error = _raised(lambda: save_file(arrays(), path))
        assert isinstance(error, PermissionError)
        assert "does not replace an open or read-only file" in str(error)
        assert list(folder.iterdir()) == [path]

        def resumable() -> None:
            with Writer(path, resume_key="job") as writer:
                for name, array in arrays().items():
                    writer.add(name, array)

        error = _raised(resumable)
        assert isinstance(error, OSError)
        assert "does not replace an open or read-only file" in str(error)
        assert "remains as held.sfp.partial" in str(error)
    assert load_file(path).keys() == {"old"}
    with Writer(path, resume_key="job") as writer:
        assert writer.done == tuple(arrays())
    assert same(load_file(path), arrays())
    assert list(folder.iterdir()) == [path]


def linux_only() -> None:
    """Functions that need memory limits raise an error of the package."""
    from sfp_conformance.driver import Driver

    from sfpformat import OptionError
    from sfpformat.bench import child

    assert isinstance(_raised(child._max_resident), child.ChildError)
    assert isinstance(_raised(lambda: Driver(["program"], megabytes=100)), OptionError)
    assert Driver(["program"]).megabytes is None


def _raised(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def _folders(folder: Path) -> Iterator[Path]:
    for number in range(9):
        path = folder / str(number)
        path.mkdir()
        yield path


def main() -> None:
    """Runs everything. Exits with an error if something fails."""
    kind, place = sys.argv[1], Path(sys.argv[2])
    # Other packages adapt to the real system when they are imported, so that happens first.
    for name in (
        *("numba", "numpy", "rich.console", "rich.table", "safetensors.numpy"),
        "torch.distributed.checkpoint",  # needs SIGKILL where `sys` has the name of Linux
        "transformers.modeling_utils",
    ):
        importlib.import_module(name)
    if kind == "windows":
        importlib.import_module("filelock").lock_descriptor  # noqa: B018 - by the lock of the real system
    os.environ["SFPFORMAT_ENGINE"] = "python"  # the other engines would be compiled first
    take_away(kind)
    warnings.filterwarnings("error", category=EncodingWarning, module="sfpformat|sfp_conformance")
    assert len(import_all()) > 100
    if kind == "windows":
        name_windows()
    else:
        warnings.filterwarnings("ignore", message=".*cannot be locked")
    folders = _folders(place)
    numpy_files(next(folders))
    torch_files(next(folders))
    resumed_writer(next(folders), locks=kind == "windows")
    aborted_writer(next(folders))
    commands(next(folders))
    if kind == "windows":
        open_target(next(folders))
    linux_only()
    print("done")


if __name__ == "__main__":
    main()
