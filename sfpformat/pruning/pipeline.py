"""From importances to masks, from masks to a file; and torch's own masks, taken and given."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

from ..errors import OptionError
from ..limits import DEFAULT_LIMITS, Limits
from ..names import require_matches
from ..options import ImportanceOptions, Options
from ..torch.files import ImportanceTensor
from ..torch.models import save_model
from ..torch.ties import TiedNames
from .grades import graded, options_for_grades
from .layers import (
    Layout,
    chosen_tensors,
    chosen_weights,
    holders,
    layout_of,
    named_once,
    require_masks,
    require_shapes,
)
from .thresholds import Allocation, Numbers, Pattern, Threshold, masks_of
from .tuning import Masks

_torch: Any = torch.nn.utils.prune  # its functions have no types
_MASK, _ORIGINAL = "_mask", "_orig"  # what torch.nn.utils.prune adds to names


def prune(
    model: nn.Module,
    importances: Mapping[str, Tensor],
    threshold: Threshold | Pattern | Allocation | float,
    *,
    scope: str = "model",
    exempt: str | Sequence[str] = (),
    floor: float = 0.0,
) -> dict[str, Tensor]:
    """Prunes a model in place: what a threshold finds too unimportant becomes +0.

    A `Pattern` runs along the inputs of each layer: along rows of a linear layer, along the columns of
    transformers' ``Conv1D``, along the input channels of a convolution for each output channel and kernel
    position.

    Example: ``masks = prune(model, magnitude(model), 0.5)``.

    Args:
        model: any module.
        importances: by parameter name, of the parameters' shapes; every name of a tied parameter will do.
        threshold, scope, floor: as in `thresholds.masks_of`; rows are the inputs of one output.
        exempt: patterns of the model's parameter names that are not pruned.

    Returns:
        The masks: bool by name, True for survivors, where the weights are. Tensors that are exempt, or that
        a pattern does not fit, have none.

    Warns: as `thresholds.masks_of`.

    Raises:
        OptionError: an importance is none of the model's, or as `thresholds.masks_of`; nothing was pruned.
    """
    importances = named_once(model, importances, "importances")
    weights = chosen_tensors(model, list(importances))
    require_shapes(weights, importances, "importance")
    chosen = _not_exempt(model, importances, (exempt,) if isinstance(exempt, str) else tuple(exempt))
    layouts = {name: layout_of(model, name) for name in chosen}
    if scope == "row" and not isinstance(threshold, Pattern):
        return _pruned_by_rows(model, weights, importances, layouts, threshold, floor)
    found = masks_of(
        {name: as_numbers(importances[name]) for name in chosen},
        threshold,
        scope=scope,
        floor=floor,
        tiebreak={name: as_numbers(weights[name]) for name in chosen},
        along={name: (layout.inputs, layout.groups) for name, layout in layouts.items()},
    )
    masks = {name: torch.from_numpy(mask).to(weights[name].device) for name, mask in found.items()}
    apply_masks(model, masks)
    return masks


def _pruned_by_rows(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    importances: Mapping[str, Tensor],
    layouts: Mapping[str, Layout],
    threshold: Threshold | Allocation | float,
    floor: float,
) -> dict[str, Tensor]:
    """Prunes each output's inputs, wherever a layer stores them."""

    def rows(tensors: Mapping[str, Tensor]) -> dict[str, Numbers]:
        return {
            name: as_numbers(layout.matrix(tensors[name]) if tensors[name].dim() > 1 else tensors[name])
            for name, layout in layouts.items()
        }

    found = masks_of(rows(importances), threshold, scope="row", floor=floor, tiebreak=rows(weights))
    masks = {}
    for name, layout in layouts.items():
        mask, weight = torch.from_numpy(found[name]), weights[name]
        mask = layout.back(mask, weight).contiguous() if weight.dim() > 1 else mask
        masks[name] = mask.to(weight.device)
    apply_masks(model, masks)
    return masks


