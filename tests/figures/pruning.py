"""The rise of the perplexity after pruning by each method: rows of ``sfp bench pruning`` as a Markdown table.

``python -m tests.figures.pruning`` prints the table of the rows in the file beside this module, or in another
file written by ``sfp bench pruning --rows FILE``. A cell is the rise of the perplexity over the dense
model's, on code and on prose: the mean over the seeds and, if there are several, half of the difference
between the greatest and the least. Seconds are the least of all rows of a method, because other load on a
machine adds to them. A cell without a row is empty.
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
    """Returns the rows of a file, which has one object per line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(found: Sequence[Row]) -> list[str]:
    """Returns the lines of the table: methods with frozen weights precede those that change weights."""
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
    """Returns the number of rows of each sparsity and seed, with one line per sparsity."""
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
    """Returns mean and half of the range, of code and of prose."""
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
