"""SPEC.md chapter 28: deltas."""

from __future__ import annotations

import itertools
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file as save_safetensors
from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge
from sfp_conformance.slow_reader.delta import elements_of
from sfp_conformance.slow_reader.parts import Plain

import sfpformat
from conformance.recipes.deltas import base_of, delta, sample
from sfpformat import (
    BaseMismatchError,
    ClosedFileError,
    InvalidFileError,
    MismatchError,
    OptionError,
    PartlyChangedError,
)
from sfpformat.coding.changes import kind_of
from sfpformat.decode.reader import SfpFile
from sfpformat.decode.selection import Selection
from sfpformat.deltas import applying, journal, writing
from sfpformat.deltas.applying import uninterrupted
from sfpformat.deltas.chains import open_chain
from sfpformat.deltas.checksums import checksum_of
from sfpformat.deltas.journal import Journal
from sfpformat.deltas.reading import PoolChanges
from sfpformat.deltas.tensors import ArrayTensors
from sfpformat.dtypes import DTYPES, of_numpy
from sfpformat.encode.sink import MemorySink
from sfpformat.engines import available
from sfpformat.errors import FileFault
from sfpformat.io.checksum import combined, crc32
from sfpformat.io.safetensors import SafetensorsFile
from sfpformat.limits import Limits
from sfpformat.numpy import load, load_file, save, save_file

from ..support.clauses import clauses
from ..support.forge import accepted, refused

Arrays = dict[str, NDArray[Any]]
ENGINES = [name for name in ("python", "numba") if available()[name] is None]


def written(base: Arrays, new: Arrays, **options: Any) -> bytes:
    """The bytes of a delta."""
    out = MemorySink()
    sfpformat.write_delta(out, base, new, **options)
    return out.data


def arrays(seed: int = 0) -> Arrays:
    """Tensors of several dtypes."""
    rng = np.random.default_rng(seed)
    return {
        "w.0": rng.normal(size=(40, 30)).astype(ml_dtypes.bfloat16),
        "w.1": np.where(rng.random(500) < 0.5, 0, rng.normal(size=500)).astype(ml_dtypes.bfloat16),
        "bias": rng.normal(size=64).astype(np.float32),
        "count": np.arange(20).reshape(4, 5),
        "flags": rng.random(33) < 0.5,
        "scalar": np.array(0.1),
        "empty": np.zeros((0, 3), np.float16),
        "kept": rng.normal(size=(8, 8)).astype(np.float16),
    }


def stepped(base: Arrays, seed: int = 1, share: float = 0.1) -> Arrays:
    """A model like the base after a small step: some elements differ by a few units in the last place."""
    rng, out = np.random.default_rng(seed), {}
    for name, array in base.items():
        kind = kind_of(_dtype(array))
        flat = np.array(array, copy=True).reshape(-1).view(kind.pattern)
        changed = rng.random(flat.size) < (0 if name == "kept" else share)
        if array.dtype == np.bool_:
            flat[changed] ^= 1
        else:
            flat[changed] += rng.integers(-3, 4, int(changed.sum())).astype(kind.pattern)
        out[name] = flat.view(array.dtype).reshape(array.shape)
    return out


def _dtype(array: NDArray[Any]) -> Any:
    dtype = of_numpy(array.dtype)
    assert dtype is not None
    return dtype


def same(found: Any, expected: Arrays) -> None:
    """Asserts that two models are equal bit for bit."""
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def slow_result(data: bytes, base: Arrays) -> Arrays:
    """The result of a delta as the slow reader computes it."""
    file = slow_reader.read(data)
    plain = {n: Plain(_dtype(a).name, list(a.shape), a.tobytes()) for n, a in base.items()}
    stored = {n: Plain(t.dtype, list(t.shape), t.data) for n, t in file.tensors.items()}
    found = elements_of(file.root, stored, plain)
    return {n: np.frombuffer(t.data, DTYPES[t.dtype].numpy).reshape(t.shape) for n, t in found.items()}


# ----------------------------------------------------------------------------------------- the map `delta`

WHOLE = delta(sample(), base="step 7")


