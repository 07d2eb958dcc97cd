"""``sfp bench``: the order of contenders, exclusions, results, and output."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sfpformat.bench import child, codecs, nncodec, sparse, subject
from sfpformat.bench.labels import Box, place
from sfpformat.bench.load import WAYS
from sfpformat.bench.measure import (
    Contender,
    Record,
    Runner,
    Spread,
    WrongBitsError,
    break_even,
    rotated,
    run_round_robin,
    seconds_of,
)
from sfpformat.bench.peers import PEERS, Piece, bf16_of_ordered, ordered_of_bf16, why_not
from sfpformat.bench.results import FIELDS, codec_results
from sfpformat.bench.sections import SECTIONS
from sfpformat.bench.tables import table
from sfpformat.cli import _parser, bench
from sfpformat.dtypes import DTYPES
from sfpformat.numpy import load, save, save_file
from sfpformat.options import PRESETS

from .test_main import error_of, make, run, sharded
from .test_readme import SHIP, blocks

Capture = pytest.CaptureFixture[str]
QUICK = ("--rounds", 1, "--engines", "python", "--presets", "speed", "--threads", 2)


def model(path: Path) -> Path:
    """A model with two matrices, a vector, integers and a tensor without elements."""
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {
        "embed": rng.standard_normal((96, 64), np.float32),
        "layer": rng.standard_normal((64, 80), np.float32) / 8,
        "bias": rng.standard_normal(64, np.float32),
        "ids": np.arange(40),
        "none": np.zeros((0, 4), np.float32),
    }
    return make(path, arrays)


def answer(capsys: Capture, *words: object, code: int = 0) -> dict[str, Any]:
    """Returns what ``sfp bench`` prints as JSON."""
    capsys.readouterr()
    assert run("bench", *words, "--json") == code
    out, err = capsys.readouterr()
    assert err == ""
    value: dict[str, Any] = json.loads(out)
    return value


# ---------------------------------------------------------------------------------------------- measuring


class Logged(Runner):
    """A runner that records its calls."""

    def __init__(self, name: str, log: list[str], value: float = 1.0) -> None:
        super().__init__(Contender(name))
        self.log, self.value = log, value

    def check(self) -> None:
        self.log.append(f"check {self.contender.name}")
        if self.value < 0:
            raise WrongBitsError("other bits")

    def once(self) -> dict[str, float]:
        self.log.append(self.contender.name)
        return {"seconds": self.value}


def test_contenders_run_round_robin_and_each_round_starts_with_the_next_one() -> None:
    log: list[str] = []
    steps: list[str] = []
    records, refusals = run_round_robin([Logged(name, log) for name in "abc"], 4, steps.append)
    assert log[:3] == ["check a", "check b", "check c"]
    assert "".join(log[3:]) == "abc" + "bca" + "cab" + "abc"
    assert len(steps) == 3 * (4 + 1)
    assert [len(record.samples["seconds"]) for record in records] == [4, 4, 4]
    assert refusals == []
    assert rotated([], 3) == []


def test_a_contender_that_fails_its_check_is_excluded_and_the_others_run() -> None:
    log: list[str] = []
    records, refusals = run_round_robin([Logged("good", log), Logged("bad", log, -1.0)], 2)
    assert [record.contender.name for record in records] == ["good"]
    assert log == ["check good", "check bad", "good", "good"]
    assert [refusal.reason for refusal in refusals] == ["WrongBitsError: other bits"]


def test_each_repetition_prepares_its_work_outside_the_timed_section() -> None:
    prepared: list[int] = []
    done: list[int] = []

    def prepare() -> Callable[[], object]:
        prepared.append(len(prepared))
        return lambda: done.append(len(done))

    assert 0 <= seconds_of(prepare) < 0.05
    assert prepared == done
    assert len(done) > 1


def test_spread_returns_the_median_and_the_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_break_even_is_the_disk_speed_at_which_both_take_the_same_time() -> None:
    speed = break_even(1000, 1.0, 600, 3.0)
    assert speed == 200.0
    assert 1000 / speed + 1.0 == 600 / speed + 3.0
    assert break_even(1000, 3.0, 600, 1.0) is None  # faster on any disk
    assert break_even(600, 1.0, 600, 3.0) is None  # faster on no disk


def codec_record(who: Contender, size: float, seconds: Sequence[float]) -> Record:
    facts = {"raw_bytes": 1000.0, "weights": 500.0, "size_bytes": size}
    return Record(who, facts, {"encode_s": list(seconds), "decode_s": list(seconds)})


def test_speeds_are_compared_per_round_with_the_fastest_peer_of_the_same_thread_count() -> None:
    records = [
        codec_record(Contender("sfp", 1, "python", "default"), 600, (2.0, 4.0, 2.0)),
        codec_record(Contender("sfp", 2, "python", "default"), 600, (1.0, 1.0, 1.0)),
        codec_record(Contender("zipnn", 1), 650, (1.0, 2.0, 1.0)),
        codec_record(Contender("zipnn", 2), 650, (0.5, 0.5, 0.5)),
        codec_record(Contender("pcodec", 1), 500, (4.0, 4.0, 4.0)),
    ]
    one, two, *_ = (result.to_json() for result in codec_results("lossless", records))
    assert (one["best_decode_peer"], one["best_size_peer"]) == ("zipnn", "pcodec")
    assert one["decode_vs_best"] == {"median": 0.5, "low": 0.5, "high": 0.5}  # in the slow round too
    assert one["size_vs_best"] == 600 / 500
    assert one["size_vs_zipnn"] == 600 / 650
    assert two["encode_vs_zipnn"] == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert one["decode_mb_s"] == {"median": 1000 / 2e6, "low": 1000 / 8e6 * 3, "high": 1000 / 2e6}
    assert one["bits_per_weight"] == 9.6


# ----------------------------------------------------------------------------------------------- checking


class Flipping:
    """A peer that loses a bit, or changes its input."""

    def __init__(self, threads: int) -> None:
        self.wrong = threads > 1

    def prepare(self, arrays: Sequence[subject.Array]) -> list[Any]:
        return [bytearray(array.tobytes()) for array in arrays]

    def encode(self, prepared: list[Any]) -> list[Piece]:
        out = [Piece(bytes(blob), None) for blob in prepared]
        for blob in prepared:
            blob[0] ^= 255
        return out

    def decode(self, pieces: list[Piece]) -> list[Any]:
        blobs = [bytearray(piece.data) for piece in pieces]
        blobs[-1][-1] ^= self.wrong
        return blobs


def test_a_peer_that_returns_wrong_bits_is_excluded_and_one_that_changes_its_input_is_not() -> None:
    tensors: subject.Tensors = {"a": np.ones(5, np.float32), "b": np.zeros(3, np.int8)}
    runners = [codecs.PackerRunner(Contender("peer", n), tensors, Flipping) for n in (1, 2)]
    records, refusals = run_round_robin(runners, 2)
    assert [record.contender.threads for record in records] == [1]
    assert [refusal.contender.threads for refusal in refusals] == [2]
    assert "differ" in refusals[0].reason
    assert records[0].facts["size_bytes"] == 23


def test_a_wrong_bit_from_sfp_is_reported_and_the_exit_code_is_1(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(data: bytes, **settings: Any) -> Mapping[str, subject.Array]:
        loaded = load(data, **settings)
        loaded["bias"][3] = -loaded["bias"][3]
        return loaded

    monkeypatch.setattr(codecs, "load", broken)
    path = model(tmp_path / "m.safetensors")
    found = answer(capsys, path, *QUICK, "--only", "lossless", code=1)
    refused = [row for row in found["refused"] if row["contender"] == "sfp"]
    assert len(refused) == 2
    assert all(row["section"] == "lossless" and "WrongBitsError" in row["reason"] for row in refused)
    assert not any(row["contender"] == "sfp" for row in found["results"])
    assert run("bench", path, *QUICK, "--only", "lossless") == 1
    assert "EXCLUDED: sfp python speed: WrongBitsError" in capsys.readouterr().out


def test_a_file_that_depends_on_the_thread_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: subject.Tensors = {"a": np.ones(5, np.float32)}
    files: dict[tuple[str | None, str | None], bytes] = {}
    runners = [
        codecs.SfpRunner(Contender("sfp", n, "python", "speed"), tensors, PRESETS["speed"], files)
        for n in (1, 2)
    ]

    def odd(tensors: subject.Tensors, **settings: Any) -> bytes:
        return save(tensors, {"threads": str(settings["threads"])}, **settings)

    monkeypatch.setattr(codecs, "save", odd)
    records, refusals = run_round_robin(runners, 1)
    assert [record.contender.threads for record in records] == [1]
    assert "differs from that" in refusals[0].reason


def test_quantised_weights_may_differ_by_half_a_step_and_pruned_ones_must_be_zero() -> None:
    tensors = {"w": np.array([[0.0, 1.0, -2.0]], np.float32)}
    steps = {"w": 0.5}
    found = sparse.require_near(tensors, {"w": np.array([[0, 1.25, -2]], np.float32)}, steps)
    assert found["error_db"] == pytest.approx(10 * np.log10(0.0625 / 5))
    assert sparse.require_near(tensors, tensors, steps) == {}
    for wrong in ([[0, 1.3, -2]], [[0.01, 1, -2]], [[0, 1]]):
        with pytest.raises(WrongBitsError):
            sparse.require_near(tensors, {"w": np.array(wrong, np.float32)}, steps)


# -------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.packer])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_peer_returns_every_dtype_or_is_reported_as_not_installed(name: str, threads: int) -> None:
    rng = np.random.default_rng(1)
    tensors: subject.Tensors = {
        dtype.name: (rng.standard_normal(3000) * 9).astype(np.float32).astype(dtype.numpy)
        for dtype in DTYPES.values()
        if not dtype.name.startswith("C") and dtype.name != "F8_E8M0"
    }
    every = np.arange(1 << 16, dtype=np.uint16)
    tensors |= {"all BF16": every.view(ml_dtypes.bfloat16), "scalar": np.array(2.0), "C64": np.ones(9, "c8")}
    make_packer = PEERS[name].packer
    assert make_packer is not None
    records, refusals = run_round_robin(
        [codecs.PackerRunner(Contender(name, threads), tensors, make_packer)], 1
    )
    if why_not(name) is None:
        assert refusals == []
        assert records[0].facts["size_bytes"] < records[0].facts["raw_bytes"]
    else:
        assert records == []
        assert "No module named" in refusals[0].reason


@given(st.lists(st.integers(0, 0xFFFF), min_size=2, max_size=20))
def test_ordered_integers_of_bf16_sort_like_the_values(patterns: list[int]) -> None:
    array = np.array(patterns, np.uint16).view(ml_dtypes.bfloat16)
    ordered = ordered_of_bf16(array.view(np.uint16))
    by_integer = array[np.argsort(ordered, kind="stable")].astype(np.float32)
    assert (np.diff(by_integer[np.isfinite(by_integer)]) >= 0).all()
    assert np.array_equal(bf16_of_ordered(ordered), array.view(np.uint16))


def test_nncodec_steps_are_near_the_requested_ones_and_map_to_themselves() -> None:
    for step in (1e-4, 0.013, 0.5, 1.0, 1.999, 3.7):
        snapped = nncodec.step_of(nncodec.parameter_of(step))
        assert snapped == pytest.approx(step, rel=0.004)
        assert nncodec.step_of(nncodec.parameter_of(snapped)) == snapped == np.float32(snapped)


def test_peers_that_are_not_installed_are_listed_with_the_command_that_installs_them(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = model(tmp_path / "m.safetensors")
    found = answer(capsys, path, *QUICK, "--only", "lossless,load")
    assert set(found["not_installed"]) == set(PEERS)
    assert {row["contender"] for row in found["results"]} == {"sfp"}
    assert not any("best" in field or "vs" in field for row in found["results"] for field in row)
    assert run("bench", path, *QUICK, "--only", "lossless") == 0
    out = capsys.readouterr().out
    assert "zipnn: zipnn, torch, safetensors not installed; pip install --no-deps zipnn==0.5.4" in out


# ------------------------------------------------------------------------------------------- what is measured


def test_the_benchmark_prunes_the_smallest_weights_and_finds_a_step_for_the_bits() -> None:
    matrix = np.random.default_rng(0).standard_normal((200, 100), np.float32)
    half = subject.pruned(matrix, 0.5)
    assert np.count_nonzero(half) == 10_000
    assert np.abs(half[half != 0]).min() >= np.abs(matrix[half == 0]).max()
    step = subject.step_of_bits(half, 4.0)
    levels = np.rint(half[half != 0] / step).astype(np.int64)
    assert subject.entropy(levels) == pytest.approx(4.0, abs=0.02)
    assert subject.step_of_bits(np.zeros((3, 3), np.float32), 4.0) == 1.0
    assert np.array_equal(subject.pruned(matrix, 0.0), matrix)


def test_a_sample_is_bounded_and_spread_over_the_model() -> None:
    found = {f"m{i}": np.full((100, 10), i, np.float32) for i in range(20)}
    assert subject.sample(found, 20_000) == found
    some = subject.sample(found, 4_000)
    assert sum(matrix.size for matrix in some.values()) <= 4_000
    assert list(some) == sorted(some, key=lambda name: int(name[1:]))
    assert float(list(some.values())[-1][0, 0]) >= 12
    assert all((matrix == matrix[0, 0]).all() for matrix in some.values())


def test_a_cast_changes_the_float_tensors_only() -> None:
    tensors: subject.Tensors = {"w": np.array([1.00001, 3e38], np.float64), "ids": np.arange(3)}
    assert subject.cast(tensors, None) == tensors
    cast = subject.cast(tensors, "BF16")
    assert cast["w"].dtype == ml_dtypes.bfloat16
    assert cast["ids"].dtype == np.int64
    assert subject.Subject("m", tensors).dtypes == ["I64", "F64"]


# ------------------------------------------------------------------------------------------------ children


def test_a_failed_child_process_raises_with_its_last_message() -> None:
    with pytest.raises(child.ChildError, match="no such luck"):
        child.run_python(["-c", "raise SystemExit('no such luck')"])
    with pytest.raises(child.ChildError, match="exit code 3"):
        child.run_python(["-c", "raise SystemExit(3)"])
    seconds, out = child.run_python(["-c", "import sfpformat; print(sfpformat.__name__)"])
    assert seconds > 0
    assert out == "sfpformat\n"


@pytest.mark.parametrize("can_reset", [True, False])
def test_memory_is_measured_even_if_the_peak_cannot_be_reset(
    can_reset: bool, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors: subject.Tensors = {"w": np.ones((64, 64), np.float32)}
    path = str(tmp_path / "m.sfp")
    save_file(tensors, path)
    request = {"path": path, "heads": path, "engine": "python", "threads": 1}
    monkeypatch.setattr(sys, "argv", ["child", json.dumps(request)])
    if not can_reset:
        monkeypatch.setattr(child, "_CLEAR", tmp_path / "missing" / "clear_refs")
    expected = child.VMHWM if can_reset and child._reset_peak() else child.MAXRSS
    child.main()
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == expected
    assert found["output_bytes"] == 64 * 64 * 4
    assert found["growth"] >= 0
    assert found["fingerprint"] == child.fingerprint(tensors) != child.fingerprint({"v": tensors["w"]})


# ------------------------------------------------------------------------------------------------ the command


def test_all_sections_run_and_every_field_is_documented(tmp_path: Path, capsys: Capture) -> None:
    path = model(tmp_path / "m.safetensors")
    found = answer(capsys, path, *QUICK, "--dtype", "bf16")
    assert found["refused"] == []
    assert found["model"]["dtypes"] == ["BF16", "I64"]
    assert found["model"]["name"] == "m.safetensors"
    assert set(found["rounds"]) == set(SECTIONS) == set(bench._SECTIONS)
    assert found["not_installed"] == {name: why for name in PEERS if (why := why_not(name)) is not None}
    assert str(tmp_path) not in json.dumps(found)
    rows = found["results"]
    assert {row["section"] for row in rows} == set(SECTIONS)
    assert {field for row in rows for field in row} <= set(FIELDS)
    for row in rows:
        for value in row.values():
            if isinstance(value, dict):
                assert value["low"] <= value["median"] <= value["high"]
    names = {section: {row["contender"] for row in rows if row["section"] == section} for section in SECTIONS}
    for name, peer in PEERS.items():
        assert (name in names[peer.section]) == (why_not(name) is None)
    ours = [row for row in rows if row["engine"] == "python"]
    assert {row["threads"] for row in ours} == {1, 2}
    lossless = [row for row in ours if row["section"] == "lossless"]
    assert all(0.3 < row["size_ratio"] < 1 and row["decode_mb_s"]["median"] > 0 for row in lossless)
    quantised = [row for row in rows if row["section"] == "sparse"]
    assert len({round(row["error_db"], 3) for row in quantised if row["case"] == "50 % pruned"}) == 1
    loads = [row for row in rows if row["section"] == "load" and row["contender"] == "safetensors"]
    assert [row["case"] for row in loads] == (list(WAYS) if why_not("safetensors") is None else [])


def test_the_text_output_shows_the_same_results_as_tables(tmp_path: Path, capsys: Capture) -> None:
    assert run("bench", model(tmp_path / "m.safetensors"), *QUICK, "--only", "lossless,sparse,load") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("m.safetensors: 5 tensors, 11,368 weights, 45.6 kB of F32, I64; Python ")
    for words in (
        "lossless: ",
        "sparse: ",
        "load: ",
        "sfp python speed",
        "decode MB/s",
        "90 % pruned",
        "1 round",
    ):
        assert words in out
    assert "\nmemory: " not in out


def test_bench_accepts_shards_sfp_files_and_the_bundled_model(tmp_path: Path, capsys: Capture) -> None:
    quick = (*QUICK, "--only", "lossless", "--threads", 1)
    index = sharded(tmp_path / "checkpoint")
    assert answer(capsys, index, *quick)["model"]["tensors"] == 6
    assert answer(capsys, tmp_path / "checkpoint", *quick)["threads"] == [1]
    assert run("pack", model(tmp_path / "m.safetensors"), "-o", tmp_path / "m.sfp") == 0
    assert answer(capsys, tmp_path / "m.sfp", *quick)["model"]["weights"] == 11_368
    assert answer(capsys, *quick)["model"]["weights"] == 1_009_536


def test_a_model_without_matrices_has_no_sparse_results(tmp_path: Path, capsys: Capture) -> None:
    path = make(tmp_path / "m.safetensors", {"bias": np.ones(64, np.float32)})
    assert run("bench", path, *QUICK, "--only", "sparse") == 0
    assert "not measured" in capsys.readouterr().out
    assert answer(capsys, path, *QUICK, "--only", "sparse")["results"] == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["missing.sfp"], "missing.sfp: No such file"),
        (["--only", "lossless,speed"], "unknown section 'speed'; choose from lossless, sparse"),
        (["--only", ","], "the list of sections is empty"),
        (["--engines", "warp"], "unknown engine 'warp'"),
        (["--presets", "fast"], "unknown preset 'fast'; choose from default"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--rounds", "many"], "--rounds"),
        (["--threads", "0"], "--threads is 0"),
        (["--dtype", "f16"], "--dtype"),
        (["--plot", "bench.pdf"], "--plot writes .png or .svg; name it bench.png"),
        (["--plot", "bench.png", "--only", "load"], "--plot needs the section lossless"),
        (["a", "b"], "unknown arguments: b"),
    ],
    ids=lambda case: " ".join(case) if isinstance(case, list) else "",
)
def test_wrong_arguments_end_with_one_line_and_write_nothing(
    words: list[str], told: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in error_of(capsys, "bench", *words)
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_empty_files_end_with_an_error(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "m").write_bytes(b"hello")
    assert "not a file of tensors" in error_of(capsys, "bench", tmp_path / "m")
    empty = make(tmp_path / "e.safetensors", {"none": np.zeros((0, 4), np.float32)})
    assert "all tensors are empty" in error_of(capsys, "bench", empty)


def test_commands_in_the_guide_are_valid() -> None:
    (commands,) = [block for block in blocks(SHIP, "sh") if "sfp bench" in block]
    lines = [shlex.split(line, comments=True) for line in commands.strip().splitlines()]
    ours = [words[1:] for words in lines if words[:1] == ["sfp"]]
    assert ours
    for words in ours:
        assert words[0] == "bench"
        assert _parser("bench").parse_args(words).run is bench.run
    assert any("zipnn==0.5.4" in words for words in lines)


# ------------------------------------------------------------------------------------------------ the picture


def test_plot_writes_a_png(tmp_path: Path, capsys: Capture) -> None:
    path = model(tmp_path / "m.safetensors")
    words = ("bench", path, *QUICK, "--only", "lossless", "--plot")
    assert run(*words, tmp_path / "p.png") == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert run(*words, tmp_path / "p.SVG") == 0
    assert re.search(r"<svg\b", (tmp_path / "p.SVG").read_text())
    capsys.readouterr()
    image = path.rename(tmp_path / "m.png")
    assert "is an input file" in error_of(capsys, "bench", image, "--plot", image)


def test_a_missing_matplotlib_ends_bench_before_it_measures(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfpformat.bench.size_speed_plot.importlib.util.find_spec", lambda name: None)
    told = error_of(capsys, "bench", "missing.sfp", "--plot", tmp_path / "p.png")
    assert "matplotlib is not installed; pip install 'sfpformat[plot]'" in told


@given(st.lists(st.tuples(st.floats(100, 900), st.floats(100, 500)), min_size=1, max_size=8))
def test_labels_of_the_plot_are_inside_and_do_not_overlap(points: list[tuple[float, float]]) -> None:
    bounds = Box(0, 0, 1000, 600)
    boxes = place(points, [(90.0, 24.0)] * len(points), bounds, 10.0)
    for i, box in enumerate(boxes):
        assert box.outside(bounds) == pytest.approx(0)
        assert (box.right - box.left, box.high - box.low) == pytest.approx((90.0, 24.0))
        assert all(box.overlap(other) == 0 for other in boxes[:i])


def test_the_table_names_the_best_peer() -> None:
    records = [
        codec_record(Contender("sfp", 1, "python", "default"), 600, (2.0,)),
        codec_record(Contender("zipnn"), 650, (1.0,)),
        codec_record(Contender("pcodec"), 500, (4.0,)),
    ]
    header, rows = table("lossless", codec_results("lossless", records))
    row = dict(zip(header, rows[0], strict=True))
    assert row["decode: best peer"] == "0.50 zipnn"
    assert row["size: best peer"] == "1.20 pcodec"
    assert "decode: zipnn" not in row
