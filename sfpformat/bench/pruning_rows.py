"""The rows of ``sfp bench pruning``: their fields, a file that keeps them, and the table of them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ..errors import MismatchError
from ..io.atomic import real_target
from ..io.filesystem import open_locked

Row = dict[str, object]

# Field of a row -> what it is.
FIELDS = {
    "method": "one of sfpformat.demo.methods.METHODS",
    "sparsity": "the share of the linear layers' weights that was asked for",
    "achieved_sparsity": "the share that the masks prune",
    "seed": "of the model, of the windows and of learning",
    "perplexity": "a character of held-out code",
    "dense_perplexity": "the same of the model before",
    "prose_perplexity": "a character of held-out prose",
    "dense_prose_perplexity": "the same of the model before",
    "seconds": "of pruning, with all that the method needs, such as calibration, learning and tuning",
    "steps": "of learning and of tuning",
    "model_steps": "of training the model, or null for the one that the package carries",
    "training_seconds": "what those took, or null",
}
_START = json.dumps({next(iter(FIELDS)): ""})[:-2].encode()  # of the line of a row
# What tells a row from others.
IDENTITY = ("method", "sparsity", "seed", "steps", "model_steps")


class KeptRows:
    """Rows in a file, a JSON object a line, each on the disk before the next is measured: a context manager.

    A last line that was cut off, as by a process that was ended, is removed.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file, or makes it.

        Raises:
            LockedFileError: another process has it.
            MismatchError: it holds something else than rows.
            OptionError: it is not a file.
            OSError: it cannot be read.
        """
        self._file, _ = open_locked(real_target(path))
        try:
            self._rows = {_identity(row): row for row in self._read(path)}
        except BaseException:
            self._file.close()
            raise

    def _read(self, path: Path) -> list[Row]:
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        rest = data[len(whole) :]
        try:
            found = [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            found = [None]
        if not all(isinstance(row, dict) and list(row) == list(FIELDS) for row in found):
            raise MismatchError(f"{path} has something else than rows of this benchmark; give another file")
        if rest[: len(_START)] != _START[: len(rest)]:
            raise MismatchError(f"{path} does not end as a file of rows does; give another file")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        return found

    def find(self, *identity: object) -> Row | None:
        """The row with these values of `IDENTITY`, if it is there."""
        return self._rows.get(identity)

    def add(self, row: Row) -> None:
        """Writes a row."""
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._rows[_identity(row)] = row

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _identity(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in IDENTITY)


# Kind of text -> the field of its perplexity, and that of the dense model's.
RISES = {
    "code": ("perplexity", "dense_perplexity"),
    "prose": ("prose_perplexity", "dense_prose_perplexity"),
}


def summary(found: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: means over the seeds, and the least and greatest perplexity of them.

    ``excess`` is the rise of the perplexity over the dense model's, over that of Fisher's mask.
    """
    header = ["sparsity", "method"]
    for kind in RISES:
        header += [kind, "least", "greatest", "excess"]
    out = []
    for sparsity in dict.fromkeys(row["sparsity"] for row in found):
        here = [row for row in found if row["sparsity"] == sparsity]
        for method in dict.fromkeys(row["method"] for row in here):
            cells = [f"{sparsity}", str(method)]
            for kind in RISES:
                cells += _cells(here, method, kind)
            cells.append(f"{_numbers(here, method, 'seconds').mean():.0f}")
            out.append(cells)
    return [*header, "seconds"], out


def _cells(found: Sequence[Row], method: object, kind: str) -> list[str]:
    """Mean, least and greatest perplexity, and the excess."""
    values = _numbers(found, method, RISES[kind][0])
    spread = [f"{number:.3f}" for number in (values.mean(), values.min(), values.max())]
    whole = rises(found, "fisher", kind)
    return [*spread, f"{(rises(found, method, kind) / whole).mean():.3f}" if len(whole) else "–"]


def rises(found: Sequence[Row], method: object, kind: str) -> NDArray[np.float64]:
    """By how much the perplexity rose over the dense model's, a number a row of a method.

    Args:
        found: rows of one sparsity.
        method: as in `FIELDS`.
        kind: of the text, of `RISES`.
    """
    after, before = RISES[kind]
    return _numbers(found, method, after) - _numbers(found, method, before)


def _numbers(found: Sequence[Row], method: object, field: str) -> NDArray[np.float64]:
    return np.array([row[field] for row in found if row["method"] == method], np.float64)
