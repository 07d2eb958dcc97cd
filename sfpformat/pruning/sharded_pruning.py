"""Importances and masks of weights that are sharded among processes.

Rules: each process computes importances and masks for its own rows only, as tensors that are sharded like the
weights. Thresholds over all rows come from histograms of the numbers' bits, which are summed over the
processes. So all results have the bits of one process with whole weights, for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, warn
from ..names import listed, require_matches
from .masks import SCOPES, masks_of, rule_of, unfit
from .processes import Processes
from .sharded import Sharded
from .thresholds import (
    Allocation,
    Pattern,
    Sparsity,
    Threshold,
    count_of_share,
    require_share,
)
from .weight_selection import as_numbers, layout_of

_BITS = 16  # of a number in one histogram
_HALF = 1 << 31


def of_whole(
    model: nn.Module, given: Mapping[str, Any], function: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Applies a function to whole tensors, one after the other, and returns its results sharded.

    Args:
        model: a model after ``fully_shard``.
        given: tensors that are sharded like its weights, by name.
        function: name and whole tensor -> a tensor of the same shape.
    """
    sharded = Sharded(model, list(given))
    out = {}
    for name, tensor in given.items():
        result = function(name, sharded.whole(name, sharded.local(name, tensor)))
        first = sharded.first_row(name)
        out[name] = sharded.like(name, result[first : first + len(sharded.local(name))].clone())
    return out


def magnitude(model: nn.Module, names: Sequence[str] | None) -> dict[str, Tensor]:
    """Returns |w| as `scores.magnitude`, sharded."""
    sharded = Sharded(model, names)
    return {name: sharded.like(name, sharded.local(name).float().abs()) for name in sharded.weights}