def _not_exempt(model: nn.Module, names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names of which no other name of the same parameter is exempt, either."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    require_matches(patterns, parameters, "exempt")
    ties = TiedNames(parameters)
    exempt = {name for pattern in patterns for name in ties.like(pattern)}
    chosen = [name for name in names if name not in exempt]
    if not chosen:
        raise OptionError("all tensors are exempt: nothing would be pruned")
    return chosen


def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Sets what masks prune to +0, in place.

    Args:
        masks: by name of a float parameter or buffer, of its shape: bool, or numbers that are 0 or 1.

    Raises:
        OptionError: a mask is none of the model's; nothing was pruned.
    """
    masks = named_once(model, masks, "masks")
    weights = chosen_tensors(model, list(masks), buffers=True)
    require_masks(weights, masks)
    with torch.no_grad():
        for name, weight in weights.items():
            kept = masks[name].to(weight.device, torch.bool)
            weight.copy_(torch.where(kept, weight, torch.zeros_like(weight)))


def pack(
    model: nn.Module,
    path: str | os.PathLike[str],
    masks: Masks,
    *,
    importances: Mapping[str, Tensor] | None = None,
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    multipliers: Mapping[str, Tensor] | None = None,
    options: Options | None = None,
    metadata: dict[str, str] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> None:
    """Writes a pruned model: masks, survivors, and what is known of their importance.

    Args:
        model: its state is written; weights with a mask are stored by it. Every name of a tied tensor will
            do in what follows.
        path: of the file, which is replaced only when all went well.
        masks: by name of a float parameter or buffer of any rank, True for survivors: what `prune` and
            `take_masks` give.
        importances: by name; a file keeps the grade of each survivor (`grades`), as metadata, which is enough
            to prune it again without the data (``sfp prune``).
        factors: by name, of rows and columns, as `tuning.fit_factors` gives them; a file keeps them as F16,
            as multipliers that enter reconstruction. A tensor has factors or a graded importance, not both.
        multipliers: by name, a factor for each weight; they are folded into the weights that are written,
            before these are quantised, and take no bits.
        options: how tensors with a mask are coded, all others are lossless; where errors are `weighted`,
            they count by the grades.
        metadata: strings of the caller's own.
        limits: what readers allow; they need the same ones where these are not the default.

    Raises:
        OptionError: names or shapes that do not fit, importances that are not finite, or readers would
            refuse a tensor by their limits.
        OSError: the file cannot be written.
    """
    if not isinstance(options, Options | None):
        raise OptionError(f"options is a {type(options).__name__}, must be Options, for all masked tensors")
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    ties = TiedNames(state)
    masks = _by_kept(model, ties, masks, "mask")
    importances = _by_kept(model, ties, importances, "importance")
    multipliers = _by_kept(model, ties, multipliers, "multiplier")
    factors = ties.by_kept(factors, "factors")
    if factors:
        chosen_weights(model, list(factors))
    both = set(importances) & set(factors)
    if both:
        raise OptionError(f"{min(both)!r} has factors and an importance; a file holds one of them")
    base = options or Options()
    per_tensor = dict.fromkeys(masks, base)
    kept: dict[str, ImportanceTensor] = {}
    if importances:
        grades = graded({name: as_numbers(importance) for name, importance in importances.items()})
        for name, grade in grades.items():
            kept[name] = grade
            per_tensor[name] = per_tensor.get(name, Options()).but(importance=options_for_grades())
    for name, pair in factors.items():
        kept[name] = pair
        stored = ImportanceOptions(role="multiplier", dtype="F16")
        per_tensor[name] = per_tensor.get(name, Options()).but(importance=stored)
    with _folded(model, multipliers):
        save_model(model, path, metadata, options=per_tensor, masks=masks, importances=kept, limits=limits)


def _by_kept(
    model: nn.Module, ties: TiedNames, given: Mapping[str, Tensor] | None, what: str
) -> dict[str, Tensor]:
    """Masks or other numbers by the names that tensors have in the file.

    Raises:
        OptionError: a name is no float tensor of the model's state, or numbers do not fit.
    """
    found = ties.by_kept(given, f"{what}s")
    if not found:
        return {}
    weights = chosen_tensors(model, list(found), buffers=True)
    if what == "mask":
        require_masks(weights, found)
        return {name: mask.bool() for name, mask in found.items()}
    require_shapes(weights, found, what)
    return found


class _folded:
    """Context manager: the model's weights times multipliers, put back afterwards."""

    def __init__(self, model: nn.Module, multipliers: Mapping[str, Tensor]) -> None:
        """Multiplies nothing yet.

        Raises:
            OptionError: a finite weight times its multiplier is not finite in the weight's dtype.
        """
        self._weights = chosen_tensors(model, list(multipliers), buffers=True) if multipliers else {}
        self._before = {name: weight.clone() for name, weight in self._weights.items()}
        self._after = {name: weight * multipliers[name].to(weight) for name, weight in self._before.items()}
        for name, after in self._after.items():
            if (after.isfinite() != self._before[name].isfinite()).any():
                raise OptionError(
                    f"tensor {name!r}: a weight times its multiplier is too great for {after.dtype}"
                )

    def __enter__(self) -> None:
        for name, weight in self._weights.items():
            weight.copy_(self._after[name])

    def __exit__(self, *raised: object) -> None:
        for name, weight in self._weights.items():
            weight.copy_(self._before[name])


def as_numbers(tensor: Tensor) -> Numbers:
    """A tensor as numbers of numpy, on the processor: float32, or float64 where it is that."""
    plain = tensor.detach().cpu()
    return cast(Numbers, np.asarray((plain if plain.dtype is torch.float64 else plain.float()).numpy()))


# ------------------------------------------------------------------------------- torch.nn.utils.prune


def take_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a model that `torch.nn.utils.prune` pruned: bool, by the parameters' plain names.

    The model becomes plain: what was hidden as ``weight_orig`` is ``weight`` again, pruned.
    """
    masks: dict[str, Tensor] = {}
    for path, module in list(model.named_modules()):
        buffers = [name for name, _ in module.named_buffers(recurse=False) if name.endswith(_MASK)]
        for buffer in buffers:
            attribute = buffer.removesuffix(_MASK)
            if attribute + _ORIGINAL in dict(module.named_parameters(recurse=False)):
                masks[f"{path}.{attribute}" if path else attribute] = module.get_buffer(buffer) != 0
                _torch.remove(module, attribute)
    return masks


def give_masks(model: nn.Module, masks: Masks) -> None:
    """Hands masks to `torch.nn.utils.prune`, which keeps them as its own, in place.

    Args:
        model: plain; its parameters are then named ``weight_orig`` beside ``weight_mask``, as torch does.
        masks: by name of a float parameter of any rank: bool, or numbers that are 0 or 1. All modules that
            have a tied parameter get its mask, and stay tied.

    Raises:
        OptionError: a mask is none of the model's; nothing was changed.
    """
    masks = named_once(model, masks, "masks")
    require_masks(chosen_tensors(model, list(masks)), masks)
    there = holders(model)
    held = [(there[id(model.get_parameter(name))], mask) for name, mask in masks.items()]
    for places, mask in held:
        for module, attribute in places:
            _torch.custom_from_mask(module, attribute, mask)
