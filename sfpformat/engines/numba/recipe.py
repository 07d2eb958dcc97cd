"""Recipes: the data that the kernels need for a tensor, computed once before its first chunk is decoded.

A recipe is a few flat arrays. Kernels take their addresses, so that one call can decode runs of many tensors.
"""

from __future__ import annotations

import itertools
from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...coding.codetable import CodeTable
from ...coding.quantisers import (
    F32,
    Exact,
    NumberQuantiser,
)
from ...container.entry import TensorEntry
from ..interface import Run
from ..translation import (
    COUNT_POSITIONS,
    MASK,
    NO_MASK,
    NO_MULTIPLIER,
    NO_SCALE,
    OF_POSITIONS,
    OF_SURVIVORS,
    STREAMS,
    count_rule_of,
    has_few_levels,
    keeps_patterns,
    level_patterns,
    mask_kind_of,
    multiplier_of,
    scale_of,
)
from . import values
from .index import COUNT_RULE_OF, LEAST_OF, TRIMMED_OF
from .lookup import lengths_of, table_bits, table_bytes

# Further columns of `shapes` (see `index`): index bits of the look-up tables, levels per symbol, begin and
# end of the stream's tables in a thread's memory, the first level of class 0, the number of classes, bits of
# a symbol in a window (0: prefix codes), and the begin of the stream's part of `lengths`.
BITS_OF, GROUP_OF, START_OF, STOP_OF, BASE_OF, CLASSES_OF, WINDOW_OF, LENGTHS_OF = range(
    LEAST_OF + 1, LEAST_OF + 9
)
SHAPE = LENGTHS_OF + 1
# Entries of `whole`: positions per segment; bytes per weight; mask kind; mode (`values`); whether
# `values.join_residuals` applies; whether non-temporal stores may be used; scale_by, scale_unit and
# multiplier; positions per row; the unique number of the recipe. The names without a module are in
# `translation`.
(
    SEGMENT,
    ITEM,
    MASK_KIND,
    MODE,
    CONTIGUOUS,
    STREAMED,
    SCALE_BY,
    SCALE_UNIT,
    MULTIPLIER,
    COLUMNS,
    NUMBER,
) = range(11)

# For kernels, a run of segments is a row of int64: number of positions of the chunk, position in the tensor
# of its first, the run's first and last + 1 segment, address and size of the chunk and of the output, and the
# address of the recipe's `places`, which holds address and size of each array.
TOTAL, START, FIRST, STOP, DATA, DATA_SIZE, OUT, OUT_SIZE, PLACES = range(9)
(
    WHOLE,
    SHAPES,
    LENGTHS,
    PATTERN_TABLE,
    MAGNITUDES,
    SCALE,
    IMPORTANCES,
    ROW_FACTORS,
    COLUMN_FACTORS,
) = range(9)
PLACES_SIZE = 2 * 9
ROW_SIZE = PLACES + 1

# Look-up tables over all levels have at most this many levels.
_MOST_LEVELS = 1 << 17
# Tensors of at least this many bytes are written with non-temporal stores: caches would not keep them.
_STREAMED_BYTES = 1 << 20
_numbers = itertools.count(1)