def fisher(model: nn.Module, found: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns w² g² as `scores.fisher`, sharded."""
    sharded = Sharded(model, list(found))
    out = {}
    for name in sharded.weights:
        squares = sharded.local(name, found[name].fisher, "Fisher information")
        out[name] = sharded.like(name, sharded.local(name).float().square() * squares)
    return out


def wanda(model: nn.Module, found: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns |w| · root mean square of its input as `scores.wanda`, sharded."""
    sharded = Sharded(model, list(found))
    out, left = {}, []
    for name in sharded.weights:
        inputs, layout = found[name].inputs, found[name].layout
        if inputs is None:
            left.append(name)
            continue
        rows = sharded.local(name).float().abs()
        roots = inputs.sqrt()
        if layout.inputs == 0:  # this process has some of the inputs, for all outputs
            first = sharded.first_row(name)
            roots = roots[first : first + len(rows), None]
        out[name] = sharded.like(name, rows * roots)
    report_without_inputs(left, nothing_else=not out)
    return out


def report_without_inputs(names: Sequence[str], *, nothing_else: bool) -> None:
    """Warns that tensors have no statistics of inputs, if there are any.

    Raises:
        OptionError: ``nothing_else`` is true: no tensor has them.
    """
    if names:
        words = f"Wanda needs statistics of the inputs of linear layers, but {listed(names)} have none"
        if nothing_else:
            raise OptionError(words)
        warn(f"{words}; the result does not include these tensors")


# ----------------------------------------------------------------------------------------------- masks


def pruned(
    model: nn.Module,
    importances: Mapping[str, Any],
    threshold: Threshold | Pattern | Allocation | float,
    *,
    scope: str,
    exempt: Sequence[str],
    floor: float,
) -> dict[str, Tensor]:
    """Prunes a sharded model in place, as `pipeline.prune`. Returns sharded masks.

    Raises:
        OptionError: an importance does not fit a weight, or the threshold needs all importances at once.
    """
    require_matches(exempt, dict(model.named_parameters()), "exempt")
    if not importances:
        raise OptionError("there are no importances: nothing would be pruned")
    sharded = Sharded(model, list(importances))
    names = [n for n in importances if not any(fnmatchcase(n, pattern) for pattern in exempt)]
    if not names:
        raise OptionError("all tensors are exempt: nothing would be pruned")
    found = {name: sharded.local(name, importances[name]) for name in names}
    finite = [name for name, rows in found.items() if not bool(torch.isfinite(rows).all())]
    bad = sharded.processes.exchanged(lambda: [name in finite for name in names], len(names))
    for name, flags in zip(names, zip(*bad, strict=True), strict=True):
        if any(flags):
            raise OptionError(f"the importance of {name!r} has numbers that are not finite")
    rule = rule_of(threshold)
    if scope not in SCOPES:
        raise OptionError(f"scope is {scope!r}, must be one of {', '.join(SCOPES)}")
    if isinstance(rule, Pattern) or (scope == "row" and not isinstance(rule, Allocation)):
        masks = _by_rows(model, sharded, found, rule, floor)
    elif isinstance(rule, Sparsity):
        require_share("floor", floor)
        if floor:
            raise OptionError("sharded weights can have a floor only within rows: take the scope row")
        ties = {name: sharded.local(name).abs() for name in names}
        masks = {}
        for part in [names] if scope == "model" else [[name] for name in names]:
            count = count_of_share(rule.share, sum(sharded.weights[name].numel() for name in part))
            lowest = _lowest([found[n] for n in part], [ties[n] for n in part], count, sharded.processes)
            masks |= {name: ~one for name, one in zip(part, lowest, strict=True)}
    else:
        raise OptionError(
            f"{rule!r} with scope {scope!r} needs the importances of all rows, and the weights are sharded: "
            "take a Sparsity, a Pattern, or the scope row without an allocation"
        )
    with torch.no_grad():
        for name, mask in masks.items():
            rows = sharded.local(name)
            rows.copy_(torch.where(mask, rows, torch.zeros_like(rows)))
    return {name: sharded.like(name, mask) for name, mask in masks.items()}


def _by_rows(
    model: nn.Module, sharded: Sharded, found: Mapping[str, Tensor], rule: Any, floor: float
) -> dict[str, Tensor]:
    """Returns the masks of thresholds within rows, or of a pattern within rows: no process needs another."""
    layouts = {name: layout_of(model, name) for name in found}
    left: set[str] = set()
    if isinstance(rule, Pattern):
        shapes = {name: sharded.weights[name].shape for name in found}
        left = unfit(rule, {name: (shapes[name], (x.inputs, x.groups)) for name, x in layouts.items()})
    for name, layout in layouts.items():
        if layout.inputs == 0:
            raise OptionError(
                f"{name!r} has its inputs in dimension 0, which is divided among the processes: thresholds "
                "and patterns along the inputs of an output need whole ones"
            )
    masks = {}
    for name, rows in found.items():
        if name in left:
            continue
        layout, weight = layouts[name], sharded.local(name)
        one, other = (x if isinstance(rule, Pattern) else layout.matrix(x) for x in (rows, weight))
        mask = masks_of(
            {name: as_numbers(one)},
            rule,
            scope="row",
            floor=floor,
            tiebreak={name: as_numbers(other)},
            along={name: (layout.inputs, layout.groups)} if isinstance(rule, Pattern) else None,
        )[name]
        kept = torch.from_numpy(mask)
        kept = kept if isinstance(rule, Pattern) else layout.back(kept, weight)
        masks[name] = kept.contiguous().to(weight.device)
    return masks


def _lowest(rows: Sequence[Tensor], ties: Sequence[Tensor], count: int, processes: Processes) -> list[Tensor]:
    """Returns which positions have the ``count`` lowest numbers of all processes together, exactly.

    Of equal numbers, those with the lowest of ``ties`` come first, then those of the first tensor, process
    and position. This is the order of `masks.masks_of`.

    Args:
        rows: this process's rows of each tensor.
        ties: numbers of the same shapes.
        count: how many positions.
        processes: the processes, each with the same number of tensors.

    Raises:
        OptionError: numbers are float64, whose bits the histograms do not hold.
    """
    if not count:
        return [torch.zeros_like(x, dtype=torch.bool) for x in rows]
    value, below = _ranked([_keys(x) for x in rows], count, processes)
    out = [_keys(x) < value for x in rows]
    equal = [_keys(x) == value for x in rows]
    count -= below
    value, below = _ranked(
        [_keys(tie)[same] for tie, same in zip(ties, equal, strict=True)], count, processes
    )
    for found, tie, same in zip(out, ties, equal, strict=True):
        keys = _keys(tie)
        found |= same & (keys < value)
        same &= keys == value
    count -= below
    own = [int(same.sum()) for same in equal]
    counts = processes.exchanged(lambda: own, len(own))
    before = 0
    for place, (found, same) in enumerate(zip(out, equal, strict=True)):
        mine = before + int(sum(row[place] for row in counts[: processes.rank]))
        flat = same.reshape(-1)
        flat = flat & (flat.cumsum(0) <= count - mine)
        found |= flat.view(same.shape)
        before += int(sum(row[place] for row in counts))
    return out


def _keys(x: Tensor) -> Tensor:
    """Returns int32 numbers in the order of a float tensor; both zeros give the same."""
    if x.dtype is torch.float64:
        raise OptionError("importances and weights of float64 cannot be ranked over shards; take float32")
    bits = (x.float() + 0.0).contiguous().view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _ranked(keys: Sequence[Tensor], rank: int, processes: Processes) -> tuple[int, int]:
    """Returns the number of a rank, from 1, among all keys of all processes, and how many are below it."""
    prefix, below = 0, 0
    for shift in (_BITS, 0):
        counts = torch.zeros(1 << _BITS, dtype=torch.int64, device=keys[0].device)
        for x in keys:
            places = x.reshape(-1).long() + _HALF  # from 0 to 2³² − 1
            if not shift:
                places = places[places >> _BITS == prefix]
            places = (places >> shift) & ((1 << _BITS) - 1)
            counts += torch.bincount(places, minlength=1 << _BITS)
        sums = processes.added(None, counts).cpu().cumsum(0)
        place = int(torch.searchsorted(sums, rank - below))
        below += int(sums[place - 1]) if place else 0
        prefix = prefix << _BITS | place
    return prefix - _HALF, below
