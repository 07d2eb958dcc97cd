"""Learns importances through a model with frozen weights, or together with the weights.

There are two methods. ``levels`` (`hierarchy`) learns logits of layers, rows, columns and single weights. The
step size of each level depends on the share of signal in its gradients, and held-out batches decide how much
of each level is kept. ``weights`` is in this module: a shared network, and a logit for each weight.

Theory of operation of ``weights``: each step takes a batch, maps the scores of all weights to gates, and runs
the model with every weight times its gate. The loss is the divergence from the dense model's outputs (or the
task's loss) plus the gate's penalty. Gradients reach the scores through the gates. The sparsity rises from
the schedule's start to the target along a cubic, then stays constant. With a range, each step draws its
target from the range, so that one importance serves every sparsity in it.

The MLP changes slowly and costs as much as the model itself, so it takes a step only every
`Settings.network_every` steps, from the accumulated gradient. If weights train too, logits have a lower rate,
so that the mask does not change faster than the survivors can adapt.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OptionError
from ..names import listed, require_known
from ..torch.ties import TiedNames
from . import checkpoints
from .calibration import Statistics, statistics
from .descent import adam, set_rates, sparsity_at
from .features import FEATURES
from .gates import GATES, Gate, Moment, make_gate, threshold_of
from .hierarchy import Learner, Plan, Rates
from .holdout import Choice
from .network import ImportanceNetwork
from .scores import fisher
from .task import (
    CLASSIFY,
    Data,
    Progress,
    Task,
    chosen_weights,
    cost,
    endless,
    evaluating,
    finite,
    require_objective,
    with_weights,
)

METHODS = ("levels", "weights")


T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """Settings of `learn_importance`.

    Attributes:
        steps: number of optimiser steps, one batch each.
        method: ``levels`` or ``weights``. None takes ``levels``, or ``weights`` if a setting needs it: a gate
            other than ``topk``, no logits, or a ``weight_rate``.
        minutes: time limit, after which learning ends early; None sets no limit. Only for ``levels``.
        gate: ``topk``, ``sigmoid`` or ``hard-concrete``.
        objective: ``divergence`` from the dense model's outputs, or the task's ``loss``.
        logits: whether each weight has its own logit.
        logit_rate: peak rate of these logits, in standard deviations of the scores a step. None is 0.05, or
            0.01 if weights train too.
        shared_rate: peak rate of the logits of layers, rows and columns. Only for ``levels``.
        network_rate: peak rate of the shared network. None is 1e-3; with ``levels`` it means no network.
        weight_rate: peak rate of the weights; 0 freezes them.
        temperature: temperature of the gate.
        start: sparsity of the first step.
        ramp: share of the steps after which the target sparsity is reached.
        network_every: number of steps between steps of the network. None is 4, or 10 with ``levels``.
        held_out: maximum number of held-out batches that select the result. Only for ``levels``.
        seed: seed of the network's initialisation and of the sparsities drawn from a range.
    """

    steps: int = 200
    method: str | None = None
    minutes: float | None = None
    gate: str = "topk"
    objective: str = "divergence"
    logits: bool = True
    logit_rate: float | None = None
    shared_rate: float = 0.02
    network_rate: float | None = None
    weight_rate: float = 0.0
    temperature: float = 0.5
    start: float = 0.3
    ramp: float = 0.6
    network_every: int | None = None
    held_out: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise OptionError(f"gate is {self.gate!r}, must be one of {', '.join(GATES)}")
        require_objective(self.objective)
        if self.method not in (None, *METHODS):
            raise OptionError(f"method is {self.method!r}, must be {' or '.join(METHODS)}")
        if self.steps < 1 or (self.network_every is not None and self.network_every < 1):
            raise OptionError("steps and network_every must be at least 1")
        if not (0 <= self.start < 1 and 0 <= self.ramp <= 1):
            raise OptionError("start and ramp must be shares")
        if self.method == "levels" and self._needs_weights():
            raise OptionError(
                "levels have the gate topk and frozen weights; without logits they need a shared_rate "
                "or a network_rate"
            )
        if self.chosen_method == "weights" and self.minutes is not None:
            raise OptionError("minutes is of the method levels")

    def _needs_weights(self) -> bool:
        return self.gate != "topk" or self.weight_rate > 0

    @property
    def chosen_method(self) -> str:
        """The method that is used: ``levels`` or ``weights``."""
        if self.method is not None:
            return self.method
        return "weights" if self._needs_weights() or not self.logits else "levels"

    def plan(self) -> Plan:
        """Returns the settings of the method ``levels``."""
        own = _LOGIT_RATE if self.logit_rate is None else self.logit_rate
        return Plan(
            steps=self.steps,
            minutes=self.minutes,
            objective=self.objective,
            rates=Rates(self.network_rate or 0.0, self.shared_rate, own if self.logits else 0.0),
            temperature=self.temperature,
            start=self.start,
            ramp=self.ramp,
            network_every=self.network_every or 10,
            held_out=self.held_out,
            seed=self.seed,
        )


_NETWORK_RATE, _NETWORK_EVERY = 1e-3, 4  # defaults of the method `weights`
_EPSILON = 1e-12  # of Adam: gradients of single weights are tiny; the usual 1e-8 would dominate them
_LOGIT_RATE = 0.05
_LOGIT_RATE_TOGETHER = 0.01


@dataclass(frozen=True)
class Learned:
    """The result of `learn_importance`.

    Attributes:
        importances: by name, float32, not negative: softplus(score − threshold), with the threshold at the
            target sparsity (for a range, at its middle). Survivors at that sparsity are above ln 2.
        weights: trained weights by name; empty if weights were frozen.
        history: the loss of each step, in nats, including the penalty.
        mlp: the state of the shared network, for use with another model; empty if there was none.
        choice: the factor on each level, and the held-out losses before and after; None with the method
            ``weights``.
    """

    importances: dict[str, Tensor]
    weights: dict[str, Tensor]
    history: list[float]
    mlp: dict[str, Tensor]
    choice: Choice | None = None


Sparsities = float | tuple[float, float]


def bytes_per_weight(settings: Settings = Settings()) -> int:
    """Returns the memory a weight in bytes, in addition to the model and its activations."""
    if settings.chosen_method == "levels":
        plan = settings.plan()
        held = 4 + (2 if plan.rates.network else 0)  # start; network's output
        # While learning, a logit and two moments; at the end, a logit and the importances.
        return held + (4 * 3 if plan.rates.own else 4)
    features = 2 * len(FEATURES)
    scores = 4 * (2 + 2)  # start, base and its gradient; the scores
    logits = 4 * 4 if settings.logits else 0  # value, gradient, two moments
    gates = 4 * 4  # threshold's copy, soft, hard, sum
    gated = 4 * 2  # the weight times its gate, and the gradient
    statistics = 4 * 2
    trained = 4 * 4 if settings.weight_rate else 0
    return features + scores + logits + gates + gated + statistics + trained


def learn_importance(
    model: nn.Module,
    data: Data,
    sparsity: Sparsities,
    *,
    task: Task = CLASSIFY,
    settings: Settings = Settings(),
    tensors: Sequence[str] | None = None,
    found: Mapping[str, Statistics] | None = None,
    start: Mapping[str, Tensor] | None = None,
    held_out: Data | None = None,
    mlp: Mapping[str, Tensor] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 50,
    progress: Progress = lambda step, loss: None,
) -> Learned:
    """Learns an importance for each weight. The model is unchanged.

    Args:
        model: any module; run in evaluation mode.
        data: batches, repeated as often as needed.
        sparsity: the target sparsity over all tensors together, or a range (least, greatest) for which the
            importance should be valid.
        task: runs the model and computes the loss.
        settings: settings of learning.
        tensors: names of parameters; None takes `layers.prunable`.
        found: calibration statistics of these tensors; None computes them from ``data``.
        start: initial importances of these tensors, not negative and comparable over all tensors. None takes
            Fisher importances from ``found``. Only for the method ``levels``.
        held_out: batches that select the result and are not in ``data``. None holds out every eighth of the
            first batches of ``data``; a loader that shuffles then mixes them with the others. Only for the
            method ``levels``.
        mlp: initial state of the shared network, from another model's `Learned` by the same method.
        checkpoint: a file that is written atomically every ``every`` steps and after the last. If it exists,
            learning resumes from it, and batches that were already used are skipped.
        every: number of steps between checkpoints.
        progress: called after each step with its number and its loss.

    Memory: `bytes_per_weight`, in addition to a training step of the model without an optimiser.

    Raises:
        OptionError: settings or names are invalid, or there are no data.
        MismatchError: the checkpoint is damaged, or of other settings, tensors or sparsities.
        LossError: a loss is not finite; the last checkpoint stays valid.
    """
    low, high = sparsity if isinstance(sparsity, tuple) else (sparsity, sparsity)
    if not 0 <= low <= high < 1:
        raise OptionError(f"sparsity is {sparsity}, must be a share under 1, or two that ascend")
    path = None if checkpoint is None else Path(checkpoint)
    if settings.chosen_method == "levels":
        return _learn_levels(
            model,
            data,
            (low, high),
            task,
            settings,
            tensors,
            found,
            start,
            held_out,
            mlp,
            path,
            every,
            progress,
        )
    if start is not None or held_out is not None:
        raise OptionError("start and held_out are of the method levels")
    weights = chosen_weights(model, tensors)
    if found is None:
        found = statistics(model, data, task=task, tensors=list(weights))
    found = _of_weights(model, found, weights, "found")
    learner = _Learner(model, weights, found, task, settings, (low, high))
    if mlp is not None:
        learner.network.mlp.load_state_dict(dict(mlp))
        learner.network.refresh()
    if path is not None and path.exists():
        learner.load(path)
    batches = endless(data, learner.step)
    with evaluating(model):
        while learner.step < settings.steps:
            progress(learner.step + 1, learner.learn(next(batches)))
            if path is not None and (learner.step % every == 0 or learner.step == settings.steps):
                learner.save(path)
    return learner.learned()


def _learn_levels(
    model: nn.Module,
    data: Data,
    sparsities: tuple[float, float],
    task: Task,
    settings: Settings,
    tensors: Sequence[str] | None,
    found: Mapping[str, Statistics] | None,
    start: Mapping[str, Tensor] | None,
    held_out: Data | None,
    mlp: Mapping[str, Tensor] | None,
    path: Path | None,
    every: int,
    progress: Progress,
) -> Learned:
    names = list(chosen_weights(model, tensors))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = {name: parameters[name] for name in names}
    if start is None:
        if found is None:
            found = statistics(model, data, task=task, tensors=names)
        start = fisher(model, _of_weights(model, found, weights, "found"))
        found = None  # releases its memory
    learner = Learner(model, weights, _required(model, start, weights), task, settings.plan(), sparsities)
    start = None
    network = learner.levels.network
    if mlp is not None:
        if network is None:
            raise OptionError("levels have a network only where network_rate is above 0")
        try:
            network.load_state_dict(dict(mlp))
        except RuntimeError as error:
            raise OptionError("mlp is not the network of a model learned by levels") from error
        learner.levels.refresh()
    choice = learner.run(data, progress, held_out, path, every)
    importances = learner.levels.importances(sum(sparsities) / 2)
    state = {} if network is None else {name: value.clone() for name, value in network.state_dict().items()}
    return Learned(importances, {}, learner.history, state, choice)


def _required(
    model: nn.Module, start: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the initial importances of all weights, by the names in ``weights``.

    Raises:
        OptionError: an importance is missing, has another shape, is negative or not finite, or belongs to a
            tensor that is not in ``weights``.
    """
    ties = TiedNames(dict(model.named_parameters(remove_duplicate=False)))
    require_known(start, [other for name in weights for other in ties.names_of(name)], "start")
    start = _of_weights(model, start, weights, "start")
    for name, weight in weights.items():
        if start[name].shape != weight.shape:
            raise OptionError(
                f"the start of {name!r} has shape {list(start[name].shape)}, not {list(weight.shape)}"
            )
        if not bool(torch.isfinite(start[name]).all()) or bool((start[name] < 0).any()):
            raise OptionError(f"the start of {name!r} is not finite and at least 0 everywhere")
    return {name: start[name].to(weight.device) for name, weight in weights.items()}


