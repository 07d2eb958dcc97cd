"""Which weights are pruned, and along which of their dimensions: layers of all kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import sfpformat
from sfpformat.errors import OptionError, SfpWarning
from sfpformat.pruning import (
    Pattern,
    Settings,
    Sparsity,
    Statistics,
    fisher,
    learn_importance,
    magnitude,
    pack,
    prunable,
    prune,
    prune_layerwise,
    refine_layerwise,
    statistics,
    wanda,
)
from sfpformat.pruning.features import features
from sfpformat.pruning.weight_selection import Layout, chosen_tensors, chosen_weights, layout_of
from sfpformat.torch import compress_model

from ..support.pruning_transformers import made, tokens


def learned(model: nn.Module, data: list[Any], found: dict[str, Statistics]) -> dict[str, Tensor]:
    return learn_importance(
        model, data, 0.5, found=found, held_out=data, settings=Settings(steps=2)
    ).importances


def text(seed: int = 0) -> list[dict[str, Tensor]]:
    ids = tokens(seed, 2, 9)
    return [{"input_ids": ids, "labels": ids}]


class AsLinear(nn.Module):
    """A ``Conv1D`` of transformers as the linear layer that computes the same."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(*conv.weight.shape)
        with torch.no_grad():
            self.linear.weight.copy_(conv.weight.T)
            self.linear.bias.copy_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x)
        return result


def gpt2_twice() -> tuple[Any, Any]:
    """A GPT-2 with ``Conv1D`` layers, and the same with linear layers."""
    original, linear = made("GPT2LMHeadModel"), made("GPT2LMHeadModel")
    for name, module in list(linear.named_modules()):
        if type(module).__name__ == "Conv1D":
            path, _, attribute = name.rpartition(".")
            setattr(linear.get_submodule(path), attribute, AsLinear(module))
    return original, linear.eval()


def of_linear(name: str) -> str:
    return name.removesuffix("weight") + "linear.weight"


def test_the_conv1d_of_gpt2_is_pruned_like_a_linear_layer() -> None:
    original, linear = gpt2_twice()
    names = prunable(original)
    assert len(names) == 8
    assert prunable(linear) == [of_linear(name) for name in names]
    found, expected = (statistics(model, text(), batches=1) for model in (original, linear))
    for score in (
        lambda model, found: magnitude(model),
        fisher,
        wanda,
        lambda model, found: learned(model, text(), found),
    ):
        ours, theirs = score(original, found), score(linear, expected)
        for name in names:
            torch.testing.assert_close(ours[name].T, theirs[of_linear(name)], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "sparsegpt-updated"])
