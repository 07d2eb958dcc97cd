"""What can still be learned when masks are held: survivors (fine-tuning), a factor for each of them, or one
for each row and column."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .task import (
    CLASSIFY,
    Data,
    Model,
    Task,
    chosen_weights,
    divergence,
    endless,
    evaluating,
    finite,
    require_shapes,
    with_weights,
)

Progress = Callable[[int, float], None]
Factors = dict[str, tuple[Tensor, Tensor]]
Masks = Mapping[str, Tensor]

_BETAS = (0.9, 0.95)
_WARMUP = 10  # steps
_FINAL = 0.05  # of the peak rate


@dataclass(frozen=True)
class Tuning:
    """How survivors or factors are tuned.

    Attributes:
        steps: of Adam, a batch each.
        rate: the peak, under half a cosine; None takes 3e-4 for survivors, 1e-2 for factors and multipliers.
        objective: ``divergence`` from a teacher's outputs, or the task's ``loss``.
    """

    steps: int = 200
    rate: float | None = None
    objective: str = "divergence"

    def __post_init__(self) -> None:
        if self.objective not in ("divergence", "loss"):
            raise OptionError(f"objective is {self.objective!r}, must be divergence or loss")


def fine_tune(
    model: nn.Module,
    masks: Masks,
    data: Data,
    *,
    teacher: nn.Module | None = None,
    task: Task = CLASSIFY,
    tuning: Tuning = Tuning(),
    progress: Progress = lambda step, loss: None,
) -> list[float]:
    """Trains the survivors of a pruned model, in place; what is pruned stays +0.

    Args:
        model: run in evaluation mode; its weights times the masks are where training begins. Only the
            weights with a mask change.
        masks: bool by name, True for survivors.
        data: batches, gone through over and over.
        teacher: the dense model, for the objective ``divergence``.
        task: how a batch goes through both.
        tuning: how.
        progress: called after each step with its number and its loss.

    Returns:
        The loss of each step, in nats.

    Memory: 20 bytes a pruned tensor's weight beyond the model's gradients.

    Raises:
        OptionError: a mask is none of the model's; ``divergence`` without a teacher.
        LossError: a loss is not finite; the model is as it was.
    """
    kept = _checked(model, masks)
    leaves = {name: (weight * kept[name]).requires_grad_() for name, weight in _weights(model, masks).items()}

    def weights() -> dict[str, Tensor]:
        return {name: leaf * kept[name] for name, leaf in leaves.items()}

    history = _tune(
        model, list(leaves.values()), weights, data, teacher, task, tuning, tuning.rate or 3e-4, progress
    )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, weight in weights().items():
            parameters[name].copy_(torch.where(kept[name], weight, 0))
    return history


def fit_factors(
    model: nn.Module,
    masks: Masks,
    data: Data,
    *,
    teacher: nn.Module | None = None,
    task: Task = CLASSIFY,
    tuning: Tuning = Tuning(),
    progress: Progress = lambda step, loss: None,
) -> Factors:
    """Fits a factor for each row and each column of the pruned weights; masks and weights stay as they are.

    In a file they are an importance ``over`` factors with the role of a multiplier: at reconstruction each
    weight is multiplied by its row's factor times its column's.

    Args:
        As `fine_tune`.

    Returns:
        By name, float32 [rows] and [columns], of the weight as the matrix of SPEC.md chapter 2.

    Raises:
        OptionError, LossError: as `fine_tune`.
    """
    kept = _checked(model, masks)
    pruned = {name: weight * kept[name] for name, weight in _weights(model, masks).items()}
    leaves = {
        name: (
            torch.ones(w.shape[0], device=w.device, requires_grad=True),
            torch.ones(w[0].numel(), device=w.device, requires_grad=True),
        )
        for name, w in pruned.items()
    }

    def weights() -> dict[str, Tensor]:
        return {name: scaled(pruned[name], *pair) for name, pair in leaves.items()}

    flat = [leaf for pair in leaves.values() for leaf in pair]
    _tune(model, flat, weights, data, teacher, task, tuning, tuning.rate or 1e-2, progress)
    return {name: (rows.detach(), columns.detach()) for name, (rows, columns) in leaves.items()}


def fit_multipliers(
    model: nn.Module,
    masks: Masks,
    data: Data,
    *,
    teacher: nn.Module | None = None,
    task: Task = CLASSIFY,
    tuning: Tuning = Tuning(),
    progress: Progress = lambda step, loss: None,
) -> dict[str, Tensor]:
    """Fits a multiplier for each survivor; masks and weights stay as they are.

    This is training of the weights under another name, at rates in proportion to them: compare it with
    `fine_tune`. `pipeline.pack` folds multipliers into the weights, where they take no bits.

    Args:
        As `fine_tune`.

    Returns:
        By name, float32, of the weights' shapes; 1 where a mask prunes.

    Raises:
        OptionError, LossError: as `fine_tune`.
    """
    kept = _checked(model, masks)
    pruned = {name: weight * kept[name] for name, weight in _weights(model, masks).items()}
    leaves = {
        name: torch.ones_like(weight, dtype=torch.float32, requires_grad=True)
        for name, weight in pruned.items()
    }

    def weights() -> dict[str, Tensor]:
        return {name: pruned[name] * leaf.to(pruned[name].dtype) for name, leaf in leaves.items()}

    _tune(model, list(leaves.values()), weights, data, teacher, task, tuning, tuning.rate or 1e-2, progress)
    return {name: leaf.detach() for name, leaf in leaves.items()}


def scaled(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A weight times its factors, in the order and precision of SPEC.md chapter 14."""
    product = torch.outer(rows.float(), columns.float()).view(weight.shape)
    return (weight.float() * product).to(weight.dtype)


def _tune(
    model: nn.Module,
    leaves: list[Tensor],
    weights: Callable[[], dict[str, Tensor]],
    data: Data,
    teacher: nn.Module | None,
    task: Task,
    tuning: Tuning,
    peak: float,
    progress: Progress,
) -> list[float]:
    """Adam on some leaves, through what ``weights`` makes of them; returns the loss of each step."""
    if tuning.objective == "divergence" and teacher is None:
        raise OptionError("the objective divergence needs a teacher, the dense model")
    optimiser = torch.optim.Adam(leaves, lr=peak, betas=_BETAS)
    batches = endless(data)
    history: list[float] = []
    with evaluating(model):
        for step in range(tuning.steps):
            cosine = 0.5 * (1 + math.cos(math.pi * step / tuning.steps))
            rate = peak * min(1.0, (step + 1) / _WARMUP) * (_FINAL + (1 - _FINAL) * cosine)
            for group in optimiser.param_groups:
                group["lr"] = rate
            batch = next(batches)
            loss = _cost(with_weights(model, weights()), batch, teacher, task, tuning)
            history.append(finite(loss, f"step {step + 1}"))
            for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                leaf.grad = gradient
            optimiser.step()
            progress(step + 1, history[-1])
    return history


def _cost(pruned: Model, batch: Any, teacher: nn.Module | None, task: Task, tuning: Tuning) -> Tensor:
    outputs = task.run(pruned, batch)
    if tuning.objective == "loss" or teacher is None:
        return task.loss(outputs, batch)
    with evaluating(teacher), torch.no_grad():
        dense = task.run(teacher, batch)
    return divergence(outputs, dense)


def _weights(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    return chosen_weights(model, list(masks))


def _checked(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """The masks as bool where the weights are."""
    weights = _weights(model, masks)
    require_shapes(weights, masks, "mask")
    return {name: masks[name].to(weight.device, torch.bool) for name, weight in weights.items()}
