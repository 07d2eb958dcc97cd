"""Learn the importance that the carried model has; this is how the one in the package was made.

It is learned for a range of sparsities, through the carried weights, on windows of the training text; the
weights are written again as they were, and beside them the grade of each weight of the linear layers
(`sfpformat.pruning.grades`), four bits a weight at most. ``sfp demo`` prunes by them without torch, and so
does ``sfp prune`` on the carried file. Needs torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..codec.options import Options
from ..numpy import load_file, save_file
from ..pruning.calibration import statistics
from ..pruning.grades import graded, options_for_grades
from ..pruning.learning import Progress, Settings, learn_importance
from .carried import linear_layers
from .language import Windows, language_model

# Sparsities that the carried importance is to serve.
RANGE = (0.4, 0.95)
STEPS = 600
WINDOWS = 8  # a batch
CALIBRATION_BATCHES = 64  # of two windows, for Fisher's information
# Seeds of the windows; those of learning follow, by the seed asked for.
CALIBRATION_SEED, LEARNING_SEED = 1 << 20, 1 << 21


def learn(
    tensors: Mapping[str, NDArray[np.generic]],
    steps: int,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress = lambda step, loss: None,
) -> dict[str, NDArray[np.floating]]:
    """An importance for each weight of the linear layers, by name, float32.

    Args:
        tensors: the model's weights.
        steps: of learning.
        seed: of the windows and of the network's start.
        checkpoint: as in `learn_importance`.
        progress: called after each step with its number and its loss.
    """
    model = language_model(tensors)
    names = linear_layers(dict(tensors))
    calibration = Windows(2, CALIBRATION_BATCHES, CALIBRATION_SEED + seed)
    learned = learn_importance(
        model,
        Windows(WINDOWS, steps, LEARNING_SEED + seed),
        RANGE,
        settings=Settings(steps=steps, seed=seed),
        tensors=names,
        found=statistics(model, calibration, batches=CALIBRATION_BATCHES, tensors=names),
        checkpoint=checkpoint,
        progress=progress,
    )
    return {name: np.asarray(importance.numpy()) for name, importance in learned.importances.items()}


def save_with_importance(
    tensors: Mapping[str, NDArray[np.generic]],
    importances: Mapping[str, NDArray[np.floating]],
    path: Path,
) -> None:
    """Writes weights, lossless, with the grades of their importances for all positions."""
    options = Options(importance=options_for_grades(over="all"))
    save_file(tensors, path, options=dict.fromkeys(importances, options), importances=graded(importances))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see ``--help``."""
    parser = argparse.ArgumentParser(
        "python -m sfpformat.demo.importance",
        description="Learn the importance of a model's weights and store it in its file.",
    )
    add = parser.add_argument
    add("file", type=Path, help="the model: an .sfp file, which is written again with its importance")
    add("--steps", type=int, default=STEPS, help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--threads", type=int, default=1, help="of the processor; default: %(default)s")
    add("--every", type=int, default=50, help="steps between lines of progress; default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    start = time.monotonic()

    def progress(step: int, loss: float) -> None:
        if step % options.every == 0:
            print(f"step {step}: loss {loss:.3f}, {time.monotonic() - start:.0f} s", file=sys.stderr)

    tensors = load_file(options.file)
    checkpoint = options.file.with_suffix(".importance")
    importances = learn(tensors, options.steps, seed=options.seed, checkpoint=checkpoint, progress=progress)
    save_with_importance(tensors, importances, options.file)
    checkpoint.unlink()


if __name__ == "__main__":
    main()
