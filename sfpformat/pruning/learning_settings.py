"""The settings and the result of `learning.learn_importance`."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..errors import OptionError
from .gates import GATES
from .hierarchy import Plan, Rates
from .holdout import Choice
from .task import require_objective

METHODS = ("levels", "weights")
LOGIT_RATE = 0.05  # default of the method weights, with frozen weights
# Default of the method levels. Higher rates reach a lower loss on the batches that were learned from and a
# higher one on others: held-out batches then select a half or none of what was learned.
LEVELS_LOGIT_RATE = 0.01


@dataclass(frozen=True)
class Settings:
    """Settings of `learning.learn_importance`.

    Attributes:
        steps: number of optimiser steps.
        batches: number of batches of a step on each process; their gradients are averaged. Only for
            ``levels``; with ``weights`` it is 1.
        method: ``levels`` or ``weights``. None takes ``levels``, or ``weights`` if a setting needs it: a gate
            other than ``topk``, no logits, or a ``weight_rate``.
        minutes: time limit, after which learning ends early; None sets no limit. Only for ``levels``.
        gate: ``topk``, ``sigmoid`` or ``hard-concrete``.
        objective: ``divergence`` from the dense model's outputs, or the task's ``loss``.
        logits: whether each weight has its own logit.
        logit_rate: peak rate of these logits, in standard deviations of the scores per step. None is 0.01, or
            0.05 with the method ``weights`` if it does not train the weights.
        shared_rate: peak rate of the logits of layers, rows and columns. Only for ``levels``.
        network_rate: peak rate of the shared network. None is 1e-3; with ``levels`` it means no network.
        weight_rate: peak rate of the weights; 0 freezes them.
        temperature: temperature of the gate.
        start: sparsity of the first step.
        ramp: share of the steps after which the target sparsity is reached.
        network_every: number of steps between steps of the network. None is 4, or 10 with ``levels``.
        held_out: maximum number of held-out batches that select the result. Only for ``levels``.
        half: whether the logits of single weights and their moments have 16 bits, with stochastic rounding,
            instead of 32. Only for ``levels``.
        seed: seed of the network's initialisation and of the sparsities drawn from a range.
    """

    steps: int = 200
    batches: int = 1
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
    half: bool = True
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
            raise OptionError(
                f"start is {self.start} and ramp is {self.ramp}; start must be at least 0 and below 1, "
                "ramp from 0 to 1"
            )
        if self.method == "levels" and self._needs_weights():
            raise OptionError(
                "the method levels needs the gate topk and a weight_rate of 0; other settings need the "
                "method weights"
            )
        if self.batches < 1:
            raise OptionError(f"batches is {self.batches}, must be at least 1")
        if self.chosen_method == "weights" and (self.minutes is not None or self.batches > 1):
            raise OptionError(
                "these settings select the method weights, which accepts neither minutes nor batches above 1"
            )

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
        own = LEVELS_LOGIT_RATE if self.logit_rate is None else self.logit_rate
        return Plan(
            steps=self.steps,
            batches=self.batches,
            minutes=self.minutes,
            objective=self.objective,
            rates=Rates(self.network_rate or 0.0, self.shared_rate, own if self.logits else 0.0),
            temperature=self.temperature,
            start=self.start,
            ramp=self.ramp,
            network_every=self.network_every or 10,
            held_out=self.held_out,
            half=self.half,
            seed=self.seed,
        )


DEFAULTS = Settings()


@dataclass(frozen=True)
class Learned:
    """The result of `learning.learn_importance`.

    Attributes:
        importances: by name, float32, not negative: softplus(score − threshold), with the threshold at the
            target sparsity (for a range, at its middle). Survivors at that sparsity are above ln 2.
        weights: trained weights by name; empty if weights were frozen.
        history: the loss of each step, in nats, including the penalty.
        mlp: the state of the shared network, for use with another model; empty if there was none.
        choice: the factor on each level, and the held-out losses before and after; None with the method
            ``weights``.
        start: name of the initial importances, as in `starts.Start`, or ``given``; "" with the method
            ``weights``.
        start_losses: the mean held-out loss of each candidate, in nats, by name; empty if they were given, or
            if learning resumed.
    """

    importances: dict[str, Tensor]
    weights: dict[str, Tensor]
    history: list[float]
    mlp: dict[str, Tensor]
    choice: Choice | None = None
    start: str = ""
    start_losses: dict[str, float] = field(default_factory=dict)
