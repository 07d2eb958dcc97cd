"""Calibration statistics of each weight: gradients, squared gradients, and squared inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, warn
from ..names import listed
from . import checkpoints
from .layers import Layout, chosen_weights, layout_of, linear_layers
from .padding import CountedInputs
from .task import CLASSIFY, Data, Progress, Task, evaluating, finite, with_weights

_ROWS = Layout(1)


@dataclass(frozen=True)
class Statistics:
    """The statistics of one weight tensor.

    Attributes:
        gradient: the mean gradient of the loss, float32, the weight's shape.
        fisher: the mean square of the gradient, float32, the weight's shape: the diagonal of the empirical
            Fisher information. The mean is over batches, so small batches approximate it better.
        inputs: the mean square of each input without padding, float32 [inputs]. None unless the weight is
            that of an `nn.Linear` or a transformers ``Conv1D`` that was called.
        layout: the dimension of the weight's inputs.
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
    single: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 16,
    progress: Progress = lambda batch, loss: None,
) -> dict[str, Statistics]:
    """Computes statistics of the prunable weights from calibration batches. The model is unchanged.

    Args:
        model: any module; run in evaluation mode.
        data: calibration batches, iterated once.
        task: runs the model and computes the loss.
        batches: the maximum number of batches; with ``single``, of examples.
        tensors: names of parameters; None takes `layers.prunable`.
        single: whether each example of a batch is a batch of its own. The mean squared gradient is then
            closer to the Fisher information, but takes longer to compute.
        checkpoint: a file that is written atomically every ``every`` batches and after the last of
            ``batches``. If it exists, the computation resumes from it.
        every: the number of batches between checkpoints.
        progress: called after each batch with its number, from 1, and its loss.

    Warns: the loss does not depend on a weight; its gradient is then 0.

    Memory: 8 bytes a weight and the gradients of a few tensors, in addition to a forward and backward pass.

    Raises:
        OptionError: a name is not a matrix of the model; there are no data; or ``single`` is true and a batch
            has no first dimension to split.
        MismatchError: the checkpoint is damaged, or of other tensors or options.
        LossError: the loss of a batch is not finite.
    """
    weights = chosen_weights(model, tensors)
    if not isinstance(batches, int) or batches < 1:
        raise OptionError(f"batches is {batches!r}, must be a whole number of at least 1")
    counted = CountedInputs(model)
    seen = _Seen(weights, counted, {"batches": batches, "single": single})
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        seen.load(path)
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    for name, leaf in leaves.items():
        untyped: Any = leaf
        untyped.register_post_accumulate_grad_hook(partial(seen.add, name))
    source = chain.from_iterable(map(examples_of, data)) if single else iter(data)
    layers = linear_layers(model, weights)
    with evaluating(model), counted.watching(), watched(layers, seen.inputs.add):
        for batch in islice(source, seen.count, batches):
            counted.take(batch, task.unpadded(batch))
            loss = task.loss_of(with_weights(model, leaves), batch)
            value = finite(loss, f"batch {seen.count + 1} of the calibration data")
            torch.autograd.backward(loss, inputs=list(leaves.values()))
            seen.count += 1
            progress(seen.count, value)
            if path is not None and (seen.count % every == 0 or seen.count == batches):
                seen.save(path)
    if not seen.count:
        raise OptionError("the data have no batch")
    unused = [name for name in weights if name not in seen.used]
    if unused:
        warn(f"the loss depends on none of {listed(unused)} in the calibration data: their gradients are 0")
    return seen.statistics({name: layout_of(model, name) for name in weights})


def examples_of(batch: Any) -> Iterator[Any]:
    """Yields the examples of a batch as batches of size 1: slices along the first dimension.

    Args:
        batch: a tensor, or a mapping, tuple or list whose tensors have the same first dimension. Scalars and
            values that are not tensors are repeated in each example.

    Raises:
        OptionError: the batch has another type, or first dimensions differ.
    """
    if isinstance(batch, Tensor):
        yield from torch.split(batch, 1)
        return
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    sizes = {len(v) for v in values if isinstance(v, Tensor) and v.dim()} if _is_batch(values) else set()
    if len(sizes) != 1:
        raise OptionError(
            "a batch cannot be split into examples: it is no tensor, and no mapping, tuple or list of "
            "tensors with the same first dimension; give batches of one example, without single"
        )
    for i in range(sizes.pop()):
        parts = [v[i : i + 1] if isinstance(v, Tensor) and v.dim() else v for v in values]
        if isinstance(batch, Mapping):
            yield dict(zip(batch, parts, strict=True))
        else:
            yield parts if isinstance(batch, list) else tuple(parts)


def _is_batch(values: object) -> bool:
    return isinstance(values, (tuple, list))


class _Seen:
    """Running sums over the batches.

    Attributes:
        count: the number of batches.
        inputs: running sums over the inputs of layers.
        used: the names of the weights that had a gradient.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], counted: CountedInputs, options: Mapping[str, object]
    ) -> None:
        shapes = {name: list(weight.shape) for name, weight in weights.items()}
        self._job = {"shapes": shapes, "options": dict(options)}
        self._sums = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
        self._squares = {name: torch.zeros_like(total) for name, total in self._sums.items()}
        self.count, self.inputs = 0, _SquaredInputs(counted)
        self.used: set[str] = set()

    def add(self, name: str, leaf: Tensor) -> None:
        """Adds the gradient of a leaf to the sums, and releases it."""
        assert leaf.grad is not None
        self.used.add(name)
        gradient = leaf.grad.float()
        self._sums[name] += gradient
        self._squares[name].addcmul_(gradient, gradient)
        leaf.grad = None

    def statistics(self, layouts: Mapping[str, Layout]) -> dict[str, Statistics]:
        """Returns the means. Divides the sums in place, so they cannot be used afterwards."""
        return {
            name: Statistics(
                total.div_(self.count),
                self._squares[name].div_(self.count),
                self.inputs.mean(name),
                layouts[name],
            )
            for name, total in self._sums.items()
        }

    def save(self, path: Path) -> None:
        state = {
            "count": self.count,
            "used": sorted(self.used),
            "sums": self._sums,
            "squares": self._squares,
            "input sums": self.inputs.sums,
            "input counts": self.inputs.counts,
        }
        checkpoints.save(path, self._job, state)

    def load(self, path: Path) -> None:
        state = checkpoints.load(path, self._job)
        self.count, self.used = state["count"], set(state["used"])
        for name, total in self._sums.items():
            total.copy_(state["sums"][name])
            self._squares[name].copy_(state["squares"][name])
        device = next(iter(self._sums.values())).device
        self.inputs.sums = {name: total.to(device) for name, total in state["input sums"].items()}
        self.inputs.counts = dict(state["input counts"])


class _SquaredInputs:
    """Running sums of the squared inputs of layers, by weight name."""

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
def watched(
    layers: Iterable[tuple[str, nn.Module]], see: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """Context with a forward pre-hook: each call of a layer calls ``see`` with weight name, layer, input."""
    handles = [
        layer.register_forward_pre_hook(partial(_show, see, name), with_kwargs=True) for name, layer in layers
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
