"""Learns the scores of `levels` through a model with frozen weights.

Theory of operation: each step sets the threshold for its sparsity, runs the model with masked weights, and
computes the divergence from the dense model's outputs, or the task's loss. The backward pass of `masked`
gives the gradients of the logits of layers, rows, columns and weights. The shared network takes a step only
every few steps, from the gradients of a sample of the weights. The step size of each level depends on the
share of signal in its gradients (`signal`). At the end, held-out batches select a factor for each level
(`holdout`).

The sparsity rises along a cubic to the target, and rates fall along half a cosine. Progress is the share of
steps done or of time used, whichever is greater.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, warn
from ..names import listed
from .accumulation import Accumulation
from .checkpoints import Checkpoint
from .descent import sparsity_at
from .holdout import Choice, Split, choose
from .levels import Levels
from .masked import Groups, MaskedModel
from .processes import ALONE, Processes
from .sharded import Sharded, resharding
from .sharded_masking import masking_of
from .signal import SignalAdam
from .task import Progress, Task, cost, evaluating, finite, require_objective

_WARMUP = 5  # steps of linear warm-up of the rates
_FINAL = 0.05  # of the peak rate, at the end


@dataclass(frozen=True)
class Rates:
    """Peak rates per step, in standard deviations of the initial scores, for gradients without noise.

    Attributes:
        network: rate of the shared network's parameters; 0 means no network.
        shared: rate of the logits of layers, rows and columns.
        own: rate of the logits of single weights; 0 means no such logits.
    """

    network: float = 0.0
    shared: float = 0.02
    own: float = 0.01

    def of(self, level: str) -> float:
        """Returns the rate of one of `masked.LEVELS`."""
        return {"network": self.network, "weight": self.own}.get(level, self.shared)


@dataclass(frozen=True)
class Plan:
    """Settings of learning levels.

    Attributes:
        steps: number of optimiser steps.
        batches: number of batches of a step on each process; their gradients are averaged.
        minutes: time limit, after which learning ends early; None sets no limit.
        objective: ``divergence`` from the dense model's outputs, or the task's ``loss``.
        rates: peak rates of the levels.
        temperature: temperature of the straight-through estimator of the mask.
        start: sparsity of the first step.
        ramp: share of the steps after which the target sparsity is reached.
        network_every: number of steps between steps of the shared network.
        held_out: maximum number of held-out batches that select the result.
        half: whether the logits of single weights and their moments have 16 bits, with stochastic rounding,
            instead of 32.
        seed: seed of the sample of weights, of the network's initialisation, and of the sparsities drawn from
            a range.
    """

    steps: int = 200
    batches: int = 1
    minutes: float | None = None
    objective: str = "divergence"
    rates: Rates = Rates()
    temperature: float = 0.5
    start: float = 0.3
    ramp: float = 0.6
    network_every: int = 10
    held_out: int = 4
    half: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        require_objective(self.objective)
        if min(self.steps, self.batches, self.network_every, self.held_out) < 1:
            raise OptionError("steps, batches, network_every and held_out must be at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise OptionError(f"minutes is {self.minutes}, must be above 0")
        if not (0 <= self.start < 1 and 0 <= self.ramp <= 1):
            raise OptionError(
                f"start is {self.start} and ramp is {self.ramp}; start must be at least 0 and below 1, "
                "ramp from 0 to 1"
            )
        if not self.temperature > 0:
            raise OptionError(f"temperature is {self.temperature}, must be above 0")


class Learner:
    """The state of learning levels.

    Attributes:
        levels: the scores.
        step: number of steps taken.
        history: the loss of each step, in nats: the mean over its batches on all processes.
        seconds: total time of the steps on the first process.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        task: Task,
        plan: Plan,
        sparsities: tuple[float, float],
        processes: Processes = ALONE,
        groups: Mapping[str, Groups] | None = None,
        started: str = "given",
        sharded: Sharded | None = None,
    ) -> None:
        """Args:
        model: any module; `run` sets it to evaluation mode.
        weights: the model's own parameters, by name.
        start: initial importances by the same names.
        task: runs the model and computes the loss.
        plan: settings of learning.
        sparsities: the least and the greatest target sparsity.
        processes: the processes of the run, each with the whole model and the same data.
        groups: the groups of a pattern in each weight; None means no pattern. The sparsity is then the share
            that a group loses, rounded to whole weights.
        started: the kind of ``start``, which a resumed run must share.
        sharded: the weights and the starts are divided among ``processes``, which are those of its mesh;
            None means whole ones.
        """
        self._started = started
        # Logits that all weights of a group share change no choice within it.
        self._idle = ("layer", "row") if groups else ()
        self._pattern = {} if groups is None else {name: asdict(one) for name, one in groups.items()}
        self._processes = processes
        self._model, self._task, self._plan, self._sparsities = model, task, plan, sparsities
        rates = plan.rates
        self.levels = Levels(
            weights,
            start,
            network=rates.network > 0,
            own=(torch.float16 if plan.half else torch.float32) if rates.own else None,
            temperature=plan.temperature,
            seed=plan.seed,
            groups=groups,
            sharded=sharded,
        )
        self._masking = masking_of(model, weights, self.levels.scored, sharded)
        self._pruned = MaskedModel(model, {}, self._masking)
        divided = {} if sharded is None else {"weight": [part.first for part in self.levels.scored.values()]}
        self._optimiser = SignalAdam(self.levels.parameters(), plan.steps, divided, processes)
        advance = partial(self._optimiser.advance, "weight")
        self._gradients = Accumulation(list(self.levels.scored.values()), processes, advance)
        self._dense = model if plan.objective == "divergence" else None
        self.step, self.seconds = 0, 0.0
        self._last_places: list[list[float]] = []  # repetition and place of the last batch, if there is one
        self.history: list[float] = []

    def run(
        self,
        split: Split,
        progress: Progress,
        checkpoint: Checkpoint | None,
        every: int,
        chosen: Callable[[int, int], None] = lambda done, total: None,
        resumed: Callable[[int], None] = lambda step: None,
    ) -> Choice:
        """Learns, then selects the factor on each level with held-out batches.

        Args:
            split: the batches, the same on all processes.
            progress: called after each step with its number and its loss.
            checkpoint: learning resumes from it if it exists; None writes no checkpoint.
            every: number of steps between checkpoints.
            chosen: called during the selection, with the number of passes over a held-out batch so far, and
                their greatest possible total.
            resumed: called if learning resumes from a checkpoint, with the number of steps done.
        """
        processes, plan = self._processes, self._plan
        if checkpoint is not None:
            self.load(checkpoint)
        if self.step:
            resumed(self.step)
        # Process r takes batches r, r + world, …
        numbered = split.numbered(self.step * plan.batches * processes.world)
        batches = islice(numbered, processes.rank, None, processes.world)
        with evaluating(self._model), resharding(self._model):
            while not self.done:
                progress(self.step + 1, self.learn(batches))
                if checkpoint is not None and (self.step % every == 0 or self.done):
                    self.save(checkpoint)
            self._optimiser.release()
            self._require_used()
            low, high = self._sparsities
            return choose(
                self.levels,
                self._pruned,
                self._dense,
                self._task,
                split.held_out,
                sorted({low, high}),
                chosen,
                processes,
            )

    @property
    def done(self) -> bool:
        """Whether all steps are done or the time limit is reached."""
        return self.progress >= 1

    @property
    def progress(self) -> float:
        """The share of steps done or of time used, whichever is greater, from 0 to 1."""
        minutes = self._plan.minutes
        used = 0.0 if minutes is None else self.seconds / (60 * minutes)
        return max(self.step / self._plan.steps, min(used, 1.0))

    def sparsity(self) -> float:
        """Returns the sparsity of this step."""
        plan = self._plan
        return sparsity_at(
            self._sparsities, self.step, self.progress, start=plan.start, ramp=plan.ramp, seed=plan.seed
        )

    def learn(self, batches: Iterator[tuple[int, int, Any]]) -> float:
        """Takes one step and returns the loss.

        Args:
            batches: this process's batches, each with the numbers of `task.numbered`.

        Raises:
            OptionError: the processes have different numbers of batches.
            ProcessError: another process failed.
        """
        begun = time.monotonic()
        self.levels.set_threshold(self.sparsity())
        parameters = self.levels.parameters()
        leaves = [leaf for part in self.levels.scored.values() for leaf in part.logits()]
        falling = _FINAL + (1 - _FINAL) * 0.5 * (1 + math.cos(math.pi * self.progress))
        self.step += 1
        rates = {
            level: (level not in self._idle)
            * self._plan.rates.of(level)
            * min(1.0, self.step / _WARMUP)
            * falling
            for level in parameters
        }
        if "weight" in parameters:
            self._optimiser.begin("weight", rates["weight"])
        losses: list[float] = []
        for number in range(self._plan.batches):
            self._gradients.begin(last=number + 1 == self._plan.batches)
            losses += self._learn_batch(batches, leaves)
            self._gradients.end()
            self.levels.collect(self._processes)
        for level, rate in rates.items():
            if level == "weight":
                self._optimiser.end(level)
            elif level != "network":
                self._optimiser.step(level, rate)
            elif self.step % self._plan.network_every == 0:
                self.levels.learn_network()
                self._optimiser.step(level, rate)
                self.levels.refresh()
        self.history.append(sum(losses) / len(losses))
        # The time of the first process, so that all processes stop at the same step.
        used = self._processes.exchanged(lambda: [time.monotonic() - begun], 1)
        self.seconds += used[0][0]
        return self.history[-1]

    def _learn_batch(self, batches: Iterator[tuple[int, int, Any]], leaves: list[Tensor]) -> list[float]:
        """Runs one batch on each process, forward and backward. Returns the losses of all processes."""
        found: list[Any] = []

        def take() -> list[float]:
            repetition, place, batch = next(batches)
            found.append(batch)
            return [repetition, place]

        def forward() -> list[float]:
            loss = cost(self._pruned, found.pop(), self._task, self._dense)
            found.append(loss)
            return [finite(loss, f"step {self.step}")]

        # First the batches, so that an error in the data of one process finds no other in the model, where
        # sharded weights need all of them.
        places = self._processes.exchanged(take, 2)
        for before, after in pairwise([*self._last_places, *places]):
            if after not in ([before[0], before[1] + 1], [before[0] + 1, 0]):
                raise OptionError(
                    "the processes have different numbers of batches: give the same data, in the same order, "
                    "to all"
                )
        self._last_places = places[-1:]
        rows = self._processes.exchanged(forward, 1)
        if found[0].requires_grad:
            torch.autograd.backward(found[0], inputs=leaves)
        return [row[0] for row in rows]

    def gains(self) -> dict[str, float]:
        """Returns the mean gain of each level in its last step."""
        return {level: sum(g) / len(g) for level, g in self._optimiser.gains.items() if g}

    def _require_used(self) -> None:
        names = list(self.levels.scored)
        used = self._processes.exchanged(lambda: [name in self._masking.used for name in names], len(names))
        unused = [name for name, flags in zip(names, zip(*used, strict=True), strict=True) if not any(flags)]
        if unused and self.step:
            warn(
                f"the model's outputs did not depend on {listed(unused)}: nothing was learned for these "
                "tensors; they are pruned by their initial importances"
            )

    # ------------------------------------------------------------------------------------- checkpoints

    def _job(self) -> dict[str, Any]:
        shapes = {name: list(part.weight.shape) for name, part in self.levels.scored.items()}
        # A resumed run may have another time limit, and another number of processes if the total number of
        # batches per step is the same.
        batches = self._plan.batches * self._processes.world
        plan = {**asdict(self._plan), "minutes": None, "batches": batches}
        job = {"plan": plan, "sparsities": list(self._sparsities), "shapes": shapes}
        job["start"] = self._started
        return {**job, "pattern": self._pattern} if self._pattern else job

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "used": sorted(self._masking.used),
            "levels": self.levels.state(),
            "optimiser": self._optimiser.state(),
        }
        checkpoint.save(self._job(), state)

    def load(self, checkpoint: Checkpoint) -> None:
        """Resumes from a checkpoint if it exists.

        Raises:
            MismatchError: the checkpoint is damaged, or belongs to other settings, tensors, sparsities, data
                or another model.
        """
        state = checkpoint.load(self._job())
        if state is None:
            return
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self._masking.used |= set(state["used"])
        self.levels.restore(state["levels"])
        self._optimiser.restore(state["optimiser"])
