"""What pruning costs by each method: the rows of ``sfp bench pruning`` as tables in Markdown.

``python -m tests.figures.pruning`` prints them of the rows that lie beside this file, or of those in the file
named, made by ``sfp bench pruning --rows FILE``. A cell is the rise of the perplexity over the dense model's:
the mean over the seeds that are there and, where these are several, the least and greatest in brackets. What
has no row stays empty.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from sfpformat.bench.pruning_rows import RISES, Row, rises
from sfpformat.demo.methods import METHODS, weights_change

ROWS = Path(__file__).with_name("pruning.jsonl")


def read(path: Path) -> list[Row]:
    """The rows of a file, an object a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def tables(found: Sequence[Row]) -> str:
    """A table for each kind of text, frozen weights before those that change, and what seeds there are."""
    sparsities = sorted({float(str(row["sparsity"])) for row in found})
    lines = []
    for kind in RISES:
        lines += [
            "| " + " | ".join([kind, *(f"{share:.0%}".replace("%", " %") for share in sparsities)]) + " |"
        ]
        lines += ["|---" * (1 + len(sparsities)) + "|"]
        for change in (False, True):
            for method in METHODS:
                if weights_change(method) == change:
                    cells = [_cell(found, method, share, kind) for share in sparsities]
                    lines += ["| " + " | ".join([f"`{method}`", *cells]) + " |"] if any(cells) else []
        lines += [""]
    return "\n".join([*lines, *_counts(found, sparsities)])


def _cell(found: Sequence[Row], method: str, sparsity: float, kind: str) -> str:
    values = rises([row for row in found if row["sparsity"] == sparsity], method, kind)
    if not len(values):
        return ""
    spread = f" ({values.min():.2f}–{values.max():.2f})" if len(values) > 1 else ""
    return f"{values.mean():.2f}{spread}"


def _counts(found: Sequence[Row], sparsities: Sequence[float]) -> list[str]:
    """How many rows there are of each sparsity and seed."""
    lines = []
    for sparsity in sparsities:
        seeds = [row["seed"] for row in found if row["sparsity"] == sparsity]
        counts = ", ".join(f"{seeds.count(seed)} of seed {seed}" for seed in dict.fromkeys(seeds))
        lines.append(f"{100 * sparsity:.4g} %, methods: {counts}")
    return lines


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m tests.figures.pruning", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=ROWS, help="default: %(default)s")
    print(tables(read(parser.parse_args().file)))


if __name__ == "__main__":
    main()
