"""Runs programs under test over the protocol of `conformance/README.md`: one line in, one line of JSON out.

A driver that serves is started once and answers many test cases. For non-default limits it is started once
more per set of limits, unless its `hello` says that it accepts limits with a question. A driver that does not
serve is started for each case, and its exit status decides: 0 accepted, 1 refused, 3 not supported.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from sfpformat.errors import OptionError

Json = dict[str, Any]
_STATUS = {0: {"ok": True}, 1: {"ok": False}, 3: {"ok": False, "unsupported": True}}
_MOST_ANSWER = 64 << 20
_NO_LIMIT = "this system cannot limit the address space of a program; leave the limit of megabytes out"
SECONDS = 10.0  # default time limit for an answer
_END_SECONDS = 5.0  # time limit for the output of a killed program to end
START_SECONDS = 20.0  # additional time for a program to start, on its first answer


class DriverFailure(Exception):
    """A program gave no valid answer: ``kind`` is ``crash``, ``timeout``, ``memory`` or ``nonsense``."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(words)
        self.kind = kind


@dataclass
class Driver:
    """A program under test.

    Attributes:
        command: the command line.
        seconds: time limit for an answer; overrides the limit of the case. None uses the limit of the case.
        megabytes: limit of its address space in MiB; None for no limit (sanitizers reserve much).
        serves: whether one process answers many questions.
    """

    command: Sequence[str]
    seconds: float | None = None
    megabytes: int | None = None
    serves: bool = True
    _running: dict[tuple[str, ...], _Process] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the limit.

        Raises:
            OptionError: ``megabytes`` is given, and the system cannot limit an address space.
        """
        _limiter(self.megabytes)

    @cached_property
    def said(self) -> Json:
        """The program's answer to ``hello``; empty if it fails or refuses the question."""
        try:
            answer = self.ask(["hello"])
        except DriverFailure:
            return {}
        return answer if answer["ok"] else {}

    def ask(
        self,
        words: Sequence[str],
        limits: dict[str, int] | None = None,
        seconds: float = SECONDS,
        memory: int | None = None,
    ) -> Json:
        """Asks one question and returns the answer.

        Args:
            words: the question: ``hello``, ``validate FILE``, ``decode FILE FOLDER`` or
                ``encode JOB ARRAYS FILE``.
            limits: the limits that differ from the defaults.
            seconds: time limit, unless the driver has its own; `START_SECONDS` are added if the program has
                to start first.
            memory: bytes that it may use beyond its memory at rest. Checked only for programs that serve, and
                only if the system reports memory use.

        Raises:
            DriverFailure: the program crashed, exceeded the time or the memory, or gave no valid answer.
        """
        given = tuple(f"{name}={value}" for name, value in sorted((limits or {}).items()))
        seconds = self.seconds or seconds
        if not self.serves:
            return self._ask_once([*self.command, *given, *words], START_SECONDS + seconds)
        if given and self.said.get("limits") is True:
            given, words = (), [*given, *words]
        process = self._running.get(given)
        is_new = process is None
        if process is None:
            process = self._running[given] = _Process([*self.command, *given, "serve"], self.megabytes)
            seconds += START_SECONDS
        try:
            if is_new and memory is not None:
                self._greet(process, seconds)  # after any answer it has started, so memory at rest is known
            return process.ask("\t".join(words), seconds, memory)
        except DriverFailure:
            self._running.pop(given).kill()
            raise

    @staticmethod
    def _greet(process: _Process, seconds: float) -> None:
        """Asks ``hello``, which a program may answer with anything."""
        try:
            process.ask("hello", seconds, None)
        except DriverFailure as failure:
            if failure.kind != "nonsense":
                raise

    def _ask_once(self, words: Sequence[str], seconds: float) -> Json:
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds,
                check=False,
                preexec_fn=_limiter(self.megabytes),
            )
        except subprocess.TimeoutExpired:
            raise DriverFailure("timeout", f"no answer within {seconds:g} s") from None
        if done.returncode not in _STATUS:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise DriverFailure("crash", f"exit status {done.returncode}: {' / '.join(said[-3:])}")
        lines = done.stdout.strip().splitlines()
        said_more = _parsed(lines[-1]) if lines and lines[-1].startswith(b"{") else {}
        return {**said_more, **_STATUS[done.returncode]}

    def close(self) -> None:
        """Kills the processes of the driver."""
        for process in self._running.values():
            process.kill()
        self._running.clear()