class Recipe:
    """The data that kernels need to decode the weights of a tensor.

    Attributes:
        room: size in bytes of the streams' tables.
        segment: positions per segment.
        places: address of an array with the address and the size of each array that kernels take.
    """

    def __init__(
        self,
        whole: list[int],
        shapes: list[int],
        lengths: bytes,
        numbers: tuple[NDArray[np.uint32] | F32 | None, ...],
    ) -> None:
        """Keeps the arrays alive, and stores their addresses.

        Args:
            whole: [11], the values that the tensor has once.
            shapes: [3 * 14], stream by stream.
            lengths: the concatenated `lookup.lengths_of` of the streams.
            numbers: uint32, level -> bit pattern (mode `values.LOOKED_UP`); and float32: number -> magnitude
                (mode `values.ARITHMETIC`), the scale factors, level of the importance stream -> importance,
                and the importance factors of rows and of columns. None for arrays that are not needed.
        """
        # `array`, because its address is cheap to get.
        fixed = (array("q", whole), array("q", shapes), array("B", lengths))
        self.room = max(shapes[STOP_OF::SHAPE])
        self.segment = whole[SEGMENT]
        places = array("q")
        for some in fixed:
            address, count = some.buffer_info()
            places.extend((address, count * some.itemsize))
        for many in numbers:
            places.extend((0, 0) if many is None else place_of(many))
        self._alive = fixed, numbers, places
        self.places = places.buffer_info()[0]


def place_of(some: NDArray[Any]) -> tuple[int, int]:
    """Returns address and size in bytes of a contiguous array; the address of an empty one is undefined."""
    return some.__array_interface__["data"][0], some.nbytes


def row_of_run(run: Run[NDArray[Any]]) -> tuple[int, ...]:
    """Returns a run as a row for kernels. All its arrays must outlive the call."""
    return (
        run.total,
        run.start,
        run.first,
        run.stop,
        *place_of(run.data),
        *place_of(run.out),
        run.recipe.places,
    )


def make_recipe(entry: TensorEntry, vectors: dict[str, F32], weights: int) -> Recipe | None:
    """Returns the recipe of a tensor to decode about ``weights`` weights; None if no kernel supports it."""
    mode = _mode(entry)
    if mode is None:
        return None
    if mode == values.RAW:
        return Recipe(
            whole_of_raw(entry.dtype.itemsize, entry.segment), [0] * (len(STREAMS) * SHAPE), b"", ()
        )
    assert entry.fingerprints is not None
    shapes, lengths = _shapes(entry, weights)
    table = entry.fingerprints.table
    multiplier = multiplier_of(entry)
    whole = [
        entry.segment,
        entry.dtype.itemsize,
        mask_kind_of(entry),
        mode,
        mode == values.PATTERNS
        and is_contiguous(entry.dtype.itemsize, table.constant_width, table.classes, table.base),
        weights * entry.dtype.itemsize >= _STREAMED_BYTES,
        *scale_of(entry),
        multiplier,
        max(entry.columns, 1),
        next(_numbers),
    ]
    streamed = multiplier in (OF_SURVIVORS, OF_POSITIONS)
    numbers = (
        level_patterns(entry, vectors) if mode == values.LOOKED_UP else None,
        _magnitudes(entry, vectors) if mode == values.ARITHMETIC else None,
        vectors.get("scale"),
        _importances(entry, vectors) if streamed else None,
        vectors.get("importance rows"),
        vectors.get("importance columns"),
    )
    return Recipe(whole, shapes, lengths, numbers)


def is_contiguous(itemsize: int, width: int | None, classes: int, base: int) -> bool:
    """Returns whether `values.join_residuals` applies: one supported width, and slots equal to classes."""
    if width is None or not 1 < classes <= 256:
        return False
    if itemsize == 2:
        return width <= 8
    return (itemsize, width) == (4, 24) and base % (1 << 24) == 0


def whole_of_exact(itemsize: int, segment: int, contiguous: bool, weights: int) -> list[int]:
    """Returns `whole` of a lossless tensor without mask, scale and importance."""
    streamed = weights * itemsize >= _STREAMED_BYTES
    alone = (NO_SCALE, 1, NO_MULTIPLIER, 1)
    return [segment, itemsize, NO_MASK, values.PATTERNS, contiguous, streamed, *alone, next(_numbers)]


def whole_of_raw(itemsize: int, segment: int) -> list[int]:
    """Returns `whole` of a raw tensor."""
    alone = (NO_SCALE, 1, NO_MULTIPLIER, 1)
    return [segment, itemsize, NO_MASK, values.RAW, 0, 0, *alone, next(_numbers)]


