"""Initial importances for learning: importances that can be compared, and the selection of the best ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfpformat.errors import LossError, MismatchError, OptionError
from sfpformat.pruning import (
    Pattern,
    Settings,
    Sparsity,
    Task,
    best_start,
    comparable,
    fisher,
    learn_importance,
    magnitude,
    prune,
    statistics,
    wanda,
)
from sfpformat.pruning.scores import rows_mask
from sfpformat.pruning.texts import ENCODER

from ..support.pruning_nets import trained_net

FAST = Settings(steps=4)


class Turned(nn.Module):
    """A layer that stores [inputs, outputs], as transformers' ``Conv1D`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = pytest.importorskip("transformers").pytorch_utils.Conv1D(6, 20)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_one_threshold_on_comparable_importances_prunes_each_row_alike(share: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 5))
    scores = {name: importance * 1000.0 ** int(name[0]) for name, importance in magnitude(net).items()}
    found = comparable(net, scores, share)
    for name, importance in found.items():
        assert torch.equal(importance > 1, rows_mask(scores[name], share)) or share in (0.0, 1.0)
        assert importance.shape == scores[name].shape
        assert bool(importance.isfinite().all())


def test_a_lower_strength_keeps_a_part_of_the_differences_between_rows() -> None:
    torch.manual_seed(0)
    net = nn.Linear(100, 20)
    with torch.no_grad():
        net.weight.mul_(torch.linspace(0.5, 2, 20)[:, None])
    spreads = []
    for strength in (0.0, 0.25, 0.5, 1.0):
        found = comparable(net, magnitude(net), 0.5, strength=strength)["weight"]
        kept = found > found.median()
        spreads.append(float(kept.double().mean(1).std()))
        if not strength:
            assert torch.equal(found, net.weight.detach().abs())
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < 0.01 < spreads[-2] < spreads[0] / 1.5


def test_rows_are_the_inputs_of_one_output_in_every_layout() -> None:
    torch.manual_seed(0)
    net = Turned()
    kept = comparable(net, magnitude(net, ["inner.weight"]), 0.5)["inner.weight"] > 1
    assert kept.sum(0).tolist() == [10] * 6


def test_thresholds_of_tensors_prune_each_tensor_alike_and_zeros_first() -> None:
    net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    first, second = net.get_parameter("0.weight"), net.get_parameter("1.weight")
    with torch.no_grad():
        first[:8] = 0  # more zeros than are pruned
        second.copy_(torch.arange(1.0, 101).view(10, 10))
    found = comparable(net, magnitude(net), 0.5, "tensor")
    assert (found["0.weight"] > 0).sum() == 20
    assert (found["1.weight"] > 1).sum() == 50
    with torch.no_grad():
        first.zero_()
    assert not comparable(net, magnitude(net), 0.5)["0.weight"].any()


def test_the_start_with_the_lowest_held_out_loss_is_selected() -> None:
    net, batches = trained_net()
    net.eval()
    found = statistics(net, batches)
    start = best_start(net, found, batches[:2], 0.7)
    assert set(start.losses) == {"wanda", "magnitude", "fisher"} | {
        f"fisher by row {strength}" for strength in ("0.25", "0.5", "1")
    }
    assert start.losses[start.name] == min(start.losses.values())
    by_name = {
        "fisher": fisher(net, found),
        "wanda": comparable(net, wanda(net, found), 0.7),
        "magnitude": comparable(net, magnitude(net), 0.7, "tensor"),
    }
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for name, importances in by_name.items():
        dense = [net(x).log_softmax(-1).detach() for x, _ in batches[:2]]
        prune(net, importances, Sparsity(0.7))
        pruned = [net(x).log_softmax(-1).detach() for x, _ in batches[:2]]
        losses = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(dense, pruned, strict=True)]
        net.load_state_dict(state)
        assert start.losses[name] == pytest.approx(sum(losses) / 2, rel=0.1)
    torch.testing.assert_close(start.importances, by_name.get(start.name, start.importances))


def test_layers_without_statistics_of_inputs_are_started_by_magnitude() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(32, 3))
    batches = [(torch.randn(4, 2, 8), torch.randint(3, (4,))) for _ in range(4)]
    found = statistics(net, batches)
    assert found["0.weight"].inputs is None or found["2.weight"].inputs is not None
    start = best_start(net, found, batches, 0.5)
    assert set(start.importances) == set(found)


