"""What pruning is done for: a model, its data, and the loss that says how well it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import LossError, OptionError

# What is called with a batch's inputs: a module, or a module with other weights.
Model = Callable[..., Any]
Data = Iterable[Any]
Weights = Mapping[str, Tensor]
# Called after each step of what learns, with its number and its loss.
Progress = Callable[[int, float], None]

OBJECTIVES = ("divergence", "loss")


def run_model(model: Model, batch: Any) -> Tensor:
    """The outputs of a batch.

    Args:
        model: called with the batch, with its first element where it is a tuple or list, or with its items
            but ``labels`` as keywords where it is a mapping.
        batch: as the loader gives it.

    Returns:
        [..., classes]: what the model returns, or its attribute ``logits``.

    Raises:
        OptionError: it returns something else.
    """
    if isinstance(batch, Mapping):
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
    else:
        outputs = model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    result = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(result, Tensor):
        raise OptionError(
            f"the model returns a {type(outputs).__name__}, not a tensor and nothing with logits; "
            "give a Task whose run takes the outputs from it"
        )
    return result


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    """The mean negative log-likelihood, in nats, of the labels: a batch's second element, or ``labels``."""
    labels = batch["labels"] if isinstance(batch, Mapping) else batch[1]
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten())


@dataclass(frozen=True)
class Task:
    """How a batch goes through a model, and what it costs.

    Attributes:
        run: (model, batch) -> outputs [..., classes].
        loss: (outputs, batch) -> a scalar.
    """

    run: Callable[[Model, Any], Tensor] = run_model
    loss: Callable[[Tensor, Any], Tensor] = cross_entropy


CLASSIFY = Task()


def divergence(outputs: Tensor, dense: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of outputs from the dense model's, in nats, mean over the positions.

    Args:
        outputs, dense: unnormalised log-probabilities [..., classes].
    """
    log_p, log_q = dense.float().log_softmax(-1), outputs.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def require_objective(objective: str) -> None:
    """Refuses what is none of `OBJECTIVES`.

    Raises:
        OptionError: it is another.
    """
    if objective not in OBJECTIVES:
        raise OptionError(f"objective is {objective!r}, must be {' or '.join(OBJECTIVES)}")


def cost(pruned: Model, batch: Any, task: Task, dense: Model | None) -> Tensor:
    """What a batch costs, in nats: the divergence from the dense model's outputs, or the task's loss.

    Args:
        pruned: the model, through which gradients go.
        batch: as the loader gives it.
        task: how it goes through both.
        dense: the dense model; None takes the loss.
    """
    outputs = task.run(pruned, batch)
    if dense is None:
        return task.loss(outputs, batch)
    with torch.no_grad():
        wanted = task.run(dense, batch)
    return divergence(outputs, wanted)


def with_weights(model: nn.Module, weights: Weights) -> Model:
    """The model as a function, with other weights in the place of some of its own; tied ones in all."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, dict(weights), args, kwargs)

    return call


def prunable(model: nn.Module) -> list[str]:
    """The names of the weights of linear and convolutional layers, each once.

    An embedding, and what is tied to one, is not among them.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds) and id(module.weight) not in embeddings:
            found.setdefault(id(module.weight), f"{name}.weight" if name else "weight")
    return list(found.values())


def chosen_weights(model: nn.Module, names: Sequence[str] | None) -> dict[str, Tensor]:
    """The weights that are pruned, detached, by name.

    Args:
        names: of the parameters; None takes those of `prunable`.

    Raises:
        OptionError: a name is no float parameter of rank 2 or more, or there are none.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen = list(names) if names is not None else prunable(model)
    for name in chosen:
        if name not in parameters:
            raise OptionError(f"the model has no parameter {name!r}")
        if parameters[name].dim() < 2 or not parameters[name].is_floating_point():
            raise OptionError(f"{name!r} is no float matrix")
    if not chosen:
        raise OptionError("the model has no linear or convolutional layers; name the tensors")
    return {name: parameters[name].detach() for name in chosen}


def require_shapes(weights: Weights, given: Weights, what: str) -> None:
    """Refuses numbers of other shapes than the weights of the same names.

    Args:
        weights: by name, those of ``given`` among them.
        given: by name.
        what: they are, such as "mask".

    Raises:
        OptionError: a shape is another.
    """
    for name, numbers in given.items():
        if numbers.shape != weights[name].shape:
            raise OptionError(
                f"the {what} of {name!r} has shape {list(numbers.shape)}, not {list(weights[name].shape)}"
            )


def finite(loss: Tensor, when: str) -> float:
    """A loss as a number.

    Args:
        when: it was taken, such as "step 3".

    Raises:
        LossError: it is infinite or no number.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise LossError(
            f"the loss is {value} at {when}: look at the batch and the model's weights, or take a lower rate"
        )
    return value


def as_matrix(weight: Tensor) -> Tensor:
    """A weight of rank 2 or more as the matrix [rows, columns] of SPEC.md chapter 2."""
    return weight.flatten(1)


def endless(data: Data, start: int = 0) -> Iterator[Any]:
    """The batches over and over, from the batch number ``start`` on, which counts through all rounds.

    Raises:
        OptionError: there is no batch.
    """
    skipped = start
    while True:
        seen = 0
        for batch in data:
            seen += 1
            if skipped:
                skipped -= 1
                continue
            yield batch
        if not seen:
            raise OptionError("the data have no batch, or can be gone through only once")
        skipped %= seen


def first(data: Data, count: int) -> Iterator[Any]:
    """The first ``count`` batches, beginning again where there are fewer."""
    return islice(endless(data), count)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode, so that dropout and running statistics are still; put back afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
