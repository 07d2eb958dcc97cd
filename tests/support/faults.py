"""Faults of the system during a command: a call of the C library fails, or the process is killed.

A library that is loaded before the C library counts the calls that concern a folder, and makes one of them
fail. A server that has imported everything runs each command in a child process::

    machine = Machine(folder_of_the_library)
    machine.run(["pack", ...], watched, Fault("write", 3, "ENOSPC"))
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# The ways in which a call can fail without an error number.
KILLED_BEFORE, KILLED_AFTER, SHORT = "killed before", "killed after", "short"
_ACTIONS = {KILLED_BEFORE: -1, KILLED_AFTER: -2, SHORT: -3}

# The calls that can fail, by the names under which the library counts them.
CALLS = (
    *("open", "write", "pwrite", "fsync", "fdatasync", "ftruncate", "rename", "link", "unlink", "mkdir"),
    *("fchmod", "fchown", "flock", "close"),
)

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { KILLED_BEFORE = -1, KILLED_AFTER = -2, SHORT = -3, CALLS = 32 };
static char folder[4096], wanted[16];
static int number, action;
static struct { char name[16]; int count; } seen[CALLS];

/* Counts calls that reach a folder from now on; the one of that name and number, from 1, fails. */
void faults_begin(const char *path, const char *call, int nth, int what)
{
    memset(seen, 0, sizeof seen);
    snprintf(folder, sizeof folder, "%s", path);
    snprintf(wanted, sizeof wanted, "%s", call);
    number = nth, action = what;
}

int faults_seen(const char *call)
{
    for (int i = 0; i < CALLS; i++)
        if (!strcmp(seen[i].name, call)) return seen[i].count;
    return 0;
}

static int inside(const char *path)
{
    size_t length = strlen(folder);
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int inside_fd(int fd)
{
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = folder[0] ? readlink(link, path, sizeof path - 1) : -1;
    if (length < 0) return 0;
    path[length] = 0;
    return inside(path);
}

/* What happens to a call: 0 nothing, an error number, or one of the constants. */
static int fault_of(const char *call, int is_inside)
{
    int i = 0;
    if (!is_inside) return 0;
    while (seen[i].name[0] && strcmp(seen[i].name, call)) i++;
    snprintf(seen[i].name, sizeof seen[i].name, "%s", call);
    if (++seen[i].count != number || strcmp(call, wanted)) return 0;
    if (action == KILLED_BEFORE) kill(getpid(), SIGKILL);
    return action;
}

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))

/* A call that fails, or is made, and is perhaps the last. */
#define CALL(name, call, is_inside, ...)                                \
    do {                                                                \
        int fault = fault_of(call, is_inside);                          \
        if (fault > 0) { errno = fault; return -1; }                    \
        __typeof__(name(__VA_ARGS__)) result = REAL(name)(__VA_ARGS__); \
        if (fault == KILLED_AFTER) kill(getpid(), SIGKILL);             \
        return result;                                                  \
    } while (0)

#define MODE(flags)                         \
    mode_t mode = 0;                        \
    if ((flags) & (O_CREAT | O_TMPFILE)) {  \
        va_list more;                       \
        va_start(more, flags);              \
        mode = va_arg(more, mode_t);        \
        va_end(more);                       \
    }

int open(const char *path, int flags, ...)
{
    MODE(flags) CALL(open, "open", inside(path), path, flags, mode);
}
int open64(const char *path, int flags, ...)
{
    MODE(flags) CALL(open64, "open", inside(path), path, flags, mode);
}
int openat(int at, const char *path, int flags, ...)
{
    MODE(flags) CALL(openat, "open", inside(path), at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...)
{
    MODE(flags) CALL(openat64, "open", inside(path), at, path, flags, mode);
}
ssize_t write(int fd, const void *data, size_t size)
{
    int fault = fault_of("write", inside_fd(fd));
    if (fault > 0) { errno = fault; return -1; }
    if (fault == SHORT && size > 1) size /= 2;
    ssize_t result = REAL(write)(fd, data, size);
    if (fault == KILLED_AFTER) kill(getpid(), SIGKILL);
    return result;
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at)
{
    CALL(pwrite, "pwrite", inside_fd(fd), fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    CALL(pwrite64, "pwrite", inside_fd(fd), fd, data, size, at);
}
int fsync(int fd) { CALL(fsync, "fsync", inside_fd(fd), fd); }
int fdatasync(int fd) { CALL(fdatasync, "fdatasync", inside_fd(fd), fd); }
int ftruncate(int fd, off_t size) { CALL(ftruncate, "ftruncate", inside_fd(fd), fd, size); }
int ftruncate64(int fd, off64_t size) { CALL(ftruncate64, "ftruncate", inside_fd(fd), fd, size); }
int rename(const char *from, const char *to) { CALL(rename, "rename", inside(to), from, to); }
int renameat(int a, const char *from, int b, const char *to)
{
    CALL(renameat, "rename", inside(to), a, from, b, to);
}
int link(const char *from, const char *to) { CALL(link, "link", inside(to), from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags)
{
    CALL(linkat, "link", inside(to), a, from, b, to, flags);
}
int unlink(const char *path) { CALL(unlink, "unlink", inside(path), path); }
int unlinkat(int at, const char *path, int flags) { CALL(unlinkat, "unlink", inside(path), at, path, flags); }
int mkdir(const char *path, mode_t mode) { CALL(mkdir, "mkdir", inside(path), path, mode); }
int fchmod(int fd, mode_t mode) { CALL(fchmod, "fchmod", inside_fd(fd), fd, mode); }
int fchown(int fd, uid_t user, gid_t group) { CALL(fchown, "fchown", inside_fd(fd), fd, user, group); }
int flock(int fd, int how) { CALL(flock, "flock", inside_fd(fd), fd, how); }
int close(int fd)
{
    int fault = fault_of("close", inside_fd(fd)), result = REAL(close)(fd);
    if (fault == KILLED_AFTER) kill(getpid(), SIGKILL);
    if (fault > 0) { errno = fault; return -1; }
    return result;
}
"""


