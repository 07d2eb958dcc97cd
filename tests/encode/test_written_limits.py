"""SPEC.md chapter 19 for writers: a writer refuses what readers would refuse."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sfp_conformance.forge import Forge, Raw

import sfpformat
from conformance.recipes.samples import everything, weights
from sfpformat import DEFAULT_LIMITS, LimitError, Limits, OptionError, Options, Table, Uniform, Writer
from sfpformat.decode.validate import validate
from sfpformat.numpy import load, save, save_file

from ..cli.test_main import error_of, make, run
from ..support.clauses import clauses
from ..support.forge import accepted

Capture = pytest.CaptureFixture[str]
ONE = np.ones((4, 8), np.float32)


def limits_but(**changes: int) -> Limits:
    """Returns the default limits with these changes."""
    return replace(DEFAULT_LIMITS, **changes)


# ----------------------------------------------------------------------------------------------- expansion

# Like the defaults, for tensors that are a thousand times smaller.
SMALL = limits_but(expansion_floor=1 << 18, expansion=1 << 10)


def chunk_of(data: bytes, limits: Limits = DEFAULT_LIMITS) -> int:
    """The number of positions per chunk of the tensor z."""
    with sfpformat.open(data, limits=limits) as file:
        entry = file.entry("z")
        return entry.segment * entry.chunk


@clauses("R-LIM-001")
def test_half_a_gigabyte_of_zeros_can_be_read_with_the_default_limits() -> None:
    data = save({"z": np.zeros((1 << 25) + 1)}, options=Options(chunk=1 << 24))
    assert len(data) < 20_000
    with sfpformat.open(data) as file:
        assert file.get_slice("z")[-1] == 0


@clauses("R-LIM-001")
@pytest.mark.parametrize("options", [Options(), Options(Uniform(step=1.0, scale="row"))])
@pytest.mark.parametrize("survivors", [0, 1])
def test_chunks_that_would_exceed_the_expansion_limit_are_made_smaller(
    options: Options, survivors: int
) -> None:
    array = np.zeros((256, 4096), np.float32)
    array[0, :survivors] = 3
    asked = options.but(chunk=1 << 20, coding="fingerprint")
    assert chunk_of(save({"z": array}, options=asked)) > 1 << 19
    data = save({"z": array}, options=asked, limits=SMALL)
    assert chunk_of(data, SMALL) < 1 << 18
    assert np.array_equal(load(data, limits=SMALL)["z"], array)
    assert validate(data, limits=SMALL).canonical


def test_every_engine_makes_the_same_smaller_chunks() -> None:
    pytest.importorskip("numba")
    array, options = np.zeros((256, 4096), np.float32), Options(chunk=1 << 20)
    files = {save({"z": array}, options=options, limits=SMALL, engine=name) for name in ("python", "numba")}
    assert len(files) == 1


@clauses("R-LIM-001")
def test_chunks_within_the_expansion_limit_keep_their_size() -> None:
    few = Options(Table(centroids=2), chunk=1 << 20)
    for array, options in ((weights(256, 4096), Options(chunk=1 << 20)), (weights(256, 4096), few)):
        data = save({"z": array}, options=options)
        assert save({"z": array}, options=options, limits=SMALL) == data
        assert chunk_of(data) > 1 << 19


@clauses("R-LIM-001")
def test_a_raised_limit_keeps_the_requested_chunk_size() -> None:
    array = np.zeros((256, 4096), np.float32)
    options = Options(chunk=1 << 20)
    raised = replace(SMALL, expansion=1 << 20)
    data = save({"z": array}, options=options, limits=raised)
    assert chunk_of(data, raised) > 1 << 19
    with sfpformat.open(data, limits=SMALL) as file, pytest.raises(LimitError, match="expansion"):
        file.get_tensor("z")


@clauses("R-LIM-001", "R-STR-005")
def test_an_expansion_that_smaller_chunks_cannot_reduce_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.sfp"
    path.write_bytes(b"old")
    tight = replace(SMALL, expansion=2)
    with pytest.raises(OptionError, match=r"tensor 'z': .*expansion.*smaller chunks.*Limits\(expansion="):
        save_file({"z": np.zeros((256, 4096), np.float32)}, path, limits=tight)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


# -------------------------------------------------------------------------------------------- other limits

DEEP = np.ones([1] * 40, np.float32)
EXCEEDING: dict[str, tuple[str, Limits, dict[str, Any], str]] = {
    "rank": ("rank", DEFAULT_LIMITS, {"w": DEEP}, "reshape"),
    "name": ("name_bytes", DEFAULT_LIMITS, {"é" * 513: ONE}, "shorten"),
    "bytes": ("tensor_bytes", limits_but(tensor_bytes=127), {"w": ONE}, "in parts"),
    "tensors": ("tensors", limits_but(tensors=1), {"v": ONE, "w": ONE}, "several files"),
    "directory": ("directory_bytes", limits_but(directory_bytes=30), {"w": ONE}, "several files"),
    "names": ("directory_bytes", limits_but(directory_bytes=150), {"w" * 200: ONE}, "several files"),
    "depth": ("depth", limits_but(depth=3), {"w": weights(8, 200)}, "nested keys"),
}


@clauses("R-LIM-001")
@pytest.mark.parametrize("case", EXCEEDING)
def test_tensors_over_a_readers_limit_are_refused_by_the_writer(case: str) -> None:
    limit, limits, tensors, advice = EXCEEDING[case]
    with pytest.raises(OptionError, match=f"{advice}.*Limits\\({limit}=") as caught:
        save(tensors, limits=limits, options=Options(coding="fingerprint"))
    needed = int(str(caught.value).partition(f"Limits({limit}=")[2].partition(")")[0])
    raised = replace(limits, **{limit: max(needed, 1000 if limit == "directory_bytes" else 0)})
    data = save(tensors, limits=raised, options=Options(coding="fingerprint"))
    assert load(data, limits=raised).keys() == tensors.keys()
    with pytest.raises(LimitError, match=limit):
        load(data, limits=limits)


@clauses("R-LIM-001")
def test_a_writer_stays_usable_after_a_refused_tensor() -> None:
    out = io.BytesIO()
    with Writer(out) as writer:
        with pytest.raises(
            OptionError, match=r"tensor 'deep': .*rank would be 40, but readers accept at most 32"
        ):
            writer.add("deep", DEEP)
        writer.add("w", ONE)
    assert list(accepted(out.getvalue())) == ["w"]


@clauses("R-LIM-001")
def test_metadata_too_long_for_the_directory_are_refused_before_a_file_is_created(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="metadata"):
        Writer(tmp_path / "m.sfp", metadata={"k": "v" * 100}, limits=limits_but(directory_bytes=100))
    assert list(tmp_path.iterdir()) == []


@clauses("R-LIM-001")
@pytest.mark.parametrize(
    ("limit", "value"), [("depth", 8), ("rank", 1), ("tensor_bytes", 100), ("name_bytes", 3), ("tensors", 0)]
)
def test_a_copied_tensor_over_a_limit_is_refused(limit: str, value: int) -> None:
    source = Forge.of(everything())
    source.part("runs").entry["x-deep"] = Raw(b"\x91" * 6 + b"\x90")
    with sfpformat.open(source.build()) as file:
        entry = file.entry("runs")
        chunks = [file.read_checked(entry, k) for k in range(len(entry.chunks))]
        with Writer(io.BytesIO(), limits=limits_but(**{limit: value})) as writer:
            with pytest.raises(OptionError, match=limit):
                writer.add_encoded(entry, None, chunks)
            assert writer.done == ()
        with Writer(io.BytesIO()) as writer:
            writer.add_encoded(entry, None, chunks)


@clauses("R-LIM-001")
def test_a_job_with_raised_limits_resumes(tmp_path: Path) -> None:
    raised = limits_but(rank=40)
    stopped = Writer(tmp_path / "m", resume_key="job", limits=raised)
    stopped.add("deep", DEEP)
    stopped.abort(keep=True)
    with Writer(tmp_path / "m", resume_key="job", limits=raised) as writer:
        assert writer.done == ("deep",)


@pytest.mark.parametrize("value", [-1, 1.5, "9", True, None])
def test_a_limit_that_is_not_a_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match="tensors"):
        Limits(tensors=value)


# ---------------------------------------------------------------------------------------------- the command


def test_the_option_limit_applies_to_writing_and_reading(tmp_path: Path, capsys: Capture) -> None:
    source, packed = make(tmp_path / "m.safetensors", {"deep": DEEP, "w": ONE}), tmp_path / "m.sfp"
    told = error_of(capsys, "pack", source, "-o", packed)
    assert "tensor 'deep'" in told
    assert "--limit rank=40" in told
    assert list(tmp_path.iterdir()) == [source]
    limit = ("--limit", "rank=40")
    assert run("pack", source, "-o", packed, *limit, "--verify") == 0
    readers: list[tuple[object, ...]] = [
        ("info", packed),
        ("diff", source, packed),
        ("unpack", packed, "-o", tmp_path / "n.safetensors"),
    ]
    for words in readers:
        capsys.readouterr()
        assert "--limit rank=..." in error_of(capsys, *words)
        assert run(*words, *limit) == 0
    assert run("verify", packed) == 1
    assert run("verify", packed, *limit) == 0
    capsys.readouterr()
    assert "no tensor has an importance" in error_of(
        capsys, "prune", packed, "--sparsity", "0.5", "-o", tmp_path / "p.sfp", *limit
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("rank", "not NAME=VALUE"),
        ("ranks=3", "the nearest is 'rank'"),
        ("rank=many", "not a whole number"),
        ("rank=65", "rank 65, must be at most 200 and 64"),
        ("tensors=-1", "whole number of at least 0"),
    ],
)
def test_an_invalid_limit_is_refused_with_its_range(
    words: str, told: str, tmp_path: Path, capsys: Capture
) -> None:
    assert told in error_of(capsys, "info", "x.sfp", "--limit", words)


def test_a_limit_can_be_spelled_with_underscores_or_dashes(tmp_path: Path, capsys: Capture) -> None:
    source, packed = make(tmp_path / "m.safetensors", {"w": ONE}), tmp_path / "m.sfp"
    assert run("pack", source, "-o", packed) == 0
    capsys.readouterr()
    for name in ("tensor-bytes", "tensor_bytes"):
        told = error_of(capsys, "unpack", packed, "-o", tmp_path / "n.safetensors", "--limit", f"{name}=127")
        assert "tensor_bytes is 128" in told
