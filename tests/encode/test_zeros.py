"""Zeros of both signs: their size in files, their counts in reports, and their conversion to +0.

The readers in C and on GPUs decode them in the files of `strategies.jobs`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file
from safetensors.numpy import save_file as save_safetensors

import sfpformat
from sfpformat import PRESETS, ImportanceOptions, OptionError, Options, SfpWarning
from sfpformat.cli.diff import compare
from sfpformat.cli.pack_files import pack_file
from sfpformat.decode.validate import validate
from sfpformat.encode import exact_tables, number_tables, planner
from sfpformat.encode.zeros import with_positive_zeros, zeros_of
from sfpformat.numpy import load, save
from sfpformat.numpy import save_file as save_sfp
from sfpformat.pruning.repruning import reprune
from sfpformat.pruning.thresholds import Sparsity

from ..cli.test_main import error_of, run
from ..support.forge import accepted

Array = NDArray[Any]
Capture = pytest.CaptureFixture[str]

FLOATS: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
SIDE = 384


def weights(dtype: str, share: float = 0.9, signs: str = "random", side: int = SIDE) -> Array:
    """Normal weights [side, side] of which a share is zero, with the given kind of signs."""
    rng = np.random.default_rng(17)
    numbers = rng.standard_normal((side, side))
    drawn = {
        "random": numbers < 0,
        "negative": np.ones_like(numbers, np.bool_),
        "few": rng.random(numbers.shape) < 0.05,
        "rows": np.broadcast_to(rng.random((side, 1)) < 0.5, numbers.shape),
        "columns": np.broadcast_to(rng.random((1, side)) < 0.5, numbers.shape),
        "runs": np.cumsum(rng.random(numbers.shape) < 0.02).reshape(numbers.shape) % 2 == 1,
        "positive": np.zeros_like(numbers, np.bool_),
    }[signs]
    zero = rng.random(numbers.shape) < share
    return np.where(zero, np.where(drawn, -0.0, 0.0), numbers).astype(np.float32).astype(FLOATS[dtype])


def positive(array: Array) -> Array:
    """Returns the array with +0 instead of -0, computed by arithmetic."""
    return (array.astype(np.float64) + 0.0).astype(array.dtype)


def negatives(array: Array) -> int:
    """Returns the number of negative zeros, computed by arithmetic."""
    wide = array.astype(np.float64)
    return int(((wide == 0) & np.signbit(wide)).sum())


def bits_per_weight(array: Array, options: Options | None = None) -> float:
    """Returns the bits per weight of a file with only this tensor."""
    return 8 * len(save({"w": array}, options=options or Options())) / array.size


def entropy_of_signs(array: Array) -> float:
    """Returns the bits per weight of independent random signs of zeros."""
    zeros = int((array.astype(np.float64) == 0).sum())
    share = negatives(array) / zeros
    if share in (0, 1):
        return 0.0
    return -(share * math.log2(share) + (1 - share) * math.log2(1 - share)) * zeros / array.size


@contextmanager
def without_classes_for_zeros() -> Iterator[None]:
    """Disables the classes for zeros in the encoder."""
    with pytest.MonkeyPatch.context() as patch:
        for tables in (exact_tables, number_tables):
            patch.setattr(tables, "cheaper_with_zeros", lambda choice, *_: choice)
        patch.setattr(planner.Planner, "_has_many_negative_zeros", lambda self, source: False)
        yield


# ------------------------------------------------------------------------------------------------- the size


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("share", [0.9, 0.5])
def test_random_signs_of_zeros_cost_their_entropy(dtype: str, share: float) -> None:
    array = weights(dtype, share)
    bound = bits_per_weight(positive(array)) + entropy_of_signs(array)
    assert 0.9 * bound < bits_per_weight(array) < 1.1 * bound


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_near_the_entropy(preset: str) -> None:
    array = weights("BF16")
    options = PRESETS[preset]
    bound = bits_per_weight(positive(array), options) + entropy_of_signs(array)
    assert bits_per_weight(array, options) < 1.1 * bound


def test_few_values_with_signed_zeros_cost_their_entropy() -> None:
    for dtype in ("F32", "BF16"):
        array = weights(dtype)
        array = np.copysign(array != 0, array.astype(np.float32)).astype(FLOATS[dtype])
        bound = bits_per_weight(positive(array)) + entropy_of_signs(array)
        assert negatives(array)
        assert bits_per_weight(array) < 1.1 * bound


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E4M3"])
@pytest.mark.parametrize("signs", ["negative", "few", "rows", "columns", "runs"])
def test_signs_that_are_not_random_cost_no_more_than_random_ones(dtype: str, signs: str) -> None:
    array = weights(dtype, 0.9, signs)
    now = bits_per_weight(array)
    with without_classes_for_zeros():
        before = bits_per_weight(array)
    zero = array.astype(np.float64) == 0
    assert now < before
    assert now < 1.1 * (bits_per_weight(positive(array)) + zero.mean())


def test_negative_zeros_take_at_most_10_percent_more_bits_than_positive_zeros() -> None:
    for dtype in ("F64", "F32", "F16", "BF16"):
        array = weights(dtype, 0.9, "negative")
        assert bits_per_weight(array) < 1.1 * bits_per_weight(positive(array))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_tensor_without_negative_zeros_is_coded_as_if_there_were_none(dtype: str) -> None:
    for share in (0.0, 0.02, 0.3, 0.9):
        array = weights(dtype, share, "positive", 128)
        now = save({"w": array})
        with without_classes_for_zeros():
            assert save({"w": array}) == now


# ------------------------------------------------------------------------------------------ every reader


def read_alike(data: bytes, array: Array) -> None:
    """Asserts that the file is canonical, and that every Python reader returns the bits of the array."""
    assert validate(data).canonical
    assert accepted(data)["w"].tobytes() == array.tobytes()
    for engine in ("python", "numba"):
        with sfpformat.open(data, engine=engine) as file:
            assert file.get_tensor("w").tobytes() == array.tobytes(), engine


@st.composite
def signed_zeros(draw: st.DrawFn) -> Array:
    """Arrays with zeros of both signs: alone, beside few or many values, the signs random or in runs."""
    dtype = FLOATS[draw(st.sampled_from(list(FLOATS)))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from([(1,), (33,), (40, 48), (7, 1100)]))
    values = draw(st.sampled_from(["normal", "few", "narrow", "subnormal", "none"]))
    numbers = rng.standard_normal(shape)
    if values == "few":
        numbers = rng.choice([-1.0, 0.5, 1.0], shape)
    if values == "narrow":
        numbers = numbers.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    if values == "none":
        numbers = np.zeros(shape)
    zero = rng.random(shape) < draw(st.sampled_from([0.02, 0.3, 0.6, 0.9, 1.0]))
    negative = rng.random(shape) < draw(st.sampled_from([0.0, 0.01, 0.5, 0.9, 1.0]))
    if draw(st.booleans()):
        negative = np.cumsum(negative).reshape(shape) % 2 == 1
    array = np.where(zero, np.where(negative, -0.0, 0.0), numbers).astype(np.float32).astype(dtype)
    if values == "subnormal":  # the least patterns, which lie beside those of zeros
        size = array.dtype.itemsize
        patterns = array.view(f"u{size}")
        patterns[~zero] = rng.integers(1, 5, int((~zero).sum())) | (negative[~zero].astype(int) << 7)
    return array


@settings(max_examples=40)
@given(
    signed_zeros(),
    st.sampled_from([Options(), *PRESETS.values()]),
    st.sampled_from([None, 1, 2]),
    st.sampled_from(["auto", "none", "runs", "octets"]),
    st.sampled_from([12, 8]),
)
def test_every_reader_restores_zeros_of_both_signs(
    array: Array, options: Options, group: int | None, mask: str, limit: int
) -> None:
    options = options.but(
        coding="fingerprint",
        group=group or options.group,
        mask=mask,
        code_limit=min(limit, options.code_limit),
    )
    read_alike(save({"w": array}, options=options), array)


@settings(max_examples=30)
@given(signed_zeros(), st.sampled_from(list(PRESETS.values())))
def test_engines_write_the_same_bytes_for_zeros_of_both_signs(array: Array, options: Options) -> None:
    options = options.but(coding="fingerprint")
    by_engine = {engine: save({"w": array}, options=options, engine=engine) for engine in ("python", "numba")}
    assert by_engine["python"] == by_engine["numba"]


@settings(max_examples=30)
@given(signed_zeros())
def test_classes_for_zeros_never_make_a_file_clearly_larger(array: Array) -> None:
    now = len(save({"w": array}, options=Options(coding="fingerprint")))
    with without_classes_for_zeros():
        before = len(save({"w": array}, options=Options(coding="fingerprint")))
    assert now <= before + 128 + before // 64  # chunks and directory are rounded up


def test_an_importance_can_be_stored_with_zeros_of_both_signs() -> None:
    array = weights("F32", side=128)
    importance = np.abs(np.random.default_rng(3).standard_normal(array.shape)).astype(np.float32)
    read_alike(save({"w": array}, importances={"w": importance}), array)


# ---------------------------------------------------------------------------------------- zeros="positive"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("engine", ["python", "numba"])
def test_positive_zeros_give_the_bytes_of_a_tensor_without_negative_zeros(dtype: str, engine: str) -> None:
    array = weights(dtype, side=96)
    kept = array.tobytes()
    data = save({"w": array}, options=Options(zeros="positive"), engine=engine)
    assert data == save({"w": positive(array)}, engine=engine)
    assert load(data)["w"].tobytes() == positive(array).tobytes()
    assert array.tobytes() == kept  # the caller's array stays


@pytest.mark.parametrize("dtype", FLOATS)
def test_positive_zeros_apply_to_raw_and_small_tensors(dtype: str) -> None:
    for array in (np.full(3, -0.0, FLOATS[dtype]), np.array(-0.0, FLOATS[dtype])):
        for options in (Options(zeros="positive"), Options(zeros="positive", coding="raw")):
            found = load(save({"w": array}, options=options))["w"]
            assert found.tobytes() == bytes(array.nbytes)
            assert found.shape == array.shape


def test_positive_zeros_change_nothing_but_zeros_of_floats() -> None:
    fnuz = np.full(4, 0x80, np.uint8).view(ml_dtypes.float8_e4m3fnuz)  # NaN: these dtypes have no -0
    tensors = {
        "nan": np.array([0xFFC00001, 0x80000000, 0x80000001, 0xFF800000], np.uint32).view(np.float32),
        "fnuz": fnuz,
        "bytes": np.full(4, 0x80, np.uint8),
        "integers": np.array([-(2**15), 0], np.int16),
        "complex": np.array([complex(-0.0, -0.0)], np.complex64),
    }
    found = load(save(tensors, options=Options(zeros="positive")))
    assert found["nan"].view(np.uint32).tolist() == [0xFFC00001, 0, 0x80000001, 0xFF800000]
    for name in ("fnuz", "bytes", "integers", "complex"):
        assert found[name].tobytes() == tensors[name].tobytes()


def test_zeros_accepts_only_keep_and_positive() -> None:
    with pytest.raises(OptionError, match="zeros"):
        Options(zeros="negative")


@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_are_counted_by_their_signs(dtype: str) -> None:
    array = weights(dtype, side=64)
    zeros, negative = int((array.astype(np.float64) == 0).sum()), negatives(array)
    assert tuple(zeros_of(array)) == (zeros - negative, negative)
    assert tuple(zeros_of(array.T)) == (zeros - negative, negative)
    flat = positive(array).reshape(-1)
    assert with_positive_zeros(flat) is flat


def test_integers_and_dtypes_without_negative_zero_count_no_negative_zeros() -> None:
    assert tuple(zeros_of(np.zeros(5, np.int8))) == (0, 0)
    assert tuple(zeros_of(np.full(5, 0x80, np.uint8).view(ml_dtypes.float8_e5m2fnuz))) == (0, 0)


def test_positive_zeros_warn_about_packed_integers_in_a_float_dtype() -> None:
    tensors = {
        "l.weight": np.zeros((8, 8), np.float16),
        "q.qweight": np.full((64, 64), 0x8000, np.uint16).view(np.float16),
        "q.scales": np.ones((64, 1), np.float16),
    }
    with pytest.warns(SfpWarning, match=r"already quantised weights \(1\): 'q.qweight'"):
        save(tensors, options=Options(zeros="positive"))


# ------------------------------------------------------------------------------------------- the command


def packed(folder: Path, tensors: dict[str, Array], *words: object) -> tuple[Path, Path]:
    """Writes a checkpoint of these tensors and packs it. Returns both paths."""
    source, target = folder / "m.safetensors", folder / "m.sfp"
    save_safetensors(tensors, source)
    assert run("pack", source, "-o", target, *words) == 0
    return source, target


@pytest.mark.parametrize("dtype", FLOATS)
def test_sparsity_counts_zeros_of_both_signs(dtype: str, tmp_path: Path, capsys: Capture) -> None:
    array = weights(dtype, side=256)
    share = float((array.astype(np.float64) == 0).mean())
    _, target = packed(tmp_path, {"w": array}, "--json")
    summary = json.loads(capsys.readouterr().out)
    assert summary["sparsity"] == pytest.approx(share)
    assert summary["negative_zeros"]["kept"] == negatives(array)
    assert run("info", target, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tensors"][0]["sparsity"] == pytest.approx(share)
    assert run("info", target) == 0
    assert f"{100 * share:.1f} %" in capsys.readouterr().out.splitlines()[1]


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E4M3"])
def test_pack_prints_what_positive_zeros_would_save(dtype: str, tmp_path: Path, capsys: Capture) -> None:
    array = weights(dtype)
    _, target = packed(tmp_path, {"w": array, "b": np.zeros(300, np.float32)})
    before = target.stat().st_size
    assert "--zeros positive writes them as +0 and saves about" in capsys.readouterr().out
    packed(tmp_path, {"w": array}, "--json")
    promised = json.loads(capsys.readouterr().out)["negative_zeros"]["saving_bytes"]
    packed(tmp_path, {"w": array, "b": np.zeros(300, np.float32)}, "--zeros", "positive")
    assert promised == pytest.approx(before - target.stat().st_size, rel=0.05)


def test_pack_does_not_mention_positive_zeros_that_would_save_nothing(
    tmp_path: Path, capsys: Capture
) -> None:
    packed(tmp_path, {"w": weights("BF16", 0.9, "positive", 128)})
    assert "--zeros" not in capsys.readouterr().out
    few = weights("BF16", 0.0, "positive", 128)
    few[0, :5] = -0.0
    packed(tmp_path, {"w": few})
    assert "--zeros" not in capsys.readouterr().out


def test_positive_zeros_are_verified_and_counted_in_the_summary(tmp_path: Path, capsys: Capture) -> None:
    tensors = {"a": weights("F32", side=96), "b": weights("BF16", side=96), "c": np.ones(9, np.float32)}
    tensors["n"] = np.arange(4)
    source, target = packed(tmp_path, tensors, "--zeros", "positive", "--verify")
    made = negatives(tensors["a"]) + negatives(tensors["b"])
    out = capsys.readouterr().out
    assert "verified" in out
    assert f"{made:,} weights of 2 tensors changed from -0 to +0" in out
    for name, array in load(target.read_bytes()).items():
        assert array.tobytes() == (tensors[name] + tensors[name].dtype.type(0)).tobytes()
    packed(tmp_path, tensors, "--zeros", "positive", "--verify", "--json")
    summary = json.loads(capsys.readouterr().out)
    assert summary["verified"] is True
    assert summary["negative_zeros"] == {"kept": 0, "made_positive": made, "saving_bytes": 0}
    assert load_file(source)["a"].tobytes() == tensors["a"].tobytes()


def test_positive_zeros_that_change_nothing_are_reported(tmp_path: Path, capsys: Capture) -> None:
    packed(tmp_path, {"w": np.ones((64, 64), np.float32)}, "--zeros", "positive")
    assert "had no effect: no weight is -0" in capsys.readouterr().out


def test_zeros_with_a_wrong_sign_fail_the_verification(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--verify with positive zeros still finds every other change."""

    def other_weights(job: Any, *rest: Any, **others: Any) -> int:
        options = {n: replace(t, options=t.options.but(zeros="keep")) for n, t in job.configs.items()}
        return pack_file(replace(job, configs=options), *rest, **others)

    monkeypatch.setattr("sfpformat.cli.pack.pack_file", other_weights)
    save_safetensors({"w": weights("F32", side=64)}, tmp_path / "m.safetensors")
    words = ["pack", tmp_path / "m.safetensors", "-o", tmp_path / "m.sfp", "--zeros", "positive", "--verify"]
    assert run(*words) == 1
    assert "'w' differs from the input" in capsys.readouterr().out