def _put(key: str, change: Callable[[Any], Any]) -> Callable[[Forge], object]:
    def edit(file: Forge) -> None:
        file.root["delta"][key] = change(file.root["delta"][key])

    return edit


@clauses("R-DLT-001", "R-DLT-002", "R-DLT-003", "R-DLT-004", "R-DLT-005", "R-DLT-016")
def test_a_map_with_wrong_lists_is_refused() -> None:
    accepted(WHOLE)
    first = "layers.0.weight"
    refused("R-DLT-001", _put("kinds", lambda old: old + b"\0"), WHOLE)
    refused("R-DLT-002", _put("names", lambda old: [old[0], "weight", *old[2:]]), WHOLE, tensor=first)
    refused("R-DLT-003", _put("kinds", lambda old: b"\5" + old[1:]), WHOLE, tensor=first)
    refused(
        "R-DLT-004", _put("checksums", lambda old: old[:24] + b"abcd" * 2 + old[32:]), WHOLE, tensor="gone"
    )
    refused("R-DLT-005", _put("block", lambda old: 0), WHOLE)
    refused("R-DLT-016", _put("shared", lambda old: b"\7" + old[1:]), WHOLE)


@clauses("R-DLT-006", "R-DLT-007", "R-DLT-008")
def test_pools_and_stored_tensors_must_fit_the_lists() -> None:
    refused("R-DLT-006", _put("pools", lambda old: old[:1]), WHOLE)
    refused("R-DLT-007", _put("block", lambda old: 1000), WHOLE, tensor="counts 0")
    refused("R-DLT-008", lambda file: file.parts.remove(file.part("new")), WHOLE, tensor="new")


# ------------------------------------------------------------------------------------- writing and reading


@clauses("R-DLT-013")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_every_reader_returns_the_result_bit_for_bit(engine: str, block: int) -> None:
    base = arrays()
    new = {**stepped(base), "added": np.arange(5.0), "kept": np.arange(3, dtype=np.uint8)}
    del new["scalar"]
    data = written(base, new, block=block, engine=engine)
    assert sfpformat.validate(data).canonical
    with sfpformat.open(data, base=base, engine=engine) as file:
        same({name: file.get_tensor(name) for name in file}, new)
        assert file.get_slice("w.0")[3:7, ::2].tobytes() == new["w.0"][3:7, ::2].tobytes()
        positions, values = file.get_changes("w.0")
        assert (new["w.0"].reshape(-1)[positions] == values).all()
        assert set(positions.tolist()) == set(np.flatnonzero(new["w.0"].view("u2") != base["w.0"].view("u2")))
    target = {name: array.copy() for name, array in base.items()}
    kept = target["w.0"]
    sfpformat.apply_delta(target, data, engine=engine)
    same(target, new)
    assert target["w.0"] is kept
    same(slow_result(data, base), new)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_do_not_depend_on_engine_and_threads(engine: str, threads: int) -> None:
    base = arrays()
    assert written(base, stepped(base), block=64, engine=engine, threads=threads) == written(
        base, stepped(base), block=64, engine="python", threads=1
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_pair_of_tensors_comes_through(data: st.DataObject) -> None:
    dtype = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
    size = data.draw(st.integers(1, 40))
    bits = st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize)
    base: NDArray[np.uint8] = np.frombuffer(data.draw(bits), np.uint8)
    new: NDArray[np.uint8] = np.frombuffer(data.draw(bits), np.uint8)
    if dtype.name == "BOOL":
        base, new = base & np.uint8(1), new & np.uint8(1)
    keep = data.draw(st.booleans())
    if keep:
        new = np.where(np.arange(len(new)) % 16 < 8, base, new)
    pair = {"t": base.view(dtype.numpy)}, {"t": new.view(dtype.numpy)}
    made = written(*pair, block=data.draw(st.integers(1, 50)), engine="python")
    same(slow_result(made, pair[0]), pair[1])
    target = {"t": pair[0]["t"].copy()}
    sfpformat.apply_delta(target, made, engine=data.draw(st.sampled_from(ENGINES)))
    same(target, pair[1])


