"""What can still be learned when masks are held: survivors (fine-tuning), a factor for each of them, or one
for each row and column."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .descent import adam, set_rates
from .layers import chosen_tensors, named_once, require_masks
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

Factors = dict[str, tuple[Tensor, Tensor]]
Masks = Mapping[str, Tensor]

_RATE, _FACTORS_RATE = 3e-4, 1e-2  # where none is given


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
        require_objective(self.objective)
        if not isinstance(self.steps, int) or self.steps < 1:
            raise OptionError(f"steps is {self.steps!r}, must be a whole number of at least 1")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise OptionError(f"rate is {self.rate}, must be above 0")


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
    kept, pruned = _pruned(model, masks)
    leaves = {name: weight.requires_grad_() for name, weight in pruned.items()}

    def weights() -> dict[str, Tensor]:
        return {name: leaf * kept[name] for name, leaf in leaves.items()}

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
    """Fits a factor for each row and each column of the pruned weights; masks and weights stay as they are.

    In a file they are an importance ``over`` factors with the role of a multiplier: at reconstruction each
    weight is multiplied by its row's factor times its column's.

    Args:
        As `fine_tune`.

    Returns:
        By name, float32 [rows] and [columns], of the weight as the matrix of SPEC.md chapter 2. Weights of
        rank 0 and 1 are pruned, and have no factors.

    Raises:
        OptionError: as `fine_tune`; no mask is of a matrix.
        LossError: as `fine_tune`.
    """
    _, pruned = _pruned(model, masks)
    plain = {name: weight for name, weight in pruned.items() if weight.dim() < 2}
    if len(plain) == len(pruned):
        raise OptionError("no mask is of a tensor of rank 2 or more: there are no rows and columns")
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
    """A weight times its factors, in the order and precision of SPEC.md chapter 14."""
    product = torch.outer(rows.float(), columns.float()).view(weight.shape)
    return (weight.float() * product).to(weight.dtype)


@dataclass(frozen=True)
class _Through:
    """What leaves are tuned through; as in `fine_tune`."""

    model: nn.Module
    data: Data
    teacher: nn.Module | None
    task: Task
    tuning: Tuning
    progress: Progress

    def tune(
        self, leaves: list[Tensor], weights: Callable[[], dict[str, Tensor]], usual_rate: float
    ) -> list[float]:
        """Adam on the leaves, through what ``weights`` makes of them; returns the loss of each step."""
        dense = self.teacher if self.tuning.objective == "divergence" else None
        if dense is None and self.tuning.objective == "divergence":
            raise OptionError("the objective divergence needs a teacher, the dense model")
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
    """The masks as bool where the weights are, and the weights, 0 where they go; the model's stay."""
    masks = named_once(model, masks, "masks")
    weights = chosen_tensors(model, list(masks))
    require_masks(weights, masks)
    kept = {name: masks[name].to(weight.device, torch.bool) for name, weight in weights.items()}
    return kept, {name: torch.where(kept[name], weight, 0) for name, weight in weights.items()}
