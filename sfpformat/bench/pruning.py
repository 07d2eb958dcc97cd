"""``sfp bench pruning``: what pruning costs by each method, in perplexity, over seeds of model and learning.

The first model is the one that the package carries. Those of the other seeds are trained as it was, for fewer
steps, by `sfpformat.demo.train` in a process of its own; they are kept in the user's cache. Perplexities are
taken on the held-out texts, which neither training nor calibration sees. Needs torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..demo.carried import TEXTS, weights
from ..demo.importance import CALIBRATION_BATCHES
from ..demo.methods import METHODS, Bench, Pruned, steps_of
from ..demo.packing import evaluate
from ..numpy import load_file
from ..pruning.thresholds import achieved
from .child import run_python

MODEL_STEPS = 3000  # of training another seed's model: an eighth of those of the carried one
CACHE = "SFPFORMAT_CACHE"  # the folder for trained models, else that of the user's caches

# Field of a row -> what it is.
FIELDS = {
    "method": "one of sfpformat.demo.methods.METHODS",
    "sparsity": "the share of the linear layers' weights that was asked for",
    "achieved_sparsity": "the share that the masks prune",
    "seed": "of the model, of the windows and of learning",
    "perplexity": "a character of held-out code",
    "dense_perplexity": "the same of the model before",
    "prose_perplexity": "a character of held-out prose",
    "dense_prose_perplexity": "the same of the model before",
    "seconds": "of pruning, with all that the method needs, such as calibration, learning and tuning",
    "steps": "of learning and of tuning",
    "training_seconds": "of the model, or null for the one that the package carries",
}


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        methods: of `METHODS`.
        sparsities: shares.
        seeds: how many, from 0 on.
        steps: of learning and of tuning.
        model_steps: of training the models of seeds above 0.
        threads: of torch.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    sparsities: tuple[float, ...] = (0.7, 0.8)
    seeds: int = 3
    steps: int = 200
    model_steps: int = MODEL_STEPS
    threads: int = 1

    def amount(self) -> int:
        """How often the progress of `rows` is advanced, about."""
        once = sum(steps_of(method, self.steps) + 1 for method in self.methods)
        return self.seeds * (1 + len(self.sparsities) * once)


def rows(
    plan: Plan, advance: Callable[[int], None], at: Callable[[str], None]
) -> Iterator[dict[str, object]]:
    """A row of `FIELDS` for each seed, sparsity and method, as soon as it is measured.

    Args:
        plan: what is measured.
        advance, at: of the progress.

    Raises:
        ChildError: a model could not be trained.
    """
    import torch

    torch.set_num_threads(plan.threads)
    for seed in range(plan.seeds):
        at(f"seed {seed}: the model")
        tensors, training = model_of(seed, plan.model_steps, plan.threads)
        dense = {kind: evaluate(tensors, kind) for kind in TEXTS}
        bench = Bench(tensors, plan.steps, seed, CALIBRATION_BATCHES, lambda: advance(1))
        advance(1)
        for sparsity in plan.sparsities:
            for method in plan.methods:
                at(f"seed {seed}, {sparsity:.0%}: {method}")
                pruned = bench.prune(method, sparsity)
                advance(1)
                row = _row(bench, pruned, dense)
                known = {"method": method, "sparsity": sparsity, "seed": seed, "training_seconds": training}
                yield {name: {**known, **row}[name] for name in FIELDS}


def _row(bench: Bench, pruned: Pruned, dense: dict[str, float]) -> dict[str, object]:
    arrays = bench.arrays(pruned)
    return {
        "achieved_sparsity": achieved({name: mask.numpy() for name, mask in pruned.masks.items()}),
        "perplexity": evaluate(arrays, "code"),
        "dense_perplexity": dense["code"],
        "prose_perplexity": evaluate(arrays, "prose"),
        "dense_prose_perplexity": dense["prose"],
        "seconds": round(pruned.seconds, 2),
        "steps": bench.steps,
    }


# ------------------------------------------------------------------------------------------------ models


def cache_folder() -> Path:
    """Where trained models are kept: outside of the package, under the user's caches."""
    chosen = os.environ.get(CACHE)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "sfpformat"


def model_of(seed: int, steps: int, threads: int) -> tuple[dict[str, NDArray[np.generic]], float | None]:
    """A seed's weights, and the seconds that training took, None for those that the package carries.

    A model is trained when it is first asked for; what was interrupted goes on where it stopped.

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
        note.write_text(json.dumps({"seconds": round(time.monotonic() - start), "python": sys.version}))
    return load_file(path), float(json.loads(note.read_text())["seconds"])


# --------------------------------------------------------------------------------------------- summaries


def summary(found: Sequence[dict[str, object]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: means over the seeds, and the least and greatest perplexity of them.

    ``excess`` is the rise of the perplexity over the dense model's, over that of Fisher's mask.
    """
    header = ["sparsity", "method", "code", "least", "greatest", "prose", "excess", "seconds"]
    out = []
    for sparsity in dict.fromkeys(row["sparsity"] for row in found):
        rises = {
            method: _rises([r for r in found if r["sparsity"] == sparsity and r["method"] == method])
            for method in dict.fromkeys(row["method"] for row in found)
        }
        for method, rise in rises.items():
            chosen = [r for r in found if r["sparsity"] == sparsity and r["method"] == method]
            code, prose, seconds = (
                _numbers(chosen, field) for field in ("perplexity", "prose_perplexity", "seconds")
            )
            whole = rises.get("fisher")
            out.append(
                [
                    f"{sparsity}",
                    str(method),
                    f"{code.mean():.3f}",
                    f"{code.min():.3f}",
                    f"{code.max():.3f}",
                    f"{prose.mean():.3f}",
                    "–" if whole is None else f"{(rise / whole).mean():.3f}",
                    f"{seconds.mean():.0f}",
                ]
            )
    return header, out


def _numbers(found: Sequence[dict[str, object]], field: str) -> NDArray[np.float64]:
    return np.array([row[field] for row in found], np.float64)


def _rises(found: Sequence[dict[str, object]]) -> NDArray[np.float64]:
    return _numbers(found, "perplexity") - _numbers(found, "dense_perplexity")
