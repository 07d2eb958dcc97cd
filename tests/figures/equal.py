"""Size at equal perplexity: the smallest file of each method whose model is within 1 % of the dense model.

``python -m tests.figures.equal`` packs the demonstration's model with each method at several rates. For the
smallest file that is good enough, it prints the bits per weight, the size relative to BF16, and the
perplexity relative to the dense model, on the held-out code that selected the file, and on the held-out
prose, which did not. The methods:

* BF16, with zstandard, and as a lossless `.sfp` file; * whole levels of a number of bits with an F16 scale
for each 32 weights of a row, as is usual, without entropy
  coding (computed, not written): 4 bits, and the smallest sufficient number;
* the quantiser `uniform` without pruning: with the same bits in every matrix; and with errors weighted by the
root
  of the Fisher information, and bits shared among the matrices;
* the latter after pruning by an importance that was learned through the frozen weights, at each of
  `SPARSITIES`;
* separately, after the weights were trained too: the survivors of that mask, or all weights, for the same
number of
  steps; and, for comparison, all weights of the dense model without pruning.

Embedding and head are quantised as well; the gains of norms are kept. Needs torch and zstandard, and some
hours on one core; ``--keep FOLDER`` stores the results of learning, so that an interrupted run can resume.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from sfpformat import Options, Uniform, steps_for_budget
from sfpformat.demo import bundled
from sfpformat.demo.language import CALIBRATION_BATCHES, calibration_windows, language_model
from sfpformat.demo.methods import FROZEN, TOGETHER, Bench
from sfpformat.demo.model import Config, perplexity
from sfpformat.demo.train import MEASURED_TOKENS
from sfpformat.demo.variants import Tensors
from sfpformat.numpy import load, save
from sfpformat.pruning import statistics

ALLOWED = 1.01  # perplexity over the dense model's
SPARSITIES = (0.3, 0.4, 0.5, 0.6)
STEPS = 400
ROUNDS = 7  # steps of the search for a rate
GROUP = 32  # weights that share a scale, with whole levels

Masks = dict[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class Row:
    """The result of a method.

    Attributes:
        way: the method.
        bits: bits per weight of the whole file.
        size: size relative to BF16.
        code, prose: perplexity of the loaded model relative to the dense model.
    """

    way: str
    bits: float
    size: float
    code: float
    prose: float


class Trial:
    """The model, the texts, and the evaluation of files."""

    def __init__(self) -> None:
        self.tensors: Tensors = bundled.weights()
        self.matrices = [name for name, array in self.tensors.items() if array.ndim == 2]
        self._texts = {kind: bundled.heldout_tokens(kind, MEASURED_TOKENS) for kind in bundled.TEXTS}
        self._dense = {kind: self._perplexity(self.tensors, kind) for kind in bundled.TEXTS}
        self.weights = sum(array.size for array in self.tensors.values())

    def _perplexity(self, tensors: Tensors, kind: str) -> float:
        return perplexity(tensors, Config(), self._texts[kind])

    def ratio(self, tensors: Tensors, kind: str = "code") -> float:
        """Returns the perplexity relative to the dense model."""
        return self._perplexity(tensors, kind) / self._dense[kind]

    def row(self, way: str, size: float, tensors: Tensors) -> Row:
        """Returns the row of a file with this size and the model in it."""
        bits = 8 * size / self.weights
        return Row(way, bits, bits / 16, self.ratio(tensors), self.ratio(tensors, "prose"))

    def smallest(self, way: str, make: Callable[[float], bytes], low: float, high: float) -> Row:
        """Returns the row of the smallest file found that is good enough.

        Args:
            way: the method.
            make: bits per weight -> a file.
            low, high: the range of rates; if the file at the higher rate is not good enough, none is.
        """
        best = make(high)
        for _ in range(ROUNDS):
            middle = math.sqrt(low * high)
            data = make(middle)
            if self.ratio(load(data)) <= ALLOWED:
                high, best = middle, data
            else:
                low = middle
        return self.row(way, len(best), load(best))

    # ------------------------------------------------------------------------------------- without pruning

    def without_loss(self) -> Iterator[Row]:
        """Returns rows of BF16 and its lossless files."""
        raw = b"".join(array.tobytes() for array in self.tensors.values())
        yield self.row("BF16", len(raw), self.tensors)
        for level in (3, 19):
            packed = zstandard.ZstdCompressor(level=level).compress(raw)
            yield self.row(f"BF16, zstandard −{level}", len(packed), self.tensors)
        data = save(self.tensors)
        yield self.row(".sfp, lossless", len(data), load(data))

    def whole_levels(self) -> Iterator[Row]:
        """Returns rows of four bits, and of the first number of bits that is good enough."""
        for bits in range(4, 9):
            tensors, size = dict(self.tensors), 0.0
            for name, array in self.tensors.items():
                if name in self.matrices:
                    tensors[name] = rounded(array, bits)
                    size += array.size * (bits + 16 / GROUP) / 8
                else:
                    size += array.nbytes
            row = self.row(f"{bits} bits, a scale for {GROUP}", size, tensors)
            if bits == 4 or row.code <= ALLOWED:
                yield row
            if row.code <= ALLOWED:
                return

    def not_pruned(self) -> Iterator[Row]:
        """The quantiser alone."""
        yield self.smallest(".sfp, uniform", self._same_bits, 2.5, 8)
        fisher = self.fisher(self.tensors)
        shared = self.shared_bits(self.tensors, {}, fisher)
        yield self.smallest(".sfp, uniform, weighted, shared bits", shared, 2.5, 8)

    def _same_bits(self, bits: float) -> bytes:
        options = Options(Uniform(budget=bits))
        return save(self.tensors, options=dict.fromkeys(self.matrices, options))

    def shared_bits(
        self, tensors: Tensors, masks: Masks, fisher: dict[str, NDArray[np.float32]]
    ) -> Callable[[float], bytes]:
        """Returns a function: bits per weight -> the file in which all matrices share these bits."""
        arrays = {name: tensors[name].astype(np.float32) for name in self.matrices}

        def make(bits: float) -> bytes:
            steps = steps_for_budget(arrays, bits, masks=masks, importances=fisher, weighted="root")
            options = dict.fromkeys(arrays, Options(importance=None))  # lossless where there is no step
            for name, step in steps.items():
                options[name] = Options(Uniform(step=step, weighted="root"), importance=None)
            return save(tensors, options=options, masks=masks, importances=fisher)

        return make

    # ---------------------------------------------------------------------------------------- with pruning

    def fisher(self, tensors: Tensors) -> dict[str, NDArray[np.float32]]:
        """Returns the Fisher information of all matrices of a model."""
        windows = calibration_windows(0, CALIBRATION_BATCHES)
        model = language_model(tensors)
        found = statistics(model, windows, batches=CALIBRATION_BATCHES, tensors=self.matrices)
        return {name: np.asarray(of.fisher.numpy()) for name, of in found.items()}

    def pruned(self, way: str, pruned: Tensors, masks: dict[str, torch.Tensor]) -> Row:
        """Returns the row of the smallest file of a pruned model."""
        tensors: Tensors = {name: a.astype(self.tensors[name].dtype) for name, a in pruned.items()}
        arrays = {name: np.asarray(mask.numpy()) for name, mask in masks.items()}
        return self.smallest(way, self.shared_bits(tensors, arrays, self.fisher(pruned)), 1.0, 8)


def rounded(array: NDArray[np.generic], bits: int) -> NDArray[np.float32]:
    """Rounds each weight to the nearest of 2^bits − 1 levels; the last is its group's greatest magnitude."""
    groups = array.astype(np.float32).reshape(-1, GROUP)
    last = np.float32(2 ** (bits - 1) - 1)
    scales = np.abs(groups).max(axis=1, keepdims=True) / last
    scales = np.maximum(scales.astype(np.float16).astype(np.float32), np.float32(1e-7))
    levels = np.clip(np.rint(groups / scales), -last, last)
    return np.asarray((levels * scales).reshape(array.shape), np.float32)


