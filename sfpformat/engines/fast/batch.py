"""Many runs of segments, of any chunks and tensors, in one compiled call; arrays come as addresses."""

from __future__ import annotations

from typing import Any

import numpy as np

from .chunks import decode_values
from .compiling import kernel
from .index import STREAMS
from .memory import bytes_at
from .recipe import (
    ARRAYS_OF,
    COLUMN_FACTORS,
    DATA,
    FIRST,
    IMPORTANCES,
    LENGTHS,
    MAGNITUDES,
    OUT,
    PATTERN_TABLE,
    ROW_FACTORS,
    SCALE,
    SHAPE,
    SHAPES,
    START,
    STOP,
    TOTAL,
    WHOLE,
)


@kernel
def _array_of(row: Any, which: int) -> Any:
    """The array whose address and size are in a row, as bytes."""
    at = ARRAYS_OF + 2 * which
    return bytes_at(row[at], row[at + 1])


@kernel
def decode_runs(rows: Any, tables: Any, filled: Any, good: Any) -> None:
    """Decodes some runs of segments, of any chunks and tensors.

    Args:
        rows: int64, a run a row, see `recipe.row_of_run`.
        tables, filled: memory that the calling thread keeps, see `decode_values`.
        good: bool, set to whether each run's weights are there.
    """
    for i in range(good.size):
        row = rows[i]
        good[i] = decode_values(
            _array_of(row, DATA),
            row[TOTAL],
            row[START],
            row[FIRST],
            row[STOP],
            _array_of(row, WHOLE).view(np.int64),
            _array_of(row, SHAPES).view(np.int64).reshape(len(STREAMS), SHAPE),
            _array_of(row, LENGTHS),
            tables,
            filled,
            _array_of(row, PATTERN_TABLE).view(np.uint32),
            _array_of(row, MAGNITUDES).view(np.float32),
            _array_of(row, SCALE).view(np.float32),
            _array_of(row, IMPORTANCES).view(np.float32),
            _array_of(row, ROW_FACTORS).view(np.float32),
            _array_of(row, COLUMN_FACTORS).view(np.float32),
            _array_of(row, OUT),
        )
