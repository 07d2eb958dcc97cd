"""Pruning models with tied weights: each step accepts every name of a weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

import sfpformat
from sfpformat import OptionError, Options, Uniform
from sfpformat.pruning import (
    Settings,
    Sparsity,
    Tuning,
    apply_masks,
    fine_tune,
    fisher,
    fit_factors,
    fit_multipliers,
    give_masks,
    learn_importance,
    magnitude,
    pack,
    prune,
    prune_layerwise,
    statistics,
    take_masks,
    wanda,
)
from sfpformat.torch import load_model

from ..torch.test_memory import freed

NAMES = ("wte.weight", "lm_head.weight")
KEPT = "lm_head.weight"
ONE = pytest.mark.parametrize("name", NAMES)
DIFFER = "'wte.weight' and 'lm_head.weight' are the same tensor, but their values differ"
THREE_BITS = Options(Uniform(bits=3.0))


class Tied(nn.Module):
    """A small language model whose embedding and head are the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(40, 8)
        self.mid = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 40, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.lm_head(self.mid(self.wte(ids)))
        return found


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(0)
    return Tied()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(40, (4,), generator=generator),) * 2 for _ in range(2)]


def by_statistics(score: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    return lambda model, names: score(model, statistics(model, batches(), batches=2, tensors=names))


def learned(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    return learn_importance(model, batches(), 0.5, settings=Settings(steps=2), tensors=names).importances


SCORES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "magnitude": magnitude,
    "wanda": by_statistics(wanda),
    "fisher": by_statistics(fisher),
    "learned": learned,
}


def contents(path: Path) -> tuple[float, str | None, bool]:
    """Returns the pruned share of the tied tensor, its quantiser, and whether it has an importance."""
    with sfpformat.open(path) as file:
        assert sorted(file) == [KEPT, "mid.bias", "mid.weight"]
        pruned = 1 - float(file.get_mask(KEPT).mean())
        return pruned, file.info(KEPT).quantiser, file.get_importance(KEPT) is not None


@ONE
@pytest.mark.parametrize("score", SCORES)
def test_scores_prune_and_pack_agree_under_any_name_of_a_tied_tensor(
    model: Tied, name: str, score: str, tmp_path: Path
) -> None:
    importances = SCORES[score](model, [name])
    assert list(importances) == [name]
    masks = prune(model, importances, Sparsity(0.5))
    assert list(masks) == [name]
    other = NAMES[1 - NAMES.index(name)]
    for names in ((name, name), (name, other), (other, name)):
        given: dict[str, Any] = {"importances": {names[1]: importances[name]}, "options": THREE_BITS}
        pack(model, tmp_path / "m", {names[0]: masks[name]}, **given)
        assert contents(tmp_path / "m") == (0.5, "uniform", True)


def test_both_names_of_a_tied_tensor_have_the_same_scores(model: Tied) -> None:
    for score in SCORES:
        one, other = (SCORES[score](model, [name])[name] for name in NAMES)
        assert torch.equal(one, other), score


def test_a_tensor_that_is_named_twice_is_pruned_once(model: Tied) -> None:
    importance = model.wte.weight.detach().abs()
    masks = prune(model, dict.fromkeys(NAMES, importance), Sparsity(0.5))
    assert list(masks) == ["wte.weight"]
    assert float((model.wte.weight == 0).float().mean()) == 0.5


@ONE
def test_factors_and_multipliers_are_accepted_under_any_name(model: Tied, name: str, tmp_path: Path) -> None:
    masks = {KEPT: model.wte.weight.detach() > 0}
    before = model.wte.weight.detach().clone()
    multiplier = torch.full((40, 8), 2.0)
    pack(model, tmp_path / "m", masks, multipliers={name: multiplier})
    pack(model, tmp_path / "n", masks, factors={name: (torch.ones(40), torch.full((8,), 2.0))})
    pack(model, tmp_path / "o", masks, multipliers=dict.fromkeys(NAMES, multiplier))
    assert torch.equal(model.wte.weight, before)
    for path in ("m", "n", "o"):
        other = Tied()
        load_model(other, tmp_path / path)
        assert torch.equal(other.wte.weight, torch.where(masks[KEPT], 2 * before, 0)), path


@pytest.mark.parametrize("argument", ["masks", "importances", "multipliers", "factors"])
def test_values_that_differ_for_two_names_are_refused(model: Tied, argument: str, tmp_path: Path) -> None:
    ones = torch.ones(40, 8)
    values: dict[str, tuple[Any, Any]] = {
        "masks": (ones > 0, torch.eye(40, 8) > 0),
        "importances": (ones, ones * torch.arange(8)),
        "multipliers": (ones, 2 * ones),
        "factors": ((ones[:, 0], ones[0]), (ones[:, 0], 2 * ones[0])),
    }
    given: dict[str, Any] = {"masks": {}, argument: dict(zip(NAMES, values[argument], strict=True))}
    with pytest.raises(OptionError, match=f"^{argument}: {DIFFER}"):
        pack(model, tmp_path / "m", **given)
    assert not (tmp_path / "m").exists()


def test_in_place_steps_refuse_different_values_for_two_names(model: Tied) -> None:
    before = model.wte.weight.detach().clone()
    importance = before.abs()
    masks = {NAMES[0]: before > 0, NAMES[1]: before > 1}
    with pytest.raises(OptionError, match=DIFFER):
        prune(model, {NAMES[0]: importance, NAMES[1]: importance + torch.eye(40, 8)}, Sparsity(0.5))
    for step in (apply_masks, give_masks):
        with pytest.raises(OptionError, match=DIFFER):
            step(model, masks)
    with pytest.raises(OptionError, match=DIFFER):
        fine_tune(model, masks, batches(), tuning=Tuning(1, objective="loss"))
    assert torch.equal(model.wte.weight, before)


@pytest.mark.parametrize("fit", [fine_tune, fit_factors, fit_multipliers])
def test_tuning_accepts_equal_masks_under_both_names(fit: Callable[..., Any], model: Tied) -> None:
    mask = model.wte.weight.detach() > 0
    result = fit(model, dict.fromkeys(NAMES, mask), batches(), tuning=Tuning(2, objective="loss"))
    if fit is not fine_tune:
        assert list(result) == ["wte.weight"]
    else:
        assert torch.equal(model.lm_head.weight == 0, ~mask)


@ONE
def test_masks_exchanged_with_torch_keep_the_tie(model: Tied, name: str, tmp_path: Path) -> None:
    weight = model.wte.weight.detach().clone()
    mask = weight > 0
    give_masks(model, {name: mask})
    assert torch.equal(model.wte.weight, model.lm_head.weight)
    assert model.wte.weight_orig is model.lm_head.weight_orig
    masks = take_masks(model)
    assert model.lm_head.weight is model.wte.weight
    assert torch.equal(model.wte.weight, torch.where(mask, weight, torch.zeros(())))
    pack(model, tmp_path / "m", masks)
    with sfpformat.open(tmp_path / "m") as file:
        assert np.array_equal(file.get_mask(KEPT), mask.numpy())


@ONE
def test_layerwise_pruning_finds_the_layer_of_a_tied_weight(model: Tied, name: str) -> None:
    found = prune_layerwise(model, batches(), 0.5, "wanda", batches=2, tensors=[name])
    assert list(found.masks) == [name]
    other = prune_layerwise(model, batches(), 0.5, "wanda", batches=2, tensors=[KEPT])
    assert torch.equal(found.masks[name], other.masks[KEPT])


@ONE
def test_statistics_under_another_name_are_accepted(model: Tied, name: str) -> None:
    found = statistics(model, batches(), batches=2, tensors=[KEPT])
    by_name = learn_importance(
        model, batches(), 0.5, settings=Settings(steps=1), tensors=[name], found=found
    ).importances
    assert list(by_name) == [name]
    with pytest.raises(OptionError, match=r"found has no value for 'mid\.weight'"):
        learn_importance(
            model, batches(), 0.5, settings=Settings(steps=1), tensors=["mid.weight"], found=found
        )


@ONE
def test_starting_importances_are_accepted_under_another_name(model: Tied, name: str) -> None:
    def learn(start: dict[str, Tensor]) -> dict[str, Tensor]:
        settings = Settings(steps=1, method="levels")
        held_out = batches()
        return learn_importance(
            model, batches(), 0.5, settings=settings, tensors=[name], start=start, held_out=held_out
        ).importances

    importance = model.wte.weight.detach().abs()
    assert list(learn({KEPT: importance})) == [name]
    with pytest.raises(OptionError, match=r"^start: no tensor is named 'mid\.weight'"):
        learn({KEPT: importance, "mid.weight": torch.ones(8, 8)})
    with pytest.raises(OptionError, match=f"^start: {DIFFER}"):
        learn({NAMES[0]: importance, NAMES[1]: importance + 1})


def test_an_unknown_name_is_refused_with_the_nearest_name(model: Tied, tmp_path: Path) -> None:
    mask, importance = torch.ones(8, 8) > 0, torch.ones(8, 8)
    pair = (torch.ones(8), torch.ones(8))
    nearest = "named 'mid.wieght'; the nearest is 'mid.weight'"
    cases: list[dict[str, Any]] = [
        {"masks": {"mid.wieght": mask}},
        {"masks": {}, "importances": {"mid.wieght": importance}},
        {"masks": {}, "multipliers": {"mid.wieght": importance}},
        {"masks": {}, "factors": {"mid.wieght": pair}},
    ]
    for given in cases:
        with pytest.raises(OptionError, match=nearest):
            pack(model, tmp_path / "m", **given)
    for step in (apply_masks, give_masks):
        with pytest.raises(OptionError, match=nearest):
            step(model, {"mid.wieght": mask})
    with pytest.raises(OptionError, match=nearest):
        prune(model, {"mid.wieght": importance}, Sparsity(0.5))
    with pytest.raises(OptionError, match=nearest):
        magnitude(model, ["mid.wieght"])


def test_freed_weights_are_neither_scored_nor_pruned() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(freed(8, 8))
    ones = torch.ones(8, 8)
    for step in (
        lambda: magnitude(model, ["0.weight"]),
        lambda: prune(model, {"0.weight": ones}, Sparsity(0.5)),
        lambda: apply_masks(model, {"0.weight": ones > 0}),
        lambda: give_masks(model, {"0.weight": ones > 0}),
        lambda: statistics(model, [(torch.ones(1, 8), torch.zeros(1).long())], tensors=["0.weight"]),
    ):
        with pytest.raises(OptionError, match=r"'0\.weight'.*memory and needs"):
            step()
