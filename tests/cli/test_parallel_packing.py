"""Packing in several processes: ``sfp pack --jobs``, and `pack_shard` under joblib, Dask and ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest

from sfpformat import OptionError, PackedShard, pack_shard, shard_count
from sfpformat.io.filesystem import LockedFileError, open_locked

from .test_main import error_of, make, run
from .test_resume import contents

Capture = pytest.CaptureFixture[str]
SHARDS = 3
OPTIONS = "--bits 4 --prune 0.5 --like w.0* --lossless"


def checkpoint(folder: Path, tensors: int = 2, size: int = 128) -> Path:
    """A checkpoint of safetensors in three files, one with an infinity. Returns the index."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        arrays = {
            f"w.{shard}.{i}": rng.standard_normal((size, size), dtype=np.float32) for i in range(tensors)
        }
        if shard == 1:
            arrays["w.1.0"][3, 4] = np.inf
        make(folder / name, arrays)
        weight_map |= dict.fromkeys(arrays, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")
    return index


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A checkpoint, and what one process packs: file name -> bytes."""
    folder = tmp_path_factory.mktemp("packing")
    source = checkpoint(folder / "in")
    (folder / "one").mkdir()
    assert run("pack", source, "-o", folder / "one" / "m.sfp", *OPTIONS.split()) == 0
    return source, contents(folder / "one")


def test_several_processes_write_the_same_bytes(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path, capsys: Capture
) -> None:
    source, expected = packed
    target = tmp_path / "m.sfp"
    assert run("pack", source, "-o", target, "--jobs", 2, "--verify", *OPTIONS.split()) == 0
    assert contents(tmp_path) == expected
    told = capsys.readouterr()
    assert "resumed" not in told.out
    assert run("pack", source, "-o", target, *OPTIONS.split()) == 0
    assert contents(tmp_path) == expected


def test_jobs_without_several_files_are_refused(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path, capsys: Capture
) -> None:
    source, _ = packed
    for words in (["--single"], ["--dry-run"]):
        told = error_of(capsys, "pack", source, "-o", tmp_path / "m.sfp", "--jobs", 2, *words)
        assert "--jobs writes several shards" in told
    assert "at least 1" in error_of(capsys, "pack", source, "-o", tmp_path / "m.sfp", "--jobs", 0)
    assert not contents(tmp_path)


def test_the_call_that_finishes_last_writes_the_index(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    source, expected = packed
    assert shard_count(source) == shard_count(source.parent) == SHARDS
    target = tmp_path / "m.sfp"
    found = [pack_shard(source, target, OPTIONS, number=n) for n in (3, 1)]
    assert [one.index_written for one in found] == [False, False]
    assert not list(tmp_path.glob("*.sfp"))
    again = pack_shard(source, target, OPTIONS, number=3)
    assert again == PackedShard(str(tmp_path / "m-00003-of-00003.sfp"), 2, 2, False)
    assert pack_shard(source, target, OPTIONS.split(), number=2, threads=1).index_written
    assert contents(tmp_path) == expected


def test_a_pack_of_the_whole_accepts_finished_shards(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path, capsys: Capture
) -> None:
    source, expected = packed
    pack_shard(source, tmp_path / "m.sfp", OPTIONS, number=2)
    before = (tmp_path / "m-00002-of-00003.sfp.finished").stat().st_ino
    assert run("pack", source, "-o", tmp_path / "m.sfp", *OPTIONS.split()) == 0
    assert "resumed" in capsys.readouterr().out
    assert (tmp_path / "m-00002-of-00003.sfp").stat().st_ino == before
    assert contents(tmp_path) == expected


def test_shards_of_other_options_are_packed_again(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    source, expected = packed
    for number in (1, 2, 3):
        if number < 3:
            pack_shard(source, tmp_path / "m.sfp", "--bits 8", number=number)
    for number in (1, 2, 3):
        found = pack_shard(source, tmp_path / "m.sfp", OPTIONS, number=number)
        assert found.resumed == 0
    assert contents(tmp_path) == expected


@pytest.mark.parametrize(
    ("options", "number", "words"),
    [
        ("--nonsense", 1, "unknown arguments"),
        ("--bits 4", 4, "3 shards"),
        ("--bits 4", 0, "3 shards"),
        ("--single", 1, "--single"),
        ("--jobs 2", 1, "--jobs"),
        ("--bits 4", True, "number is True"),
    ],
)
def test_wrong_arguments_are_refused(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path, options: str, number: int, words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        pack_shard(packed[0], tmp_path / "m.sfp", options, number=number)
    assert not contents(tmp_path)


def test_a_shard_that_another_process_writes_is_refused(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    file, _ = open_locked(tmp_path / "m-00001-of-00003.sfp.finished.partial")
    with file, pytest.raises((LockedFileError, OptionError), match="another process is writing it"):
        pack_shard(packed[0], tmp_path / "m.sfp", OPTIONS, number=1)


def test_a_full_disk_keeps_finished_shards(
    packed: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = packed
    pack_shard(source, tmp_path / "m.sfp", OPTIONS, number=1)

    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr("sfpformat.encode.resume.ResumableSink.append", full)
        with pytest.raises(OSError, match="No space left"):
            pack_shard(source, tmp_path / "m.sfp", OPTIONS, number=2)
    assert [name for name in contents(tmp_path) if name.endswith(".finished")] == [
        "m-00001-of-00003.sfp.finished"
    ]
    for number in (1, 2, 3):
        assert pack_shard(source, tmp_path / "m.sfp", OPTIONS, number=number).resumed == 2 * (number == 1)
    assert contents(tmp_path) == expected


def test_joblib_packs_with_its_own_processes(packed: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    source, expected = packed
    call = joblib.delayed(pack_shard)
    calls = [call(source, tmp_path / "m.sfp", OPTIONS, number=n, threads=1) for n in (1, 2, 3)]
    found = joblib.Parallel(2, backend="loky")(calls)
    assert sum(one.index_written for one in found) == 1
    assert contents(tmp_path) == expected
    joblib.externals.loky.get_reusable_executor().shutdown(wait=True)


def test_ranks_pack_their_shards(packed: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    source, expected = packed
    code = (
        "import os, sys; from sfpformat import pack_shard, shard_count\n"
        "rank, world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])\n"
        "for n in range(1, shard_count(sys.argv[1]) + 1)[rank::world]:\n"
        "    pack_shard(sys.argv[1], sys.argv[2], sys.argv[3], number=n, threads=1)\n"
    )
    words = [sys.executable, "-c", code, str(source), str(tmp_path / "m.sfp"), OPTIONS]
    ranks = [
        subprocess.Popen(words, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}) for rank in range(2)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    assert contents(tmp_path) == expected


def test_dask_packs_again_what_a_killed_worker_lost(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    source = checkpoint(tmp_path / "in", tensors=8, size=512)
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    assert run("pack", source, "-o", tmp_path / "one" / "m.sfp", *OPTIONS.split()) == 0
    target = tmp_path / "many" / "m.sfp"
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        futures = client.map(
            lambda n: (os.getpid(), pack_shard(source, target, OPTIONS, number=n, threads=1)),
            [1, 2, 3],
            pure=False,
        )
        killed = _kill_one_that_writes(client, target.parent)
        found = client.gather(futures)
    assert killed not in {pid for pid, _ in found}
    assert sum(report.index_written for _, report in found) == 1
    assert contents(target.parent) == contents(tmp_path / "one")


def _kill_one_that_writes(client: Any, folder: Path) -> int:
    """Kills a worker with -9 when a shard has begun. Returns its process id."""
    until = time.monotonic() + 60
    while not any(path.stat().st_size > 100_000 for path in folder.glob("*.partial")):
        assert time.monotonic() < until
        threading.Event().wait(0.002)
    busy = [address for address, tasks in client.processing().items() if tasks]
    pids: dict[str, int] = client.run(os.getpid)
    pid = next(pid for address, pid in pids.items() if address in busy)
    os.kill(pid, signal.SIGKILL)
    return pid
