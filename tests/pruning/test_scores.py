"""Scores and statistics: importances without learning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sfpformat.errors import OptionError
from sfpformat.pruning import layer_inputs, scores
from sfpformat.pruning import sparsegpt as sparsegpt_module
from sfpformat.pruning.calibration import statistics
from sfpformat.pruning.layerwise import prune_layerwise
from sfpformat.pruning.sparsegpt import sparsegpt
from sfpformat.pruning.task import CLASSIFY, endless, evaluating
from sfpformat.pruning.weight_selection import prunable

from ..support.pruning_nets import WIDTH, loss_of, trained_net


def test_statistics_match_the_gradients_and_inputs() -> None:
    net, batches = trained_net()
    found = statistics(net, batches, batches=8)["0.weight"]
    net.eval()
    weight = net.get_parameter("0.weight")
    gradients = []
    for x, labels in batches:
        loss = nn.functional.cross_entropy(net(x), labels)
        gradients.append(torch.autograd.grad(loss, weight)[0])
    stacked = torch.stack(gradients)
    torch.testing.assert_close(found.gradient, stacked.mean(0))
    torch.testing.assert_close(found.fisher, stacked.square().mean(0))
    inputs = torch.cat([x for x, _ in batches])
    assert found.inputs is not None
    torch.testing.assert_close(found.inputs, inputs.square().mean(0))


def test_statistics_do_not_change_the_model() -> None:
    net, batches = trained_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    statistics(net, batches, batches=2)
    assert net.training
    assert all(parameter.grad is None for parameter in net[0].parameters() if parameter.dim() > 2)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net[0]._forward_pre_hooks


def test_inputs_near_zero_lower_all_scores_except_magnitude() -> None:
    net, batches = trained_net()
    found = statistics(net, batches, batches=8)
    for score, misled in (
        (scores.magnitude(net), True),
        (scores.wanda(net, found), False),
        (scores.fisher(net, found), False),
    ):
        first = score["0.weight"]
        assert (first[:, 6:].mean() > first[:, :6].mean()) == misled


def test_rows_lose_the_same_number_each() -> None:
    mask = scores.rows_mask(torch.rand(6, 4, 5), 0.7)
    assert mask.shape == (6, 4, 5)
    assert (mask.flatten(1).sum(1) == 6).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8])
def test_sparsegpt_meets_its_sparsity_in_every_block(
    sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsegpt_module, "BLOCK", 16)
    weight, x = torch.randn(10, 40), torch.randn(200, 40)
    mask, updated = sparsegpt(weight, x.T @ x / 100, sparsity)
    for start, stop in ((0, 16), (16, 32), (32, 40)):
        block = mask[:, start:stop]
        assert (~block).sum() == int(sparsity * block.numel() + 0.5)
    assert (updated[~mask] == 0).all()


def test_sparsegpt_solves_least_squares_if_pruned_columns_come_first() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 24, generator=generator) @ (
        torch.eye(24) + 0.2 * torch.randn(24, 24, generator=generator)
    )
    weight = torch.randn(4, 24, generator=generator)
    weight[:, 12:] += weight[:, 12:].sign()
    weight[:, :12] *= 1e-2
    hessian = 2 / 300 * x.T @ x
    mask, updated = sparsegpt(weight, hessian, 0.5)
    assert torch.equal(mask, torch.arange(24).expand(4, 24) >= 12)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    moved = torch.linalg.solve(damped[12:, 12:], damped[12:, :12] @ weight[:, :12].T).T
    torch.testing.assert_close(updated[:, 12:], weight[:, 12:] + moved, rtol=1e-4, atol=1e-5)


def test_sparsegpt_has_less_output_error_than_pruning_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator)
    x = torch.randn(400, 32, generator=generator) @ mixing
    weight = torch.randn(16, 32, generator=generator)
    mask, updated = sparsegpt(weight, 2 / 400 * x.T @ x, 0.6)
    outputs = x @ weight.T

    def error(pruned: torch.Tensor) -> float:
        return float((x @ pruned.T - outputs).square().mean())

    assert error(updated) < 0.9 * error(weight * mask)
    by_magnitude = scores.rows_mask(weight.abs(), 0.6)
    assert error(updated) < 0.95 * error(weight * by_magnitude)


def test_sparsegpt_with_independent_inputs_equals_wanda_over_the_block() -> None:
    weight = torch.randn(8, 16)
    mask, updated = sparsegpt(weight, torch.eye(16), 0.5)
    assert torch.equal(mask.flatten(), weight.abs().flatten() > weight.abs().flatten().kthvalue(64).values)
    torch.testing.assert_close(updated, weight * mask)


def test_sparsegpt_zeroes_columns_of_inputs_that_are_always_zero() -> None:
    x = torch.randn(100, 12)
    x[:, 3] = 0
    _, updated = sparsegpt(torch.randn(5, 12), x.T @ x / 50, 0.25)
    assert (updated[:, 3] == 0).all()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "sparsegpt-updated"])
def test_layers_are_pruned_in_order_and_meet_their_sparsity(method: str) -> None:
    net, batches = trained_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = prune_layerwise(net, batches, 0.5, method, batches=8)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert list(result.masks) == ["0.weight", "3.weight", "5.weight"]
    for name, mask in result.masks.items():
        assert (~mask).float().mean() == pytest.approx(0.5, abs=0.05)
        assert (result.weights[name][~mask] == 0).all()
        assert torch.equal(result.weights[name][mask], before[name][mask]) == (method != "sparsegpt-updated")
    net.load_state_dict(result.weights, strict=False)
    by_magnitude, _ = trained_net()
    for weight in (by_magnitude.get_parameter(name) for name in result.masks):
        weight.data *= scores.rows_mask(weight.detach().abs(), 0.5)
    assert loss_of(net, batches) < loss_of(by_magnitude, batches)


def test_later_layers_use_the_outputs_of_the_pruned_layers() -> None:
    net, batches = trained_net()
    with torch.no_grad():
        net.get_parameter("0.weight").zero_()
        net.get_parameter("0.bias").zero_()
    result = prune_layerwise(net, batches, 0.5, "sparsegpt-updated", batches=2)
    assert (result.weights["3.weight"] == 0).all()


class Shared(nn.Module):
    """Two layers with the same input, a weight that is used twice, and an embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        result: torch.Tensor = self.head(self.one(x) + self.two(x))
        return result


