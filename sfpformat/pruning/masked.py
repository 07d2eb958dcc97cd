"""Weights masked by scores, used in a model without storing the mask or its gradient.

Theory of operation: a `ScoredWeight` has a score for each weight, the sum of a start and of logits that
layers, rows and columns share. The mask keeps weights whose score is above a threshold. With a pattern, it
keeps those with the greatest scores of each group, whose threshold is halfway to the next lower score. The
forward pass uses the hard mask; the backward pass uses the derivative of sigmoid((score − threshold) /
temperature) (straight-through estimator). Both passes recompute the scores in blocks of rows, and the
gradient of a block is reduced over rows, columns and layer at once. No array of the weight's size is kept
between the passes.

`Masking` is a torch function mode that applies the masks in a model: while it is active, every torch function
gets the masked weight instead of the weight. Linear layers use the backward pass above. Other functions get
the masked weight as a tensor, which they may keep until the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .task import WithWeights, as_matrix

# The parts of a score besides its start, from the most shared one to that of single weights.
LEVELS = ("network", "layer", "row", "column", "weight")

# Weights whose scores are computed at once, with about 16 bytes of working memory each.
_AT_ONCE = {"cpu": 1 << 18}
_AT_ONCE_ELSEWHERE = 1 << 24
_ROWS = 32  # minimum, so that the products of a block are efficient
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes
_COMPARED = 8  # greatest groups whose members are compared pair by pair


@dataclass(frozen=True)
class Groups:
    """The groups of consecutive inputs in which a pattern keeps weights.

    Attributes:
        of: the number of weights in a group.
        stride: the distance of two neighbours of a group in the flat weight.
    """

    of: int
    stride: int

    def kept(self, scores: Tensor, pruned: int) -> tuple[Tensor, Tensor]:
        """Returns which weights are kept, and a threshold between them and the others of their group.

        Args:
            scores: whole groups, float32 of any shape.
            pruned: the number of weights that each group loses, from 0 to ``of`` - 1. Of equal scores, the
                first ones are pruned.

        Returns:
            bool and float32, of the shape of ``scores``; −∞ if none is pruned.
        """
        if not pruned:
            return torch.ones_like(scores, dtype=torch.bool), torch.full_like(scores, -torch.inf)
        groups = scores.reshape(-1, self.of, self.stride)
        if self.of <= _COMPARED:  # each pair is compared: faster than sorting
            below = torch.zeros_like(groups, dtype=torch.int8)  # number of members with lower scores
            for later in range(1, self.of):
                for earlier in range(later):
                    greater = groups[:, earlier] > groups[:, later]
                    below[:, earlier] += greater
                    below[:, later] += ~greater
            kept = below >= pruned
        else:
            kept = torch.ones_like(groups, dtype=torch.bool)
            kept.scatter_(1, groups.argsort(dim=1, stable=True)[:, :pruned], False)
        least = groups.masked_fill(~kept, torch.inf).amin(1, keepdim=True)
        most = groups.masked_fill(kept, -torch.inf).amax(1, keepdim=True)
        threshold = torch.lerp(least, most, 0.5).expand_as(groups)
        return kept.view(scores.shape), threshold.reshape(scores.shape)


def select(values: Tensor, mask: Tensor, out: Tensor) -> None:
    """Writes the values where the mask is −1, and +0 where it is 0.

    Args:
        values: float, of any shape.
        mask: integers, 0 or −1, of this shape.
        out: of the type and the shape of ``values``.
    """
    # Bits, because `torch.where` with a mask of bools takes 7 ns an element on the processor, this 0.5 ns.
    bits = _INTEGERS[values.element_size()]
    torch.bitwise_and(values.view(bits), mask.to(bits), out=out.view(bits))


class ScoredWeight:
    """A weight and the parts of its scores.

    score[r, c] = start[r, c] + network[r, c] + layer + rows[r] + columns[c] + own[r, c]

    Attributes:
        weight: the weight, detached, of rank 2 or more; rows and columns are those of `task.as_matrix`.
        start: float32 [rows, columns].
        network: the shared network's output, float16 [rows, columns], or None without a network. It gets no
            gradient here; the network learns from the gradients of the sample.
        layer: float32 [].
        rows: float32 [rows, 1].
        columns: float32 [1, columns].
        own: float16 or float32 [rows, columns], or None if single weights have no logit. Autograd does not
            know it, so that its gradient can be float32.
        own_gradient: the gradient of ``own``, float32, summed over backward passes; None before the first.
        shares: factors on the parts of the score, by level.
        groups: the groups of a pattern, or None without a pattern.
        threshold: weights with scores above it are kept; with groups, the number that each group loses.
        temperature: temperature of the straight-through estimator, in units of the score.
        shape: the number of rows and of columns of the whole weight.
        first: number of the first row whose start and own logits this object has; 0 if it has those of all.
        sample: positions of the sampled weights in the flat weight, int64 [n], ascending.
        sampled: the gradients of the sample's scores, float32 [n], summed over backward passes until they
            are collected.
    """

    def __init__(
        self,
        weight: Tensor,
        start: Tensor,
        sample: Tensor,
        *,
        own: torch.dtype | None,
        temperature: float,
        groups: Groups | None = None,
    ) -> None:
        self.groups = groups
        self.weight, self.temperature, self.threshold = weight.detach(), temperature, 0.0
        height = weight.shape[0]
        self.shape = height, width = height, weight.numel() // max(height, 1)
        self.start = start.reshape(-1, width)
        self.network: Tensor | None = None
        self.shares = dict.fromkeys(LEVELS, 1.0)
        self.first = 0
        self.sample, self.sampled = sample, torch.zeros(len(sample), device=weight.device)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=weight.device).requires_grad_()

        self.layer, self.rows, self.columns = zeros(), zeros(height, 1), zeros(1, width)
        self.own: Tensor | None = None
        if own is not None:
            self.own = torch.zeros(self.start.shape, dtype=own, device=weight.device)
        self.own_gradient: Tensor | None = None

    def logits(self) -> tuple[Tensor, ...]:
        """Returns the logits of layer, rows and columns, which autograd knows."""
        return self.layer, self.rows, self.columns

    def blocks(self, rows: int | None = None) -> Iterator[slice]:
        """Yields blocks of rows.

        Args:
            rows: the number of rows; None takes that of the whole weight.
        """
        height, width = self.shape
        height = height if rows is None else rows
        step = max(_ROWS, _AT_ONCE.get(self.start.device.type, _AT_ONCE_ELSEWHERE) // max(width, 1))
        if self.groups is not None:  # a block has whole groups, also if they run along the rows
            step = -(-step // self.groups.of) * self.groups.of
        return (slice(start, min(start + step, height)) for start in range(0, height, step))

    def scores(self, block: slice) -> Tensor:
        """Returns the scores of a block of this object's rows, float32 [rows of the block, columns]."""
        share, rows = self.shares, self.rows[self.first + block.start : self.first + block.stop]
        with torch.no_grad():
            out = self.start[block] + (share["layer"] * self.layer + share["row"] * rows)
            out += share["column"] * self.columns
            if self.network is not None and share["network"]:
                out.add_(self.network[block], alpha=share["network"])
            if self.own is not None and share["weight"]:
                out.add_(self.own[block], alpha=share["weight"])
        return out

    def scorer(self) -> Callable[[slice], Tensor]:
        """Returns a function from a block of rows to its scores, which the caller may overwrite."""
        return self.scores

    def kept(self, scores: Tensor) -> Tensor:
        """Returns which weights of a block are kept, from their scores: bool [rows, columns]."""
        if self.groups is None:
            return scores > self.threshold
        return self.groups.kept(scores, int(self.threshold))[0]

    def _gates(self, scores: Tensor) -> Tensor:
        """Returns sigmoid((score − threshold) / temperature) for a block. Overwrites the scores."""
        threshold: Tensor | float = self.threshold
        if self.groups is not None:
            threshold = self.groups.kept(scores, int(self.threshold))[1]
        return scores.sub_(threshold).div_(self.temperature).sigmoid_()

    def sampled_scores(self) -> Tensor:
        """Returns the scores of the sample, float32 [n]."""
        row, column = self.sample // self.shape[1], self.sample % self.shape[1]
        share = self.shares
        with torch.no_grad():
            out = self.start.reshape(-1)[self.sample] + share["layer"] * self.layer
            out += share["row"] * self.rows[self.first + row, 0] + share["column"] * self.columns[0, column]
            if self.network is not None:
                out += share["network"] * self.network.reshape(-1)[self.sample].float()
            if self.own is not None:
                out += share["weight"] * self.own.reshape(-1)[self.sample].float()
        return out

    def masked(self, weight: Tensor | None = None, scores: Callable[[slice], Tensor] | None = None) -> Tensor:
        """Returns a copy of the weight with +0 where it is not kept.

        Args:
            weight: the weight without a mask; None takes the attribute.
            scores: a result of `scorer`; None calls it.
        """
        weight = self.weight if weight is None else weight
        matrix, scores = as_matrix(weight), self.scorer() if scores is None else scores
        out = torch.empty_like(matrix)
        for block in self.blocks():
            select(matrix[block], self._mask(scores(block)), out[block])
        return out.view(weight.shape)

    def _mask(self, scores: Tensor) -> Tensor:
        """Returns integers of a block: all bits are set where weights are kept, else none."""
        if self.groups is not None:
            return self.kept(scores).view(torch.int8).neg_()
        # The sign of threshold − score, which is negative for exactly the scores above the threshold.
        return torch.rsub(scores, self.threshold).view(torch.int32).bitwise_right_shift_(31)

    def gradients(
        self,
        weight: Tensor,
        gradient_of: Callable[[slice], Tensor],
        scores: Callable[[slice], Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Returns the gradients of `logits`; adds others to `own_gradient` and `sampled`.

        Args:
            weight: the weight without a mask.
            gradient_of: block of rows -> the gradient of the masked weight in these rows, [rows, columns].
            scores: a result of `scorer`, which may be overwritten; None calls it.
        """
        matrix, width, scores = as_matrix(weight), self.shape[1], self.scorer() if scores is None else scores
        rows = torch.empty_like(self.rows)
        columns = torch.zeros_like(self.columns)
        if self.own is not None and self.own_gradient is None:
            self.own_gradient = torch.zeros(self.shape, device=self.own.device)
        for block in self.blocks():
            gate = self._gates(scores(block))
            of_mask = (gradient_of(block) * matrix[block]).div_(self.temperature)
            part = torch.ops.aten.sigmoid_backward(of_mask, gate)  # of_mask · gate · (1 − gate), in one pass
            rows[block] = part.sum(1, keepdim=True)
            columns += part.sum(0, keepdim=True)
            if self.own_gradient is not None:
                self.own_gradient[block] += part
            if self.network is None:
                continue
            edges = torch.tensor([block.start * width, block.stop * width], device=self.sample.device)
            first, last = torch.searchsorted(self.sample, edges).tolist()
            self.sampled[first:last] += part.reshape(-1)[self.sample[first:last] - block.start * width]
        return rows.sum(), rows, columns


class _MaskedWeight(torch.autograd.Function):
    """The masked weight as a function of the logits."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scored: ScoredWeight, *logits: Tensor) -> Tensor:
        # Not saved for the backward pass: FSDP releases and restores the storage of a weight it gathered.
        ctx.weight, ctx.scored = weight, scored
        return scored.masked(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        matrix = as_matrix(gradient)
        return (None, None, *ctx.scored.gradients(ctx.weight, lambda block: matrix[block]))


class _MaskedProduct(torch.autograd.Function):
    """The product x wᵀ + b with the masked weight w [out, in]; x w + b with w [in, out] if ``turned``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scored: ScoredWeight,
        turned: bool,
        *logits: Tensor,
    ) -> Tensor:
        ctx.weight, ctx.scored, ctx.turned = weight, scored, turned
        ctx.save_for_backward(x)
        masked = scored.masked(weight)
        return F.linear(x, masked.T if turned else masked, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scored: ScoredWeight = ctx.scored
        (x,) = ctx.saved_tensors
        outer = gradient.flatten(0, -2) if gradient.dim() > 1 else gradient[None]
        inner = x.flatten(0, -2) if x.dim() > 1 else x[None]
        of_x = of_bias = None
        scores = scored.scorer()
        if ctx.needs_input_grad[0]:
            masked = scored.masked(ctx.weight, scores)
            of_x = gradient @ (masked.T if ctx.turned else masked)
        if ctx.needs_input_grad[2]:
            of_bias = outer.sum(0)
        left, right = (inner, outer) if ctx.turned else (outer, inner)
        logits = scored.gradients(ctx.weight, lambda block: left[:, block].T @ right, scores)
        return (of_x, None, of_bias, None, None, *logits)


# Methods and attributes that do not read a tensor's values.
_ABOUT = {
    *("__len__", "__hash__", "__repr__", "data_ptr", "dim", "element_size", "get_device", "is_complex"),
    *("is_contiguous", "is_floating_point", "is_pinned", "is_signed", "ndimension", "nelement", "numel"),
    *("requires_grad_", "size", "storage_offset", "stride", "untyped_storage"),
}
_ATTRIBUTES = ("__get__", "__set__", "__delete__")
_tensor: Any = Tensor
_VIEWS = tuple(getattr(_tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data"))
# Annotated here, because torch's functions have no types.
_masked_weight: Any = _MaskedWeight.apply
_masked_product: Any = _MaskedProduct.apply


def about_values(func: Any) -> bool:
    """Returns whether a torch function may read its tensors' values."""
    name = getattr(func, "__name__", "")
    return not (name in _ABOUT or (name in _ATTRIBUTES and func not in _VIEWS))


class Masking(TorchFunctionMode):
    """Context manager in which torch functions get the masked weights of a model.

    Attributes:
        used: the names of the weights that were used since its creation.
    """

    def __init__(self, weights: Mapping[str, Tensor], scored: Mapping[str, ScoredWeight]) -> None:
        """Args:
        weights: the model's own parameters, by name.
        scored: the scored weights, by the same names.
        """
        super().__init__()
        self._scored = {id(weights[name]): (name, part) for name, part in scored.items()}
        self._weights = dict(weights)  # keeps them alive, so that their ids stay unique
        self.used: set[str] = set()

    def _find(self, value: object) -> ScoredWeight | None:
        found = self._scored.get(id(value))
        if found is None:
            return None
        self.used.add(found[0])
        return found[1]

    def _masked(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            found = self._find(value)
            return value if found is None else _masked_weight(value.detach(), found, *found.logits())
        if type(value) in (tuple, list):
            return type(value)(self._masked(part) for part in value)
        return value

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls a torch function with the weights in its arguments replaced by masked ones."""
        named = kwargs or {}
        if not about_values(func):
            return func(*args, **named)
        product = _product_of(func, args, named)
        if product is not None and not torch.is_autocast_enabled(product[0].device.type):
            x, bias, weight, turned = product
            found = self._find(weight)
            if found is not None:
                return _masked_product(x, weight.detach(), bias, found, turned, *found.logits())
        args = self._masked(args)
        named = {key: self._masked(value) for key, value in named.items()}
        return func(*args, **named)


@dataclass(frozen=True)
class MaskedModel(WithWeights):
    """A model as a function, with masked weights.

    Attributes:
        masking: the context that masks its weights.
    """

    masking: TorchFunctionMode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.masking:
            return self.module(*args, **kwargs)


def _product_of(
    func: Any, args: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None, Any, bool] | None:
    """Returns input, bias, weight and whether it is [in, out] for a linear layer's product; else None."""
    if func is F.linear:
        words = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(named)
        if set(words) <= {"input", "weight", "bias"} and isinstance(words.get("input"), Tensor):
            return words["input"], words.get("bias"), words.get("weight"), False
    # transformers' Conv1D calls addmm.
    if func is torch.addmm and len(args) == 3 and not named and isinstance(args[1], Tensor):
        bias, x, weight = args
        if isinstance(bias, Tensor) and bias.dim() == 1:
            return x, bias, weight, True
    return None
