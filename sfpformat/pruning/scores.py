"""Importances that need no learning: one number a weight, from its value and calibration statistics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .calibration import Statistics
from .task import as_matrix, chosen_weights

Importances = dict[str, Tensor]


def magnitude(model: nn.Module, tensors: list[str] | None = None) -> Importances:
    """|w|, float32, by name. To be compared within a tensor: scopes over the model favour wide layers."""
    return {name: weight.float().abs() for name, weight in chosen_weights(model, tensors).items()}


def fisher(model: nn.Module, found: Mapping[str, Statistics]) -> Importances:
    """w² g², float32: the rise of the loss when a weight goes, to second order with the empirical Fisher
    information in the place of the Hessian (as in LeCun et al., Optimal Brain Damage, 1990). Comparable over
    the whole model."""
    weights = chosen_weights(model, list(found))
    return {name: weight.float().square() * found[name].fisher for name, weight in weights.items()}


def wanda(model: nn.Module, found: Mapping[str, Statistics]) -> Importances:
    """|w| · root mean square of its input, float32 (Sun et al., Wanda, 2023). To be compared within a row.

    Raises:
        OptionError: a tensor has no statistics of inputs.
    """
    out = {}
    for name, weight in chosen_weights(model, list(found)).items():
        inputs = found[name].inputs
        if inputs is None:
            raise OptionError(f"{name!r} is not the weight of a linear layer that was called")
        out[name] = (as_matrix(weight.float()).abs() * inputs.sqrt()).reshape(weight.shape)
    return out


def rows_mask(scores: Tensor, sparsity: float) -> Tensor:
    """A mask that keeps the same number in each row, the greatest: bool, the shape of ``scores``.

    Args:
        scores: of rank 2 or more.
        sparsity: share of each row that goes, to the nearest whole number.
    """
    matrix = as_matrix(scores)
    count = min(int(sparsity * matrix.shape[1] + 0.5), matrix.shape[1])
    mask = torch.ones_like(matrix, dtype=torch.bool)
    mask.scatter_(1, matrix.argsort(dim=1, stable=True)[:, :count], False)
    return mask.reshape(scores.shape)
