"""Indexes of safetensors that disagree with their files, and files in folders below their index."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sfpformat
from sfpformat.decode.shard_index import ShardIndex
from sfpformat.decode.shards import ShardedFile
from sfpformat.errors import InvalidFileError
from sfpformat.io.safetensors import SafetensorsError

from .test_main import error_of, run

Capture = pytest.CaptureFixture[str]

A, B = "x-1.safetensors", "x-2.safetensors"


def array(value: int) -> np.ndarray[Any, Any]:
    """A small tensor that is identified by its value."""
    return np.full((2, 2), value, np.float32)


def checkpoint(folder: Path, files: dict[str, dict[str, int]], weight_map: dict[str, str]) -> Path:
    """A checkpoint in several files.

    Args:
        files: file name -> tensor name -> the value of all its elements.
        weight_map: of the index.
    """
    for name, tensors in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({tensor: array(value) for tensor, value in tensors.items()}, folder / name)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def packed(source: Path, target: Path, *words: str) -> dict[str, int]:
    """Packs a checkpoint and returns its tensors, each as the value of all its elements."""
    assert run("pack", source, "-o", target, *words, "--verify") == 0
    with sfpformat.open(target) if target.exists() else ShardedFile(f"{target}.index.json") as file:
        return {name: int(file.get_tensor(name)[0, 0]) for name in file}


CASES: dict[str, tuple[dict[str, dict[str, int]], dict[str, str], dict[str, int], str]] = {
    "omitted": (
        {A: {"a": 1}, B: {"b": 2, "mtp": 3}},
        {"a": A, "b": B},
        {"a": 1, "b": 2},
        "skipped because the index does not list them (1): 'mtp'",
    ),
    "listed, but nowhere": (
        {A: {"a": 1}, B: {"b": 2}},
        {"a": A, "b": B, "mtp": B},
        {"a": 1, "b": 2},
        "skipped because no file has them (1): 'mtp'",
    ),
    "in two files": (
        {A: {"a": 1}, B: {"b": 2, "a": 3}},
        {"a": A, "b": B},
        {"a": 1, "b": 2},
        "in several files, read from the one that the index names (1): 'a'",
    ),
    "in two files, the second right": (
        {A: {"a": 1, "c": 4}, B: {"b": 2, "a": 3}},
        {"a": B, "b": B, "c": A},
        {"c": 4, "a": 3, "b": 2},
        "in several files, read from the one that the index names (1): 'a'",
    ),
    "in another file": (
        {A: {"a": 1, "b": 2}, B: {"c": 3}},
        {"a": A, "b": B, "c": B},
        {"a": 1, "b": 2, "c": 3},
        "read from another file than the index names (1): 'b'",
    ),
}


@pytest.mark.parametrize(("files", "weight_map", "expected", "told"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("single", [True, False])
def test_the_index_takes_precedence_and_a_warning_names_the_tensors(
    files: dict[str, dict[str, int]],
    weight_map: dict[str, str],
    expected: dict[str, int],
    told: str,
    single: bool,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    index = checkpoint(tmp_path, files, weight_map)
    assert packed(index, tmp_path / "m.sfp", *(["--single"] if single else [])) == expected
    err = capsys.readouterr().err
    assert err == f"sfp: warning: {index}: tensors {told}; with --strict-index this is an error\n"
    out = tmp_path / "m.sfp" if single else tmp_path / "m.sfp.index.json"
    assert run("verify", out) == 0
    assert run("diff", index, out) == 0
    assert run("unpack", out, "-o", tmp_path / "back.safetensors") == 0
    assert {name: int(t[0, 0]) for name, t in load_file(tmp_path / "back.safetensors").items()} == expected


@pytest.mark.parametrize(("files", "weight_map", "expected", "told"), CASES.values(), ids=CASES)
def test_strict_index_makes_every_command_refuse_an_inconsistent_index(
    files: dict[str, dict[str, int]],
    weight_map: dict[str, str],
    expected: dict[str, int],
    told: str,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    index = checkpoint(tmp_path, files, weight_map)
    name = told.rpartition(" ")[2]
    before = sorted(os.listdir(tmp_path))
    for words in (
        ("pack", index, "-o", tmp_path / "m.sfp"),
        ("pack", tmp_path / A, "-o", tmp_path / "m.sfp", "--importance", index),
        ("diff", index, index),
        ("bench", index),
    ):
        assert f"tensor {name}: " in error_of(capsys, *words, "--strict-index")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_consistent_index_is_packed_without_a_warning(tmp_path: Path, capsys: Capture) -> None:
    index = checkpoint(tmp_path, {A: {"a": 1}, B: {"b": 2}}, {"a": A, "b": B})
    assert packed(index, tmp_path / "m.sfp", "--strict-index") == {"a": 1, "b": 2}
    assert capsys.readouterr().err == ""


def test_a_warning_lists_some_names_and_counts_the_rest(tmp_path: Path, capsys: Capture) -> None:
    many = {f"layers.{i:04}.mtp": i for i in range(3000)}
    index = checkpoint(tmp_path, {A: {"a": 1} | many, B: {"b": 2}}, {"a": A, "b": B})
    assert packed(index, tmp_path / "m.sfp") == {"a": 1, "b": 2}
    err = capsys.readouterr().err
    assert "(3,000): 'layers.0000.mtp'," in err
    assert "and 2,990 more; with --strict-index" in err
    assert len(err) - len(str(tmp_path)) < 600


def test_an_index_of_another_model_is_refused(tmp_path: Path, capsys: Capture) -> None:
    index = checkpoint(tmp_path, {A: {"a": 1}}, {"c": A, "d": A})
    assert "none of the tensors that the index lists" in error_of(
        capsys, "pack", index, "-o", tmp_path / "m.sfp"
    )


def test_a_file_without_indexed_tensors_is_not_packed(tmp_path: Path, capsys: Capture) -> None:
    index = checkpoint(tmp_path, {A: {"a": 1}, B: {"b": 2}}, {"a": A, "c": B})
    (tmp_path / "out").mkdir()
    assert run("pack", index, "-o", tmp_path / "out" / "m.sfp") == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["m.sfp"]


def test_a_shard_that_the_index_does_not_name_is_skipped_with_a_warning(
    tmp_path: Path, capsys: Capture
) -> None:
    names = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    index = checkpoint(tmp_path, {name: {name[6:11]: 1} for name in names}, {n[6:11]: n for n in names[:2]})
    save_file({"a": array(1)}, tmp_path / "consolidated.safetensors")
    assert run("pack", tmp_path, "-o", tmp_path / "m.sfp") == 0
    assert f"files skipped because the index does not name them (1): '{names[2]}'" in capsys.readouterr().err
    told = error_of(capsys, "pack", index, "-o", tmp_path / "m.sfp", "--strict-index")
    assert f"the index does not name the file '{names[2]}'" in told


def test_a_missing_file_of_the_index_is_refused(tmp_path: Path, capsys: Capture) -> None:
    index = checkpoint(tmp_path, {A: {"a": 1}, B: {"b": 2}}, {"a": A, "b": B})
    (tmp_path / B).unlink()
    assert f"{B}: No such file" in error_of(capsys, "pack", index, "-o", tmp_path / "m.sfp")


# ---------------------------------------------------------------------------------------------- subfolders


def test_files_in_folders_below_the_index_are_packed(tmp_path: Path, capsys: Capture) -> None:
    files = {"text_encoder/model.safetensors": {"t": 1}, "unet/a/model.safetensors": {"u": 2}, A: {"a": 3}}
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    index = checkpoint(tmp_path, files, weight_map)
    (tmp_path / "out").mkdir()
    assert packed(index, tmp_path / "out" / "m.sfp", "--strict-index") == {"t": 1, "u": 2, "a": 3}
    assert capsys.readouterr().err == ""
    shards = [f"m-{i:05}-of-00003.sfp" for i in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path / "out")) == [*shards, "m.sfp.index.json"]
    assert run("diff", index, tmp_path / "out") == 0


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/x.safetensors",
        "a/../../x.safetensors",
        "a//x",
        "./x",
        "a/",
        "",
        ".",
        "a\\x",
        "x\0",
    ],
)
def test_a_file_outside_the_folder_of_the_index_is_refused(
    name: str, tmp_path: Path, capsys: Capture
) -> None:
    index = checkpoint(tmp_path, {}, {"a": name})
    told = error_of(capsys, "pack", index, "-o", tmp_path / "m.sfp")
    assert "not a path inside the folder of the index" in told
    with pytest.raises(SafetensorsError):
        ShardIndex.read(index, subfolders=True)


def test_a_folder_that_links_outside_is_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").mkdir()
    save_file({"a": array(1)}, tmp_path / "secret" / A)
    (tmp_path / "model" / "in").symlink_to("../secret")
    index = checkpoint(tmp_path / "model", {}, {"a": f"in/{A}"})
    assert "is a link to a folder outside that of the index" in error_of(
        capsys, "pack", index, "-o", tmp_path / "m.sfp"
    )


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "1"
    (snapshot / "unet").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    index = checkpoint(tmp_path / "blobs", {A: {"a": 1}}, {"a": "unet/model.safetensors"})
    (snapshot / "unet" / "model.safetensors").symlink_to(f"../../../blobs/{A}")
    (snapshot / index.name).symlink_to(f"../../blobs/{index.name}")
    assert packed(snapshot / index.name, tmp_path / "m.sfp") == {"a": 1}


def test_indexes_of_sfp_files_must_have_plain_names_and_be_consistent(tmp_path: Path) -> None:
    text = json.dumps({"metadata": {}, "weight_map": {"a": "in/m.sfp"}})
    (tmp_path / "m.sfp.index.json").write_text(text)
    for command in ("info", "verify"):
        assert run(command, tmp_path / "m.sfp.index.json") == (1 if command == "verify" else 2)
    with pytest.raises(InvalidFileError, match="R-SHD-002"):
        ShardedFile(tmp_path / "m.sfp.index.json")
