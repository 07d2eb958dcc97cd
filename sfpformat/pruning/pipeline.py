"""Computes masks from importances, applies them, writes pruned models, and converts torch's own masks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.utils.prune
from torch import Tensor, nn

from ..errors import OptionError
from ..limits import DEFAULT_LIMITS, Limits
from ..names import require_matches
from ..options import ImportanceOptions, Options
from ..torch.models import save_model
from ..torch.saving import ImportanceTensor
from ..torch.ties import TiedNames
from . import sharded_pruning
from .grades import graded, options_for_grades
from .masks import masks_of
from .thresholds import Allocation, Numbers, Pattern, Threshold
from .tuning import Masks
from .weight_selection import (
    Layout,
    as_numbers,
    chosen_tensors,
    chosen_weights,
    holders,
    is_sharded,
    layout_of,
    named_once,
    require_masks,
    require_shapes,
)

_torch: Any = torch.nn.utils.prune  # its functions have no types
_MASK, _ORIGINAL = "_mask", "_orig"  # suffixes that torch.nn.utils.prune adds to names


def prune(
    model: nn.Module,
    importances: Mapping[str, Tensor],
    threshold: Threshold | Pattern | Allocation | float,
    *,
    scope: str = "model",
    exempt: str | Sequence[str] = (),
    floor: float = 0.0,
) -> dict[str, Tensor]:
    """Prunes a model in place: sets the weights below the threshold to +0.

    A `Pattern` runs along the inputs of each layer: along the rows of a linear layer, along the columns of
    transformers' ``Conv1D``, and along the input channels of a convolution, for each output channel and
    kernel position.

    Example: ``masks = prune(model, magnitude(model), 0.5)``.

    A model that ``fully_shard`` divided by rows takes importances that are sharded alike, and returns such
    masks, with the bits of one process. All its processes call this function.

    Args:
        model: any module.
        importances: by parameter name, of the parameters' shapes; any name of a tied parameter is valid.
        threshold, scope, floor: as in `masks.masks_of`; a row is all inputs of one output.
        exempt: patterns of parameter names that are not pruned.

    Returns:
        The masks: bool by name, True for survivors, on the device of the weights. Tensors that are exempt, or
        that a pattern does not fit, have no mask.

    Warns: for the reasons of `masks.masks_of`.

    Raises:
        OptionError: an importance does not fit a parameter of the model, or for the reasons of
            `masks.masks_of`. Nothing was pruned.
    """
    if is_sharded(model):
        patterns = (exempt,) if isinstance(exempt, str) else tuple(exempt)
        return sharded_pruning.pruned(
            model, importances, threshold, scope=scope, exempt=patterns, floor=floor
        )
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
    """Prunes with one threshold for the inputs of each output, in any layout."""

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
    """Returns the names that are not exempt; a tied parameter is exempt if any of its names is.

    Raises:
        OptionError: a pattern matches no parameter, or all names are exempt.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    require_matches(patterns, parameters, "exempt")
    ties = TiedNames(parameters)
    exempt = {name for pattern in patterns for name in ties.like(pattern)}
    chosen = [name for name in names if name not in exempt]
    if not chosen:
        raise OptionError("all tensors are exempt: nothing would be pruned")
    return chosen


def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Sets the masked weights to +0, in place.

    Args:
        model: any module.
        masks: by name of a float parameter or buffer, of its shape: bool, or numbers that are 0 or 1.

    Raises:
        OptionError: a mask does not fit a parameter or buffer of the model. Nothing was pruned.
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
    """Writes a pruned model: masks, survivors, and optionally importances or factors.

    Example: ``pack(model, "model.sfp", masks, importances=importances)``.

    Args:
        model: its ``state_dict`` is written. In the following arguments, any name of a tied tensor is valid.
        path: path of the file, which is replaced only on success.
        masks: by name of a float parameter or buffer of any rank, True for survivors: the result of `prune`
            or `take_masks`.
        importances: by name. The file stores the grade of each survivor (`grades`) as metadata, with which it
            can be pruned again without data (``sfp prune``).
        factors: by name, for rows and columns, from `tuning.fit_factors`. The file stores them as F16
            multipliers that reconstruction applies. A tensor has factors or a graded importance, not both.
        multipliers: by name, a factor for each weight. They are multiplied into the written weights before
            quantisation, and take no bits.
        options: options of the tensors with a mask; all others are lossless. If they select errors that are
            ``weighted``, the grades are the weights of the errors.
        metadata: strings for the caller's own use.
        limits: the readers' limits. Readers need the same ones if these are not the default.

    Raises:
        OptionError: names or shapes do not fit, importances are not finite, a multiplied weight overflows, a
            tensor has both factors and an importance, or readers would refuse a tensor by their limits.
        OSError: the file cannot be written.
    """
    if not isinstance(options, Options | None):
        raise OptionError(f"options is a {type(options).__name__}, must be Options")
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    ties = TiedNames(state)
    masks = _by_kept_name(model, ties, masks, "mask")
    importances = _by_kept_name(model, ties, importances, "importance")
    multipliers = _by_kept_name(model, ties, multipliers, "multiplier")
    factors = ties.by_kept(factors, "factors")
    if factors:
        chosen_weights(model, list(factors))
    both = set(importances) & set(factors)
    if both:
        raise OptionError(f"{min(both)!r} has both factors and an importance; give only one of them")
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


def _by_kept_name(
    model: nn.Module, ties: TiedNames, given: Mapping[str, Tensor] | None, what: str
) -> dict[str, Tensor]:
    """Returns masks or other numbers by the names of the tensors in the file.

    Raises:
        OptionError: a name is not a float tensor of the model's state, or the numbers do not fit.
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
    """Context manager that multiplies the model's weights by multipliers, and restores them afterwards."""

    def __init__(self, model: nn.Module, multipliers: Mapping[str, Tensor]) -> None:
        """Computes the products; `__enter__` writes them to the model.

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


# ------------------------------------------------------------------------------- torch.nn.utils.prune


def take_masks(model: nn.Module) -> dict[str, Tensor]:
    """Removes the masks of `torch.nn.utils.prune` from a model and returns them: bool, by parameter name.

    The pruning hooks are removed: ``weight_orig`` becomes the pruned parameter ``weight`` again.
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
    """Installs masks in a model as `torch.nn.utils.prune` does, in place.

    Args:
        model: a model without masks of torch. Its parameters become ``weight_orig`` with ``weight_mask``.
        masks: by name of a float parameter of any rank: bool, or numbers that are 0 or 1. All modules that
            share a tied parameter get its mask, and stay tied.

    Raises:
        OptionError: a mask does not fit a parameter of the model. Nothing was changed.
    """
    masks = named_once(model, masks, "masks")
    require_masks(chosen_tensors(model, list(masks)), masks)
    there = holders(model)
    held = [(there[id(model.get_parameter(name))], mask) for name, mask in masks.items()]
    for places, mask in held:
        for module, attribute in places:
            _torch.custom_from_mask(module, attribute, mask)