class _Process:
    """A running process that serves."""

    def __init__(self, command: Sequence[str], megabytes: int | None) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=_limiter(megabytes),
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._errors = b""
        # Threads read the output, because Windows has no time limit for reading a pipe.
        self._asked = threading.Semaphore(0)
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._threads: dict[threading.Thread, IO[bytes]] = {
            threading.Thread(target=self._read_answers, daemon=True): self._process.stdout,
            threading.Thread(target=self._read_errors, daemon=True): self._process.stderr,
        }
        for thread in self._threads:
            thread.start()

    def ask(self, line: str, seconds: float, memory: int | None) -> Json:
        """Sends a line and returns the answer. Checks the memory that the answer took."""
        rest = None if memory is None else self._memory_at_rest()
        answer = self._answer(line, seconds)
        if memory is not None and rest is not None:
            taken = self._memory("VmHWM") - rest
            if taken > memory:
                words = f"used {taken >> 20} MiB more than at rest; {memory >> 20} MiB are allowed"
                raise DriverFailure("memory", words)
        return answer

    def _memory_at_rest(self) -> int | None:
        """Resets the peak memory counter and returns the memory in use, in bytes.

        None if the system does not report it.
        """
        try:
            Path(f"/proc/{self._process.pid}/clear_refs").write_text("5", "utf-8")
            return self._memory("VmRSS")
        except OSError:
            return None

    def _memory(self, what: str) -> int:
        """Returns the value of a line of /proc/PID/status, in bytes."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text("utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))

    def _answer(self, line: str, seconds: float) -> Json:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:  # a broken pipe, which Windows reports as EINVAL
            raise self._crash() from None
        self._asked.release()
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise DriverFailure("timeout", f"no answer within {seconds:g} s") from None
        if len(answer) > _MOST_ANSWER:
            raise DriverFailure(
                "nonsense", f"an answer of more than {_MOST_ANSWER >> 20} MiB without a line end"
            )
        if not answer.endswith(b"\n"):
            raise self._crash()
        return _parsed(answer)

    def _read_answers(self) -> None:
        """Reads a line for each question, until one has no end: it is too long, or the output ended."""
        assert self._process.stdout is not None
        line = b"\n"
        while line.endswith(b"\n"):
            self._asked.acquire()
            line = self._process.stdout.readline(_MOST_ANSWER + 1)
            self._answers.put(line)

    def _read_errors(self) -> None:
        """Reads stderr until its end. Keeps the last 4096 bytes."""
        assert self._process.stderr is not None
        while piece := self._process.stderr.readline(1 << 16):
            self._errors = (self._errors + piece)[-4096:]

    def _crash(self) -> DriverFailure:
        self.kill()
        words = self._errors.decode(errors="replace").strip().splitlines()
        return DriverFailure("crash", f"exit status {self._process.returncode}: {' / '.join(words[-3:])}")

    def kill(self) -> None:
        """Kills the process, reads the rest of its output and releases resources."""
        self._process.kill()
        self._process.wait()
        self._asked.release()  # the thread may wait for a question
        for thread, pipe in self._threads.items():
            thread.join(_END_SECONDS)
            if not thread.is_alive():  # a child of the program may keep the pipe open
                pipe.close()
        assert self._process.stdin is not None
        with suppress(OSError):  # a question that was not read
            self._process.stdin.close()


def _parsed(line: bytes) -> Json:
    try:
        answer = json.loads(line)
    except ValueError:
        raise DriverFailure("nonsense", f"the answer is not JSON: {line[:80]!r}") from None
    if not isinstance(answer, dict) or not isinstance(answer.get("ok"), bool):
        raise DriverFailure("nonsense", f"the answer has no `ok` that is true or false: {line[:80]!r}")
    return answer


def _limiter(megabytes: int | None) -> Callable[[], None] | None:
    """Returns the function that limits the address space of a new process; None for no limit.

    Raises:
        OptionError: the system cannot limit an address space.
    """
    if megabytes is None:
        return None
    if sys.platform == "win32":
        raise OptionError(_NO_LIMIT)
    try:
        import resource
    except ImportError:
        raise OptionError(_NO_LIMIT) from None
    most = megabytes << 20
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most))
