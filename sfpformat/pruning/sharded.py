"""Weights that ``torch.distributed.fsdp.fully_shard`` divides by rows among processes: scores and masks.

Rules: each process computes scores and masks for its own rows only, as tensors that are sharded like the
weights. Thresholds over all rows come from histograms of the numbers' bits, which are summed over the
processes. So all results have the bits of one process with whole weights, for any number of processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import OptionError, warn
from ..names import listed, require_known, require_matches
from .masked import about_values
from .masks import SCOPES, masks_of, rule_of, unfit
from .processes import Processes
from .thresholds import (
    Allocation,
    Pattern,
    Sparsity,
    Threshold,
    count_of_share,
    require_share,
)
from .weight_selection import as_numbers, holders, is_sharded, layout_of, prunable

_BITS = 16  # of a number in one histogram
_HALF = 1 << 31


def reshard(model: nn.Module) -> None:
    """Releases whole parameters that a forward pass left in a model after ``fully_shard``."""
    for module in model.modules():
        method = getattr(module, "reshard", None)
        if callable(method) and is_sharded(module):
            method()  # after a pass without gradients, those of the outermost module are still whole


@contextmanager
def resharding(model: nn.Module) -> Iterator[None]:
    """Context for passes without gradients: at its end, sharded parameters are sharded again."""
    try:
        yield
    finally:
        reshard(model)


class Sharded:
    """The sharded weights of a model, with their names.

    Attributes:
        weights: name -> the weight, a ``DTensor`` whose rows are divided among the processes.
        processes: the processes.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] | None, group: Any = None) -> None:
        """Args:
        model: a model after ``fully_shard``. Its parameters are resharded.
        names: names of parameters of rank 2 or more; None takes `weight_selection.prunable`.
        group: the process group of the caller; None takes that of the weights.

        Raises:
            OptionError: there are no such weights, a name is unknown, or a weight is not divided by rows
                among the processes of the group.
        """
        reshard(model)
        names = prunable(model) if names is None else list(names)
        if not names:
            raise OptionError("the model has no linear or convolutional layers; name the tensors to prune")
        parameters = dict(model.named_parameters())
        require_known(names, parameters, kind="parameter")
        self._model = model
        self.weights: dict[str, Any] = {name: parameters[name].detach() for name in names}
        meshes = []
        for name, weight in self.weights.items():
            if not is_sharded(weight):
                raise OptionError(f"{name!r} is not sharded, but other weights are: call fully_shard on all")
            one_dimension = weight.device_mesh.ndim == 1 and weight.placements[0].is_shard(0)
            if weight.dim() < 2 or not one_dimension or not weight.is_floating_point():
                raise OptionError(
                    f"{name!r} has shape {list(weight.shape)}, dtype {weight.dtype} and placements "
                    f"{weight.placements}: only float matrices that fully_shard divides by rows, over a mesh "
                    "of one dimension, are supported"
                )
            meshes.append(weight.device_mesh)
        first = next(iter(self.weights.values()))
        if any(mesh != meshes[0] for mesh in meshes):
            raise OptionError("the weights are sharded over different meshes; use one")
        own = meshes[0].get_group()
        self.processes = Processes(own, first.to_local().device)
        if group is not None and Processes(group).world != self.processes.world:
            raise OptionError("group has other processes than the mesh of the weights; leave group out")
        self.group = own if group is None else group

    def share_of(self, name: str) -> int:
        """Returns the number of elements of a process's share of a weight; the last ones may have fewer."""
        weight = self.weights[name]
        rows = -(-int(weight.shape[0]) // self.processes.world)
        return rows * (int(weight.numel()) // max(int(weight.shape[0]), 1))

    def first_row(self, name: str) -> int:
        """Returns the number of this process's first row of a weight."""
        rows = -(-int(self.weights[name].shape[0]) // self.processes.world)
        return min(rows * self.processes.rank, int(self.weights[name].shape[0]))

    def local(self, name: str, given: Any = None, what: str = "importance") -> Tensor:
        """Returns this process's rows of a weight, or of a tensor that is sharded like it.

        Raises:
            OptionError: the tensor is not sharded like the weight.
        """
        weight = self.weights[name]
        if given is None:
            return self._rows(weight)
        if not is_sharded(given) or given.shape != weight.shape or given.placements != weight.placements:
            raise OptionError(f"the {what} of {name!r} is not sharded like the weight; shard it by rows")
        return self._rows(given)

    def _rows(self, tensor: Any) -> Tensor:
        rows: Tensor = tensor.to_local()
        return rows.detach()

    def whole(self, name: str, rows: Tensor) -> Tensor:
        """Returns the rows of all processes as a plain tensor of a weight's shape. All call it together."""
        shape = self.weights[name].shape
        share = rows.new_zeros(self.share_of(name))
        share[: rows.numel()] = rows.reshape(-1)
        return self.processes.joined(share, shape.numel()).view(shape)

    def like(self, name: str, rows: Tensor) -> Tensor:
        """Returns this process's rows as a tensor that is sharded like a weight, with its shape."""
        weight = self.weights[name]
        tensors: Any = sys.modules["torch.distributed.tensor"]
        found: Tensor = tensors.DTensor.from_local(
            rows.contiguous(),
            weight.device_mesh,
            weight.placements,
            run_check=False,
            shape=weight.shape,
            stride=torch.empty(weight.shape, device="meta").stride(),
        )
        return found


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


class GatheredNames:
    """Finds the names of whole weights that FSDP gathered."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        """Args:
        model: a model after ``fully_shard``.
        names: names of its sharded weights.
        """
        places = holders(model)
        self._places = {name: places[id(model.get_parameter(name))] for name in names}
        # With each weight, which this keeps alive, so that its id stays unique.
        self._found: dict[int, tuple[Tensor, str | None]] = {}

    def forget(self) -> None:
        """Forgets the weights of earlier calls, so that their memory can be released."""
        self._found = {}

    def of(self, value: object) -> str | None:
        """Returns the name of a gathered weight; None for other values."""
        if not isinstance(value, nn.Parameter) or is_sharded(value):
            return None
        known = self._found.get(id(value))
        if known is None:
            name = next(
                (
                    name
                    for name, places in self._places.items()
                    if any(module._parameters.get(attribute) is value for module, attribute in places)
                ),
                None,
            )
            known = self._found[id(value)] = value, name
        return known[1]


class WholeWeights(TorchFunctionMode):
    """Context in which torch functions get a leaf in place of each whole weight that FSDP gathered.

    The gradient of a leaf is that of the whole weight on this process's batch.

    Attributes:
        leaves: the leaves of the current batch by name.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], seen: Callable[[str, Tensor], None]) -> None:
        """Args:
        model: a model after ``fully_shard``.
        names: names of its sharded weights.
        seen: called with the name and the leaf as soon as its gradient is complete.
        """
        super().__init__()
        self._names, self._seen = GatheredNames(model, names), seen
        self.leaves: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Begins a batch."""
        self.leaves = {}
        self._names.forget()

    def _replaced(self, value: Any) -> Any:
        name = self._names.of(value)
        if name is not None:
            leaf = self.leaves.get(name)
            if leaf is None:
                leaf = self.leaves[name] = value.detach().requires_grad_()
                untyped: Any = leaf
                untyped.register_post_accumulate_grad_hook(lambda x, name=name: self._seen(name, x))
            return leaf
        if type(value) in (tuple, list):
            return type(value)(self._replaced(part) for part in value)
        return value

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls a torch function with whole weights in its arguments replaced by their leaves."""
        named = kwargs or {}
        if about_values(func):
            args = self._replaced(args)
            named = {key: self._replaced(value) for key, value in named.items()}
        return func(*args, **named)


# ---------------------------------------------------------------------------------------------- scores


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
