"""Initial importances for learning, and the selection of the best of them by the loss on held-out batches.

Rules: which importance without learning is the best depends on the model, its data and the sparsity. Learning
therefore begins with the candidate whose masks have the lowest loss on held-out batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LossError, OptionError
from ..names import listed
from .calibration_sums import Statistics
from .holdout import NONE, held_out_losses
from .levels import Levels
from .masked import Groups, MaskedModel
from .masks import unfit
from .processes import ALONE, Processes
from .scores import Importances, comparable, fisher, magnitude, wanda
from .sharded import Sharded, resharding
from .sharded_masking import masking_of
from .task import CLASSIFY, Data, Task, evaluating, require_objective
from .thresholds import Pattern
from .weight_selection import is_sharded, layout_of

# Of the thresholds of rows for Fisher importances. A single threshold can prune whole rows whose weights are
# important together, which a small strength prevents.
_STRENGTHS = (0.25, 0.5, 1.0)

Candidates = dict[str, Callable[[], Importances]]


@dataclass(frozen=True)
class Start:
    """Initial importances for learning.

    Attributes:
        name: name of the selected candidate, such as ``fisher`` or ``wanda``.
        importances: float32 by parameter name; one threshold over the model prunes them.
        losses: the mean held-out loss of each candidate, in nats, by name; empty if there was only one.
    """

    name: str
    importances: Importances
    losses: dict[str, float]


def best_start(
    model: nn.Module,
    found: Mapping[str, Statistics],
    held_out: Data,
    sparsity: float | Pattern,
    *,
    task: Task = CLASSIFY,
    objective: str = "divergence",
    progress: Callable[[int, int], None] = lambda done, total: None,
    group: Any = None,
) -> Start:
    """Returns the importances without learning that prune a model with the lowest held-out loss.

    The candidates are Fisher importances with one threshold over the model, and with the strengths of
    `scores.comparable` within rows of 0.25, 0.5 and 1; importances of Wanda with a threshold in each row
    (magnitudes in tensors without statistics of inputs); and magnitudes with a threshold in each tensor.

    Example::

        found = statistics(model, batches)
        start = best_start(model, found, held_out, 0.6)
        learned = learn_importance(model, batches, 0.6, start=start.importances, held_out=held_out)

    Args:
        model: any module; run in evaluation mode.
        found: calibration statistics by parameter name, from `calibration.statistics`.
        held_out: batches that are not among those of the statistics.
        sparsity: the pruned share of all weights, or a pattern. Tensors that it does not fit get no
            importance.
        task: runs the model and computes the loss.
        objective: ``divergence`` from the dense model's outputs, or the task's ``loss``.
        progress: called with the number of passes over a batch so far, and their total.
        group: as in `learning.learn_importance`; the processes share the batches.

    Memory: 12 bytes per weight, in addition to the model and ``found``.

    Raises:
        OptionError: a name is not that of a prunable parameter, or there are no batches or no names.
        LossError: no candidate has a finite loss.
        ProcessError: another process failed.
    """
    require_objective(objective)
    batches = list(held_out)
    if not batches:
        raise OptionError("held_out contains no batches")
    groups = pattern_groups(model, list(found), sparsity) if isinstance(sparsity, Pattern) else None
    share = sparsity_of(sparsity)
    sharded = Sharded(model, list(found), group) if is_sharded(model) else None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if groups is not None:  # tensors that the pattern does not fit stay dense
        found = {name: found[name] for name in groups}
    candidates = candidate_starts(model, found, share)
    weights = {name: parameters[name] for name in found if name in parameters and parameters[name].numel()}
    if not weights:
        raise OptionError(f"{listed(list(found))} have no elements: there is nothing to prune")
    if sharded is None:
        processes = Processes(group, next(iter(weights.values())).device)
    else:
        processes = sharded.processes
    with evaluating(model), resharding(model):
        return select_start(
            model,
            weights,
            candidates,
            task,
            batches,
            (share,),
            dense=model if objective == "divergence" else None,
            processes=processes,
            groups=groups,
            sharded=sharded,
            progress=progress,
        )


def sparsity_of(sparsity: float | Pattern) -> float:
    """Returns the pruned share of the weights."""
    return 1 - sparsity.keep / sparsity.of if isinstance(sparsity, Pattern) else sparsity


def candidate_starts(model: nn.Module, found: Mapping[str, Statistics], sparsity: float) -> Candidates:
    """Returns functions that compute the candidates, by name.

    Args:
        model: any module.
        found: calibration statistics by parameter name.
        sparsity: the pruned share, for the thresholds of rows and tensors.
    """
    # No candidate needs the gradients: callers can release them.
    found = {name: replace(one, gradient=torch.empty(0)) for name, one in found.items()}
    names = list(found)
    with_inputs = {name: one for name, one in found.items() if one.inputs is not None}

    def by_wanda() -> Importances:
        others = [name for name in names if name not in with_inputs]
        scores = wanda(model, with_inputs) | (magnitude(model, others) if others else {})
        return comparable(model, {name: scores[name] for name in names}, sparsity)

    def by_fisher(strength: float) -> Importances:
        return comparable(model, fisher(model, found), sparsity, strength=strength)

    candidates: Candidates = {"fisher": lambda: fisher(model, found)}
    for strength in _STRENGTHS:
        candidates[f"fisher by row {strength:g}"] = partial(by_fisher, strength)
    if with_inputs:
        candidates["wanda"] = by_wanda
    candidates["magnitude"] = lambda: comparable(model, magnitude(model, names), sparsity, "tensor")
    return candidates


def select_start(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    candidates: Candidates,
    task: Task,
    batches: Sequence[Any],
    sparsities: Sequence[float],
    *,
    dense: nn.Module | None,
    processes: Processes = ALONE,
    groups: Mapping[str, Groups] | None = None,
    sharded: Sharded | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Start:
    """Returns the candidate with the lowest mean loss over batches and sparsities; of equal ones the first.

    Args:
        model: the model, in evaluation mode.
        weights: its weights with at least one element, by name.
        candidates: functions that compute the candidates, by name.
        task, batches, sparsities, dense, processes: as in `holdout.choose`.
        groups: the groups of a pattern in each weight; None means no pattern.
        sharded: as in `hierarchy.Learner`.
        progress: as in `best_start`.

    Raises:
        LossError: no candidate has a finite loss.
        ProcessError: another process failed.
    """
    losses: dict[str, float] = {}
    if len(candidates) == 1:
        ((name, compute),) = candidates.items()
        return Start(name, compute(), losses)
    done, total = 0, len(candidates) * len(batches)

    def advance(passes: int) -> None:
        nonlocal done
        done += passes
        progress(done, total)

    for name, compute in candidates.items():
        start = compute()
        levels = Levels(
            weights,
            {key: start[key] for key in weights},
            network=False,
            own=None,
            temperature=1.0,
            groups=groups,
            sharded=sharded,
        )
        del start
        pruned = MaskedModel(model, {}, masking_of(model, weights, levels.scored, sharded))
        (found,) = held_out_losses(
            levels,
            pruned,
            dense,
            task,
            batches,
            sparsities,
            [NONE],
            processes,
            checked=_or_infinite,
            progress=advance,
        )
        losses[name] = sum(found) / len(found)
        del levels, pruned
    best = min(losses, key=lambda name: losses[name])
    if not math.isfinite(losses[best]):
        raise LossError(
            f"the held-out loss of the pruned model is not finite for any of {listed(list(losses))}; "
            "lower the sparsity, or give start"
        )
    return Start(best, candidates[best](), losses)


def _or_infinite(loss: Tensor, place: str) -> float:
    """Returns a loss as a number; infinity instead of NaN, so that such a candidate is never the best."""
    value = float(loss)
    return math.inf if math.isnan(value) else value


def pattern_groups(model: nn.Module, names: Sequence[str], pattern: Pattern) -> dict[str, Groups]:
    """Returns the groups of a pattern in the weights that it fits; warns of the others.

    Raises:
        OptionError: it fits none of them.
    """
    layouts = {name: layout_of(model, name) for name in names}
    shapes = {name: model.get_parameter(name).shape for name in names}
    left = unfit(pattern, {name: (shapes[name], (x.inputs, x.groups)) for name, x in layouts.items()})
    return {
        name: Groups(pattern.of, math.prod(shapes[name][layout.inputs + 1 :]))
        for name, layout in layouts.items()
        if name not in left
    }
