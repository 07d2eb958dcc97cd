"""Packs that are killed, interrupted or out of space: the old model stays; work resumes or is removed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.clauses import clauses

from .test_main import Arrays, child, error_of, make, refuse_root, run, sharded

if sys.platform == "win32":
    pytest.skip("signals and limits are those of POSIX", allow_module_level=True)
import resource

Capture = pytest.CaptureFixture[str]
OLD = b"an older model"


def large(tensors: int = 16) -> Arrays:
    """A model that takes about a second to pack."""
    rng = np.random.default_rng(3)
    return {f"w.{i:02}": rng.standard_normal((256, 512), dtype=np.float32) for i in range(tensors)}


def stop_when(process: subprocess.Popen[str], ready: Callable[[], bool], number: int) -> tuple[int, str]:
    """Sends a signal when the condition is true. Returns the exit code and stderr."""
    until = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate()
    return process.returncode, err


def size(path: Path) -> int:
    """Returns the size of a file in bytes, 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def unbroken(folder: Path, source: Path, *words: str) -> dict[str, bytes]:
    """Returns what an uninterrupted pack writes: file name -> bytes."""
    folder.mkdir()
    assert run("pack", source, "-o", folder / "m.sfp", *words) == 0
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """File name -> bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (signal.SIGKILL, -9, ""),
        (signal.SIGINT, 130, "run the same command to resume"),
        (signal.SIGTERM, 143, "run the same command to resume"),
    ],
)
def test_an_interrupted_pack_resumes_to_the_same_bytes(
    number: int, code: int, told: str, tmp_path: Path, capsys: Capture
) -> None:
    source = make(tmp_path / "m.safetensors", large())
    words = ("--prune", "0.5", "--scope", "model")
    expected = unbroken(tmp_path / "whole", source, *words)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "m.sfp").write_bytes(OLD)
    partial = folder / "m.sfp.partial.journal"
    process = child("pack", source, "-o", folder / "m.sfp", *words)
    found, err = stop_when(process, lambda: size(partial) > 400, number)
    assert found == code
    assert told in err
    assert err.count("\n") == (1 if told else 0)
    assert sorted(os.listdir(folder)) == ["m.sfp", "m.sfp.partial", "m.sfp.partial.journal"]
    assert (folder / "m.sfp").read_bytes() == OLD
    capsys.readouterr()
    again = child("pack", source, "-o", folder / "m.sfp", *words)
    out, err = again.communicate()
    assert (again.returncode, err) == (0, "")
    assert "resumed after" in out
    assert contents(folder) == expected


def test_other_options_start_a_new_pack(tmp_path: Path) -> None:
    source = make(tmp_path / "m.safetensors", large())
    expected = unbroken(tmp_path / "whole", source, "--preset", "gpu")
    folder = tmp_path / "out"
    folder.mkdir()
    process = child("pack", source, "-o", folder / "m.sfp")
    stop_when(process, lambda: size(folder / "m.sfp.partial.journal") > 400, signal.SIGKILL)
    out, err = child("pack", source, "-o", folder / "m.sfp", "--preset", "gpu").communicate()
    assert "resumed" not in out
    assert "m.sfp.partial, which an interrupted write with other options or inputs left, is discarded" in err
    assert contents(folder) == expected


def test_another_source_starts_a_new_pack(tmp_path: Path) -> None:
    source = make(tmp_path / "m.safetensors", large())
    process = child("pack", source, "-o", tmp_path / "m.sfp")
    stop_when(process, lambda: size(tmp_path / "m.sfp.partial.journal") > 400, signal.SIGKILL)
    make(source, {name: -array for name, array in large().items()})
    out, _ = child("pack", source, "-o", tmp_path / "m.sfp", "--verify").communicate()
    assert "went on" not in out
    assert "verified" in out


def test_shards_that_are_finished_are_not_written_again(tmp_path: Path) -> None:
    index = sharded(tmp_path / "in", large(18), cuts=3)
    expected = unbroken(tmp_path / "whole", index)
    folder = tmp_path / "out"
    folder.mkdir()
    for name in expected:
        (folder / name).write_bytes(OLD)
    second = folder / "m-00002-of-00003.sfp.finished.partial.journal"
    process = child("pack", index, "-o", folder / "m.sfp")
    code, _ = stop_when(process, lambda: size(second) > 400, signal.SIGKILL)
    assert code == -9
    assert all((folder / name).read_bytes() == OLD for name in expected)
    first = folder / "m-00001-of-00003.sfp.finished"
    written = first.stat().st_mtime_ns
    assert first.read_bytes() == expected["m-00001-of-00003.sfp"]
    out, err = child("pack", index, "-o", folder / "m.sfp").communicate()
    assert "resumed after" in out
    assert err == ""
    assert (folder / "m-00001-of-00003.sfp").stat().st_mtime_ns == written
    assert contents(folder) == expected


@clauses("R-SHD-003")
@pytest.mark.parametrize("replaced", [False, True])
def test_a_pack_killed_between_two_renames_leaves_no_index_and_resumes(
    tmp_path: Path, replaced: bool
) -> None:
    index = sharded(tmp_path / "in", cuts=2)
    expected = unbroken(tmp_path / "whole", index)
    folder = tmp_path / "out"
    folder.mkdir()
    if replaced:
        assert run("pack", index, "-o", folder / "m.sfp", "--preset", "gpu") == 0
    stop = "import os; real = os.replace; os.replace = lambda a, b: "
    stop += "os._exit(9) if str(a).endswith('00002-of-00002.sfp.finished') else real(a, b); "
    process = child("pack", index, "-o", folder / "m.sfp", before=stop)
    process.communicate()
    assert process.returncode == 9
    assert "m-00001-of-00002.sfp" in os.listdir(folder)
    assert "m.sfp.index.json" not in os.listdir(folder)
    out, _ = child("pack", index, "-o", folder / "m.sfp").communicate()
    assert "resumed after 6 of 6" in out
    assert contents(folder) == expected


def test_partial_files_of_another_job_are_removed(tmp_path: Path) -> None:
    index = sharded(tmp_path / "in", large(8), cuts=4)
    folder = tmp_path / "out"
    folder.mkdir()
    process = child("pack", index, "-o", folder / "m.sfp")
    ready = folder / "m-00003-of-00004.sfp.finished.partial"
    stop_when(process, ready.exists, signal.SIGTERM)
    other = sharded(tmp_path / "other", cuts=2)
    process = child("pack", other, "-o", folder / "m.sfp")
    out, err = process.communicate()
    assert "resumed" not in out
    assert "which an interrupted pack with other options or inputs left, are discarded" in err
    assert sorted(os.listdir(folder)) == ["m-00001-of-00002.sfp", "m-00002-of-00002.sfp", "m.sfp.index.json"]


@pytest.mark.parametrize(
    "state", [b"", b"{", b"[]", b'{"key":1,"count":-1,"shards":{}}', b'{"shards":{"../x":1}}']
)
def test_a_damaged_journal_starts_a_new_pack(state: bytes, tmp_path: Path) -> None:
    index = sharded(tmp_path / "in", cuts=2)
    (tmp_path / "m.sfp.index.json.partial").write_bytes(state)
    assert run("pack", index, "-o", tmp_path / "m.sfp", "--verify") == 0
    names = ["in", "m-00001-of-00002.sfp", "m-00002-of-00002.sfp", "m.sfp.index.json"]
    assert sorted(os.listdir(tmp_path)) == names


def test_a_second_pack_of_the_same_target_is_refused(tmp_path: Path, capsys: Capture) -> None:
    source = make(tmp_path / "m.safetensors", large())
    index = sharded(tmp_path / "in", large(), cuts=2)
    for path, partial in ((source, "m.sfp.partial.journal"), (index, "m.sfp.index.json.partial")):
        process = child("pack", path, "-o", tmp_path / "m.sfp")
        until = time.monotonic() + 60
        while not size(tmp_path / partial):
            assert time.monotonic() < until
            time.sleep(0.002)
        capsys.readouterr()
        assert "another process is writing" in error_of(capsys, "pack", path, "-o", tmp_path / "m.sfp")
        _, err = process.communicate()
        assert (process.returncode, err) == (0, "")


# ----------------------------------------------------------------------------------------- no space left

_ROOM = 1 << 20
# Files end at 1 MiB, as on a full disk; the write fails in place of a signal.
_SMALL = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({_ROOM}, {resource.RLIM_INFINITY})); "


@pytest.mark.parametrize("words", [(), ("--prune", "0.5", "--bits", "8")])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(words: tuple[str, ...], tmp_path: Path) -> None:
    source = make(tmp_path / "m.safetensors", large())
    (tmp_path / "m.sfp").write_bytes(OLD)
    process = child("pack", source, "-o", tmp_path / "m.sfp", *words, before=_SMALL)
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err == f"sfp: error: {tmp_path / 'm.sfp'}: File too large\n"
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors", "m.sfp"]
    assert (tmp_path / "m.sfp").read_bytes() == OLD


@clauses("R-SHD-003", "R-STR-005")
def test_a_full_disk_keeps_the_finished_shards_and_the_old_model(tmp_path: Path) -> None:
    arrays = {"a": np.ones(8, np.float32), **large(6)}
    index = sharded(tmp_path / "in", arrays, cuts=7)
    folder = tmp_path / "out"
    old = unbroken(folder, index, "--preset", "gpu")
    small = _SMALL.replace(str(_ROOM), str(1 << 18))
    process = child("pack", index, "-o", folder / "m.sfp", before=small)
    _, err = process.communicate()
    assert process.returncode == 2
    assert "File too large; 1 of 7 shards are finished and kept" in err
    kept = contents(folder)
    assert {name: kept.pop(name) for name in old} == old
    assert sorted(kept) == ["m-00001-of-00007.sfp.finished", "m.sfp.index.json.partial"]
    out, _ = child("pack", index, "-o", folder / "m.sfp").communicate()
    assert "resumed after 1 of 7 tensors" in out
    assert contents(folder) == unbroken(tmp_path / "whole", index)


@clauses("R-SHD-003", "R-STR-005")
def test_a_disk_without_space_for_the_first_shard_keeps_no_partial_file(tmp_path: Path) -> None:
    index = sharded(tmp_path / "in", large(6), cuts=2)
    folder = tmp_path / "out"
    old = unbroken(folder, index, "--preset", "gpu")
    process = child("pack", index, "-o", folder / "m.sfp", before=_SMALL.replace(str(_ROOM), str(1 << 18)))
    _, err = process.communicate()
    assert (process.returncode, "kept" in err) == (2, False)
    assert contents(folder) == old


def test_a_full_disk_ends_unpack_and_keeps_the_old_file(tmp_path: Path) -> None:
    source = make(tmp_path / "m.safetensors", large())
    assert run("pack", source, "-o", tmp_path / "m.sfp") == 0
    (tmp_path / "n.safetensors").write_bytes(OLD)
    process = child("unpack", tmp_path / "m.sfp", "-o", tmp_path / "n.safetensors", before=_SMALL)
    _, err = process.communicate()
    assert process.returncode == 2
    assert "n.safetensors: File too large" in err
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors", "m.sfp", "n.safetensors"]
    assert (tmp_path / "n.safetensors").read_bytes() == OLD


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk_ends_with_an_error_and_keeps_the_old_file(
    tiny_disk: Path, tmp_path: Path, capsys: Capture
) -> None:
    source = make(tmp_path / "m.safetensors", large())
    (tiny_disk / "m.sfp").write_bytes(OLD)
    assert "No space left on device" in error_of(capsys, "pack", source, "-o", tiny_disk / "m.sfp")
    assert contents(tiny_disk) == {"m.sfp": OLD}


def test_a_folder_without_permission_ends_with_permission_denied(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "m.safetensors")
    (tmp_path / "d").mkdir(mode=0o500)
    refuse_root(monkeypatch, "sfpformat.io.filesystem.os", "open")
    assert "Permission denied" in error_of(capsys, "pack", source, "-o", tmp_path / "d" / "m.sfp")