@dataclass(frozen=True)
class Fault:
    """A call that fails: the ``number``-th of that name, from 1, that concerns the watched folder.

    Attributes:
        call: one of `CALLS`.
        number: the number of the call.
        action: the name of an error number, or `KILLED_BEFORE`, `KILLED_AFTER`, `SHORT`.
    """

    call: str
    number: int
    action: str


@dataclass(frozen=True)
class Ended:
    """The result of a command.

    Attributes:
        code: its exit code; −9 if it was killed.
        out, err: its output.
        seen: name of a call -> number of calls that concern the folder; empty if the command was killed.
    """

    code: int
    out: str
    err: str
    seen: dict[str, int]


class Machine:
    """A server that runs commands with faults; a context manager."""

    def __init__(self, folder: Path) -> None:
        """Compiles the library in the folder, and starts the server."""
        library = folder / "faults.so"
        (folder / "faults.c").write_text(SOURCE)
        words = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(folder / "faults.c"), "-ldl"]
        subprocess.run(words, check=True)
        root = Path(__file__).parents[2]
        paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        settings = {"LD_PRELOAD": str(library), "PYTHONPATH": paths, "SFPFORMAT_ENGINE": "python"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.faults"],
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def run(self, words: list[str], watched: Path, fault: Fault | None = None) -> Ended:
        """Runs a command, given without ``sfp``, and counts the calls that concern a folder."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"words": words, "watched": str(watched), "fault": None if fault is None else asdict(fault)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))


# ------------------------------------------------------------------------------------------ in the server


def _warm_up() -> None:
    """Runs commands once, so that all modules are imported before a child starts."""
    import numpy as np

    from sfpformat.cli import main

    from ..cli.test_main import sharded

    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        source = sharded(Path(folder) / "in", {"a": np.ones((8, 8), np.float32)}, cuts=1)
        packed = Path(folder) / "m.sfp"
        assert main(["pack", str(source), "-o", str(packed)]) == 0
        assert main(["unpack", str(packed), "-o", str(packed.with_suffix(".safetensors"))]) == 0


def _serve() -> None:
    _warm_up()
    for line in sys.stdin:
        with (
            tempfile.TemporaryFile("w+") as out,
            tempfile.TemporaryFile("w+") as err,
            tempfile.TemporaryFile("w+") as seen,
        ):
            child = os.fork()
            if not child:
                _run(json.loads(line), out, err, seen)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = []
            for file in (out, err, seen):
                file.seek(0)
                texts.append(file.read())
        answer = {"code": code, "out": texts[0], "err": texts[1], "seen": json.loads(texts[2] or "{}")}
        print(json.dumps(answer), flush=True)


def _run(job: dict[str, Any], out: Any, err: Any, seen: Any) -> None:
    """Runs a command in a child of the server, and ends it."""
    from sfpformat.cli import main

    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    library = ctypes.CDLL(None)
    fault = job["fault"] or {"call": "", "number": 0, "action": SHORT}
    action = _ACTIONS.get(fault["action"]) or getattr(errno, fault["action"])
    library.faults_begin(job["watched"].encode(), fault["call"].encode(), fault["number"], action)
    try:
        code = main(job["words"])
        sys.stderr.flush()
    except BaseException as error:
        assert sys.__stderr__ is not None
        sys.__stderr__.write(f"Traceback: {error!r}")
        code = 99
    json.dump({call: library.faults_seen(call.encode()) for call in CALLS}, seen)
    seen.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
