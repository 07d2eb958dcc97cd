"""Learns the scores of `network` through gates, with frozen weights or together with them.

Theory of operation: each step takes a batch, maps the scores of all weights to gates, and runs the model with
every weight times its gate. The loss is the divergence from the dense model's outputs (or the task's loss)
plus the gate's penalty. Gradients reach the scores through the gates. The sparsity rises from the schedule's
start to the target along a cubic, then stays constant. With a range, each step draws its target from the
range, so that one importance serves every sparsity in it.

The MLP changes slowly, and one of its steps takes as long as a pass of the model. It is therefore updated
only every `Settings.network_every` steps, from the accumulated gradient. If the weights are trained too, the
logits have a lower rate, so that the mask does not change faster than the survivors can adapt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calibration_sums import Statistics
from .checkpoints import Checkpoint
from .descent import adam, set_rates, sparsity_at, trainable
from .gates import Gate, Moment, make_gate, threshold_of
from .learning_settings import LOGIT_RATE, Learned, Settings
from .network import ImportanceNetwork
from .task import Task, cost, finite, with_weights

_NETWORK_RATE, _NETWORK_EVERY = 1e-3, 4  # defaults
_EPSILON = 1e-12  # of Adam: gradients of single weights are tiny; the usual 1e-8 would dominate them
_LOGIT_RATE_TOGETHER = 0.01  # default if the weights are trained too


class GateLearner:
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
        self._dtypes = {name: w.dtype for name, w in weights.items()}
        self.weights = {name: trainable(w) if trained else w for name, w in weights.items()}
        network_rate = _NETWORK_RATE if settings.network_rate is None else settings.network_rate
        groups = [{"params": list(self.network.mlp.parameters()), "peak": network_rate}]
        if self.network.logits is not None:
            rate = settings.logit_rate
            if rate is None:
                rate = _LOGIT_RATE_TOGETHER if trained else LOGIT_RATE
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
        gated = {}
        for name, gate in self.network.split(gates).items():
            weight = self.weights[name]
            gated[name] = (weight * gate.to(weight.dtype)).to(self._dtypes[name])
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
        self.optimiser.zero_grad()  # sets gradients to None, so that Adam skips the MLP until it is due
        if due:
            self.network.refresh()

    def learned(self) -> Learned:
        """Returns the current importances and, if they are trained, the weights."""
        with torch.no_grad():
            # Gates increase with the score, but many are equal, at 0 or 1. The score orders these too.
            scores = self.network.scores()
            flat = F.softplus(scores - threshold_of(scores, sum(self.sparsities) / 2))
            importances = {name: part.clone() for name, part in self.network.split(flat).items()}
            trained = self.weights if self.settings.weight_rate else {}
            weights = {name: w.detach().to(self._dtypes[name], copy=True) for name, w in trained.items()}
        mlp = {name: value.clone() for name, value in self.network.mlp.state_dict().items()}
        return Learned(importances, weights, self.history, mlp)

    def _job(self) -> dict[str, Any]:
        shapes = {name: list(shape) for name, shape in self.network.shapes.items()}
        return {"settings": asdict(self.settings), "sparsities": list(self.sparsities), "shapes": shapes}

    def save(self, checkpoint: Checkpoint) -> None:
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
        checkpoint.save(self._job(), state)

    def load(self, checkpoint: Checkpoint) -> None:
        """Resumes from a checkpoint if it exists.

        Raises:
            MismatchError: the checkpoint is damaged, or belongs to other settings, tensors, sparsities, data
                or another model.
        """
        state = checkpoint.load(self._job())
        if state is None:
            return
        self.step, self.history = state["step"], state["history"]
        self.network.restore(state["network"])
        self.network.base.grad = state["base gradient"]
        self.gate.restore(state["gate"])
        self.optimiser.load_state_dict(state["optimiser"])
        with torch.no_grad():
            for weight, kept in zip(self.weights.values(), state["weights"], strict=False):
                weight.copy_(kept)
