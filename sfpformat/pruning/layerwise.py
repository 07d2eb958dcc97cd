"""Prunes layer by layer with Wanda or SparseGPT; each layer's inputs come from the layers pruned before it.

Theory of operation: layers are pruned in the order in which the model calls them. Layers with the same input
tensor (such as query, key and value) form a group. For each group the calibration batches run through the
model pruned so far, up to the group, where the forward pass is stopped; H = 2/n Σ x xᵀ of the group's inputs
is summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, warn
from ..names import listed
from .calibration import watched
from .layers import chosen_weights, layout_of, linear_layers
from .padding import CountedInputs
from .scores import rows_mask
from .task import CLASSIFY, Data, Task, evaluating, first, with_weights
from .thresholds import require_share

BLOCK = 128  # columns for which SparseGPT selects the mask together
DAMPING = 0.01  # added to H's diagonal, as a share of its mean


@dataclass(frozen=True)
class LayerwiseResult:
    """The result of `prune_layerwise`.

    Attributes:
        masks: bool by name, True for survivors.
        weights: pruned weights by name, in the weight's dtype; SparseGPT may have updated the survivors.
    """

    masks: dict[str, Tensor]
    weights: dict[str, Tensor]


class _Reached(Exception):
    """Raised by a hook to stop the forward pass once the group's inputs are known."""


def prune_layerwise(
    model: nn.Module,
    data: Data,
    sparsity: float,
    method: str,
    *,
    task: Task = CLASSIFY,
    batches: int = 64,
    tensors: Sequence[str] | None = None,
) -> LayerwiseResult:
    """Prunes layer by layer. The model is unchanged.

    Args:
        model: any module. Only weights of `nn.Linear` and transformers' ``Conv1D`` are pruned.
        data: batches; the first ``batches`` are the calibration data.
        sparsity: the pruned share of each layer; with ``wanda``, of each row.
        method: ``wanda``, ``sparsegpt`` (SparseGPT's mask, survivors unchanged, also for later layers) or
            ``sparsegpt-updated`` (survivors updated to compensate for the pruned weights).
        task: runs the model on a batch.
        batches: number of calibration batches; ``data`` repeats if it has fewer.
        tensors: names of parameters. None takes the weights of linear layers among `layers.prunable`, and
            warns of the others.

    Raises:
        OptionError: a named tensor is not the weight of a linear layer that is called; there is nothing to
            prune; all inputs of a layer are padding; or the method or sparsity is invalid.
    """
    require_share("sparsity", sparsity)
    if method not in ("wanda", "sparsegpt", "sparsegpt-updated"):
        raise OptionError(f"method is {method!r}, must be wanda, sparsegpt or sparsegpt-updated")
    weights = chosen_weights(model, tensors)
    masks: dict[str, Tensor] = {}
    calibration = list(first(data, batches))
    with evaluating(model), torch.no_grad():
        groups, uncalled = _groups(model, weights, calibration[0], task)
        if uncalled:
            words = f"{listed(uncalled)}: not the weights of linear layers that are called"
            if tensors is not None or not groups:
                raise OptionError(words)
            warn(f"{words}, left as they are")
        for group in groups:
            hessian = _hessian(model, weights, group[0], calibration, task)
            for name in group:
                layout, weight = layout_of(model, name), weights[name]
                mask, updated = _pruned(layout.matrix(weight), hessian, sparsity, method)
                masks[name] = layout.back(mask, weight).contiguous()
                weights[name] = layout.back(updated, weight).to(weight.dtype).contiguous()
    return LayerwiseResult(masks, {name: weights[name] for name in masks})


def _groups(
    model: nn.Module, weights: dict[str, Tensor], batch: Any, task: Task
) -> tuple[list[list[str]], list[str]]:
    """Returns groups of names with the same input tensor, in call order, and the uncalled names."""
    seen: list[tuple[Tensor, list[str]]] = []
    called: set[str] = set()

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        if name not in called:
            called.add(name)
            if not seen or seen[-1][0] is not x:
                seen.append((x, []))
            seen[-1][1].append(name)

    with watched(linear_layers(model, weights), see):
        task.run(model, batch)
    return [names for _, names in seen], [name for name in weights if name not in called]


def _hessian(
    model: nn.Module, weights: dict[str, Tensor], name: str, calibration: list[Any], task: Task
) -> Tensor:
    """Returns 2/n Σ x xᵀ of a layer's inputs without padding, float32 [inputs, inputs]."""
    columns = layout_of(model, name).matrix(weights[name]).shape[1]
    total = torch.zeros(columns, columns, device=weights[name].device)
    count = 0
    counted = CountedInputs(model)
    layers = linear_layers(model, [name])
    awaited: set[nn.Module] = set()  # layers of the weight that are not called yet in this batch

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        nonlocal count
        if layer not in awaited:
            return
        awaited.remove(layer)
        flat = counted.of(name, layer, x)
        total.addmm_(flat.T, flat)
        count += len(flat)
        if not awaited:
            raise _Reached

    with counted.watching(), watched(layers, see):
        for batch in calibration:
            awaited.update(layer for _, layer in layers)
            counted.take(batch, task.unpadded(batch))
            with suppress(_Reached):
                task.run(with_weights(model, weights), batch)
    if not count:
        raise OptionError(f"no input of {name!r} in the calibration data counts: all is padding")
    return total * (2 / count)


def _pruned(weight: Tensor, hessian: Tensor, sparsity: float, method: str) -> tuple[Tensor, Tensor]:
    """Returns the mask of a layer's weight [outputs, inputs], and the pruned weight."""
    if method == "wanda":
        mask = rows_mask(weight.float().abs() * hessian.diagonal().sqrt(), sparsity)
        return mask, torch.where(mask, weight, 0)
    mask, updated = sparsegpt(weight.float(), hessian, sparsity)
    return mask, updated if method == "sparsegpt-updated" else torch.where(mask, weight, 0)


def sparsegpt(weight: Tensor, hessian: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    """Prunes one layer with SparseGPT (Frantar and Alistarh, 2023).

    Args:
        weight: float32 [rows, columns].
        hessian: float32 [columns, columns], 2/n Σ x xᵀ.
        sparsity: the pruned share of each block of `BLOCK` columns, over all rows together.

    Returns:
        The mask, bool, and the pruned weight with updated survivors, float32.

    Raises:
        OptionError: the sparsity is not a share.
    """
    require_share("sparsity", sparsity)
    rest, hessian = weight.clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    rest[:, dead] = 0
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    # Row k of this factor is the first row of the inverse of H without the columns before k, up to scale.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    mask = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, weight.shape[1]))
        scores = (rest[:, block] / factor.diagonal()[block]).square()
        count = min(int(sparsity * scores.numel() + 0.5), scores.numel())
        chosen = torch.ones(scores.numel(), dtype=torch.bool, device=weight.device)
        chosen[scores.flatten().argsort(stable=True)[:count]] = False
        mask[:, block] = chosen.view_as(scores)
        errors = torch.empty_like(scores)
        for column in range(block.start, block.stop):
            error = torch.where(mask[:, column], 0, rest[:, column]) / factor[column, column]
            rest[:, column : block.stop] -= torch.outer(error, factor[column, column : block.stop])
            errors[:, column - start] = error
        rest[:, block.stop :] -= errors @ factor[block, block.stop :]
    return mask, torch.where(mask, rest, 0)
