"""The scores of all weights of a model as a hierarchy, from a shared network to a logit for each weight.

score = start + share · network + share · layer + share · rows + share · columns + share · weights

The start is the logarithm of an importance without learning, standardised over the model. The shared network
adds a function of a weight's features. Each layer, row and column has a logit, and optionally each weight.
All logits are initialised to zero, so that the initial scores have the same order as the start. The shares
are factors on the levels; they are 1 during learning.

Thresholds come from histograms: during learning, of a sample of the weights (all weights of a small model);
at the end, of all weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .masked import LEVELS, Groups, ScoredWeight
from .processes import ALONE, Processes
from .sharded import Sharded
from .sharded_masking import ShardedWeight
from .sums import row_sums
from .task import as_matrix
from .thresholds import count_of_share

Shares = Mapping[str, float]

_BINS = 1 << 13
_LIMIT = 12.0  # of a start, in standard deviations; zeros and outliers are clamped to it
_SAMPLE = 1 << 20  # sampled weights of the model, for the thresholds during learning
_LEAST_SAMPLE = 1 << 10  # minimum of a tensor
_BLOCK = 1 << 17  # weights in one batch of the network
_WIDTH = 16  # of the network's hidden layers


class Levels:
    """The scores of a model's weights.

    Attributes:
        scored: name -> the scores of the weight tensor.
        network: the shared network, features [n, features] -> [n, 1], or None.
        shares: factors on the levels, by the names of `LEVELS`.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        *,
        network: bool,
        own: torch.dtype | None,
        temperature: float,
        seed: int = 0,
        groups: Mapping[str, Groups] | None = None,
        sharded: Sharded | None = None,
    ) -> None:
        """Args:
        weights: the weights by name.
        start: initial importances, not negative, by the same names.
        network: whether there is a shared network.
        own: the dtype of the logits of single weights, float16 or float32; None means no such logits.
        temperature: temperature of the straight-through estimator of the mask.
        seed: seed of the sample and of the network's first layers.
        groups: the groups of a pattern in each weight, with the same number of members; None means no
            pattern.
        sharded: the weights and the starts are divided among its processes, which then call each method
            together; None means whole ones. There is no network then.
        """
        self._groups = dict(groups or {})
        self.sharded = sharded
        self._processes = ALONE if sharded is None else sharded.processes
        generator = torch.Generator().manual_seed(seed)
        if sharded is not None:
            start = {name: sharded.local(name, one) for name, one in start.items()}
        standard = standard_starts(start, self._processes)
        total = sum(weight.numel() for weight in weights.values())
        self.scored: dict[str, ScoredWeight] = {}
        self._sizes: dict[str, float] = {}
        for name, weight in weights.items():
            sample = _sample(weight.numel(), total, generator).to(weight.device)
            self._sizes[name] = weight.numel() / len(sample)
            group, given = self._groups.get(name), standard[name]
            if sharded is None:
                self.scored[name] = ScoredWeight(
                    weight, given, sample, own=own, temperature=temperature, groups=group
                )
            else:
                self.scored[name] = ShardedWeight(
                    sharded, name, given, sample, own=own, temperature=temperature, groups=group
                )
        self.shares = dict.fromkeys(LEVELS, 1.0)
        self.network: nn.Sequential | None = None
        self._features: dict[str, _Features] = {}
        self._collected: Tensor | None = None
        if network:
            self.network = _network(seed).to(next(iter(weights.values())).device)
            last = max(len(self.scored) - 1, 1)
            for number, (name, part) in enumerate(self.scored.items()):
                self._features[name] = _Features(part, number / last)
        self.refresh()

    def parameters(self) -> dict[str, list[Tensor]]:
        """Returns the trainable tensors by level; except for the network, one for each weight tensor."""
        found: dict[str, list[Tensor]] = {}
        if self.network is not None:
            found["network"] = list(self.network.parameters())
        shared = zip(*(part.logits() for part in self.scored.values()), strict=True)
        found |= {level: list(logits) for level, logits in zip(LEVELS[1:-1], shared, strict=True)}
        own = [part.own for part in self.scored.values() if part.own is not None]
        return found | {LEVELS[-1]: own} if own else found

    def take(self, shares: Shares) -> None:
        """Sets factors on the levels."""
        self.shares = {**self.shares, **shares}
        for part in self.scored.values():
            part.shares = self.shares

    def set_threshold(self, sparsity: float, *, exact: bool = False) -> float:
        """Sets and returns the threshold for a sparsity; with a pattern, how many weights each group loses.

        Args:
            sparsity: the share of all weights below the threshold.
            exact: True uses all weights, False only the sample.
        """
        if self._groups:
            found = float(count_of_share(sparsity, next(iter(self._groups.values())).of))
        elif exact:
            found = quantile(self._all_scores, sparsity, self._processes)
        else:
            sampled = self._processes.of_all([part.sampled_scores() for part in self.scored.values()])
            parts = list(zip(sampled, self._sizes.values(), strict=True))
            found = quantile(lambda: parts, sparsity)
        self.take_threshold(found)
        return found

    def take_threshold(self, threshold: float) -> None:
        """Sets a known threshold."""
        for part in self.scored.values():
            part.threshold = threshold

    def _all_scores(self) -> Iterable[tuple[Tensor, float]]:
        return (
            (part.scores(block), 1.0)
            for part in self.scored.values()
            for block in part.blocks(len(part.start))
        )

    def collect(self, processes: Processes = ALONE) -> None:
        """Moves the gradients of the sample from the weights to the network's sum over all processes."""
        if self.network is None:
            return
        parts = [part.sampled for part in self.scored.values()]
        self._collected = processes.added(self._collected, torch.cat(parts))
        for part in parts:
            part.zero_()

    def learn_network(self) -> None:
        """Backpropagates the collected gradients of the sample to the network, and resets them."""
        assert self.network is not None
        assert self._collected is not None
        sizes = [len(part.sample) for part in self.scored.values()]
        for (name, part), gradient in zip(
            self.scored.items(), torch.split(self._collected, sizes), strict=True
        ):
            for first in range(0, len(part.sample), _BLOCK):
                piece = slice(first, first + _BLOCK)
                out = self.network(self._features[name].at(part.sample[piece]))[:, 0]
                torch.autograd.backward(out, gradient[piece] * self._sizes[name])
        self._collected = None

    def refresh(self) -> None:
        """Recomputes the network's output for each weight."""
        if self.network is None:
            return
        with torch.no_grad():
            for name, part in self.scored.items():
                if part.network is None:
                    part.network = torch.zeros_like(part.start, dtype=torch.float16)
                flat = part.network.view(-1)
                for first in range(0, len(flat), _BLOCK):
                    last = min(first + _BLOCK, len(flat))
                    positions = torch.arange(first, last, device=flat.device)
                    flat[first:last] = self.network(self._features[name].at(positions))[:, 0].half()

    def importances(self, sparsity: float) -> dict[str, Tensor]:
        """Returns softplus(score − threshold), by name, float32, of the weights' shapes and shards.

        The threshold is that of all weights together, also with a pattern, so that importances of different
        groups can be compared.
        """
        threshold = quantile(self._all_scores, sparsity, self._processes)
        out = {}
        for name, part in self.scored.items():
            whole, scores_of = part.start.new_empty(part.shape), part.scorer()
            # Of shards too, the whole weight: the bits of softplus depend on the place in a block, because
            # the last numbers of it are not computed by vector instructions.
            for block in part.blocks():
                whole[block] = nn.functional.softplus(scores_of(block) - threshold)
            whole = whole.view(part.weight.shape)
            if self.sharded is not None:
                own = whole[part.first : part.first + len(part.start)]
                whole = self.sharded.like(name, own.clone())
            out[name] = whole
        return out

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint. Excludes the starts, which are recomputed."""
        return {
            "logits": {
                name: [*(x.detach() for x in part.logits()), part.own] for name, part in self.scored.items()
            },
            "given by the network": {name: part.network for name, part in self.scored.items()},
            "collected": self._collected,
            "network": None if self.network is None else self.network.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores the state of an earlier run."""
        with torch.no_grad():
            for name, part in self.scored.items():
                for logit, kept in zip((*part.logits(), part.own), state["logits"][name], strict=True):
                    if logit is not None:
                        logit.copy_(kept)
                part.network = _beside(part.start, state["given by the network"][name])
                self._collected = _beside(part.start, state["collected"])
        if self.network is not None:
            self.network.load_state_dict(state["network"])


