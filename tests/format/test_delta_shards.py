"""Deltas in several files (SPEC.md chapters 18 and 28)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import sfpformat
from sfpformat import (
    BaseMismatchError,
    DeltaWriter,
    InvalidFileError,
    OptionError,
    SfpFile,
    write_delta_index,
)
from sfpformat.decode.parts import parts_of
from sfpformat.decode.validate import validate
from sfpformat.io.safetensors import SafetensorsError
from sfpformat.numpy import save_file

from ..support.clauses import clauses
from .test_delta_parts import file_of, model, same_parts
from .test_deltas import Arrays, arrays, same, stepped

INDEX = "d.sfp.index.json"


def pair() -> tuple[Arrays, Arrays]:
    """A base, and a result with changed, unchanged, replaced, added and removed tensors."""
    base = arrays()
    new = {**stepped(base), "added": np.arange(7.0), "count": np.arange(3)}
    del new["flags"]
    return base, new


def split(folder: Path, base: Arrays, new: Arrays, count: int = 3) -> Path:
    """Writes a delta in shards, the last of which changes nothing. Returns its index."""
    names = [name for name in {**base, **new} if name != "kept"]
    groups = [names[i :: count - 1] for i in range(count - 1)] + [["kept"]]
    paths = []
    for number, group in enumerate(groups, 1):
        paths.append(folder / f"d-{number:05d}-of-{count:05d}.sfp")
        with DeltaWriter(paths[-1], shard=number, base_name="b") as writer:
            for name in group:
                writer.add(name, base.get(name), new.get(name))
    write_delta_index(folder / INDEX, paths)
    return folder / INDEX


@clauses("R-SHD-001", "R-DLT-009")
def test_shards_are_read_applied_and_checked_as_one_delta(tmp_path: Path) -> None:
    base, new = pair()
    index = split(tmp_path, base, new)
    assert validate(index).ok
    for path in (index, tmp_path):
        with sfpformat.open(path, base=base) as file:
            same(file.get_tensors(), new)
            assert (file.get_slice("w.0")[3:5] == new["w.0"][3:5]).all()
            changed = (base["w.0"].view("u2") != new["w.0"].view("u2"))[3:5]
            assert (file.get_slice("w.0").get_changed(np.s_[3:5]) == changed).all()
            file.check()
    target = {name: array.copy() for name, array in base.items()}
    found = sfpformat.apply_delta(target, index)
    same(target, new)
    assert found.base == "b"
    with pytest.raises(BaseMismatchError, match="no such tensor"):
        sfpformat.apply_delta(target, index)
    same(target, new)


def test_a_chain_can_have_deltas_in_shards(tmp_path: Path) -> None:
    base, new = pair()
    index = split(tmp_path, base, new)
    last = stepped(new, 5)
    sfpformat.write_delta(tmp_path / "next.sfp", new, last)
    with (
        sfpformat.open(index, base=base) as middle,
        sfpformat.open(tmp_path / "next.sfp", base=middle) as file,
    ):
        same(file.get_tensors(), last)


@clauses("R-SHD-002")
def test_a_shard_without_tensors_is_listed_in_the_metadata(tmp_path: Path) -> None:
    base, new = pair()
    index = split(tmp_path, base, new)
    fields = json.loads(index.read_text())
    names = [f"d-0000{n}-of-00003.sfp" for n in (1, 2, 3)]
    assert fields["metadata"]["files"] == names
    assert set(fields["weight_map"].values()) == set(names[:2])
    for files, error in ((["../d.sfp"], InvalidFileError), ("d.sfp", SafetensorsError)):
        fields["metadata"]["files"] = files
        index.write_text(json.dumps(fields))
        with pytest.raises(error, match=r"plain file name|array of file names"):
            sfpformat.open(index, base=base)
    del fields["metadata"]["files"]
    index.write_text(json.dumps(fields))
    with pytest.raises(BaseMismatchError, match=r"without this tensor .*'kept'"):
        sfpformat.open(index, base=base)


@clauses("R-DLT-014")
def test_shards_of_a_delta_are_not_read_as_a_model_or_alone(tmp_path: Path) -> None:
    base, new = pair()
    index = split(tmp_path, base, new)
    with pytest.raises(OptionError, match="is a delta and needs its base"):
        sfpformat.open(index)
    with pytest.raises(BaseMismatchError, match="made from a base without this tensor"):
        sfpformat.open(tmp_path / "d-00001-of-00003.sfp", base=base)


@clauses("R-DLT-002", "R-DLT-008")
def test_shards_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    base, new = pair()
    index = split(tmp_path, base, new)
    second = tmp_path / "d-00002-of-00003.sfp"
    kept = second.read_bytes()
    with DeltaWriter(second, shard=2) as writer:  # lists a tensor of the first shard
        for name in ("w.0", "w.1"):
            writer.add(name, base[name], new[name])
    paths = sorted(tmp_path.glob("d-*.sfp"))
    old = index.read_bytes()
    with pytest.raises(InvalidFileError, match=r"R-DLT-002.*two shards"):
        write_delta_index(index, paths)
    save_file({"model": np.zeros(3)}, second)
    with pytest.raises(OptionError, match="is a model, not a delta"):
        write_delta_index(index, paths)
    assert index.read_bytes() == old
    fields = json.loads(old)
    fields["weight_map"] = {n: f for n, f in fields["weight_map"].items() if f != second.name}
    index.write_text(json.dumps({**fields, "weight_map": {**fields["weight_map"], "model": second.name}}))
    with pytest.raises(InvalidFileError, match=r"R-DLT-008.*'d-00002-of-00003.sfp' is a model"):
        sfpformat.open(index, base=base)
    assert [fault.clause for fault in validate(index).faults] == ["R-DLT-008"]
    second.write_bytes(kept)


def test_an_index_needs_deltas_of_different_shards_beside_it(tmp_path: Path) -> None:
    base, new = pair()
    paths = [tmp_path / "a.sfp", tmp_path / "b.sfp"]
    for path, name in zip(paths, ("w.0", "w.1"), strict=True):
        sfpformat.write_delta(path, {name: base[name]}, {name: new[name]})
    with pytest.raises(OptionError, match=r"both have a tensor 'BF16\.0\.counts'; give each DeltaWriter"):
        write_delta_index(tmp_path / INDEX, paths)
    (tmp_path / "sub").mkdir()
    for index, files, words in (
        ("d.json", paths, "must be named STEM.sfp.index.json"),
        (f"sub/{INDEX}", paths, "in the folder of its index"),
        (INDEX, [], "at least one file"),
    ):
        with pytest.raises(OptionError, match=words):
            write_delta_index(tmp_path / index, files)
    with pytest.raises(OptionError, match="shard is 0, must be a number from 1"):
        DeltaWriter(tmp_path / "c.sfp", shard=0)


@clauses("R-DLT-018")
def test_masks_and_levels_come_through_shards_with_one_separator(tmp_path: Path) -> None:
    old, now = model(1), model(2, 0.02)
    (tmp_path / "old.sfp").write_bytes(file_of(old))
    (tmp_path / "new.sfp").write_bytes(file_of(now))
    with SfpFile(tmp_path / "old.sfp") as base, SfpFile(tmp_path / "new.sfp") as new:
        for separators in (("/", "/"), ("/", "//")):
            paths = [tmp_path / "d-1.sfp", tmp_path / "d-2.sfp"]
            for number, path in enumerate(paths):
                with DeltaWriter(path, shard=number + 1, separator=separators[number]) as writer:
                    for name in list(now)[number::2]:
                        before, after = parts_of(base, name), parts_of(new, name)
                        if before is None or after is None:
                            writer.add(name, base.get_tensor(name), new.get_tensor(name))
                        else:
                            writer.add_parts(name, before, after)
            if separators[0] != separators[1]:
                with pytest.raises(InvalidFileError, match=r"R-DLT-018.*different separators"):
                    write_delta_index(tmp_path / INDEX, paths)
                continue
            write_delta_index(tmp_path / INDEX, paths)
            with sfpformat.open(tmp_path / INDEX, base=base) as file:
                for name in now:
                    same_parts(file.parts(name), parts_of(new, name))
                assert set(file) == set(now)
