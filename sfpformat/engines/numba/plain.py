"""Decodes many tensors of `container.plain_entries` at once: a few arrays hold the recipes of all tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.codetable import windows_of
from ...container.plain_entries import PlainTable, PlainTensors
from ..interface import PlainRuns
from ..translation import FINGERPRINTS, STREAMS
from . import batch
from .decode import memory_for, working_size
from .index import TRIMMED_OF
from .recipe import (
    DATA,
    DATA_SIZE,
    FIRST,
    LENGTHS,
    OUT,
    OUT_SIZE,
    PLACES,
    PLACES_SIZE,
    ROW_SIZE,
    SHAPE,
    SHAPES,
    START,
    STOP,
    STOP_OF,
    TOTAL,
    WHOLE,
    is_contiguous,
    place_of,
    shape_of,
    whole_of_exact,
    whole_of_raw,
)


class PlainPlan:
    """Implements `interface.PlainPlan`.

    Attributes:
        known: bool [n], whether the kernels can decode each tensor.
    """

    def __init__(self, tensors: PlainTensors) -> None:
        positions, segment = tensors.positions.tolist(), tensors.segment.tolist()
        known, wholes, shapes, parts = [], [], [], []
        for i, (dtype, table) in enumerate(zip(tensors.dtypes, tensors.tables, strict=True)):
            part, shape = b"", [0] * SHAPE
            if table is None:
                whole = whole_of_raw(dtype.itemsize, segment[i])
                known.append(dtype.name != "BOOL")  # only the reference checks the values of BOOL elements
            else:
                whole, shape, part = _exact(table, dtype.itemsize, segment[i], positions[i])
                known.append(_is_even(table))
            wholes.append(whole)
            shapes.append([0] * (FINGERPRINTS * SHAPE) + shape)
            parts.append(part)
        self.known = np.array(known, np.bool_)
        self._segment = tensors.segment
        self._whole = np.array(wholes, np.int64)
        self._shapes = np.zeros((len(known), len(STREAMS) * SHAPE), np.int64)
        self._shapes[:, : (FINGERPRINTS + 1) * SHAPE] = shapes
        self._lengths = np.frombuffer(b"".join(parts), np.uint8)
        self._places = self._all_places(np.array([len(part) for part in parts], np.int64))
        self._most_room = int(self._shapes[:, FINGERPRINTS * SHAPE + STOP_OF].max(initial=0))

    def _all_places(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns for each tensor the addresses and sizes of its arrays (`recipe.Recipe`)."""
        places = np.zeros((len(sizes), PLACES_SIZE), np.int64)
        for which, rows in ((WHOLE, self._whole), (SHAPES, self._shapes)):
            address, size = place_of(rows)
            each = size // max(len(rows), 1)
            places[:, 2 * which], places[:, 2 * which + 1] = address + each * np.arange(len(rows)), each
        address, _ = place_of(self._lengths)
        places[:, 2 * LENGTHS], places[:, 2 * LENGTHS + 1] = address + np.cumsum(sizes) - sizes, sizes
        return places

    def prepare(self, runs: PlainRuns) -> _Prepared:
        """Implements `interface.PlainPlan.prepare`."""
        rows = np.zeros((len(runs.tensor), ROW_SIZE), np.int64)
        segments = -(-runs.total // self._segment[runs.tensor])
        rows[:, TOTAL], rows[:, START], rows[:, FIRST], rows[:, STOP] = runs.total, runs.start, 0, segments
        rows[:, DATA_SIZE], rows[:, OUT], rows[:, OUT_SIZE] = runs.length, runs.out, runs.out_size
        rows[:, PLACES] = place_of(self._places)[0] + 8 * PLACES_SIZE * runs.tensor
        most = int(segments.max())
        size = working_size(most, most, int(self._segment[runs.tensor].max()))
        return _Prepared(rows, np.cumsum(runs.length) - runs.length, size)

    def decode(self, prepared: _Prepared, regions: Sequence[tuple[int, int, Bytes]]) -> bool:
        """Implements `interface.PlainPlan.decode`."""
        parts = []
        for first, stop, data in regions:
            rows = prepared.rows[first:stop]
            rows[:, DATA] = prepared.before[first:stop]
            rows[:, DATA] += place_of(data)[0] - prepared.before[first]
            parts.append(rows)
        together = parts[0] if len(parts) == 1 else np.concatenate(parts)
        good = np.zeros(len(together), np.bool_)
        batch.decode_runs(together, *memory_for(self._most_room, prepared.working_size), good)
        return bool(good.all())


class _Prepared(NamedTuple):
    """Chunks prepared for decoding.

    Attributes:
        rows: one row per chunk (`recipe.row_of_run`); `PlainPlan.decode` sets the addresses of their data.
        before: int64 [m], total size in bytes of the chunks before each.
        working_size: size of the working memory in bytes.
    """

    rows: NDArray[np.int64]
    before: NDArray[np.int64]
    working_size: int


def plan_plain(tensors: PlainTensors) -> PlainPlan:
    """Implements `Engine.plan_plain`."""
    return PlainPlan(tensors)


def _is_even(table: PlainTable) -> bool:
    """Returns whether all classes have the same number of residual bits."""
    return not table.extra.strip(table.extra[:1])


def _exact(
    table: PlainTable, itemsize: int, segment: int, positions: int
) -> tuple[list[int], list[int], bytes]:
    """Returns `whole`, the row of `shapes`, and `lengths` of a lossless tensor (`recipe`)."""
    width, classes = table.extra[0], len(table.extra)
    contiguous = is_contiguous(itemsize, width, classes, table.base)
    codes = table.codes if table.window is None else windows_of(classes, table.window)
    shape = shape_of(codes, width, width, 1, table.base, classes, table.window or 0, positions)
    shape[TRIMMED_OF] = table.trim
    return whole_of_exact(itemsize, segment, contiguous, positions), shape, table.extra + table.lengths
