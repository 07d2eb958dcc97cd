"""What ``sfp pack`` reports about targets and results, in dry runs and after writing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

import sfpformat
from sfpformat import OptionError, Options, SfpFile, Uniform
from sfpformat.cli.outcome import _Bound, _compare, decibels
from sfpformat.coding.quantisers import Exact
from sfpformat.dtypes import DTYPES
from sfpformat.numpy import load_file, save

from ..encode.test_finite import at_the_ends, lossy_options
from ..support.strategies import FLOATS, seeds
from .test_main import error_of, run
from .test_pack import Capture

RNG = np.random.default_rng(3)
TENSORS: dict[str, NDArray[Any]] = {
    "a.weight": RNG.standard_normal((96, 256)).astype(np.float32),
    "b.weight": (RNG.standard_normal((64, 128)) * 0.02).astype(np.float16),
    "a.bias": np.ones(96, np.float32),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of two matrices and a bias."""
    save_file(TENSORS, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def summary(capsys: Capture, source: Path, *words: object) -> dict[str, Any]:
    """What the command prints as JSON."""
    run("pack", source, "-o", source.with_name("m.sfp"), "--json", *words)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_summary_states_the_target_and_what_was_reached(source: Path, capsys: Capture) -> None:
    (group,) = summary(capsys, source, "--prune", "0.5", "--bits", "4")["quantised"]
    assert group["asked"] == "4 bits per survivor, 50 % pruned"
    assert group["tensors"] == ["a.weight", "b.weight"]
    assert group["bits_per_survivor"] == pytest.approx(4, rel=0.05)
    assert group["bits_per_position"] == pytest.approx(3.1, abs=0.15)
    found = load_file(source.with_name("m.sfp"))
    errors, power = 0.0, 0.0
    for name in group["tensors"]:
        wide = TENSORS[name].astype(np.float64)
        wide = np.where(np.abs(wide) > np.quantile(np.abs(wide), 0.5), wide, 0)
        errors += float(np.square(found[name].astype(np.float64) - wide).sum())
        power += float(np.square(wide).sum())
    assert group["error_db"] == pytest.approx(decibels(errors, power), abs=0.01)
    run("pack", source, "-o", source.with_name("m.sfp"), "--prune", "0.5", "--bits", "4")
    assert "4 bits per survivor, 50 % pruned: 2 tensors with 4." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "key", "asked", "line"),
    [
        ("--dtype F16", "pruned_or_cast", "cast to F16", "cast to F16: 1 tensor with"),
        ("--prune 0.5", "pruned_or_cast", "50 % pruned", "50 % pruned: 2 tensors with"),
        (
            "--prune 0.5 --bits 4",
            "quantised",
            "4 bits per survivor, 50 % pruned",
            "4 bits per survivor, 50 % pruned: 2 tensors with",
        ),
        (
            "--prune 0.5 --bits 30 --like b* --lossless",
            "pruned_or_cast",
            "50 % pruned",
            "1 not quantised, because lossless coding takes no more bits",
        ),
    ],
)
def test_the_summary_states_the_error_of_every_change_against_the_input(
    source: Path, capsys: Capture, words: str, key: str, asked: str, line: str
) -> None:
    (group,) = summary(capsys, source, *words.split())[key]
    assert group["asked"] == asked
    assert run("diff", source, source.with_name("m.sfp"), "--json") == 1
    found = [row for row in json.loads(capsys.readouterr().out)["tensors"] if row["name"] in group["tensors"]]
    assert {row["identical"] for row in found} == {False}
    if len(found) == 1:
        assert group["total_error_db"] == pytest.approx(found[0]["error_db"])
    packed, errors, power = load_file(source.with_name("m.sfp")), 0.0, 0.0
    for name in group["tensors"]:
        wide = TENSORS[name].astype(np.float64)
        errors += float(np.square(packed[name].astype(np.float64) - wide).sum())
        power += float(np.square(wide).sum())
    assert group["total_error_db"] == pytest.approx(decibels(errors, power))
    run("pack", source, "-o", source.with_name("m.sfp"), *words.split())
    out = capsys.readouterr().out
    assert line in out
    assert f"error {group['total_error_db']:.2f} dB" in out
    if key == "quantised":
        assert f"(of the survivors {group['error_db']:.2f} dB)" in out


def test_lossless_packs_report_no_changed_tensors(source: Path, capsys: Capture) -> None:
    found = summary(capsys, source)
    assert found["quantised"] == found["pruned_or_cast"] == []


