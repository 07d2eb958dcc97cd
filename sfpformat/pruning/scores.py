"""Importances without learning: one number per weight, from its value and calibration statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from . import sharded
from .calibration_sums import Statistics
from .thresholds import Pattern, count_of_share, require_share
from .weight_selection import as_matrix, chosen_tensors, chosen_weights, is_sharded, named_once

Importances = dict[str, Tensor]


def magnitude(model: nn.Module, tensors: Sequence[str] | None = None) -> Importances:
    """Returns |w|, float32, by name.

    The importances are comparable within a tensor. A threshold over the whole model would prune more weights
    of wide layers, whose magnitudes are usually smaller.

    Example: ``prune(model, magnitude(model), 0.5, scope="tensor")``.

    Args:
        model: any module.
        tensors: names of parameters of any rank; None takes `weight_selection.prunable`.

    Raises:
        OptionError: a name is not a float parameter, or there are no names.
    """
    if is_sharded(model):
        return sharded.magnitude(model, tensors)
    chosen = chosen_weights(model, None) if tensors is None else chosen_tensors(model, tensors)
    return {name: weight.float().abs() for name, weight in chosen.items()}


def fisher(model: nn.Module, found: Mapping[str, Statistics]) -> Importances:
    """Returns w² g², float32, by name. The importances are comparable over the whole model.

    They approximate the rise of the loss when a weight is pruned, to second order, with the empirical Fisher
    information instead of the Hessian (LeCun et al., Optimal Brain Damage, 1990).

    Example: ``prune(model, fisher(model, statistics(model, batches)), 0.5)``.

    Args:
        model: any module.
        found: calibration statistics by parameter name.

    Raises:
        OptionError: a name is not that of a prunable parameter, or there are no names.
    """
    if is_sharded(model):
        return sharded.fisher(model, found)
    weights = chosen_weights(model, list(named_once(model, found, "found")))
    return {name: weight.float().square() * found[name].fisher for name, weight in weights.items()}


def wanda(model: nn.Module, found: Mapping[str, Statistics]) -> Importances:
    """Returns |w| · root mean square of its input, float32, by name (Sun et al., Wanda, 2023).

    The importances are comparable within the inputs of one output.

    Example: ``prune(model, wanda(model, statistics(model, batches)), 0.5, scope="row")``.

    Args:
        model: any module.
        found: calibration statistics by parameter name.

    Warns: some tensors have no statistics of inputs; the result does not include them.

    Raises:
        OptionError: no tensor has statistics of inputs, a name is not that of a prunable parameter, or there
            are no names.
    """
    if is_sharded(model):
        return sharded.wanda(model, found)
    out, left = {}, []
    for name, weight in chosen_weights(model, list(named_once(model, found, "found"))).items():
        inputs, layout = found[name].inputs, found[name].layout
        if inputs is None:
            left.append(name)
        else:
            out[name] = layout.back(layout.matrix(weight.float()).abs() * inputs.sqrt(), weight).contiguous()
    sharded.report_without_inputs(left, nothing_else=not out)
    return out


def rows_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Returns a mask that keeps the greatest scores, the same number in each row: bool, scores' shape.

    Args:
        scores: a tensor of rank 2 or more.
        sparsity: the pruned share of each row, rounded to a whole number.

    Raises:
        OptionError: the sparsity is not a share.
    """
    matrix = as_matrix(scores)
    require_share("sparsity", sparsity)
    count = count_of_share(sparsity, matrix.shape[1])
    mask = torch.ones_like(matrix, dtype=torch.bool)
    mask.scatter_(1, matrix.argsort(dim=1, stable=True)[:, :count], False)
    return mask.reshape(scores.shape)


def pattern_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """Returns a mask that keeps the greatest scores of each group of a pattern; of equal ones the last.

    Args:
        scores: [rows, columns]; the number of columns is a multiple of ``pattern.of``.
        pattern: runs along the columns.

    Returns:
        bool, the shape of ``scores``.
    """
    groups = scores.reshape(len(scores), -1, pattern.of)
    mask = torch.ones_like(groups, dtype=torch.bool)
    mask.scatter_(2, groups.argsort(dim=2, stable=True)[..., : pattern.of - pattern.keep], False)
    return mask.view(scores.shape)