def test_learning_without_a_start_is_never_worse_than_any_candidate() -> None:
    net, batches = trained_net()
    learned = learn_importance(net, batches, 0.7, settings=FAST)
    assert learned.choice is not None
    assert learned.start in learned.start_losses
    assert learned.choice.start[0] == pytest.approx(min(learned.start_losses.values()), rel=1e-5)
    assert learned.choice.chosen[0] <= min(learned.start_losses.values()) * (1 + 1e-5)
    given = learn_importance(net, batches, 0.7, settings=FAST, start=fisher(net, statistics(net, batches)))
    assert (given.start, given.start_losses) == ("given", {})


def test_a_pattern_starts_from_the_tensors_that_it_fits() -> None:
    net, batches = trained_net()
    found = statistics(net, batches)
    start = best_start(net, found, batches[:2], Pattern(2, 4))
    assert set(start.importances) == {name for name in found if net.get_parameter(name).shape[1] % 4 == 0}


def test_a_resumed_run_keeps_the_start_of_the_first_part(tmp_path: Path) -> None:
    net, batches = trained_net()
    state = tmp_path / "state.pt"

    class Stop(Exception):
        pass

    def stop(step: int, loss: float) -> None:
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        learn_importance(net, batches, 0.7, settings=FAST, checkpoint=state, every=1, progress=stop)
    whole = learn_importance(net, batches, 0.7, settings=FAST)
    resumed = learn_importance(net, batches, 0.7, settings=FAST, checkpoint=state)
    assert (resumed.start, resumed.start_losses) == (whole.start, {})
    for name, importance in whole.importances.items():
        assert torch.equal(resumed.importances[name], importance)
    start = fisher(net, statistics(net, batches))
    with pytest.raises(MismatchError, match="other initial importances"):
        learn_importance(net, batches, 0.7, settings=FAST, checkpoint=state, start=start)


def test_a_candidate_without_a_finite_loss_is_not_selected() -> None:
    net, batches = trained_net()
    found = statistics(net, batches)
    seen = 0

    def distance(outputs: Tensor, dense: Tensor, batch: Any) -> Tensor:
        nonlocal seen
        seen += 1
        return torch.tensor(math.nan if seen == 1 else 1.0)

    start = best_start(net, found, batches[:1], 0.5, task=Task(distance=distance))
    assert start.name == "fisher by row 0.25"
    with pytest.raises(LossError, match="not finite for any"):
        best_start(net, found, batches[:1], 0.5, task=Task(distance=lambda *_: torch.tensor(math.nan)))


def test_invalid_arguments_are_refused() -> None:
    net, batches = trained_net()
    found = statistics(net, batches)
    for words, run in [
        ("held_out contains no", lambda: best_start(net, found, [], 0.5)),
        ("objective", lambda: best_start(net, found, batches, 0.5, objective="mean")),
        ("strength is 2", lambda: comparable(net, magnitude(net), 0.5, "row", 2)),
        ("scope is 'column'", lambda: comparable(net, magnitude(net), 0.5, "column")),
        ("sparsity is 1.5", lambda: comparable(net, magnitude(net), 1.5)),
        (
            "must return a tensor of one number",
            lambda: best_start(
                net, found, batches[:1], 0.5, task=Task(distance=lambda outputs, dense, batch: outputs)
            ),
        ),
    ]:
        with pytest.raises(OptionError, match=words):
            run()


def test_the_distance_of_an_encoder_is_zero_only_for_equal_states_and_ignores_padding() -> None:
    torch.manual_seed(0)
    states = torch.randn(3, 5, 8)
    batch = {"input_ids": torch.ones(3, 5, dtype=torch.long), "attention_mask": torch.ones(3, 5)}
    batch["attention_mask"][1, 3:] = 0
    assert ENCODER.distance is not None
    assert float(ENCODER.distance(states, states, batch)) == pytest.approx(0, abs=1e-6)
    other = states.clone()
    other[1, 3:] += 1
    assert float(ENCODER.distance(other, states, batch)) == pytest.approx(0, abs=1e-6)
    other[1, 2, 0] += 1
    assert float(ENCODER.distance(other, states, batch)) > 1e-4


def test_squared_gradients_of_the_loss_of_an_encoder_estimate_those_of_the_squared_error() -> None:
    torch.manual_seed(0)
    assert ENCODER.loss is not None
    weight = torch.randn(4, 8)
    states = torch.randn(2, 3, 4) @ weight
    size = states.norm(dim=-1, keepdim=True)
    found = torch.zeros(2, 3, 8)
    for number in range(600):
        leaf = states.clone().requires_grad_()
        batch = {"input_ids": torch.tensor([number]), "attention_mask": torch.ones(2, 3)}
        (gradient,) = torch.autograd.grad(ENCODER.loss(leaf, batch), leaf)
        found += gradient.square() / 600
    torch.testing.assert_close(found, (1 / size.square() / 6).expand(2, 3, 8), rtol=0.35, atol=0)
