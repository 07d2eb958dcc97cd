"""Learned importances: sparsities are met, important weights are found, an interrupted run resumes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfpformat.errors import LossError, MismatchError, OptionError, SfpWarning
from sfpformat.pruning import scores
from sfpformat.pruning.calibration import statistics
from sfpformat.pruning.descent import rate_at
from sfpformat.pruning.features import CLAMP, FEATURES, features, standardised
from sfpformat.pruning.gates import GATES, Moment, make_gate
from sfpformat.pruning.learning import bytes_per_weight, learn_importance
from sfpformat.pruning.learning_settings import METHODS, Learned, Settings
from sfpformat.pruning.network import ImportanceNetwork
from sfpformat.pruning.pipeline import prune
from sfpformat.pruning.task import Task, chosen_weights
from sfpformat.pruning.thresholds import Sparsity
from sfpformat.pruning.tuning import Tuning, fine_tune

from ..support.pruning_nets import CLASSES, WIDTH, loss_of, trained_net

WEIGHTS = Settings(steps=60, method="weights")


def pruned_loss(importances: dict[str, torch.Tensor], sparsity: float, scope: str = "model") -> float:
    net, batches = trained_net()
    prune(net, importances, Sparsity(sparsity), scope=scope)
    return loss_of(net, batches)


@pytest.mark.parametrize("gate", GATES)
def test_learning_has_less_loss_than_its_starting_scores(gate: str) -> None:
    net, batches = trained_net()
    learned = learn_importance(net, batches, 0.8, settings=Settings(steps=120, method="weights", gate=gate))
    fisher = scores.fisher(net, statistics(net, batches))
    assert pruned_loss(learned.importances, 0.8) < 0.7 * pruned_loss(fisher, 0.8)
    assert pruned_loss(learned.importances, 0.8) < pruned_loss(scores.magnitude(net), 0.8, "tensor")


@pytest.mark.parametrize("method", METHODS)
def test_learning_does_not_change_the_model(method: str) -> None:
    net, batches = trained_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gradients = {name: torch.full_like(value, 7.0) for name, value in net.named_parameters()}
    for name, parameter in net.named_parameters():
        parameter.grad = gradients[name].clone()
    learn_importance(net, batches, 0.5, settings=Settings(steps=3, method=method))
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradients[name])


def test_initial_importances_have_the_order_of_fisher_scores() -> None:
    net, batches = trained_net()
    found = statistics(net, batches)
    network = ImportanceNetwork(chosen_weights(net, None), found)
    fisher = torch.cat([score.flatten() for score in scores.fisher(net, found).values()])
    order = fisher.argsort()
    ordered = network.scores().detach()[order]
    assert (ordered.diff() >= -1e-6).all()


@pytest.mark.parametrize("method", METHODS)
def test_importances_of_kept_weights_are_above_ln_2(method: str) -> None:
    net, batches = trained_net()
    learned = learn_importance(net, batches, 0.7, settings=replace(WEIGHTS, method=method))
    flat = torch.cat([importance.flatten() for importance in learned.importances.values()])
    assert (flat > math.log(2)).sum() == len(flat) - int(0.7 * len(flat) + 0.5)
    assert (flat >= 0).all()


def test_without_logits_the_importance_is_a_function_of_the_features() -> None:
    net, batches = trained_net()
    learned = learn_importance(net, batches, 0.6, settings=Settings(steps=40, logits=False))
    again = learn_importance(
        net, batches, 0.6, settings=Settings(steps=1, logits=False, network_rate=0.0), mlp=learned.mlp
    )
    for name, importance in learned.importances.items():
        torch.testing.assert_close(importance, again.importances[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_importances_for_a_range_are_good_at_every_sparsity_in_it(method: str) -> None:
    net, batches = trained_net()
    settings = Settings(steps=120, method=method)
    learned = learn_importance(net, batches, (0.5, 0.85), settings=settings)
    fisher = scores.fisher(net, statistics(net, batches))
    for sparsity in (0.5, 0.7, 0.85):
        assert pruned_loss(learned.importances, sparsity) < pruned_loss(fisher, sparsity)


@pytest.mark.parametrize("sparsity", [0.7, 0.8, 0.9])
def test_joint_learning_has_less_loss_than_tuning_after_fisher(sparsity: float) -> None:
    net, batches = trained_net()
    together = Settings(steps=100, weight_rate=1e-2, objective="loss")
    learned = learn_importance(net, batches, sparsity, settings=together)
    net.load_state_dict(learned.weights, strict=False)
    prune(net, learned.importances, Sparsity(sparsity))
    tuned, _ = trained_net()
    masks = prune(tuned, scores.fisher(tuned, statistics(tuned, batches)), Sparsity(sparsity))
    fine_tune(tuned, masks, batches, tuning=Tuning(100, 1e-2, objective="loss"))
    assert loss_of(net, batches) < 0.9 * loss_of(tuned, batches)


def test_frozen_weights_are_not_returned() -> None:
    net, batches = trained_net()
    assert not learn_importance(net, batches, 0.5, settings=Settings(steps=1)).weights


@pytest.mark.parametrize(
    "settings",
    [
        Settings(steps=14, method="weights"),
        Settings(steps=14, gate="sigmoid", logits=False),
        Settings(steps=14, gate="hard-concrete", weight_rate=1e-3),
        Settings(steps=14, method="levels", network_every=4),
        Settings(steps=14, method="levels", network_rate=1e-2, network_every=4),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, settings: Settings) -> None:
    net, batches = trained_net()

    def run(path: Path | None, stop: int | None) -> Learned:
        def progress(step: int, loss: float) -> None:
            if step == stop:
                raise KeyboardInterrupt

        return learn_importance(
            net, batches, (0.4, 0.8), settings=settings, checkpoint=path, every=3, progress=progress
        )

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        run(path, 11)
    resumed, whole = run(path, None), run(None, None)
    assert resumed.history == whole.history
    assert resumed.choice == whole.choice
    for name, importance in whole.importances.items():
        assert torch.equal(resumed.importances[name], importance)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_another_job_is_refused(tmp_path: Path, method: str) -> None:
    net, batches = trained_net()
    path = tmp_path / "checkpoint.pt"
    settings = Settings(steps=2, method=method)
    learn_importance(net, batches, 0.5, settings=settings, checkpoint=path)
    with pytest.raises(MismatchError, match="of a run with another sparsity; remove it"):
        learn_importance(net, batches, 0.6, settings=settings, checkpoint=path)
    with pytest.raises(MismatchError, match=r"with other settings \(seed\); remove it"):
        learn_importance(net, batches, 0.5, settings=replace(settings, seed=1), checkpoint=path)


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_another_model_or_of_other_data_is_refused(tmp_path: Path, method: str) -> None:
    net, batches = trained_net()
    settings = Settings(steps=2, method=method)
    other = copy.deepcopy(net)
    with torch.no_grad():
        next(other.parameters()).view(-1)[-1].add_(1)
    last = [*batches[:-1], batches[0]]
    swapped = [batches[1], batches[0], *batches[2:]]
    longer = [*batches, batches[0]]
    found = statistics(net, batches)

    def attempt(model: nn.Module, data: Any, file: Path, **more: Any) -> Any:
        if file.stem == "statistics":
            return statistics(model, data, batches=len(batches), checkpoint=file, **more)
        words = {"settings": settings, "found": found, "checkpoint": file, **more}
        return learn_importance(model, data, 0.5, **words)

    for file in (tmp_path / "learned.pt", tmp_path / "statistics.pt"):
        steps: list[int] = []
        attempt(net, batches, file, resumed=steps.append)
        before = file.read_bytes()
        with pytest.raises(MismatchError, match="with another model; remove it"):
            attempt(other, batches, file)
        for data in (last, swapped, longer):
            with pytest.raises(MismatchError, match="with other data"):
                attempt(net, data, file)
        with pytest.raises(MismatchError, match="another model and other data"):
            attempt(other, swapped, file)
        assert file.read_bytes() == before
        assert steps == []
        attempt(net, batches, file, resumed=steps.append)
        attempt(net, Loader(batches), file, resumed=steps.append)  # the same batches in another container
        assert steps == [2 if file.stem == "learned" else len(batches)] * 2
    with pytest.raises(MismatchError, match="with other data"):
        attempt(net, iter(swapped), tmp_path / "statistics.pt")
    attempt(net, iter(batches), tmp_path / "statistics.pt")


class Loader:
    """Batches of unknown number."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def test_a_checkpoint_of_other_held_out_batches_is_refused(tmp_path: Path) -> None:
    net, batches = trained_net()
    start = scores.magnitude(net)

    def attempt(held_out: list[Any]) -> None:
        learn_importance(
            net,
            batches,
            0.5,
            settings=Settings(steps=1),
            start=start,
            held_out=held_out,
            checkpoint=tmp_path / "state.pt",
        )

    attempt(batches[:1])
    with pytest.raises(MismatchError, match="with other held-out data; remove it"):
        attempt(batches[1:2])


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_without_checksums_warns_and_resumes(tmp_path: Path, method: str) -> None:
    net, batches = trained_net()
    path, settings = tmp_path / "state.pt", Settings(steps=2, method=method)
    learn_importance(net, batches, 0.5, settings=settings, checkpoint=path)
    state = torch.load(path)
    del state["identity"]
    torch.save(state, path)
    with pytest.warns(SfpWarning, match="an earlier version, and does not identify its model and its data"):
        learn_importance(net, batches, 0.5, settings=settings, checkpoint=path)


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, method: str) -> None:
    net, batches = trained_net()

    def unused(*words: Any) -> None:
        raise AssertionError

    task = Task(run=unused)  # type: ignore[arg-type]  # never called
    for path, told in ((tmp_path / "no" / "state.pt", "there is no folder"), (tmp_path, "is a folder")):
        with pytest.raises(OptionError, match=told):
            learn_importance(
                net, batches, 0.5, task=task, settings=Settings(steps=2, method=method), checkpoint=path
            )
        with pytest.raises(OptionError, match=told):
            statistics(net, batches, task=task, checkpoint=path)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_without_elements_gets_an_importance_without_elements(method: str) -> None:
    class Half(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            out: Tensor = self[0](input) + self[1](input).sum()
            return out

    _, batches = trained_net()
    net = Half(nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, 0))
    learned = learn_importance(net, batches, 0.5, settings=Settings(steps=2, method=method))
    assert {name: list(x.shape) for name, x in learned.importances.items()} == {
        "0.weight": [CLASSES, WIDTH],
        "1.weight": [0, WIDTH],
    }
    masks = prune(net, learned.importances, Sparsity(0.5))
    assert masks["0.weight"].float().mean() == 0.5