def test_the_conv1d_of_gpt2_is_pruned_layer_by_layer_along_its_inputs(method: str) -> None:
    original, linear = gpt2_twice()
    ours, theirs = (prune_layerwise(model, text(), 0.5, method, batches=1) for model in (original, linear))
    for name, mask in ours.masks.items():
        assert torch.equal(mask.T, theirs.masks[of_linear(name)])
        torch.testing.assert_close(ours.weights[name].T, theirs.weights[of_linear(name)])
        if method == "wanda":
            assert (mask.sum(0) == mask.shape[0] // 2).all()


def test_the_conv1d_of_gpt2_is_refined_like_a_linear_layer() -> None:
    original, linear = gpt2_twice()
    masks = prune_layerwise(original, text(), Pattern(2, 4), "wanda", batches=1).masks
    turned = {of_linear(name): mask.T.contiguous() for name, mask in masks.items()}
    ours, theirs = (
        refine_layerwise(model, given, text(), swaps=3, pattern=Pattern(2, 4), batches=1)
        for model, given in ((original, masks), (linear, turned))
    )
    assert any(not torch.equal(ours.masks[name], mask) for name, mask in masks.items())
    for name, weight in ours.weights.items():
        assert torch.equal(ours.masks[name].T, theirs.masks[of_linear(name)])
        torch.testing.assert_close(weight.T, theirs.weights[of_linear(name)], rtol=1e-2, atol=1e-4)


def test_features_of_outputs_and_inputs_do_not_depend_on_the_storage_layout() -> None:
    original, linear = gpt2_twice()
    names = prunable(original)
    found, expected = (statistics(model, text(), batches=1) for model in (original, linear))
    ours = features(chosen_weights(original, names), found)
    theirs = features(chosen_weights(linear, None), expected)
    start = 0
    for name in names:
        rows, columns = original.get_parameter(name).shape
        part = slice(start, start + rows * columns)
        transposed = ours[part].reshape(rows, columns, -1).transpose(0, 1).reshape(rows * columns, -1)
        torch.testing.assert_close(transposed, theirs[part], rtol=1e-2, atol=1e-2)
        start = part.stop


def test_patterns_run_along_the_inputs_of_a_conv1d() -> None:
    model = made("GPT2LMHeadModel")
    masks = prune(model, magnitude(model), Pattern(2, 4))
    assert set(masks) == set(prunable(model))
    for mask in masks.values():
        assert (mask.T.reshape(-1, 4).sum(1) == 2).all()


class Zoo(nn.Module):
    """Layers of many kinds; a forward pass uses all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(8, 4, 3, padding=1, groups=2)
        self.recurrent = nn.LSTM(4, 4, batch_first=True)
        self.cell = nn.GRUCell(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.pair = nn.Bilinear(8, 8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.grouped(self.one(x))).transpose(1, 2)
        x, _ = self.recurrent(x)
        states = [self.cell(x[:, 0])]
        for step in range(1, x.shape[1]):
            states.append(self.cell(x[:, step], states[-1]))
        x = torch.stack(states, 1)
        x = self.attention(x, x, x)[0]
        result: Tensor = self.head(self.pair(x, x)).mean(1)
        return result


ZOO = {
    "one.weight": Layout(1),
    "grouped.weight": Layout(1),
    "up.weight": Layout(0, groups=2),
    "recurrent.weight_ih_l0": Layout(1),
    "recurrent.weight_hh_l0": Layout(1),
    "cell.weight_ih": Layout(1),
    "cell.weight_hh": Layout(1),
    "attention.in_proj_weight": Layout(1),
    "attention.out_proj.weight": Layout(1),
    "pair.weight": Layout(2),
    "head.weight": Layout(1),
}


def zoo() -> tuple[Zoo, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    return Zoo(), [(torch.randn(6, 4, 5), torch.arange(6) % 5)]


def test_gradient_based_scores_prune_layers_of_all_kinds() -> None:
    model, data = zoo()
    assert {name: layout_of(model, name) for name in prunable(model)} == ZOO
    assert prunable(nn.LSTM(4, 8, proj_size=2)) == ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]
    found = statistics(model, data, batches=1)
    assert all(bool((found[name].fisher > 0).any()) for name in ZOO)
    masks = prune(model, learned(model, data, found), Sparsity(0.5))
    for name, mask in masks.items():
        assert (model.get_parameter(name).detach()[~mask] == 0).all()
    assert list(masks) == list(ZOO)


def test_patterns_fit_layers_of_all_kinds_except_small_groups() -> None:
    model, _ = zoo()
    masks = prune(model, magnitude(model), Pattern(2, 4))
    for name, mask in masks.items():
        moved = mask.movedim(ZOO[name].inputs, -1)
        assert (moved.reshape(-1, 4).sum(1) == 2).all(), name
    assert list(masks) == list(ZOO)
    with pytest.warns(SfpWarning, match=r"'up.weight' .* 4 inputs along dimension 0 in each of 2 groups"):
        masks = prune(model, magnitude(model, ["up.weight", "head.weight"]), Pattern(4, 8))
    assert list(masks) == ["head.weight"]


def test_tensors_that_wanda_and_sparsegpt_do_not_support_are_named() -> None:
    model, data = zoo()
    found = statistics(model, data, batches=1)
    others = r"'one.weight', .*'recurrent.weight_ih_l0', .*'attention.in_proj_weight'"
    with pytest.warns(SfpWarning, match=others):
        assert list(wanda(model, found)) == ["head.weight"]
    with pytest.warns(SfpWarning, match=others):
        result = prune_layerwise(model, data, 0.5, "wanda", batches=1)
    assert list(result.masks) == list(result.weights) == ["head.weight"]
    with pytest.raises(OptionError, match=r"'one.weight': not the weights of linear layers"):
        prune_layerwise(model, data, 0.5, "wanda", tensors=["head.weight", "one.weight"], batches=1)


def test_layouts_convert_weights_to_outputs_by_inputs_and_back() -> None:
    for layout, shape, rows in (
        (Layout(1), (4, 6), 4),
        (Layout(0), (4, 6), 6),
        (Layout(1), (4, 6, 3, 3), 4),
        (Layout(0, groups=2), (4, 6, 3), 6),
        (Layout(2, stacked=True), (2, 4, 6), 8),
        (Layout(1, stacked=True), (2, 4, 6), 12),
    ):
        weight = torch.randn(shape)
        matrix = layout.matrix(weight)
        assert matrix.shape == (rows, weight.numel() // rows)
        assert torch.equal(layout.back(matrix, weight), weight)
    stack = torch.randn(2, 4, 6)
    assert torch.equal(Layout(1, stacked=True).matrix(stack)[6:], stack[1].T)


def test_each_expert_of_transformers_is_pruned_along_its_inputs() -> None:
    config = transformers.MixtralConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    experts = [name for name in prunable(model) if "experts" in name]
    assert [name.rpartition(".")[2] for name in experts] == ["gate_up_proj", "down_proj"]
    assert all(layout_of(model, name) == Layout(2, stacked=True) for name in experts)
    masks = prune(model, magnitude(model), Pattern(2, 4))
    for name in experts:
        assert (masks[name].reshape(-1, 4).sum(1) == 2).all()
    found = statistics(model, text(), batches=1)
    learned(model, text(), found)


def test_an_embedding_tied_to_the_head_is_pruned_under_either_name(tmp_path: Path) -> None:
    for name in ("transformer.wte.weight", "lm_head.weight"):
        model = made("GPT2LMHeadModel")
        assert name not in prunable(model)
        importances = magnitude(model, [name])
        masks = prune(model, importances, Sparsity(0.5))
        assert (model.lm_head.weight == 0).sum() == masks[name].numel() // 2
        pack(model, tmp_path / "tied.sfp", masks, importances=importances)
        with sfpformat.open(tmp_path / "tied.sfp") as file:
            assert np.array_equal(file.get_mask("lm_head.weight"), masks[name].numpy())
            assert file.get_importance("lm_head.weight") is not None


def test_an_exempt_tied_tensor_is_exempt_under_all_its_names() -> None:
    model = made("GPT2LMHeadModel")
    names = ["lm_head.weight", "transformer.h.0.attn.c_attn.weight"]
    masks = prune(model, magnitude(model, names), 0.5, exempt="*wte*")
    assert list(masks) == names[1:]
    with pytest.raises(OptionError, match="all tensors are exempt"):
        prune(model, magnitude(model, names), 0.5, exempt=("*wte*", "*c_attn*"))
    with pytest.raises(OptionError, match=r"exempt: no tensor name matches 'lm_heads\*'"):
        prune(model, magnitude(model, names), 0.5, exempt=("lm_heads*",))
    with pytest.raises(OptionError, match=r"matches 'lm_head.weigth'; the nearest is 'lm_head.weight'"):
        prune(model, magnitude(model, names), 0.5, exempt=("lm_head.weigth",))


def test_weights_that_cannot_be_pruned_are_named_with_a_remedy() -> None:
    pruned = nn.Linear(8, 8)
    torch_prune.l1_unstructured(pruned, "weight", 0.5)
    compressed = nn.Sequential(nn.Linear(64, 64))
    compress_model(compressed)
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "pruned": pruned,
            "normed": parametrizations.weight_norm(nn.Linear(8, 8)),
            "lazy": nn.LazyLinear(8),
            "compressed": compressed,
            "meta": nn.Linear(8, 8, device="meta"),
        }
    )
    with pytest.warns(SfpWarning, match="take_masks.*'normed.weight', 'lazy.weight', 'compressed.0.weight'"):
        assert list(chosen_weights(model, None)) == ["plain.weight"]
    for name, words in {
        "pruned.weight": "take_masks",
        "normed.weight": "remove_parametrizations",
        "lazy.weight": "no shape yet",
        "compressed.0.weight": "decompress_model",
        "meta.weight": "meta device",
        "plain.weigth": "the nearest is 'plain.weight'",
        "other.thing": "no parameter is named",
    }.items():
        with pytest.raises(OptionError, match=words):
            chosen_weights(model, [name])


def test_large_matrices_of_unknown_modules_are_named() -> None:
    class Own(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(rows, 8))
            self.layer = nn.Linear(8, 8)

    with pytest.warns(SfpWarning, match=r"'matrix': 64 weights of modules with an unknown layout"):
        assert list(magnitude(Own(8))) == ["layer.weight"]
    assert list(magnitude(Own(8), ["matrix"])) == ["matrix"]
    assert list(magnitude(Own(0))) == ["layer.weight"]


def test_a_weight_that_the_loss_does_not_depend_on_is_named() -> None:
    class Unused(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.other = nn.Linear(3, 4)

    with pytest.warns(SfpWarning, match=r"the loss does not depend on 'other.weight'"):
        found = statistics(Unused(), [(torch.randn(2, 3), torch.zeros(2).long())], batches=1)
    assert not found["other.weight"].fisher.any()


def test_names_that_select_nothing_or_one_tensor_twice_are_refused() -> None:
    model = made("GPT2LMHeadModel")
    cases: list[tuple[str, Any]] = [
        ("nothing to prune", []),
        ("the string 'lm_head.weight'; give a list", "lm_head.weight"),
        ("are the same tensor", ["lm_head.weight", "transformer.wte.weight"]),
        ("no parameter is named 3", [3]),
    ]
    for words, names in cases:
        with pytest.raises(OptionError, match=words):
            chosen_tensors(model, names)
    with pytest.raises(OptionError, match="must be a matrix"):
        chosen_weights(model, ["transformer.ln_f.weight"])
    with pytest.raises(OptionError, match="no linear or convolutional layers"):
        magnitude(nn.LayerNorm(4))