def _of_weights(
    model: nn.Module, given: Mapping[str, T], weights: Mapping[str, Tensor], argument: str
) -> dict[str, T]:
    """Returns the given value of each weight; any name of a tied weight is valid.

    Raises:
        OptionError: a weight has no value, a name is not a parameter, or two names of one tensor have
            different values.
    """
    ties = TiedNames(dict(model.named_parameters(remove_duplicate=False)))
    by_kept = ties.by_kept(given, argument)
    missing = [name for name in weights if ties.kept(name) not in by_kept]
    if missing:
        raise OptionError(f"{argument}: nothing for {listed(missing)}")
    return {name: by_kept[ties.kept(name)] for name in weights}


class _Learner:
    """The state of learning by the method ``weights``."""

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        found: Mapping[str, Statistics],
        task: Task,
        settings: Settings,
        sparsities: tuple[float, float],
    ) -> None:
        self.model, self.task, self.settings, self.sparsities = model, task, settings, sparsities
        self.network = ImportanceNetwork(weights, found, logits=settings.logits, seed=settings.seed)
        self.gate: Gate = make_gate(settings.gate, settings.temperature)
        trained = settings.weight_rate > 0
        self.weights = {name: w.clone().requires_grad_() if trained else w for name, w in weights.items()}
        network_rate = _NETWORK_RATE if settings.network_rate is None else settings.network_rate
        groups = [{"params": list(self.network.mlp.parameters()), "peak": network_rate}]
        if self.network.logits is not None:
            rate = settings.logit_rate
            if rate is None:
                rate = _LOGIT_RATE_TOGETHER if trained else _LOGIT_RATE
            groups.append({"params": [self.network.logits], "peak": rate})
        if trained:
            groups.append({"params": list(self.weights.values()), "peak": settings.weight_rate})
        self.optimiser = adam(groups, epsilon=_EPSILON)
        self.dense = model if settings.objective == "divergence" else None
        self.step = 0
        self.history: list[float] = []

    def moment(self) -> Moment:
        """Returns the sparsity of this step, and the progress."""
        settings, progress = self.settings, self.step / self.settings.steps
        sparsity = sparsity_at(
            self.sparsities, self.step, progress, start=settings.start, ramp=settings.ramp, seed=settings.seed
        )
        return Moment(sparsity, progress)

    def learn(self, batch: Any) -> float:
        """Takes one optimiser step and returns the loss."""
        gates, penalty = self.gate(self.network.scores(), self.moment())
        gated = {
            name: self.weights[name] * gate.to(self.weights[name].dtype)
            for name, gate in self.network.split(gates).items()
        }
        loss = cost(with_weights(self.model, gated), batch, self.task, self.dense) + penalty
        value = finite(loss, f"step {self.step + 1}")
        leaves = [self.network.base, *(p for g in self.optimiser.param_groups[1:] for p in g["params"])]
        torch.autograd.backward(loss, inputs=leaves)
        self._update()
        self.history.append(value)
        return value

    def _update(self) -> None:
        set_rates(self.optimiser, self.step, self.settings.steps)
        self.step += 1
        due = self.step % (self.settings.network_every or _NETWORK_EVERY) == 0
        if due:
            self.network.learn_base()
        self.optimiser.step()
        self.optimiser.zero_grad()  # sets gradients to None, so that Adam skips the MLP when it has no step
        if due:
            self.network.refresh()

    def learned(self) -> Learned:
        """Returns the current importances and, if they train, the weights."""
        with torch.no_grad():
            # All gates rise with the score. The score also orders gates that are equal, at 0 or 1.
            scores = self.network.scores()
            flat = F.softplus(scores - threshold_of(scores, sum(self.sparsities) / 2))
            importances = {name: part.clone() for name, part in self.network.split(flat).items()}
            trained = self.settings.weight_rate > 0
            weights = {name: w.detach().clone() for name, w in self.weights.items()} if trained else {}
        mlp = {name: value.clone() for name, value in self.network.mlp.state_dict().items()}
        return Learned(importances, weights, self.history, mlp)

    def _job(self) -> dict[str, Any]:
        shapes = {name: list(shape) for name, shape in self.network.shapes.items()}
        return {"settings": asdict(self.settings), "sparsities": list(self.sparsities), "shapes": shapes}

    def save(self, path: Path) -> None:
        """Writes a checkpoint atomically."""
        state = {
            "step": self.step,
            "history": self.history,
            "network": self.network.state(),
            "base gradient": self.network.base.grad,
            "gate": self.gate.state(),
            "optimiser": self.optimiser.state_dict(),
            "weights": [w.detach() for w in self.weights.values()] if self.settings.weight_rate else [],
        }
        checkpoints.save(path, self._job(), state)

    def load(self, path: Path) -> None:
        """Resumes from a checkpoint.

        Raises:
            MismatchError: the checkpoint is damaged, or of other settings, tensors or sparsities.
        """
        state = checkpoints.load(path, self._job())
        self.step, self.history = state["step"], state["history"]
        self.network.restore(state["network"])
        self.network.base.grad = state["base gradient"]
        self.gate.restore(state["gate"])
        self.optimiser.load_state_dict(state["optimiser"])
        with torch.no_grad():
            for weight, kept in zip(self.weights.values(), state["weights"], strict=False):
                weight.copy_(kept)
