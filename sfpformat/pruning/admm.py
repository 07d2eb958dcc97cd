"""Trains weights towards a sparsity by the alternating direction method of multipliers (ADMM).

Theory of operation (ELSA; Lee et al., 2025): the method minimises the loss of weights x under the constraint
that x equals a sparse z. Adam takes steps on the loss plus λ/2 ‖x − z + u‖². Every few steps, z is set to x +
u with zeros at the positions of the least F (x + u)², and x − z is added to u. F is a running mean of the
squared gradients of the loss, which approximates the diagonal of the Fisher information. F (x + u)² therefore
estimates how much pruning a position raises the loss. Masks change until the last step; no weight is pruned
permanently before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..options.checks import is_number
from .descent import adam, set_rates
from .layerwise import LayerwiseResult
from .masks import masks_of
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
from .thresholds import Pattern, Sparsity, require_share
from .weight_selection import as_numbers, chosen_weights, layout_of

_DECAY = 0.95  # of F, per step
_TINY = 1e-30
_HALF = 2  # λ rises linearly to its peak over the first half of the steps


@dataclass(frozen=True)
class Alternation:
    """Settings of `train_sparse`.

    Attributes:
        steps: number of steps of Adam, one batch each.
        rate: peak learning rate of Adam, which falls along half a cosine.
        penalty: λ at its peak, as a multiple of a tensor's mean √F over the mean magnitude of its weights, so
            that it depends neither on the scale of the loss nor on that of the weights. λ rises linearly over
            the first half of the steps.
        every: steps between updates of z and u.
        objective: the task's ``loss``, or ``divergence`` from the dense model's outputs. The latter has no
            gradient at the dense model, so that the first choices are arbitrary.
    """

    steps: int = 400
    rate: float = 1e-3
    penalty: float = 1.0
    every: int = 8
    objective: str = "loss"

    def __post_init__(self) -> None:
        require_objective(self.objective)
        for name in ("steps", "every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} is {value!r}, must be a whole number of at least 1")
        for name in ("rate", "penalty"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < float("inf"):
                raise OptionError(f"{name} is {value!r}, must be above 0 and finite")


def train_sparse(
    model: nn.Module,
    data: Data,
    sparsity: float | Pattern,
    *,
    task: Task = CLASSIFY,
    settings: Alternation = Alternation(),
    tensors: Sequence[str] | None = None,
    scope: str = "model",
    progress: Progress = lambda step, loss: None,
) -> LayerwiseResult:
    """Trains the weights towards a sparsity, and prunes them to it. The model is unchanged.

    Meant for high sparsities, from 80 % on. Example: ``train_sparse(model, batches, 0.9)``.

    Args:
        model: the dense model; run in evaluation mode.
        data: batches, repeated as often as needed.
        sparsity: the pruned share, or a pattern, such as ``Pattern(2, 4)``.
        task: runs the model and computes the loss.
        settings: settings of training.
        tensors: names of parameters; None takes `weight_selection.prunable`. Other parameters do not change.
        scope: where the sparsity holds, as in `masks.masks_of`: ``model``, ``tensor`` or ``row``.
        progress: called after each step with its number and its loss.

    Returns:
        The masks, and the weights after training and pruning.

    Memory: 28 bytes per weight, in addition to a training step of the model.

    Raises:
        OptionError: settings, names, sparsity or scope are invalid, or there are no data.
        LossError: a loss is not finite.
    """
    if not isinstance(sparsity, Pattern):
        require_share("sparsity", sparsity)
    weights = chosen_weights(model, tensors)
    projection = _Projection(model, weights, sparsity, scope)
    leaves = {name: weight.float().clone().requires_grad_() for name, weight in weights.items()}
    dense = model if settings.objective == "divergence" else None
    optimiser = adam([{"params": list(leaves.values()), "peak": settings.rate}], epsilon=1e-12)
    squares = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}  # F
    pulled: dict[str, Tensor] = {}  # z − u: what x is pulled towards
    dual = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}  # u
    batches = endless(data)
    with evaluating(model):
        for step in range(settings.steps):
            set_rates(optimiser, step, settings.steps)
            used = {name: leaf.to(weights[name].dtype) for name, leaf in leaves.items()}
            loss = cost(with_weights(model, used), next(batches), task, dense)
            value = finite(loss, f"step {step + 1}")
            optimiser.zero_grad()
            torch.autograd.backward(loss, inputs=list(leaves.values()))
            with torch.no_grad():
                rising = settings.penalty * min(1.0, _HALF * (step + 1) / settings.steps)
                for name, leaf in leaves.items():
                    assert leaf.grad is not None
                    squares[name].mul_(_DECAY).addcmul_(leaf.grad, leaf.grad, value=1 - _DECAY)
                    if pulled:
                        size = squares[name].sqrt().mean() / leaf.abs().mean().clamp(min=_TINY)
                        leaf.grad += rising * size * (leaf - pulled[name])
            optimiser.step()
            if (step + 1) % settings.every == 0:
                with torch.no_grad():
                    shifted = {name: leaf + dual[name] for name, leaf in leaves.items()}
                    masks = projection.masks(shifted, squares)
                    for name, whole in shifted.items():
                        sparse = torch.where(masks[name], whole, 0) if name in masks else whole
                        dual[name] = whole - sparse  # u + x − z
                        pulled[name] = sparse - dual[name]
            progress(step + 1, value)
    with torch.no_grad():
        # The result is x without u, which is not part of the weights.
        masks = projection.masks(leaves, squares)
        pruned = {
            name: torch.where(mask, leaves[name].detach(), 0).to(weights[name].dtype)
            for name, mask in masks.items()
        }
    return LayerwiseResult(masks, pruned)


class _Projection:
    """Projects weights onto the weights with a given sparsity, in the norm of the Fisher information."""

    def __init__(
        self, model: nn.Module, weights: dict[str, Tensor], sparsity: float | Pattern, scope: str
    ) -> None:
        self._layouts = {name: layout_of(model, name) for name in weights}
        self._threshold = sparsity if isinstance(sparsity, Pattern) else Sparsity(sparsity)
        self._scope = scope

    def masks(self, weights: dict[str, Tensor], squares: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns masks that keep the weights w with the greatest F w²: bool by name, True for survivors."""
        scores = {name: squares[name] * weight.detach().square() for name, weight in weights.items()}
        found = masks_of(
            {name: as_numbers(self._layouts[name].matrix(one)) for name, one in scores.items()},
            self._threshold,
            scope=self._scope,
        )
        return {
            name: self._layouts[name]
            .back(torch.from_numpy(mask), weights[name])
            .contiguous()
            .to(weights[name].device)
            for name, mask in found.items()
        }
