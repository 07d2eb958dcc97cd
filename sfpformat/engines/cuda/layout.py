"""The records that kernels read. Must match ``recipe.cuh`` and ``decode.cu`` of ``kernels/source``."""

from __future__ import annotations

import numpy as np

from ...coding.codetable import MAX_CODE_BITS

# Maximum index bits of a look-up table: it has an entry for each window of as many bits as the longest
# codeword.
MAX_ENTRY_BITS = MAX_CODE_BITS

STREAM = np.dtype(
    [
        ("first", "<u8"),
        ("extra", "<u8"),
        ("lengths", "<u8"),
        ("symbols", "<u8"),
        ("entries", "<u8"),
        ("present", "<u4"),
        ("rule", "<u4"),
        ("codes", "<u4"),
        ("trimmed", "<u4"),
        ("differing", "<u4"),
        ("constant", "<u4"),
        ("least", "<u4"),
        ("bits", "<u4"),
        ("group", "<u4"),
        ("slots", "<u4"),
        ("window", "<u4"),
        ("escape", "<u4"),
    ]
)
RECIPE = np.dtype(
    [
        ("streams", STREAM, (3,)),
        ("centroids", "<u8"),
        ("scale", "<u8"),
        ("importance_centroids", "<u8"),
        ("row_factors", "<u8"),
        ("column_factors", "<u8"),
        ("patterns", "<u8"),
        ("columns", "<u8"),
        ("scale_unit", "<u8"),
        ("step", "<f4"),
        ("importance_step", "<f4"),
        ("segment", "<u4"),
        ("mask", "<u4"),
        ("quantiser", "<u4"),
        ("coded", "<u4"),
        ("dtype", "<u4"),
        ("scale_by", "<u4"),
        ("multiplier", "<u4"),
        ("importance_quantiser", "<u4"),
        ("importance_coded", "<u4"),
        ("looked_up", "<u4"),
        ("padding", "<u4", (2,)),
    ]
)
JOB = np.dtype(
    [
        ("data", "<u8"),
        ("out", "<u8"),
        ("start", "<u8"),
        ("recipe", "<u8"),
        ("index", "<u8"),
        ("errors", "<u8"),
        ("length", "<u4"),
        ("total", "<u4"),
        ("first", "<u4"),
        ("stop", "<u4"),
    ]
)
MATRIX = np.dtype(
    [
        ("data", "<u8"),
        ("bytes", "<u8"),
        ("masks", "<u8"),
        ("places", "<u8"),
        ("scale", "<u8"),
        ("rows", "<u4"),
        ("columns", "<u4"),
        ("chunk_rows", "<u4"),
        ("masked", "<u4"),
        ("scale_runs", "<u4"),
        ("magnitudes", "<f4", (8,)),
        ("patterns", "<u4", (3, 4)),
        ("padding", "<u4"),
    ]
)
PART = np.dtype([("job", "<u4"), ("group", "<u4")])
CHANGE_TILE = np.dtype(
    [("data", "<u8"), ("count", "<u4"), ("range", "<u4"), ("flags", "<u4"), ("padding", "<u4")]
)
KEY_RANGE = np.dtype(
    [
        ("counts", "<u8"),
        ("totals", "<u8"),
        ("starts", "<u8"),
        ("first", "<u4"),
        ("tiles", "<u4"),
        ("key", "<u4"),
        ("keys", "<u4"),
        ("shift", "<u4"),
        ("is_float", "<u4"),
    ]
)
CODE = np.dtype([("recipe", "<u8"), ("stream", "<u4"), ("code", "<u4")])

ROWS_A_STREAM = 3  # rows of a job's index per stream
EXACT, UNIFORM, TABLE = range(3)
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

# Threads of a block, warps of a block, segments of a warp.
WARP = 32
WARPS = 4
THREADS = WARP * WARPS
IDLE = 0xFFFFFFFF
WINDOW_LEVELS = 4096  # of a warp of the kernels for windows, about
ALIGNMENT = 16  # of chunks and of the arrays of recipes, in bytes
MAX_CHUNK = 1 << 29  # bytes; bit offsets are u32
# Symbols and code lengths per code in the tables of codes.
CODE_SYMBOLS = 256
CODE_LENGTHS = 16
# Limits of the kernels for short levels: levels, codes per stream, patterns.
SHORT_TOP = 1 << 16
SHORT_CODES = 8
SHORT_PATTERNS = 1 << 10

# Of the kernels for products: columns per stored offset, columns per lane, rows per block, rows of x per
# launch, bits of a level, and magnitudes.
UNIT = 1024
RUN = 128
BLOCK_ROWS = 64
BATCH = 8
LEVEL_BITS = 4
MAGNITUDES = 8

# Of the kernels for deltas: elements per tile, keys per range, blocks per range of `sum_keys`.
TILE_ELEMENTS = 4096
MOST_KEYS = 256
KEY_GROUPS = MOST_KEYS // WARP
NO_RANGE = 0xFFFFFFFF
IS_CHANGED, IS_BOOL = 1, 2  # flags of a tile