def stream_shape(table: CodeTable, levels: int) -> list[int]:
    """Returns a row of `shapes` for a code table alone."""
    constant = table.constant_extra
    return shape_of(
        table.code_count,
        -1 if constant is None else constant,
        table.least_extra,
        table.group,
        table.base,
        table.classes,
        table.window or 0,
        levels,
    )


def shape_of(
    codes: int, constant: int, least: int, group: int, base: int, classes: int, window: int, levels: int
) -> list[int]:
    """Returns a row of `shapes` for a stream of about ``levels`` levels."""
    stored = 0 if window else codes
    bits = table_bits(stored, levels)
    # The base is any uint64; a row holds the same bits as int64.
    signed = base - (base >> 63 << 64)
    room = table_bytes(stored, bits)
    return [1, COUNT_POSITIONS, codes, 0, constant, least, bits, group, 0, room, signed, classes, window, 0]


def _shapes(entry: TensorEntry, weights: int) -> tuple[list[int], bytes]:
    """Returns `shapes` and `lengths` of all streams."""
    trimmed, levels = entry.trimmed_streams(), weights
    if entry.mask is not None:
        # The number of survivors is not known yet: an estimate from the size, with four bits per survivor.
        levels = min(weights, 2 * entry.stored_bytes * weights // max(entry.positions, 1))
    shapes, end, lengths = [0] * (len(STREAMS) * SHAPE), 0, b""
    for stream, table in entry.streams().items():
        i = STREAMS.index(stream)
        # An octet has eight positions, and runs have few levels: an eighth of the weights, as an estimate.
        row = stream_shape(table, weights // 8 if i == MASK else levels)
        row[COUNT_RULE_OF], row[TRIMMED_OF] = count_rule_of(entry, stream), stream in trimmed
        row[START_OF], row[STOP_OF], row[LENGTHS_OF] = end, end + row[STOP_OF], len(lengths)
        shapes[i * SHAPE : (i + 1) * SHAPE], end = row, row[STOP_OF]
        lengths += lengths_of(table)
    return shapes, lengths


def _mode(entry: TensorEntry) -> int | None:
    """Returns the mode of reconstruction; None if only the reference supports it."""
    fingerprints, importance = entry.fingerprints, entry.importance
    if fingerprints is None:  # only the reference checks the values of BOOL elements
        return None if entry.dtype.name == "BOOL" else values.RAW
    multiplied = multiplier_of(entry) != NO_MULTIPLIER
    if keeps_patterns(entry):
        return None if multiplied else values.PATTERNS
    if not has_few_levels(entry, _MOST_LEVELS) or entry.dtype.itemsize > 4:
        return None
    if not multiplied and entry.scale is None:
        return values.LOOKED_UP
    if isinstance(fingerprints.quantiser, Exact) or entry.dtype.name not in ("F32", "BF16"):
        return None
    if importance is not None and importance.table is not None and importance.table.top > _MOST_LEVELS:
        return None
    return values.ARITHMETIC


def _magnitudes(entry: TensorEntry, vectors: dict[str, F32]) -> F32:
    """Returns the magnitude of every number."""
    assert entry.fingerprints is not None
    every = np.arange((entry.fingerprints.table.top + 1) // 2, dtype=np.uint64)
    assert isinstance(entry.fingerprints.quantiser, NumberQuantiser)
    return entry.fingerprints.quantiser.magnitudes(every, vectors.get("fingerprint centroids"))


def _importances(entry: TensorEntry, vectors: dict[str, F32]) -> F32:
    """Returns the importance of every level of the importance stream."""
    importance = entry.importance
    assert importance is not None
    assert importance.table is not None
    assert importance.quantiser is not None
    every = np.arange(importance.table.top, dtype=np.uint64)
    return importance.quantiser.importance_values(every, vectors.get("importance centroids"))
