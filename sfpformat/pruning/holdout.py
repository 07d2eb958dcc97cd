"""Held-out batches, and the selection of the result by their loss.

Rules: a search selects the factor on each learned level by the loss on held-out batches. Factors of 0, which
are the initial scores, are always a candidate. The result is therefore never worse than the initial scores on
these batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, warn
from .identity import FIRST, Identity, of_batches, of_held_out
from .levels import Levels, Shares
from .masked import LEVELS
from .processes import ALONE, Processes
from .task import Data, Model, Task, cost, finite, numbered

_EVERY = 8  # of the first batches, every eighth is held out
_JOINT = (0.25, 0.5, 1.0, 1.5)  # candidate factors on all levels together
# Groups of levels with the same factor, and candidate factors relative to the joint one; each candidate is a
# pass over the batches. The first learned group is not searched, because the joint search covers it.
_GROUPS = (("layer", "row", "column"), ("network",), ("weight",))
_SINGLE = (0.0, 0.5, 1.5)
NONE: dict[str, float] = dict.fromkeys(LEVELS, 0.0)  # the initial scores


class Split:
    """Splits data into held-out batches and batches to learn from.

    Attributes:
        held_out: the held-out batches.
    """

    def __init__(self, data: Data, count: int, given: Data | None = None) -> None:
        """Args:
        data: batches; every eighth of the first ones is held out, or the last one if there are fewer than 8.
        count: maximum number of held-out batches.
        given: held-out batches to use instead of batches of ``data``.

        Raises:
            OptionError: there are no batches, or the data can be iterated only once.
        """
        if iter(data) is data:
            raise OptionError("the data can be iterated only once; give a list or a loader")
        self._data = data
        self._places: set[int] = set()
        self._first: list[Any] | None = None
        if given is not None:
            self.held_out = list(given)
            if not self.held_out:
                raise OptionError("held_out contains no batches")
            return
        first = list(islice(data, _EVERY * count))
        if not first:
            raise OptionError("the data contain no batches")
        places = list(range(_EVERY - 1, len(first), _EVERY)) or [len(first) - 1]
        self.held_out = [first[place] for place in places]
        self._first = first[:FIRST]
        if len(first) > 1:
            self._places = set(places)
        else:
            warn("the data contain only one batch, which both learns and selects the result; give held_out")

    def identity(self) -> Identity:
        """Returns the checksums of the first batches of the data, and of the held-out batches."""
        first = self._data if self._first is None else self._first
        return {**of_batches(first, self._data), **of_held_out(self.held_out)}

    def numbered(self, start: int) -> Iterator[tuple[int, int, Any]]:
        """Returns the other batches repeatedly, from batch number ``start``, as `task.numbered`.

        Raises:
            OptionError: there is no batch to learn from.
        """
        return numbered(self._data, start, self._places)


@dataclass(frozen=True)
class Choice:
    """The result of `choose`.

    Attributes:
        shares: the selected factors on the levels.
        start: the held-out loss with the mask of the initial scores, in nats, for each sparsity.
        chosen: the held-out loss with the selected mask; never above ``start``.
    """

    shares: dict[str, float]
    start: tuple[float, ...]
    chosen: tuple[float, ...]


def held_out_losses(
    levels: Levels,
    pruned: Model,
    dense: nn.Module | None,
    task: Task,
    batches: Sequence[Any],
    sparsities: Sequence[float],
    candidates: Sequence[Shares],
    processes: Processes = ALONE,
    *,
    checked: Callable[[Tensor, str], float] = finite,
    progress: Callable[[int], None] = lambda passes: None,
) -> list[tuple[float, ...]]:
    """Returns the mean loss of pruned models over held-out batches, for each candidate and sparsity.

    Args:
        levels: the scores. Its shares and thresholds are changed.
        pruned, dense, task, batches, sparsities, processes: as in `choose`.
        candidates: factors on the levels.
        checked: converts a loss, given the name of its batch, to a number.
        progress: called after each batch, with its number of passes.

    Raises:
        LossError: a loss is not finite, unless ``checked`` accepts it.
        ProcessError: another process failed.
    """
    thresholds = []
    for candidate in candidates:
        levels.take(candidate)
        thresholds.append([levels.set_threshold(sparsity, exact=True) for sparsity in sparsities])
    count = len(candidates) * len(sparsities)

    def of_batch(number: int) -> list[float]:
        """Returns the loss of a batch for each candidate and sparsity, flat."""
        idle = number >= len(batches)  # the last batches are fewer than the processes
        if idle and levels.sharded is None:
            return [0.0] * count
        # Sharded weights are gathered from all processes, so an idle one runs a batch of another.
        batch, values = batches[-1 if idle else number], []
        with torch.no_grad():
            # Only one batch of the dense model's outputs is kept.
            wanted = None if dense is None else task.run(dense, batch)
            for candidate, found in zip(candidates, thresholds, strict=True):
                levels.take(candidate)
                for threshold in found:
                    levels.take_threshold(threshold)
                    values.append(checked(cost(pruned, batch, task, wanted), f"held-out batch {number + 1}"))
        return [0.0] * count if idle else values

    totals = [0.0] * count
    for first in range(0, len(batches), processes.world):
        rows = processes.exchanged(partial(of_batch, first + processes.rank), count)
        for row in rows[: len(batches) - first]:
            totals = [total + value / len(batches) for total, value in zip(totals, row, strict=True)]
            progress(len(candidates))
    return [tuple(totals[i : i + len(sparsities)]) for i in range(0, count, len(sparsities))]


def choose(
    levels: Levels,
    pruned: Model,
    dense: nn.Module | None,
    task: Task,
    batches: Sequence[Any],
    sparsities: Sequence[float],
    progress: Callable[[int, int], None] = lambda done, total: None,
    processes: Processes = ALONE,
) -> Choice:
    """Selects factors on the levels by a line search on held-out batches, and sets them in ``levels``.

    The search takes up to eight passes over the batches, and three more with a shared network.

    Args:
        levels: the learned levels.
        pruned: the model with the masks of ``levels``.
        dense: the dense model, for the divergence; None takes the task's loss.
        task: runs both models and computes the loss.
        batches: the held-out batches.
        sparsities: the sparsities at which the result must not be worse than the initial scores.
        progress: called after each batch of each pass, with the number of passes over a batch so far, and
            their greatest possible total.
        processes: the processes of the run; they share the batches.

    Raises:
        LossError: a loss is not finite.
        ProcessError: another process failed.
    """
    learned = [level for level in LEVELS if level in levels.parameters()]
    groups = [
        group for group in ([level for level in group if level in learned] for group in _GROUPS) if group
    ]
    done, most = 0, (1 + len(_JOINT) + len(groups[1:]) * len(_SINGLE)) * len(batches)

    def advance(passes: int) -> None:
        nonlocal done
        done += passes
        progress(done, most)

    def losses(candidates: Sequence[Shares]) -> list[tuple[float, ...]]:
        return held_out_losses(
            levels, pruned, dense, task, batches, sparsities, candidates, processes, progress=advance
        )

    candidates = [NONE, *({**NONE, **dict.fromkeys(learned, share)} for share in _JOINT)]
    first = losses(candidates)
    start = first[0]

    def rise(loss: tuple[float, ...]) -> float:
        """Returns the mean ratio of losses to the initial ones; infinite if any loss rose."""
        if any(new > old for new, old in zip(loss, start, strict=True)):
            return float("inf")
        return sum(new / old if old > 0 else 1.0 for new, old in zip(loss, start, strict=True)) / len(start)

    best, at = candidates[0], start
    for candidate, loss in zip(candidates[1:], first[1:], strict=True):
        if rise(loss) < rise(at):
            best, at = candidate, loss
    if any(best.values()):
        for group in reversed(groups[1:]):
            candidates = [{**best, **{level: best[level] * factor for level in group}} for factor in _SINGLE]
            for candidate, loss in zip(candidates, losses(candidates), strict=True):
                if rise(loss) < rise(at):
                    best, at = candidate, loss
    levels.take(best)
    return Choice(best, start, at)
