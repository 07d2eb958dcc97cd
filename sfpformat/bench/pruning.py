"""``sfp bench pruning``: the perplexity after pruning by each method, over seeds of model and learning.

The model of seed 0 is in the package. Models of other seeds are trained in the same way, for fewer steps, by
`sfpformat.demo.train` in a separate process, and stored in the user's cache. Perplexities are measured on the
held-out texts, which neither training nor calibration uses. Rows can be appended to a file as they are
measured, so that an interrupted run can resume. Needs torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..demo.bundled import TEXTS, heldout_tokens, weights
from ..demo.language import CALIBRATION_BATCHES
from ..demo.methods import METHODS, Bench, steps_of
from ..demo.model import Config, perplexity
from ..io.atomic import replacing
from ..numpy import load_file
from ..pruning.masks import achieved
from .child import run_python
from .pruning_rows import FIELDS, KeptRows, Row

MODEL_STEPS = 3000  # of training another seed's model: an eighth of those of the package's model
CACHE = "SFPFORMAT_CACHE"  # environment variable: folder for trained models instead of the user's cache
EVALUATED_TOKENS = 1 << 14  # of each held-out text, plus one as the first context


@dataclass(frozen=True)
class Plan:
    """The measurements to make.

    Attributes:
        methods: names in `METHODS`.
        sparsities: target sparsities.
        seeds: number of seeds, from 0.
        steps: number of steps of learning and of tuning.
        model_steps: number of training steps for the models of seeds above 0.
        threads: number of torch's threads.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    sparsities: tuple[float, ...] = (0.7, 0.8)
    seeds: int = 3
    steps: int = 200
    model_steps: int = MODEL_STEPS
    threads: int = 1

    def amount(self) -> int:
        """Returns approximately how often `rows` advances the progress."""
        once = sum(steps_of(method, self.steps) + 1 for method in self.methods)
        return self.seeds * len(self.sparsities) * once

    def identity(self, seed: int, sparsity: float, method: str) -> tuple[object, ...]:
        """Returns the values of `pruning_rows.IDENTITY`, which identify a row."""
        return method, sparsity, seed, self.steps, self.model_steps if seed else None


def rows(
    plan: Plan, advance: Callable[[int], None], at: Callable[[str], None], path: Path | None = None
) -> Iterator[Row]:
    """Yields a row of `FIELDS` for each seed, sparsity and method, as soon as it is measured.

    Args:
        plan: the measurements to make.
        advance, at: called with the number of steps done, and with a description of the next one.
        path: a file to which rows are appended. Rows that it already has are not measured again.

    Raises:
        ChildError: a model could not be trained.
        LockedFileError, MismatchError, OSError: the file is in use, has other contents, or cannot be read.
    """
    import torch

    torch.set_num_threads(plan.threads)
    with nullcontext() if path is None else KeptRows(path) as kept:
        for seed in range(plan.seeds):
            subject = _Subject(plan, seed, advance, at)
            for sparsity, method in product(plan.sparsities, plan.methods):
                row = None if kept is None else kept.find(*plan.identity(seed, sparsity, method))
                if row is None:
                    row = subject.row(method, sparsity)
                    if kept is not None:
                        kept.add(row)
                else:
                    advance(steps_of(method, plan.steps))
                advance(1)
                yield row


class _Subject:
    """The model of a seed and its measurements, computed lazily."""

    def __init__(
        self, plan: Plan, seed: int, advance: Callable[[int], None], at: Callable[[str], None]
    ) -> None:
        self._plan, self._seed, self._advance, self._at = plan, seed, advance, at

    @cached_property
    def _model(self) -> tuple[dict[str, NDArray[np.generic]], float | None]:
        self._at(f"seed {self._seed}: the model")
        return model_of(self._seed, self._plan.model_steps, self._plan.threads)

    @cached_property
    def _dense(self) -> dict[str, float]:
        return {kind: _evaluated(self._model[0], kind) for kind in TEXTS}

    @cached_property
    def _bench(self) -> Bench:
        def progress(step: int, loss: float) -> None:
            self._advance(1)

        return Bench(self._model[0], self._plan.steps, self._seed, CALIBRATION_BATCHES, progress)

    def row(self, method: str, sparsity: float) -> Row:
        """Prunes and evaluates; returns the fields of `FIELDS`, in their order."""
        bench, dense = self._bench, self._dense
        self._at(f"seed {self._seed}, {sparsity:.0%}: {method}")
        pruned = bench.prune(method, sparsity)
        arrays = bench.arrays(pruned)
        found: Row = {
            "method": method,
            "sparsity": sparsity,
            "seed": self._seed,
            "achieved_sparsity": achieved({name: mask.numpy() for name, mask in pruned.masks.items()}),
            "perplexity": _evaluated(arrays, "code"),
            "dense_perplexity": dense["code"],
            "prose_perplexity": _evaluated(arrays, "prose"),
            "dense_prose_perplexity": dense["prose"],
            "seconds": round(pruned.seconds, 2),
            "steps": self._plan.steps,
            "model_steps": self._plan.model_steps if self._seed else None,
            "training_seconds": self._model[1],
        }
        return {name: found[name] for name in FIELDS}


def _evaluated(tensors: dict[str, NDArray[np.generic]], kind: str) -> float:
    return perplexity(tensors, Config(), heldout_tokens(kind, EVALUATED_TOKENS + 1))


# ------------------------------------------------------------------------------------------------ models


def cache_folder() -> Path:
    """Returns the folder for trained models: `CACHE` if it is set, else in the user's cache."""
    chosen = os.environ.get(CACHE)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "sfpformat"


def model_of(seed: int, steps: int, threads: int) -> tuple[dict[str, NDArray[np.generic]], float | None]:
    """Returns a seed's weights, and the seconds of training; None for the package's model.

    A model is trained on first use. Interrupted training resumes.

    Raises:
        ChildError: training failed.
    """
    if not seed:
        return weights(), None
    folder = cache_folder() / f"demo-seed{seed}-steps{steps}"
    path, note = folder / "model.sfp", folder / "training.json"
    if not note.exists():
        folder.mkdir(parents=True, exist_ok=True)
        words = ["-m", "sfpformat.demo.train", "--out", str(path), "--steps", str(steps)]
        words += ["--seed", str(seed), "--threads", str(threads)]
        words += ["--resume"] if path.with_suffix(".checkpoint").exists() else []
        start = time.monotonic()
        run_python(words)
        seconds = round(time.monotonic() - start)
        with replacing(note) as file:
            file.write(json.dumps({"seconds": seconds, "python": sys.version}).encode())
    return load_file(path), float(json.loads(note.read_text("utf-8"))["seconds"])
