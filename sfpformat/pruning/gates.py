"""Gates: scores to factors from 0 to 1 on the weights, through which gradients reach the scores.

Rules: a gate is called once a step with all scores of the model, flat, and gives factors of the same shape
and a penalty in nats that is added to the loss. Scores are in units of their own spread, so that the widths
below are numbers without a unit.

- `TopK` meets its budget in every step: the forward pass is the hard mask, the backward pass that of a
  sigmoid around the threshold (straight through). Nothing is left for a penalty to do.
- `SoftGate` is a sigmoid that grows steeper; a penalty on the difference between its mean and the budget
  makes importances go to zero.
- `HardConcrete` is the gate of Louizos et al. (Learning sparse neural networks through L0 regularization,
  2018), without its noise: a stretched and clamped sigmoid, so that gates become zero and stay there. The
  penalty is Lagrangian: its multiplier rises while more gates are open than the budget allows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import OptionError

GATES = ("topk", "sigmoid", "hard-concrete")


@dataclass(frozen=True)
class Moment:
    """Where learning is.

    Attributes:
        sparsity: the share that is to be pruned in this step.
        progress: from 0 to 1, of the steps.
    """

    sparsity: float
    progress: float


class Gate(Protocol):
    """From scores to gates."""

    def __call__(self, scores: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        """The gates, float32 [weights], and a penalty, a scalar in nats."""

    def state(self) -> list[float]:
        """What a checkpoint must hold beyond the scores."""

    def restore(self, state: list[float]) -> None:
        """Takes up the state of an earlier run."""


def make_gate(name: str, temperature: float) -> Gate:
    """A gate by its name.

    Args:
        temperature: width of the sigmoid, in units of the scores.

    Raises:
        OptionError: there is none of this name, or the width is not above 0.
    """
    if not temperature > 0:
        raise OptionError(f"temperature is {temperature}, must be above 0")
    if name == "topk":
        return TopK(temperature)
    if name == "sigmoid":
        return SoftGate(temperature)
    if name == "hard-concrete":
        return HardConcrete()
    raise OptionError(f"gate is {name!r}, must be one of {', '.join(GATES)}")


def threshold_of(scores: Tensor, sparsity: float) -> Tensor:
    """The score that the given share of all does not exceed; −∞ where nothing goes."""
    count = min(int(sparsity * scores.numel() + 0.5), scores.numel())
    if not count:
        return torch.full((), -math.inf, device=scores.device)
    return scores.detach().kthvalue(count).values


class _Stateless:
    def state(self) -> list[float]:
        return []

    def restore(self, state: list[float]) -> None:
        pass


class TopK(_Stateless):
    """The budget is met exactly; gradients as of sigmoid((score − threshold) / temperature)."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, scores: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        threshold = threshold_of(scores, moment.sparsity)
        soft = torch.sigmoid((scores - threshold) / self._temperature)
        hard = (scores.detach() > threshold).to(soft.dtype)
        return hard + (soft - soft.detach()), scores.new_zeros(())


class SoftGate(_Stateless):
    """A sigmoid whose temperature falls to a twentieth; penalty: 7 · |mean − budget|, as in LEAP."""

    WEIGHT = 7.0
    END = 0.05  # of the temperature at the start

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._origin: Tensor | None = None

    def state(self) -> list[float]:
        return [] if self._origin is None else [float(self._origin)]

    def restore(self, state: list[float]) -> None:
        self._origin = torch.tensor(state[0]) if state else None

    def __call__(self, scores: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        if self._origin is None:  # gates begin around the first budget
            self._origin = threshold_of(scores, moment.sparsity)
        width = self._temperature * self.END**moment.progress
        gates = torch.sigmoid((scores - self._origin.to(scores.device)) / width)
        return gates, self.WEIGHT * (gates.mean() - (1 - moment.sparsity)).abs()


class HardConcrete:
    """sigmoid(a / β) · (ζ − γ) + γ, clamped; penalty: λ · d + 20 · d², d the surplus of open gates."""

    BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
    QUADRATIC = 20.0
    RATE = 0.5  # of λ's ascent

    def __init__(self) -> None:
        self._multiplier = 0.0
        self._origin: float | None = None

    def state(self) -> list[float]:
        return [] if self._origin is None else [self._multiplier, self._origin]

    def restore(self, state: list[float]) -> None:
        if state:
            self._multiplier, self._origin = state

    def __call__(self, scores: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        # A gate is above zero where a > β · log(−γ / ζ).
        edge = self.BETA * math.log(-self.GAMMA / self.ZETA)
        if self._origin is None:
            self._origin = float(threshold_of(scores, moment.sparsity)) - edge
        a = scores - self._origin
        gates = (torch.sigmoid(a / self.BETA) * (self.ZETA - self.GAMMA) + self.GAMMA).clamp(0, 1)
        # Counted as they are, which without noise is not their mean probability; gradients as of a sigmoid.
        soft = torch.sigmoid((a - edge) / self.BETA)
        surplus = ((gates.detach() > 0).float() + soft - soft.detach()).mean() - (1 - moment.sparsity)
        penalty = self._multiplier * surplus + self.QUADRATIC * surplus.square()
        self._multiplier += self.RATE * float(surplus.detach())
        return gates, penalty
