"""SparseGPT for one layer: a mask, and survivors updated to compensate for the pruned weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .scores import pattern_mask
from .thresholds import Pattern, count_of_share, require_share

BLOCK = 128  # columns for which SparseGPT selects the mask together
DAMPING = 0.01  # added to H's diagonal, as a share of its mean


def sparsegpt(weight: Tensor, hessian: Tensor, sparsity: float | Pattern) -> tuple[Tensor, Tensor]:
    """Prunes one layer with SparseGPT (Frantar and Alistarh, 2023).

    Args:
        weight: float32 [rows, columns].
        hessian: float32 [columns, columns], 2/n Σ x xᵀ.
        sparsity: the pruned share of each block of `BLOCK` columns, over all rows together; or a pattern
            along the columns. The number of columns is then a multiple of ``of``.

    Returns:
        The mask, bool, and the pruned weight with updated survivors, float32.

    Raises:
        OptionError: the sparsity is not a share.
    """
    pattern = sparsity if isinstance(sparsity, Pattern) else None
    if not isinstance(sparsity, Pattern):
        require_share("sparsity", sparsity)
    rest, hessian = weight.clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    rest[:, dead] = 0
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    # Row k of this factor is the first row of the inverse of H without the columns before k, up to scale.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    scale = factor.diagonal()
    mask = torch.ones_like(weight, dtype=torch.bool)
    width = BLOCK if pattern is None else max(BLOCK - BLOCK % pattern.of, pattern.of)
    for start in range(0, weight.shape[1], width):
        block = slice(start, min(start + width, weight.shape[1]))
        if not isinstance(sparsity, Pattern):
            mask[:, block] = _greatest((rest[:, block] / scale[block]).square(), sparsity)
        errors = torch.empty_like(rest[:, block])
        for column in range(block.start, block.stop):
            # The mask of a group depends on the updates from the preceding groups.
            if pattern is not None and column % pattern.of == 0:
                group = slice(column, column + pattern.of)
                mask[:, group] = pattern_mask((rest[:, group] / scale[group]).square(), pattern)
            error = torch.where(mask[:, column], 0, rest[:, column]) / factor[column, column]
            rest[:, column : block.stop] -= torch.outer(error, factor[column, column : block.stop])
            errors[:, column - start] = error
        rest[:, block.stop :] -= errors @ factor[block, block.stop :]
    return mask, torch.where(mask, rest, 0)


def _greatest(scores: Tensor, sparsity: float) -> Tensor:
    """Returns a mask that prunes the given share of the scores, the lowest ones: bool, their shape."""
    count = count_of_share(sparsity, scores.numel())
    chosen = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[scores.flatten().argsort(stable=True)[:count]] = False
    return chosen.view_as(scores)