def test_files_arrays_and_shards_can_be_base_and_result(tmp_path: Path) -> None:
    base, new = arrays(), stepped(arrays())
    save_file(base, tmp_path / "base.sfp", {"a": "1"})
    save_file(new, tmp_path / "new.sfp", {"a": "2"})
    told = sfpformat.write_delta(tmp_path / "d.sfp", tmp_path / "base.sfp", tmp_path / "new.sfp")
    assert told.base == "base.sfp"
    with sfpformat.open(tmp_path / "d.sfp", base=tmp_path / "base.sfp") as file:
        same(file.get_tensors(), new)
        assert file.metadata() == {"a": "2"}
        assert len(file) == len(new)
        assert "w.0" in file
    with sfpformat.Delta(tmp_path / "d.sfp") as parts:
        assert {tensor.name: tensor.kind for tensor in parts.map.tensors}["kept"] == "unchanged"


@clauses("R-DLT-014")
def test_a_delta_is_not_read_as_a_model(tmp_path: Path) -> None:
    path = tmp_path / "d.sfp"
    path.write_bytes(WHOLE)
    for read in (lambda: load(WHOLE), lambda: load_file(path), lambda: sfpformat.open(path)):
        with pytest.raises(OptionError, match="is a delta and needs its base"):
            read()
    with pytest.raises(OptionError, match="is a model, not a delta"):
        sfpformat.open(save({"a": np.arange(3.0)}), base={})


# ------------------------------------------------------------------------------------------- wrong bases


@clauses("R-DLT-009", "R-DLT-015")
def test_a_wrong_base_is_refused_with_both_checksums_and_unchanged() -> None:
    base = arrays()
    data = written(base, stepped(base))
    wrong = {name: array.copy() for name, array in base.items()}
    wrong["w.0"].view(np.uint16)[0, 0] ^= 1
    before = {name: array.tobytes() for name, array in wrong.items()}
    with pytest.raises(
        BaseMismatchError, match=r"checksum [0-9a-f]{8}, the delta needs [0-9a-f]{8}"
    ) as raised:
        sfpformat.apply_delta(wrong, data)
    assert (raised.value.clause, raised.value.tensor) == ("R-DLT-009", "w.0")
    assert {name: array.tobytes() for name, array in wrong.items()} == before
    with pytest.raises(BaseMismatchError), sfpformat.open(data, base=wrong) as file:
        file.get_tensor("w.0")
    for change in (lambda m: m.pop("kept"), lambda m: m.update(other=np.zeros(1))):
        other = dict(base)
        change(other)
        with pytest.raises(BaseMismatchError):
            sfpformat.apply_delta(other, data)


@clauses("R-DLT-009")
def test_a_delta_is_refused_if_it_was_applied_before_or_out_of_order() -> None:
    steps = [arrays()]
    for seed in range(3):
        steps.append(stepped(steps[-1], seed))
    deltas = [written(*pair) for pair in itertools.pairwise(steps)]
    target = {name: array.copy() for name, array in steps[0].items()}
    with pytest.raises(BaseMismatchError):
        sfpformat.apply_delta(target, deltas[1])
    sfpformat.apply_delta(target, deltas[0])
    with pytest.raises(BaseMismatchError, match="was applied before"):
        sfpformat.apply_delta(target, deltas[0])
    for each in deltas[1:]:
        sfpformat.apply_delta(target, each)
    same(target, steps[-1])
    with open_chain(steps[0], deltas) as file:
        same(file.get_tensors(), steps[-1])
    for order in (deltas[::-1], [deltas[0], deltas[2]], [deltas[0], deltas[0]]):
        with pytest.raises(BaseMismatchError):
            open_chain(steps[0], order)
    with pytest.raises(OptionError, match="a chain of 0 deltas"):
        open_chain(steps[0], [])


def edited(data: bytes, change: Callable[[Forge], object]) -> bytes:
    """The file after an edit."""
    file = Forge.of(data)
    change(file)
    return file.build()


def refused_in_place(data: bytes, base: Arrays, clause: str) -> None:
    """Asserts that a delta does not fit its base, and changes nothing."""
    target = {name: array.copy() for name, array in base.items()}
    with pytest.raises(FileFault) as raised:
        sfpformat.apply_delta(target, data)
    assert raised.value.clause == clause
    same(target, base)


