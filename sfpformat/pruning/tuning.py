"""Training with fixed masks: of survivors, a multiplier for each survivor, or factors of rows and columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .descent import adam, set_rates, trainable
from .task import (
    CLASSIFY,
    Data,
    Progress,
    Task,
    cost,
    endless,
    evaluating,
    finite,
    require_objective,
    with_weights,
)
from .weight_selection import chosen_tensors, named_once, require_masks

Factors = dict[str, tuple[Tensor, Tensor]]
Masks = Mapping[str, Tensor]

_RATE, _FACTORS_RATE = 3e-4, 1e-2  # defaults


@dataclass(frozen=True)
class Tuning:
    """Settings of `fine_tune`, `fit_factors` and `fit_multipliers`.

    Attributes:
        steps: number of steps of Adam, one batch each.
        rate: the peak learning rate of a half-cosine schedule. None is 3e-4 for survivors, and 1e-2 for
            factors and multipliers.
        objective: ``divergence`` from a teacher's outputs, or the task's ``loss``.
    """

    steps: int = 200
    rate: float | None = None
    objective: str = "divergence"

    def __post_init__(self) -> None:
        require_objective(self.objective)
        if not isinstance(self.steps, int) or self.steps < 1:
            raise OptionError(f"steps is {self.steps!r}, must be a whole number of at least 1")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise OptionError(f"rate is {self.rate}, must be above 0 and finite")


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
    """Trains the survivors of a pruned model in place. Pruned weights stay +0.

    Example: ``fine_tune(pruned, masks, batches, teacher=dense)``.

    Args:
        model: run in evaluation mode. Training starts from its weights times the masks. Only weights with a
            mask change.
        masks: bool by name, True for survivors.
        data: batches, repeated as often as needed.
        teacher: the dense model, for the objective ``divergence``.
        task: runs both models and computes the loss.
        tuning: settings of training.
        progress: called after each step with its number and its loss.

    Returns:
        The loss of each step, in nats.

    Weights of 16 bits are trained in float32, and rounded whenever the model uses them.

    Memory: 20 bytes for each weight of a masked tensor (22 for weights of 16 bits), in addition to the
    model's gradients.

    Raises:
        OptionError: a mask does not fit a parameter of the model; or the objective is ``divergence`` and
            there is no teacher.
        LossError: a loss is not finite. The model is unchanged.
    """
    kept, pruned = _pruned(model, masks)
    leaves = {name: trainable(weight) for name, weight in pruned.items()}

    def weights() -> dict[str, Tensor]:
        return {name: (leaf * kept[name]).to(pruned[name].dtype) for name, leaf in leaves.items()}

    through = _Through(model, data, teacher, task, tuning, progress)
    history = through.tune(list(leaves.values()), weights, _RATE)
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
    """Fits a factor for each row and column of the pruned weights. Masks and weights are unchanged.

    A file stores them as an importance ``over`` factors with the role of a multiplier: reconstruction
    multiplies each weight by the factor of its row times that of its column.

    Args:
        model, masks, data, teacher, task, tuning, progress: as in `fine_tune`.

    Returns:
        The factors by name, float32 [rows] and [columns] of the matrix of SPEC.md chapter 2. Weights of rank
        0 and 1 are pruned, but have no factors.

    Raises:
        OptionError: for the reasons of `fine_tune`; or no mask belongs to a tensor of rank 2 or more.
        LossError: as in `fine_tune`.
    """
    _, pruned = _pruned(model, masks)
    plain = {name: weight for name, weight in pruned.items() if weight.dim() < 2}
    if len(plain) == len(pruned):
        raise OptionError(
            "no mask belongs to a tensor of rank 2 or more: there are no rows and columns to scale"
        )
    leaves = {
        name: (
            torch.ones(w.shape[0], device=w.device, requires_grad=True),
            torch.ones(w[0].numel(), device=w.device, requires_grad=True),
        )
        for name, w in pruned.items()
        if name not in plain
    }

    def weights() -> dict[str, Tensor]:
        return plain | {name: scaled(pruned[name], *pair) for name, pair in leaves.items()}

    flat = [leaf for pair in leaves.values() for leaf in pair]
    _Through(model, data, teacher, task, tuning, progress).tune(flat, weights, _FACTORS_RATE)
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
    """Fits a multiplier for each survivor. Masks and weights are unchanged.

    This is equivalent to training the weights with rates proportional to them; compare it with `fine_tune`.
    `pipeline.pack` multiplies the weights by the multipliers, so that these take no bits.

    Args:
        model, masks, data, teacher, task, tuning, progress: as in `fine_tune`.

    Returns:
        The multipliers by name, float32, of the weights' shapes; 1 for pruned weights.

    Raises:
        OptionError, LossError: as in `fine_tune`.
    """
    _, pruned = _pruned(model, masks)
    leaves = {
        name: torch.ones_like(weight, dtype=torch.float32, requires_grad=True)
        for name, weight in pruned.items()
    }

    def weights() -> dict[str, Tensor]:
        return {name: pruned[name] * leaf.to(pruned[name].dtype) for name, leaf in leaves.items()}

    through = _Through(model, data, teacher, task, tuning, progress)
    through.tune(list(leaves.values()), weights, _FACTORS_RATE)
    return {name: leaf.detach() for name, leaf in leaves.items()}


def scaled(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Returns a weight times its factors, in the order and precision of SPEC.md chapter 14."""
    product = torch.outer(rows.float(), columns.float()).view(weight.shape)
    return (weight.float() * product).to(weight.dtype)


@dataclass(frozen=True)
class _Through:
    """The common arguments of the functions above, as in `fine_tune`, with the training loop."""

    model: nn.Module
    data: Data
    teacher: nn.Module | None
    task: Task
    tuning: Tuning
    progress: Progress

    def tune(
        self, leaves: list[Tensor], weights: Callable[[], dict[str, Tensor]], usual_rate: float
    ) -> list[float]:
        """Trains the leaves with Adam; ``weights`` maps them to weights. Returns the loss of each step."""
        dense = self.teacher if self.tuning.objective == "divergence" else None
        if dense is None and self.tuning.objective == "divergence":
            raise OptionError("the objective divergence needs the dense model as teacher")
        peak = usual_rate if self.tuning.rate is None else self.tuning.rate
        optimiser = adam([{"params": leaves, "peak": peak}])
        batches = endless(self.data)
        history: list[float] = []
        with evaluating(self.model, *([] if dense is None else [dense])):
            for step in range(self.tuning.steps):
                set_rates(optimiser, step, self.tuning.steps)
                pruned = with_weights(self.model, weights())
                loss = cost(pruned, next(batches), self.task, dense)
                history.append(finite(loss, f"step {step + 1}"))
                optimiser.zero_grad()
                torch.autograd.backward(loss, inputs=leaves)
                optimiser.step()
                self.progress(step + 1, history[-1])
        return history


def _pruned(model: nn.Module, masks: Masks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the masks as bool on the weights' devices, and pruned copies of the weights."""
    masks = named_once(model, masks, "masks")
    weights = chosen_tensors(model, list(masks))
    require_masks(weights, masks)
    kept = {name: masks[name].to(weight.device, torch.bool) for name, weight in weights.items()}
    return kept, {name: torch.where(kept[name], weight, 0) for name, weight in weights.items()}
