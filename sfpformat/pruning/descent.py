"""How everything here learns: Adam, at rates that warm up for some steps and fall along half a cosine."""

from __future__ import annotations

import math
from typing import Any

import torch

_BETAS = (0.9, 0.95)
_WARMUP = 10  # steps
_FINAL = 0.05  # of the peak


def rate_at(peak: float, step: int, steps: int, *, warmup: int = _WARMUP, final: float = _FINAL) -> float:
    """The rate of a step.

    Args:
        peak: the greatest rate.
        step: from 0 on.
        steps: how many there are.
        warmup: steps in which the rate rises from next to nothing.
        final: what is left at the end, a share of the peak.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / warmup) * (final + (1 - final) * cosine)


def adam(groups: list[dict[str, Any]], *, epsilon: float = 1e-8) -> torch.optim.Adam:
    """The optimiser.

    Args:
        groups: each with its leaves, ``params``, and its greatest rate, ``peak``.
        epsilon: under which a gradient counts as none.
    """
    return torch.optim.Adam(groups, betas=_BETAS, eps=epsilon)


def set_rates(optimiser: torch.optim.Adam, step: int, steps: int) -> None:
    """Gives all groups the rates of a step, before it is taken."""
    for group in optimiser.param_groups:
        group["lr"] = rate_at(group["peak"], step, steps)
