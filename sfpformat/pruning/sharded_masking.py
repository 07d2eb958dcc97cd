"""Masked weights in a model that ``torch.distributed.fsdp.fully_shard`` divided among processes.

Theory of operation: a process has the starts, the logits and the moments of its rows of each weight, and all
have the logits of layers, rows and columns. While FSDP has gathered a whole weight for a layer, the processes
also gather its mask (1 byte a weight) for the products and its scores (4 bytes) for the gradients, one tensor
at a time. So each process computes what a process with whole weights does, in the same order, and gets the
same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .masked import Groups, Masking, ScoredWeight, select
from .sharded import GatheredNames, Sharded
from .task import as_matrix


class ShardedWeight(ScoredWeight):
    """A weight whose rows are divided among processes, and the parts of its scores.

    The start, the logits of single weights and the sample are those of this process's rows; their gradient is
    that of the whole weight on this process's batch.

    Attributes:
        share: the number of elements of a process's share; the last ones may have fewer.
    """

    def __init__(
        self,
        sharded: Sharded,
        name: str,
        start: Tensor,
        sample: Tensor,
        *,
        own: torch.dtype | None,
        temperature: float,
        groups: Groups | None = None,
    ) -> None:
        """Args:
        sharded: the sharded weights.
        name: name of the weight.
        start: this process's rows of the standardised start.
        sample: positions in the whole flat weight.
        own, temperature, groups: as in `ScoredWeight`.
        """
        weight, rows = sharded.weights[name], sharded.local(name)
        first = sharded.first_row(name) * (weight.numel() // weight.shape[0])
        of_rows = sample[(sample >= first) & (sample < first + rows.numel())] - first
        super().__init__(weight, start, of_rows, own=own, temperature=temperature, groups=groups)
        self.first = sharded.first_row(name)
        self.share = sharded.share_of(name)
        self._sharded, self._name = sharded, name

    def scorer(self) -> Callable[[slice], Tensor]:
        """Gathers the scores of the whole weight. All processes call it together."""
        scores = torch.empty_like(self.start)
        for block in self.blocks(len(scores)):
            scores[block] = self.scores(block)
        return self._gathered(scores).__getitem__

    def masked(self, weight: Tensor | None = None, scores: Callable[[slice], Tensor] | None = None) -> Tensor:
        """Returns a copy of the whole weight with +0 where it is not kept. All processes call it together.

        Args:
            weight: the weight, gathered by FSDP.
            scores: a result of `scorer`; None gathers the masks, which are smaller.
        """
        assert weight is not None
        # Groups may run through the rows of several processes.
        divided = self.groups is not None and self.shape[1] % (self.groups.of * self.groups.stride)
        if divided or scores is not None:
            return super().masked(weight, scores)
        kept = torch.empty_like(self.start, dtype=torch.uint8)
        for block in self.blocks(len(kept)):
            kept[block] = self.kept(self.scores(block))
        matrix = as_matrix(weight)
        out = torch.empty_like(matrix)
        select(matrix, self._gathered(kept).view(torch.int8).neg_(), out)
        return out.view(weight.shape)

    def _gathered(self, rows: Tensor) -> Tensor:
        return as_matrix(self._sharded.whole(self._name, rows))


def masking_of(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    scored: Mapping[str, ScoredWeight],
    sharded: Sharded | None,
) -> Masking:
    """Returns the context that masks the weights of a model, whole or sharded ones."""
    return Masking(weights, scored) if sharded is None else ShardedMasking(model, scored)


class ShardedMasking(Masking):
    """Context manager in which torch functions get masked weights in place of those that FSDP gathered."""

    def __init__(self, model: nn.Module, scored: Mapping[str, ScoredWeight]) -> None:
        """Args:
        model: a model after ``fully_shard``.
        scored: the scored weights, by name.
        """
        super().__init__({}, {})
        self._by_name = dict(scored)
        self._names = GatheredNames(model, scored)

    def __enter__(self) -> Any:
        self._names.forget()
        untyped: Any = super()
        return untyped.__enter__()

    def _find(self, value: object) -> ScoredWeight | None:
        name = self._names.of(value)
        if name is None:
            return None
        self.used.add(name)
        return self._by_name[name]