@pytest.mark.parametrize("cut", [0, 5, 100, -100, None])
@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, cut: int | None, method: str) -> None:
    net, batches = trained_net()
    path = tmp_path / "checkpoint.pt"
    settings = Settings(steps=2, method=method)
    found = statistics(net, batches)
    if cut is None:
        torch.save([1], path)
    else:
        learn_importance(net, batches, 0.5, settings=settings, found=found, checkpoint=path)
        path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(MismatchError, match="remove it"):
        learn_importance(net, batches, 0.5, settings=settings, found=found, checkpoint=path)
    with pytest.raises(MismatchError, match="remove it"):
        statistics(net, batches, checkpoint=path)


@pytest.mark.parametrize("gate", GATES)
def test_a_nan_loss_stops_learning_and_keeps_the_checkpoint(tmp_path: Path, gate: str) -> None:
    net, batches = trained_net()
    found = statistics(net, batches)
    path = tmp_path / "checkpoint.pt"
    settings = Settings(steps=20, method="weights", gate=gate)
    x, labels = batches[5]
    broken = [*batches[:5], (torch.full_like(x, torch.nan), labels), *batches[6:]]

    class Damaged(Loader):
        """Batches of which one is damaged after the first iteration, which identifies the data."""

        def __iter__(self) -> Iterator[Any]:
            now, self._batches = self._batches, broken
            return iter(now)

    with pytest.raises(LossError, match="the loss is nan at step 6"):
        learn_importance(net, Damaged(batches), 0.5, found=found, settings=settings, checkpoint=path, every=5)
    whole = learn_importance(net, batches, 0.5, found=found, settings=settings)
    resumed = learn_importance(net, batches, 0.5, found=found, settings=settings, checkpoint=path)
    assert resumed.history == whole.history
    with pytest.raises(LossError, match="batch 6 of the calibration data"):
        statistics(net, broken)