def test_a_head_tied_to_an_embedding_is_not_pruned_unless_named() -> None:
    assert prunable(Shared()) == ["one.weight", "two.weight"]


def test_layers_of_one_input_are_one_group() -> None:
    batch = (torch.arange(7)[None], torch.arange(7)[None])
    weights: dict[str, Tensor] = dict(Shared().named_parameters())
    names = {name: weights[name] for name in ("one.weight", "two.weight")}
    assert layer_inputs._groups(Shared(), names, batch, CLASSIFY) == ([list(names)], [])


def test_endless_data_restart_and_can_start_at_any_batch() -> None:
    stream = endless([1, 2, 3], start=7)
    assert [next(stream) for _ in range(5)] == [2, 3, 1, 2, 3]


def test_the_mode_of_each_module_is_restored() -> None:
    net, _ = trained_net()
    net[0].eval()
    other, _ = trained_net()
    with evaluating(net, other):
        assert not any(module.training for module in (*net.modules(), *other.modules()))
    assert not net[0].training
    assert net[2].training
    assert other.training


def test_invalid_arguments_are_refused() -> None:
    net, batches = trained_net()
    conv = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten())
    images = [(torch.randn(4, 2, 3, 3), torch.zeros(4, dtype=torch.long))]
    for made in (
        lambda: statistics(net, []),
        lambda: statistics(net, batches, tensors=["nothing"]),
        lambda: statistics(net, batches, tensors=["0.bias"]),
        lambda: statistics(nn.LayerNorm(WIDTH), batches),
        lambda: prune_layerwise(net, batches, 0.5, "obs"),
        lambda: scores.wanda(conv, statistics(conv, images)),
        lambda: prune_layerwise(conv, images, 0.5, "wanda"),
        lambda: next(endless([])),
        lambda: statistics(net, batches, batches=0),
        lambda: statistics(net, batches, tensors=[]),
        lambda: statistics(net, batches, tensors="0.weight"),
        lambda: prune_layerwise(net, batches, 1.5, "wanda"),
        lambda: prune_layerwise(net, batches, -0.5, "sparsegpt"),
        lambda: prune_layerwise(net, batches, 0.5, "wanda", batches=0),
        lambda: sparsegpt(torch.ones(2, 2), torch.eye(2), -0.5),
        lambda: scores.rows_mask(torch.ones(2, 4), 1.5),
    ):
        with pytest.raises(OptionError):
            made()
