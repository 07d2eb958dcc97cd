"""Learns the importance in the package's model file; reproduces the one in the package.

The importance is learned for a range of sparsities, with frozen weights, on windows of the training text. The
file is written again with the same weights and the grade of each weight of the linear layers
(`sfpformat.pruning.grades`), in at most four bits per weight. With the grades, ``sfp demo`` and ``sfp prune``
prune the file without torch. Needs torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..numpy import load_file, save_file
from ..options import Options
from ..pruning.grades import graded, options_for_grades
from ..pruning.weight_selection import as_numbers
from .methods import Bench

# The range of sparsities of the package's importance.
RANGE = (0.4, 0.95)
STEPS = 600


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; ``--help`` describes its options."""
    parser = argparse.ArgumentParser(
        "python -m sfpformat.demo.bundled_importance",
        description="Learn the importance of a model's weights and store it in its file.",
    )
    add = parser.add_argument
    add("file", type=Path, help="the model: an .sfp file, which is replaced by one with the importance")
    add("--steps", type=int, default=STEPS, help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--threads", type=int, default=1, help="number of CPU threads; default: %(default)s")
    add("--every", type=int, default=50, help="steps between lines of progress; default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    start = time.monotonic()

    def progress(step: int, loss: float) -> None:
        if step % options.every == 0:
            print(f"step {step}: loss {loss:.3f}, {time.monotonic() - start:.0f} s", file=sys.stderr)

    tensors = load_file(options.file)
    checkpoint = options.file.with_suffix(".importance")
    bench = Bench(tensors, options.steps, options.seed, progress=progress)
    learned, _ = bench.learned(RANGE, checkpoint=checkpoint)
    grades = graded({name: as_numbers(importance) for name, importance in learned.importances.items()})
    stored = Options(importance=options_for_grades(over="all"))
    save_file(tensors, options.file, options=dict.fromkeys(grades, stored), importances=grades)
    checkpoint.unlink()


if __name__ == "__main__":
    main()