def test_pruning_makes_a_file_with_a_bit_target_smaller(source: Path, capsys: Capture) -> None:
    dense = summary(capsys, source, "--bits", "4")["output_bytes"]
    assert summary(capsys, source, "--bits", "4", "--prune", "0.5")["output_bytes"] < 0.85 * dense


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--bits", "4", "--prune", "0.5"),
        ("--budget", "3", "--like", "b*", "--table", "8", "--scale", "row"),
        ("--budget", "3", "--budget-scope", "tensor", "--metadata", "a=b"),
    ],
    ids=" ".join,
)
def test_a_dry_run_prints_the_exact_sizes_and_writes_nothing(
    source: Path, capsys: Capture, words: tuple[str, ...]
) -> None:
    dry = summary(capsys, source, "--dry-run", *words)
    assert [path.name for path in source.parent.iterdir()] == [source.name]
    real = summary(capsys, source, *words)
    target = source.with_name("m.sfp")
    assert dry["output_bytes"] == real["output_bytes"] == target.stat().st_size
    assert dry["quantised"] == real["quantised"]
    assert dry["dry_run"]
    assert not real["dry_run"]
    with sfpformat.open(target) as file:
        assert {row["name"]: row["stored_bytes"] for row in dry["sizes"]} == {
            name: file.entry(name).stored_bytes for name in file
        }


def test_a_dry_run_keeps_the_old_file_and_prints_a_table(source: Path, capsys: Capture) -> None:
    target = source.with_name("m.sfp")
    target.write_bytes(b"old")
    assert run("pack", source, "-o", target, "--bits", "4", "--dry-run") == 0
    out = capsys.readouterr().out
    assert target.read_bytes() == b"old"
    assert "bits/survivor" in out
    assert "a.weight" in out
    assert "not written" in out


def test_a_dry_run_counts_shards(source: Path, capsys: Capture) -> None:
    folder = source.parent / "checkpoint"
    folder.mkdir()
    index = {}
    for number, name in enumerate(TENSORS, 1):
        shard = f"model-{number:05}-of-00003.safetensors"
        save_file({name: TENSORS[name]}, folder / shard)
        index[name] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    target = source.with_name("shards.sfp")
    words = ("pack", folder, "-o", target, "--bits", "4", "--json")
    run(*words, "--dry-run")
    dry = json.loads(capsys.readouterr().out)
    assert not list(source.parent.glob("shards*"))
    run(*words)
    real = json.loads(capsys.readouterr().out)
    assert dry["outputs"] == real["outputs"]
    assert dry["output_bytes"] == real["output_bytes"]


def test_tensors_that_fit_the_target_losslessly_are_listed(source: Path, capsys: Capture) -> None:
    for words in (("--bits", "30"), ("--budget", "30"), ("--error-db", "-300")):
        found = summary(capsys, source, *words, "--verify")
        assert found["kept_lossless"] == ["a.weight", "b.weight"]
        assert found["quantised"] == []
        assert found["verified"]


