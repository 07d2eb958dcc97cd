"""Prunes or refines layer by layer. The inputs of a layer are computed with the changed layers before it.

`prune_layerwise` makes masks with Wanda or SparseGPT. `refine_layerwise` improves given masks, of any method,
by swaps, and reconstructs the layers' outputs with the survivors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..options.checks import is_number
from .layer_inputs import grouped_products
from .reconstruction import DAMPING, reconstructed
from .scores import pattern_mask, rows_mask
from .sparsegpt import sparsegpt
from .swaps import swapped
from .task import CLASSIFY, Data, Task, evaluating, first
from .thresholds import Pattern, require_share
from .weight_selection import chosen_weights, layout_of, named_once, require_masks

METHODS = ("wanda", "sparsegpt", "sparsegpt-updated")


@dataclass(frozen=True)
class LayerwiseResult:
    """The result of `prune_layerwise` and `refine_layerwise`.

    Attributes:
        masks: bool by name, True for survivors.
        weights: pruned weights by name, in the weight's dtype; survivors may be updated.
    """

    masks: dict[str, Tensor]
    weights: dict[str, Tensor]


def prune_layerwise(
    model: nn.Module,
    data: Data,
    sparsity: float | Pattern,
    method: str,
    *,
    task: Task = CLASSIFY,
    batches: int = 64,
    tensors: Sequence[str] | None = None,
) -> LayerwiseResult:
    """Prunes layer by layer. The model is unchanged.

    Example: ``prune_layerwise(model, batches, 0.5, "sparsegpt-updated")``.

    Args:
        model: any module. Only weights of `nn.Linear` and transformers' ``Conv1D`` are pruned.
        data: batches; the first ``batches`` are the calibration data.
        sparsity: the pruned share of each layer; with ``wanda``, of each row. Or a pattern, such as
            ``Pattern(2, 4)``, along the inputs of each output.
        method: ``wanda``, ``sparsegpt`` (SparseGPT's mask, survivors unchanged, also for later layers) or
            ``sparsegpt-updated`` (survivors updated to compensate for the pruned weights).
        task: runs the model on a batch.
        batches: number of calibration batches; ``data`` repeats if it has fewer.
        tensors: names of parameters. None takes the weights of linear layers among
            `weight_selection.prunable`, and warns about the others.

    Memory: a copy of each layer's weight, and one output of a transformer's block for each batch.

    Raises:
        OptionError: a named tensor is not the weight of a linear layer that the model calls; there is nothing
            to prune; all inputs of a layer are padding; a pattern does not fit a layer's inputs; or the
            method or sparsity is invalid.
    """
    if not isinstance(sparsity, Pattern):
        require_share("sparsity", sparsity)
    if method not in METHODS:
        raise OptionError(f"method is {method!r}, must be wanda, sparsegpt or sparsegpt-updated")
    weights = chosen_weights(model, tensors)
    calibration = list(first(data, batches))
    masks: dict[str, Tensor] = {}
    with evaluating(model), torch.no_grad():
        for group, products in grouped_products(
            model, weights, calibration, task, strict=tensors is not None
        ):
            for name in group:
                layout, weight = layout_of(model, name), weights[name]
                if isinstance(sparsity, Pattern):
                    _require_fit(name, sparsity, weight, layout.inputs)
                mask, updated = _pruned(layout.matrix(weight), products, sparsity, method)
                masks[name] = layout.back(mask, weight).contiguous()
                weights[name] = layout.back(updated, weight).to(weight.dtype).contiguous()
    return LayerwiseResult(masks, {name: weights[name] for name in masks})


def _pruned(
    weight: Tensor, products: Tensor, sparsity: float | Pattern, method: str
) -> tuple[Tensor, Tensor]:
    """Returns the mask of a layer's weight [outputs, inputs], and the pruned weight."""
    if method == "wanda":
        scores = weight.float().abs() * products.diagonal().sqrt()
        if isinstance(sparsity, Pattern):
            mask = pattern_mask(scores, sparsity)
        else:
            mask = rows_mask(scores, sparsity)
        return mask, torch.where(mask, weight, 0)
    mask, updated = sparsegpt(weight.float(), products, sparsity)
    return mask, updated if method == "sparsegpt-updated" else torch.where(mask, weight, 0)


def refine_layerwise(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    data: Data,
    *,
    swaps: int = 0,
    reconstruct: bool = True,
    damping: float = DAMPING,
    pattern: Pattern | None = None,
    task: Task = CLASSIFY,
    batches: int = 64,
) -> LayerwiseResult:
    """Refines masks of any method layer by layer, by swaps and by reconstruction. The model is unchanged.

    The error of a linear layer is the mean squared difference between its outputs on the calibration data and
    those of the dense weight for the same inputs. These inputs are computed with the refined layers before
    it. Swaps (`swaps`) exchange survivors and pruned weights of a row. Reconstruction (`reconstruction`)
    gives the survivors new values by least squares. Neither raises the error of any output of a layer.

    Example: ``refine_layerwise(model, masks, batches, swaps=100)``.

    Args:
        model: the dense model.
        masks: bool by name, True for survivors; any name of a tied tensor is valid.
        data: batches; the first ``batches`` are the calibration data.
        swaps: maximum number of swaps for each row of a weight; 0 keeps the masks.
        reconstruct: whether survivors get new values.
        damping: weight of the squared change of survivors, as in `reconstruction.reconstructed`.
        pattern: a pattern that the masks have and keep.
        task: runs the model on a batch.
        batches: number of calibration batches; ``data`` repeats if it has fewer.

    Returns:
        Masks and weights of all given tensors.

    Warns: some tensors are not weights of linear layers; their masks and survivors do not change.

    Memory: that of `prune_layerwise`, and five times the largest weight.

    Raises:
        OptionError: a mask does not fit a parameter of the model or the pattern; there is nothing to do; no
            mask belongs to a linear layer that the model calls; or all inputs of a layer are padding.
    """
    masks = named_once(model, masks, "masks")
    dense = chosen_weights(model, list(masks))
    require_masks(dense, masks)
    if not isinstance(swaps, int) or swaps < 0:
        raise OptionError(f"swaps is {swaps!r}, must be a whole number of at least 0")
    if not swaps and not reconstruct:
        raise OptionError("there is nothing to do: give swaps, or reconstruct=True")
    if not is_number(damping) or not 0 <= damping < float("inf"):
        raise OptionError(f"damping is {damping!r}, must be at least 0 and finite")
    kept = {name: masks[name].to(weight.device, torch.bool) for name, weight in dense.items()}
    if pattern is not None:
        for name, weight in dense.items():
            layout = layout_of(model, name)
            _require_fit(name, pattern, weight, layout.inputs)
            _require_pattern(name, pattern, layout.matrix(kept[name]))
    calibration = list(first(data, batches))
    weights = {name: torch.where(kept[name], weight, 0) for name, weight in dense.items()}
    with evaluating(model), torch.no_grad():
        for group, products in grouped_products(model, weights, calibration, task, strict=False):
            for name in group:
                layout, weight = layout_of(model, name), dense[name]
                matrix, mask = layout.matrix(weight).float(), layout.matrix(kept[name])
                if swaps:
                    mask = swapped(matrix, mask, products, most=swaps, pattern=pattern)
                if reconstruct:
                    new = reconstructed(matrix, mask, products, damping=damping)
                else:
                    new = torch.where(mask, matrix, 0)  # a product would make -0 of negative weights
                kept[name] = layout.back(mask, weight).contiguous()
                weights[name] = layout.back(new, weight).to(weight.dtype).contiguous()
    return LayerwiseResult(kept, weights)


def _require_fit(name: str, pattern: Pattern, weight: Tensor, dim: int) -> None:
    reason = pattern.why_not(tuple(weight.shape), (dim, 1))
    if reason:
        raise OptionError(f"{pattern.keep}:{pattern.of} does not fit {name!r}: {reason}")


def _require_pattern(name: str, pattern: Pattern, mask: Tensor) -> None:
    if bool((mask.reshape(len(mask), -1, pattern.of).sum(-1) != pattern.keep).any()):
        raise OptionError(f"the mask of {name!r} does not keep {pattern.keep} of every {pattern.of} inputs")
