"""What the kernels need of a tensor, made once before its first chunk is decoded.

Everything is in a few flat arrays: handing an array to a kernel takes about as long as decoding 200 weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...coding.codetable import CodeTable
from ...coding.quantiser import F32, Exact, fingerprint_values, importance_values, magnitudes
from ...container.entry import MAX_POSITIONS, TensorEntry
from . import masks, values
from .index import COUNT_OCTETS, COUNT_POSITIONS, COUNT_PRUNED, COUNT_SURVIVORS, LEAST_OF, STREAMS
from .lookup import fill_tables, table_bits, table_bytes

MASK, FINGERPRINTS, IMPORTANCE = range(len(STREAMS))
# Further columns of `shapes`, see `index`: width of the look-up tables, levels a symbol, and where the
# stream's tables begin and end in `tables`.
BITS_OF, GROUP_OF, START_OF, STOP_OF = range(LEAST_OF + 1, LEAST_OF + 5)
# Entries of `whole`: positions a segment; bytes a weight; mask kind as in `masks`; mode as in `values`; if
# `values.join_whole_bytes` will do; scale_by, scale_unit and multiplier as in `values`; positions a row.
SEGMENT, ITEM, MASK_KIND, MODE, CONTIGUOUS, SCALE_BY, SCALE_UNIT, MULTIPLIER, COLUMNS = range(9)

# Tables of what every level means are made for at most so many levels,
_MOST_LEVELS = 1 << 17
# and for more levels than the tensor has weights only where they are this few.
_FEW_LEVELS = 1 << 12
_NO_PATTERNS = np.zeros(0, np.uint32)
_NO_NUMBERS = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Recipe:
    """How the weights of a tensor are made.

    Attributes:
        whole: int64 [9], what there is one of.
        shapes: int64 [3, 10], a stream a row.
        tables: uint8, the tables of the streams, see `lookup`.
        patterns: uint32, level -> bit pattern (mode `values.LOOKED_UP`).
        magnitudes: float32, number -> magnitude (mode `values.ARITHMETIC`).
        scale: float32, the scale factors.
        importances: float32, level of the importance stream -> importance.
        rows, columns: float32, the importance factors.
    """

    whole: NDArray[np.int64]
    shapes: NDArray[np.int64]
    tables: NDArray[np.uint8]
    patterns: NDArray[np.uint32]
    magnitudes: F32
    scale: F32
    importances: F32
    rows: F32
    columns: F32


def make_recipe(entry: TensorEntry, vectors: dict[str, F32], weights: int) -> Recipe | None:
    """The recipe of a tensor for decoding about so many weights; None where the kernels do not know how."""
    mode = _mode(entry)
    if mode is None:
        return None
    assert entry.fingerprints is not None
    made = _tables(entry, weights)
    if made is None:
        return None
    shapes, tables = made
    table = entry.fingerprints.table
    width = table.constant_width
    whole_bytes = (entry.dtype.itemsize, width) in ((2, 8), (4, 24)) and not table.base % (1 << (width or 0))
    multiplier = _multiplier(entry)
    whole = [
        entry.segment,
        entry.dtype.itemsize,
        _mask_kind(entry),
        mode,
        mode == values.PATTERNS and whole_bytes and 1 < table.classes <= 256,
        *_scale(entry),
        multiplier,
        max(entry.columns, 1),
    ]
    return Recipe(
        np.array(whole, np.int64),
        shapes,
        tables,
        _patterns(entry, vectors) if mode == values.LOOKED_UP else _NO_PATTERNS,
        _magnitudes(entry, vectors) if mode == values.ARITHMETIC else _NO_NUMBERS,
        vectors.get("scale", _NO_NUMBERS),
        _importances(entry, vectors)
        if multiplier in (values.OF_SURVIVORS, values.OF_POSITIONS)
        else _NO_NUMBERS,
        vectors.get("importance rows", _NO_NUMBERS),
        vectors.get("importance columns", _NO_NUMBERS),
    )


def stream_shape(table: CodeTable, levels: int) -> list[int]:
    """The columns of `shapes` that a code table gives; its tables begin at 0."""
    codes = len(table.codes)
    bits = table_bits(codes, levels)
    constant = -1 if table.constant_extra is None else table.constant_extra
    size = table_bytes(codes, bits)
    return [1, 0, codes, 0, constant, table.least_extra, bits, table.group, 0, size]


def _tables(entry: TensorEntry, weights: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]] | None:
    """`shapes` and `tables` of all streams; None where a stream's codes use too many classes."""
    streams, trimmed = entry.streams(), entry.trimmed_streams()
    rows, end = [[0] * (STOP_OF + 1)] * len(STREAMS), 0
    for i, stream in enumerate(STREAMS):
        if stream in streams:
            # An octet has eight positions, and a run few survivors: either way tables this wide will do.
            row = stream_shape(streams[stream], weights // 8 if i == MASK else weights)
            rows[i] = [
                1,
                _count_rule(entry, stream),
                row[2],
                stream in trimmed,
                *row[4:8],
                end,
                end + row[-1],
            ]
            end += row[-1]
    tables = np.empty(end, np.uint8)
    for i, stream in enumerate(STREAMS):
        if stream in streams:
            _, _, _, _, _, _, bits, _, start, stop = rows[i]
            if not fill_tables(streams[stream], bits, tables[start:stop]):
                return None
    return np.array(rows, np.int64), tables


def _mode(entry: TensorEntry) -> int | None:
    """How levels become weights; None for what is left to the reference."""
    fingerprints, importance = entry.fingerprints, entry.importance
    if fingerprints is None:
        return None
    multiplied = importance is not None and importance.role == "multiplier"
    if isinstance(fingerprints.quantiser, Exact) and fingerprints.quantiser.dtype == entry.dtype:
        return None if multiplied else values.PATTERNS
    few = fingerprints.table.top <= min(_MOST_LEVELS, max(entry.positions, _FEW_LEVELS))
    if not few or entry.dtype.itemsize > 4:
        return None
    if not multiplied and entry.scale is None:
        return values.LOOKED_UP
    if isinstance(fingerprints.quantiser, Exact) or entry.dtype.name not in ("F32", "BF16"):
        return None
    if importance is not None and importance.table is not None and importance.table.top > _MOST_LEVELS:
        return None
    return values.ARITHMETIC


def _patterns(entry: TensorEntry, vectors: dict[str, F32]) -> NDArray[np.uint32]:
    """The bit pattern of every level."""
    assert entry.fingerprints is not None
    every = np.arange(entry.fingerprints.table.top, dtype=np.uint64)
    weights = fingerprint_values(
        every, entry.fingerprints.quantiser, entry.dtype, vectors.get("fingerprint centroids")
    )
    return weights.view(entry.dtype.pattern).astype(np.uint32)


def _magnitudes(entry: TensorEntry, vectors: dict[str, F32]) -> F32:
    """The magnitude of every number."""
    assert entry.fingerprints is not None
    every = np.arange((entry.fingerprints.table.top + 1) // 2, dtype=np.uint64)
    return magnitudes(every, entry.fingerprints.quantiser, vectors.get("fingerprint centroids"))


def _importances(entry: TensorEntry, vectors: dict[str, F32]) -> F32:
    """The importance of every level of the importance stream."""
    importance = entry.importance
    assert importance is not None
    assert importance.table is not None
    assert importance.quantiser is not None
    every = np.arange(importance.table.top, dtype=np.uint64)
    return importance_values(every, importance.quantiser, vectors.get("importance centroids"))


def _multiplier(entry: TensorEntry) -> int:
    importance = entry.importance
    if importance is None or importance.role != "multiplier":
        return values.NO_MULTIPLIER
    if importance.over == "factors":
        return values.FACTORS
    return values.OF_POSITIONS if importance.over == "all" and entry.mask else values.OF_SURVIVORS


def _scale(entry: TensorEntry) -> tuple[int, int]:
    """What the scale factors go by, and the unit that positions are divided by."""
    if entry.scale is None:
        return values.NOTHING, 1
    if entry.scale.per == "tensor":
        return values.WHOLE, MAX_POSITIONS
    if entry.scale.per == "group":
        return values.BY_QUOTIENT, min(entry.scale.size, MAX_POSITIONS)
    return values.BY_QUOTIENT if entry.scale.per == "row" else values.BY_REMAINDER, max(entry.columns, 1)


def _mask_kind(entry: TensorEntry) -> int:
    if entry.mask is None or entry.mask.kind == "octets":
        return masks.OCTETS
    return masks.RUNS_OF_SURVIVORS if entry.mask.polarity else masks.RUNS_OF_PRUNED


def _count_rule(entry: TensorEntry, stream: str) -> int:
    """How many levels of a stream a segment has, as `container.chunk.stream_counts`."""
    if stream == "fingerprints":
        return COUNT_SURVIVORS
    if stream == "importance":
        assert entry.importance is not None
        return COUNT_SURVIVORS if entry.importance.over == "survivors" else COUNT_POSITIONS
    assert entry.mask is not None
    if entry.mask.kind == "octets":
        return COUNT_OCTETS
    return COUNT_SURVIVORS if entry.mask.polarity else COUNT_PRUNED
