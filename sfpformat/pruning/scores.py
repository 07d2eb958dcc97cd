"""Importances without learning: one number per weight, from its value and calibration statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import OptionError
from . import sharded_pruning
from .calibration_sums import Statistics
from .thresholds import Pattern, count_of_share, require_share
from .weight_selection import (
    as_matrix,
    chosen_tensors,
    chosen_weights,
    is_sharded,
    layout_of,
    named_once,
    require_shapes,
)

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
        return sharded_pruning.magnitude(model, tensors)
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
        return sharded_pruning.fisher(model, found)
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
        return sharded_pruning.wanda(model, found)
    out, left = {}, []
    for name, weight in chosen_weights(model, list(named_once(model, found, "found"))).items():
        inputs, layout = found[name].inputs, found[name].layout
        if inputs is None:
            left.append(name)
        else:
            out[name] = layout.back(layout.matrix(weight.float()).abs() * inputs.sqrt(), weight).contiguous()
    sharded_pruning.report_without_inputs(left, nothing_else=not out)
    return out


def comparable(
    model: nn.Module,
    importances: Mapping[str, Tensor],
    sparsity: float,
    scope: str = "row",
    strength: float = 1.0,
) -> Importances:
    """Returns importances divided by their threshold within each row or tensor, float32, by name.

    One threshold over the whole model then prunes the same weights as a threshold within each row or tensor.
    With a ``strength`` below 1, rows or tensors lose different shares, but differ less than by one threshold
    on the importances themselves. Learning needs importances that one threshold can compare.

    Example: ``start = comparable(model, wanda(model, found), 0.6)``.

    Args:
        model: any module.
        importances: not negative, by parameter name, such as those of `wanda` or `magnitude`.
        sparsity: the pruned share of each row or tensor, rounded to a whole number of weights.
        scope: ``row``, which is all inputs of one output, or ``tensor``.
        strength: exponent of the threshold, from 0 (unchanged importances) to 1.

    Raises:
        OptionError: the sparsity or the strength is not a share, the scope is unknown, or an importance does
            not fit a parameter.
    """
    require_share("sparsity", sparsity)
    require_share("strength", strength)
    if scope not in ("row", "tensor"):
        raise OptionError(f"scope is {scope!r}, must be 'row' or 'tensor'")

    def of_tensor(name: str, importance: Tensor) -> Tensor:
        layout = layout_of(model, name)
        matrix = layout.matrix(importance.float())
        rows = matrix if scope == "row" else matrix.reshape(1, -1)
        if rows.numel():
            rows = rows / _thresholds(rows, sparsity).pow(strength)
        return layout.back(rows.reshape(matrix.shape), importance).contiguous()

    if is_sharded(model):
        return sharded_pruning.of_whole(model, importances, of_tensor)
    require_shapes(chosen_weights(model, list(importances)), importances, "importance")
    return {name: of_tensor(name, importance) for name, importance in importances.items()}


def _thresholds(rows: Tensor, sparsity: float) -> Tensor:
    """Returns a number above 0 between the pruned and the kept importances of each row: float32 [rows, 1].

    Between two different importances it is their geometric mean, so that rounding does not move a weight to
    the other side. An importance of 0 is always below it.
    """
    width = rows.shape[1]
    count = count_of_share(sparsity, width)
    low = rows.kthvalue(max(count, 1), dim=1, keepdim=True).values
    high = rows.kthvalue(min(count + 1, width), dim=1, keepdim=True).values
    found = (low.double() * high.double()).sqrt().float()
    found = torch.where(found > 0, found, high)
    return torch.where(found > 0, found, 1.0)


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
