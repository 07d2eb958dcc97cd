"""Refining masks layer by layer: swaps, reconstruction, patterns, and blocks that are not run again."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfpformat.errors import OptionError, SfpWarning
from sfpformat.pruning import Pattern, magnitude, prune, prune_layerwise, refine_layerwise
from sfpformat.pruning import swaps as swaps_module
from sfpformat.pruning.layer_inputs import grouped_products
from sfpformat.pruning.reconstruction import layer_error, reconstructed
from sfpformat.pruning.replay import Replay
from sfpformat.pruning.scores import pattern_mask, rows_mask
from sfpformat.pruning.sparsegpt import sparsegpt
from sfpformat.pruning.swaps import swapped
from sfpformat.pruning.task import CLASSIFY

from ..support.pruning_nets import loss_of, trained_net


def layer(rows: int = 6, columns: int = 24, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a mask by magnitude of half of each row, and 2/n Σ x xᵀ of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    x = torch.randn(300, columns, generator=generator) @ mixing
    weight = torch.randn(rows, columns, generator=generator)
    return weight, rows_mask(weight.abs(), 0.5), 2 / 300 * x.T @ x


# ---------------------------------------------------------------------------------------- reconstruction


def test_reconstruction_is_the_damped_least_squares_solution_of_each_row() -> None:
    weight, mask, products = layer()
    found = reconstructed(weight, mask, products, damping=0.01, iterations=1000)
    damped = products + 0.01 * products.diagonal().mean() * torch.eye(24)
    for row, kept, new in zip(weight, mask, found, strict=True):
        gone = torch.where(kept, 0, row)
        moved = torch.linalg.solve(damped[kept][:, kept], (products @ gone)[kept])
        torch.testing.assert_close(new[kept], row[kept] + moved, rtol=2e-3, atol=2e-3)
        assert (new[~kept] == 0).all()


@pytest.mark.parametrize("iterations", [0, 1, 2, 5, 50])
@pytest.mark.parametrize("damping", [0.0, 0.01, 10.0])
def test_reconstruction_never_raises_the_error_of_an_output(iterations: int, damping: float) -> None:
    weight, mask, products = layer(seed=iterations)
    new = reconstructed(weight, mask, products, damping=damping, iterations=iterations)
    before, after = (layer_error(weight, pruned, products) for pruned in (weight * mask, new))
    assert (after <= before).all()
    assert bool((after < before).all()) == (iterations > 0)


def test_reconstruction_copes_with_inputs_that_are_zero_and_rows_that_are_full_or_empty() -> None:
    weight, mask, products = layer()
    mask[0], mask[1] = True, False
    products[3], products[:, 3] = 0, 0
    found = reconstructed(weight, mask, products)
    assert torch.equal(found[0], weight[0])
    assert (found[1] == 0).all()
    assert torch.equal(found[:, 3], (weight * mask)[:, 3])
    assert torch.equal(reconstructed(weight, mask, torch.zeros(24, 24)), weight * mask)


@pytest.mark.parametrize(("swaps", "reconstruct"), [(3, False), (3, True), (0, True)])
@pytest.mark.parametrize("inputs", [1.0, 0.0])
def test_pruned_weights_are_positive_zeros(swaps: int, reconstruct: bool, inputs: float) -> None:
    model = nn.Linear(8, 4)
    masks = {"weight": magnitude(model)["weight"] > 0.2}
    assert (model.weight[~masks["weight"]] < 0).any()  # times False, these would be -0
    batches = [(inputs * torch.randn(16, 8), torch.zeros(16, dtype=torch.int64))]
    found = refine_layerwise(model, masks, batches, swaps=swaps, reconstruct=reconstruct)
    zeros = found.weights["weight"][~found.masks["weight"]]
    assert len(zeros)
    assert not zeros.any()
    assert not zeros.signbit().any()


def test_reconstruction_in_parts_gives_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mask, products = layer()
    whole = reconstructed(weight, mask, products)
    monkeypatch.setattr("sfpformat.pruning.reconstruction._AT_ONCE", 24 * 2)
    torch.testing.assert_close(reconstructed(weight, mask, products), whole, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------- swaps


def best_swap(weight: Tensor, mask: Tensor, products: Tensor, of: int) -> float:
    """By brute force: the least error of one row after one swap within groups of ``of`` inputs."""
    least = float("inf")
    for i, j in product(range(len(weight)), repeat=2):
        if mask[i] and not mask[j] and i // of == j // of:
            other = mask.clone()
            other[i], other[j] = False, True
            gone = (weight * ~other).double()
            least = min(least, float(gone @ products.double() @ gone) / 2)
    return least


@pytest.mark.parametrize("candidates", [2, 32])
@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_swaps_end_when_no_single_swap_lowers_the_error(
    pattern: Pattern | None, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swaps_module, "_CANDIDATES", candidates)
    weight, mask, products = layer(columns=12)
    if pattern is not None:
        mask = pattern_mask(weight.abs(), pattern)
    found = swapped(weight, mask, products, pattern=pattern)
    assert torch.equal(found.sum(1), mask.sum(1))
    if pattern is not None:
        assert (found.view(6, -1, 4).sum(2) == 2).all()
    assert not torch.equal(found, mask)
    of = 12 if pattern is None else 4
    for row, kept, error in zip(weight, found, layer_error(weight, weight * found, products), strict=True):
        assert best_swap(row, kept, products, of) >= float(error) * (1 - 1e-4)


def test_each_swap_lowers_the_error_of_its_row_and_leaves_the_others() -> None:
    weight, mask, products = layer(columns=48)
    before, steps = layer_error(weight, weight * mask, products), 0
    for most in range(1, 30):
        after = layer_error(weight, weight * swapped(weight, mask, products, most=most), products)
        moved = after != before
        assert (after[moved] < before[moved]).all()
        steps += int(moved.sum())
        before = after
    assert steps > 12
    assert before.sum() < 0.8 * layer_error(weight, weight * mask, products).sum()


def test_the_first_swap_is_the_best_one() -> None:
    weight, mask, products = layer(columns=12)
    once = swapped(weight, mask, products, most=1)
    for row, kept, new in zip(weight, mask, once, strict=True):
        before, after = (float(layer_error(row[None], row[None] * m, products)) for m in (kept, new))
        assert after == pytest.approx(min(before, best_swap(row, kept, products, 12)), rel=1e-4)
    assert not torch.equal(once, mask)


def test_rows_without_a_survivor_or_without_a_pruned_weight_stay() -> None:
    weight, mask, products = layer()
    mask[0], mask[1] = True, False
    found = swapped(weight, mask, products)
    assert found[0].all()
    assert not found[1].any()
    assert torch.equal(swapped(weight, mask, torch.zeros(24, 24)), mask)


# ------------------------------------------------------------------------------------------ whole models


def loss_with(net: nn.Module, weights: dict[str, Tensor], batches: list[tuple[Tensor, Tensor]]) -> float:
    net.load_state_dict(weights, strict=False)
    return loss_of(net, batches)


def test_swaps_and_reconstruction_make_a_model_better_and_leave_the_dense_one() -> None:
    net, batches = trained_net()
    dense = {name: value.clone() for name, value in net.state_dict().items()}
    masks = {name: rows_mask(value, 0.5) for name, value in magnitude(net).items()}
    plain = {name: dense[name] * mask for name, mask in masks.items()}
    swaps = refine_layerwise(net, masks, batches, swaps=50, reconstruct=False, batches=8)
    both = refine_layerwise(net, masks, batches, swaps=50, batches=8)
    new = refine_layerwise(net, masks, batches, batches=8)
    assert all(torch.equal(value, dense[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(new.masks[name], mask) for name, mask in masks.items())
    for found in (swaps, both, new):
        for name, mask in found.masks.items():
            assert torch.equal(mask.sum(1), masks[name].sum(1))
            assert (found.weights[name][~mask] == 0).all()
    assert all(torch.equal(swaps.weights[n][mask], dense[n][mask]) for n, mask in swaps.masks.items())
    losses = [loss_with(net, found, batches) for found in (plain, swaps.weights, both.weights)]
    assert losses[0] > losses[1] > losses[2]
    inputs = torch.cat([x for x, _ in batches])
    products = 2 / len(inputs) * inputs.T @ inputs
    first = "0.weight"
    error = layer_error(dense[first], new.weights[first], products)
    assert (error < layer_error(dense[first], plain[first], products)).all()


def test_masks_of_other_layers_stay_and_are_named() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    batches = [(torch.randn(9, 2, 6), torch.zeros(9).long())]
    masks = {name: value > value.median() for name, value in magnitude(net).items()}
    with pytest.warns(SfpWarning, match="'0.weight': not the weights of linear layers"):
        found = refine_layerwise(net, masks, batches, batches=1)
    assert torch.equal(found.weights["0.weight"], net.get_parameter("0.weight").detach() * masks["0.weight"])
    assert not torch.equal(
        found.weights["2.weight"], net.get_parameter("2.weight").detach() * masks["2.weight"]
    )


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "sparsegpt-updated"])
def test_layers_are_pruned_and_refined_to_patterns(method: str) -> None:
    net, batches = trained_net()
    pattern = Pattern(2, 4)
    found = prune_layerwise(net, batches, pattern, method, batches=2)
    assert list(found.masks) == ["0.weight", "3.weight", "5.weight"]
    refined = refine_layerwise(net, found.masks, batches, swaps=9, pattern=pattern, batches=2)
    for masks in (found.masks, refined.masks):
        assert all((mask.view(len(mask), -1, 4).sum(2) == 2).all() for mask in masks.values())
    assert any(not torch.equal(refined.masks[name], found.masks[name]) for name in found.masks)


def test_sparsegpt_with_a_pattern_compensates_for_pruned_weights() -> None:
    weight, _, products = layer(columns=24)
    for pattern in (Pattern(2, 4), Pattern(1, 3), Pattern(5, 8)):
        mask, updated = sparsegpt(weight, products, pattern)
        assert (mask.view(6, -1, pattern.of).sum(2) == pattern.keep).all()
        by_magnitude = weight * pattern_mask(weight.abs(), pattern)
        assert (
            layer_error(weight, updated, products).sum() < layer_error(weight, by_magnitude, products).sum()
        )


def test_a_pattern_that_does_not_fit_a_layer_is_refused_with_its_name() -> None:
    net, batches = trained_net()
    with pytest.raises(OptionError, match=r"1:5 does not fit '0.weight': .* 12 inputs"):
        prune_layerwise(net, batches, Pattern(1, 5), "wanda", batches=1)
    masks = prune(trained_net()[0], magnitude(net), Pattern(2, 4))
    with pytest.raises(OptionError, match=r"'0.weight' does not keep 1 of every 4"):
        refine_layerwise(net, masks, batches, pattern=Pattern(1, 4))


def test_invalid_arguments_of_refinement_are_refused() -> None:
    net, batches = trained_net()
    masks = {"0.weight": torch.ones(24, 12, dtype=torch.bool)}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("swaps is -1", {"swaps": -1}),
        ("nothing to do", {"reconstruct": False}),
        ("damping is nan", {"damping": float("nan")}),
    ]
    for words, options in cases:
        with pytest.raises(OptionError, match=words):
            refine_layerwise(net, masks, batches, **options)
    with pytest.raises(OptionError, match="shape"):
        refine_layerwise(net, {"0.weight": torch.ones(3, 3, dtype=torch.bool)}, batches)


# ------------------------------------------------------------------------------------------------ replay


class Blocks(nn.Module):
    """A sequence of blocks; ``skip`` names a later part that also gets the output of the first block."""

    def __init__(self, skip: str = "") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Counted(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 3)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        first = torch.zeros(())
        for place, block in enumerate(self.blocks):
            x = block(x + first if place == 2 and self.skip == "block" else x).tanh_()
            first = x if place == 0 else first
        result: Tensor = self.head(x + first if self.skip == "head" else x)
        return result


class Counted(nn.Linear):
    """A linear layer that counts how often it computes."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x)


