"""Adam with steps scaled by the share of signal in the gradients.

Theory of operation: with many parameters and few batches, the gradient of a single parameter is almost only
noise, but Adam's normalised steps move it as fast as any other. The mean of m̂² / v̂ over many parameters
measures the signal: for pure noise it is a number f that follows from Adam's first coefficient; for a
gradient that is the same in all batches it is 1. Let q = (mean − f) / (1 − f) be the share of signal in a
gradient's power. A sum over n batches then has the power n² q of signal and n (1 − q) of noise. The step is
multiplied by the share of signal in this sum, n q / (n q + 1 − q), where n is the number of steps of the run.

Large tensors are processed in blocks of rows. Parameters and moments may have 16 bits, with stochastic
rounding (`rounding`): moments are bfloat16, since gradients may be tiny; parameters are float16, since they
are of order 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .processes import ALONE, Processes
from .rounding import rounded
from .sums import row_sums

BETAS = (0.9, 0.95)
_TINY = 1e-24  # mean squared gradients below this count as zero
_MEMORY = 0.9  # decay of the running mean of the share of signal
_POOL = 16  # minimum number of parameters of a tensor for a gain of its own
# Parameters in a block, with about 20 bytes of working memory each. On the CPU they fit into the caches;
# elsewhere they are enough to keep a device busy.
_AT_ONCE = {"cpu": 1 << 18}
_AT_ONCE_ELSEWHERE = 1 << 24


class SignalAdam:
    """Adam for groups of tensors, with a gain on each step.

    Attributes:
        gains: group -> the factors on the last steps of its tensors.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[Tensor]],
        steps: int,
        divided: Mapping[str, Sequence[int]] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Args:
        groups: name -> tensors of the same kind: float32, or float16 with moments of 16 bits.
        steps: number of steps of the run.
        divided: name of a group whose rows are divided among the processes -> for each of its tensors the
            number of this process's first row. All processes then call each method together.
        processes: the processes.
        """
        self._divided, self._processes = dict(divided or {}), processes
        self._groups = {name: list(tensors) for name, tensors in groups.items()}
        self._steps = steps
        self._moments = {
            name: [(_moment_like(x), _moment_like(x)) for x in tensors]
            for name, tensors in self._groups.items()
        }
        self._taken = dict.fromkeys(self._groups, 0)
        self._shares = {name: [0.0] * len(tensors) for name, tensors in self._groups.items()}
        # For a step in progress: its rate, and the places of the tensors without a step yet, in order.
        self._rates: dict[str, float] = {}
        self._left: dict[str, dict[int, None]] = {}
        self.gains: dict[str, list[float]] = {name: [] for name in self._groups}

    def step(self, name: str, rate: float) -> None:
        """Takes a step of one group, and releases its gradients.

        Args:
            name: name of the group.
            rate: the rate for gradients without noise.
        """
        self.begin(name, rate)
        self.end(name)

    def begin(self, name: str, rate: float) -> None:
        """Begins a step of one group; then `advance` can be called for each tensor, before `end`."""
        self._taken[name] += 1
        self._rates[name] = rate
        self._left[name] = dict.fromkeys(range(len(self._groups[name])))
        self.gains[name] = [0.0] * len(self._groups[name])

    @torch.no_grad()
    def advance(self, name: str, place: int, gradient: Tensor | None = None) -> None:
        """Takes the step of one tensor, and releases its gradient. Leaves groups of small tensors to `end`.

        Args:
            name: name of the group.
            place: index of the tensor in its group.
            gradient: its gradient, float32; None takes the tensor's ``grad``.
        """
        if self._pools(name) or place not in self._left[name]:
            return
        del self._left[name][place]
        self._move(name, place, self._gain(name, place, self._learn(name, place, gradient)))

    @torch.no_grad()
    def end(self, name: str) -> None:
        """Takes the steps of the remaining tensors of a group."""
        if not self._pools(name):
            for place in list(self._left[name]):
                self.advance(name, place)
            return
        found = [self._learn(name, place, None) for place in self._left[name]]
        power = sum(power for power, _ in found), sum(alive for _, alive in found)
        for place in range(len(found)):
            self._move(name, place, self._gain(name, place, power))

    def release(self) -> None:
        """Releases the memory of the moments; no step can be taken afterwards."""
        self._moments = {name: [] for name in self._groups}

    def _pools(self, name: str) -> bool:
        """Returns whether the signal is measured over all tensors of a group, because they are small."""
        return name not in self._divided and max((x.numel() for x in self._groups[name]), default=0) < _POOL

    def _learn(self, name: str, place: int, gradient: Tensor | None) -> tuple[float, int]:
        """Updates the moments of a tensor, and releases its gradient.

        Returns:
            The sum of m̂² / v̂, and the number of parameters with gradients.
        """
        x, (mean, square) = self._groups[name][place], self._moments[name][place]
        gradient = x.grad if gradient is None else gradient
        powers: list[Tensor] = []
        alive = 0
        for block in _blocks(x):
            new = None if gradient is None else _matrix(gradient)[block]
            m, v = _matrix(mean)[block].float(), _matrix(square)[block].float()
            if new is None:
                new = torch.zeros_like(m)
            m.lerp_(new, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(new, new, value=1 - BETAS[1])
            self._keep(mean, block, m, name, place, 0)
            self._keep(square, block, v, name, place, 1)
            alive += v.numel() if v.amin() > _TINY else int((v > _TINY).sum())
            powers.append(row_sums(self._direction(name, m, v).square_()))
        x.grad = None
        found = torch.cat(powers) if powers else x.new_zeros(0, dtype=torch.float32)
        if name in self._divided:
            (found,) = self._processes.of_all([found])
            alive = int(sum(row[0] for row in self._processes.exchanged(lambda: [float(alive)], 1)))
        # Exact, so that the bits do not depend on the blocks.
        return math.fsum(found.tolist()), alive

    def _move(self, name: str, place: int, gain: float) -> None:
        """Takes the step of a tensor along its moments."""
        x, (mean, square) = self._groups[name][place], self._moments[name][place]
        for block in _blocks(x):
            step = self._direction(name, _matrix(mean)[block].float(), _matrix(square)[block].float())
            moved = _matrix(x)[block].float().sub_(step, alpha=self._rates[name] * gain)
            self._keep(x, block, moved, name, place, 2)

    def _direction(self, name: str, mean: Tensor, square: Tensor) -> Tensor:
        """Returns m̂ / √v̂ for the moments m and v."""
        first, second = (1 - beta ** self._taken[name] for beta in BETAS)
        return (
            torch.sqrt(square)
            .add_((_TINY * second) ** 0.5)
            .reciprocal_()
            .mul_(mean)
            .mul_(second**0.5 / first)
        )

    def _keep(self, whole: Tensor, block: slice, values: Tensor, name: str, place: int, label: int) -> None:
        """Stores a block of float32 numbers, rounded if the tensor has 16 bits."""
        target = _matrix(whole)[block]
        if whole.dtype is torch.float32:
            if target.data_ptr() != values.data_ptr():
                target.copy_(values)
            return
        first = block.start + (self._divided[name][place] if name in self._divided else 0)
        target.copy_(rounded(values, whole.dtype, first, self._taken[name], 3 * place + label))

    def _gain(self, name: str, place: int, power: tuple[float, int]) -> float:
        """Updates the share of signal of a tensor and returns the factor on its step.

        Args:
            name: name of the group.
            place: index of the tensor in its group.
            power: the sum of m̂² / v̂, and the number of parameters with gradients.
        """
        first, count = BETAS[0], self._taken[name]
        of_noise = (1 - first) / (1 + first) * (1 + first**count) / (1 - first**count)
        # In the first step signal and noise cannot be distinguished.
        share = (power[0] / max(power[1], 1) - of_noise) / (1 - of_noise) if count > 1 else 0.0
        shares = self._shares[name]
        shares[place] += (1 - _MEMORY) * (share - shares[place])
        share = min(max(shares[place] / (1 - _MEMORY**count), 0.0), 1.0)
        gain = self._steps * share / (self._steps * share + 1 - share)
        self.gains[name][place] = gain
        return gain

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {"moments": self._moments, "taken": self._taken, "shares": self._shares}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores the state of an earlier run."""
        for name, moments in self._moments.items():
            for own, kept in zip(moments, state["moments"][name], strict=True):
                own[0].copy_(kept[0])
                own[1].copy_(kept[1])
        self._taken = dict(state["taken"])
        self._shares = {name: list(shares) for name, shares in state["shares"].items()}


def _moment_like(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.bfloat16 if x.dtype is torch.float16 else torch.float32)


def _matrix(x: Tensor) -> Tensor:
    """Returns a view of a tensor as a matrix; of a vector or a number, as one row."""
    return x.detach().view(-1, x.shape[-1]) if x.dim() > 1 else x.detach().view(1, -1)


def _blocks(x: Tensor) -> Iterator[slice]:
    """Yields blocks of the rows of `_matrix`."""
    height, width = _matrix(x).shape
    step = max(1, _AT_ONCE.get(x.device.type, _AT_ONCE_ELSEWHERE) // max(width, 1))
    return (slice(first, min(first + step, height)) for first in range(0, height, step))
