"""Prunes the demonstration's model by each method, for comparison. Needs torch.

Rules: all methods use the same windows of the training text (not the held-out texts), prune the same layers,
and have the same target sparsity over all of them. Learning and tuning take the same number of steps on the
same batches. Statistics that several methods need, such as the Fisher information, are computed once; their
time is added to that of each of these methods.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..pruning import scores
from ..pruning.calibration import statistics
from ..pruning.calibration_sums import Statistics
from ..pruning.layerwise import prune_layerwise
from ..pruning.learning import learn_importance
from ..pruning.learning_settings import Learned, Settings
from ..pruning.masks import masks_of
from ..pruning.pipeline import apply_masks
from ..pruning.task import Data, Progress
from ..pruning.thresholds import Sparsity
from ..pruning.tuning import Factors, Masks, Tuning, fine_tune, fit_factors, fit_multipliers, scaled
from ..pruning.weight_selection import as_numbers
from .language import (
    CALIBRATION_BATCHES,
    arrays_of,
    calibration_windows,
    language_model,
    learning_windows,
    prunable_layers,
)
from .variants import Tensors

# Peak rate of Adam for fine-tuning: the best of 3e-4, 1e-3 and 3e-3 for Fisher's mask at 80 %.
TUNING_RATE = 1e-3
FACTOR_STEPS = 120
FROZEN = Settings(method="weights")
LEVELS = Settings(method="levels")
# The network alone has a higher rate, because no other part learns.
ALONE = Settings(logits=False, network_rate=3e-3)
TOGETHER = Settings(weight_rate=TUNING_RATE)


@dataclass(frozen=True)
class Pruned:
    """A pruned model.

    Attributes:
        masks: bool by name, True for survivors.
        weights: weights of the masked layers by name, float32; pruned ones are zero, factors are not applied.
        factors: factors of rows and columns by name; empty if the method has none.
        seconds: the time of pruning, including everything that the method needs.
    """

    masks: dict[str, Tensor]
    weights: dict[str, Tensor]
    factors: Factors
    seconds: float

    def applied(self) -> dict[str, Tensor]:
        """Returns the weights times their factors, which are rounded to F16 as in a file."""
        return {
            name: scaled(w, *(f.half() for f in self.factors[name])) if name in self.factors else w
            for name, w in self.weights.items()
        }


Fitted = TypeVar("Fitted", covariant=True)


class _Fit(Protocol[Fitted]):
    """The common signature of `fine_tune`, `fit_factors` and `fit_multipliers`."""

    def __call__(
        self,
        model: torch.nn.Module,
        masks: Masks,
        data: Data,
        *,
        teacher: torch.nn.Module,
        tuning: Tuning,
        progress: Progress,
    ) -> Fitted: ...


@dataclass
class Bench:
    """Prunes one model by any method; caches statistics and learned importances.

    Attributes:
        tensors: the model's weights.
        steps: number of steps of learning and of tuning.
        seed: seed of the windows and of learning.
        calibration_batches: number of batches for statistics and for layerwise pruning.
        progress: called after each step of learning or tuning, with its number and its loss.
    """

    tensors: Tensors
    steps: int = 200
    seed: int = 0
    calibration_batches: int = CALIBRATION_BATCHES
    progress: Progress = lambda step, loss: None
    _learned: dict[tuple[object, Settings], tuple[Learned, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = language_model(self.tensors)
        self.names = prunable_layers(self.model)
        self.calibration = calibration_windows(self.seed, self.calibration_batches)
        self.data = learning_windows(self.seed, self.steps)

    def prune(self, method: str, sparsity: float) -> Pruned:
        """Prunes the model by one of `METHODS`."""
        masker, _, treatment = method.partition("-")
        if method == "sparsegpt-updated":
            return self._layerwise(method, sparsity)
        pruned = MASKERS[masker](self, sparsity)
        treat = _TREATMENTS.get(treatment)
        return pruned if treat is None else treat(self, pruned)

    def learned(
        self,
        sparsity: float | tuple[float, float],
        settings: Settings = FROZEN,
        checkpoint: Path | None = None,
    ) -> tuple[Learned, float]:
        """Learns importances for a sparsity or a range. Returns them and the seconds. Caches the result.

        Args:
            sparsity, checkpoint: as in `learn_importance`.
            settings: settings of learning; steps and seed are replaced by those of this object.
        """
        settings = replace(settings, steps=self.steps, seed=self.seed)
        if (sparsity, settings) not in self._learned:
            found, seconds = self._statistics
            start = time.perf_counter()
            learned = learn_importance(
                self.model,
                self.data,
                sparsity,
                settings=settings,
                tensors=self.names,
                found=found,
                checkpoint=checkpoint,
                progress=self.progress,
            )
            self._learned[sparsity, settings] = learned, seconds + time.perf_counter() - start
        return self._learned[sparsity, settings]

    def by_importance(
        self, importances: scores.Importances, sparsity: float, scope: str, seconds: float
    ) -> Pruned:
        """Prunes by a threshold on importances; ``seconds`` is the time to compute these."""
        start = time.perf_counter()
        found = masks_of(
            {name: as_numbers(value) for name, value in importances.items()}, Sparsity(sparsity), scope=scope
        )
        masks = {name: torch.from_numpy(mask) for name, mask in found.items()}
        weights = {
            name: torch.where(mask, self.model.get_parameter(name).detach(), 0)
            for name, mask in masks.items()
        }
        return Pruned(masks, weights, {}, seconds + time.perf_counter() - start)

    @cached_property
    def _statistics(self) -> tuple[dict[str, Statistics], float]:
        start = time.perf_counter()
        found = statistics(self.model, self.calibration, batches=self.calibration_batches, tensors=self.names)
        return found, time.perf_counter() - start

    def _magnitude(self, sparsity: float) -> Pruned:
        return self.by_importance(scores.magnitude(self.model, self.names), sparsity, "tensor", 0.0)

    def _fisher(self, sparsity: float) -> Pruned:
        found, seconds = self._statistics
        return self.by_importance(scores.fisher(self.model, found), sparsity, "model", seconds)

    def _layerwise(self, method: str, sparsity: float) -> Pruned:
        start = time.perf_counter()
        result = prune_layerwise(
            self.model,
            self.calibration,
            sparsity,
            method,
            batches=self.calibration_batches,
            tensors=self.names,
        )
        return Pruned(result.masks, result.weights, {}, time.perf_counter() - start)

    def _by_network(self, sparsity: float, settings: Settings) -> Pruned:
        learned, seconds = self.learned(sparsity, settings)
        pruned = self.by_importance(learned.importances, sparsity, "model", seconds)
        trained = {name: weight * pruned.masks[name] for name, weight in learned.weights.items()}
        return replace(pruned, weights=trained or pruned.weights)

    def _fine_tuned(self, pruned: Pruned) -> Pruned:
        model, _, seconds = self._fitted(fine_tune, pruned, Tuning(self.steps, TUNING_RATE))
        weights = {name: model.get_parameter(name).detach() for name in pruned.masks}
        return replace(pruned, weights=weights, seconds=seconds)

    def _with_factors(self, pruned: Pruned) -> Pruned:
        _, factors, seconds = self._fitted(fit_factors, pruned, Tuning(FACTOR_STEPS))
        return replace(pruned, factors=factors, seconds=seconds)

    def _with_multipliers(self, pruned: Pruned) -> Pruned:
        _, multipliers, seconds = self._fitted(fit_multipliers, pruned, Tuning(self.steps))
        weights = {name: weight * multipliers[name] for name, weight in pruned.weights.items()}
        return replace(pruned, weights=weights, seconds=seconds)

    def _fitted(
        self, fit: _Fit[Fitted], pruned: Pruned, tuning: Tuning
    ) -> tuple[torch.nn.Module, Fitted, float]:
        """Returns the pruned model after a fit, the result of the fit, and the total seconds."""
        start = time.perf_counter()
        model = self._pruned_model(pruned)
        found = fit(model, pruned.masks, self.data, teacher=self.model, tuning=tuning, progress=self.progress)
        return model, found, pruned.seconds + time.perf_counter() - start

    def _pruned_model(self, pruned: Pruned) -> torch.nn.Module:
        model = copy.deepcopy(self.model)
        model.load_state_dict(pruned.weights, strict=False)
        apply_masks(model, pruned.masks)
        return model

    def arrays(self, pruned: Pruned) -> Tensors:
        """Returns all weights of the pruned model, with factors applied."""
        applied = {name: np.asarray(w.numpy()) for name, w in pruned.applied().items()}
        return {**arrays_of(self.model), **applied}


MASKERS: dict[str, Callable[[Bench, float], Pruned]] = {
    "magnitude": lambda bench, s: bench._magnitude(s),
    "wanda": lambda bench, s: bench._layerwise("wanda", s),
    "sparsegpt": lambda bench, s: bench._layerwise("sparsegpt", s),
    "fisher": lambda bench, s: bench._fisher(s),
    "mlp": lambda bench, s: bench._by_network(s, ALONE),
    "learned": lambda bench, s: bench._by_network(s, FROZEN),
    "levels": lambda bench, s: bench._by_network(s, LEVELS),
    "together": lambda bench, s: bench._by_network(s, TOGETHER),
}

_TREATMENTS: dict[str, Callable[[Bench, Pruned], Pruned]] = {
    "finetuned": Bench._fine_tuned,
    "factors": Bench._with_factors,
    "multipliers": Bench._with_multipliers,
}

# Method -> its description. A mask's name followed by one of `_TREATMENTS` is tuned with a fixed mask.
METHODS = {
    "magnitude": "the smallest weights of each layer are pruned",
    "wanda": "|w| · norm of the input, in each row, layer by layer",
    "sparsegpt": "SparseGPT's mask, survivors unchanged",
    "sparsegpt-updated": "SparseGPT",
    "fisher": "w² g², over all layers",
    "mlp": "the importance network only: a function of a weight's features",
    "learned": "the importance network, with a logit for each weight",
    "levels": "logits of layers, rows, columns and weights, each shrunk by the noise of its gradients",
    "learned-factors": "learned, with a factor for each row and column",
    "magnitude-finetuned": "survivors tuned for as many steps as learning takes",
    "wanda-finetuned": "the same",
    "sparsegpt-finetuned": "the same, from SparseGPT's mask",
    "fisher-finetuned": "the same",
    "together": "importances and weights learned together, in the same number of steps",
    "learned-finetuned": "learned, then tuned for the same number of steps",
    "learned-multipliers": "learned, then a factor tuned for each survivor (equivalent to tuning weights)",
}


def weights_change(method: str) -> bool:
    """Returns whether a method trains or updates survivors; factors of rows and columns do not."""
    return method.endswith(("-updated", "-finetuned", "-multipliers")) or method == "together"


def steps_of(method: str, steps: int) -> int:
    """Returns how often `Bench.progress` is called for a method, if nothing is cached."""
    learned = steps if method.startswith(("learned", "levels", "mlp", "together")) else 0
    tuned = {"finetuned": steps, "multipliers": steps, "factors": FACTOR_STEPS}.get(
        method.partition("-")[2], 0
    )
    return learned + tuned
