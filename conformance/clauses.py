"""The requirements of SPEC.md, read from its tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "SPEC.md"

# Areas and single clauses whose faults are in the chunks of a tensor. Faults of all other clauses are in the
# preamble or the directory.
IN_CHUNKS = (
    *("R-PLN", "R-CHK", "R-IDX", "R-VEC", "R-RAW", "R-LAY-004", "R-MSK-004", "R-MSK-005", "R-MSK-006"),
    *("R-QNT-005", "R-QNT-007", "R-SCL-004", "R-SCL-006", "R-IMP-004", "R-IMP-005"),
)


@dataclass(frozen=True)
class Clause:
    """A row of SPEC.md's tables of requirements; ``code`` is empty if the row names no error."""

    id: str
    writer: str
    reader: str
    code: str
    line: int


def table_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows of all tables of a Markdown text: line number and cells."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("|"):
            yield number, [cell.strip() for cell in line.strip().strip("|").split("|")]


def clauses_of_spec(text: str | None = None) -> list[Clause]:
    """Returns all clauses, in the order of SPEC.md.

    Args:
        text: the text of the specification; None reads SPEC.md.
    """
    found = []
    for line, cells in table_rows(SPEC.read_text() if text is None else text):
        match = re.fullmatch(r"\[(R-[A-Z]+-\d{3})\]", cells[0])
        if match:
            writer, reader, code, *_ = [*cells[1:], "", "", ""]
            found.append(Clause(match[1], writer, reader, code.strip("`"), line))
    return found