@pytest.mark.parametrize("skip", ["", "block", "head"])
def test_products_are_the_same_whether_blocks_are_replayed_or_not(
    skip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net, batches = Blocks(skip), [torch.randn(5, 4) for _ in range(3)]
    block = net.blocks[0]
    assert isinstance(block, Counted)

    def products() -> tuple[dict[str, Tensor], int]:
        weights = {name: p.detach() for name, p in net.named_parameters() if p.dim() == 2}
        found = {}
        block.runs = 0
        with torch.no_grad():
            for (name,), product in grouped_products(net, weights, batches, CLASSIFY, strict=True):
                found[name] = product
                weights[name] = weights[name] * 0.5
        return found, block.runs

    ours, quick = products()
    monkeypatch.setattr("sfpformat.pruning.replay._blocks", lambda *_: [])
    theirs, slow = products()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # The first block computes once to find the groups, once to find the blocks, and for each batch: when it
    # is recorded, or in full for each later layer.
    assert slow == 1 + 4 * 3
    assert quick == (1 + 1 + 4 * 3 if skip else 1 + 1 + 3)


def test_recorded_outputs_of_blocks_that_are_done_count() -> None:
    torch.manual_seed(0)
    net, batches = Blocks(), [torch.randn(2, 4)]
    with torch.no_grad():
        replay = Replay(net, net, batches)
        replay.advance([net.blocks[3]])
        expected = net(batches[0])
        net.get_parameter("blocks.0.weight").zero_()
        assert not torch.equal(net(batches[0]), expected)
        with replay.running(0):
            assert torch.equal(net(batches[0]), expected)
    assert "forward" not in net.blocks[0].__dict__
