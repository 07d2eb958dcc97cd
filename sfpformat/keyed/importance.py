"""The importance of the keys of a linear model: from the curvature of its loss, and learned.

The model is ``features @ (gates * weights) + intercept``, with a gate of 0 or 1 for each key. A gate that is
closed changes the loss, to second order, by -g + h / 2, where g and h are the first and second derivatives by
the gate.

`curvature_importance` is h / 2 with all gates open: what a key costs at a minimum of the loss (LeCun, Denker
and Solla 1990, "Optimal Brain Damage"). `learned_importance` minimises the loss plus a penalty for each gate
that stays open, and takes the derivatives where most gates are closed: also closed gates have derivatives, so
that keys come back (the straight-through estimator of Bengio, Leonard and Courville 2013).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..coding.quantisers import F32
from ..encode.quantise import F64
from ..errors import OptionError

# Scales of scores, among which `_scale` searches. The greatest is bounded, because few texts without an error
# would ask for an infinite one.
_SCALES = np.geomspace(2.0**-8, 4.0, 21)
_FINE = np.geomspace(2.0**-0.5, 2.0**0.5, 9)
_FITTED = 20_000  # texts by which the scale is chosen


class Texts(NamedTuple):
    """Texts as features, with their labels.

    Attributes:
        features: a matrix of scipy.sparse [texts, keys].
        labels: int64 [texts], the number of the right output; with one output, 1 for its side, 0 for the
            other. Of a regressor: float64 [texts, C].
    """

    features: Any
    labels: NDArray[Any]


class LinearModel(NamedTuple):
    """A linear model.

    Attributes:
        weights: [keys, C].
        intercept: [C].
        is_regressor: whether its loss is the squared error; otherwise the cross-entropy.
    """

    weights: F32
    intercept: F64
    is_regressor: bool = False


@dataclass(frozen=True, eq=False)
class Learned:
    """What `learned_importance` found.

    Attributes:
        importance: of each key, float64 [keys], not negative.
        losses: the loss of the held-out texts before the first round and after each, with the share of keys
            that is kept. The importance is that of the least.
    """

    importance: F64
    losses: list[float]

    @property
    def rounds(self) -> int:
        """The number of rounds after which the importance was taken; 0 if learning did not help."""
        return int(np.argmin(self.losses))


def curvature_importance(model: LinearModel, texts: Texts, training: Any = None) -> F64:
    """Returns half of the second derivative of the mean loss by the gate of each key: float64 [keys].

    For the cross-entropy, this is the share of texts with the key, times the variance of its weights by the
    probabilities of the outputs.

    Args:
        model: the linear model.
        texts: texts that were not in training. Their labels decide the scale of scores, which texts of
            training would exaggerate.
        training: features of more texts, such as those of training, or None.
    """
    scale = 1.0 if model.is_regressor else _scale(_scores(model, texts.features, None), texts.labels)
    found, count = np.zeros(len(model.weights)), 0
    for features in (texts.features, training):
        if features is not None:
            found += _curvature(model, features, scale)
            count += features.shape[0]
    return np.asarray(np.maximum(found, 0) / (2 * max(count, 1)))


def _curvature(model: LinearModel, features: Any, scale: float) -> F64:
    """Returns the second derivative of the sum of losses by each gate."""
    weights = model.weights.astype(np.float64)
    squared = features.tocsr().astype(np.float64)
    squared.data **= 2
    if model.is_regressor:
        counts = np.asarray(squared.sum(axis=0)).reshape(-1)
        return np.asarray(counts * (2 * np.square(weights).sum(axis=1)))
    shares = _shares(scale * _scores(model, features, None))
    if _is_binary(model):
        weights = np.hstack((np.zeros_like(weights), weights))
    found = _columns(squared.T @ shares, np.square(weights))
    for c in range(weights.shape[1]):
        for other in range(c, weights.shape[1]):
            both = squared.T @ (shares[:, c] * shares[:, other])
            found -= (1 if c == other else 2) * both * (weights[:, c] * weights[:, other])
    return np.asarray(found * (scale * scale))


def learned_importance(
    model: LinearModel,
    texts: Texts,
    held_out: Texts,
    start: F64,
    keep: float,
    *,
    rounds: int = 12,
    rate: float = 0.1,
) -> Learned:
    """Learns the importance of each key for the share of keys that is kept. Deterministic.

    In each round, the gates of the most important keys are open, and the importance moves by ``rate`` towards
    what each key changes of the loss from there. The penalty for an open gate is the importance at which the
    share of open gates is ``keep``.

    Args:
        model: its weights stay as they are.
        texts: from which the importance is learned; not those of training, in which rare keys look better
            than they are.
        held_out: by which the best round is chosen: other texts, from other sources.
        start: the importance before, such as of `curvature_importance`: float64 [keys], not negative, in
            units of the mean loss.
        keep: the share of keys that is kept, above 0 and at most 1.
        rounds: how often the derivatives are computed.
        rate: above 0 and at most 1.
    """
    if not 0 < keep <= 1 or not 0 < rate <= 1 or rounds < 0:
        words = f"keep is {keep}, rate {rate}, rounds {rounds}"
        raise OptionError(f"{words}; keep and rate must be above 0 and at most 1, rounds at least 0")
    importance = np.array(start, np.float64)
    used = np.unique(texts.features.indices)  # keys of these texts: the others have no derivatives
    features = texts.features[:, used].tocsr()
    transposed = features.T.tocsr()
    own = LinearModel(model.weights[used], model.intercept, model.is_regressor)
    scale = 1.0 if model.is_regressor else _scale(_scores(model, held_out.features, None), held_out.labels)
    losses, best = [], importance
    for number in range(rounds + 1):
        gates = _open(importance, keep)
        losses.append(_loss(model, held_out, gates, scale))
        if losses[-1] == min(losses):
            best = importance
        if number == rounds:
            break
        slope = _slope(own, features, transposed, texts.labels, gates[used], scale)
        # From an open gate, what closing it would cost; from a closed one, what opening it would save.
        change = np.where(gates[used], start[used], -start[used]) - slope
        importance = importance.copy()
        importance[used] += rate * (change - importance[used])
    return Learned(np.maximum(best - min(float(best.min(initial=0)), 0.0), 0), losses)


def _open(importance: F64, keep: float) -> NDArray[np.bool_]:
    """Returns which gates are open: those of the most important keys, the first of equal ones."""
    out = np.zeros(len(importance), np.bool_)
    out[np.argsort(-importance, kind="stable")[: round(keep * len(importance))]] = True
    return out


def _is_binary(model: LinearModel) -> bool:
    return model.weights.shape[1] == 1 and not model.is_regressor


def _scores(model: LinearModel, features: Any, gates: NDArray[np.bool_] | None) -> F64:
    """Returns the scores of texts: float64 [texts, C], of a classifier with one output [texts, 2]."""
    weights = model.weights if gates is None else model.weights * gates[:, None]
    found = np.asarray(features @ weights + model.intercept, np.float64)
    return np.hstack((np.zeros_like(found), found)) if _is_binary(model) else found


def _shares(scores: F64) -> F64:
    """Returns the probability of each output (softmax)."""
    found = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(found / found.sum(axis=1, keepdims=True))


def _cross_entropy(scores: F64, labels: NDArray[Any]) -> float:
    greatest = scores.max(axis=1)
    total = np.log(np.exp(scores - greatest[:, None]).sum(axis=1)) + greatest
    return float(np.mean(total - scores[np.arange(len(labels)), labels]))


def _scale(scores: F64, labels: NDArray[Any]) -> float:
    """Returns the factor of scores with the least cross-entropy: margins of an SVM are no logarithms of odds,
    and without most keys scores are smaller."""
    step = -(-len(labels) // _FITTED)
    some, own = scores[::step], labels[::step]
    found = 1.0
    for factors in (_SCALES, _FINE):
        each = [_cross_entropy(found * factor * some, own) for factor in factors]
        found *= float(factors[int(np.argmin(each))])
    return found


def _loss(model: LinearModel, texts: Texts, gates: NDArray[np.bool_], scale: float) -> float:
    """Returns the mean loss of texts."""
    scores = _scores(model, texts.features, gates)
    if model.is_regressor:
        return float(np.square(scores - texts.labels).sum(axis=1).mean())
    return _cross_entropy(scale * scores, texts.labels)


def _slope(
    model: LinearModel,
    features: Any,
    transposed: Any,
    labels: NDArray[Any],
    gates: NDArray[np.bool_],
    scale: float,
) -> F64:
    """Returns the derivative of the mean loss by each gate."""
    scores = _scores(model, features, gates)
    if model.is_regressor:
        return np.asarray(_columns(transposed @ (2 * (scores - labels)), model.weights) / len(labels))
    errors = _shares(scale * scores)
    errors[np.arange(len(labels)), labels] -= 1
    if _is_binary(model):
        errors = errors[:, 1:]
    return np.asarray(_columns(transposed @ errors, model.weights) * (scale / len(labels)))


def _columns(left: NDArray[Any], right: NDArray[Any]) -> F64:
    """Returns the sums of the products in each row: in the order of columns, the same everywhere."""
    out = np.zeros(len(left))
    for c in range(left.shape[1]):
        out += left[:, c] * right[:, c]
    return out
