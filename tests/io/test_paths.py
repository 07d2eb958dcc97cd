"""Every entry point accepts a file, an index of shards, or a folder with one of these."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sfp_conformance.forge import exact, hand_file, hand_part, table
from torch.utils.data import Dataset

import sfpformat
import sfpformat.numpy
from conformance.recipes.samples import importance, weights
from sfpformat import MismatchError, OptionError, Options, SfpError, SfpFile, ShardedFile
from sfpformat.cli import main
from sfpformat.cli.model_files import open_model
from sfpformat.decode.shard_index import ShardIndex
from sfpformat.io.paths import models_in
from sfpformat.io.source import MOST_PICKLED
from sfpformat.numpy import save, save_file
from sfpformat.options import ImportanceOptions
from sfpformat.pruning.repruning import reprune
from sfpformat.pruning.thresholds import Sparsity

from ..cli.test_main import error_of, make, run
from ..support.clauses import clauses

torch = pytest.importorskip("torch")
sfp_torch = pytest.importorskip("sfpformat.torch")

Capture = pytest.CaptureFixture[str]
TENSORS: dict[str, np.ndarray] = {
    "a": weights(40, 60),
    "b": weights(30, 50, seed=1),
    "c": np.arange(100, dtype=np.int32),
}
SHARDS = {"m-00001-of-00002.sfp": ("a", "c"), "m-00002-of-00002.sfp": ("b",)}
HOW = Options(coding="fingerprint", importance=ImportanceOptions())


def part(names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of `save_file` for some of the tensors."""
    floats = [name for name in names if TENSORS[name].dtype.kind == "f"]
    return {
        "tensors": {name: TENSORS[name] for name in names},
        "options": dict.fromkeys(floats, HOW),
        "importances": {name: importance(*TENSORS[name].shape) for name in floats},
    }


def in_one_file(folder: Path) -> Path:
    """The model in one file."""
    save_file(path=folder / "one.sfp", **part(tuple(TENSORS)))
    return folder / "one.sfp"


def in_shards(folder: Path) -> Path:
    """Writes the model in two shards. Returns the path of the index."""
    weight_map: dict[str, str] = {}
    for file_name, names in SHARDS.items():
        save_file(path=folder / file_name, **part(names))
        weight_map |= dict.fromkeys(names, file_name)
    path = folder / "m.sfp.index.json"
    path.write_bytes(ShardIndex(weight_map, {"total_size": 1}).to_bytes())
    return path


PATHS: dict[str, Callable[[Path], Path]] = {
    "file": in_one_file,
    "index": in_shards,
    "folder with a file": lambda folder: in_one_file(folder).parent,
    "folder with an index": lambda folder: in_shards(folder).parent,
}


