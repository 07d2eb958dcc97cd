"""The command as a whole: help, one-line errors, exit codes; and helpers of the other tests."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import sfpformat
from sfpformat import SfpWarning
from sfpformat.cli import COMMANDS, main
from sfpformat.cli.console import bytes_words, number, percent, printable
from sfpformat.cli.parser import split_rules

Arrays = dict[str, np.ndarray[Any, Any]]
ROOT = Path(sfpformat.__file__).parents[1]

# A child handles Ctrl-C even if the tests were started with Ctrl-C ignored.
_CHILD = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
_MAIN = "from sfpformat.cli import main; sys.exit(main())"


def child(*words: object, before: str = "", **settings: Any) -> subprocess.Popen[str]:
    """Starts the command as a process, after the statements ``before``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | settings.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD + before + _MAIN, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=settings.pop("stderr", subprocess.PIPE),
        text=True,
        env=environment,
        **settings,
    )


def checkpoint(seed: int = 0) -> Arrays:
    """A model of a few typical tensors."""
    rng = np.random.default_rng(seed)
    return {
        "embed.weight": rng.standard_normal((128, 64), dtype=np.float32),
        "layer.0.weight": rng.standard_normal((64, 96), dtype=np.float32),
        "layer.0.bias": rng.standard_normal(96, dtype=np.float32),
        "layer.1.weight": rng.standard_normal((96, 64), dtype=np.float32) / 8,
        "ids": np.arange(40),
        "norm": np.ones(64, np.float32),
    }


