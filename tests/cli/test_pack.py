"""``sfp pack`` and ``sfp unpack``: bits are restored, and requested changes are made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import sfpformat
from sfpformat.decode.shards import ShardedFile
from sfpformat.dtypes import DTYPES
from sfpformat.io.atomic import replacing
from sfpformat.io.safetensors import TensorSpec, write_tensors

from .test_main import Arrays, checkpoint, error_of, make, run, sharded

Capture = pytest.CaptureFixture[str]


def packed(folder: Path, *words: object, arrays: Arrays | None = None) -> sfpformat.SfpFile:
    """Packs a checkpoint with these arguments and returns the path of the `.sfp` file."""
    source = make(folder / "m.safetensors", arrays)
    assert run("pack", source, "-o", folder / "m.sfp", *words) == 0
    file = sfpformat.open(folder / "m.sfp")
    assert isinstance(file, sfpformat.SfpFile)
    return file


def assert_bits(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
    """Asserts that dtype, shape and bits are equal."""
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


# ----------------------------------------------------------------------------------------------- lossless


def test_packing_and_unpacking_restores_the_file_byte_for_byte(tmp_path: Path, capsys: Capture) -> None:
    source = make(tmp_path / "m.safetensors", metadata={"format": "pt"})
    assert run("pack", source, "-o", tmp_path / "m.sfp", "--verify") == 0
    assert run("unpack", tmp_path / "m.sfp", "-o", tmp_path / "n.safetensors") == 0
    assert (tmp_path / "n.safetensors").read_bytes() == source.read_bytes()
    out, err = capsys.readouterr()
    assert "ratio" in out
    assert "verified" in out
    assert err == ""
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors", "m.sfp", "n.safetensors"]


ODD: Arrays = {
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.array(2.5, np.float64),
    "nan": np.full((70, 70), np.nan, np.float32),
    "signed zeros": np.where(np.arange(5000) % 2, 0.0, -0.0).astype(np.float32).reshape(50, 100),
    "bf16": np.linspace(-3, 3, 6000).astype(ml_dtypes.bfloat16).reshape(60, 100),
    "fp8": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
    "bool": np.arange(9) % 2 == 0,
    "ünï[code]*": np.ones(3, np.uint64),
}


def test_scalars_empty_tensors_and_odd_dtypes_are_restored(tmp_path: Path) -> None:
    specs = [
        TensorSpec(n, next(d for d in DTYPES.values() if d.numpy == a.dtype), a.shape) for n, a in ODD.items()
    ]
    with replacing(tmp_path / "m.safetensors") as file:
        write_tensors(file, specs, {}, iter(ODD.values()))
    assert run("pack", tmp_path / "m.safetensors", "-o", tmp_path / "m.sfp", "--verify") == 0
    with sfpformat.open(tmp_path / "m.sfp") as sfp:
        assert sfp.keys() == list(ODD)
        for name, array in ODD.items():
            assert_bits(sfp.get_tensor(name), array)
    assert run("diff", tmp_path / "m.safetensors", tmp_path / "m.sfp") == 0


def test_a_checkpoint_without_tensors_is_packed(tmp_path: Path) -> None:
    with packed(tmp_path, "--verify", arrays={}) as sfp:
        assert sfp.keys() == []
    assert run("unpack", tmp_path / "m.sfp", "-o", tmp_path / "n.safetensors") == 0
    assert run("info", tmp_path / "m.sfp") == 0
    assert load_file(tmp_path / "n.safetensors") == {}


def test_metadata_are_kept_and_can_be_extended(tmp_path: Path) -> None:
    source = make(tmp_path / "m.safetensors", metadata={"format": "pt", "a": "old"})
    assert run("pack", source, "-o", tmp_path / "m.sfp", "--metadata", "a=b=c", "--metadata", "d=") == 0
    with sfpformat.open(tmp_path / "m.sfp") as sfp:
        assert sfp.metadata() == {"format": "pt", "a": "b=c", "d": ""}
    assert run("unpack", tmp_path / "m.sfp", "-o", tmp_path / "n.safetensors") == 0
    with safe_open(tmp_path / "n.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", "a": "b=c", "d": ""}


def test_json_prints_the_summary_as_an_object(tmp_path: Path, capsys: Capture) -> None:
    with packed(tmp_path, "--json", "--prune", "0.5", "--verify"):
        pass
    summary = json.loads(capsys.readouterr().out)
    assert summary["outputs"] == [str(tmp_path / "m.sfp")]
    assert summary["output_bytes"] == (tmp_path / "m.sfp").stat().st_size
    assert summary["input_bytes"] == (tmp_path / "m.safetensors").stat().st_size
    assert summary["verified"] is True
    assert summary["resumed_tensors"] == 0
    assert 0.45 < summary["sparsity"] < 0.5


def test_a_link_is_followed_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "real.sfp").write_bytes(b"old")
    (tmp_path / "m.sfp").symlink_to(tmp_path / "d" / "real.sfp")
    with packed(tmp_path) as sfp:
        assert len(sfp) == 6
    assert (tmp_path / "m.sfp").is_symlink()


def test_outputs_that_must_not_be_replaced_are_refused(tmp_path: Path, capsys: Capture) -> None:
    source = make(tmp_path / "m.safetensors")
    assert "not a regular file" in error_of(capsys, "pack", source, "-o", os.devnull)
    assert "no folder" in error_of(capsys, "pack", source, "-o", tmp_path / "no" / "m.sfp")
    assert run("pack", source, "-o", tmp_path / "m.sfp") == 0
    capsys.readouterr()
    assert "is already an .sfp file" in error_of(capsys, "pack", tmp_path / "m.sfp", "-o", tmp_path / "n.sfp")
    assert "already a safetensors file" in error_of(
        capsys, "unpack", source, "-o", tmp_path / "n.safetensors"
    )
    os.link(source, tmp_path / "same.sfp")
    assert "is an input file" in error_of(capsys, "pack", source, "-o", tmp_path / "same.sfp")
    os.link(tmp_path / "m.sfp", tmp_path / "same.safetensors")
    told = error_of(capsys, "unpack", tmp_path / "m.sfp", "-o", tmp_path / "same.safetensors")
    assert "is an input file" in told


@pytest.mark.parametrize(
    ("command", "name", "right"),
    [
        ("pack", "x.safetensors", "x.sfp"),
        ("pack", "x.pt", "x.sfp"),
        ("pack", "x", "x.sfp"),
        ("pack", "model-0.5B", "model-0.5B.sfp"),
        ("pack", "model.safetensors.index.json", "model.sfp"),
        ("pack --single", "x.gguf", "x.sfp"),
        ("unpack", "x.pt", "x.safetensors"),
        ("unpack", "x.sfp", "x.safetensors"),
        ("unpack --sharded", "x.bin", "x.safetensors"),
        ("prune --sparsity 0.5", "x.safetensors", "x.sfp"),
        ("prune --sparsity 0.5", "x.sfp.tmp", "x.sfp"),
    ],
)
def test_an_output_with_the_wrong_extension_is_refused(
    command: str, name: str, right: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sharded(tmp_path / "in")
    told = error_of(capsys, *command.split(), "in", "-o", name)
    assert told.endswith(f"; name it {right}\n")
    assert f"'sfp {command.split()[0]}' writes {Path(right).suffix}; " in told
    (tmp_path / name).mkdir()
    told = error_of(capsys, *command.split(), "in", "-o", name)
    assert "is a folder" in told or Path(name).suffix == Path(right).suffix
    assert sorted(os.listdir(tmp_path)) == sorted(["in", name])


def test_a_link_to_a_file_with_the_wrong_extension_is_refused(tmp_path: Path, capsys: Capture) -> None:
    source = make(tmp_path / "m.safetensors")
    (tmp_path / "x.pt").write_bytes(b"old")
    (tmp_path / "m.sfp").symlink_to("x.pt")
    told = error_of(capsys, "pack", source, "-o", tmp_path / "m.sfp")
    assert told.endswith(f"x.pt: 'sfp pack' writes .sfp; name it {tmp_path / 'x.sfp'}\n")
    assert (tmp_path / "x.pt").read_bytes() == b"old"


def test_wrong_options_are_refused_and_write_nothing(tmp_path: Path, capsys: Capture) -> None:
    source = make(tmp_path / "m.safetensors", checkpoint() | {"zz": np.full((80, 80), 1e6, np.float32)})
    (tmp_path / "m.sfp").write_bytes(b"old")
    assert "zz" in error_of(capsys, "pack", source, "-o", tmp_path / "m.sfp", "--dtype", "F16")
    assert "99" in error_of(capsys, "pack", source, "-o", tmp_path / "m.sfp", "--bits", "99")
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors", "m.sfp"]
    assert (tmp_path / "m.sfp").read_bytes() == b"old"


# ------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("name", ["no/m.sfp", "a.sfp", "b.sfp", "c.sfp"])
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_an_unwritable_target_is_refused_before_a_tensor_is_read(
    name: str, dry: tuple[str, ...], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a tensor was read")

    source = sharded(tmp_path / "source", checkpoint())
    for folder in ("a.sfp", "b-00002-of-00003.sfp", "c.sfp.index.json"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr("sfpformat.cli.model_files.Model.read", read)
    words = error_of(capsys, "pack", source, "-o", tmp_path / name, "--bits", "4", *dry)
    assert "no folder" in words or "not a regular file" in words


def test_a_checkpoint_in_shards_becomes_shards(tmp_path: Path, capsys: Capture) -> None:
    sharded(tmp_path / "in")
    (tmp_path / "out").mkdir()
    assert run("pack", tmp_path / "in", "-o", tmp_path / "out" / "m.sfp", "--verify") == 0
    shards = [f"m-0000{i}-of-00003.sfp" for i in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path / "out")) == [*shards, "m.sfp.index.json"]
    assert "3 shards, m.sfp.index.json" in capsys.readouterr().out
    with ShardedFile(tmp_path / "out" / "m.sfp.index.json") as model:
        arrays = checkpoint()
        assert model.index.metadata == {"total_size": sum(a.nbytes for a in arrays.values())}
        assert model.metadata() == {"format": "pt"}
        assert len(model) == len(arrays)
        for name, array in arrays.items():
            assert_bits(model.get_tensor(name), array)
    assert run("diff", tmp_path / "in", tmp_path / "out") == 0
    assert run("info", tmp_path / "out" / "m.sfp.index.json") == 0
    assert "3 shards" in capsys.readouterr().out


def test_shards_are_unpacked_to_one_file_or_to_shards(tmp_path: Path) -> None:
    index = sharded(tmp_path / "in")
    assert run("pack", index, "-o", tmp_path / "m.sfp") == 0
    assert run("unpack", tmp_path / "m.sfp.index.json", "-o", tmp_path / "one.safetensors") == 0
    for name, array in load_file(tmp_path / "one.safetensors").items():
        assert_bits(array, checkpoint()[name])
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "model.safetensors"
    assert run("unpack", tmp_path / "m.sfp.index.json", "-o", target, "--sharded") == 0
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "in"))
    for path in (tmp_path / "in").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    was, now = (json.loads(p.read_text()) for p in (index, tmp_path / "out" / index.name))
    assert was["weight_map"] == now["weight_map"]


def test_shards_can_become_one_file(tmp_path: Path) -> None:
    index = sharded(tmp_path / "in")
    assert run("pack", index, "--single", "-o", tmp_path / "m.sfp", "--prune", "0.5", "--scope", "model") == 0
    with sfpformat.open(tmp_path / "m.sfp") as sfp:
        assert set(sfp) == set(checkpoint())
    assert sorted(os.listdir(tmp_path)) == ["in", "m.sfp"]


def test_unpack_tensor_writes_only_the_named_tensors(tmp_path: Path, capsys: Capture) -> None:
    assert run("pack", sharded(tmp_path / "in"), "-o", tmp_path / "m.sfp") == 0
    source, target = tmp_path / "m.sfp.index.json", tmp_path / "n.safetensors"
    assert run("unpack", source, "-o", target, "--tensor", "*.bias", "--tensor", "ids") == 0
    assert set(load_file(target)) == {"layer.0.bias", "ids"}
    assert run("unpack", source, "-o", target, "--sharded", "--tensor", "ids") == 0
    assert set(load_file(tmp_path / "n-00001-of-00001.safetensors")) == {"ids"}
    capsys.readouterr()
    assert "no tensor name matches 'x'" in error_of(capsys, "unpack", source, "-o", target, "--tensor", "x")


def test_ambiguous_or_inconsistent_shards_are_refused(tmp_path: Path, capsys: Capture) -> None:
    index = sharded(tmp_path / "in")
    (tmp_path / "in" / "other.safetensors.index.json").write_text("{}")
    assert "several models" in error_of(capsys, "pack", tmp_path / "in", "-o", tmp_path / "m.sfp")
    fields = json.loads(index.read_text())
    fields["weight_map"]["more"] = fields["weight_map"]["ids"]
    index.write_text(json.dumps(fields))
    assert "'more'" in error_of(capsys, "pack", index, "-o", tmp_path / "m.sfp", "--strict-index")
    assert os.listdir(tmp_path) == ["in"]


def test_a_damaged_tensor_is_not_unpacked(tmp_path: Path, capsys: Capture) -> None:
    with packed(tmp_path) as sfp:
        place = sfp.chunk_offset(sfp.entry("layer.1.weight"), 0)
    data = bytearray((tmp_path / "m.sfp").read_bytes())
    data[place + 100] ^= 1
    (tmp_path / "m.sfp").write_bytes(data)
    (tmp_path / "n.safetensors").write_bytes(b"old")
    capsys.readouterr()
    told = error_of(capsys, "unpack", tmp_path / "m.sfp", "-o", tmp_path / "n.safetensors")
    assert "E_CRC [R-LAY-004]" in told
    assert "layer.1.weight" in told
    assert (tmp_path / "n.safetensors").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors", "m.sfp", "n.safetensors"]
