"""Calibration statistics of each weight: gradients, squared gradients, and squared inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import OptionError, warn
from ..names import listed
from . import checkpoints
from .masked import MaskedModel
from .padding import CountedInputs
from .processes import Processes
from .sharded import Sharded, WholeWeights
from .task import CLASSIFY, Data, Model, Progress, Task, evaluating, finite, with_weights
from .weight_selection import Layout, chosen_weights, is_sharded, layout_of, linear_layers

_ROWS = Layout(1)
_SAME_DATA = "give the same data, in the same order, to all"


@dataclass(frozen=True)
class Statistics:
    """The statistics of one weight tensor.

    Attributes:
        gradient: the mean gradient of the loss, float32, the weight's shape.
        fisher: the mean square of the gradient, float32, the weight's shape: the diagonal of the empirical
            Fisher information. The mean is over batches, so small batches approximate it better.
        inputs: the mean square of each input over all positions that are not padding, float32 [inputs]. None
            if the layer is neither an `nn.Linear` nor a transformers ``Conv1D``, or was not called.
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
            ``batches``. If it exists, the computation resumes from it.
        every: the number of batches between checkpoints.
        progress: called after each batch with its number, from 1, and its loss.
        group: a process group of ``torch.distributed`` whose processes share the batches; None means this
            process alone. All processes need the same model, data and arguments; process r computes every
            batch whose number is r modulo their number. All get the same result, the same bits as one process
            alone. The first process writes the checkpoint, all read it.

    Warns: the loss does not depend on a weight; its gradient is then 0.

    A model that ``fully_shard`` divided by rows gives statistics that are sharded alike, by the processes of
    its mesh, with the bits of one process. In each batch all processes need to use the same weights.

    Memory: 8 bytes per weight and the gradients of a few tensors, in addition to a forward and backward pass.
    With several processes, 8 bytes divided by their number until the last batch.

    Raises:
        OptionError: a name is not that of a matrix of the model; there are no data; ``single`` is true and a
            batch has no first dimension to split; or the processes have different data.
        MismatchError: the checkpoint is damaged, or belongs to other tensors or options.
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
    squared = _SquaredInputs(counted, inputs, processes)
    seen = _Seen(weights, squared, {"batches": batches, "single": single}, processes, sharded)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        exists = path.exists()
        processes.require_same(
            exists, f"{path} exists only on some processes; use a folder that all processes share"
        )
        if exists:
            seen.load(path)
            processes.require_same(
                seen.count, f"{path} differs between processes; use a folder that all processes share"
            )
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
                path is not None
                and losses
                and (before // every < seen.count // every or seen.count == batches)
            ):
                seen.save(path)
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
    seen: _Seen,
    counted: CountedInputs,
    processes: Processes,
) -> list[float]:
    """Adds the statistics of the next batch of each process. Returns the losses of these batches."""
    items: list[Any] = []
    losses: list[Tensor] = []

    def forward() -> list[float]:
        items.extend(islice(source, processes.world))
        idle = processes.rank >= len(items)  # at the end, there are fewer batches than processes
        if idle and not (run.together and items):
            return [len(items), 0.0]
        batch = items[0 if idle else processes.rank]
        counted.take(batch, task.unpadded(batch))
        losses.append(task.loss_of(run.begun(), batch))
        if idle:
            return [len(items), 0.0]
        number = seen.count + processes.rank + 1
        return [len(items), finite(losses[0], f"batch {number} of the calibration data")]

    rows = processes.exchanged(forward, 2)
    count = int(rows[0][0])
    if any(row[0] != count for row in rows):
        raise OptionError(f"the processes have different numbers of batches: {_SAME_DATA}")
    if not seen.checked:
        processes.require_same(items[:1], f"the processes have different batches: {_SAME_DATA}")
        seen.checked = True
    seen.begin(idle=processes.rank >= count)
    if losses:
        torch.autograd.backward(losses[0], inputs=run.leaves())
    seen.end()
    return [loss for _, loss in rows[:count]]


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