def test_zeros_can_be_set_per_tensor(tmp_path: Path) -> None:
    array = weights("F32", side=64)
    names = ("a", "b", "c.weight")
    for words, changed in (
        (["--zeros", "positive"], {"a", "b", "c.weight"}),
        (["--zeros", "positive", "--keep", "b"], {"a", "c.weight"}),
        (["--like", "c*", "--zeros", "positive"], {"c.weight"}),
        (["--zeros", "positive", "--like", "a", "--zeros", "keep"], {"b", "c.weight"}),
        (["--zeros", "positive", "--like", "a", "--lossless"], {"b", "c.weight"}),
    ):
        _, target = packed(tmp_path, dict.fromkeys(names, array), "--verify", *words)
        found = load(target.read_bytes())
        assert {name for name in names if not negatives(found[name])} == changed, words


def test_packed_weights_in_a_float_dtype_keep_their_bits(tmp_path: Path, capsys: Capture) -> None:
    bits = np.full((64, 64), 0x8000, np.uint16).view(np.float16)
    tensors = {
        "l.weight": weights("F16", side=64),
        "q.qweight": bits,
        "q.scales": np.ones((64, 1), np.float16),
    }
    _, target = packed(tmp_path, tensors, "--zeros", "positive", "--verify")
    found = load(target.read_bytes())
    assert found["q.qweight"].tobytes() == bits.tobytes()
    assert not negatives(found["l.weight"])
    packed(tmp_path, {name: tensors[name] for name in ("q.qweight", "q.scales")})
    assert "--zeros" not in capsys.readouterr().out.splitlines()[-1]  # it would not reach them


