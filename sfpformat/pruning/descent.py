"""Adam, and the schedules of the learning rate (half a cosine) and of the sparsity (rising)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_BETAS = (0.9, 0.95)
_WARMUP = 10  # steps
_FINAL = 0.05  # of the peak


def trainable(weight: Tensor) -> Tensor:
    """Returns a copy of a weight to train, in at least 32 bits, as a leaf of autograd.

    Most steps of training are smaller than the distance of neighbouring numbers of 16 bits, and would be
    lost.
    """
    copy = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    return copy.requires_grad_()


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


def sparsity_at(
    sparsities: tuple[float, float], step: int, progress: float, *, start: float, ramp: float, seed: int
) -> float:
    """Returns the sparsity of a step: a cubic up to the target, then constant.

    Args:
        sparsities: the least and the greatest target; each step draws its own target between them.
        step: number of the step, from 0.
        progress: the share of learning that is done.
        start: the sparsity of the first step, unless the target is lower.
        ramp: the progress at which the target is reached.
        seed: seed of the targets.
    """
    low, high = sparsities
    # Seeded by the step, so that a resumed run draws the same numbers as an uninterrupted one.
    generator = torch.Generator().manual_seed(seed << 32 | step)
    target = low + (high - low) * float(torch.rand((), generator=generator))
    left = max(0.0, 1 - progress / ramp) if ramp else 0.0
    return target + (min(start, target) - target) * left**3


def adam(groups: list[dict[str, Any]], *, epsilon: float = 1e-8) -> torch.optim.Adam:
    """Returns a new optimiser.

    Args:
        groups: parameter groups, each with its leaves, ``params``, and its peak rate, ``peak``.
        epsilon: Adam's epsilon; gradients much smaller than it have little effect.
    """
    return torch.optim.Adam(groups, betas=_BETAS, eps=epsilon)


def set_rates(optimiser: torch.optim.Adam, step: int, steps: int) -> None:
    """Sets the rates of all groups for a step; call it before ``optimiser.step()``."""
    for group in optimiser.param_groups:
        group["lr"] = rate_at(group["peak"], step, steps)
