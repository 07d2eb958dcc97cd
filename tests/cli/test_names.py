"""Names on the command line: every name of a tied tensor selects it; errors suggest the nearest name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import sfpformat

from .test_main import error_of, make, run
from .test_pack import Capture

ARRAYS = {
    name: np.random.default_rng(seed).standard_normal((64, 96)).astype(np.float32)
    for seed, name in enumerate(("lm_head.weight", "mid.weight", "odd[0].weight"))
}
# As safetensors and `save_model` write it: name -> the name of the same tensor that was kept.
TIED = {"wte.weight": "lm_head.weight", "odd.weight": "odd[0].weight", "format": "pt"}
BY_ANY_NAME = pytest.mark.parametrize("name", ["wte.weight", "lm_head.weight", "wt*"])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "m.safetensors", ARRAYS, TIED)


@BY_ANY_NAME
def test_a_rule_applies_to_a_tied_tensor_under_any_of_its_names(
    source: Path, name: str, tmp_path: Path
) -> None:
    assert run("pack", source, "-o", tmp_path / "m.sfp", "--like", name, "--bits", "4") == 0
    with sfpformat.open(tmp_path / "m.sfp") as file:
        assert file.info("lm_head.weight").quantiser == "uniform"
        assert file.info("mid.weight").quantiser == "exact"


@BY_ANY_NAME
def test_keep_applies_to_a_tied_tensor_under_any_of_its_names(
    source: Path, name: str, tmp_path: Path
) -> None:
    assert run("pack", source, "-o", tmp_path / "m.sfp", "--bits", "4", "--keep", name) == 0
    with sfpformat.open(tmp_path / "m.sfp") as file:
        assert file.info("lm_head.weight").quantiser == "exact"
        assert file.info("mid.weight").quantiser == "uniform"


def test_a_rule_applies_to_a_name_with_brackets_by_its_other_name(source: Path, tmp_path: Path) -> None:
    words = ("--like", "odd.weight", "--bits", "4")
    assert run("pack", source, "-o", tmp_path / "m.sfp", *words) == 0
    with sfpformat.open(tmp_path / "m.sfp") as file:
        assert file.info("odd[0].weight").quantiser == "uniform"
        assert file.info("mid.weight").quantiser == "exact"


@pytest.mark.parametrize("names", [("wte.weight",), ("lm_head.weight",), ("wte.weight", "lm_head.weight")])
def test_an_importance_applies_to_a_tied_tensor_under_any_of_its_names(
    source: Path, names: tuple[str, ...], tmp_path: Path
) -> None:
    importance = np.abs(ARRAYS["lm_head.weight"])
    save_file({name: importance.copy() for name in names}, tmp_path / "i.safetensors")
    words = ("--importance", tmp_path / "i.safetensors", "--importance-bits", "8")
    assert run("pack", source, "-o", tmp_path / "m.sfp", *words) == 0
    with sfpformat.open(tmp_path / "m.sfp") as file:
        kept = file.get_importance("lm_head.weight")
        assert kept is not None
        assert np.abs(kept - importance).max() <= 0.51 * importance.max() / 255


def test_different_importances_for_one_tied_tensor_are_refused(
    source: Path, tmp_path: Path, capsys: Capture
) -> None:
    importance = np.abs(ARRAYS["lm_head.weight"])
    save_file({"wte.weight": importance, "lm_head.weight": importance + 1}, tmp_path / "i.safetensors")
    words = ("--importance", tmp_path / "i.safetensors")
    said = error_of(capsys, "pack", source, "-o", tmp_path / "m.sfp", *words)
    assert "'wte.weight' and 'lm_head.weight' are importances of one tensor but differ" in said
    assert not (tmp_path / "m.sfp").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--like", "mid.wieght", "--bits", "4"), "matches 'mid.wieght'; the nearest is 'mid.weight'"),
        (("--keep", "mid"), "matches 'mid'; the nearest is 'mid.weight'"),
        (("--keep", "mid.wieght*"), "matches 'mid.wieght*'\n"),
    ],
)
def test_a_name_that_matches_no_tensor_is_refused_with_the_nearest_name(
    source: Path, words: tuple[str, ...], said: str, tmp_path: Path, capsys: Capture
) -> None:
    assert said in error_of(capsys, "pack", source, "-o", tmp_path / "m.sfp", *words) + "\n"


def test_every_command_with_names_suggests_the_nearest_name(
    source: Path, tmp_path: Path, capsys: Capture
) -> None:
    save_file({"mid.weight": np.abs(ARRAYS["mid.weight"])}, tmp_path / "i.safetensors")
    packed, out = tmp_path / "m.sfp", tmp_path / "out.safetensors"
    assert run("pack", source, "-o", packed, "--importance", tmp_path / "i.safetensors") == 0
    capsys.readouterr()
    nearest = "no tensor name matches 'Mid.weight'; the nearest is 'mid.weight'"
    assert nearest in error_of(capsys, "info", packed, "--tensors", "Mid.weight")
    assert nearest in error_of(capsys, "unpack", packed, "-o", out, "--tensor", "Mid.weight")
    words = ("prune", packed, "-o", tmp_path / "n.sfp", "--sparsity", "0.5")
    assert nearest in error_of(capsys, *words, "--exempt", "Mid.weight")
    kept = "no tensor name matches 'wte*'; 'wte.weight' is stored as 'lm_head.weight'"
    assert kept in error_of(capsys, "info", packed, "--tensors", "wte*")
    assert kept in error_of(capsys, "unpack", packed, "-o", out, "--tensor", "wte*")