# What is learned -> its settings, and the methods of `Bench` that use it, each with its description.
LEARNED = {
    "frozen": (FROZEN, {"learned": "", "learned-finetuned": ", survivors tuned"}),
    "together": (TOGETHER, {"together": ", weights learned together"}),
}


def learned_rows(trial: Trial, bench: Bench, sparsity: float, folder: Path | None) -> Iterator[Row]:
    """Returns rows of frozen weights, of tuned survivors, and of weights trained with the importance.

    Args:
        trial: evaluates files.
        bench: prunes the model.
        sparsity: the sparsity of the linear layers.
        folder: folder for checkpoints, or None.
    """
    for name, (settings, methods) in LEARNED.items():
        kept = folder / f"{name}-{sparsity}-{bench.steps}.learning" if folder is not None else None
        bench.learned(sparsity, settings, kept)
        for method, words in methods.items():
            way = f".sfp, {sparsity:.0%} pruned by learned importance, weighted, shared bits{words}"
            pruned = bench.prune(method, sparsity)
            yield trial.pruned(way, bench.arrays(pruned), pruned.masks)


def tuned_row(trial: Trial, bench: Bench) -> Row:
    """Returns the row of the dense model after the same number of steps of further training."""
    tuned = bench.prune("magnitude-finetuned", 0.0)
    way = ".sfp, nothing pruned, weighted, shared bits, weights tuned"
    return trial.pruned(way, bench.arrays(tuned), tuned.masks)


def rows(steps: int, folder: Path | None) -> Iterator[Row]:
    """All rows."""
    trial = Trial()
    yield from trial.without_loss()
    yield from trial.whole_levels()
    yield from trial.not_pruned()
    bench = Bench(trial.tensors, steps)
    yield tuned_row(trial, bench)
    for sparsity in SPARSITIES:
        yield from learned_rows(trial, bench, sparsity, folder)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m tests.figures.equal", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of learning; default: %(default)s")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where checkpoints of learning are kept")
    parser.add_argument("--json", action="store_true", help="objects, a line each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
    for row in rows(args.steps, args.keep):
        if args.json:
            print(json.dumps(asdict(row)))
        else:
            print(f"{row.way:<82}{row.bits:7.3f}{row.size:8.4f}{row.code:9.4f}{row.prose:9.4f}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
