"""The input features of the importance network.

Rules: every feature is one number per weight, standardised over all weights of the model and clamped to ±5.
One network therefore fits all tensors, and the features do not depend on the scales of weights and gradients.
Magnitudes are logarithms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .calibration_sums import Statistics

CLAMP = 5.0
_TINY = 1e-30  # added before a logarithm


def _log(x: Tensor) -> Tensor:
    return (x + _TINY).log()


def _ranks(scores: Tensor, dim: int) -> Tensor:
    """Returns the rank of each element along a dimension, scaled to 0 … 1."""
    order = scores.argsort(dim)
    count = scores.shape[dim]
    shape = [1, 1]
    shape[dim] = count
    places = torch.linspace(0, 1, count, device=scores.device).reshape(shape).expand_as(scores)
    return torch.empty_like(scores).scatter_(dim, order, places)


class _Tensor:
    """One weight as a matrix [outputs, inputs], with quantities that several features share."""

    def __init__(self, weight: Tensor, found: Statistics, depth: float) -> None:
        matrix = found.layout.matrix
        self.w, self.g, self.fisher = matrix(weight.float()), matrix(found.gradient), matrix(found.fisher)
        self.x = torch.ones(self.w.shape[1], device=self.w.device) if found.inputs is None else found.inputs
        self.wanda = self.w.abs() * self.x.sqrt()
        self.depth = depth
        self._weight, self._layout = weight, found.layout

    def flat(self, feature: Tensor) -> Tensor:
        """Flattens a feature, [rows, columns] or broadcastable to it, in the weight's element order."""
        return self._layout.back(feature.to(self.w.device).expand_as(self.w), self._weight).reshape(-1)


def _constant(value: float) -> Tensor:
    return torch.tensor([[value]])


# Name -> function that computes the feature of a tensor, [rows, columns] or broadcastable to it.
FEATURES: dict[str, Callable[[_Tensor], Tensor]] = {
    "sign": lambda t: t.w.sign(),
    "log magnitude": lambda t: _log(t.w.abs()),
    "log square of input": lambda t: _log(t.x)[None],
    "log Fisher": lambda t: _log(t.fisher),
    "log Fisher times square": lambda t: _log(t.fisher * t.w.square()),
    "log gradient times weight": lambda t: _log((t.g * t.w).abs()),
    "minus gradient times weight": lambda t: -t.g * t.w,
    "rank in row": lambda t: _ranks(t.wanda, 1),
    "rank in column": lambda t: _ranks(t.wanda, 0),
    "log norm of row": lambda t: _log(t.w.norm(dim=1, keepdim=True)),
    "log norm of column": lambda t: _log(t.w.norm(dim=0, keepdim=True)),
    "log Fisher of row": lambda t: _log(t.fisher.mean(1, keepdim=True)),
    "log Fisher of column": lambda t: _log(t.fisher.mean(0, keepdim=True)),
    "log Fisher of layer": lambda t: _log(t.fisher.mean().reshape(1, 1)),
    "log size of layer": lambda t: _constant(float(t.w.numel())).log(),
    "log rows over columns": lambda t: _constant(t.w.shape[0] / t.w.shape[1]).log(),
    "depth": lambda t: _constant(t.depth),
}


def features(weights: Mapping[str, Tensor], found: Mapping[str, Statistics]) -> Tensor:
    """Returns the features of all weights, tensor after tensor: float16 [weights, features].

    Memory: 2 bytes per weight and feature; at the peak, 4 more bytes per weight for one feature.
    """
    total = sum(weight.numel() for weight in weights.values())
    device = next(iter(weights.values())).device
    out = torch.empty(total, len(FEATURES), dtype=torch.float16, device=device)
    views = [
        _Tensor(weight, found[name], number / max(len(weights) - 1, 1))
        for number, (name, weight) in enumerate(weights.items())
    ]
    for column, feature in enumerate(FEATURES.values()):
        parts = [view.flat(feature(view)).to(device) for view in views]
        out[:, column] = standardised(torch.cat(parts)).clamp(-CLAMP, CLAMP)
    return out


def standardised(values: Tensor) -> Tensor:
    """Returns the values with mean 0 and standard deviation 1; all zeros if they are equal."""
    centred = values - values.mean()
    spread = centred.square().mean().sqrt()
    # Rounding gives equal values a small non-zero deviation, far below their magnitude.
    if float(spread.detach()) <= 1e-6 * float(values.detach().abs().max()):
        return torch.zeros_like(values)
    return centred / spread
