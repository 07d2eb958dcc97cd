"""Processes of ``torch.distributed`` that train a model after fully_shard write deltas of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sfpformat
from sfpformat.deltas.reading import Delta
from sfpformat.torch import load_file

from ..support.written_delta_group import WORLD

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of all processes."""
    out = tmp_path_factory.mktemp("written")
    words = [sys.executable, "-m", "tests.support.written_delta_group", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return out


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def test_ranks_write_one_delta_of_a_sharded_model_in_one_file_or_several(folder: Path) -> None:
    new = load_file(folder / "new.sfp")
    for name in ("d.sfp", "d.sfp.index.json", "from-file.sfp", "from-file.sfp.index.json"):
        with sfpformat.open(folder / name, base=folder / "old.sfp") as file:
            file.check()
            for tensor, expected in new.items():
                bits = expected.reshape(-1).view(torch.uint8).numpy()
                assert file.get_tensor(tensor).tobytes() == bits.tobytes(), tensor
            assert set(file) == new.keys()
    shards = sorted(path.name for path in folder.glob("d-*"))
    assert shards == ["d-00001-of-00002.sfp", "d-00002-of-00002.sfp"]
    first, second = results(folder)
    assert first["d"] == second["d"] == first["d, one"] == first["from-file"] == second["from-file, one"]
    kinds = {name: kind for name, kind, _, _ in first["d"]}
    assert kinds["frozen.weight"] == "unchanged"
    assert kinds["embed.weight"] == kinds["steps"] == "changed"
    assert "out.weight" not in kinds


def test_each_rank_writes_about_half_of_the_bytes(folder: Path) -> None:
    sizes = []
    for path in sorted(folder.glob("d-*.sfp")):
        with Delta(path) as delta:
            sizes.append(sum(tensor.nbytes for tensor in delta.map.tensors))
            largest = max(tensor.nbytes for tensor in delta.map.tensors)
    assert abs(sizes[0] - sizes[1]) <= max(largest, 460)


def test_ranks_apply_the_delta_to_their_parts(folder: Path) -> None:
    assert [found["applied"] for found in results(folder)] == [True] * WORLD


@pytest.mark.parametrize(
    ("name", "own", "failed"),
    [
        ("no base in one process", "FileNotFoundError", 1),
        ("no folder in one process", "FileNotFoundError", 1),
        ("unknown dtype in one process", "OptionError: tensor 'steps': the format does not support", 0),
    ],
)
def test_a_rank_that_fails_stops_all_and_nothing_is_written(
    folder: Path, name: str, own: str, failed: int
) -> None:
    found = results(folder)
    assert found[failed][name].startswith(own)
    words = f"ProcessError: process {failed} of 2 failed; no delta was written"
    assert found[1 - failed][name].startswith(words)
    assert found[0]["left"] == []


def test_ranks_with_other_tensors_are_refused(folder: Path) -> None:
    for found in results(folder):
        assert found["other names"] == (
            "OptionError: processes 0 and 1 differ in 'only'; all must pass the same tensors"
        )