class _Seen:
    """Running sums over the batches. Each process holds its share of the elements of every tensor.

    Attributes:
        count: the number of batches.
        checked: whether the processes have compared their data.
        inputs: running sums over the inputs of layers.
        used: the names of the weights that had a gradient.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        inputs: _SquaredInputs,
        options: Mapping[str, object],
        processes: Processes,
        sharded: Sharded | None,
    ) -> None:
        self._sharded = sharded
        self._shapes = {name: weight.shape for name, weight in weights.items()}
        shapes = {name: list(shape) for name, shape in self._shapes.items()}
        self._job = {"shapes": shapes, "options": dict(options)}
        self._processes = processes
        # A process has its rows of a sharded weight, and an equal part of the elements of a whole one.
        self._share = {
            name: processes.share_of(w.numel()) if sharded is None else sharded.share_of(name)
            for name, w in weights.items()
        }
        self._sums = {name: torch.zeros(self._share[name], device=w.device) for name, w in weights.items()}
        self._squares = {name: torch.zeros_like(total) for name, total in self._sums.items()}
        self.count, self.checked = 0, False
        self.inputs = inputs
        self.used: set[str] = set()
        # Names of the tensors whose gradient of this batch is not added yet. All processes take them from the
        # end, which is the usual order of a backward pass. `_waiting` has the gradients that are complete,
        # but not yet next in this order.
        self._left: list[str] = []
        self._idle = False
        self._waiting: dict[str, Tensor] = {}

    def begin(self, *, idle: bool) -> None:
        """Begins the backward pass of a batch, which counts as zero if this process is idle."""
        self._left, self._idle = list(self._shapes), idle

    def add(self, name: str, leaf: Tensor) -> None:
        """Adds the gradient of a leaf to the sums in the common order, and releases it."""
        assert leaf.grad is not None
        gradient, leaf.grad = leaf.grad.float(), None
        if self._idle:
            gradient.zero_()
        else:
            self.used.add(name)
        self._waiting[name] = gradient
        if self._processes.world == 1:
            self._add(name)
            return
        while self._left and self._left[-1] in self._waiting:
            self._add(self._left.pop())

    def end(self) -> None:
        """Ends the batch: adds the remaining gradients."""
        if self._processes.world > 1:
            while self._left:
                self._add(self._left.pop())
        self.inputs.end(idle=self._idle)

    def _add(self, name: str) -> None:
        gradient = self._waiting.pop(name, None)
        if gradient is None:
            gradient = torch.zeros(self._shapes[name], device=self._sums[name].device)
        # Batch by batch, so that the sums are the same for any number of processes.
        for row in self._processes.spread(gradient, self._share[name]):
            self._sums[name] += row
            self._squares[name] += row.square()

    def used_by_any(self) -> set[str]:
        """Returns the names of the weights that had a gradient on any process."""
        names = list(self._shapes)
        flags = self._processes.exchanged(lambda: [name in self.used for name in names], len(names))
        return {name for name, row in zip(names, zip(*flags, strict=True), strict=True) if any(row)}

    def statistics(self, layouts: Mapping[str, Layout]) -> dict[str, Statistics]:
        """Returns the means. Releases the sums, so that it can be called only once."""
        out = {}
        for name in self._shapes:
            sums, squares = (self._result(name, shares.pop(name)) for shares in (self._sums, self._squares))
            inputs = self.inputs.mean(name)
            out[name] = Statistics(sums, squares, inputs, layouts[name])
        return out

    def _result(self, name: str, share: Tensor) -> Tensor:
        """Returns the mean: whole, or sharded like the weight."""
        share.div_(self.count)
        if self._sharded is None:
            return self._whole(name, share)
        rows = self._sharded.local(name)
        return self._sharded.like(name, share[: rows.numel()].view(rows.shape))

    def _whole(self, name: str, share: Tensor) -> Tensor:
        shape = self._shapes[name]
        return self._processes.joined(share, shape.numel()).view(shape)

    def save(self, path: Path) -> None:
        """Writes a checkpoint, on the first process."""
        state = {
            "count": self.count,
            "used": sorted(self.used_by_any()),
            "sums": {name: self._whole(name, share) for name, share in self._sums.items()},
            "squares": {name: self._whole(name, share) for name, share in self._squares.items()},
            **self.inputs.state(),
        }
        if self._processes.rank == 0:
            checkpoints.save(path, self._job, state)

    def load(self, path: Path) -> None:
        """Resumes from a checkpoint."""
        state = checkpoints.load(path, self._job)
        self.count, self.used = state["count"], set(state["used"])
        for name, total in self._sums.items():
            total.copy_(self._processes.mine(state["sums"][name], self._share[name]))
            self._squares[name].copy_(self._processes.mine(state["squares"][name], self._share[name]))
        self.inputs.restore(state)


class _SquaredInputs:
    """Running sums of the squared inputs of layers, by weight name."""

    def __init__(self, counted: CountedInputs, zeros: Mapping[str, Tensor], processes: Processes) -> None:
        """Args:
        counted: selects the inputs that are not padding.
        zeros: zeros by weight name, float32 [inputs]; the sums are added to them in place.
        processes: the processes of the run.
        """
        self._counted, self._processes = counted, processes
        self._sums, self._counts = dict(zeros), dict.fromkeys(zeros, 0)
        self._new: dict[str, Tensor] = {}
        self._new_counts: dict[str, int] = {}

    def add(self, name: str, layer: nn.Module, x: Tensor) -> None:
        """Adds the squares of a layer's input ``x``, [..., inputs], to the sums of the batch."""
        flat = self._counted.of(name, layer, x)
        total = flat.square().sum(0)
        self._new[name] = self._new[name] + total if name in self._new else total
        self._new_counts[name] = self._new_counts.get(name, 0) + len(flat)

    def end(self, *, idle: bool) -> None:
        """Ends a batch: adds its sums, on all processes that were not idle, to the running sums."""
        if idle:
            self._new, self._new_counts = {}, {}
        names = list(self._sums)
        counts = self._processes.exchanged(
            lambda: [self._new_counts.get(name, 0) for name in names], len(names)
        )
        for name, given in zip(names, zip(*counts, strict=True), strict=True):
            if any(given):
                new = self._new.get(name)
                new = torch.zeros_like(self._sums[name]) if new is None else new
                self._sums[name] = self._processes.added(self._sums[name], new)
                self._counts[name] += int(sum(given))
        self._new, self._new_counts = {}, {}

    def mean(self, name: str) -> Tensor | None:
        """Returns the mean square of each input; None if the layer was not called."""
        return self._sums[name] / self._counts[name] if self._counts.get(name) else None

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {"input sums": self._sums, "input counts": self._counts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores the state of an earlier run."""
        for name, total in self._sums.items():
            total.copy_(state["input sums"][name])
        self._counts = dict(state["input counts"])


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