@pytest.fixture(params=PATHS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A path of each kind to the model."""
    folder = tmp_path / "model"
    folder.mkdir()
    return PATHS[request.param](folder)


def same(found: dict[str, Any]) -> None:
    """Asserts that tensors are those of the model."""
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert np.array_equal(np.asarray(found[name]), array)


# ------------------------------------------------------------------------------------------------ every path


@pytest.mark.parametrize("as_text", [False, True])
def test_every_function_accepts_every_kind_of_path(model: Path, as_text: bool) -> None:
    path: Any = str(model) if as_text else model
    with sfpformat.open(path) as file:
        same(file.get_tensors())
    same(sfpformat.numpy.load_file(path))
    same(sfp_torch.load_file(path))
    with sfp_torch.safe_open(path) as opened:
        same(opened.get_tensors())
    module = torch.nn.Module()
    for name, array in TENSORS.items():
        module.register_buffer(name, torch.zeros(array.shape, dtype=torch.from_numpy(array).dtype))
    sfp_torch.load_model(module, path)
    same(module.state_dict())
    report = sfpformat.validate(path)
    assert (report.ok, report.canonical, report.tensors) == (True, True, 3)
    assert report.bytes == sum(file.stat().st_size for file in folder_of(model).iterdir())


def folder_of(path: Path) -> Path:
    """The folder of the model."""
    return path if path.is_dir() else path.parent


def test_every_command_accepts_every_kind_of_path(model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run("info", model) == 0
    assert "3 tensors" in capsys.readouterr().out
    assert run("verify", model, "--canonical") == 0
    assert run("unpack", model, "-o", tmp_path / "n.safetensors") == 0
    assert run("diff", model, tmp_path / "n.safetensors") == 0
    assert run("diff", tmp_path / "n.safetensors", model) == 0
    assert run("prune", model, "--sparsity", "0.8", "-o", tmp_path / "p.sfp", "--single") == 0
    pruned = sfpformat.numpy.load_file(tmp_path / "p.sfp")
    assert sum(int((pruned[name] == 0).sum()) for name in "ab") == round(0.8 * 3900)


def test_every_entry_point_refuses_a_folder_with_several_models(tmp_path: Path, capsys: Capture) -> None:
    in_shards(tmp_path)
    in_one_file(tmp_path)
    assert models_in(tmp_path) == ["m.sfp.index.json", "one.sfp"]
    names = "'m.sfp.index.json', 'one.sfp'"
    functions: list[Callable[[Path], object]] = [
        sfpformat.open,
        sfpformat.validate,
        sfpformat.numpy.load_file,
        sfp_torch.load_file,
        sfp_torch.safe_open,
    ]
    for function in functions:
        with pytest.raises(OptionError, match=f"several models; name one of {names}"):
            function(tmp_path)
    for words in (["info"], ["verify"], ["unpack", "-o", "x.safetensors"], ["diff", tmp_path]):
        assert names in error_of(capsys, *words, tmp_path)
    assert names in error_of(capsys, "prune", tmp_path, "--sparsity", "0.5", "-o", "x.sfp")


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "m.sfp").mkdir()
    (tmp_path / "m.sfp.partial").touch()
    for function in (sfpformat.open, sfpformat.validate, sfpformat.numpy.load_file, sfp_torch.load_file):
        with pytest.raises(OptionError, match=r"has no \.sfp file and no \.sfp\.index\.json"):
            function(tmp_path)
    assert "has no .sfp" in error_of(capsys, "verify", tmp_path)


def test_shards_without_their_index_count_as_several_models(tmp_path: Path) -> None:
    in_shards(tmp_path).unlink()
    with pytest.raises(OptionError, match="several models; name one of 'm-00001"):
        sfpformat.open(tmp_path)


def test_each_command_selects_its_kind_in_a_folder_with_both(tmp_path: Path, capsys: Capture) -> None:
    make(tmp_path / "m.safetensors", TENSORS)
    assert run("pack", tmp_path, "-o", tmp_path / "m.sfp") == 0
    assert run("pack", tmp_path, "-o", tmp_path / "m.sfp") == 0
    assert run("info", tmp_path) == 0
    assert run("verify", tmp_path) == 0
    assert run("unpack", tmp_path, "-o", tmp_path / "n.safetensors") == 0
    capsys.readouterr()
    assert "several models" in error_of(capsys, "diff", tmp_path, tmp_path)
    with open_model(tmp_path, kind="sfp") as model:
        assert model.path.name == "m.sfp"
    with pytest.raises(Exception, match=r"n\.safetensors"):
        open_model(tmp_path, kind="safetensors")


def test_an_index_of_safetensors_is_refused_by_sfp_readers(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "sub/model-00001-of-00001.safetensors"}}))
    for function in (sfpformat.open, sfpformat.numpy.load_file, sfp_torch.load_file):
        with pytest.raises(SfpError, match=r"'sfp pack' converts them to \.sfp"):
            function(index)


# ------------------------------------------------------------------------------------------------ validating


@clauses("R-STR-006", "R-SHD-001")
def test_validating_a_sharded_model_names_every_fault_with_its_shard(tmp_path: Path) -> None:
    index = in_shards(tmp_path)
    first, second = (tmp_path / name for name in SHARDS)
    for path in (first, second):
        data = bytearray(path.read_bytes())
        data[70] ^= 1
        path.write_bytes(data)
    calls: list[tuple[int, int]] = []
    report = sfpformat.validate(index, progress=lambda *done: calls.append(done))
    assert [(fault.clause, fault.tensor, fault.offset) for fault in report.faults] == [
        ("R-LAY-004", "a", 64),
        ("R-LAY-004", "b", 64),
    ]
    for fault, path in zip(report.faults, (first, second), strict=True):
        assert f"in '{path.name}'" in str(fault)
    assert calls == sorted(calls)
    assert calls[-1] == (report.bytes, report.bytes)
    # All misplaced tensors are reported, except those of a shard that cannot be read.
    index.write_bytes(ShardIndex({"a": second.name, "b": first.name, "x": second.name}, {}).to_bytes())
    clauses_of = [(fault.clause, fault.tensor) for fault in sfpformat.validate(tmp_path).faults]
    assert clauses_of[:4] == [("R-SHD-001", name) for name in ("a", "c", "b", "x")]
    second.write_bytes(second.read_bytes()[:-1])
    found = [(fault.clause, fault.tensor) for fault in sfpformat.validate(index).faults]
    assert found[:2] == [("R-SHD-001", "a"), ("R-SHD-001", "c")]
    assert "R-PRE-007" in [clause for clause, _ in found]


def test_notes_of_shards_name_the_shard_after_the_clause(tmp_path: Path) -> None:
    name = "m-00001-of-00001.sfp"
    unused = exact("F32", **table([0, 0, 0], [0, 1, 1]))
    entry = {"dtype": "F32", "shape": [64], "segment": 64, "chunk": 1, "fingerprints": unused}
    (tmp_path / name).write_bytes(hand_file(hand_part(entry, {"fingerprints": [1, 2] * 32})))
    index = tmp_path / "m.sfp.index.json"
    index.write_bytes(ShardIndex(dict.fromkeys(names_of(tmp_path / name), name), {}).to_bytes())
    alone = sfpformat.validate(tmp_path / name)
    assert alone.notes
    whole = sfpformat.validate(index)
    assert whole.notes == [note.replace("] ", f"] in '{name}': ") for note in alone.notes]


def test_shards_after_a_missing_one_are_checked_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = in_shards(tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*-of-*.sfp"))
    (tmp_path / names[0]).unlink()
    data = bytearray((tmp_path / names[-1]).read_bytes())
    data[70] ^= 1  # in the first chunk
    (tmp_path / names[-1]).write_bytes(data)
    report = sfpformat.validate(index)
    assert [fault.clause for fault in report.faults] == ["R-SHD-001", "R-LAY-004"]
    assert f"{names[0]!r} cannot be read: No such file" in str(report.faults[0])
    assert main(["verify", str(index)]) == 2
    told = capsys.readouterr()
    assert f"{names[0]}: No such file" in told.err
    assert all(name in told.out for name in names[1:])
    assert "R-LAY-004" in told.out


# --------------------------------------------------------------------------------------------- one interface


def public(kind: type) -> dict[str, Any]:
    """The public methods of a class."""
    found = inspect.getmembers(
        kind, lambda member: inspect.isfunction(member) or isinstance(member, property)
    )
    return {name: member for name, member in found if not name.startswith("_")}


def test_a_sharded_model_has_the_methods_of_a_file() -> None:
    file, model = public(SfpFile), public(ShardedFile)
    assert file.keys() == model.keys()
    for name, method in file.items():
        if inspect.isfunction(method):
            assert inspect.signature(method) == inspect.signature(model[name]), name


def test_a_sharded_model_returns_the_same_as_one_file(tmp_path: Path) -> None:
    with SfpFile(in_one_file(tmp_path)) as file, ShardedFile(in_shards(tmp_path)) as model:
        assert model.limits == file.limits
        assert sorted(model) == sorted(file)
        wanted_here, wanted_there = [], []
        for name in ("b", "a"):
            here, there = file.entry(name), model.entry(name)
            assert model.info(name) == file.info(name)
            shard: object = model.file_of(name)
            assert shard is not model
            assert file.file_of(name) is file
            assert file.read_checked(here, 0).tobytes() == model.read_checked(there, 0).tobytes()
            assert model.chunk_offset(there, 0) >= 64
            assert file.read_head(here, 0).positions.tolist() == model.read_head(there, 0).positions.tolist()
            assert model.decoder(there).entry is there
            positions, values = file.get_survivors(name)
            again = model.get_survivors(name)
            assert positions.tolist() == again[0].tolist()
            assert values.tobytes() == again[1].tobytes()
            kept, kept_again = file.get_importance(name), model.get_importance(name)
            assert kept is not None
            assert kept_again is not None
            assert kept.tobytes() == kept_again.tobytes()
            assert file.get_slice(name)[3:9, ::2].tobytes() == model.get_slice(name)[3:9, ::2].tobytes()
            out = np.empty_like(TENSORS[name])
            model.read_into({name: out})
            assert out.tobytes() == TENSORS[name].tobytes()
            wanted_here.append((here, 0))
            wanted_there.append((there, 0))
        chunks = zip(file.read_chunks(wanted_here), model.read_chunks(wanted_there), strict=True)
        assert all(one.tobytes() == other.tobytes() for one, other in chunks)
        with pytest.raises(sfpformat.MissingTensorError, match="'x'"):
            file.file_of("x")


# --------------------------------------------------------------------------------------------------- pruning


def test_a_sharded_model_is_pruned_to_the_same_tensors_as_one_file(tmp_path: Path, capsys: Capture) -> None:
    one, index = in_one_file(tmp_path), in_shards(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    assert run("prune", one, "--sparsity", "0.6", "-o", out / "one.sfp") == 0
    assert run("prune", index, "--sparsity", "0.6", "-o", out / "p.sfp") == 0
    assert "→ p.sfp.index.json" in capsys.readouterr().out
    names = ["one.sfp", "p-00001-of-00002.sfp", "p-00002-of-00002.sfp", "p.sfp.index.json"]
    assert sorted(os.listdir(out)) == names
    whole = sfpformat.numpy.load_file(out / "one.sfp")
    assert sum(int((whole[name] == 0).sum()) for name in "ab") == round(0.6 * 3900)
    with ShardedFile(out / "p.sfp.index.json") as pruned:
        assert {name: tuple(file) for name, file in pruned.files.items()} == {
            name.replace("m-", "p-"): names for name, names in SHARDS.items()
        }
        assert pruned.index.metadata == {"total_size": sum(array.nbytes for array in TENSORS.values())}
        for name, array in whole.items():
            assert pruned.get_tensor(name).tobytes() == array.tobytes()
    assert sfpformat.validate(out / "p.sfp.index.json").canonical


@clauses("R-STR-005", "R-SHD-003")
def test_a_failed_pruning_of_shards_writes_no_file(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = in_shards(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    told = error_of(capsys, "prune", index, "--sparsity", "0.6", "-o", tmp_path / "m.sfp")
    assert "is an input file" in told
    with ShardedFile(index) as model:
        with pytest.raises(OptionError, match="single=True"):
            reprune(model, tmp_path / "p.bin", Sparsity(0.5))

        def damaged(*_: object) -> None:
            raise OSError("gone")

        monkeypatch.setattr(model.files["m-00002-of-00002.sfp"], "read_checked", damaged)
        with pytest.raises(OSError, match="gone"):
            reprune(model, tmp_path / "p.sfp", Sparsity(0.5), exempt=["b"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_unknown_keys_of_a_pruned_tensor_are_kept(tmp_path: Path) -> None:
    with sfpformat.Writer(tmp_path / "m.sfp") as writer:
        writer.add("a", TENSORS["a"], HOW, importance=importance(40, 60), other={"x-who": "me"})
    with SfpFile(tmp_path / "m.sfp") as file:
        reprune(file, tmp_path / "p.sfp", Sparsity(0.5))
    with SfpFile(tmp_path / "p.sfp") as file:
        assert file.info("a").unknown == {"x-who": "me"}


# -------------------------------------------------------------------------------------------------- pickling


def again(thing: Any) -> Any:
    """Pickles and unpickles an object."""
    return pickle.loads(pickle.dumps(thing))


def test_unpickled_handles_are_open(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder_of(model))
    path = os.path.relpath(model) if model.is_dir() else model.name
    settings: dict[str, Any] = {
        "limits": sfpformat.Limits(tensors=77),
        "engine": "python",
        "threads": 1,
    }
    with sfpformat.open(path, **settings) as file, sfp_torch.safe_open(path, **settings) as opened:
        monkeypatch.chdir("/")  # a worker may have another folder as its own
        with again(file) as found:
            same(found.get_tensors())
            assert type(found) is type(file)
            assert found.limits == file.limits
        with again(opened) as found:
            same(found.get_tensors())
            assert found.device == opened.device
        for part_of in (file.get_slice("a"), opened.get_slice("a")):
            assert np.array_equal(np.asarray(again(part_of)[3:9, ::2]), TENSORS["a"][3:9, ::2])
        one, other = again([file.get_slice("a"), file.get_slice("b")])
        assert one.get_shape() == [40, 60]
        if isinstance(file, SfpFile):
            assert one._file is other._file


def test_small_in_memory_files_can_be_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    data = save(TENSORS)
    for readable in (data, bytearray(data), memoryview(data)):
        with sfpformat.open(readable) as file, again(file) as found:
            same(found.get_tensors())
    assert MOST_PICKLED == 1 << 26
    monkeypatch.setattr("sfpformat.io.source.MOST_PICKLED", len(data) - 1)
    with sfpformat.open(data) as file, pytest.raises(OptionError, match="open it by its path"):
        pickle.dumps(file)


def test_pickling_a_stream_or_a_closed_file_raises(model: Path, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "m.sfp")
    with (
        (tmp_path / "m.sfp").open("rb") as stream,
        sfpformat.open(stream) as file,
        pytest.raises(OptionError, match="stream cannot be pickled"),
    ):
        pickle.dumps(file)
    handle = sfpformat.open(model)
    handle.close()
    with pytest.raises(sfpformat.ClosedFileError, match="closed"):
        pickle.dumps(handle)
    with sfpformat.open(save(TENSORS)) as closed:
        pass
    with pytest.raises(sfpformat.ClosedFileError, match="closed"):
        pickle.dumps(closed)


def test_unpickling_a_handle_of_a_rewritten_file_raises_mismatch(model: Path) -> None:
    with sfpformat.open(model) as file, sfp_torch.safe_open(model) as opened:
        pickles = [pickle.dumps(file), pickle.dumps(opened), pickle.dumps(opened.get_slice("b"))]
    changed = next(
        path for path in sorted(folder_of(model).iterdir()) if path.suffix == ".sfp" and "b" in names_of(path)
    )
    os.utime(changed)  # only its time changes
    for data in pickles:
        pickle.loads(data)
    with sfpformat.open(changed) as old:
        tensors = old.get_tensors()
    tensors["b"] = np.negative(tensors["b"])
    save_file(tensors, changed)
    for data in pickles:
        with pytest.raises(MismatchError, match="has changed since the open file was pickled"):
            pickle.loads(data)
    shutil.rmtree(folder_of(model))
    for data in pickles:
        with pytest.raises(FileNotFoundError):
            pickle.loads(data)


def names_of(path: Path) -> list[str]:
    """The tensors of a file."""
    with SfpFile(path) as file:
        return file.keys()


class Rows(Dataset[Any]):
    """A dataset that holds an open file."""

    def __init__(self, path: Path) -> None:
        self.file = sfp_torch.safe_open(path)
        self.rows = self.file.get_slice("a")

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> Any:
        return self.rows[row]


def test_spawned_workers_read_from_an_open_file(tmp_path: Path) -> None:
    data = Rows(in_shards(tmp_path))
    loader = torch.utils.data.DataLoader(data, num_workers=1, multiprocessing_context="spawn")
    found = torch.cat(list(loader))
    assert found.numpy().tobytes() == TENSORS["a"][:4].tobytes()
    data.file.close()
