"""Calibration statistics of each weight: gradients, squared gradients, and squared inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import OptionError, warn
from ..names import listed
from .calibration_sums import GradientSums, InputSums, Statistics
from .checkpoints import Checkpoint
from .identity import identified, of_model
from .masked import MaskedModel
from .padding import CountedInputs
from .processes import Processes
from .sharded import Sharded, WholeWeights
from .task import CLASSIFY, Data, Model, Progress, Task, evaluating, finite, with_weights
from .weight_selection import chosen_weights, is_sharded, layout_of, linear_layers

_SAME_DATA = "give the same data, in the same order, to all"


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
    resumed: Callable[[int], None] = lambda batches: None,
    group: Any = None,
) -> dict[str, Statistics]:
    """Computes statistics of the prunable weights from calibration batches. The model is unchanged.

    Example: ``importances = fisher(model, statistics(model, batches))``.

    Args:
        model: any module; run in evaluation mode.
        data: calibration batches, iterated once.
        task: runs the model and computes the loss.
        batches: the maximum number of batches; with ``single``, of examples.
        tensors: names of parameters; None takes `weight_selection.prunable`.
        single: whether to treat each example of a batch as a batch of its own. The mean squared gradient is
            then closer to the Fisher information, but takes longer to compute.
        checkpoint: a file that is written atomically every ``every`` batches and after the last of
            ``batches``. If it exists, the computation resumes from it. It contains a checksum of the model,
            of the first 8 batches, and of all batches if ``data`` is a list or a tuple. A loader that
            shuffles needs a generator with a seed, or its batches differ from those of the checkpoint.
        every: the number of batches between checkpoints.
        progress: called after each batch with its number, from 1, and its loss.
        resumed: called if the computation resumes from a checkpoint, with the number of batches done.
        group: a process group of ``torch.distributed`` whose processes share the batches; None means this
            process alone. All processes need the same model, data and arguments; process r computes every
            batch whose number is r modulo their number. All get the same result, the same bits as one process
            alone. The first process writes the checkpoint, all read it.

    Warns: the loss does not depend on a weight; its gradient is then 0. An earlier version wrote the
    checkpoint, without checksums.

    A model that ``fully_shard`` divided by rows gives statistics that are sharded alike, by the processes of
    its mesh, with the bits of one process. In each batch all processes need to use the same weights.

    Memory: 8 bytes per weight and the gradients of a few tensors, in addition to a forward and backward pass.
    With several processes, 8 bytes divided by their number until the last batch.

    Raises:
        OptionError: a name is not that of a matrix of the model; there are no data; ``single`` is true and a
            batch has no first dimension to split; the processes have different data; or the folder of the
            checkpoint does not exist.
        MismatchError: the checkpoint is damaged, or belongs to other tensors, options, data or another model.
        LossError: the loss of a batch is not finite.
        ProcessError: another process failed or is gone.
    """
    if not isinstance(batches, int) or batches < 1:
        raise OptionError(f"batches is {batches!r}, must be a whole number of at least 1")
    sharded = Sharded(model, tensors, group) if is_sharded(model) else None
    weights = sharded.weights if sharded is not None else chosen_weights(model, tensors)
    if sharded is None:
        processes = Processes(group, next(iter(weights.values())).device)
    else:
        processes = sharded.processes
    counted = CountedInputs(model)
    layouts = {name: layout_of(model, name) for name in weights}
    layers = linear_layers(model, weights)
    inputs = {
        name: torch.zeros(weights[name].shape[layouts[name].inputs], device=weights[name].device)
        for name, _ in layers
    }
    squared = InputSums(counted, inputs, processes)
    seen = GradientSums(weights, squared, {"batches": batches, "single": single}, processes, sharded)
    kept = None if checkpoint is None else Checkpoint(Path(checkpoint), processes, "count")
    if kept is not None:
        data, identity = processes.agreed(lambda: identified(data))
        kept.belongs_to(lambda: {**of_model(model), **identity})
        seen.load(kept)
        if seen.count:
            resumed(seen.count)
    run: _Run = _Whole(model, weights, seen.add) if sharded is None else _Gathered(model, weights, seen.add)
    source = islice(chain.from_iterable(map(examples_of, data)) if single else iter(data), batches)
    for _ in islice(source, seen.count):  # batches before the checkpoint
        pass
    with evaluating(model), counted.watching(), watched(layers, seen.inputs.add):
        while seen.count < batches:
            losses = _round(run, task, source, seen, counted, processes)
            for number, loss in enumerate(losses, seen.count + 1):
                progress(number, loss)
            before, seen.count = seen.count, seen.count + len(losses)
            if (
                kept is not None
                and losses
                and (before // every < seen.count // every or seen.count == batches)
            ):
                seen.save(kept)
            if len(losses) < processes.world:
                break
    if not seen.count:
        raise OptionError("the data contain no batches")
    unused = [name for name in weights if name not in seen.used_by_any()]
    if unused:
        warn(
            f"with the calibration data, the loss does not depend on {listed(unused)}: the gradients of "
            "these tensors are 0"
        )
    return seen.statistics(layouts)


class _Run(Protocol):
    """A model with leaves in place of its weights.

    Attributes:
        together: whether all processes must run it at the same time.
    """

    together: bool

    def begun(self) -> Model:
        """Begins a batch, and returns the model."""

    def leaves(self) -> list[Tensor]:
        """Returns the leaves that the batch may have used."""


class _Whole:
    """A model whose weights are whole."""

    together = False

    def __init__(
        self, model: nn.Module, weights: Mapping[str, Tensor], seen: Callable[[str, Tensor], None]
    ) -> None:
        self._leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        self._model = with_weights(model, self._leaves)
        for name, leaf in self._leaves.items():
            untyped: Any = leaf
            untyped.register_post_accumulate_grad_hook(partial(seen, name))

    def begun(self) -> Model:
        return self._model

    def leaves(self) -> list[Tensor]:
        return list(self._leaves.values())


class _Gathered:
    """A model whose weights are sharded, and gathered while a layer needs them."""

    together = True

    def __init__(
        self, model: nn.Module, weights: Mapping[str, Tensor], seen: Callable[[str, Tensor], None]
    ) -> None:
        self._whole = WholeWeights(model, weights, seen)
        self._model = MaskedModel(model, {}, self._whole)

    def begun(self) -> Model:
        self._whole.begin()
        return self._model

    def leaves(self) -> list[Tensor]:
        return list(self._whole.leaves.values())


def _round(
    run: _Run,
    task: Task,
    source: Iterator[Any],
    seen: GradientSums,
    counted: CountedInputs,
    processes: Processes,
) -> list[float]:
    """Adds the statistics of the next batch of each process. Returns the losses of these batches."""
    items: list[Any] = []
    losses: list[Tensor] = []

    def take() -> list[float]:
        items.extend(islice(source, processes.world))
        return [len(items)]

    def forward() -> list[float]:
        idle = processes.rank >= len(items)  # at the end, there are fewer batches than processes
        if idle and not (run.together and items):
            return [0.0]
        batch = items[0 if idle else processes.rank]
        counted.take(batch, task.unpadded(batch))
        losses.append(task.loss_of(run.begun(), batch))
        if idle:
            return [0.0]
        number = seen.count + processes.rank + 1
        return [finite(losses[0], f"batch {number} of the calibration data")]

    # First the batches, so that an error in the data of one process finds no other in the model, where
    # sharded weights need all of them.
    taken = processes.exchanged(take, 1)
    count = int(taken[0][0])
    if any(row[0] != count for row in taken):
        raise OptionError(f"the processes have different numbers of batches: {_SAME_DATA}")
    if not seen.checked:
        processes.require_same(items[:1], f"the processes have different batches: {_SAME_DATA}")
        seen.checked = True
    rows = processes.exchanged(forward, 1)
    seen.begin(idle=processes.rank >= count)
    if losses:
        torch.autograd.backward(losses[0], inputs=run.leaves())
    seen.end()
    return [loss for (loss,) in rows[:count]]


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
            "a batch cannot be split into examples: it must be a tensor, or a mapping, tuple or list of "
            "tensors with the same first dimension; or give batches of one example, without single"
        )
    for i in range(sizes.pop()):
        parts = [v[i : i + 1] if isinstance(v, Tensor) and v.dim() else v for v in values]
        if isinstance(batch, Mapping):
            yield dict(zip(batch, parts, strict=True))
        else:
            yield parts if isinstance(batch, list) else tuple(parts)


def _is_batch(values: object) -> bool:
    return isinstance(values, (tuple, list))


@contextmanager
def watched(
    layers: Iterable[tuple[str, nn.Module]], see: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """Context in which each call of a layer first calls ``see`` with the weight's name, layer and input."""
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
