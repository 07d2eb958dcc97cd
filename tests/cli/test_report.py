"""``sfp info``, ``sfp verify`` and ``sfp diff``: results, and errors for invalid input."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import sfpformat
from sfpformat import Exact, Options, SfpFile, Table, Uniform
from sfpformat.cli.diff import compare
from sfpformat.cli.report import PARTS, report_tensor
from sfpformat.numpy import load_file, save
from sfpformat.numpy import save_file as save_sfp

from .test_main import checkpoint, error_of, make, run, sharded

Capture = pytest.CaptureFixture[str]


@cache
def everything() -> bytes:
    """A file with both codings and mask kinds, all quantisers, a scale and importances."""
    w = np.where(np.arange(96 * 64) % 5 < 2, 0, np.sin(np.arange(96 * 64))).astype(np.float32).reshape(96, 64)
    tensors: dict[str, NDArray[Any]] = {
        "raw": np.arange(40, dtype=np.int16),
        "runs": w,
        "octets": w.astype(np.float16),
        "uniform": w,
        "table": w,
        "factors": w,
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.0),
    }
    options = {
        "runs": Options(mask="runs", chunk=1024),
        "octets": Options(mask="octets"),
        "uniform": Options(Uniform(step=0.25, scale="row")),
        "table": Options(Table(centroids=9), mask="none"),
        "empty": Options(coding="fingerprint"),
    }
    factors = (np.ones(96, np.float32), np.ones(64, np.float32))
    importances: dict[str, Any] = {"uniform": np.abs(w), "factors": factors}
    return save(tensors, options=options, importances=importances)


@pytest.mark.parametrize("words", ["", "--dtype BF16", "--step 0.1", "--window 3", "--group 2", "--table 9"])
def test_zeros_count_as_pruned_without_a_mask(words: str, tmp_path: Path, capsys: Capture) -> None:
    array = np.random.default_rng(5).standard_normal((96, 64)).astype(np.float32)
    source = make(tmp_path / "m.safetensors", {"w": array})
    target = tmp_path / "m.sfp"
    run("pack", source, "-o", target, "--mask", "none", "--prune", "0.5", *words.split(), "--json")
    found = json.loads(capsys.readouterr().out)
    share = np.count_nonzero(load_file(target)["w"] == 0) / array.size
    assert share >= 0.5 or words == "--table 9"
    assert found["sparsity"] == share
    run("info", target, "--json")
    assert json.loads(capsys.readouterr().out)["totals"]["sparsity"] == share


def test_tensors_without_zeros_are_not_decoded_for_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(5).standard_normal((96, 64)).astype(np.float32)
    array[0, 0] = 0
    with SfpFile(save({"w": array, "half": np.where(array > 0, array, 0)})) as file:
        monkeypatch.setattr(SfpFile, "get_tensor", None)
        assert report_tensor(file, "w").stored_zeros == 0
        assert report_tensor(file, "half").sparsity == np.count_nonzero(array <= 0) / array.size


def sample(path: Path) -> Path:
    """An `.sfp` file with every coding."""
    path.write_bytes(everything())
    return path


def output(capsys: Capture, *words: object, code: int = 0) -> str:
    """What a command prints on stdout."""
    capsys.readouterr()
    assert run(*words) == code
    out, err = capsys.readouterr()
    assert err == ""
    return out


# --------------------------------------------------------------------------------------------------- info


def test_the_parts_of_every_tensor_add_up_to_its_bytes() -> None:
    with sfpformat.open(everything()) as file:
        for name in file:
            report = report_tensor(file, name)
            assert sum(report.bits.values()) == 8 * file.entry(name).stored_bytes
            assert min(report.bits.values()) >= 0
            if report.survivors is not None:
                assert report.survivors == np.count_nonzero(file.get_mask(name))


def test_tensors_and_overhead_add_up_to_the_file_size(tmp_path: Path, capsys: Capture) -> None:
    path = sample(tmp_path / "m.sfp")
    found = json.loads(output(capsys, "info", path, "--json"))
    totals = found["totals"]
    assert totals["file_bytes"] == path.stat().st_size == totals["stored_bytes"] + totals["directory_bytes"]
    for part in PARTS:
        assert sum(tensor["bits"][part] for tensor in found["tensors"]) == totals["bits"][part]
    assert sum(totals["bits"].values()) == 8 * totals["stored_bytes"]
    assert totals["bits_per_weight"] == 8 * totals["file_bytes"] / totals["positions"]
    assert found["format"] == "1.0"


def test_the_table_has_a_line_for_each_tensor_and_the_totals(tmp_path: Path, capsys: Capture) -> None:
    out = output(capsys, "info", sample(tmp_path / "m.sfp"))
    with sfpformat.open(everything()) as file:
        for name in file:
            assert any(line.startswith(f"{name} ") for line in out.splitlines())
        assert f"{len(file)} tensors" in out
    assert "bits per weight" in out
    assert "uniform 0.25 per row" in out


def test_the_table_can_be_limited_to_some_tensors(tmp_path: Path, capsys: Capture) -> None:
    path = sample(tmp_path / "m.sfp")
    out = output(capsys, "info", path, "--tensors", "r*")
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["raw", "runs"]
    assert "no tensor name matches" in error_of(capsys, "info", path, "--tensors", "nothing")


def test_engines_are_listed(tmp_path: Path, capsys: Capture) -> None:
    assert "engine python: available" in output(capsys, "info", "--engines")
    engines = json.loads(output(capsys, "info", "--engines", "--json"))["engines"]
    assert engines["python"] == {"available": True, "why_not": None}


def test_info_of_safetensors_suggests_pack(tmp_path: Path, capsys: Capture) -> None:
    assert "sfp pack" in error_of(capsys, "info", make(tmp_path / "m.safetensors"))


# ------------------------------------------------------------------------------------------------- verify


def damaged(path: Path, *places: tuple[str, int]) -> Path:
    """The sample with a bit flipped in a chunk of each tensor named."""
    data = bytearray(everything())
    with sfpformat.open(everything()) as file:
        for name, k in places:
            data[file.chunk_offset(file.entry(name), k) + 3] ^= 4
    path.write_bytes(data)
    return path


def test_a_good_file_has_no_faults(tmp_path: Path, capsys: Capture) -> None:
    path = sample(tmp_path / "m.sfp")
    assert "no faults, canonical" in output(capsys, "verify", path, "--canonical")
    (found,) = json.loads(output(capsys, "verify", path, "--json"))
    assert (found["ok"], found["canonical"], found["faults"]) == (True, True, [])
    assert found["bytes"] == path.stat().st_size


def test_every_fault_is_printed_with_clause_tensor_and_offset(tmp_path: Path, capsys: Capture) -> None:
    path = damaged(tmp_path / "m.sfp", ("raw", 0), ("octets", 0))
    out = output(capsys, "verify", path, code=1)
    assert out.count("E_CRC [R-LAY-004]") == 2
    assert "tensor 'raw', byte 64" in out
    assert "2 faults" in out
    (found,) = json.loads(output(capsys, "verify", path, "--json", code=1))
    assert [fault["tensor"] for fault in found["faults"]] == ["raw", "octets"]
    assert found["faults"][0]["offset"] == 64
    assert found["ok"] is False


def test_verify_accepts_several_files(tmp_path: Path, capsys: Capture) -> None:
    good, bad = sample(tmp_path / "a.sfp"), damaged(tmp_path / "b.sfp", ("runs", 0))
    (tmp_path / "c.sfp").write_bytes(b"")
    found = json.loads(output(capsys, "verify", good, bad, tmp_path / "c.sfp", "--json", code=1))
    assert [report["ok"] for report in found] == [True, False, False]
    assert "E_MAGIC" in output(capsys, "verify", make(tmp_path / "m.safetensors"), code=1)


def test_a_file_that_is_not_canonical_fails_only_with_canonical(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sample(tmp_path / "m.sfp")

    def noted(path: object, **settings: Any) -> sfpformat.Report:
        return sfpformat.Report(notes=["[R-CAN-002] tensor 'w': the minimum"])

    monkeypatch.setattr("sfpformat.cli.verify.validate", noted)
    assert "no faults, not canonical" in output(capsys, "verify", path)
    assert "R-CAN-002" in output(capsys, "verify", path, "--canonical", code=1)


def test_all_shards_of_an_index_are_verified(tmp_path: Path, capsys: Capture) -> None:
    assert run("pack", sharded(tmp_path / "in"), "-o", tmp_path / "m.sfp") == 0
    index = tmp_path / "m.sfp.index.json"
    assert output(capsys, "verify", index).count("no faults") == 4
    shard = tmp_path / "m-00002-of-00003.sfp"
    data = shard.read_bytes()
    shard.write_bytes(data[:70] + bytes([data[70] ^ 1]) + data[71:])
    out = output(capsys, "verify", index, code=1)
    assert "m-00002-of-00003.sfp: E_CRC" in out
    assert out.count("no faults") == 3
    shard.write_bytes(data)
    fields = json.loads(index.read_text())
    fields["weight_map"]["ids"] = (
        shard.name if fields["weight_map"]["ids"] != shard.name else "m-00001-of-00003.sfp"
    )
    index.write_text(json.dumps(fields))
    assert "E_LAYOUT [R-SHD-001]" in output(capsys, "verify", index, code=1)
    index.write_text('{"weight_map":{"a":"../m.sfp"}}')
    assert "E_RANGE [R-SHD-002]" in output(capsys, "verify", index, code=1)
    index.write_text("{")
    assert "not valid JSON" in error_of(capsys, "verify", index)


# --------------------------------------------------------------------------------------------------- diff


def test_a_lossless_file_is_identical(tmp_path: Path, capsys: Capture) -> None:
    source = make(tmp_path / "m.safetensors")
    assert run("pack", source, "-o", tmp_path / "m.sfp") == 0
    assert output(capsys, "diff", source, tmp_path / "m.sfp") == "6 of 6 tensors identical\n"
    assert output(capsys, "diff", source, tmp_path / "m.sfp", "--all").count("identical") == 7
    found = json.loads(output(capsys, "diff", source, tmp_path / "m.sfp", "--json"))
    assert found["identical"] is True
    assert found["max_error"] == 0


def test_differences_are_measured(tmp_path: Path, capsys: Capture) -> None:
    source = make(tmp_path / "m.safetensors")
    assert run("pack", source, "-o", tmp_path / "m.sfp", "--prune", "0.5", "--error-db", "-20") == 0
    assert "3 of 6 tensors identical" in output(capsys, "diff", source, tmp_path / "m.sfp", code=1)
    found = json.loads(output(capsys, "diff", source, tmp_path / "m.sfp", "--json", code=1))
    with sfpformat.open(tmp_path / "m.sfp") as file:
        for tensor in found["tensors"]:
            a = checkpoint()[tensor["name"]].astype(np.float64)
            b = file.get_tensor(tensor["name"]).astype(np.float64)
            assert tensor["max_error"] == np.abs(a - b).max()
            assert tensor["zeros_b"] == np.mean(b == 0)
            assert tensor["zeros_differ"] == np.count_nonzero((a == 0) != (b == 0))
            if not tensor["identical"]:
                db = 10 * math.log10(np.mean((a - b) ** 2) / np.mean(a**2))
                assert tensor["error_db"] == pytest.approx(db)


def test_tensors_in_one_model_only_differ(tmp_path: Path, capsys: Capture) -> None:
    a, b = np.ones(3, np.float32), np.zeros((2, 2), np.float32)
    save_file({"both": a, "a": a, "shape": a}, tmp_path / "a.safetensors")
    save_sfp({"both": a, "b": a, "shape": b}, tmp_path / "b.sfp")
    out = output(capsys, "diff", tmp_path / "a.safetensors", tmp_path / "b.sfp", code=1)
    assert "only in A: a\n" in out
    assert "only in B: b\n" in out
    assert "shapes differ" in out
    assert "1 of 2 tensors identical, 1 only in A, 1 only in B" in out


def test_nans_infinities_and_signs_of_zeros_are_compared() -> None:
    a = np.array([np.nan, np.inf, 0.0, 1.0], np.float32)
    assert compare("t", a, a.copy()).identical
    signed = np.array([np.nan, np.inf, -0.0, 1.0], np.float32)
    found = compare("t", a, signed)
    assert (found.identical, found.max_error, found.error_db) == (False, 0.0, None)
    assert compare("t", a, np.array([0, np.inf, 0, 1], np.float32)).max_error is None
    assert compare("t", a, -a).max_error is None


def test_other_dtypes_are_compared_by_their_values() -> None:
    a = np.array([1.5, -2, 0], np.float32)
    found = compare("t", a, a.astype(np.float16))
    assert (found.identical, found.max_error, found.zeros_differ) == (False, 0.0, 0)
    assert (found.a, found.b) == ("F32 3", "F16 3")
    complex_ = np.array([1 + 1j], np.complex64)
    assert compare("t", complex_, complex_ + 1).max_error == 1
    assert compare("t", np.array(True), np.array(True)).identical
    assert compare("t", np.zeros((0, 2)), np.zeros((0, 2))).identical


def test_integers_are_excluded_from_the_totals(tmp_path: Path, capsys: Capture) -> None:
    save_file({"f": np.full(9, 2, np.float32), "i": np.full(9, 1000)}, tmp_path / "a.safetensors")
    save_file({"f": np.full(9, 2.2, np.float32), "i": np.full(9, 2000)}, tmp_path / "b.safetensors")
    words = ("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json")
    assert json.loads(output(capsys, *words, code=1))["error_db"] == pytest.approx(-20, abs=1e-3)


def test_a_damaged_file_cannot_be_compared(tmp_path: Path, capsys: Capture) -> None:
    good, bad = sample(tmp_path / "a.sfp"), damaged(tmp_path / "b.sfp", ("runs", 0))
    assert "b.sfp: E_CRC [R-LAY-004]" in error_of(capsys, "diff", good, bad)


def test_quantisers_and_windows_are_named(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    options = {
        "a": Options(Table(centroids=8, scale=32)),
        "b": Options(Exact(), narrow=False),
        "c": Options(coding="raw"),
        "d": Options(Exact(), narrow=False, window=3),
    }
    save_sfp(dict.fromkeys("abcd", w), tmp_path / "m.sfp", options=options)
    with sfpformat.open(tmp_path / "m.sfp") as file:
        assert isinstance(file, sfpformat.SfpFile)
        words = [report_tensor(file, name).coding for name in "abcd"]
    assert words == ["table 8 per 32", "exact F32", "raw", "exact F32, windows of 3 bits"]


@pytest.mark.parametrize(
    ("a", "b", "error"),
    [
        (np.array([1 << 53, 5], np.int64), np.array([(1 << 53) + 1, 5], np.int64), 1),
        (np.array([-(1 << 63)], np.int64), np.array([(1 << 63) - 1], np.int64), (1 << 64) - 1),
        (np.array([(1 << 64) - 1], np.uint64), np.array([(1 << 64) - 2], np.uint64), 1),
        (
            np.array([(1 << 64) - 1, 0], np.uint64),
            np.array([-(1 << 63), 0], np.int64),
            (1 << 64) - 1 + (1 << 63),
        ),
        (np.array([255], np.uint8), np.array([-128], np.int8), 383),
        (np.array([True, False]), np.array([False, False]), 1),
        (np.array([True]), np.array([(1 << 64) - 1], np.uint64), (1 << 64) - 2),
        (np.array([(1 << 53) + 1], np.int64), np.array([2.0**53]), 1),
        (np.array([7], np.int32), np.array([7.5], np.float32), 0.5),
    ],
)
def test_integers_are_compared_exactly(a: Any, b: Any, error: float) -> None:
    for one, other in ((a, b), (b, a)):
        found = compare("t", one, other)
        assert not found.identical
        assert found.max_error == error
        assert type(found.max_error) is type(error) or found.max_error == float(error)


def test_equal_integers_of_other_dtypes_have_no_error_and_differ() -> None:
    found = compare("t", np.array([1, 0], np.int64), np.array([1, 0], np.uint8))
    assert (found.identical, found.max_error, found.zeros_a, found.zeros_differ) == (False, 0, 0.5, 0)


def test_a_large_integer_error_is_shown_in_full(tmp_path: Path, capsys: Capture) -> None:
    a, b = np.array([1 << 60], np.int64), np.array([0], np.int64)
    source, other = make(tmp_path / "a.safetensors", {"n": a}), make(tmp_path / "b.safetensors", {"n": b})
    assert "1,152,921,504,606,846,976" in output(capsys, "diff", source, other, code=1)
    assert (
        json.loads(output(capsys, "diff", source, other, "--json", code=1))["tensors"][0]["max_error"]
        == 1 << 60
    )


def test_e8m0_has_no_zeros() -> None:
    a = np.arange(8, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu)
    assert compare("t", a, a[::-1].copy()).zeros_a == 0


def test_signs_of_zeros_are_named_as_bits_that_differ(tmp_path: Path, capsys: Capture) -> None:
    a, b = np.zeros(3, np.float32), np.array([0, -0.0, 0], np.float32)
    source, other = make(tmp_path / "a.safetensors", {"z": a}), make(tmp_path / "b.safetensors", {"z": b})
    assert "0, bits differ" in output(capsys, "diff", source, other, code=1)


def test_bytes_that_stand_for_other_dtypes_differ(tmp_path: Path, capsys: Capture) -> None:
    with sfpformat.Writer(tmp_path / "a.sfp") as writer:
        other = {"x-safetensors": {"dtype": "F4", "shape": [96]}}
        writer.add("w", np.zeros(48, np.uint8), other=other)
    save_sfp({"w": np.zeros(48, np.uint8)}, tmp_path / "b.sfp")
    out = output(capsys, "diff", tmp_path / "a.sfp", tmp_path / "b.sfp", code=1)
    assert "F4 [96]" in out
    assert "0 of 1 tensors identical" in out


# -------------------------------------------------------------------------------------------- short answers


def test_a_long_comparison_is_shortened_and_all_lists_it(tmp_path: Path, capsys: Capture) -> None:
    many = {f"{'layer.' * 50}{i:04}": np.zeros(1, np.float32) for i in range(500)}
    more = {f"more.{i:04}": np.zeros(1, np.float32) for i in range(300)}
    source = make(tmp_path / "a.safetensors", many | more)
    other = make(tmp_path / "b.safetensors", {name: array + 1 for name, array in many.items()})
    out = output(capsys, "diff", source, other, code=1)
    assert "300 more tensors differ; --all lists them" in out
    assert "only in A: 100 more; --all lists them" in out
    assert len(out) < 80_000
    assert max(map(len, out.splitlines())) < 300
    everything = output(capsys, "diff", source, other, "--all", code=1)
    assert everything.count("only in A: more.") == 300
    assert "more; --all" not in everything


def test_a_long_list_of_faults_is_shortened_and_counted(tmp_path: Path, capsys: Capture) -> None:
    tensors = {f"{'t' * 1000}{i:03}": np.ones(64, np.int8) for i in range(150)}
    save_sfp(tensors, tmp_path / "m.sfp")
    data = bytearray((tmp_path / "m.sfp").read_bytes())
    data[64 : 64 + 64 * 150] = bytes(64 * 150)
    (tmp_path / "m.sfp").write_bytes(data)
    out = output(capsys, "verify", tmp_path / "m.sfp", code=1)
    assert out.count("E_CRC") == 100
    assert "m.sfp: 50 more faults; --json lists them" in out
    assert "m.sfp: 150 faults" in out
    assert max(map(len, out.splitlines())) < 400
    found = json.loads(output(capsys, "verify", tmp_path / "m.sfp", "--json", code=1))[0]["faults"]
    assert [fault["tensor"] for fault in found] == list(tensors)


def test_a_fault_that_quotes_a_long_string_is_shortened(tmp_path: Path, capsys: Capture) -> None:
    fault = sfpformat.InvalidFileError("R-TEN-003", f"unknown dtype {'F' * 1_000_000!r}", tensor="t" * 1000)
    assert len(str(fault)) < 600
    assert len(fault.detail) > 1_000_000


# ------------------------------------------------------------------------------------------ small messages


def test_a_missing_file_does_not_end_the_check_of_the_others(tmp_path: Path, capsys: Capture) -> None:
    good = sample(tmp_path / "good.sfp")
    bad = tmp_path / "bad.sfp"
    bad.write_bytes(everything()[:-1])
    assert run("verify", tmp_path / "none.sfp", bad, good, "--json") == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [(Path(each["file"]).name, each["ok"]) for each in found] == [
        ("none.sfp", False),
        ("bad.sfp", False),
        ("good.sfp", True),
    ]
    assert "No such file" in found[0]["error"]
    assert found[0]["error"] in err
    assert found[1]["error"] is found[2]["error"] is None
    assert run("verify", tmp_path / "none.sfp", good) == 2
    assert "good.sfp: no faults" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["verify", "prune", "apply", "load"])
def test_a_safetensors_file_in_place_of_an_sfp_file_is_named(
    command: str, tmp_path: Path, capsys: Capture
) -> None:
    source = make(tmp_path / "m.safetensors")
    if command == "load":
        with pytest.raises(sfpformat.InvalidFileError, match="probably a safetensors file, which 'sfp pack'"):
            load_file(source)
        return
    words: dict[str, list[object]] = {
        "verify": [source],
        "prune": [source, "-o", tmp_path / "o.sfp", "--sparsity", "0.5"],
        "apply": [source, source, "-o", tmp_path / "o.safetensors"],
    }
    told = "is a model, not a delta" if command == "apply" else "is a safetensors file"
    assert run(command, *words[command]) in (1, 2)
    assert told in "".join(capsys.readouterr())


def test_one_tensor_of_one_weight_is_counted_in_the_singular(tmp_path: Path, capsys: Capture) -> None:
    source = make(tmp_path / "m.safetensors", {"one": np.ones(1, np.float32)})
    run("pack", source, "-o", tmp_path / "m.sfp")
    run("info", tmp_path / "m.sfp")
    assert "1 tensor, 1 weight, " in capsys.readouterr().out
    run("verify", tmp_path / "m.sfp")
    assert "; 1 tensor, " in capsys.readouterr().out
    run("unpack", tmp_path / "m.sfp", "-o", tmp_path / "n.safetensors")
    out = capsys.readouterr().out
    assert out.startswith("1 tensor, ")
    assert " 0.0 s" not in out
    assert "(0 " not in out


def test_an_empty_name_of_the_output_is_refused(tmp_path: Path, capsys: Capture) -> None:
    source = make(tmp_path / "m.safetensors")
    assert "the name of the file to write is empty" in error_of(capsys, "pack", source, "-o", "")


def test_engines_with_a_pattern_of_tensors_but_no_file_are_refused(capsys: Capture) -> None:
    assert "--tensors needs a FILE" in error_of(capsys, "info", "--engines", "--tensors", "*")
