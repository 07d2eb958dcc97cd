"""Adam with a learning rate that warms up for some steps and then follows half a cosine."""

from __future__ import annotations

import math
from typing import Any

import torch

_BETAS = (0.9, 0.95)
_WARMUP = 10  # steps
_FINAL = 0.05  # of the peak


def rate_at(peak: float, step: int, steps: int, *, warmup: int = _WARMUP, final: float = _FINAL) -> float:
    """Returns the learning rate of a step.

    Args:
        peak: the greatest rate.
        step: number of the step, from 0.
        steps: total number of steps.
        warmup: number of steps of linear warm-up, from peak / warmup.
        final: the rate at the end, as a share of the peak.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / warmup) * (final + (1 - final) * cosine)


def adam(groups: list[dict[str, Any]], *, epsilon: float = 1e-8) -> torch.optim.Adam:
    """Creates the optimiser.

    Args:
        groups: parameter groups, each with its leaves, ``params``, and its peak rate, ``peak``.
        epsilon: Adam's epsilon; gradients much smaller than it have little effect.
    """
    return torch.optim.Adam(groups, betas=_BETAS, eps=epsilon)


def set_rates(optimiser: torch.optim.Adam, step: int, steps: int) -> None:
    """Sets the rates of all groups for a step; call it before ``optimiser.step()``."""
    for group in optimiser.param_groups:
        group["lr"] = rate_at(group["peak"], step, steps)
