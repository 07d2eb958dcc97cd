"""Sums of gradients over the batches of a step, on all processes.

Rules: the batches of a step have an order: batch i of process 0, of process 1, …, then batch i + 1 of process
0. Gradients are added in this order, one batch at a time, so that the sum has the same bits for every number
of processes. The logits of the single weights of a tensor are updated as soon as their gradient is complete.
With one batch per process, only one such gradient therefore exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .masked import ScoredWeight
from .processes import Processes
from .sharded_masking import ShardedWeight


class Accumulation:
    """The gradients of a step in progress."""

    def __init__(
        self, parts: Sequence[ScoredWeight], processes: Processes, ready: Callable[[int, Tensor], None]
    ) -> None:
        """Args:
        parts: the scored weights.
        processes: the processes of the run.
        ready: called with the index of a tensor in ``parts`` and the mean gradient of its weights' logits,
            float32 [rows, columns], during the backward pass of a step's last batch. Of a sharded weight it
            is that of this process's rows.
        """
        self._parts, self._processes, self._ready = list(parts), processes, ready
        self._shared: Tensor | None = None
        self._own: dict[int, Tensor] = {}
        self._batches, self._last = 0, True
        # Indices of the tensors whose gradient of this batch is not added yet. All processes take them from
        # the end, which is the usual order of a backward pass.
        self._left: list[int] = []
        self._complete: set[int] = set()
        for place, part in enumerate(self._parts):
            untyped: Any = part.rows  # its hook runs once a backward pass, after all uses of the weight
            untyped.register_post_accumulate_grad_hook(partial(self._seen, place))

    def begin(self, *, last: bool) -> None:
        """Begins a batch. ``last`` says whether it is the last one of the step."""
        self._batches += 1
        self._last = last
        self._left = [place for place, part in enumerate(self._parts) if part.own is not None]
        self._complete = set()

    def end(self) -> None:
        """Ends a batch: adds the remaining gradients of single weights, and those of the shared logits."""
        with torch.no_grad():
            while self._left:
                self._add_own(self._left.pop())
            leaves = [leaf for part in self._parts for leaf in part.logits()]
            flat = torch.cat([_gradient(leaf).reshape(-1) for leaf in leaves])
            self._shared = self._processes.added(self._shared, flat)
            for leaf in leaves:
                leaf.grad = None
            if self._last:
                mean = self._shared / self.divisor if self.divisor > 1 else self._shared
                sizes = [leaf.numel() for leaf in leaves]
                for leaf, gradient in zip(leaves, torch.split(mean, sizes), strict=True):
                    leaf.grad = gradient.view(leaf.shape)
                self._shared, self._batches = None, 0

    @property
    def divisor(self) -> int:
        """The number of batches of the step so far, on all processes."""
        return self._batches * self._processes.world

    def _seen(self, place: int, leaf: Tensor) -> None:
        """Adds the gradients that are complete on this process, in the order that all processes share."""
        if self._processes.world == 1:
            if place in self._left:
                self._left.remove(place)
                self._add_own(place)
            return
        self._complete.add(place)
        while self._left and self._left[-1] in self._complete:
            self._add_own(self._left.pop())

    @torch.no_grad()
    def _add_own(self, place: int) -> None:
        part = self._parts[place]
        assert part.own is not None
        new, part.own_gradient = part.own_gradient, None
        if new is None:
            new = torch.zeros(part.shape, device=part.own.device)
        total = self._own.pop(place, None)
        if isinstance(part, ShardedWeight):
            total = self._added_rows(part, total, new)
        else:
            total = self._processes.added(total, new)
        if self._last:
            self._ready(place, total.div_(self.divisor) if self.divisor > 1 else total)
        else:
            self._own[place] = total

    def _added_rows(self, part: ShardedWeight, total: Tensor | None, new: Tensor) -> Tensor:
        """Adds a gradient of all processes to the total of this process's rows, in the order of processes."""
        for row in self._processes.spread(new, part.share):
            mine = row[: part.start.numel()].view(part.start.shape)
            total = mine.clone() if total is None else total.add_(mine)
        assert total is not None
        return total


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
