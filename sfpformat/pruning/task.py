"""Tasks: run a model on a batch, and compute its loss or its divergence from the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import LossError, OptionError
from .batches import (
    IGNORED,
    Kind,
    arguments_of,
    kind_of,
    labels_of,
    require_unshifted,
    required_labels,
    takes_labels,
)
from .padding import counted_labels, counted_outputs, unpadded
from .weight_selection import Weights
from .weight_selection import as_matrix as as_matrix
from .weight_selection import chosen_weights as chosen_weights

# A callable for a batch's inputs: a module, or a module with replaced weights.
Model = Callable[..., Any]
Data = Iterable[Any]
# Called after each step of learning or tuning, with its number and its loss.
Progress = Callable[[int, float], None]

OBJECTIVES = ("divergence", "loss")


def run_model(model: Model, batch: Any) -> Tensor:
    """Runs a model on a batch and returns its outputs.

    Args:
        model: called with the batch's inputs, or with the items of a mapping as keyword arguments. Only an
            encoder-decoder (transformers' ``is_encoder_decoder``) gets the labels, from which it makes the
            decoder's inputs.
        batch: a mapping, a pair of inputs and labels, or inputs alone.

    Returns:
        The model's result, or its ``logits``: [..., classes].

    Raises:
        OptionError: the model returns something else, or the batch is a tuple or list that does not have one
            or two elements.
    """
    decodes = kind_of(module_of(model)) is Kind.SEQ2SEQ
    return logits_of(_call(model, batch, labels_of(batch) if decodes else None))


def logits_of(outputs: Any) -> Tensor:
    """Returns a model's result if it is a tensor [..., classes], else its item or attribute ``logits``.

    Raises:
        OptionError: there is no such tensor.
    """
    result = outputs
    if isinstance(outputs, Mapping):
        result = outputs.get("logits")
    elif not isinstance(outputs, Tensor):
        result = getattr(outputs, "logits", None)
    if not isinstance(result, Tensor) or result.dim() < 1:
        raise OptionError(
            f"the model returns a {type(outputs).__name__} without logits: give a model with a head, or a "
            "Task whose run returns the outputs [..., classes]"
        )
    return result


def _call(model: Model, batch: Any, labels: Any) -> Any:
    """Returns a model's result for a batch; passes ``labels`` if they are not None."""
    args, named = arguments_of(batch)
    if labels is not None:
        named["labels"] = labels
    return model(*args, **named)


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    """Returns the mean negative log-likelihood of a batch's labels, each for the output at its position.

    Args:
        outputs: unnormalised log-probabilities [..., classes].
        batch: a pair of inputs and labels, or a mapping with ``labels``. Labels are class numbers, one for
            each output, or probabilities of the outputs' shape. Labels of -100 are ignored.

    Returns:
        A scalar, in nats.

    Raises:
        OptionError: there are no labels, or their shape does not fit.
        LossError: all labels are ignored.
    """
    return likelihood(outputs, required_labels(batch))


def likelihood(outputs: Tensor, labels: Tensor, *, causal: bool = False) -> Tensor:
    """Returns the mean negative log-likelihood of labels, a scalar in nats.

    Args:
        outputs: as in `cross_entropy`.
        labels: the labels of `cross_entropy`'s batch.
        causal: whether output t of outputs [batch, positions, classes] is compared with class number t + 1.

    Raises:
        OptionError: the shape of the labels does not fit.
        LossError: all labels are ignored.
    """
    if labels.is_floating_point():
        if labels.shape != outputs.shape:
            raise OptionError(
                f"float labels have shape {list(labels.shape)}, the outputs {list(outputs.shape)}: "
                "probabilities need the same shape; for another loss give a Task"
            )
        return F.cross_entropy(outputs.flatten(0, -2), labels.flatten(0, -2))
    leading = outputs.shape[:-1]
    same = [n for n in labels.shape if n != 1] == [n for n in leading if n != 1]
    if not leading or labels.numel() != math.prod(leading) or not (same or labels.dim() == 1):
        raise OptionError(
            f"the labels have shape {list(labels.shape)}, the outputs {list(outputs.shape)}: outputs need "
            "their classes last, and a label at each position; for another loss give a Task"
        )
    if causal and len(leading) > 1:
        outputs, labels = outputs[..., :-1, :], labels.reshape(leading)[..., 1:]
    flat = labels.flatten().long()
    if not bool((flat != IGNORED).any()):
        raise LossError(f"the batch has no loss, because all its labels are {IGNORED} or padding")
    return F.cross_entropy(outputs.flatten(0, -2), flat)


@dataclass(frozen=True)
class Task:
    """Defines how a model runs on a batch, and its loss.

    By default a model that takes ``labels`` computes its own loss, as in transformers. For other models the
    loss is `cross_entropy`; for causal language models, of each output with the next label. Padding is
    ignored in losses, in divergences, and in statistics of layers' inputs.

    Example: ``Task(run=lambda model, batch: model(**batch).prediction_logits)``.

    Attributes:
        run: (model, batch) -> outputs [..., classes].
        loss: (outputs, batch) -> a scalar, in nats. None takes the default; if ``run`` is not the default,
            that is the cross-entropy.
        unpadded: batch -> bool [batch, positions], False for padding; or None if there is no padding.
        distance: (outputs, outputs of the dense model, batch) -> a scalar of at least 0, which is 0 if both
            are equal; for the objective ``divergence``. None takes `divergence`.
    """

    run: Callable[[Model, Any], Tensor] = run_model
    loss: Callable[[Tensor, Any], Tensor] | None = None
    unpadded: Callable[[Any], Tensor | None] = unpadded
    distance: Callable[[Tensor, Tensor, Any], Tensor] | None = None

    def loss_of(self, model: Model, batch: Any) -> Tensor:
        """Returns the loss of a batch, a differentiable scalar in nats.

        Raises:
            OptionError: the batch has no labels, outputs and labels do not fit, or the labels of a causal
                model are already shifted.
            LossError: all labels are ignored.
        """
        if self.loss is not None:
            return _scalar(self.loss(self.run(model, batch), batch))
        module = module_of(model)
        require_unshifted(module, batch)
        kind = kind_of(module)
        labels = counted_labels(labels_of(batch), self.unpadded(batch), kind)
        if self.run is run_model:
            returned = _call(model, batch, labels if takes_labels(module) else None)
            own = _own_loss(returned)
            if own is not None:
                return own
            outputs = logits_of(returned)
        else:
            outputs = self.run(model, batch)
        if not isinstance(labels, Tensor):
            labels = required_labels(batch)
        return likelihood(outputs, labels, causal=kind is Kind.CAUSAL)

    def divergence_of(self, model: Model, dense: Model | Tensor, batch: Any) -> Tensor:
        """Returns the distance of a batch's outputs from the dense model's, by default without padding.

        Args:
            model: gradients are computed through it.
            dense: the dense model, or its outputs for this batch.
            batch: a batch from the loader.

        Raises:
            OptionError: the outputs do not fit each other or the padding mask, or ``distance`` returns no
                scalar.
            LossError: all positions are padding or ignored.
        """
        outputs = self.run(model, batch)
        with torch.no_grad():
            wanted = dense if isinstance(dense, Tensor) else self.run(dense, batch)
        if self.distance is not None:
            return _scalar(self.distance(outputs, wanted, batch), "distance")
        kind = kind_of(module_of(model))
        return divergence(outputs, wanted, counted_outputs(outputs, batch, self.unpadded(batch), kind))


def _own_loss(returned: Any) -> Tensor | None:
    """Returns a model's own loss: its ``loss``, a scalar result, or a scalar first element; else None."""
    if isinstance(returned, Mapping):
        found = returned.get("loss")
    elif isinstance(returned, (Tensor, tuple)):
        found = returned[0] if isinstance(returned, tuple) and returned else returned
        if not isinstance(found, Tensor) or found.dim():
            return None
    else:
        found = getattr(returned, "loss", None)
    # Models on several devices return one loss for each device.
    return found.mean() if isinstance(found, Tensor) else None


def _scalar(loss: Tensor, what: str = "loss") -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise OptionError(f"the {what} of the Task returns a {found}, must return a tensor of one number")
    return loss.reshape(())


CLASSIFY = Task()


def divergence(outputs: Tensor, dense: Tensor, counted: Tensor | None = None) -> Tensor:
    """Returns the Kullback-Leibler divergence KL(dense ‖ outputs), in nats, mean over the positions.

    Args:
        outputs, dense: unnormalised log-probabilities [..., classes].
        counted: bool [...], True for the positions to include; None includes all.

    Raises:
        OptionError: the shapes differ, or there is only one class, for which the divergence is always 0.
        LossError: no position is included.
    """
    if outputs.shape != dense.shape:
        raise OptionError(
            f"the outputs have shape {list(outputs.shape)}, the dense model's {list(dense.shape)}"
        )
    if outputs.shape[-1] < 2:
        raise OptionError("the divergence of outputs of one class is always 0; use the objective loss")
    if counted is not None:
        outputs, dense = outputs[counted], dense[counted]
    if not outputs.numel():
        raise LossError("the batch has no divergence, because all its positions are padding or have no label")
    result: Tensor = _divergence(outputs, dense)
    return result


# Outputs for which the divergence is computed at once, with about 20 bytes of working memory each. On the CPU
# they fit into the caches; elsewhere they are enough to keep a device busy.
_AT_ONCE = {"cpu": 1 << 18}
_AT_ONCE_ELSEWHERE = 1 << 24


class _Divergence(torch.autograd.Function):
    """The divergence, computed in blocks of positions, so that only the gradient is kept in full size."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, dense: Tensor) -> Tensor:
        classes = outputs.shape[-1]
        flat, wanted = outputs.reshape(-1, classes), dense.reshape(-1, classes)
        gradient = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=outputs.device)
        step = max(1, _AT_ONCE.get(outputs.device.type, _AT_ONCE_ELSEWHERE) // classes)
        for first in range(0, len(flat), step):
            rows = slice(first, first + step)
            log_p, log_q = wanted[rows].float().log_softmax(-1), flat[rows].float().log_softmax(-1)
            p = log_p.exp()
            # A class with log-probability -inf in the dense model adds 0.
            total += torch.where(p == 0, 0, log_p.sub_(log_q).mul_(p)).sum()
            if gradient is not None:
                gradient[rows] = log_q.exp_().sub_(p).div_(len(flat))
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        ctx.shape = outputs.shape
        return total / len(flat)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * above.to(gradient.dtype)).view(ctx.shape), None


_divergence: Any = _Divergence.apply  # typed here, since torch's functions have no types


def require_objective(objective: str) -> None:
    """Refuses an unknown objective.

    Raises:
        OptionError: the objective is not one of `OBJECTIVES`.
    """
    if objective not in OBJECTIVES:
        raise OptionError(f"objective is {objective!r}, must be {' or '.join(OBJECTIVES)}")


def cost(pruned: Model, batch: Any, task: Task, dense: Model | Tensor | None) -> Tensor:
    """Returns the objective of a batch, in nats: divergence from the dense model, or the task's loss.

    Args:
        pruned: the model; gradients are computed through it.
        batch: a batch from the loader.
        task: runs both models and computes the loss.
        dense: the dense model, or its outputs for this batch; None takes the task's loss.
    """
    return task.loss_of(pruned, batch) if dense is None else task.divergence_of(pruned, dense, batch)


@dataclass(frozen=True)
class WithWeights:
    """A model as a function, with some weights replaced.

    Attributes:
        module: the model, which is unchanged.
        weights: replacements by name; a tied weight is replaced in all its places.
    """

    module: nn.Module
    weights: Weights

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.module, dict(self.weights), args, kwargs)


def with_weights(model: nn.Module, weights: Weights) -> WithWeights:
    """Returns the model with replaced weights, as a function."""
    return WithWeights(model, weights)


def module_of(model: Model) -> nn.Module | None:
    """Returns the module behind a model; None if the model is another kind of function."""
    found = model.module if isinstance(model, WithWeights) else model
    return found if isinstance(found, nn.Module) else None


def finite(loss: Tensor, when: str) -> float:
    """Returns a loss as a number.

    Args:
        loss: a scalar.
        when: the place for the error message, such as "step 3".

    Raises:
        LossError: the loss is infinite or NaN.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise LossError(
            f"the loss is {value} at {when}: check the batch and the model's weights, or use a lower rate"
        )
    return value


def endless(data: Data, start: int = 0, without: Container[int] = ()) -> Iterator[Any]:
    """Yields the batches of `numbered`, without their places."""
    return (batch for _, _, batch in numbered(data, start, without))


def numbered(data: Data, start: int = 0, without: Container[int] = ()) -> Iterator[tuple[int, int, Any]]:
    """Yields the batches repeatedly, from batch number ``start``, which counts over all repetitions.

    Args:
        data: batches.
        start: number of the first batch.
        without: places in ``data`` of batches that are left out and not counted.

    Returns:
        Tuples of the number of complete repetitions by this iterator, the number of the batch within its
        repetition, and the batch.

    Raises:
        OptionError: the data have no batch left, or cannot be iterated again.
    """
    skipped = start
    for repetition in count():
        seen = 0
        for place, batch in enumerate(data):
            if place in without:
                continue
            seen += 1
            if skipped:
                skipped -= 1
                continue
            yield repetition, seen - 1, batch
        if not seen:
            raise OptionError("the data are empty, or can be iterated only once; give a list or a loader")
        skipped %= seen


def first(data: Data, count: int) -> Iterator[Any]:
    """Returns the first ``count`` batches; repeats the data if there are fewer.

    Raises:
        OptionError: there is no batch, or ``count`` is below 1.
    """
    if not isinstance(count, int) or count < 1:
        raise OptionError(f"batches is {count!r}, must be a whole number of at least 1")
    return islice(endless(data), count)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Context in which models are in evaluation mode; restores each module's mode afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
