"""The demonstration with learning: learns an importance, and writes files pruned by it and by other methods.

In all files the survivors of the linear layers are quantised with the same `ERROR_DB`, so that methods differ
only in their masks and survivors. Needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..options import Options, Uniform
from .bundled_importance import RANGE
from .methods import Bench, Pruned
from .variants import Result, Row, Tensors, measure

# Method -> its name in the table.
COMPARED = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt-updated": "SparseGPT",
    "fisher": "Fisher",
    "learned": "learned",
}
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
ERROR_DB = -20.0  # of the survivors
STEPS = 200
_CALIBRATION_BATCHES = 16  # a quarter of the number for `sfp bench pruning`


def amount(steps: int, sparsities: Sequence[float]) -> int:
    """Returns how often `rows` calls ``advance``."""
    return steps + len(COMPARED) * len(sparsities)


def rows(
    tensors: Tensors,
    sparsities: Sequence[float],
    folder: Path,
    steps: int,
    advance: Callable[[], None],
    at: Callable[[str], None],
) -> Iterator[Row]:
    """Learns one importance, then packs, verifies, loads and evaluates a file for each method and sparsity.

    Args:
        tensors: the model's weights.
        sparsities: target sparsities.
        folder: folder for the files.
        steps: number of steps of learning.
        advance: called after each step and each file.
        at: called with a description of the next step.
    """
    bench = Bench(
        tensors, steps, calibration_batches=_CALIBRATION_BATCHES, progress=lambda step, loss: advance()
    )
    at("learning importances")
    bench.learned(RANGE)
    for method, words in COMPARED.items():
        for sparsity in sparsities:
            at(f"{words}, {sparsity:.0%}")
            yield Row(method, sparsity, _packed(bench, method, sparsity, folder))
            advance()


def _packed(bench: Bench, method: str, sparsity: float, folder: Path) -> Result:
    pruned = _pruned(bench, method, sparsity)
    masks = {name: mask.numpy() for name, mask in pruned.masks.items()}
    changed = {
        name: np.asarray(w.numpy()).astype(bench.tensors[name].dtype) for name, w in pruned.weights.items()
    }
    options = dict.fromkeys(masks, Options(Uniform(error_db=ERROR_DB)))
    name = f"{COMPARED[method]}, {100 * sparsity:.4g} %"
    path = folder / f"{method}-{100 * sparsity:.4g}.sfp"
    return measure(bench.tensors, changed, masks, name, options, path)


def _pruned(bench: Bench, method: str, sparsity: float) -> Pruned:
    """Prunes by the importance that was learned for all sparsities, or by another method."""
    if method != "learned":
        return bench.prune(method, sparsity)
    learned, seconds = bench.learned(RANGE)
    return bench.by_importance(learned.importances, sparsity, "model", seconds)
