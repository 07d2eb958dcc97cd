"""Quantising by importance against quantising without: the perplexity of the demonstration model.

The importance is the Fisher information of each weight (the mean square of the gradients of the loss over 128
windows of the training text). The tensors are the linear layers, at 2 to 5 bits per weight of the whole file.
Four methods: the same bits in every tensor; bits shared among the tensors without an importance; and both
with errors weighted by the root of the importance, or by the importance itself::

    python -m tests.figures.weighted            # some minutes, needs torch
    python -m tests.figures.weighted --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from sfpformat import Options, Uniform, steps_for_budget
from sfpformat.demo import bundled
from sfpformat.demo.model import Config, encode_text, perplexity
from sfpformat.demo.train import MEASURED_TOKENS, LanguageModel, training_text
from sfpformat.numpy import load, save

BITS = (2.0, 2.5, 3.0, 4.0, 5.0)
WINDOWS, BATCH = 128, 2
_ROUNDS = 5

Arrays = dict[str, NDArray[np.float32]]


def fisher_information(weights: dict[str, NDArray[np.generic]], names: list[str]) -> Arrays:
    """Returns the mean over windows of the squared gradients of the summed loss, by tensor."""
    torch.manual_seed(0)
    config = Config()
    model = LanguageModel(config)
    model.load_state_dict({name: torch.from_numpy(a.astype(np.float32)) for name, a in weights.items()})
    parameters = dict(model.named_parameters())
    text = torch.from_numpy(encode_text(training_text()))
    sums = {name: torch.zeros_like(parameters[name]) for name in names}
    for _ in range(WINDOWS // BATCH):
        starts = torch.randint(len(text) - config.context, (BATCH, 1))
        windows = text[starts + torch.arange(config.context + 1)].long()
        scores = model(windows[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(scores, windows[:, 1:].flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            sums[name] += gradient.square()
    return {name: (total / (WINDOWS // BATCH)).numpy() for name, total in sums.items()}


class Bench:
    """The model, its importance, and its perplexity after quantisation."""

    def __init__(self) -> None:
        self.weights = bundled.weights()
        names = bundled.linear_layers(self.weights)
        self.linear: Arrays = {name: self.weights[name].astype(np.float32) for name in names}
        self.importances = fisher_information(self.weights, names)
        self.texts = {kind: bundled.heldout_tokens(kind, MEASURED_TOKENS) for kind in bundled.TEXTS}
        self.positions = sum(array.size for array in self.linear.values())

    def perplexities(self, tensors: dict[str, NDArray[np.generic]]) -> dict[str, float]:
        """Returns the perplexities by kind of held-out text."""
        weights = {**self.weights, **tensors}
        return {kind: perplexity(weights, Config(), tokens) for kind, tokens in self.texts.items()}

    def same_bits(self, bits: float, weighted: str | None) -> bytes:
        """The file in which every tensor has the same bits."""
        return self._saved(Options(Uniform(budget=bits, weighted=weighted), importance=None))

    def shared_bits(self, bits: float, weighted: str | None) -> bytes:
        """The file in which the tensors share bits."""
        steps = steps_for_budget(self.linear, bits, importances=self.importances, weighted=weighted)
        options = dict.fromkeys(self.linear, Options(importance=None))  # lossless if there is no step
        for name, step in steps.items():
            options[name] = Options(Uniform(step=step, weighted=weighted), importance=None)
        return self._saved(options)

    def _saved(self, options: Options | dict[str, Options]) -> bytes:
        return save(self.linear, options=options, importances=self.importances)

    def file_of(self, way: Callable[[float, str | None], bytes], weighted: str | None, bits: float) -> bytes:
        """Returns the greatest file found with at most this number of bits per position of the whole file."""
        low, high, best = bits * 0.7, bits * 1.05, b""
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            data = way(middle, weighted)
            if len(data) * 8 <= bits * self.positions:
                low, best = middle, data
            else:
                high = middle
        return best


def measured() -> list[dict[str, Any]]:
    """Yields a row for each method and rate."""
    bench = Bench()
    dense = bench.perplexities({})
    rows = []
    for bits in BITS:
        for way in (bench.same_bits, bench.shared_bits):
            for weighted in (None, "root", "full"):
                data = bench.file_of(way, weighted, bits)
                found = bench.perplexities(load(data))
                rows.append(
                    {
                        "bits": bits,
                        "way": way.__name__,
                        "weighted": weighted,
                        "file_bits": 8 * len(data) / bench.positions,
                        **{f"{kind}_over_dense": found[kind] / dense[kind] for kind in dense},
                    }
                )
                if sys.stderr.isatty():
                    print(rows[-1], file=sys.stderr)
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m tests.figures.weighted", description=__doc__)
    parser.add_argument("--json", action="store_true", help="a list of objects")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measured()
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'bits':>5} {'way':<12} {'weighted':<8} {'in the file':>11} {'code':>8} {'prose':>8}")
    for row in rows:
        print(
            f"{row['bits']:5} {row['way']:<12} {row['weighted'] or '-':<8} {row['file_bits']:11.3f} "
            f"{row['code_over_dense']:8.4f} {row['prose_over_dense']:8.4f}"
        )


if __name__ == "__main__":
    main()
