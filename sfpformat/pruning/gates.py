"""Gates map scores to factors from 0 to 1 on the weights; gradients reach the scores through them.

Rules: a gate is called once a step with all scores of the model, flat. It returns factors of the same shape,
and a penalty in nats that is added to the loss. Scores are standardised, so that the widths below have no
unit.

- `TopK` meets its budget exactly in every step: the forward pass uses the hard mask, the backward pass the
  derivative of a sigmoid around the threshold (straight-through estimator). It needs no penalty.
- `SoftGate` is a sigmoid whose temperature falls. A penalty on the difference between its mean and the budget
  drives gates to zero.
- `HardConcrete` is the gate of Louizos et al. (Learning sparse neural networks through L0 regularization,
  2018), without its noise: a stretched and clamped sigmoid, so that gates become exactly zero and stay there.
  The penalty is Lagrangian: its multiplier rises while more gates are open than the budget allows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import OptionError
from .thresholds import count_of_share

GATES = ("topk", "sigmoid", "hard-concrete")


@dataclass(frozen=True)
class Moment:
    """The state of the schedule at a step.

    Attributes:
        sparsity: the target sparsity of this step.
        progress: the share of the steps that is done, from 0 to 1.
    """

    sparsity: float
    progress: float


class Gate(Protocol):
    """A function from scores to gates."""

    def __call__(self, scores: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        """Returns the gates, float32 [weights], and a penalty, a scalar in nats."""

    def state(self) -> list[float]:
        """Returns the gate's state for a checkpoint."""

    def restore(self, state: list[float]) -> None:
        """Restores the state of an earlier run."""


def make_gate(name: str, temperature: float) -> Gate:
    """Creates a gate by its name.

    Args:
        name: one of `GATES`.
        temperature: width of the sigmoid, in units of the scores. Not used by ``hard-concrete``.

    Raises:
        OptionError: the name is unknown, or the temperature is not above 0.
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
    """Returns the threshold that the given share of all scores does not exceed; −∞ if none is pruned."""
    count = count_of_share(sparsity, scores.numel())
    if not count:
        return torch.full((), -math.inf, device=scores.device)
    return scores.detach().kthvalue(count).values


class _Stateless:
    def state(self) -> list[float]:
        return []

    def restore(self, state: list[float]) -> None:
        pass


class TopK(_Stateless):
    """Hard mask that meets the budget; backward pass of sigmoid((score − threshold) / temperature)."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, scores: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        threshold = threshold_of(scores, moment.sparsity)
        soft = torch.sigmoid((scores - threshold) / self._temperature)
        hard = (scores.detach() > threshold).to(soft.dtype)
        return hard + (soft - soft.detach()), scores.new_zeros(())


class SoftGate(_Stateless):
    """Sigmoid whose temperature falls to 1/20; the penalty is 7 · |mean − budget|, as in LEAP."""

    WEIGHT = 7.0
    END = 0.05  # final temperature, as a share of the initial one

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._origin: Tensor | None = None

    def state(self) -> list[float]:
        return [] if self._origin is None else [float(self._origin)]

    def restore(self, state: list[float]) -> None:
        self._origin = torch.tensor(state[0]) if state else None

    def __call__(self, scores: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        if self._origin is None:  # gates are centred on the first step's threshold
            self._origin = threshold_of(scores, moment.sparsity)
        width = self._temperature * self.END**moment.progress
        gates = torch.sigmoid((scores - self._origin.to(scores.device)) / width)
        return gates, self.WEIGHT * (gates.mean() - (1 - moment.sparsity)).abs()


class HardConcrete:
    """Clamped gate sigmoid(a / β) · (ζ − γ) + γ, with the penalty λ · d + 20 · d² on the surplus d of open
    gates.
    """

    BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
    QUADRATIC = 20.0
    RATE = 0.5  # learning rate of λ

    def __init__(self) -> None:
        self._multiplier = 0.0
        self._origin: float | None = None

    def state(self) -> list[float]:
        return [] if self._origin is None else [self._multiplier, self._origin]

    def restore(self, state: list[float]) -> None:
        if state:
            self._multiplier, self._origin = state

    def __call__(self, scores: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
        # A gate is above zero if a > β · log(−γ / ζ).
        edge = self.BETA * math.log(-self.GAMMA / self.ZETA)
        if self._origin is None:
            self._origin = float(threshold_of(scores, moment.sparsity)) - edge
        a = scores - self._origin
        gates = (torch.sigmoid(a / self.BETA) * (self.ZETA - self.GAMMA) + self.GAMMA).clamp(0, 1)
        # The forward pass counts the open gates; without noise their number is not their mean probability.
        # The backward pass uses the gradient of a sigmoid.
        soft = torch.sigmoid((a - edge) / self.BETA)
        surplus = ((gates.detach() > 0).float() + soft - soft.detach()).mean() - (1 - moment.sparsity)
        penalty = self._multiplier * surplus + self.QUADRATIC * surplus.square()
        self._multiplier += self.RATE * float(surplus.detach())
        return gates, penalty
