"""What calibration data say about each weight: gradients, their squares, and the inputs it multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import warn
from ..names import listed
from .layers import Layout, chosen_weights, layout_of, linear_layers
from .padding import CountedInputs
from .task import CLASSIFY, Data, Task, evaluating, finite, first, with_weights

_ROWS = Layout(1)


@dataclass(frozen=True)
class Statistics:
    """Of one weight tensor.

    Attributes:
        gradient: the mean gradient of the loss, float32, the weight's shape.
        fisher: the mean square of the gradient, float32, the weight's shape: the diagonal of the empirical
            Fisher information, the mean taken over batches, so that small batches are nearer to it.
        inputs: the mean square of each input, padding left out, float32 [inputs]; None where the weight is
            not that of an `nn.Linear` or of a ``Conv1D`` of transformers that was called.
        layout: where the weight's inputs are.
    """

    gradient: Tensor
    fisher: Tensor
    inputs: Tensor | None
    layout: Layout = _ROWS


def statistics(
    model: nn.Module,
    data: Data,
    *,
    task: Task = CLASSIFY,
    batches: int = 64,
    tensors: Sequence[str] | None = None,
) -> dict[str, Statistics]:
    """Statistics of the weights to be pruned, from some batches; the model stays as it is.

    Args:
        model: any module.
        data: batches, gone through from the start.
        task: how a batch goes through the model.
        batches: how many are looked at; begins again where there are fewer.
        tensors: names of parameters; None takes `layers.prunable`.

    Warns: the loss does not depend on a weight, whose gradient is then 0.

    Memory: 12 bytes a weight beyond what a step of training needs without an optimiser.

    Raises:
        OptionError: a name is no matrix of the model; there are no data.
        LossError: the loss of a batch is not finite.
    """
    weights = chosen_weights(model, tensors)
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    used: set[str] = set()
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    squares = {name: torch.zeros_like(total) for name, total in sums.items()}
    counted = CountedInputs(model)
    inputs = _SquaredInputs(counted)
    with evaluating(model), counted.watching(), watched(linear_layers(model, weights), inputs.add):
        for number, batch in enumerate(first(data, batches), 1):
            counted.take(batch, task.unpadded(batch))
            loss = task.loss_of(with_weights(model, leaves), batch)
            finite(loss, f"batch {number} of the calibration data")
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    used.add(name)
                    sums[name] += gradient
                    squares[name] += gradient.float().square()
    unused = [name for name in weights if name not in used]
    if unused:
        warn(f"the loss depends on none of {listed(unused)} in the calibration data: their gradients are 0")
    return {
        name: Statistics(
            sums[name] / batches, squares[name] / batches, inputs.mean(name), layout_of(model, name)
        )
        for name in weights
    }


class _SquaredInputs:
    """Running sums over the inputs of layers, by name."""

    def __init__(self, counted: CountedInputs) -> None:
        self._counted = counted
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, layer: nn.Module, x: Tensor) -> None:
        flat = self._counted.of(name, layer, x)
        total = flat.square().sum(0)
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + len(flat)

    def mean(self, name: str) -> Tensor | None:
        return self.sums[name] / self.counts[name] if self.counts.get(name) else None


@contextmanager
def watched(layers: Mapping[str, nn.Module], see: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """While it lasts, ``see`` gets the weight's name, the layer and the inputs of each call of a layer."""
    handles = [
        layer.register_forward_pre_hook(partial(_show, see, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _show(
    see: Callable[[str, nn.Module, Tensor], None],
    name: str,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    see(name, layer, args[0] if args else next(iter(kwargs.values())))