@pytest.mark.parametrize(
    "words",
    [
        ("--error-db", "-30", "--scale", "row"),
        ("--bits", "3", "--prune", "2:4"),
        ("--budget", "4", "--prune", "0.7"),
        ("--prune", "0.5", "--dtype", "BF16"),
        ("--table", "8"),
    ],
    ids=" ".join,
)
def test_verify_accepts_every_lossy_pack(source: Path, capsys: Capture, words: tuple[str, ...]) -> None:
    assert run("pack", source, "-o", source.with_name("m.sfp"), *words, "--verify") == 0
    assert "verified" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "words", "fault"),
    [
        (lambda a: np.where(np.abs(a) == np.abs(a).max(), np.inf, a), ("--bits", "4"), "infinite or NaN"),
        (lambda a: np.where(a == 0, 1, a), ("--bits", "4", "--prune", "0.5"), "pruned weights are not 0"),
        (lambda a: a * 1.2, ("--error-db", "-30"), "above the requested -30 dB"),
        (
            lambda a: a + (np.arange(a.size) == 7).reshape(a.shape) * 9,
            ("--bits", "4"),
            ": 1 weights have errors",
        ),
        (
            lambda a: a + (np.arange(a.size) == 7).reshape(a.shape) * 9,
            ("--table", "64"),
            ": 1 weights have errors",
        ),
        (lambda a: a * 1.2, ("--prune", "0.5"), "differs from the input"),
    ],
    ids=[
        "not finite",
        "not pruned",
        "too great an error",
        "beyond a step",
        "beyond a centroid",
        "not lossless",
    ],
)
def test_pack_verify_reports_what_is_wrong_with_a_lossy_tensor(
    source: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, damage: Any, words: Any, fault: str
) -> None:
    real = SfpFile.get_tensor
    monkeypatch.setattr(
        SfpFile,
        "get_tensor",
        lambda self, name: damage(real(self, name)).astype(TENSORS[name].dtype),
    )
    assert run("pack", source, "-o", source.with_name("m.sfp"), *words, "--verify", "--keep", "a.bias") == 1
    assert fault in capsys.readouterr().out


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FLOATS), st.data())
def test_quantised_weights_stay_within_the_bound_of_their_quantiser(name: str, data: st.DataObject) -> None:
    array = data.draw(at_the_ends(DTYPES[name]))
    greatest = float(np.abs(array.astype(np.float64)).max(initial=0))
    options = data.draw(lossy_options(min(greatest, 2e38)))
    weighted = data.draw(st.sampled_from([None, "root", "full"])) if not options.lossless else None
    importance = np.random.default_rng(data.draw(seeds)).random(array.shape).astype(np.float32)
    if options.lossy is not None:
        options = options.but(quantiser=replace(options.lossy, weighted=weighted))
    options = options.but(importance=None)
    importances = {} if weighted is None else {"w": importance}
    try:
        written = save({"w": array}, options=options, importances=importances)
    except OptionError:
        return  # a step that is too great
    with sfpformat.open(written) as file:
        entry = file.entry("w")
        if entry.fingerprints is None or isinstance(entry.fingerprints.quantiser, Exact):
            return
        bound = _Bound.of(file, entry, weighted=weighted is not None)
        found = _compare(array.reshape(-1), file.get_tensor("w").reshape(-1), None, bound)
        assert (found.far, found.not_finite, found.alive) == (0, 0, 0)
        beyond = np.abs(array.astype(np.float64)).reshape(-1) + 1.01 * bound.errors(
            0, array.astype(np.float64).reshape(-1)
        )
        if beyond.size:
            assert _compare(array.reshape(-1), beyond, None, bound).far > 0


def test_sfp_verify_names_tensors_with_quantised_weights_that_are_not_finite(
    tmp_path: Path, capsys: Capture
) -> None:
    """Older versions wrote such files."""
    tensors: dict[str, NDArray[Any]] = {
        "a": np.full((8, 64), 65504, np.float16),
        "b": np.array([[1.0, np.inf]], np.float32),
    }
    options = {"a": Options(Uniform(step=26000.0, rate_weight=0), coding="fingerprint")}
    path = tmp_path / "m.sfp"
    path.write_bytes(save(tensors, options=options))
    assert run("verify", path) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfpformat.encode.finite.Reconstruction.lowered", lambda self, numbers, *_: numbers)
        path.write_bytes(save(tensors, options=options, engine="python"))
    capsys.readouterr()
    assert run("verify", path) == 1
    out = capsys.readouterr().out
    assert "tensor 'a': 512 quantised weights are infinite or NaN" in out
    assert "no faults" in out  # SPEC.md allows such a file
    assert run("verify", path, "--json") == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert report["not_finite"] == {"a": 512}
    assert report["ok"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--budget-scope", "tensor"), "--budget-scope needs --budget"),
        (("--budget", "3", "--scale", "row"), "--budget-scope tensor"),
        (("--verify", "--dry-run"), "--dry-run writes none"),
        (("--error-db", "30"), "below 0"),
    ],
)
def test_conflicting_options_are_refused(
    source: Path, capsys: Capture, words: tuple[str, ...], message: str
) -> None:
    assert message in error_of(capsys, "pack", source, "-o", source.with_name("m.sfp"), *words)


def test_a_budget_per_tensor_can_be_combined_with_a_scale(source: Path, capsys: Capture) -> None:
    words = ("--budget", "4", "--budget-scope", "tensor", "--scale", "row")
    (group,) = summary(capsys, source, *words)["quantised"]
    assert group["asked"] == "4 bits per position"
    assert group["bits_per_position"] == pytest.approx(4.1, abs=0.2)


def test_a_budget_is_met_when_importances_are_stored_too(source: Path, capsys: Capture) -> None:
    importances = {
        name: RNG.random(TENSORS[name].shape).astype(np.float32) for name in ("a.weight", "b.weight")
    }
    save_file(importances, source.with_name("i.safetensors"))
    words = (
        "--budget",
        "3",
        "--importance",
        source.with_name("i.safetensors"),
        "--weighted",
        "root",
        "--verify",
    )
    (group,) = summary(capsys, source, *words)["quantised"]
    assert group["bits_per_position"] == pytest.approx(3.1, abs=0.15)
    assert group["importance_bits"] > 5 * 24576
    run("pack", source, "-o", source.with_name("m.sfp"), *words)
    assert "per position without the importances, error" in capsys.readouterr().out
