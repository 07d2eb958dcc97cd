"""Learning by levels with logits in 16 bits against 32, on the demonstration's model.

``python -m tests.figures.logits`` learns importances for 60, 80 and 90 % with both, with several seeds, and
prints the loss on the held-out batches that choose the result, and the perplexity on both held-out texts. A
few minutes on one thread.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from itertools import product

import torch

from sfpformat.demo import bundled
from sfpformat.demo.methods import LEVELS, Bench
from sfpformat.demo.model import Config, perplexity
from sfpformat.demo.train import MEASURED_TOKENS


def main(words: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m tests.figures.logits", description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsities", default="0.6,0.8,0.9")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    tensors = bundled.weights()
    texts = {kind: bundled.heldout_tokens(kind, MEASURED_TOKENS) for kind in bundled.TEXTS}
    benches = [Bench(tensors, steps=options.steps, seed=seed) for seed in range(options.seeds)]
    print(f"| sparsity | bits | held-out loss | {' | '.join(texts)} |")
    print("|---|---|---|" + "---|" * len(texts))
    for sparsity, half in product(map(float, options.sparsities.split(",")), (False, True)):
        losses: list[float] = []
        found: dict[str, list[float]] = {kind: [] for kind in texts}
        for bench in benches:
            learned, _ = bench.learned(sparsity, replace(LEVELS, half=half))
            assert learned.choice is not None
            losses.append(learned.choice.chosen[0])
            pruned = bench.by_importance(learned.importances, sparsity, "model", 0.0)
            weights = tensors | {name: weight.numpy() for name, weight in pruned.weights.items()}
            for kind, tokens in texts.items():
                found[kind].append(perplexity(weights, Config(), tokens))
        cells = [_spread(losses, 4), *(_spread(values, 2) for values in found.values())]
        print(f"| {sparsity:.0%} | {16 if half else 32} | {' | '.join(cells)} |", flush=True)


def _spread(values: list[float], digits: int) -> str:
    """Returns the mean, and the range if there are several values."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
