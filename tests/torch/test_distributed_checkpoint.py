"""``torch.distributed.checkpoint`` loads and saves `.sfp` files: FSDP2, tensor parallelism, one process."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sfpformat
from sfpformat import MismatchError, OptionError, Options, SfpWarning, Uniform
from sfpformat.decode.shards import ShardedFile
from sfpformat.torch import load_file, save_file, save_model
from sfpformat.torch.distributed_checkpoint import SfpStorageReader, SfpStorageWriter, objects
from sfpformat.torch.distributed_checkpoint import writer as writer_module

from ..support.checkpoint_group import GRID, OBJECTS, QUANTISED, WORLD, dcp, equal, llama
from .test_files import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
of_group = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
CHECKPOINTS = ("fsdp", "parallel", "async", "rounds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the checkpoints and the results of all processes."""
    out = tmp_path_factory.mktemp("checkpoint")
    words = [sys.executable, "-m", "tests.support.checkpoint_group", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return out


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def bytes_in(folder: Path, file: str) -> int:
    path = folder / file
    return path.stat().st_size if path.is_file() else sum(one.stat().st_size for one in path.glob("*.sfp"))


@of_group
@pytest.mark.parametrize("layout", ["fsdp", "parallel"])
@pytest.mark.parametrize("file", ["model.sfp", "shards/model.sfp.index.json"])
def test_each_process_reads_its_share_of_a_file_and_gets_its_parts(
    folder: Path, layout: str, file: str
) -> None:
    share = bytes_in(folder, str(Path(file).parent) if "/" in file else file) / WORLD
    for found in results(folder):
        has_bits, read = found[f"{layout}, {file}"]
        assert has_bits
        assert read <= 1.15 * share


@of_group
@pytest.mark.parametrize("layout", ["replicated", "both"])
def test_processes_on_a_grid_read_their_share_and_save_whole_tensors(folder: Path, layout: str) -> None:
    for rank in range(GRID):
        has_bits, read = json.loads((folder / f"grid-{rank}.json").read_text())[layout]
        assert has_bits
        assert read <= 1.15 * bytes_in(folder, "model.sfp") / GRID
    assert equal(load_file(folder / layout), load_file(folder / "model.sfp"))


@of_group
def test_a_checkpoint_of_fsdp_loads_into_tensor_parallelism_with_optimizer_and_objects(folder: Path) -> None:
    for found in results(folder):
        has_bits, read = found["fsdp to parallel"]
        assert has_bits
        assert read <= 1.15 * bytes_in(folder, "fsdp") / WORLD


@of_group
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_ordinary_readers_and_one_process_load_whole_tensors(folder: Path, name: str) -> None:
    tensors = load_file(folder / name)
    first = load_file(folder / "fsdp")
    assert tensors.keys() == first.keys()
    assert all(torch.equal(tensors[key], first[key]) for key in tensors)
    state: dict[str, Any] = {
        "model": dict(llama(9).state_dict()),
        "other": dict.fromkeys(OBJECTS) | {"none": {}},
    }
    state["other"] |= {"names": ["", 1, {"b": 0}], "rates": (0, 0, 0)}
    dcp.load(state, checkpoint_id=folder / name, storage_reader=SfpStorageReader())
    assert equal(state["other"], OBJECTS)
    own = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    assert equal(state["model"], own)
    momenta = [key for key in tensors if key.startswith("optim.") and key.endswith("exp_avg_sq")]
    assert len(momenta) == len(own)


@of_group
def test_many_rounds_other_groups_and_processes_alone_give_the_same_bits(folder: Path) -> None:
    for found in results(folder):
        assert found["many rounds"]
        assert found["few elements, a group"]
        assert found["alone"]
    assert load_file(folder / "own-0")["w"].tolist() == [0.0] * 3
    assert load_file(folder / "own-1")["w"].tolist() == [1.0] * 3


@of_group
def test_the_stored_tensors_do_not_depend_on_the_layout(folder: Path) -> None:
    for one, other in (("fsdp", "parallel"), ("quantised", "quantised-fsdp")):
        paths = [folder / path / "model.sfp.index.json" for path in (one, other)]
        with ShardedFile(paths[0]) as first, ShardedFile(paths[1]) as second:
            assert set(first) == set(second)
            for name in first:
                assert first.entry(name).chunks.tolist() == second.entry(name).chunks.tolist(), name
    info = sfpformat.open(folder / "quantised").info(f"model.{QUANTISED}")
    assert info.quantiser == "uniform"


@of_group
def test_damage_and_wrong_tensors_are_reported_in_all_processes(folder: Path) -> None:
    first, second = results(folder)
    assert "is another file than in process 0" in second["other files of processes"][1]
    one, other = first["damaged"]
    assert "InvalidFileError: E_CRC [R-LAY-004]" in one
    assert "tensor 'model.layers." in one
    assert "ProcessError: process" in other
    for name, words in {
        "no file": "No such file or directory",
        "missing": "Missing key in checkpoint state_dict: more",
        "shape": "Size mismatch",
        "delta": "is a delta and needs its base",
    }.items():
        assert all(words in text for text in first[name] + second[name]), name


@of_group
def test_a_failed_save_leaves_the_earlier_checkpoint_and_nothing_else(folder: Path) -> None:
    for found in results(folder):
        one, other = found["a process fails"]
        assert one == (
            "ProcessError: process 1 of 2 failed; no checkpoint was written: ValueError: the tensor is gone"
        )
        assert other == "ValueError: the tensor is gone"
        assert found["left"] == [
            "model-00001-of-00002.sfp",
            "model-00002-of-00002.sfp",
            "model.sfp.index.json",
        ]
        for name, words in {
            "object": "'what': a checkpoint in .sfp files has tensors, numbers, .*it is or has a set",
            "class": "'what': .*another class",
            "dtype": "tensor 'w': the format does not support the dtype torch.complex32",
            "option": f"options: no tensor is named '{QUANTISED}'",
            "other files": "has other .sfp files.*a.sfp",
        }.items():
            assert any(re.match(f"OptionError: .*{words}", text) for text in found[name]), found[name]
    assert load_file(folder / "old")["w"].tolist() == list(range(6))


# ------------------------------------------------------------------------------------------ one process


def test_one_process_saves_and_loads_every_dtype_and_shape(tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = ("float64", "float32", "bfloat16", "float8_e4m3fn", "int64", "int8", "bool", "complex64")
    state = {name: torch.randn(7, 5).to(getattr(torch, name)) for name in names}
    state |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "strided": torch.randn(6, 4).t()}
    dcp.save(state, storage_writer=SfpStorageWriter(), checkpoint_id=tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "model-00001-of-00001.sfp",
        "model.sfp.index.json",
    ]
    new = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(new, storage_reader=SfpStorageReader(tmp_path / "c"))
    assert_same(new, state)


def test_tied_names_of_a_model_load_from_the_one_that_is_stored(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    save_model(model, tmp_path / "tied.sfp")
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    dcp.load(state, storage_reader=SfpStorageReader(tmp_path / "tied.sfp"))
    assert equal(state, dict(model.state_dict()))


def test_another_dtype_is_converted_and_lost_values_are_warned_of(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0, 2.5]), "b": torch.tensor([1.0, 1e9])}, tmp_path / "m.sfp")
    state: dict[str, Any] = {"a": torch.zeros(2, dtype=torch.float64)}
    dcp.load(state, storage_reader=SfpStorageReader(tmp_path / "m.sfp"))
    assert state["a"].tolist() == [1.0, 2.5]
    state = {"b": torch.zeros(2, dtype=torch.float16)}
    with pytest.warns(SfpWarning, match="cannot represent all values of 'b'"):
        dcp.load(state, storage_reader=SfpStorageReader(tmp_path / "m.sfp"))