def test_a_nan_loss_stops_tuning_and_restores_the_model() -> None:
    net, batches = trained_net()
    masks = prune(net, scores.magnitude(net), Sparsity(0.5))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    broken = [batches[0], (torch.full_like(batches[0][0], torch.inf), batches[0][1])]
    with pytest.raises(LossError, match="at step 2"):
        fine_tune(net, masks, broken, tuning=Tuning(4, objective="loss"))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_model_with_unsupported_outputs_is_refused() -> None:
    class Pair(nn.Linear):
        def forward(self, input: torch.Tensor) -> Any:
            return (super().forward(input),)

    with pytest.raises(OptionError, match="returns a tuple"):
        learn_importance(Pair(12, 5), trained_net()[1], 0.5)


def test_any_module_and_data_loader_are_accepted() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.head = nn.Linear(4 * 36, 3)

        def forward(self, *, images: torch.Tensor) -> torch.Tensor:
            hidden = torch.relu(self.norm(self.conv(images)))
            result: torch.Tensor = self.head(hidden.flatten(1))
            return result

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 1, 6, 6, generator=generator)
    rows: Any = [{"images": image, "labels": torch.tensor(i % 3)} for i, image in enumerate(images)]
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(rows, batch_size=8)
    model = Classifier()
    mean = model.norm.running_mean
    assert mean is not None
    before = mean.clone()
    learned = learn_importance(model, loader, 0.5, settings=Settings(steps=4))
    assert {name: value.shape for name, value in learned.importances.items()} == {
        "conv.weight": (4, 1, 3, 3),
        "head.weight": (3, 144),
    }
    assert torch.equal(mean, before)


