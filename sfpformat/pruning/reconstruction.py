"""Reconstructs a layer's outputs with its survivors: least squares for a given mask.

Theory of operation: with H = 2/n Σ x xᵀ, a row w of the weight and its survivors' new values v, the mean
squared error of the output is ½ (w − v) H (w − v)ᵀ. Conjugate gradients on the survivors of all rows at once
find its minimum, from the old values, with products of matrices alone. Each iteration lowers the error, so
that every number of iterations gives a result that is at least as good as the start.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01  # share of H's mean diagonal that holds survivors at their old values
ITERATIONS = 60
_TOLERANCE = 1e-3  # share of the initial residual at which a row is solved
_AT_ONCE = 1 << 22  # weights whose rows are solved together, with about 24 bytes of working memory each


def layer_error(weight: Tensor, pruned: Tensor, products: Tensor) -> Tensor:
    """Returns the mean squared error of each output of a pruned layer, float32 [outputs].

    Args:
        weight, pruned: [outputs, inputs].
        products: 2/n Σ x xᵀ of the layer's inputs, float32 [inputs, inputs].
    """
    moved = weight.float() - pruned.float()
    return ((moved @ products) * moved).sum(1) / 2


def reconstructed(
    weight: Tensor, mask: Tensor, products: Tensor, *, damping: float = DAMPING, iterations: int = ITERATIONS
) -> Tensor:
    """Returns the pruned weight whose survivors best reproduce the dense weight's outputs, float32.

    No row's `layer_error` is above that of the survivors' old values.

    Args:
        weight: float32 [outputs, inputs], dense.
        mask: bool, its shape, True for survivors.
        products: 2/n Σ x xᵀ of the layer's inputs, float32 [inputs, inputs].
        damping: weight of the squared change of the survivors, as a share of the mean diagonal of
            ``products``.
        iterations: maximum number of iterations of conjugate gradients.
    """
    out = torch.empty_like(weight)
    step = max(1, _AT_ONCE // max(weight.shape[1], 1))
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        kept = mask[rows].to(weight.dtype)
        old = weight[rows] * kept
        moved = _solved(weight[rows] - old, kept, products, damping, iterations)
        new = old + moved
        # If a row was already at its minimum, rounding can give a slightly greater error.
        better = layer_error(weight[rows], new, products) < layer_error(weight[rows], old, products)
        # Pruned weights are +0, not -0, which is harder to compress.
        out[rows] = torch.where(mask[rows], torch.where(better[:, None], new, old), 0)
    return out


def _solved(gone: Tensor, kept: Tensor, products: Tensor, damping: float, iterations: int) -> Tensor:
    """Returns the change of the survivors that compensates for the pruned weights.

    Args:
        gone: the pruned weights, zero elsewhere: float32 [rows, inputs].
        kept: 1 for survivors, float32, the same shape.
        products, damping, iterations: as in `reconstructed`.
    """
    diagonal = products.diagonal()
    held = damping * diagonal.mean()
    scale = 1 / (diagonal + held).clamp(min=torch.finfo(diagonal.dtype).tiny)
    found = torch.zeros_like(gone)
    residual = (gone @ products) * kept
    direction = residual * scale
    size = (residual * direction).sum(1)
    enough = size * _TOLERANCE**2
    for _ in range(iterations):
        if bool((size <= enough).all()):
            break
        along = torch.addmm(held * direction, direction, products) * kept
        curved = (direction * along).sum(1)
        # Rows that are solved, or whose inputs are all zero, do not change.
        rate = torch.where((size > enough) & (curved > 0), size / curved, 0)[:, None]
        found.addcmul_(rate, direction)
        residual.addcmul_(rate, along, value=-1)
        scaled = residual * scale
        after = (residual * scaled).sum(1)
        direction = scaled + torch.where(size > 0, after / size, 0)[:, None] * direction
        size = after
    return found
