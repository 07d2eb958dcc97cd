"""Allocations: the sparsity of each tensor for a given sparsity of the model. Needs only numpy.

Rules: an allocation gives each tensor a sparsity, so that all tensors together reach the requested one,
rounded to whole numbers in each tensor or row. Within a tensor or row the lowest importances are pruned. This
gives importances that are comparable only within a tensor or row, such as Wanda's, a budget for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import OptionError
from .thresholds import Numbers, require_share


@dataclass(frozen=True)
class Outliers:
    """Lower sparsity for tensors with more outliers (OWL; Yin et al., Outlier Weighed Layerwise Sparsity,
    2023).

    An outlier is an importance above ``multiple`` times the mean of its tensor. A tensor's sparsity falls
    linearly with its share of outliers. The greatest and the least sparsity differ by twice the spread. Meant
    for Wanda's importances.

    Example: ``prune(model, wanda(model, found), Outliers(0.6), scope="row")``.

    Attributes:
        share: share of all positions that is pruned.
        spread: half the difference between the greatest and the least sparsity of a tensor.
        multiple: an importance above this multiple of its tensor's mean is an outlier.
    """

    share: float
    spread: float = 0.08
    multiple: float = 5.0

    def __post_init__(self) -> None:
        require_share("share", self.share)
        require_share("spread", self.spread)
        if not 0 < self.multiple < math.inf:
            raise OptionError(f"multiple is {self.multiple}, must be above 0 and finite")

    def shares(self, importances: Mapping[str, Numbers]) -> dict[str, float]:
        """Returns the sparsity of each tensor, as in `thresholds.Allocation`."""
        ratios = {name: self._ratio(array) for name, array in importances.items()}
        low, high = min(ratios.values(), default=0.0), max(ratios.values(), default=0.0)
        scale = 2 * self.spread / (high - low) if high > low else 0.0
        wanted = {name: -scale * ratio for name, ratio in ratios.items()}
        return _allocated(wanted, {name: array.size for name, array in importances.items()}, self.share)

    def _ratio(self, array: Numbers) -> float:
        values = np.maximum(array.astype(np.float64), 0)  # pruned positions can have negative importances
        return float((values > self.multiple * values.mean()).mean()) if values.size else 0.0


@dataclass(frozen=True)
class Rising:
    """Higher sparsity for later tensors: sparsities rise in equal steps (ATP; Huang et al., 2025).

    Example: ``prune(model, importances, Rising(0.6), scope="tensor")``.

    Attributes:
        share: share of all positions that is pruned.
        rise: the last tensor's sparsity minus the first's; can be negative.
    """

    share: float
    rise: float = 0.2

    def __post_init__(self) -> None:
        require_share("share", self.share)
        if not -1 <= self.rise <= 1:
            raise OptionError(f"rise is {self.rise}, must be from -1 to 1")

    def shares(self, importances: Mapping[str, Numbers]) -> dict[str, float]:
        """Returns the sparsity of each tensor, as in `thresholds.Allocation`."""
        last = max(len(importances) - 1, 1)
        wanted = {name: self.rise * place / last for place, name in enumerate(importances)}
        return _allocated(wanted, {name: array.size for name, array in importances.items()}, self.share)


def _allocated(wanted: Mapping[str, float], sizes: Mapping[str, int], share: float) -> dict[str, float]:
    """Shifts sparsities by a common amount and clips them to [0, 1], so that the model reaches ``share``."""
    total = sum(sizes.values())

    def lost(shift: float) -> float:
        return sum(size * min(max(wanted[name] + shift, 0.0), 1.0) for name, size in sizes.items())

    low, high = -1 - max(wanted.values(), default=0.0), 1 - min(wanted.values(), default=0.0)
    for _ in range(60):  # halves the interval to the precision of float64
        middle = (low + high) / 2
        low, high = (middle, high) if lost(middle) < share * total else (low, middle)
    return {name: min(max(value + high, 0.0), 1.0) for name, value in wanted.items()}