def _beside(other: Tensor, kept: Tensor | None) -> Tensor | None:
    """Returns a tensor on the device of another one."""
    return None if kept is None else kept.to(other.device)


def standard_starts(start: Mapping[str, Tensor], processes: Processes = ALONE) -> dict[str, Tensor]:
    """Returns the logarithms of importances, with mean 0 and standard deviation 1 over those above 0.

    Args:
        start: importances, not negative, by name; with several processes, the rows of each.
        processes: the processes.

    Returns:
        float32 by name, clamped to ±`_LIMIT`; an importance of 0 gives −`_LIMIT`.
    """
    positive, sums, powers = 0, [], []
    for importance in start.values():
        for block in torch.split(importance.flatten(1), _rows_at_once(importance)):
            logs = torch.where(block > 0, block.double().log(), 0.0)
            positive += int((block > 0).sum())
            sums.append(row_sums(logs))
            powers.append(row_sums(logs.square_()))
    # Exact sums of the sums of rows have the same bits for each division of the rows.
    rows = processes.of_all([torch.cat(sums), torch.cat(powers)])
    total, squares = (math.fsum(values.tolist()) for values in rows)
    count = round(sum(row[0] for row in processes.exchanged(lambda: [float(positive)], 1)))
    mean = total / max(count, 1)
    spread = math.sqrt(max(squares / max(count, 1) - mean**2, 0.0))
    # Rounding gives equal values a small non-zero deviation, far below their magnitude.
    scale = 1 / spread if spread > 1e-6 * max(abs(mean), 1e-30) else 0.0
    out = {}
    for name, importance in start.items():
        logs = importance.float().log().sub_(mean).mul_(scale).clamp_(-_LIMIT, _LIMIT)
        out[name] = torch.where(importance > 0, logs, -_LIMIT)
    return out