def make(path: Path, arrays: Arrays | None = None, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file."""
    save_file(checkpoint() if arrays is None else arrays, path, metadata)
    return path


def sharded(folder: Path, arrays: Arrays | None = None, cuts: int = 3) -> Path:
    """A checkpoint in several files, and its index."""
    folder.mkdir()
    arrays = arrays or checkpoint()
    weight_map: dict[str, str] = {}
    for i in range(cuts):
        name = f"model-{i + 1:05d}-of-{cuts:05d}.safetensors"
        part = dict(list(arrays.items())[i::cuts])
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def run(*words: object) -> int:
    """Runs the command here."""
    return main([str(word) for word in words])


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Runs the command, which must exit with 2, and returns its one line on stderr."""
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sfp: error: ")
    assert err.count("\n") == 1
    return err


# --------------------------------------------------------------------------------------------------- help


def test_help_lists_the_commands_the_exit_codes_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    for words in (*COMMANDS, "exit codes:", "examples:", "130"):
        assert words in out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    out = capsys.readouterr().out
    assert 2 <= out.count(f"\n  sfp {command}") <= 4
    assert max(map(len, out.splitlines())) <= 110


def test_help_after_like_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pack", "m", "--like", "x", "--help") == 0
    assert "--like GLOB" in capsys.readouterr().out


def test_version_prints_package_and_format_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"sfp {sfpformat.__version__} (format 1.0)\n"


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "COMMAND"),
        (["nonsense"], "unknown command 'nonsense'"),
        (["info", "--nonsense"], "unknown arguments: --nonsense"),
        (["info", "a", "b"], "unknown arguments: b"),
        (["info"], "name a file"),
        (["info", "missing.sfp"], "missing.sfp: No such file"),
        (["info", "/"], "contains no .safetensors file, no .sfp file and no index"),
        (["info", os.devnull], "not a regular file"),
        (["info", "x", "--like", "y", "--bits", "2"], "only 'sfp pack' accepts --like"),
        (["verify", "missing.sfp"], "missing.sfp: No such file"),
        (["verify", "/"], "has no .sfp file"),
        (["diff", "missing.sfp", "b"], "missing.sfp: No such file"),
        (["unpack", "missing.sfp", "-o", "x.safetensors"], "missing.sfp: No such file"),
        (["pack", "missing", "-o", "x.sfp"], "missing: No such file"),
        (["pack", "m"], "-o"),
        (["pack", "m", "-o", "x", "--bits"], "--bits"),
        (["pack", "m", "-o", "x", "--bits", "many"], "--bits"),
        (["pack", "m", "-o", "x", "--bits", "4", "--step", "1"], "not allowed with"),
        (["pack", "m", "-o", "x", "--prune", "1.5"], "1.5"),
        (["pack", "m", "-o", "x", "--prune", "4:2"], "4:2"),
        (["pack", "m", "-o", "x", "--prune", "nan"], "nan"),
        (["pack", "m", "-o", "x", "--scale", "diagonal"], "diagonal"),
        (["conformance", "run", "--engine", "python", "--junit", "r.html"], "name it r.xml"),
        (["conformance", "run", "--engine", "python", "--html", "r.txt"], "name it r.html"),
        (["bench", "pruning", "--rows", "m.sfp"], "--rows writes .jsonl or .json; name it m.jsonl"),
        (["demo", "--sparsity", "0.5", "--plot", "m.sfp"], "--plot writes .png or .svg; name it m.png"),
        (["bench", "--plot", "m.sfp"], "--plot writes .png or .svg; name it m.png"),
        (["pack", "m", "-o", "x.sfp", "--metadata", "novalue"], "KEY=VALUE"),
        (["pack", "m", "-o", "x.sfp", "--metadata", "sfp.x=1"], "reserved for the format"),
        (["pack", "m", "-o", "x.sfp", "--like"], "needs a pattern"),
        (["pack", "m", "-o", "x.sfp", "--like", "--bits", "4"], "needs a pattern"),
        (["pack", "m", "-o", "x.sfp", "--like", "a"], "needs options after it"),
        (["pack", "m", "-o", "x.sfp", "--like", "a", "--bits", "4", "n"], "'n' after --like"),
        (["pack", "m", "-o", "x.sfp", "--like", "a", "--verify"], "'--verify' after --like"),
    ],
    ids=lambda case: " ".join(case) if isinstance(case, list) else "",
)
def test_wrong_arguments_end_with_one_line_and_write_nothing(
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in error_of(capsys, *words)
    assert os.listdir(tmp_path) == []


def test_a_truncated_file_is_reported_with_its_clause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pack", make(tmp_path / "m.safetensors"), "-o", tmp_path / "m.sfp") == 0
    data = (tmp_path / "m.sfp").read_bytes()
    capsys.readouterr()
    for length in (10, 70, len(data) - 1):
        (tmp_path / "m.sfp").write_bytes(data[:length])
        told = error_of(capsys, "info", tmp_path / "m.sfp")
        assert "m.sfp: E_" in told
        assert "R-PRE-00" in told


def refuse_root(monkeypatch: pytest.MonkeyPatch, module: str, function: str) -> None:
    """Makes opening files fail for root where their mode makes it fail for other users."""

    def refused(path: str, *rest: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    if hasattr(os, "geteuid") and os.geteuid() == 0:
        monkeypatch.setattr(f"{module}.{function}", refused)


def test_a_file_without_read_permission_ends_with_permission_denied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "m.safetensors").chmod(0)
    refuse_root(monkeypatch, "sfpformat.io.positional", "FileIO")
    assert "Permission denied" in error_of(capsys, "diff", tmp_path / "m.safetensors", tmp_path)


def test_an_internal_error_prints_one_line_and_a_traceback_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: object, **settings: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("sfpformat.cli.info.open_model", broken)
    assert "RuntimeError: two lines" in error_of(capsys, "info", "x")
    monkeypatch.setenv("SFP_DEBUG", "1")
    assert run("info", "x") == 2
    assert "Traceback" in capsys.readouterr().err


def test_too_little_memory_ends_with_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(path: object, **settings: object) -> None:
        raise MemoryError

    monkeypatch.setattr("sfpformat.cli.info.open_model", greedy)
    assert "not enough memory" in error_of(capsys, "info", "x")


def test_a_warning_is_printed_once_on_one_line_and_is_no_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubtful(as_json: bool) -> None:
        for _ in range(2):
            warnings.warn("two\nlines\x1b", SfpWarning, stacklevel=1)

    monkeypatch.setattr("sfpformat.cli.info._show_engines", doubtful)
    assert run("info", "--engines") == 0
    assert capsys.readouterr().err == "sfp: warning: two lines\\x1b\n"


def test_signals_end_with_the_exit_code_that_a_shell_expects(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # A shell starts background jobs with SIGINT ignored, nohup starts programs with SIGHUP ignored.
    defaults: dict[signal.Signals, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    for given, handler in {**defaults, signal.SIGINT: signal.default_int_handler}.items():
        request.addfinalizer(partial(signal.signal, given, signal.signal(given, handler)))
    for number_, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)):

        def interrupted(path: object, n: int = number_, **settings: object) -> None:
            signal.raise_signal(n)

        monkeypatch.setattr("sfpformat.cli.info.open_model", interrupted)
        handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)]
        assert run("info", "x") == code
        assert capsys.readouterr().err == "sfp: interrupted\n"
        assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)]


def test_a_command_under_nohup_ignores_the_hangup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    inherited = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, inherited))
    monkeypatch.setattr(
        "sfpformat.cli.info._show_engines", lambda as_json: signal.raise_signal(signal.SIGHUP)
    )
    assert run("info", "--engines") == 0
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_closed_pipe_ends_silently_with_exit_code_141(tmp_path: Path) -> None:
    arrays = {f"tensor.{i}": np.ones((4, 4), np.float32) for i in range(3000)}
    assert run("pack", make(tmp_path / "m.safetensors", arrays), "-o", tmp_path / "m.sfp") == 0
    process = child("info", tmp_path / "m.sfp")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141


def test_importing_the_command_does_not_import_rich_or_torch() -> None:
    process = child("--help", before="import atexit; atexit.register(lambda: print(set(sys.modules))); ")
    out, _ = process.communicate()
    modules = out.splitlines()[-1]
    assert "'argparse'" in modules
    for name in ("'rich'", "'torch'", "'sfpformat.cli.pack'", "'sfpformat.cli.rules'", "'safetensors'"):
        assert name not in modules