def test_a_smaller_group_removes_the_shards_of_the_earlier_checkpoint(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({f"w{number}": torch.ones(3)}, tmp_path / f"model-0000{number}-of-00002.sfp")
    files = {"w1": "model-00001-of-00002.sfp", "w2": "model-00002-of-00002.sfp"}
    (tmp_path / "model.sfp.index.json").write_text(json.dumps({"weight_map": files}))
    dcp.save({"w": torch.ones(2)}, storage_writer=SfpStorageWriter(tmp_path))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "model-00001-of-00001.sfp",
        "model.sfp.index.json",
    ]


def test_a_failed_rename_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dcp.save({"w": torch.ones(2)}, storage_writer=SfpStorageWriter(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise PermissionError("no renaming")

    monkeypatch.setattr(writer_module, "rename_all", fail)
    with pytest.raises(dcp.CheckpointException, match="no renaming"):
        dcp.save({"w": torch.zeros(2)}, storage_writer=SfpStorageWriter(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_options_and_metadata_are_those_of_save_file(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(64, 64), "b": torch.randn(64)}
    options = {"w": Options(Uniform(bits=4))}
    writer = SfpStorageWriter(tmp_path / "c", options=options, metadata={"of": "a test"})
    dcp.save(dict(tensors), storage_writer=writer)
    save_file(tensors, tmp_path / "plain.sfp", {"of": "a test"}, options=options)
    assert equal(load_file(tmp_path / "c"), load_file(tmp_path / "plain.sfp"))
    with sfpformat.open(tmp_path / "c") as file:
        assert file.metadata() == {"of": "a test"}


def test_arguments_that_cannot_work_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for writer in (SfpStorageWriter(), SfpStorageWriter(tmp_path / "file")):
        with pytest.raises(OptionError, match=r"pass a path|is a file, not a folder"):
            writer.set_up_storage_writer(True)
    with pytest.raises(OptionError, match="use_collectives=True"):
        SfpStorageWriter(tmp_path).set_up_storage_writer(True, rank=0, use_collectives=False)
    with pytest.raises(OptionError, match="pass a path"):
        SfpStorageReader().read_metadata()
    assert SfpStorageReader.validate_checkpoint_id(tmp_path)
    assert not SfpStorageReader.validate_checkpoint_id(tmp_path / "none")
    assert not SfpStorageWriter.validate_checkpoint_id(tmp_path / "file")


def test_a_planner_that_caches_its_plans_saves_again(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        state = {"w": torch.full((4,), float(number)), "n": number}
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(state, storage_writer=SfpStorageWriter(tmp_path / "c"), planner=planner)
        assert load_file(tmp_path / "c")["w"].tolist() == [float(number)] * 4


SIMPLE: list[object] = [None, True, 7, -(10**30), 0.1, -0.0, math.inf, -math.inf, math.nan, "ü", [], (), {}]
NESTED: list[object] = [(1, [2, (3,)]), {"a": {1: (None,)}, (1, 2): [0.5]}, {"dict": 1}]
DAMAGED = ["", "{", '{"list": 1}', '{"float": "1"}', '{"dict": [[[], 1]]}', "[" * 5000]


@pytest.mark.parametrize("value", [*SIMPLE, *NESTED, {"tuple": [1], "float": "nan"}])
def test_objects_keep_their_value_and_type(value: object) -> None:
    data = io.BytesIO()
    torch.save(value, data)
    text = objects.text_of("x", data)
    back = torch.load(objects.data_of("x", text), weights_only=True)
    assert repr(back) == repr(value)


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_object_is_refused(text: str) -> None:
    with pytest.raises(MismatchError, match="the object 'x' of the checkpoint is not readable"):
        objects.data_of("x", text)
