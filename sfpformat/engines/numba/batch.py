"""Decodes many runs of segments, of any chunks and tensors, in one compiled call.

Arrays are passed by address.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ..translation import STREAMS
from .chunk_decoding import FILLED, decode_raw, decode_values
from .compiling import Int, kernel
from .recipe import (
    COLUMN_FACTORS,
    DATA,
    DATA_SIZE,
    FIRST,
    IMPORTANCES,
    LENGTHS,
    MAGNITUDES,
    MODE,
    OUT,
    OUT_SIZE,
    PATTERN_TABLE,
    PLACES,
    PLACES_SIZE,
    ROW_FACTORS,
    SCALE,
    SHAPE,
    SHAPES,
    START,
    STOP,
    TOTAL,
    WHOLE,
)
from .unaligned import bytes_at, fence
from .values import RAW


@kernel
def decode_runs(rows: NDArray[np.int64], kept: Bytes, tables_size: Int, good: NDArray[np.bool_]) -> None:
    """Decodes runs of segments, of any chunks and tensors.

    Args:
        rows: int64, one run per row (`recipe.row_of_run`).
        kept: uint8, memory that the calling thread keeps between calls: the flags of filled tables, the
            tables, then working memory for `working.carve`.
        tables_size: size of the tables in bytes.
        good: bool, set to whether each run was decoded.
    """
    filled = kept[: 8 * FILLED].view(np.int64)
    tables = kept[8 * FILLED : 8 * FILLED + tables_size]
    free = kept[8 * FILLED + tables_size :]
    for i in range(good.size):
        row = rows[i]
        data = bytes_at(row[DATA], row[DATA_SIZE])
        out = bytes_at(row[OUT], row[OUT_SIZE])
        at = bytes_at(row[PLACES], 8 * PLACES_SIZE).view(np.int64)
        whole = bytes_at(at[2 * WHOLE], at[2 * WHOLE + 1]).view(np.int64)
        if whole[MODE] == RAW:
            good[i] = decode_raw(data, row[TOTAL], row[FIRST], whole, out)
            continue
        good[i] = decode_values(
            data,
            row[TOTAL],
            row[START],
            row[FIRST],
            row[STOP],
            whole,
            bytes_at(at[2 * SHAPES], at[2 * SHAPES + 1]).view(np.int64).reshape(len(STREAMS), SHAPE),
            bytes_at(at[2 * LENGTHS], at[2 * LENGTHS + 1]),
            tables,
            filled,
            free,
            bytes_at(at[2 * PATTERN_TABLE], at[2 * PATTERN_TABLE + 1]).view(np.uint32),
            bytes_at(at[2 * MAGNITUDES], at[2 * MAGNITUDES + 1]).view(np.float32),
            bytes_at(at[2 * SCALE], at[2 * SCALE + 1]).view(np.float32),
            bytes_at(at[2 * IMPORTANCES], at[2 * IMPORTANCES + 1]).view(np.float32),
            bytes_at(at[2 * ROW_FACTORS], at[2 * ROW_FACTORS + 1]).view(np.float32),
            bytes_at(at[2 * COLUMN_FACTORS], at[2 * COLUMN_FACTORS + 1]).view(np.float32),
            out,
        )
    fence()