@clauses("R-DLT-010", "R-DLT-011", "R-DLT-012", "R-DLT-015")
def test_numbers_that_do_not_fit_the_base_are_refused_before_anything_changes() -> None:
    pairs = sample()
    base = load(base_of(pairs))
    good = delta(pairs)
    sfpformat.apply_delta({name: array.copy() for name, array in base.items()}, good)
    sums = edited(good, _put("checksums", lambda old: old[:4] + bytes(4) + old[8:]))
    refused_in_place(sums, base, "R-DLT-012")

    def more(file: Forge) -> None:
        part = file.part("differences 0")
        fewer = delta(pairs[:1])
        file.parts[file.parts.index(part)] = Forge.of(fewer).part("differences 0")

    refused_in_place(edited(good, more), base, "R-DLT-010")

    def gaps(file: Forge) -> None:
        table = file.part("gaps 0").entry["fingerprints"]
        table["base"] += 1000

    refused_in_place(edited(good, gaps), base, "R-DLT-011")


def test_arrays_that_cannot_be_changed_in_place_are_refused() -> None:
    base = arrays()
    data = written(base, stepped(base))
    for wrong in (base["w.0"].copy(order="F"), base["w.0"].copy()):
        wrong.flags.writeable = bool(wrong.flags.f_contiguous)
        target = {**{name: array.copy() for name, array in base.items()}, "w.0": wrong}
        with pytest.raises(MismatchError, match="to be changed in place"):
            sfpformat.apply_delta(target, data)


def test_tied_tensors_are_changed_once() -> None:
    base = arrays()
    tied = {"a": base["w.0"], "b": base["w.0"]}
    new = {name: stepped({"w": base["w.0"]})["w"] for name in tied}
    data = written(tied, new, block=100)
    shared = base["w.0"].copy()
    target = {"a": shared, "b": shared}
    sfpformat.apply_delta(target, data)
    same(target, new)


@pytest.fixture(scope="module")
def large() -> tuple[Arrays, bytes]:
    """A model of 96 MB in BF16, and a delta that changes 1 %, 45 % and 60 % of tensors, and replaces one."""
    rng = np.random.default_rng(0)
    base: Arrays = {
        f"w.{i}": rng.integers(0x3C00, 0x3F00, (2048, 4096), np.uint16).view(ml_dtypes.bfloat16)
        for i in range(6)
    }
    out = MemorySink()
    with sfpformat.DeltaWriter(out) as writer:
        for (name, array), share in zip(base.items(), (0.01, 0.01, 0.45, 0.45, 0.6, None), strict=True):
            changed = rng.random(array.shape, np.float32) < (0.01 if share is None else share)
            new = (array.view(np.uint16) + changed).astype(np.uint16).view(array.dtype)
            writer.add(name, array, new, other={} if share is None else None)
    return base, out.data


@pytest.mark.parametrize("threads", [1, 4])
def test_a_change_in_place_needs_at_most_64_mb(large: tuple[Arrays, bytes], threads: int) -> None:
    base, data = large
    with sfpformat.Delta(data) as opened:
        assert [tensor.kind for tensor in opened.map.tensors] == ["changed"] * 5 + ["replaced"]
        told = {tensor.name: tensor.result for tensor in opened.map.tensors}
    target = {name: array.copy() for name, array in base.items()}
    tracemalloc.start()
    try:
        sfpformat.apply_delta(target, data, threads=threads)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert {name: checksum_of(array) for name, array in target.items()} == told
    assert peak <= 64e6


# ------------------------------------------------------------------------------------------------ roll-back


