"""What pruning costs by each method: the rows of ``sfp bench pruning`` as a table in Markdown.

``python -m tests.figures.pruning`` prints it of the rows that lie beside this file, or of those in the file
named, made by ``sfp bench pruning --rows FILE``. A cell is the rise of the perplexity over the dense model's,
on code and on prose: the mean over the seeds that are there and, where there are several, half of the way
from the least to the greatest. Seconds are the least of all rows of a method, since a busy machine adds to
them. What has no row stays empty.
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


def table(found: Sequence[Row]) -> list[str]:
    """The lines of the table: methods through frozen weights before those that change them."""
    sparsities = _sparsities(found)
    header = ["", *(f"{100 * sparsity:.4g} %" for sparsity in sparsities), "seconds"]
    lines = [_line(header), "|---" * len(header) + "|"]
    for method in sorted(METHODS, key=weights_change):
        own = [row for row in found if row["method"] == method]
        if own:
            cells = [_cell([row for row in own if row["sparsity"] == sparsity]) for sparsity in sparsities]
            least = min(float(str(row["seconds"])) for row in own)
            lines.append(_line([f"`{method}`", *cells, f"{least:.0f}"]))
    return lines


def counts(found: Sequence[Row]) -> list[str]:
    """How many rows there are of each sparsity and seed, a line a sparsity."""
    lines = []
    for sparsity in _sparsities(found):
        seeds = [row["seed"] for row in found if row["sparsity"] == sparsity]
        words = ", ".join(f"{seeds.count(seed)} of seed {seed}" for seed in dict.fromkeys(seeds))
        lines.append(f"{100 * sparsity:.4g} %, methods: {words}")
    return lines


def _sparsities(found: Sequence[Row]) -> list[float]:
    return sorted({float(str(row["sparsity"])) for row in found})


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(found: Sequence[Row]) -> str:
    """Mean and half of the spread, of code and of prose."""
    parts = []
    for kind in RISES:
        values = rises(found, found[0]["method"], kind) if found else ()
        if len(values):
            spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
            parts.append(f"{sum(values) / len(values):.2f}{spread}")
    return ", ".join(parts)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m tests.figures.pruning", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=ROWS, help="default: %(default)s")
    found = read(parser.parse_args().file)
    print("\n".join([*table(found), "", *counts(found)]))


if __name__ == "__main__":
    main()
