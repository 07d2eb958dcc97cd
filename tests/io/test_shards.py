"""SPEC.md chapter 18: models in several files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sfpformat import FileFault, InvalidFileError, MissingTensorError
from sfpformat.decode.shard_index import ShardIndex, index_name, shard_name
from sfpformat.decode.shards import ShardedFile
from sfpformat.io.safetensors import SafetensorsError
from sfpformat.numpy import save_file
from tests.support.clauses import clauses

A, B = "m-00001-of-00002.sfp", "m-00002-of-00002.sfp"
ARRAYS: dict[str, NDArray[Any]] = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.where(np.arange(5000) % 3, 0, 1).astype(np.float32),
    "c": np.arange(4, dtype=np.int64),
}


def model(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    """Two shards, with a and b in the first, and an index."""
    save_file({name: ARRAYS[name] for name in "ab"}, folder / A, {"format": "np", "who": "first"})
    save_file({"c": ARRAYS["c"]}, folder / B, {"who": "second", "also": "this"})
    path = folder / index_name("m")
    index = ShardIndex(weight_map or {"a": A, "b": A, "c": B}, {"total_size": 20_056})
    path.write_bytes(index.to_bytes())
    return path


def test_shards_are_numbered_from_one_with_five_digits() -> None:
    assert [shard_name("m", i, 2) for i in (1, 2)] == [A, B]
    assert index_name("m") == "m.sfp.index.json"


def test_a_sharded_model_has_the_interface_of_a_file(tmp_path: Path) -> None:
    with ShardedFile(model(tmp_path)) as sharded:
        assert sharded.keys() == list(sharded) == ["a", "b", "c"]
        assert len(sharded) == 3
        assert "a" in sharded
        assert "d" not in sharded
        for name, array in ARRAYS.items():
            assert np.array_equal(sharded.get_tensor(name), array)
            assert sharded.info(name).shape == array.shape == sharded.entry(name).shape
        assert np.array_equal(sharded.get_slice("a")[1, 1:], ARRAYS["a"][1, 1:])
        assert np.array_equal(sharded.get_mask("b"), ARRAYS["b"] != 0)
        assert sharded.get_importance("b") is None
        assert sharded.metadata() == {"format": "np", "who": "first", "also": "this"}
        with pytest.raises(MissingTensorError, match="'d'"):
            sharded.get_tensor("d")


def test_an_index_is_restored_from_its_bytes() -> None:
    index = ShardIndex({"a\n": "x.sfp", "b": "y.sfp"}, {"total_size": 7})
    assert ShardIndex.from_bytes(index.to_bytes()) == index
    assert index.files() == ["x.sfp", "y.sfp"]


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": A, "b": A, "c": A}, "'c'"),
        ({"a": A, "b": A, "c": B, "d": B}, "'d'"),
        ({"a": A, "c": B}, "'b'"),
        ({"a": B, "b": A, "c": B}, "'a'"),
    ],
    ids=["elsewhere", "missing", "not listed", "two swapped"],
)
@clauses("R-SHD-001")
def test_an_index_that_contradicts_its_shards_is_refused(
    tmp_path: Path, weight_map: dict[str, str], words: str
) -> None:
    with pytest.raises(InvalidFileError, match=words) as caught:
        ShardedFile(model(tmp_path, weight_map))
    assert (caught.value.clause, caught.value.code) == ("R-SHD-001", "E_LAYOUT")


@pytest.mark.parametrize("name", ["../m.sfp", "/m.sfp", "d/m.sfp", "d\\m.sfp", "..", ".", "", "m\0.sfp"])
@clauses("R-SHD-002")
def test_a_file_name_with_a_directory_part_is_refused(name: str) -> None:
    text = json.dumps({"metadata": {}, "weight_map": {"a": name}}).encode()
    with pytest.raises(InvalidFileError) as caught:
        ShardIndex.from_bytes(text)
    assert (caught.value.clause, caught.value.code) == ("R-SHD-002", "E_RANGE")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b'{"weight_map":[]}',
        b'{"weight_map":{"a":1}}',
        b'{"weight_map":{"a":"x","a":"y"}}',
        b'{"weight_map":{},"metadata":[]}',
    ],
)
def test_invalid_indexes_are_refused(text: bytes) -> None:
    with pytest.raises(SafetensorsError):
        ShardIndex.from_bytes(text)


def test_a_fault_in_a_shard_names_the_shard(tmp_path: Path) -> None:
    path = model(tmp_path)
    (tmp_path / B).write_bytes((tmp_path / B).read_bytes()[:-1])
    with pytest.raises(FileFault, match=B) as caught:
        ShardedFile(path)
    assert caught.value.clause == "R-PRE-007"


def test_a_missing_shard_raises_file_not_found(tmp_path: Path) -> None:
    path = model(tmp_path)
    (tmp_path / B).unlink()
    with pytest.raises(FileNotFoundError, match=B):
        ShardedFile(path)


def test_chunks_of_shards_are_read_into_memory_of_the_caller(tmp_path: Path) -> None:
    with ShardedFile(model(tmp_path)) as sharded:
        wanted = [(sharded.entry(name), 0) for name in "cab"]
        places = [np.zeros(int(entry.chunks["length"][0]), np.uint8) for entry, _ in wanted]
        sharded.read_chunks_into(wanted, places)
        for place, chunk in zip(places, sharded.read_chunks(wanted), strict=True):
            assert np.array_equal(place, chunk)