# ------------------------------------------------------------------------------------------------- console


def on_a_terminal(*words: object) -> str:
    """Returns what the command prints on stderr if stderr is a terminal."""
    ours, theirs = os.openpty()
    process = child(*words, stderr=theirs, env={"TERM": "xterm", "COLUMNS": "100"})
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # the other end was closed
        pass
    os.close(ours)
    process.communicate()
    assert process.returncode == 0
    return shown.decode()


def test_a_progress_bar_is_shown_on_a_terminal_only(tmp_path: Path) -> None:
    words = ("pack", make(tmp_path / "m.safetensors"), "-o", tmp_path / "m.sfp")
    assert "━" in on_a_terminal(*words)
    _, err = child(*words).communicate()
    assert err == ""


def test_control_characters_in_names_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {"a\x1b[31m\nb": np.ones(3, np.float32), "[bold]c[/bold]": np.ones(3, np.float32)}
    make(tmp_path / "m.safetensors", arrays, {"k\x07": "v\x1b]0;t\x07"})
    assert run("pack", tmp_path / "m.safetensors", "-o", tmp_path / "m.sfp") == 0
    assert run("info", tmp_path / "m.sfp") == 0
    assert run("diff", "--all", tmp_path / "m.sfp", tmp_path / "m.safetensors") == 0
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert "a\\x1b[31m\\nb" in out
    assert "[bold]c[/bold]" in out
    assert printable("grün ×") == "grün ×"


def test_sizes_and_counts_are_formatted_for_people() -> None:
    sizes = {
        0: "0 B",
        999: "999 B",
        1000: "1 kB",
        12_345: "12.3 kB",
        90_868_376: "90.9 MB",
        10**15: "1000 TB",
    }
    assert {size: bytes_words(size) for size in sizes} == sizes
    assert (number(None), number(1.234), number(-3.0, 1, " dB")) == ("–", "1.23", "-3.0 dB")
    assert (percent(None), percent(0.5)) == ("–", "50.0 %")


def test_arguments_after_each_like_belong_to_that_rule() -> None:
    words = ["pack", "m", "--like", "a", "--bits", "2", "--like=b", "--lossless"]
    assert split_rules(words) == (["pack", "m"], [["a", "--bits", "2"], ["b", "--lossless"]])


# ------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "shift_jis", "utf-8"])
def test_output_of_any_encoding_prints_every_name(encoding: str, tmp_path: Path) -> None:
    source = make(tmp_path / "m.safetensors", {"größe→": np.ones((80, 80), np.float32)})
    target = tmp_path / "m.sfp"
    for words in (
        ("pack", source, "-o", target),
        ("info", target),
        ("verify", target, "--canonical"),
        ("diff", source, target, "--all"),
    ):
        process = child(*words, env={"PYTHONIOENCODING": encoding}, encoding=encoding)
        out, err = process.communicate()
        assert (process.returncode, err) == (0, ""), words
        assert out
        if words[0] == "pack":
            arrow = "→" if encoding in ("utf-8", "shift_jis") else "->"
            assert out.startswith(f"m.safetensors {arrow} m.sfp\n")
        if words[0] == "info" and encoding == "ascii":
            assert "gr\\xf6\\xdfe->  F32    80x80" in out


def test_a_file_name_that_is_not_utf_8_is_shown_escaped(tmp_path: Path) -> None:
    source = make(tmp_path / "m.safetensors")
    strange = Path(os.fsdecode(bytes(tmp_path) + b"/\xff.safetensors"))
    source.rename(strange)
    process = child("pack", strange, "-o", tmp_path / "m.sfp")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert out.startswith("\\udcff.safetensors → m.sfp\n")


def test_the_error_handler_of_an_output_is_restored_afterwards() -> None:
    before = sys.stdout.errors, sys.stderr.errors
    assert run("--version") == 0
    assert (sys.stdout.errors, sys.stderr.errors) == before


@pytest.mark.parametrize("closed", [1, 2])
def test_closed_standard_streams_are_no_error(closed: int, tmp_path: Path) -> None:
    source = make(tmp_path / "m.safetensors")
    for words, code in ((("pack", source, "-o", tmp_path / "m.sfp"), 0), (("info", tmp_path / "n.sfp"), 2)):
        command = [sys.executable, "-c", _CHILD + _MAIN, *map(str, words)]
        process = subprocess.run(
            ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *command],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert process.returncode == code
        assert (process.stdout if closed == 1 else process.stderr) == ""
        assert "sfp: error" not in process.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("words", [("info", "--engines"), ("--version",)])
def test_output_to_a_full_disk_ends_with_an_error(words: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-c", _CHILD + _MAIN, *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert process.returncode == 2
    assert process.stderr == "sfp: error: No space left on device\n"


def test_help_to_a_closed_pipe_ends_silently_with_exit_code_141() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-c", _CHILD + _MAIN, "pack", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(writer)
    assert (process.returncode, process.stderr) == (141, "")
