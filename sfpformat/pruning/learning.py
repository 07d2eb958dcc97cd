"""Learns importances through a model with frozen weights, or together with the weights.

There are two methods. ``levels`` (`hierarchy`) learns logits of layers, rows, columns and single weights. The
step size of each level depends on the share of signal in its gradients, and held-out batches decide how much
of each level is kept. ``weights`` (`gated`) learns a shared network, and a logit for each weight.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..names import listed, require_known
from ..options.checks import is_number
from ..torch.ties import TiedNames
from .calibration import statistics
from .calibration_sums import Statistics
from .checkpoints import Checkpoint, ShardedCheckpoint
from .features import FEATURES
from .gated import GateLearner
from .hierarchy import Learner
from .holdout import Split
from .identity import identified, of_model
from .learning_settings import DEFAULTS, Learned, Settings
from .processes import ALONE, Processes
from .sharded import Sharded
from .starts import candidate_starts, pattern_groups, select_start, sparsity_of
from .task import CLASSIFY, Data, Progress, Task, chosen_weights, endless, evaluating
from .thresholds import Pattern
from .weight_selection import is_sharded

T = TypeVar("T")

Sparsities = float | tuple[float, float]


def bytes_per_weight(settings: Settings = DEFAULTS) -> int:
    """Returns the peak memory of `learn_importance` in bytes per weight.

    This is in addition to the model, its activations, and the gradient and a masked copy of the largest
    tensor. Importances given as ``start`` take 4 more bytes, and steps of several batches 4 more. Processes
    with sharded weights divide all of it among them, but each also has the scores of a whole tensor.
    """
    if settings.chosen_method == "levels":
        plan = settings.plan()
        held = 4 + (2 if plan.rates.network else 0)  # start; network's output
        if not plan.rates.own:
            return held + 4  # the importances, at the end
        # While learning, a logit and two moments; at the end, a logit and the importances.
        return held + (2 * 3 if plan.half else 4 * 3)
    features = 2 * len(FEATURES)
    scores = 4 * (2 + 2)  # start, base and its gradient; the scores
    logits = 4 * 4 if settings.logits else 0  # value, gradient, two moments
    gates = 4 * 4  # threshold's copy, soft, hard, sum
    gated = 4 * 2  # the weight times its gate, and the gradient
    statistics = 4 * 2
    trained = 4 * 4 if settings.weight_rate else 0
    return features + scores + logits + gates + gated + statistics + trained


def learn_importance(
    model: nn.Module,
    data: Data,
    sparsity: Sparsities | Pattern,
    *,
    task: Task = CLASSIFY,
    settings: Settings = DEFAULTS,
    tensors: Sequence[str] | None = None,
    found: Mapping[str, Statistics] | None = None,
    start: Mapping[str, Tensor] | None = None,
    held_out: Data | None = None,
    mlp: Mapping[str, Tensor] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 50,
    progress: Progress = lambda step, loss: None,
    chosen: Callable[[int, int], None] = lambda done, total: None,
    resumed: Callable[[int], None] = lambda step: None,
    group: Any = None,
) -> Learned:
    """Learns an importance for each weight. The model is unchanged.

    Example::

        learned = learn_importance(model, batches, 0.7)
        masks = prune(model, learned.importances, 0.7)

    Args:
        model: any module; run in evaluation mode.
        data: batches, repeated as often as needed.
        sparsity: the target sparsity over all tensors together, or a range (least, greatest) for which the
            importance should be valid; or a `Pattern`, such as ``Pattern(2, 4)``, along the inputs of each
            layer. Tensors that a pattern does not fit are not learned and get no importance. Patterns are
            only of the method ``levels``.
        task: runs the model and computes the loss.
        settings: settings of learning.
        tensors: names of parameters; None takes `weight_selection.prunable`.
        found: calibration statistics of these tensors; None computes them from ``data``.
        start: initial importances of these tensors, not negative and comparable over all tensors. None takes
            those of `starts.best_start` from ``found``. Only for the method ``levels``.
        held_out: batches that select the result and are not in ``data``. None holds out every eighth of the
            first batches of ``data``; if a loader shuffles, learning then also sees held-out examples. Only
            for the method ``levels``.
        mlp: initial state of the shared network, from another model's `Learned` by the same method.
        checkpoint: a file that is written atomically every ``every`` steps and after the last. If it exists,
            learning resumes from it, and batches that were already used are skipped. It contains a checksum
            of the model, of the held-out batches, of the first 8 batches, and of all batches if ``data`` is
            a list or a tuple. A loader that shuffles needs a generator with a seed, or its batches differ
            from those of the checkpoint.
        every: number of steps between checkpoints.
        progress: called after each step with its number and its loss.
        chosen: called while held-out batches select the result, with the number of passes over a batch that
            are done, and the greatest possible total. Only for the method ``levels``.
        resumed: called if learning resumes from a checkpoint, with the number of steps that are done.
        group: a process group of ``torch.distributed``, such as ``torch.distributed.group.WORLD``, whose
            processes learn together; None means this process alone. Each needs the same model, data and
            arguments. Process r takes the batches whose number is r modulo their number. All get the same
            result, the same bits as one process alone with as many ``Settings.batches`` a step. A process
            that stops answering is an error on the others after the time limit of the group. Only for the
            method ``levels``.

    A model that ``fully_shard`` divided by rows learns on the processes of its mesh, each with the start, the
    logits and the moments of its own rows. Importances are sharded like the weights, with the bits of one
    process with whole weights. In each batch all processes need to use the same weights. Each process writes
    two checkpoints in turn, ``CHECKPOINT.a.3-8`` and ``CHECKPOINT.b.3-8`` for process 3 of 8; as many
    processes resume from them.

    Warns: a pattern does not fit some tensors. An earlier version wrote the checkpoint, without checksums.

    Memory: `bytes_per_weight`, in addition to a training step of the model without an optimiser.

    Raises:
        OptionError: settings or names are invalid, there are no data, a pattern fits no tensor, or the folder
            of the checkpoint does not exist.
        MismatchError: the checkpoint is damaged, or belongs to other settings, tensors, sparsities, data or
            another model.
        LossError: a loss is not finite; the last checkpoint stays valid.
        ProcessError: another process failed or is gone; the last checkpoint stays valid.
    """
    pattern = sparsity if isinstance(sparsity, Pattern) else None
    share = sparsity if isinstance(sparsity, tuple) else sparsity_of(sparsity)
    if not isinstance(settings, Settings):
        raise OptionError(f"settings is a {type(settings).__name__}, must be Settings")
    low, high = share if isinstance(share, tuple) and len(share) == 2 else (share, share)
    if not (is_number(low) and is_number(high) and 0 <= low <= high < 1):
        raise OptionError(
            f"sparsity is {sparsity}, must be at least 0 and below 1, or two such numbers in ascending order"
        )
    path = None if checkpoint is None else Path(checkpoint)
    if settings.chosen_method == "levels":
        return _learn_levels(
            model,
            data,
            (low, high),
            pattern,
            task,
            settings,
            tensors,
            found,
            start,
            held_out,
            mlp,
            path,
            every,
            progress,
            chosen,
            resumed,
            group,
        )
    if is_sharded(model):
        raise OptionError(
            "these settings select the method weights, which needs whole weights on each process, and those "
            "of this model are sharded: take the method levels, or learn before fully_shard"
        )
    if start is not None or held_out is not None or group is not None or pattern is not None:
        raise OptionError(
            "these settings select the method weights, which accepts neither start, held_out and group nor "
            "patterns"
        )
    weights = chosen_weights(model, tensors)
    kept = None if path is None else Checkpoint(path, ALONE)
    if kept is not None:
        data, identity = identified(data)
        kept.belongs_to(lambda: {**of_model(model), **identity})
    if found is None:
        found = statistics(model, data, task=task, tensors=list(weights))
    found = _of_weights(model, found, weights, "found")
    learner = GateLearner(model, weights, found, task, settings, (low, high))
    if mlp is not None:
        learner.network.mlp.load_state_dict(dict(mlp))
        learner.network.refresh()
    if kept is not None:
        learner.load(kept)
    if learner.step:
        resumed(learner.step)
    batches = endless(data, learner.step)
    with evaluating(model):
        while learner.step < settings.steps:
            progress(learner.step + 1, learner.learn(next(batches)))
            if kept is not None and (learner.step % every == 0 or learner.step == settings.steps):
                learner.save(kept)
    return learner.learned()


def _learn_levels(
    model: nn.Module,
    data: Data,
    sparsities: tuple[float, float],
    pattern: Pattern | None,
    task: Task,
    settings: Settings,
    tensors: Sequence[str] | None,
    found: Mapping[str, Statistics] | None,
    start: Mapping[str, Tensor] | None,
    held_out: Data | None,
    mlp: Mapping[str, Tensor] | None,
    path: Path | None,
    every: int,
    progress: Progress,
    chosen: Callable[[int, int], None],
    resumed: Callable[[int], None],
    group: Any,
) -> Learned:
    sharded = Sharded(model, tensors, group) if is_sharded(model) else None
    if sharded is not None and (mlp is not None or settings.plan().rates.network):
        raise OptionError("the shared network needs whole weights on each process; leave out network_rate")
    names = list(chosen_weights(model, tensors) if sharded is None else sharded.weights)
    groups = None if pattern is None else pattern_groups(model, names, pattern)
    names = names if groups is None else list(groups)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = {name: parameters[name] for name in names}
    learned = {name: weight for name, weight in weights.items() if weight.numel()}
    if not learned:
        raise OptionError(f"{listed(names)} have no elements: there is nothing to learn")
    if sharded is None:
        processes = Processes(group, next(iter(learned.values())).device)
    else:
        processes = sharded.processes
    kind = Checkpoint if sharded is None else ShardedCheckpoint
    checkpoint = None if path is None else kind(path, processes)
    split = Split(data, settings.held_out, held_out)
    processes.require_same(
        split.held_out, "the processes have different batches: give the same data, in the same order, to all"
    )
    if checkpoint is not None:
        checkpoint.belongs_to(lambda: {**of_model(model), **split.identity()})
    name, losses = "given", {}
    if start is None:
        if found is None:
            found = statistics(model, data, task=task, tensors=names, group=group)
        found = _of_weights(model, found, weights, "found")
        candidates = candidate_starts(model, found, sum(sparsities) / 2)
        found = None  # releases the gradients
        earlier = None if checkpoint is None else checkpoint.started()
        if earlier in candidates:  # a run is resumed from the start that it had
            candidates = {earlier: candidates[earlier]}
        with evaluating(model):
            selected = select_start(
                model,
                learned,
                candidates,
                task,
                split.held_out,
                sorted(set(sparsities)),
                dense=model if settings.objective == "divergence" else None,
                processes=processes,
                groups=groups and {name: groups[name] for name in learned},
                sharded=sharded,
            )
        name, start, losses = selected.name, selected.importances, selected.losses
        del candidates, selected
    start = processes.agreed(partial(_required, model, start, weights, sharded))
    start = {name: start[name] for name in learned}
    if sharded is None:
        processes.require_same(
            start, "the processes have different initial importances or models; give all of them the same"
        )
    learner = Learner(
        model, learned, start, task, settings.plan(), sparsities, processes, groups, name, sharded
    )
    start = None
    network = learner.levels.network
    if mlp is not None:
        if network is None:
            raise OptionError("mlp needs a shared network, which exists only if network_rate is above 0")
        try:
            network.load_state_dict(dict(mlp))
        except RuntimeError as error:
            raise OptionError(
                "mlp does not fit the shared network; give the mlp of a result of the method levels"
            ) from error
        learner.levels.refresh()
    choice = learner.run(split, progress, checkpoint, every, chosen, resumed)
    scored = learner.levels.importances(sum(sparsities) / 2)
    importances = {
        name: scored[name] if name in learned else torch.zeros_like(weight, dtype=torch.float32)
        for name, weight in weights.items()
    }
    state = {} if network is None else {name: value.clone() for name, value in network.state_dict().items()}
    return Learned(importances, {}, learner.history, state, choice, name, losses)


def _required(
    model: nn.Module, start: Mapping[str, Tensor], weights: Mapping[str, Tensor], sharded: Sharded | None
) -> dict[str, Tensor]:
    """Returns the initial importances of all weights, by the names in ``weights``.

    Raises:
        OptionError: an importance is missing, has another shape, is negative or not finite, or belongs to a
            tensor that is not in ``weights``.
    """
    ties = TiedNames(dict(model.named_parameters(remove_duplicate=False)))
    require_known(start, [other for name in weights for other in ties.names_of(name)], "start")
    start = _of_weights(model, start, weights, "start")
    for name, weight in weights.items():
        if start[name].shape != weight.shape:
            raise OptionError(
                f"the start of {name!r} has shape {list(start[name].shape)}, not {list(weight.shape)}"
            )
        numbers = start[name] if sharded is None else sharded.local(name, start[name], "start")
        if not bool(torch.isfinite(numbers).all()) or bool((numbers < 0).any()):
            raise OptionError(f"the start of {name!r} has numbers that are negative or not finite")
    return {name: start[name].to(weight.device) for name, weight in weights.items()}


def _of_weights(
    model: nn.Module, given: Mapping[str, T], weights: Mapping[str, Tensor], argument: str
) -> dict[str, T]:
    """Returns the given value of each weight; any name of a tied weight is valid.

    Raises:
        OptionError: a weight has no value, a name is not a parameter, or two names of one tensor have
            different values.
    """
    ties = TiedNames(dict(model.named_parameters(remove_duplicate=False)))
    by_kept = ties.by_kept(given, argument)
    missing = [name for name in weights if ties.kept(name) not in by_kept]
    if missing:
        raise OptionError(f"{argument} has no value for {listed(missing)}")
    return {name: by_kept[ties.kept(name)] for name in weights}
