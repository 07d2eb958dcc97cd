"""Learning importances through a model whose weights stay as they are (or learn with them, if asked).

Theory of operation: each step draws a batch, turns the scores of all weights into gates, runs the model with
every weight times its gate, and takes the divergence from the dense model's outputs (or the task's loss),
and the gate's penalty. Gradients reach the scores through the gates. The share that is pruned rises from the
schedule's start to the target along a cubic, then stays; where a range is asked for, each step draws its
share from the range, so that one importance serves every sparsity in it.

The MLP changes slowly and costs as much as the model itself: it learns every `Settings.network_every` steps,
from the gradient gathered meanwhile. Where weights learn too, logits go more slowly, so that a mask does not
change faster than its survivors can make up for what went.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..atomic import replacing
from ..errors import MismatchError, OptionError
from .calibration import Statistics, statistics
from .descent import adam, set_rates
from .features import FEATURES
from .gates import GATES, Gate, Moment, make_gate, threshold_of
from .network import ImportanceNetwork
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


@dataclass(frozen=True)
class Settings:
    """How importances are learned. The defaults were measured on the demonstration's model.

    Attributes:
        steps: of the optimiser, a batch each.
        gate: ``topk``, ``sigmoid`` or ``hard-concrete``.
        objective: ``divergence`` from the dense model's outputs, or the task's ``loss``.
        logits: whether each weight has a logit of its own beside the shared MLP.
        logit_rate, network_rate: peak rates of Adam, in scores' units a step; None takes 0.05 for logits, and
            0.01 where weights learn too.
        weight_rate: of the weights themselves, which are frozen at 0.
        temperature: of the gate.
        start: share pruned in the first step.
        ramp: share of the steps after which the target is reached.
        network_every: steps from one step of the MLP to the next.
        seed: of the MLP's start and of the shares drawn from a range.
    """

    steps: int = 200
    gate: str = "topk"
    objective: str = "divergence"
    logits: bool = True
    logit_rate: float | None = None
    network_rate: float = 1e-3
    weight_rate: float = 0.0
    temperature: float = 0.5
    start: float = 0.3
    ramp: float = 0.6
    network_every: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise OptionError(f"gate is {self.gate!r}, must be one of {', '.join(GATES)}")
        require_objective(self.objective)
        if self.steps < 1 or self.network_every < 1:
            raise OptionError("steps and network_every must be at least 1")
        if not (0 <= self.start < 1 and 0 <= self.ramp <= 1):
            raise OptionError("start and ramp must be shares")


_EPSILON = 1e-12  # of Adam: gradients a weight are tiny, the usual 1e-8 would drown them
_LOGIT_RATE = 0.05
_LOGIT_RATE_TOGETHER = 0.01


@dataclass(frozen=True)
class Learned:
    """What was learned.

    Attributes:
        importances: by name, float32, not negative: softplus of the score less the threshold at the target
            (of a range its middle), so that what it keeps is above ln 2.
        weights: by name, where they were trained too; else empty.
        history: the loss of each step, in nats, the penalty included.
        mlp: the state of the shared network, for another model.
    """

    importances: dict[str, Tensor]
    weights: dict[str, Tensor]
    history: list[float]
    mlp: dict[str, Tensor]


Sparsities = float | tuple[float, float]


def bytes_per_weight(settings: Settings = Settings()) -> int:
    """Memory a weight beyond the model's own activations, in bytes: what is counted below."""
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
    mlp: Mapping[str, Tensor] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 50,
    progress: Progress = lambda step, loss: None,
) -> Learned:
    """Learns an importance for each weight; the model stays as it is.

    Args:
        model: any module; run in evaluation mode.
        data: batches, gone through over and over.
        sparsity: the share to be pruned over all tensors together, or a range (least, greatest) within which
            the importance is to hold.
        task: how a batch goes through the model.
        settings: how.
        tensors: names of parameters; None takes `layers.prunable`.
        found: statistics of these tensors; None makes them of the data.
        mlp: the shared network to start from, of another model's `Learned`.
        checkpoint: a file that is written every so many steps, whole or not at all, and gone on from when
            it is there; the data are then gone through up to where they were.
        every: steps from one checkpoint to the next.
        progress: called after each step with its number and its loss.

    Memory: `bytes_per_weight` beyond what a step of the model's training needs without an optimiser.

    Raises:
        OptionError: settings or names that make no sense; no data.
        MismatchError: the checkpoint is of other settings, tensors or sparsities.
        LossError: a loss is not finite; the last checkpoint stays.
    """
    low, high = sparsity if isinstance(sparsity, tuple) else (sparsity, sparsity)
    if not 0 <= low <= high < 1:
        raise OptionError(f"sparsity is {sparsity}, must be a share under 1, or two that ascend")
    weights = chosen_weights(model, tensors)
    if found is None:
        found = statistics(model, data, task=task, tensors=list(weights))
    learner = _Learner(model, weights, found, task, settings, (low, high))
    if mlp is not None:
        learner.network.mlp.load_state_dict(dict(mlp))
        learner.network.refresh()
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        learner.load(path)
    batches = endless(data, learner.step)
    with evaluating(model):
        while learner.step < settings.steps:
            progress(learner.step + 1, learner.learn(next(batches)))
            if path is not None and (learner.step % every == 0 or learner.step == settings.steps):
                learner.save(path)
    return learner.learned()


class _Learner:
    """All that changes from step to step."""

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
        groups = [{"params": list(self.network.mlp.parameters()), "peak": settings.network_rate}]
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
        """The share to be pruned in this step: a cubic up to the target, then the target."""
        progress = self.step / self.settings.steps
        low, high = self.sparsities
        # Seeded by the step, so that a resumed run draws what an uninterrupted one would have.
        generator = torch.Generator().manual_seed(self.settings.seed << 32 | self.step)
        target = low + (high - low) * float(torch.rand((), generator=generator))
        left = max(0.0, 1 - progress / self.settings.ramp) if self.settings.ramp else 0.0
        return Moment(target + (min(self.settings.start, target) - target) * left**3, progress)

    def learn(self, batch: Any) -> float:
        """One step; returns the loss."""
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
        due = self.step % self.settings.network_every == 0
        if due:
            self.network.learn_base()
        self.optimiser.step()
        self.optimiser.zero_grad()  # to None: Adam leaves an MLP alone that is not due
        if due:
            self.network.refresh()

    def learned(self) -> Learned:
        """The importances as they are now."""
        with torch.no_grad():
            # All gates rise with the score; the score still orders those that are all open or all shut.
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
        """Writes a checkpoint, whole or not at all."""
        state = {
            "job": self._job(),
            "step": self.step,
            "history": self.history,
            "network": self.network.state(),
            "base gradient": self.network.base.grad,
            "gate": self.gate.state(),
            "optimiser": self.optimiser.state_dict(),
            "weights": [w.detach() for w in self.weights.values()] if self.settings.weight_rate else [],
        }
        with replacing(path) as file:
            torch.save(state, file)

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            MismatchError: it is of another job.
        """
        state = torch.load(path, weights_only=True)
        if state["job"] != self._job():
            raise MismatchError(
                f"{path} is a checkpoint of other settings or tensors: remove it, or go on so"
            )
        self.step, self.history = state["step"], state["history"]
        self.network.restore(state["network"])
        self.network.base.grad = state["base gradient"]
        self.gate.restore(state["gate"])
        self.optimiser.load_state_dict(state["optimiser"])
        with torch.no_grad():
            for weight, kept in zip(self.weights.values(), state["weights"], strict=False):
                weight.copy_(kept)
