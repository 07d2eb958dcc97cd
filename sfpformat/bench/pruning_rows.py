"""The rows of ``sfp bench pruning``: their fields, the file that stores them, and a summary table."""

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

# Field of a row -> its description.
FIELDS = {
    "method": "one of sfpformat.demo.methods.METHODS",
    "sparsity": "the requested share of pruned weights in the linear layers",
    "achieved_sparsity": "the share of weights that the masks prune",
    "seed": "the seed of the model, of the windows and of learning",
    "perplexity": "the perplexity per character of held-out code",
    "dense_perplexity": "the same for the dense model",
    "prose_perplexity": "the perplexity per character of held-out prose",
    "dense_prose_perplexity": "the same for the dense model",
    "seconds": "the seconds of pruning, including calibration, learning and tuning if the method needs them",
    "steps": "the number of steps of learning and of tuning",
    "model_steps": "the number of steps that trained the model; null for the bundled model",
    "training_seconds": "the seconds that training the model took; null for the bundled model",
}
_START = json.dumps({next(iter(FIELDS)): ""})[:-2].encode()  # the first bytes of each line
# The fields that identify a row.
IDENTITY = ("method", "sparsity", "seed", "steps", "model_steps")


class KeptRows:
    """A file of rows, one JSON object per line, each written to disk before the next. A context manager.

    An incomplete last line, for example of an interrupted process, is removed.
    """

    def __init__(self, path: Path) -> None:
        """Opens or creates the file.

        Raises:
            LockedFileError: another process uses the file.
            MismatchError: the file has other contents than rows.
            OptionError: the path is not a file.
            OSError: the file cannot be read.
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
            raise MismatchError(f"{path} has contents other than rows of this benchmark; give another file")
        if rest[: len(_START)] != _START[: len(rest)]:
            raise MismatchError(f"{path} does not end with a row of this benchmark; give another file")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        return found

    def find(self, *identity: object) -> Row | None:
        """Returns the row with these values of `IDENTITY`, or None."""
        return self._rows.get(identity)

    def add(self, row: Row) -> None:
        """Appends a row and writes it to disk."""
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


# Kind of text -> the fields of the perplexity and of the dense model's perplexity.
RISES = {
    "code": ("perplexity", "dense_perplexity"),
    "prose": ("prose_perplexity", "dense_prose_perplexity"),
}


def summary(found: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of a table: mean, least and greatest perplexity over the seeds.

    ``excess`` is the rise of the perplexity over the dense model's, divided by the rise of Fisher's mask.
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
    """Returns mean, least and greatest perplexity, and the excess."""
    values = _numbers(found, method, RISES[kind][0])
    spread = [f"{number:.3f}" for number in (values.mean(), values.min(), values.max())]
    whole = rises(found, "fisher", kind)
    return [*spread, f"{(rises(found, method, kind) / whole).mean():.3f}" if len(whole) else "–"]


def rises(found: Sequence[Row], method: object, kind: str) -> NDArray[np.float64]:
    """Returns the rise of the perplexity over the dense model's for each row of a method.

    Args:
        found: rows of one sparsity.
        method: as in `FIELDS`.
        kind: kind of text, a key of `RISES`.
    """
    after, before = RISES[kind]
    return _numbers(found, method, after) - _numbers(found, method, before)


def _numbers(found: Sequence[Row], method: object, field: str) -> NDArray[np.float64]:
    return np.array([row[field] for row in found if row["method"] == method], np.float64)