def test_any_object_with_a_loss_is_accepted_as_task() -> None:
    net, batches = trained_net()
    calls = []

    def loss(outputs: torch.Tensor, batch: object) -> torch.Tensor:
        calls.append(batch)
        return outputs.square().mean()

    task = Task(run=lambda model, batch: model(batch), loss=loss)
    settings = Settings(steps=2, method="weights", objective="loss")
    learn_importance(net, [x for x, _ in batches], 0.5, task=task, settings=settings)
    assert len(calls) == 8 + 2  # statistics go through the data once


@pytest.mark.parametrize("gate", GATES)
def test_gates_start_near_their_budget_and_are_between_0_and_1(gate: str) -> None:
    scores_now = torch.randn(5000, requires_grad=True)
    gates, penalty = make_gate(gate, 0.5)(scores_now, Moment(0.6, 0.0))
    assert (gates >= 0).all()
    assert (gates <= 1).all()
    if gate == "topk":
        assert (gates > 0.5).sum() == 2000
    assert (gates > 1e-6).float().mean() > 0.39
    (gradient,) = torch.autograd.grad(gates.sum() + penalty, scores_now)
    assert (gradient != 0).any()


def test_a_penalty_closes_gates_that_no_loss_keeps_open() -> None:
    for gate in ("sigmoid", "hard-concrete"):
        found = torch.randn(2000, generator=torch.Generator().manual_seed(0)).requires_grad_()
        optimiser, close = torch.optim.Adam([found], 0.05), make_gate(gate, 0.5)
        for step in range(200):
            gates, penalty = close(found, Moment(0.3 + 0.5 * min(1, step / 100), step / 200))
            found.grad = torch.autograd.grad(penalty, found)[0]
            optimiser.step()
        assert float((gates > 0.01).float().mean()) == pytest.approx(0.2, abs=0.06)


def test_features_are_standardised_and_clamped() -> None:
    net, batches = trained_net()
    weights = chosen_weights(net, None)
    found = features(weights, statistics(net, batches))
    assert found.shape == (sum(weight.numel() for weight in weights.values()), len(FEATURES))
    assert found.abs().max() <= CLAMP
    assert torch.isfinite(found).all()
    assert (found.float().std(0) > 0.4).all()
    assert (standardised(torch.full((9,), 3.3)) == 0).all()


def test_the_memory_estimate_grows_with_the_learned_weights() -> None:
    weights, alone = Settings(method="weights"), Settings(logits=False)
    assert bytes_per_weight(alone) < bytes_per_weight(weights) < 120
    assert bytes_per_weight(weights) < bytes_per_weight(Settings(weight_rate=1e-3))
    assert bytes_per_weight(Settings(method="levels", logits=False)) < bytes_per_weight() < 30


def test_learning_rates_warm_up_and_decay_to_their_final_value() -> None:
    rates = [rate_at(2.0, step, 400, warmup=20, final=0.1) for step in range(401)]
    assert rates[0] == pytest.approx(2.0 / 20)
    assert all(before < after for before, after in pairwise(rates[:20]))
    assert all(before > after for before, after in pairwise(rates[19:]))
    assert rates[200] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[400] == pytest.approx(0.2)


def test_invalid_settings_are_refused() -> None:
    net, batches = trained_net()
    for made in (
        lambda: Settings(gate="noisy"),
        lambda: Settings(objective="accuracy"),
        lambda: Settings(steps=0),
        lambda: Settings(start=1.0),
        lambda: make_gate("topk", 0.0),
        lambda: learn_importance(net, batches, 1.0),
        lambda: learn_importance(net, batches, (0.8, 0.5)),
        lambda: learn_importance(net, [], 0.5),
    ):
        with pytest.raises(OptionError):
            made()


def test_arguments_of_other_types_are_refused() -> None:
    wrong: Any
    for wrong in ("0.5", (0.1,), True, None):
        with pytest.raises(OptionError, match="sparsity is"):
            learn_importance(nn.Linear(4, 4), [], wrong)
    wrong = {"steps": 2}
    with pytest.raises(OptionError, match="settings is a dict, must be Settings"):
        learn_importance(nn.Linear(4, 4), [], 0.5, settings=wrong)
