"""``sfp delta``, ``sfp apply``, ``sfp squash``, and deltas in ``info``, ``verify`` and ``diff``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfpformat.cli import main
from sfpformat.decode.parts import parts_of
from sfpformat.decode.reader import SfpFile
from sfpformat.numpy import save_file

from ..format.test_delta_parts import file_of, model, same_parts
from ..format.test_deltas import Arrays, arrays, stepped
from .test_main import make, sharded

Capture = pytest.CaptureFixture[str]


def sfp(*words: object) -> int:
    """Runs the command. Returns its exit code."""
    return main([str(word) for word in words])


@pytest.fixture
def steps(tmp_path: Path) -> list[Arrays]:
    """Four checkpoints, step-0.safetensors to step-3.safetensors, and deltas between neighbours, d1 to d3."""
    out = [{k: v for k, v in arrays().items() if k != "flags"}]
    for number in range(3):
        out.append(stepped(out[-1], number))
    for number, tensors in enumerate(out):
        make(tmp_path / f"step-{number}.safetensors", tensors)
        if number:
            before, after = (tmp_path / f"step-{n}.safetensors" for n in (number - 1, number))
            assert sfp("delta", before, after, "-o", tmp_path / f"d{number}.sfp") == 0
    return out


def test_a_chain_of_deltas_makes_the_last_checkpoint(
    tmp_path: Path, steps: list[Arrays], capsys: Capture
) -> None:
    deltas = [tmp_path / f"d{n}.sfp" for n in (1, 2, 3)]
    new = tmp_path / "new.safetensors"
    assert sfp("apply", tmp_path / "step-0.safetensors", *deltas, "-o", new) == 0
    assert sfp("diff", tmp_path / "step-3.safetensors", new) == 0
    assert sfp("apply", tmp_path / "step-0.safetensors", *deltas, "-o", tmp_path / "new.sfp") == 0
    assert sfp("diff", tmp_path / "step-3.safetensors", tmp_path / "new.sfp") == 0
    squashed = tmp_path / "squashed.sfp"
    assert sfp("squash", tmp_path / "step-0.safetensors", *deltas, "-o", squashed) == 0
    assert sfp("apply", tmp_path / "step-0.safetensors", squashed, "-o", new, "--json") == 0
    assert sfp("diff", tmp_path / "step-3.safetensors", new) == 0
    assert sfp("verify", *deltas, squashed) == 0
    capsys.readouterr()


def test_verify_compares_base_and_result_with_their_checksums(
    tmp_path: Path, steps: list[Arrays], capsys: Capture
) -> None:
    delta = tmp_path / "d2.sfp"
    bases = [tmp_path / f"step-{n}.safetensors" for n in range(4)]
    assert sfp("verify", delta, "--base", bases[1]) == 0
    capsys.readouterr()
    for wrong, words in ((bases[0], "made from another base"), (bases[2], "was applied before")):
        assert sfp("verify", delta, "--base", wrong, "--json") == 1
        [report] = json.loads(capsys.readouterr().out)
        [fault] = report["faults"]
        assert (report["ok"], fault["code"], fault["clause"]) == (False, "E_BASE", "R-DLT-009")
        assert words in fault["detail"]
    save_file(steps[0], tmp_path / "model.sfp")
    assert sfp("verify", tmp_path / "model.sfp", "--base", bases[0]) == 2
    assert "is a model, not a delta" in capsys.readouterr().err


def test_a_wrong_base_is_named_with_both_checksums_and_nothing_is_written(
    tmp_path: Path, steps: list[Arrays], capsys: Capture
) -> None:
    target = tmp_path / "new.safetensors"
    target.write_bytes(b"old")
    for words, faulty, base in (
        (("step-1.safetensors", "d1.sfp"), "d1.sfp", "step-1.safetensors"),
        (("step-0.safetensors", "d2.sfp"), "d2.sfp", "step-0.safetensors"),
        (("step-0.safetensors", "d1.sfp", "d1.sfp"), "d1.sfp", "d1.sfp"),
        (("step-0.safetensors", "d2.sfp", "d3.sfp"), "d2.sfp", "step-0.safetensors"),
        (("step-0.safetensors", "d1.sfp", "d3.sfp"), "d3.sfp", "d1.sfp"),
    ):
        capsys.readouterr()
        assert sfp("apply", *(tmp_path / word for word in words), "-o", target) == 2
        error = capsys.readouterr().err
        assert "E_BASE" in error
        assert "has the checksum" in error
        assert "(tensor '" in error
        assert f"{tmp_path / faulty} on {tmp_path / base}: " in error
        assert target.read_bytes() == b"old"
    assert not list(tmp_path.glob(".*partial"))


def test_errors_name_the_damaged_delta(tmp_path: Path, steps: list[Arrays], capsys: Capture) -> None:
    data = bytearray((tmp_path / "d2.sfp").read_bytes())
    data[100] ^= 1  # in the first chunk, after the preamble of 64 bytes
    (tmp_path / "d2.sfp").write_bytes(data)
    chain = [tmp_path / f"d{n}.sfp" for n in (1, 2, 3)]
    assert sfp("apply", tmp_path / "step-0.safetensors", *chain, "-o", tmp_path / "new.sfp") == 2
    assert f"error: {tmp_path / 'd2.sfp'}: E_CRC" in capsys.readouterr().err
    assert sfp("diff", tmp_path / "step-1.safetensors", tmp_path / "d2.sfp") == 2
    assert f"error: {tmp_path / 'd2.sfp'}: E_CRC" in capsys.readouterr().err
    assert sfp("diff", tmp_path / "step-1.safetensors", tmp_path / "d1.sfp") == 2
    error = capsys.readouterr().err
    assert f"error: {tmp_path / 'd1.sfp'} on {tmp_path / 'step-1.safetensors'}: E_BASE" in error


def test_figures_of_a_delta_are_about_the_tensors_of_the_result(
    tmp_path: Path, steps: list[Arrays], capsys: Capture
) -> None:
    assert sfp("info", tmp_path / "d1.sfp") == sfp("verify", tmp_path / "d1.sfp") == 0
    out = capsys.readouterr().out
    assert "% pruned" not in out
    assert "bits per weight" not in out
    assert out.count(" changed, ") == 2
    assert sfp("verify", tmp_path / "d1.sfp", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert sum(found["delta"].values()) == len(steps[0])


def test_pruning_a_delta_is_refused_with_the_command_that_makes_a_model(
    tmp_path: Path, steps: list[Arrays], capsys: Capture
) -> None:
    assert sfp("prune", tmp_path / "d1.sfp", "-o", tmp_path / "o.sfp", "--sparsity", "0.5") == 2
    error = capsys.readouterr().err
    assert "'sfp apply BASE " in error
    assert "sfpformat.open" not in error


def test_models_and_deltas_are_told_apart(tmp_path: Path, steps: list[Arrays], capsys: Capture) -> None:
    delta, base = tmp_path / "d1.sfp", tmp_path / "step-0.safetensors"
    save_file(steps[0], tmp_path / "model.sfp")
    cases: tuple[tuple[tuple[object, ...], str], ...] = (
        (("unpack", delta, "-o", tmp_path / "x.safetensors"), "is a delta, not a model"),
        (("apply", delta, delta, "-o", tmp_path / "x.safetensors"), "is a delta, not a model"),
        (("apply", base, tmp_path / "model.sfp", "-o", tmp_path / "x.sfp"), "is a model, not a delta"),
        (("delta", base, delta, "-o", tmp_path / "x.sfp"), "is a delta, not a model"),
        (("delta", base, base, "-o", tmp_path / "x.txt"), "'sfp delta' writes .sfp"),
        (("delta", base, base, "-o", base), "writes .sfp"),
        (("squash", base, delta, "-o", delta), "is an input file"),
    )
    for words, message in cases:
        assert sfp(*words) == 2
        assert message in capsys.readouterr().err


def test_info_and_diff_describe_a_delta(tmp_path: Path, steps: list[Arrays], capsys: Capture) -> None:
    capsys.readouterr()
    assert sfp("info", tmp_path / "d1.sfp") == 0
    assert "a delta of 'step-0.safetensors': 4 changed, 3 unchanged" in capsys.readouterr().out
    assert sfp("info", tmp_path / "d1.sfp", "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["delta"]
    assert found["kinds"] == {"changed": 4, "unchanged": 3}
    assert len(found["tensors"]) == 7
    assert sfp("diff", tmp_path / "step-0.safetensors", tmp_path / "d1.sfp") == 1
    assert "3 of 7 tensors identical" in capsys.readouterr().out
    assert (
        sfp("delta", *(tmp_path / f"step-{n}.safetensors" for n in "01"), "-o", tmp_path / "j.sfp", "--json")
        == 0
    )
    assert json.loads(capsys.readouterr().out)["kinds"] == {"changed": 4, "unchanged": 3}


def test_added_removed_and_replaced_tensors_come_through(tmp_path: Path, capsys: Capture) -> None:
    base = {"a": np.arange(6.0), "gone": np.ones(3), "b": np.zeros((2, 2), np.float32)}
    new = {"a": np.arange(6.0), "b": np.zeros(5, np.int8), "new": np.ones(7, np.float16)}
    make(tmp_path / "base.safetensors", base)
    make(tmp_path / "new.safetensors", new)
    words = (tmp_path / "base.safetensors", tmp_path / "new.safetensors", "-o", tmp_path / "d.sfp")
    assert sfp("delta", *words) == 0
    assert "1 added, 1 removed, 1 replaced, 1 unchanged" in capsys.readouterr().out
    assert (
        sfp("apply", tmp_path / "base.safetensors", tmp_path / "d.sfp", "-o", tmp_path / "c.safetensors") == 0
    )
    assert sfp("diff", tmp_path / "new.safetensors", tmp_path / "c.safetensors") == 0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
@pytest.mark.parametrize("command", ["delta", "apply", "apply --sharded"])
def test_killing_the_command_leaves_the_old_file(tmp_path: Path, command: str, capsys: Capture) -> None:
    rng = np.random.default_rng(0)
    base = {f"t{i}": rng.normal(size=200_000).astype(np.float32) for i in range(12)}
    make(tmp_path / "base.safetensors", base)
    make(tmp_path / "new.safetensors", {name: array + np.float32(1e-3) for name, array in base.items()})
    paths = [tmp_path / name for name in ("base.safetensors", "new.safetensors", "d.sfp")]
    if command != "delta":
        assert sfp("delta", *paths[:2], "-o", paths[2]) == 0
        paths = [paths[0], paths[2], tmp_path / "result.safetensors"]
    target = paths[-1]
    if command == "apply --sharded":
        paths[0] = sharded(tmp_path / "base", base)
        target = tmp_path / "result-00002-of-00003.safetensors"
    target.write_bytes(b"old")
    words = [sys.executable, "-m", "sfpformat.cli", *command.split(), *map(str, paths[:-1])]
    words += ["-o", str(paths[-1])]
    process = subprocess.Popen(words, env={**os.environ, "SFPFORMAT_ENGINE": "python"})
    while not list(tmp_path.glob(".*partial")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert target.read_bytes() == b"old"
    assert not list(tmp_path.glob("result*.json"))
    capsys.readouterr()


@pytest.mark.parametrize("suffix", [".safetensors", ".sfp"])
def test_models_in_shards_give_a_delta_and_are_made_again_in_shards(
    tmp_path: Path, suffix: str, capsys: Capture
) -> None:
    base = {name: array for name, array in arrays().items() if name != "flags"}
    new = {**stepped(base), "z.added": np.arange(5.0), "kept": np.arange(3, dtype=np.uint8)}
    del new["scalar"]
    before, after = sharded(tmp_path / "base", base), sharded(tmp_path / "new", new)
    if suffix == ".sfp":
        assert sfp("pack", before, "-o", tmp_path / "base" / "model.sfp") == 0
        before = tmp_path / "base" / "model.sfp.index.json"
    assert sfp("delta", before, after, "-o", tmp_path / "d.sfp") == 0
    result = tmp_path / f"result{suffix}"
    capsys.readouterr()
    words = ("apply", before, tmp_path / "d.sfp", "-o", result, "--sharded", "--json")
    assert sfp(*words) == 0
    assert json.loads(capsys.readouterr().out)["files"] == 3
    index = tmp_path / f"result{suffix}.index.json"
    assert sfp("diff", after, index) == 0
    places = json.loads(index.read_text())["weight_map"]
    shards = sorted(path.name for path in tmp_path.glob(f"result-*{suffix}"))
    assert sorted(set(places.values())) == shards
    assert places.keys() == new.keys()
    old = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(
        old[name][-14:] == file[-14:] for name, file in places.items() if suffix != ".sfp" and name in old
    )
    assert places["z.added"] == shards[-1]


@pytest.mark.parametrize("suffix", [".safetensors", ".sfp"])
def test_a_delta_in_shards_is_one_delta_for_each_command(
    tmp_path: Path, suffix: str, capsys: Capture
) -> None:
    base = {name: array for name, array in arrays().items() if name != "flags"}
    new = {**stepped(base), "z.added": np.arange(5.0)}
    del new["scalar"]
    before, after = sharded(tmp_path / "base", base), sharded(tmp_path / "new", new)
    if suffix == ".sfp":
        for path in (before, after):
            assert sfp("pack", path, "-o", path.parent / "model.sfp") == 0
        before, after = (path.with_name("model.sfp.index.json") for path in (before, after))
    target, index = tmp_path / "d.sfp", tmp_path / "d.sfp.index.json"
    capsys.readouterr()
    assert sfp("delta", before, after, "-o", target, "--sharded", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kinds"] == {"changed": 4, "unchanged": 2, "added": 1, "removed": 1}
    shards = sorted(tmp_path.glob("d-*.sfp"))
    assert [path.name for path in shards] == [f"d-0000{n}-of-00003.sfp" for n in (1, 2, 3)]
    assert found["bytes"] == sum(path.stat().st_size for path in shards)
    assert not target.exists()
    assert sfp("verify", index, "--base", before) == 0
    capsys.readouterr()
    assert sfp("info", index, "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert described["delta"]["kinds"] == found["kinds"]
    assert described["shards"] == [path.name for path in shards]
    made, squashed = tmp_path / f"made{suffix}", tmp_path / "squashed.sfp"
    assert sfp("apply", before, index, "-o", made, "--sharded") == 0
    assert sfp("diff", after, tmp_path / f"made{suffix}.index.json") == 0
    assert sfp("squash", before, index, "-o", squashed) == 0
    assert sfp("apply", before, squashed, "-o", tmp_path / "one.safetensors") == 0
    assert sfp("diff", after, tmp_path / "one.safetensors") == 0
    assert sfp("diff", before, index) == 1
    capsys.readouterr()
    kept = {path: path.read_bytes() for path in (index, *shards)}
    for words, said in (
        (("apply", before, index, "-o", shards[0]), "is an input file"),
        (("unpack", index, "-o", tmp_path / "x.safetensors"), "is a delta, not a model"),
        (("apply", before, shards[0], "-o", tmp_path / "x.safetensors"), "without this tensor"),
    ):
        assert sfp(*words) == 2
        assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_failed_delta_in_shards_leaves_the_old_one(tmp_path: Path, capsys: Capture) -> None:
    base = {name: array for name, array in arrays().items() if name != "flags"}
    before, after = sharded(tmp_path / "base", base), sharded(tmp_path / "new", stepped(base))
    assert sfp("pack", after, "-o", tmp_path / "new" / "packed.sfp") == 0
    words = (
        "delta",
        before,
        tmp_path / "new" / "packed.sfp.index.json",
        "-o",
        tmp_path / "d.sfp",
        "--sharded",
    )
    assert sfp(*words) == 0
    kept = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    last = tmp_path / "new" / "packed-00003-of-00003.sfp"
    damaged = bytearray(last.read_bytes())
    damaged[64] ^= 1
    last.write_bytes(damaged)
    assert sfp(*words) == 2
    assert "packed-00003-of-00003.sfp: E_CRC" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == kept


def test_shards_do_not_replace_those_of_the_base(tmp_path: Path, capsys: Capture) -> None:
    base = {name: array for name, array in arrays().items() if name != "flags"}
    before, after = sharded(tmp_path / "base", base), sharded(tmp_path / "new", stepped(base))
    assert sfp("delta", before, after, "-o", tmp_path / "d.sfp") == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    target = tmp_path / "base" / "model.safetensors"
    assert sfp("apply", before, tmp_path / "d.sfp", "-o", target, "--sharded") == 2
    assert "is an input file" in capsys.readouterr().err
    damaged = bytearray((tmp_path / "base" / "model-00002-of-00003.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "base" / "model-00002-of-00003.safetensors").write_bytes(damaged)
    assert sfp("apply", before, tmp_path / "d.sfp", "-o", tmp_path / "x.safetensors", "--sharded") == 2
    assert "E_BASE" in capsys.readouterr().err
    assert not list(tmp_path.glob("*x*"))
    (tmp_path / "base" / "model-00002-of-00003.safetensors").write_bytes(
        kept[tmp_path / "base" / "model-00002-of-00003.safetensors"]
    )
    assert {path: path.read_bytes() for path in (tmp_path / "base").iterdir()} == kept


def test_masks_levels_and_importances_come_through_apply_and_squash(tmp_path: Path, capsys: Capture) -> None:
    files = [tmp_path / f"m{n}.sfp" for n in (1, 2, 3)]
    for number, path in enumerate(files):
        path.write_bytes(file_of(model(number, 0.02 * number)))
    deltas = [tmp_path / f"d{n}.sfp" for n in (1, 2)]
    for delta, base, new in zip(deltas, files, files[1:], strict=False):
        assert sfp("delta", base, new, "-o", delta) == 0
    assert "with mask, levels or importance" in capsys.readouterr().out
    squashed, made = tmp_path / "d.sfp", tmp_path / "new.sfp"
    assert sfp("squash", files[0], *deltas, "-o", squashed) == 0
    for chain in (deltas, [squashed]):
        assert sfp("apply", files[0], *chain, "-o", made) == 0
        with SfpFile(made) as found, SfpFile(files[2]) as expected:
            assert list(found) == list(expected)
            for name in expected:
                same_parts(parts_of(found, name), parts_of(expected, name))
    assert sfp("diff", files[2], made) == 0
    assert sfp("diff", files[1], deltas[1]) == 1
    assert sfp("verify", *deltas, squashed, made) == 0
    capsys.readouterr()
    assert sfp("info", deltas[0], "--json") == 0
    described = json.loads(capsys.readouterr().out)["delta"]
    assert described["kinds"] == {"changed": 6}
    assert described["tensors"][0]["structure"]["quantiser"] == "exact"
    elements = tmp_path / "e.sfp"
    assert sfp("delta", files[0], files[1], "-o", elements, "--elements") == 0
    with SfpFile(elements) as file:
        assert file.directory.features == ("delta",)