def test_zeros_that_match_no_tensor_are_refused(tmp_path: Path, capsys: Capture) -> None:
    save_safetensors({"n": np.arange(9), "w": np.ones(9, np.float32)}, tmp_path / "m.safetensors")
    start = ["pack", tmp_path / "m.safetensors", "-o", tmp_path / "m.sfp"]
    assert "--zeros has no effect" in error_of(capsys, *start, "--like", "n", "--zeros", "positive")
    assert "--zeros has no effect" in error_of(capsys, *start, "--zeros", "positive", "--keep", "w")
    assert "--zeros" in error_of(capsys, *start, "--zeros", "negative")


def test_a_resumed_pack_counts_the_zeros_of_both_runs(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": weights("F32", side=96), "b": weights("BF16", side=96)}
    save_safetensors(tensors, tmp_path / "m.safetensors")
    words = ["pack", tmp_path / "m.safetensors", "-o", tmp_path / "m.sfp", "--zeros", "positive", "--json"]
    with monkeypatch.context() as patch:
        from sfpformat.cli import pack_files

        add = pack_files.add_tensor

        def interrupted(job: Any, name: str, writer: Any, progress: Any) -> None:
            if name == "b":
                writer.flush()
                raise KeyboardInterrupt
            add(job, name, writer, progress)

        patch.setattr(pack_files, "add_tensor", interrupted)
        assert run(*words) != 0
    capsys.readouterr()
    assert run(*words) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["resumed_tensors"] == 1
    assert summary["negative_zeros"]["made_positive"] == sum(negatives(a) for a in tensors.values())


def test_negative_zeros_of_lossy_tensors_are_not_counted(tmp_path: Path, capsys: Capture) -> None:
    _, target = packed(tmp_path, {"w": weights("F32", side=96)}, "--bits", "2", "--json")
    assert json.loads(capsys.readouterr().out)["negative_zeros"]["kept"] == 0
    assert not negatives(load(target.read_bytes())["w"])


def test_tensors_kept_lossless_instead_of_quantised_count_negative_zeros(
    tmp_path: Path, capsys: Capture
) -> None:
    array = weights("F32", 0.3, side=96)
    array = np.copysign(array != 0, array).astype(np.float32)
    for words, kept, made in (([], negatives(array), 0), (["--zeros", "positive"], 0, negatives(array))):
        _, target = packed(tmp_path, {"w": array}, "--bits", "6", *words, "--verify", "--json")
        summary = json.loads(capsys.readouterr().out)
        assert summary["kept_lossless"] == ["w"]
        assert summary["faults"] == []
        assert (summary["negative_zeros"]["kept"], summary["negative_zeros"]["made_positive"]) == (kept, made)
        assert negatives(load(target.read_bytes())["w"]) == kept


def test_a_dry_run_prints_what_positive_zeros_would_save(tmp_path: Path, capsys: Capture) -> None:
    array = weights("BF16")
    packed(tmp_path, {"w": array}, "--json")
    written = json.loads(capsys.readouterr().out)
    packed(tmp_path, {"w": array}, "--json", "--dry-run")
    dry = json.loads(capsys.readouterr().out)
    for key in ("negative_zeros", "sparsity", "stored_zeros"):
        assert dry[key] == written[key]


# ------------------------------------------------------------------------------------------------ pruning


def test_negative_zeros_are_pruned_first_when_a_file_is_pruned_again(tmp_path: Path, capsys: Capture) -> None:
    array = weights("F32", 0.5, side=64)
    importance = np.ones(array.shape, np.float32)
    importance[array == 0] = 9  # by importance alone the zeros would stay
    options = Options(importance=ImportanceOptions(bits=4))
    save_sfp({"w": array}, tmp_path / "a.sfp", options=options, importances={"w": importance})
    zeros = int((array == 0).sum())
    with sfpformat.open(tmp_path / "a.sfp") as file:
        found = reprune(file, tmp_path / "b.sfp", Sparsity(0.75))
    assert (found.before, found.after) == (zeros, array.size * 3 // 4)
    again = load((tmp_path / "b.sfp").read_bytes())["w"]
    assert int((again == 0).sum()) == found.after
    assert not negatives(again)
    assert run("prune", tmp_path / "a.sfp", "--sparsity", "0.75", "-o", tmp_path / "c.sfp", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["sparsity_before"] == pytest.approx(zeros / array.size)


def test_diff_counts_zeros_of_both_signs() -> None:
    array = weights("F32", side=64)
    found = compare("w", array, positive(array))
    assert not found.identical
    assert found.max_error == 0
    assert found.zeros_a == found.zeros_b == pytest.approx(float((array == 0).mean()))
    assert found.zeros_differ == 0


def test_a_tensor_pruned_by_torch_is_near_the_size_with_positive_zeros(
    tmp_path: Path, capsys: Capture
) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file
    from torch.nn.utils import prune

    from sfpformat.torch import load_file as load_sfp

    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = torch.nn.Linear(512, 512, bias=False).to(dtype)
        prune.l1_unstructured(layer, "weight", 0.9)
        prune.remove(layer, "weight")
        weight = layer.weight.data
        sizes = []
        for tensor in (weight, weight + 0):
            save_file({"w": tensor}, tmp_path / "m.safetensors")
            assert run("pack", tmp_path / "m.safetensors", "-o", tmp_path / "m.sfp", "--json") == 0
            summary = json.loads(capsys.readouterr().out)
            assert summary["sparsity"] == pytest.approx(0.9, abs=1e-4)
            sizes.append(summary["bits_per_weight"])
            found = load_sfp(tmp_path / "m.sfp")["w"]
            assert torch.equal(torch.signbit(found), torch.signbit(tensor))
            assert torch.equal(found, tensor)
        assert sizes[0] < 1.1 * (sizes[1] + 0.9)


def test_a_compressed_layer_restores_the_signs_of_its_zeros() -> None:
    torch = pytest.importorskip("torch")
    from sfpformat.torch import compress_model

    layer = torch.nn.Sequential(torch.nn.Linear(128, 96, bias=False))
    mask = torch.rand(96, 128) < 0.1
    with torch.no_grad():
        layer[0].weight.mul_(mask)
    before = layer[0].weight.detach().clone()
    compress_model(layer)
    after = layer[0].weight.dequantize() if hasattr(layer[0].weight, "dequantize") else layer[0].weight
    assert torch.equal(torch.signbit(after), torch.signbit(before))
    assert torch.equal(after, before)


def test_layerwise_pruning_writes_no_negative_zeros() -> None:
    torch = pytest.importorskip("torch")
    from sfpformat.pruning import prune_layerwise

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    batches = [(torch.randn(8, 32), torch.randint(4, (8,))) for _ in range(2)]
    for method in ("wanda", "sparsegpt", "sparsegpt-updated"):
        found = prune_layerwise(model, batches, 0.5, method=method)
        for weight in found.weights.values():
            assert int((weight == 0).sum())
            assert not bool((torch.signbit(weight) & (weight == 0)).any())
