"""Prunes a trained network by the importance of its weights, and writes it to an `.sfp` file.

Each weight gets an importance, from a score or by learning. Learning optimises importances through the model,
whose weights stay unchanged. A threshold from the distribution of the importances prunes the weights below
it. The file stores the masks and the survivors.

Example::

    masks = prune(model, magnitude(model), 0.5, scope="tensor")
    pack(model, "model.sfp", masks)

The names below are imported lazily: `allocation`, `thresholds`, `masks`, `grades` and `repruning` need only
numpy, the others need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .admm import Alternation, train_sparse
    from .allocation import Outliers, Rising
    from .calibration import statistics
    from .calibration_sums import Statistics
    from .gates import GATES
    from .grades import BOUNDARIES, graded, options_for_grades
    from .layerwise import LayerwiseResult, prune_layerwise, refine_layerwise
    from .learning import bytes_per_weight, learn_importance
    from .learning_settings import Learned, Settings
    from .masks import achieved, masks_of
    from .pipeline import apply_masks, give_masks, pack, prune, take_masks
    from .repruning import Repruned, reprune
    from .scores import comparable, fisher, magnitude, wanda
    from .starts import Start, best_start
    from .task import CLASSIFY, Task
    from .thresholds import (
        Allocation,
        Knee,
        MeanSigma,
        Otsu,
        Pattern,
        Quantile,
        Sparsity,
        Threshold,
    )
    from .tuning import Tuning, fine_tune, fit_factors, fit_multipliers, scaled
    from .weight_selection import prunable

# Module -> the names that the package exports from it.
_NAMES = {
    "admm": ("Alternation", "train_sparse"),
    "allocation": ("Outliers", "Rising"),
    "calibration": ("statistics",),
    "calibration_sums": ("Statistics",),
    "repruning": ("Repruned", "reprune"),
    "gates": ("GATES",),
    "grades": ("BOUNDARIES", "graded", "options_for_grades"),
    "weight_selection": ("prunable",),
    "layerwise": ("LayerwiseResult", "prune_layerwise", "refine_layerwise"),
    "learning": ("bytes_per_weight", "learn_importance"),
    "masks": ("achieved", "masks_of"),
    "pipeline": ("apply_masks", "give_masks", "pack", "prune", "take_masks"),
    "scores": ("comparable", "fisher", "magnitude", "wanda"),
    "starts": ("Start", "best_start"),
    "learning_settings": ("Learned", "Settings"),
    "task": ("CLASSIFY", "Task"),
    "thresholds": ("Allocation", "Knee", "MeanSigma", "Otsu", "Pattern", "Quantile", "Sparsity", "Threshold"),
    "tuning": ("Tuning", "fine_tune", "fit_factors", "fit_multipliers", "scaled"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "BOUNDARIES",
    "CLASSIFY",
    "GATES",
    "Allocation",
    "Alternation",
    "Knee",
    "LayerwiseResult",
    "Learned",
    "MeanSigma",
    "Otsu",
    "Outliers",
    "Pattern",
    "Quantile",
    "Repruned",
    "Rising",
    "Settings",
    "Sparsity",
    "Start",
    "Statistics",
    "Task",
    "Threshold",
    "Tuning",
    "achieved",
    "apply_masks",
    "best_start",
    "bytes_per_weight",
    "comparable",
    "fine_tune",
    "fisher",
    "fit_factors",
    "fit_multipliers",
    "give_masks",
    "graded",
    "learn_importance",
    "magnitude",
    "masks_of",
    "options_for_grades",
    "pack",
    "prunable",
    "prune",
    "prune_layerwise",
    "refine_layerwise",
    "reprune",
    "scaled",
    "statistics",
    "take_masks",
    "train_sparse",
    "wanda",
]


def __getattr__(name: str) -> object:
    """Imports the module of an exported name on first access.

    Raises:
        AttributeError: the package has no such name.
        ModuleNotFoundError: the module needs torch, which is not installed.
    """
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        found: object = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            f"{__name__}.{name} needs torch: pip install 'sfpformat[torch]'", name="torch"
        ) from None
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
