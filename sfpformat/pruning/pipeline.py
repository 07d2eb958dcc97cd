"""From importances to masks, from masks to a file; and torch's own masks, taken and given."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

from ..codec.options import ImportanceOptions, Options
from ..errors import OptionError
from ..limits import DEFAULT_LIMITS, Limits
from ..torch.files import ImportanceTensor
from ..torch.models import save_model
from .grades import graded, options_for_grades
from .task import chosen_weights, require_shapes
from .thresholds import Numbers, Pattern, Threshold, masks_of
from .tuning import Masks

_torch: Any = torch.nn.utils.prune  # its functions have no types
_MASK, _ORIGINAL = "_mask", "_orig"  # what torch.nn.utils.prune adds to names


def prune(
    model: nn.Module,
    importances: Mapping[str, Tensor],
    threshold: Threshold | Pattern,
    *,
    scope: str = "model",
    exempt: Sequence[str] = (),
    floor: float = 0.0,
) -> dict[str, Tensor]:
    """Prunes a model in place: what a threshold finds too unimportant becomes +0.

    Args:
        model: any module.
        importances: by parameter name, of the parameters' shapes.
        threshold, scope, exempt, floor: as in `thresholds.masks_of`.

    Returns:
        The masks: bool by name, True for survivors, where the weights are.

    Raises:
        OptionError: an importance is none of the model's, or as `thresholds.masks_of`; nothing was pruned.
    """
    weights = chosen_weights(model, list(importances))
    require_shapes(weights, importances, "importance")
    found = masks_of(
        {name: as_numbers(importance) for name, importance in importances.items()},
        threshold,
        scope=scope,
        exempt=exempt,
        floor=floor,
        tiebreak={name: as_numbers(weight) for name, weight in weights.items()},
    )
    masks = {name: torch.from_numpy(mask).to(weights[name].device) for name, mask in found.items()}
    apply_masks(model, masks)
    return masks


def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Sets what masks prune to +0, in place.

    Raises:
        OptionError: a mask is none of the model's; nothing was pruned.
    """
    weights = chosen_weights(model, list(masks))
    require_shapes(weights, masks, "mask")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.masked_fill_(~masks[name].to(weight.device, torch.bool), 0)


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
        model: its state is written; weights with a mask are stored by it.
        path: of the file, which is replaced only when all went well.
        masks: bool by name, True for survivors.
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
        OptionError: names or shapes that do not fit, or readers would refuse a tensor by their limits.
        OSError: the file cannot be written.
    """
    names = [*masks, *(importances or {}), *(factors or {}), *(multipliers or {})]
    weights = chosen_weights(model, names) if names else {}
    given = {"mask": masks, "importance": importances, "multiplier": multipliers}
    for what, numbers in given.items():
        require_shapes(weights, numbers or {}, what)
    both = set(importances or {}) & set(factors or {})
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
    for name, pair in (factors or {}).items():
        kept[name] = pair
        stored = ImportanceOptions(role="multiplier", dtype="F16")
        per_tensor[name] = per_tensor.get(name, Options()).but(importance=stored)
    with _folded(model, multipliers or {}):
        save_model(model, path, metadata, options=per_tensor, masks=masks, importances=kept, limits=limits)


class _folded:
    """Context manager: the model's weights times multipliers, put back afterwards."""

    def __init__(self, model: nn.Module, multipliers: Mapping[str, Tensor]) -> None:
        self._multipliers = multipliers
        self._weights = chosen_weights(model, list(multipliers)) if multipliers else {}
        self._before = {name: weight.clone() for name, weight in self._weights.items()}

    def __enter__(self) -> None:
        for name, weight in self._weights.items():
            weight.mul_(self._multipliers[name].to(weight))

    def __exit__(self, *raised: object) -> None:
        for name, weight in self._weights.items():
            weight.copy_(self._before[name])


def as_numbers(tensor: Tensor) -> Numbers:
    """A tensor as float32 numbers of numpy, on the processor."""
    return cast(Numbers, np.asarray(tensor.detach().float().cpu().numpy()))


# ------------------------------------------------------------------------------- torch.nn.utils.prune


def take_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a model that `torch.nn.utils.prune` pruned: bool, by the weights' plain names.

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
        masks: bool by the weights' names.

    Raises:
        OptionError: a mask is none of the model's.
    """
    require_shapes(chosen_weights(model, list(masks)), masks, "mask")
    for name, mask in masks.items():
        path, _, attribute = name.rpartition(".")
        _torch.custom_from_mask(model.get_submodule(path), attribute, mask)
