"""Arguments by tensor names: every name of a tied tensor is accepted, and unknown names are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sfpformat
from sfpformat import OptionError, Options, SfpWarning, Uniform
from sfpformat.torch import SfpLinear, compress_model, load_file, save, save_file, save_model

from .test_files import pruned

THREE_BITS = Options(Uniform(bits=3.0))
NAMES = ("wte.weight", "lm_head.weight")
KEPT = "lm_head.weight"


class Tied(nn.Module):
    """A small language model whose embedding and head are the same tensor, named after the head in files."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(100, 16)
        self.mid = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 100, bias=False)
        self.lm_head.weight = self.wte.weight


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(0)
    return Tied()


# ------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", NAMES)
def test_options_masks_and_importances_apply_to_a_tied_tensor_under_any_name(
    model: Tied, name: str, tmp_path: Path
) -> None:
    importance = model.wte.weight.detach().abs()
    mask = importance > importance.median()
    save_model(
        model, tmp_path / "m", options={name: THREE_BITS}, masks={name: mask}, importances={name: importance}
    )
    with sfpformat.open(tmp_path / "m") as file:
        assert file.info(KEPT).quantiser == "uniform"
        assert (file.get_mask(KEPT) == mask.numpy()).all()
        kept = file.get_importance(KEPT)
        assert kept is not None
        assert np.allclose(kept, (importance * mask).numpy(), atol=float(importance.max()) / 126)
        assert file.info("mid.weight").quantiser != "uniform"


@pytest.mark.parametrize("argument", ["masks", "importances", "options"])
def test_values_for_two_names_of_a_tensor_must_be_equal(model: Tied, argument: str, tmp_path: Path) -> None:
    weight = model.wte.weight.detach()
    values: dict[str, tuple[Any, Any, Any]] = {
        "masks": (weight > 0, (weight > 0).numpy(), weight > 1),
        "importances": (weight.abs(), weight.abs().numpy(), weight.abs() + 1),
        "options": (THREE_BITS, THREE_BITS.but(), Options(Uniform(bits=4.0))),
    }
    value, equal, other = values[argument]
    one: dict[str, Any] = {argument: {KEPT: value}}
    two: dict[str, Any] = {argument: dict(zip(NAMES, (value, equal), strict=True))}
    three: dict[str, Any] = {argument: dict(zip(NAMES, (value, other), strict=True))}
    save_model(model, tmp_path / "one", **one)
    save_model(model, tmp_path / "two", **two)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    words = f"^{argument}: 'wte.weight' and 'lm_head.weight' are the same tensor, but their values differ"
    with pytest.raises(OptionError, match=words):
        save_model(model, tmp_path / "three", **three)
    assert not (tmp_path / "three").exists()


def test_values_that_differ_only_beyond_float32_are_refused(model: Tied, tmp_path: Path) -> None:
    importance = model.wte.weight.detach().double().abs()
    values = dict(zip(NAMES, (importance, importance * (1 + 1e-12)), strict=True))
    with pytest.raises(OptionError, match="the same tensor, but their values differ"):
        save_model(model, tmp_path / "m", importances=values)


def test_different_factors_for_two_names_are_refused(model: Tied, tmp_path: Path) -> None:
    rows, columns = torch.ones(100), torch.ones(16)
    same: dict[str, Any] = {"wte.weight": (rows, columns), KEPT: (rows.clone(), columns.numpy())}
    save_model(model, tmp_path / "m", importances=same)
    with pytest.raises(OptionError, match="the same tensor, but their values differ"):
        save_model(model, tmp_path / "m", importances={**same, KEPT: (rows * 2, columns)})


@pytest.mark.parametrize("argument", ["masks", "importances", "options"])
def test_a_name_that_the_model_does_not_have_is_refused(model: Tied, argument: str, tmp_path: Path) -> None:
    values = {"masks": torch.ones(16, 16) > 0, "importances": torch.ones(16, 16), "options": THREE_BITS}
    given: dict[str, Any] = {argument: {"mid": values[argument]}}
    with pytest.raises(
        OptionError, match=f"^{argument}: no tensor is named 'mid'; the nearest is 'mid.weight'$"
    ):
        save_model(model, tmp_path / "m", **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argument", ["masks", "importances", "options"])
@pytest.mark.parametrize("save_one", [save_file, lambda tensors, path, **given: save(tensors, **given)])
def test_a_name_that_the_file_does_not_have_is_refused(
    argument: str, save_one: Callable[..., object], tmp_path: Path
) -> None:
    w = pruned(9, 9)
    values = {"masks": w != 0, "importances": w.abs(), "options": THREE_BITS}
    with pytest.raises(OptionError, match=f"^{argument}: no tensor is named 'W'; the nearest is 'w'$"):
        save_one({"w": w}, tmp_path / "m", **{argument: {"W": values[argument]}})
    assert not list(tmp_path.iterdir())


def test_options_and_masks_for_a_compressed_tensor_are_refused(model: Tied, tmp_path: Path) -> None:
    compress_model(model)
    for argument, value in (("options", THREE_BITS), ("masks", torch.ones(100, 16) > 0)):
        given: dict[str, Any] = {argument: {"wte.weight": value}}
        with pytest.raises(OptionError, match=f"^{argument}: 'lm_head.weight' is compressed already"):
            save_model(model, tmp_path / "m", **given)
    save_model(model, tmp_path / "m", options={"mid.bias": Options(coding="raw")})
    assert set(load_file(tmp_path / "m")) == {KEPT, "mid.weight", "mid.bias"}


# --------------------------------------------------------------------------------------------- compressing


@pytest.mark.parametrize("name", NAMES)
def test_options_apply_to_a_tied_weight_to_be_compressed_under_any_name(model: Tied, name: str) -> None:
    compress_model(model, {name: THREE_BITS})
    assert isinstance(model.lm_head, SfpLinear)
    assert model.lm_head.weight_sfp is model.wte.weight_sfp
    with sfpformat.open(model.wte.weight_sfp.numpy().tobytes()) as file:
        assert file.info("weight").quantiser == "uniform"


def test_options_that_match_no_weight_to_be_compressed_are_refused(model: Tied) -> None:
    def refused(words: str, options: dict[str, Options], **given: Any) -> None:
        with pytest.raises(OptionError, match=words):
            compress_model(model, options, **given)
        assert type(model.mid) is nn.Linear

    refused(r"^options: no tensor is named 'wte'; the nearest is 'wte\.weight'$", {"wte": THREE_BITS})
    refused(r"^options: 'mid\.bias' is not compressed; only the weight", {"mid.bias": Options()})
    refused(
        r"^options: 'mid\.weight' is not compressed",
        {"mid.weight": THREE_BITS},
        choose=lambda name, _: name != "mid",
    )
    refused(
        "are the same tensor, but their values differ",
        {"wte.weight": THREE_BITS, "lm_head.weight": Options(Uniform(bits=4.0))},
    )
    compress_model(model, choose=lambda *_: True)
    with pytest.raises(OptionError, match=r"^options: 'mid\.weight' is compressed already"):
        compress_model(model, {"mid.weight": THREE_BITS})


def test_options_without_effect_warn() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.warns(SfpWarning, match=r"^the options of '0\.weight' have no effect") as told:
        compress_model(model, {"0.weight": THREE_BITS})
    assert told[0].filename == __file__
    assert type(model[0]) is nn.Linear


def test_a_choose_function_that_selects_nothing_warns(model: Tied) -> None:
    with pytest.warns(SfpWarning, match="^choose selects no layer"):
        assert compress_model(model, choose=lambda name, _: name == "middle").layers == ()