def quantile(
    parts: Callable[[], Iterable[tuple[Tensor, float]]], share: float, processes: Processes = ALONE
) -> float:
    """Returns a number that the given share of all numbers does not exceed, from two nested histograms.

    Args:
        parts: returns tensors of numbers, each with the weight of one of its numbers; called several times.
        share: at least 0, below 1.
        processes: the processes whose numbers are counted together; the weights are then whole numbers.

    Returns:
        The upper edge of the bin of the second histogram that contains the quantile; −∞ if the share rounds
        to no number.
    """
    if share <= 0:
        return -math.inf
    low, high, total = math.inf, -math.inf, 0.0
    for values, weight in parts():
        if values.numel():
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            total += weight * values.numel()
    rows = processes.exchanged(lambda: [low, high, total], 3)
    low, high = min(row[0] for row in rows), max(row[1] for row in rows)
    total = sum(row[2] for row in rows)
    wanted, below = count_of_share(share, round(total)), 0.0  # the weights sum to a whole number
    if not wanted:
        return -math.inf
    # Slightly wider, so that rounding puts no number outside of the bins.
    low, high = low - 1e-6 - abs(low) * 1e-6, high + 1e-6 + abs(high) * 1e-6
    for _ in range(2):
        counts = torch.zeros(_BINS, dtype=torch.float64)
        for values, weight in parts():
            counts += weight * torch.histc(values, _BINS, low, high).double().cpu()
        counts = processes.summed(counts)
        sums = counts.cumsum(0) + below
        place = min(int(torch.searchsorted(sums, wanted)), _BINS - 1)
        below = float(sums[place] - counts[place])
        width = (high - low) / _BINS
        low, high = low + place * width, low + (place + 1) * width
        if high - low <= 1e-7 * max(abs(low), abs(high), 1e-30):
            break
    return high


def _rows_at_once(weight: Tensor) -> int:
    return max(1, _BLOCK * weight.shape[0] // max(weight.numel(), 1))


def _sample(size: int, total: int, generator: torch.Generator) -> Tensor:
    """Returns one random position from each of equal parts of a flat tensor: int64, ascending."""
    count = min(size, max(_LEAST_SAMPLE, round(_SAMPLE * size / total))) if total > _SAMPLE else size
    edges = torch.linspace(0, size, count + 1, dtype=torch.float64).round().long()
    spans = edges[1:] - edges[:-1]
    return edges[:-1] + (torch.rand(count, generator=generator, dtype=torch.float64) * spans).long()


class _Features:
    """The input features of the shared network for one weight tensor: start and value of a weight, and
    statistics of its row, column and layer. Values are logarithms relative to the layer's root mean square.
    """

    COUNT = 9

    def __init__(self, part: ScoredWeight, depth: float) -> None:
        """Args:
        part: the scores of the weight tensor.
        depth: its place in the model, from 0 to 1.
        """
        matrix = as_matrix(part.weight).float()
        height, width = matrix.shape
        self._start, self._matrix, self._width = part.start.view(-1), as_matrix(part.weight), width
        norms = [(matrix.square().mean(dim) + 1e-30).log() / 2 for dim in (1, 0)]
        self._log_rms = float((matrix.square().mean() + 1e-30).log() / 2)
        self._rows = torch.stack([norms[0] - self._log_rms, part.start.mean(1)], 1)
        self._columns = torch.stack([norms[1] - self._log_rms, part.start.mean(0)], 1)
        self._layer = torch.tensor(
            [depth, math.log(height / width), float(part.start.mean())], device=matrix.device
        )

    def at(self, positions: Tensor) -> Tensor:
        """Returns the features of the weights at positions of the flat tensor, float32 [n, COUNT]."""
        row, column = positions // self._width, positions % self._width
        start = self._start[positions]
        values = self._matrix[row, column].float()
        log = ((values.abs() + 1e-30).log() - self._log_rms).clamp(-5, 5)
        return torch.cat(
            [
                torch.stack([start.clamp(-5, 5), log], 1),
                self._rows[row],
                self._columns[column],
                self._layer.expand(len(positions), -1),
            ],
            1,
        )


def _network(seed: int) -> nn.Sequential:
    """Creates a small network whose last layer is initialised to zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second, last = (
            nn.Linear(_Features.COUNT, _WIDTH),
            nn.Linear(_WIDTH, _WIDTH),
            nn.Linear(_WIDTH, 1),
        )
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(first, nn.GELU(), second, nn.GELU(), last)
