"""Running sums of calibration: gradients, their squares, and squared inputs, each process with its share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import Checkpoint
from .padding import CountedInputs
from .processes import Processes
from .sharded import Sharded
from .weight_selection import Layout

_ROWS = Layout(1)


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


class GradientSums:
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
        inputs: InputSums,
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

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint."""
        state = {
            "count": self.count,
            "used": sorted(self.used_by_any()),
            "sums": {name: self._whole(name, share) for name, share in self._sums.items()},
            "squares": {name: self._whole(name, share) for name, share in self._squares.items()},
            **self.inputs.state(),
        }
        checkpoint.save(self._job, state)

    def load(self, checkpoint: Checkpoint) -> None:
        """Resumes from a checkpoint if it exists.

        Raises:
            MismatchError: the checkpoint is damaged, or belongs to other tensors, options, data or another
                model.
        """
        state = checkpoint.load(self._job)
        if state is None:
            return
        self.count, self.used = state["count"], set(state["used"])
        for name, total in self._sums.items():
            total.copy_(self._processes.mine(state["sums"][name], self._share[name]))
            self._squares[name].copy_(self._processes.mine(state["squares"][name], self._share[name]))
        self.inputs.restore(state)


class InputSums:
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