class Failing:
    """Makes a delta unreadable after some blocks have been decoded again, once the change has begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception, blocks: int = 3) -> None:
        self.changed = False
        monkeypatch.setattr(applying, "_KEPT_BYTES", 0)
        find, apply, counter = PoolChanges.find, applying.Change.apply, itertools.count()

        def failing(pool: PoolChanges, *rest: Any) -> Any:
            if self.changed and next(counter) == blocks:
                raise error
            return find(pool, *rest)

        def begin(change: applying.Change) -> None:
            self.changed = True
            apply(change)

        monkeypatch.setattr(PoolChanges, "find", failing)
        monkeypatch.setattr(applying.Change, "apply", begin)


def copies(arrays: Arrays) -> Arrays:
    """Copies of arrays."""
    return {name: array.copy() for name, array in arrays.items()}


@clauses("R-DLT-015")
@pytest.mark.parametrize("memory", [0, 1 << 20])
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_delta_that_cannot_be_read_again_leaves_the_base(
    monkeypatch: pytest.MonkeyPatch, share: float, memory: int
) -> None:
    monkeypatch.setattr(journal, "_IN_MEMORY", memory)
    base = arrays()
    new = {**stepped(base, share=share), "added": np.ones(3)}
    data = written(base, new, block=200)
    Failing(monkeypatch, OSError("the disk fails"))
    written_to: list[str] = []
    keep = Journal.keep

    def kept(self: Journal, name: str, *rest: Any) -> None:
        written_to.append(name)
        keep(self, name, *rest)

    monkeypatch.setattr(Journal, "keep", kept)
    target = copies(base)
    with pytest.raises(OSError, match="the disk fails"):
        sfpformat.apply_delta(target, data, threads=2)
    assert written_to  # some tensors had been changed
    same(target, base)
    monkeypatch.undo()
    sfpformat.apply_delta(target, data)
    same(target, new)


@clauses("R-DLT-015")
@pytest.mark.parametrize("tensor", ["w.1", "kept"])
def test_a_file_that_is_overwritten_during_the_change_leaves_the_base(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tensor: str
) -> None:
    base, path = arrays(), tmp_path / "d.sfp"
    with sfpformat.DeltaWriter(path, block=200) as writer:
        for name, array in stepped(base).items():  # `kept` is stored whole
            writer.add(name, base[name], array, other={} if name == "kept" else None)
    monkeypatch.setattr(applying, "_KEPT_BYTES", 0 if tensor == "w.1" else 1 << 20)
    apply = applying.Change.apply

    def overwritten(change: applying.Change) -> None:
        stored = "kept" if tensor == "kept" else "BF16.0.differences"
        entry = change._delta.file.entry(stored)
        with path.open("r+b") as file:
            file.seek(change._delta.file.chunk_offset(entry, 0))
            file.write(bytes(20))
        for pool in change._delta.pools():
            pool._window = None
        apply(change)

    monkeypatch.setattr(applying.Change, "apply", overwritten)
    target = copies(base)
    with pytest.raises(InvalidFileError):
        sfpformat.apply_delta(target, path)
    same(target, base)


@clauses("R-DLT-015")
def test_an_error_names_the_tensors_that_cannot_be_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    base = arrays()
    data = written(base, stepped(base), block=200)
    Failing(monkeypatch, OSError("the disk fails"), blocks=8)
    restore = Journal._restore

    def failing(self: Journal, record: Any) -> None:
        if record.name == "w.1":
            raise OSError("the temporary file cannot be read")
        restore(self, record)

    monkeypatch.setattr(Journal, "_restore", failing)
    target = copies(base)
    with pytest.raises(PartlyChangedError, match=r"a part of 'w\.1'.* load the tensors again") as raised:
        sfpformat.apply_delta(target, data, threads=1)
    assert raised.value.tensors == ("w.1",)
    assert isinstance(raised.value.__context__, OSError)
    same({**target, "w.1": base["w.1"]}, base)
    assert target["w.1"].tobytes() != base["w.1"].tobytes()


def test_a_full_disk_leaves_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    base = arrays()
    data = written(base, stepped(base), block=200)
    monkeypatch.setattr(applying, "_KEPT_BYTES", 0)
    write, counter = Journal._write, itertools.count()

    def full(self: Journal, array: Any) -> None:
        if next(counter) == 5:
            raise OSError(28, "No space left on device")
        write(self, array)

    monkeypatch.setattr(Journal, "_write", full)
    target = copies(base)
    with pytest.raises(OSError, match="No space left"):
        sfpformat.apply_delta(target, data, threads=1)
    same(target, base)


# ------------------------------------------------------------------------------------------------- writers


def test_a_writer_refuses_what_it_cannot_describe_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "d.sfp"
    path.write_bytes(b"old")
    one = np.arange(3.0)
    writer = sfpformat.DeltaWriter(path)
    writer.add("a", one, one + 1)
    with pytest.raises(OptionError, match="already added"):
        writer.add("a", one, one)
    writer.abort()
    with pytest.raises(ClosedFileError):
        writer.add("b", one, one)
    with pytest.raises(OptionError, match="neither in the base nor"), sfpformat.DeltaWriter(path) as writer:
        writer.add("a", None, None)
    wrong: Any = [1.0]
    with pytest.raises(OptionError, match="not an array"), sfpformat.DeltaWriter(path) as writer:
        writer.add("a", one, wrong)
    with pytest.raises(OptionError, match="block is 0"):
        sfpformat.DeltaWriter(path, block=0)
    with pytest.raises(OptionError, match="base_name"):
        sfpformat.DeltaWriter(path, base_name="a\0")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_copies_let_the_caller_change_the_arrays(tmp_path: Path) -> None:
    base = arrays()
    new = stepped(base)
    trained = {name: array.copy() for name, array in base.items()}
    with sfpformat.DeltaWriter(tmp_path / "d.sfp") as writer:
        for name, array in trained.items():
            before = array.copy()
            array[...] = new[name]
            writer.add(name, before, array, copy=True)
            before[...] = array[...] = 0
    with sfpformat.open(tmp_path / "d.sfp", base=base) as file:
        same(file.get_tensors(), new)


def test_names_of_pools_avoid_those_of_tensors() -> None:
    base = {"F64.0.counts": np.arange(3.0), "F64.0.gaps": np.arange(2.0)}
    new = {"F64.0.counts": np.arange(3.0) + 1, "F64.0.gaps": np.arange(2)}
    data = written(base, new)
    with sfpformat.open(data, base=base) as file:
        same(file.get_tensors(), new)


def test_lists_above_the_limits_of_readers_are_refused() -> None:
    data = written(arrays(), arrays())
    for limits in (Limits(tensors=7), Limits(rank=1), Limits(name_bytes=5)):
        with pytest.raises(sfpformat.LimitError):
            sfpformat.Delta(data, limits=limits)


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_checksums_of_parts_combine_to_that_of_the_whole(a: bytes, b: bytes) -> None:
    assert combined(crc32(a), crc32(b), len(b)) == crc32(a + b)


def test_threads_give_the_checksum_of_the_whole() -> None:
    data = np.random.default_rng(0).integers(0, 256, (1 << 22) + 17, np.uint8)
    assert checksum_of(data, 3) == crc32(data.data)


def test_an_interrupt_waits_until_all_changes_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    started, join = threading.Event(), threading.Thread.join
    calls: list[threading.Thread] = []
    done: list[bool] = []

    def work() -> None:
        assert started.wait(10)
        done.append(True)

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        calls.append(self)
        if len(calls) == 1:
            started.set()
            raise KeyboardInterrupt
        join(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        uninterrupted(work)
    assert done == [True]


def test_an_error_while_changes_are_made_is_raised() -> None:
    def work() -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        uninterrupted(work)


# ------------------------------------------------------------------------------------------------- slices

INDICES: tuple[Any, ...] = (
    np.s_[3:7, ::2],
    np.s_[5],
    np.s_[:, 4],
    np.s_[30:2:-3, 1:],
    np.s_[:, ::-1],
    np.s_[...],
    np.s_[4:4],
    np.s_[-1, -1],
)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("block", [1, 7, 333, 1 << 22])
@pytest.mark.parametrize("dtype", ["BF16", "C64", "F64", "I8"])
def test_slices_and_masks_are_those_of_the_whole_tensor(engine: str, block: int, dtype: str) -> None:
    rng = np.random.default_rng(2)
    number = DTYPES[dtype].numpy
    base: Arrays = {name: rng.normal(size=(33, 8)).astype(number) for name in ("a", "b", "c")}
    new = stepped(base, share=0.2)
    new["c"] = np.where(np.arange(33)[:, None] < 20, base["c"], stepped(base, 7, 1.0)["c"])
    data = written(base, new, block=block, engine=engine)
    other = stepped(new, 5)
    with (
        sfpformat.open(data, base=base, engine=engine) as file,
        sfpformat.open(written(new, other), base=file, engine=engine) as chained,
    ):
        for index, name in itertools.product(INDICES, base):
            assert file.get_slice(name)[index].tobytes() == new[name][index].tobytes()
            assert chained.get_slice(name)[index].tobytes() == other[name][index].tobytes()
            bits = [array[name].view((np.void, DTYPES[dtype].itemsize)) for array in (base, new)]
            differ = np.array(bits[0][index] != bits[1][index])
            assert np.array_equal(file.get_slice(name).get_changed(index), differ)


def test_slices_of_stored_and_unchanged_tensors_come_from_their_file(tmp_path: Path) -> None:
    base = arrays()
    new = {**base, "added": np.arange(50.0).reshape(10, 5), "w.1": np.arange(6.0)}
    save_file(base, tmp_path / "base.sfp")
    with sfpformat.open(written(base, new), base=tmp_path / "base.sfp") as file:
        for name in ("added", "w.1", "w.0"):
            assert file.get_slice(name)[2:5].tobytes() == new[name][2:5].tobytes()
            assert file.get_slice(name).get_changed(np.s_[2:5]).all() == (name != "w.0")
        assert file.get_slice("w.0").get_changed().shape == (40, 30)


class Counted:
    """Arrays by name that count the elements that are read of each."""

    def __init__(self, arrays: Arrays) -> None:
        self._tensors = ArrayTensors(arrays)
        self.specs = self._tensors.specs
        self.elements: Counter[str] = Counter()

    def read(self, name: str) -> NDArray[Any]:
        self.elements[name] += self._tensors.read(name).size
        return self._tensors.read(name)

    def read_part(self, name: str, selection: Selection) -> NDArray[Any]:
        self.elements[name] += selection.size
        return self._tensors.read_part(name, selection)

    def metadata(self) -> dict[str, str]:
        return {}


def test_a_slice_reads_only_the_blocks_that_contain_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    base: Arrays = {name: rng.normal(size=(64, 100)).astype(np.float32) for name in "abc"}
    new = stepped(base, share=0.3)
    new["b"][32:40] = base["b"][32:40]  # block 12 has no change
    data = written(base, new, block=800)
    decoded: Counter[str] = Counter()
    decode = SfpFile.decode

    def counted(self: SfpFile, entry: Any, selection: Selection, *rest: Any) -> Any:
        decoded[entry.name.rsplit(".", 1)[-1]] += selection.size
        return decode(self, entry, selection, *rest)

    monkeypatch.setattr(SfpFile, "decode", counted)
    read = Counted(base)
    with sfpformat.open(data, base=read) as file:
        pool = file.delta.pools()[0]
        part = file.get_slice("b")
        assert part[33:35].tobytes() == new["b"][33:35].tobytes()
        assert not part.get_changed(np.s_[33:35]).any()
        assert (dict(read.elements), dict(decoded)) == ({"b": 200}, {})  # no change in the block
        assert part[8:10].tobytes() == new["b"][8:10].tobytes()
        levels = int(pool.changed[9])
        assert read.elements == {"b": 200 + 800 + 200}  # the block and the slice
        assert decoded["differences"] == levels
        assert decoded["gaps"] <= levels
        assert part[10:16:2].tobytes() == new["b"][10:16:2].tobytes()  # the same block again
        assert (read.elements["b"], decoded["differences"]) == (200 + 800 + 200 + 300, levels)
        assert part[15:17].tobytes() == new["b"][15:17].tobytes()  # two blocks, of which one is known
        assert decoded["differences"] == levels + int(pool.changed[10])
        assert read.elements.keys() == {"b"}
    read.elements.clear()
    with sfpformat.open(data, base=read) as file:
        assert file.get_slice("a")[62:].tobytes() == new["a"][62:].tobytes()
        assert read.elements == {"a": 800 + 200}
        file.get_tensor("a")
        assert read.elements == {"a": 800 + 200 + 6400}


@pytest.mark.parametrize("kind", ["sfp", "safetensors"])
def test_a_slice_decodes_only_parts_of_a_base_in_a_file(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    base: Arrays = {name: rng.normal(size=(256, 1024)).astype(np.float16) for name in "ab"}
    base["flags"] = rng.random((500, 8)) < 0.5
    new = stepped(base)
    path = tmp_path / f"base.{kind}"
    (save_file if kind == "sfp" else save_safetensors)(base, path)
    size = Counter[str]()
    pread, decode = SafetensorsFile._pread, SfpFile.decode

    def counted_pread(self: SafetensorsFile, offset: int, length: int) -> Any:
        size["bytes"] += length
        return pread(self, offset, length)

    def counted_decode(self: SfpFile, entry: Any, selection: Selection, *rest: Any) -> Any:
        size["bytes"] += selection.size * 2 if entry.name in base else 0
        return decode(self, entry, selection, *rest)

    with sfpformat.open(written(base, new, block=1 << 14), base=path) as file:
        monkeypatch.setattr(SafetensorsFile, "_pread", counted_pread)
        monkeypatch.setattr(SfpFile, "decode", counted_decode)
        for index in (np.s_[3:5], np.s_[7, ::3]):
            assert file.get_slice("b")[index].tobytes() == new["b"][index].tobytes()
        assert file.get_slice("flags")[:, 3].tobytes() == new["flags"][:, 3].tobytes()
        assert 0 < size["bytes"] < 200_000  # of 528,288 per tensor


@clauses("R-DLT-030")
def test_slices_check_names_and_exponents_and_the_whole_check_finds_the_rest() -> None:
    base = arrays()
    data = written(base, stepped(base), block=64)
    wrong = {name: array.copy() for name, array in base.items()}
    wrong["w.0"].view(np.uint16)[0, 0] ^= 1  # the exponent stays
    with sfpformat.open(data, base=wrong) as file:
        assert file.get_slice("w.0")[20:22].tobytes() == stepped(base)["w.0"][20:22].tobytes()
        file.check(["bias"])
        for check in (
            lambda: file.check(["w.0"]),
            file.check,
            lambda: file.get_slice("w.0")[...],
            lambda: file.get_slice("w.0")[:],
        ):
            with pytest.raises(BaseMismatchError, match="the delta needs") as raised:
                check()
            assert raised.value.tensor == "w.0"
    wrong["w.0"][20:22] = 0  # other exponents: the changes do not fit
    with (
        sfpformat.open(data, base=wrong) as file,
        pytest.raises(BaseMismatchError, match="the delta needs"),
    ):
        file.get_slice("w.0")[20:22]
    with sfpformat.open(data, base=base) as file:
        file.check()
        with pytest.raises(IndexError):
            file.get_slice("w.0")[99]


def test_files_are_compared_and_read_in_memory_for_a_few_tensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 14, 1 << 19).astype(np.uint16)
    base: Arrays = {f"t{i}": (bits + np.uint16(i)).view(np.float16) for i in range(32)}
    new: Arrays = {}
    for name, array in base.items():
        new[name] = array.copy()
        new[name].view(np.uint16)[:: 1 if name == "t3" else 97] += np.uint16(1)
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "new")]
    for path, tensors in zip(paths, (base, new), strict=True):
        save_safetensors(tensors, path)
    del base
    peaks = []
    for _ in range(2):  # the first round compiles functions, which needs memory
        tracemalloc.start()
        try:
            sfpformat.write_delta(tmp_path / "d.sfp", *paths, block=1 << 18, threads=1)
            with sfpformat.open(tmp_path / "d.sfp", base=paths[0], threads=1) as file:
                for name in file:
                    assert file.get_tensor(name).tobytes() == new[name].tobytes()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 24 << 20  # each of the models has 32 MB


def test_a_large_pool_is_written_before_the_writer_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_POOL_BYTES", 1000)
    monkeypatch.setattr(writing, "_CHECKED", 100)
    rng = np.random.default_rng(0)
    base: Arrays = {f"t{i}": rng.normal(size=500).astype(np.float16) for i in range(6)}
    new = stepped(base, share=0.9)
    out = MemorySink()
    with writing.DeltaWriter(out, block=64) as writer:
        for number, name in enumerate(base):
            writer.add(name, base[name], new[name])
            assert len(writer._writer.done) == 3 * number
    assert len(writer.described.pools) == 6
    same(sfpformat.open(out.data, base=base).get_tensors(), new)
