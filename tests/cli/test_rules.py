"""``sfp pack``: the tensors that options apply to, pruning, and importances."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import sfpformat
from sfpformat import PRESETS, Options, Table, Uniform
from sfpformat.cli import main, pack
from sfpformat.cli.errors import CommandError
from sfpformat.cli.parser import Parser
from sfpformat.cli.rules import Rules, TensorConfig
from sfpformat.cli.tensor_options import parse_like
from sfpformat.dtypes import DTYPES
from sfpformat.io.safetensors import TensorSpec
from sfpformat.pruning import by_magnitude
from sfpformat.pruning.by_magnitude import find_cutoff, patterns, prune_fraction, prune_pattern
from sfpformat.pruning.masks import masks_of
from sfpformat.pruning.thresholds import Pattern

from .test_main import checkpoint, error_of, make
from .test_pack import Capture, assert_bits, packed

# -------------------------------------------------------------------------------------------- what changes


def test_without_like_only_large_float_tensors_change(tmp_path: Path) -> None:
    arrays = checkpoint()
    with packed(tmp_path, "--bits", "4", "--prune", "0.5") as sfp:
        for name, array in arrays.items():
            back = sfp.get_tensor(name)
            if array.ndim == 2 and array.size >= 4096:
                assert sfp.info(name).quantiser == "uniform"
                assert np.count_nonzero(back) <= array.size // 2
            else:
                assert_bits(back, array)


def test_like_rules_override_each_other_in_order(tmp_path: Path) -> None:
    words = "--bits 3 --like layer.* --table 8 --like *.bias --lossless --like embed* --step 0.5 --scale row"
    arrays = checkpoint()
    with packed(tmp_path, *words.split()) as sfp:
        found = {name: sfp.info(name).quantiser for name in arrays}
        assert found["layer.0.weight"] == found["layer.1.weight"] == "table"
        assert found["embed.weight"] == "uniform"
        assert_bits(sfp.get_tensor("layer.0.bias"), arrays["layer.0.bias"])
        scale = sfp.entry("embed.weight").scale
        assert scale is not None
        assert scale.per == "row"
        assert sfp.entry("layer.0.weight").scale is None


def test_like_lossless_also_cancels_pruning_and_casts(tmp_path: Path) -> None:
    words = "--bits 3 --prune 0.5 --dtype BF16 --like embed* --lossless"
    with packed(tmp_path, *words.split()) as sfp:
        assert_bits(sfp.get_tensor("embed.weight"), checkpoint()["embed.weight"])
        assert np.count_nonzero(sfp.get_mask("layer.0.weight")) <= checkpoint()["layer.0.weight"].size // 2


def test_a_like_rule_changes_tensors_that_are_lossless_otherwise() -> None:
    found = config("--lossless --like w --prune 0.5 --dtype F16")
    assert found.pruning is not None
    assert found.cast == DTYPES["F16"]


def test_tensors_that_no_option_changes_are_not_reported_as_requested(
    tmp_path: Path, capsys: Capture
) -> None:
    packed(tmp_path, "--like", "*.bias", "--step", "0.5").close()
    assert "lossless, no option changes their values: 'embed.weight'" in capsys.readouterr().out
    packed(tmp_path, "--prune", "0").close()
    assert "as requested" not in capsys.readouterr().out


def test_a_like_rule_applies_to_small_tensors_that_it_names(tmp_path: Path) -> None:
    with packed(tmp_path, "--like=*.bias", "--step", "0.5") as sfp:
        assert sfp.info("layer.0.bias").quantiser == "uniform"
        assert sfp.info("embed.weight").quantiser == "exact"


def test_keep_overrides_all_rules(tmp_path: Path) -> None:
    arrays = checkpoint()
    words = ("--prune", "0.9", "--keep", "embed*", "--dtype", "BF16", "--like", "*", "--bits", "2")
    with packed(tmp_path, *words) as sfp:
        assert_bits(sfp.get_tensor("embed.weight"), arrays["embed.weight"])
        assert_bits(sfp.get_tensor("ids"), arrays["ids"])
        assert sfp.info("layer.0.weight").dtype == "BF16"
        assert sfp.info("norm").dtype == "F32"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--like nothing* --bits 4", "no tensor name matches 'nothing*'"),
        ("--keep nothing*", "no tensor name matches 'nothing*'"),
        ("--like ids --bits 4", "--bits has no effect: no tensor that matches --like 'ids' is float"),
        ("--scope model", "--scope needs --prune"),
        ("--prune 2:4 --scope model", "--scope model needs --prune with a fraction"),
        ("--prune 2:7", "--prune fits no tensor: 'embed.weight' (its shape [128, 64] has 64 inputs along"),
        ("--prune 0.5 --like embed.weight --prune 2:7", "--prune after --like 'embed.weight' fits no tensor"),
        (
            "--prune 2:4 --pattern-dim 2",
            "fits no tensor: 'embed.weight' (its shape [128, 64] has no dimension 2",
        ),
        ("--pattern-dim 1", "--pattern-dim needs --prune with a pattern"),
        ("--prune 0.5 --pattern-dim 1", "--pattern-dim needs --prune with a pattern"),
        ("--prune 2:4 --pattern-dim x", "is not a dimension"),
        ("--scale row", "--scale needs one of --bits, --budget, --step, --error-db, --table"),
        ("--bits 4 --scale-dtype F32", "--scale-dtype needs --scale"),
        ("--rate-weight 0", "--rate-weight needs one of --bits, --budget, --step, --error-db"),
        ("--table 8 --rate-weight 0", "--rate-weight needs one of --bits, --budget, --step, --error-db"),
        ("--segment 33", "segment is 33"),
        ("--importance-bits 99", "bits is 99"),
        ("--prune 0.5 --lossless", "--prune: not allowed with --lossless, which keeps every bit"),
        ("--dtype F16 --lossless", "--dtype: not allowed with --lossless"),
        ("--lossless --zeros positive", "--zeros: not allowed with --lossless"),
        (
            "--bits 4 --like embed* --lossless --prune 0.5",
            "--prune after --like 'embed*': not allowed with --lossless",
        ),
    ],
)
def test_rules_that_cannot_be_applied_are_refused(
    words: str, told: str, tmp_path: Path, capsys: Capture
) -> None:
    source = make(tmp_path / "m.safetensors")
    assert told in error_of(capsys, "pack", source, "-o", tmp_path / "m.sfp", *words.split())
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_options_that_match_no_tensor_are_refused(tmp_path: Path, capsys: Capture) -> None:
    source = make(tmp_path / "m.safetensors", {"small": np.ones((8, 8), np.float32)})
    assert "--bits has no effect: no tensor is float, of rank 2" in error_of(
        capsys, "pack", source, "-o", tmp_path / "m.sfp", "--bits", "4"
    )


def test_only_options_that_can_follow_like_are_options_of_tensors() -> None:
    """A new flag of ``sfp pack`` does not become an option of tensors."""
    parser = Parser()
    command = pack.add_parser(parser.add_subparsers(parser_class=Parser))
    command.add_argument("--new-flag", action="store_true")
    words = "pack m.safetensors -o m.sfp --new-flag --keep a --json --bits 4 --lossless --codes 2"
    with pytest.raises(CommandError, match="not allowed with"):
        parser.parse_args(words.split())
    args = parser.parse_args(words.replace("--lossless ", "").split())
    assert args.new_flag
    assert args.tensor_options == {"bits": 4.0, "codes": 2}
    assert parser.parse_args(["pack", "m.safetensors", "-o", "m.sfp", "--new-flag"]).tensor_options == {}


SPEC = TensorSpec("w", DTYPES["F32"], (64, 64))


def config(words: str) -> TensorConfig:
    """Returns the config of a large tensor named w by a command line."""
    head, *rules = words.split("--like ")
    base = parse_like(["w", *head.split()])[1] if head.strip() else {}
    likes = [parse_like(rule.split()) for rule in rules]
    return Rules(base, likes, []).configs([SPEC])["w"]


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--preset gpu", PRESETS["gpu"]),
        ("--preset gpu --codes 4", PRESETS["gpu"].but(codes=4)),
        ("--preset fused --table 8", PRESETS["fused"].but(quantiser=Table(centroids=8))),
        ("--bits 4", Options(Uniform(bits=4))),
        ("--bits 4 --rate-weight 0 --like w --table 8", Options(Table(8))),
        ("--bits 4 --rate-weight 0 --like w --step 0.5", Options(Uniform(step=0.5, rate_weight=0))),
        ("--step 0.5 --rate-weight 0", Options(Uniform(step=0.5, rate_weight=0))),
        ("--error-db -30", Options(Uniform(error_db=-30))),
        ("--table 9 --scale 64", Options(Table(centroids=9, scale=64))),
        ("--mask runs --group 1 --segment 64", Options(mask="runs", group=1, segment=64)),
        ("--chunk 4096 --code-limit 8 --mantissa-bits 1", Options(chunk=4096, code_limit=8, mantissa_bits=1)),
        ("--window 2", Options(window=2)),
        ("--bits 4 --scale row --like w --lossless", Options()),
        ("--bits 4 --like w --table 8", Options(Table(centroids=8))),
        ("--bits 4 --like w --scale row", Options(Uniform(bits=4, scale="row"))),
        ("--bits 4 --like x* --bits 3 --like w --bits 2", None),
    ],
)
def test_command_lines_become_options(words: str, options: Options | None) -> None:
    if options is None:
        with pytest.raises(Exception, match="no tensor name matches"):
            config(words)
    else:
        assert config(words).options == options


def test_a_later_pattern_drops_an_earlier_scope() -> None:
    pruning = config("--prune 0.5 --scope model --like w --prune 2:4").pruning
    assert pruning is not None
    assert (pruning.keep, pruning.of) == (2, 4)
    assert config("--prune 0.5 --like w --prune 0").pruning is None


def test_a_cast_that_would_lose_the_range_is_refused(tmp_path: Path, capsys: Capture) -> None:
    source = make(tmp_path / "m.safetensors", {"w": np.full((80, 80), 1e6, np.float32)})
    told = error_of(capsys, "pack", source, "-o", tmp_path / "m.sfp", "--dtype", "F16")
    assert "exceed the range of F16" in told


# ------------------------------------------------------------------------------------------------ pruning


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.5, 0.9, 1.0])
def test_prune_fraction_zeroes_exactly_that_share_of_smallest_weights(dtype: Any, fraction: float) -> None:
    array = np.random.default_rng(1).standard_normal((53, 97)).astype(dtype)
    pruned = array.copy()
    count = int(fraction * array.size + 0.5)
    assert prune_fraction(pruned, fraction) == count
    gone = pruned.astype(np.float64) == 0
    assert np.count_nonzero(gone) == count
    assert_bits(pruned[~gone], array[~gone])
    if 0 < count < array.size:
        sizes = np.abs(array.astype(np.float64))
        assert sizes[gone].max() <= sizes[~gone].min()


def test_of_equal_magnitudes_the_first_are_pruned() -> None:
    array = np.array([1, -1, 2, 1, -1, 1], np.float32)
    prune_fraction(array, 0.5)
    assert array.tolist() == [0, 0, 2, 0, -1, 1]


def test_nans_are_pruned_last() -> None:
    array = np.array([np.nan, np.inf, -np.nan, 1], np.float32)
    prune_fraction(array, 0.5)
    assert np.array_equal(array, [np.nan, 0, np.nan, 0], equal_nan=True)


def test_cutoffs_do_not_depend_on_the_block_size() -> None:
    array = np.abs(np.random.default_rng(2).standard_normal(3000)).astype(np.float32)
    keys = next(patterns(array, 32))
    ordered = np.sort(keys)
    for count in (1, 2, 1500, 2999, 3000):
        found = find_cutoff(lambda: iter([keys[:7], keys[7:7], keys[7:]]), count, 32)
        assert found.pattern == ordered[count - 1]
        assert found.ties == found.equal == 1
    assert find_cutoff(lambda: iter([keys]), 0, 32).ties == 0


def test_a_2_to_4_pattern_keeps_two_of_four_neighbours() -> None:
    array = np.array([[1, -5, 3, 2, 7, 7, -7, 7]], np.float32)
    assert prune_pattern(array, 2, 4, 1) == 4
    assert array.tolist() == [[0, -5, 3, 0, 0, 0, -7, 7]]


@pytest.mark.parametrize("block", [1, 7, 30, 1 << 20])
@pytest.mark.parametrize(
    ("shape", "dim"), [((6, 8), 1), ((8, 6), 0), ((3, 8, 2, 5), 1), ((2, 3, 4), 2), ((8,), 0)]
)
def test_patterns_run_along_any_dimension_in_blocks_of_any_size(
    shape: tuple[int, ...], dim: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_magnitude, "BLOCK", block)
    array = np.random.default_rng(3).integers(-4, 5, shape).astype(np.float32)
    pruned = array.copy()
    assert prune_pattern(pruned, 2, 4, dim) == array.size // 2
    expected = masks_of({"a": np.abs(array)}, Pattern(2, 4), along={"a": (dim, 1)})["a"]
    assert_bits(pruned, np.where(expected, array, np.float32(0)))


def test_pruning_an_empty_tensor_prunes_nothing() -> None:
    assert prune_pattern(np.zeros((3, 4, 0), np.float32), 2, 4, 1) == 0


def test_a_pattern_is_packed(tmp_path: Path) -> None:
    with packed(tmp_path, "--prune", "2:4") as sfp:
        back = sfp.get_tensor("embed.weight").reshape(-1, 4)
        assert (np.count_nonzero(back, axis=1) == 2).all()


def kernels() -> dict[str, np.ndarray[Any, Any]]:
    """Weights of a network: a pattern fits only some, and one of them only in its first dimension."""
    rng = np.random.default_rng(4)
    shapes = {
        "stem.weight": (64, 3, 5, 5),
        "conv.weight": (64, 64, 3, 3),
        "conv1d.weight": (64, 64, 3),
        "experts.weight": (3, 12, 132),
        "odd.weight": (65, 65),
        "c_attn.weight": (64, 65),
        "fc.weight": (64, 64),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def assert_two_of_four(array: np.ndarray[Any, Any], dim: int) -> None:
    groups = np.moveaxis(array, dim, -1).reshape(-1, 4)
    assert (np.count_nonzero(groups, axis=1) == 2).all()


def test_a_pattern_prunes_tensors_that_it_fits_and_lists_the_others(tmp_path: Path, capsys: Capture) -> None:
    arrays = kernels()
    source, target = make(tmp_path / "m.safetensors", arrays), tmp_path / "m.sfp"
    assert main(["pack", str(source), "-o", str(target), "--prune", "2:4", "--json", "--verify"]) == 0
    left = json.loads(capsys.readouterr().out)["unpruned"]
    assert sorted(entry["name"] for entry in left) == ["c_attn.weight", "odd.weight", "stem.weight"]
    reasons = {entry["name"]: entry["because"] for entry in left}
    assert "3 inputs along dimension 1" in reasons["stem.weight"]
    with sfpformat.open(target) as sfp:
        for name in reasons:
            assert_bits(sfp.get_tensor(name), arrays[name])
        for name, dim in (("conv.weight", 1), ("conv1d.weight", 1), ("experts.weight", 2), ("fc.weight", 1)):
            assert_two_of_four(sfp.get_tensor(name), dim)
    assert main(["pack", str(source), "-o", str(target), "--prune", "2:4"]) == 0
    shown = capsys.readouterr().out
    assert all(f"'{name}' ({reason})" in shown for name, reason in reasons.items())


def test_the_dimension_of_a_pattern_can_be_set_per_tensor(tmp_path: Path, capsys: Capture) -> None:
    words = ("--prune", "2:4", "--like", "c_*", "--pattern-dim", "0", "--like", "[es]*", "--prune", "0.5")
    with packed(tmp_path, *words, arrays=kernels()) as sfp:
        assert_two_of_four(sfp.get_tensor("c_attn.weight"), 0)
        assert_two_of_four(sfp.get_tensor("fc.weight"), 1)
        assert np.count_nonzero(sfp.get_tensor("stem.weight")) == 64 * 75 // 2
    assert "1 not pruned because the pattern does not fit: 'odd.weight'" in capsys.readouterr().out


def test_a_like_rule_with_a_pattern_skips_matching_tensors_that_it_does_not_fit(
    tmp_path: Path, capsys: Capture
) -> None:
    with packed(tmp_path, "--like", "[cfo]*", "--prune", "2:4", arrays=kernels()) as sfp:
        assert_two_of_four(sfp.get_tensor("fc.weight"), 1)
    assert "'odd.weight'" in capsys.readouterr().out
    source = tmp_path / "m.safetensors"
    told = error_of(
        capsys, "pack", source, "-o", tmp_path / "b.sfp", "--like", "odd.weight", "--prune", "2:4"
    )
    assert "--prune after --like 'odd.weight' fits no tensor" in told


@pytest.mark.parametrize("wide", [False, True])
def test_one_threshold_over_the_model_prunes_exactly_the_requested_share(tmp_path: Path, wide: bool) -> None:
    arrays = checkpoint()
    names = ["embed.weight", "layer.0.weight", "layer.1.weight"]
    for name in names:  # few values, so that many lie at the threshold
        arrays[name] = np.round(arrays[name] * 4) / 4
    if wide:
        arrays["layer.1.weight"] = arrays["layer.1.weight"].astype(np.float64)
    with packed(tmp_path, "--prune", "0.6", "--scope", "model", arrays=arrays) as sfp:
        order = [name for name in load_order(tmp_path / "m.safetensors") if name in names]
        was = np.concatenate([arrays[name].reshape(-1).astype(np.float64) for name in order])
        back = np.concatenate([sfp.get_tensor(name).reshape(-1).astype(np.float64) for name in order])
    going = np.argsort(np.abs(was), kind="stable")[: int(0.6 * len(was) + 0.5)]
    expected = was.copy()
    expected[going] = 0
    assert np.array_equal(back, expected)


def load_order(path: Path) -> list[str]:
    """The tensors of a safetensors file in the order of their data."""
    with safe_open(path, "np") as file:
        return list(file.offset_keys())


def test_different_fractions_over_the_model_have_their_own_thresholds(tmp_path: Path) -> None:
    words = ("--prune", "0.5", "--scope", "model", "--like", "embed*", "--prune", "0.25")
    with packed(tmp_path, *words) as sfp:
        zeros = {name: np.count_nonzero(sfp.get_tensor(name) == 0) for name in sfp}
    assert zeros["embed.weight"] == 128 * 64 // 4
    assert zeros["layer.0.weight"] + zeros["layer.1.weight"] == 64 * 96
    assert zeros["layer.1.weight"] > zeros["layer.0.weight"]


# --------------------------------------------------------------------------------------------- importance


def test_importances_are_stored_for_the_tensors_that_have_one(tmp_path: Path) -> None:
    arrays = checkpoint()
    importances = {"embed.weight": np.abs(arrays["embed.weight"]), "layer.0.bias": np.ones(96, np.float32)}
    save_file(importances, tmp_path / "i.safetensors")
    with packed(tmp_path, "--importance", tmp_path / "i.safetensors", "--importance-bits", "8") as sfp:
        assert sfp.info("embed.weight").role == "metadata"
        assert sfp.info("layer.0.weight").importance is None
        back = sfp.get_importance("embed.weight")
        assert back is not None
        greatest = importances["embed.weight"].max()
        assert np.abs(back - importances["embed.weight"]).max() <= 0.51 * greatest / 255
        assert_bits(sfp.get_tensor("embed.weight"), arrays["embed.weight"])


@pytest.mark.parametrize(
    ("name", "array", "told"),
    [
        ("unknown", np.ones(3, np.float32), "no tensor of the checkpoint is named 'unknown'"),
        ("norm", np.ones(3, np.float32), "same shape"),
        ("norm", np.ones(64, np.int64), "float"),
        ("ids", np.ones(40, np.float32), "float"),
        ("norm", np.full(64, -1, np.float32), "not negative"),
    ],
)
def test_importances_that_do_not_fit_are_refused(
    name: str, array: np.ndarray[Any, Any], told: str, tmp_path: Path, capsys: Capture
) -> None:
    save_file({name: array}, tmp_path / "i.safetensors")
    source = make(tmp_path / "m.safetensors")
    words = ("--importance", tmp_path / "i.safetensors")
    assert told in error_of(capsys, "pack", source, "-o", tmp_path / "m.sfp", *words)
    assert sorted(os.listdir(tmp_path)) == ["i.safetensors", "m.safetensors"]


# ------------------------------------------------------------------------------- options without effect


def of_importances(folder: Path, words: str) -> list[object]:
    """The arguments of a pack of one matrix with an importance."""
    array = np.random.default_rng(4).standard_normal((80, 64)).astype(np.float32)
    save_file({"w": array, "v": array + 1}, folder / "m.safetensors")
    save_file({"w": np.abs(array)}, folder / "f.safetensors")
    save_file({}, folder / "empty.safetensors")
    files = [str(folder / word) if word.endswith(".safetensors") else word for word in words.split()]
    return ["pack", folder / "m.safetensors", "-o", folder / "m.sfp", *files]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--importance f.safetensors --importance-bits 0", "has no effect: --importance-bits 0 stores none"),
        ("--importance empty.safetensors", "has no effect: the file has no tensors"),
        ("--importance-bits 3", "--importance-bits needs --importance"),
        ("--like w --importance-bits 3", "--importance-bits needs --importance"),
        ("--bits 4 --weighted root", "--weighted needs --importance with an importance of 'v'"),
        ("--bits 4 --weighted root --importance f.safetensors", "an importance of 'v'; "),
    ],
)
def test_options_about_importances_without_effect_are_refused(
    words: str, told: str, tmp_path: Path, capsys: Capture
) -> None:
    assert told in error_of(capsys, *of_importances(tmp_path, words))
    assert not (tmp_path / "m.sfp").exists()


def test_importances_that_only_weight_errors_are_accepted(tmp_path: Path) -> None:
    words = "--like w --bits 4 --weighted root --importance-bits 0"
    given = of_importances(tmp_path, "--importance f.safetensors")
    assert main([*map(str, given), *words.split()]) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--bits 4 --mantissa-bits 3", "--mantissa-bits had no effect"),
        ("--bits 4 --like w --mantissa-bits 3", "--mantissa-bits had no effect"),
        ("--mantissa-bits 3", ""),
        ("--bits 30 --mantissa-bits 3", ""),
        ("--window 3", ""),
        ("--window 1 --chunk 4096 --mask none --mantissa-bits 3", "--window had no effect"),
        ("--zeros positive", "--zeros positive had no effect: no weight is -0"),
        ("--preset speed", ""),
    ],
)
def test_the_summary_names_options_without_effect(
    words: str, told: str, tmp_path: Path, capsys: Capture
) -> None:
    given = [*map(str, of_importances(tmp_path, "")), *words.split()]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert (told or "had no effect") in out if told else "had no effect" not in out
    assert main([*given[:4], "--json", *given[4:]]) == 0
    assert [each["option"] for each in json.loads(capsys.readouterr().out)["without_effect"]] == (
        [told.split(" had")[0]] if told else []
    )
