"""Recipes: the data that the kernels need for a tensor, computed once on the host.

Offsets are relative to the recipe's own bytes. A recipe is one block of memory, so that the recipes of many
tensors need one copy. A kernel fills the look-up tables from the code lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes, as_bytes
from ...coding.codetable import CodeTable, PrefixCode
from ...coding.quantisers import F32, Exact, Quantiser, Uniform
from ...container.entry import TensorEntry
from ..device_interface import Content
from ..translation import (
    NO_MULTIPLIER,
    SCALE_TENSOR,
    STREAMS,
    count_rule_of,
    has_few_levels,
    importance_positions,
    keeps_patterns,
    level_patterns,
    mask_kind_of,
    multiplier_of,
    scale_of,
)
from . import layout

_MOST_SLOTS = 256
_SHORT_BITS = 8  # index bits of the first look-up
_MOST_PATTERNS = 1 << 16  # of a look-up table over levels
# The kernels that decode something else than weights.
KERNELS = {Content.MASK: "masks", Content.IMPORTANCE: "importances"}


@dataclass(frozen=True, eq=False)
class Recipe:
    """The data that the kernels need to decode a tensor. Compares by identity.

    Attributes:
        data: a `layout.RECIPE` and all arrays that it refers to, by offsets; a multiple of 16 bytes.
        tables: bytes after ``data`` that the kernels fill with look-up tables, a multiple of 16.
        codes: (stream, code) of every look-up table.
        kernel: the name of the kernel that decodes the tensor, or its mask or importances.
        streams: number of streams of the tensor.
        segment: positions per segment.
        item: bytes per element that the kernel writes.
        shares_tables: whether all warps of a block must work on this tensor.
        warp_segments: the number of segments that a warp decodes.
    """

    data: Bytes
    tables: int
    codes: list[tuple[int, int]]
    kernel: str
    streams: int
    segment: int
    item: int
    shares_tables: bool
    warp_segments: int

    @property
    def size(self) -> int:
        """Size in bytes of data and tables."""
        return len(self.data) + self.tables


class _Pool:
    """Concatenated arrays, each at a multiple of 16 bytes."""

    def __init__(self, head: int) -> None:
        self.parts: list[bytes] = [bytes(_aligned(head))]
        self.size = _aligned(head)

    def add(self, values: NDArray[Any]) -> int:
        """Appends an array. Returns its offset."""
        raw, at = values.tobytes(), self.size
        self.parts.append(raw + bytes(_aligned(len(raw)) - len(raw)))
        self.size += _aligned(len(raw))
        return at


def _aligned(size: int) -> int:
    return -(-size // layout.ALIGNMENT) * layout.ALIGNMENT


def make_recipe(
    entry: TensorEntry, vectors: dict[str, F32], content: Content = Content.WEIGHTS
) -> Recipe | None:
    """Returns the recipe of a tensor with coding ``fingerprint``.

    Args:
        entry: the tensor's entry; it must have the content.
        vectors: the checked vectors of its vector chunk.
        content: what the recipe decodes.

    Returns:
        The recipe; None if no kernel supports the tensor: it uses more than 256 classes, or it is raw.
    """
    if entry.fingerprints is None:
        return None
    tables = entry.streams()
    slots = {stream: slots_of_classes(table) for stream, table in tables.items()}
    if any(int(own.max(initial=0)) >= _MOST_SLOTS for own in slots.values()):
        return None
    out = np.zeros((), layout.RECIPE)
    pool = _Pool(layout.RECIPE.itemsize)
    codes: list[tuple[int, int]] = []
    for stream, table in tables.items():
        number = STREAMS.index(stream)
        out["streams"][number] = _stream(table, slots[stream], pool)
        out["streams"][number]["rule"] = count_rule_of(entry, stream)
        out["streams"][number]["trimmed"] = stream in entry.trimmed_streams()
        codes += [(number, code) for code in range(len(table.codes))]
    _fill(out, entry, vectors, pool)
    if content is Content.IMPORTANCE:  # also of those that do not multiply the weights
        out["multiplier"] = importance_positions(entry)
    size = _place_tables(out, pool.size) - pool.size
    parts = [out.tobytes().ljust(len(pool.parts[0]), b"\0"), *pool.parts[1:]]
    kernel = KERNELS[content] if content in KERNELS else kernel_of(entry)
    return Recipe(
        as_bytes(b"".join(parts)),
        size,
        codes,
        kernel,
        len(tables),
        entry.segment,
        content.value or entry.dtype.itemsize,
        kernel.startswith(("dense", "short", "sparse")),
        _segments_a_warp(entry.segment) if kernel.startswith("windows") else layout.WARP,
    )


def _segments_a_warp(segment: int) -> int:
    """Returns the number of segments that a warp of the kernels for windows decodes."""
    return min(max(layout.WINDOW_LEVELS // segment, 1), layout.WARP)


def slots_of_classes(table: CodeTable) -> NDArray[np.int64]:
    """Returns the slot of each class: the class number if there are at most 256 classes.

    If there are more, the slot is the index among the used classes, and -1 for an unused class.
    """
    if table.classes <= _MOST_SLOTS:
        return np.arange(table.classes)
    # More than 64 classes: the group is 1, and symbols are classes.
    lengths = np.array([np.frombuffer(code.length, np.uint8) for code in table.codes])
    used = lengths.any(axis=0)
    return np.where(used, np.cumsum(used) - 1, -1)


def _stream(table: CodeTable, slots: NDArray[np.int64], pool: _Pool) -> NDArray[np.void]:
    """Returns the record of a stream, without the offset of its look-up tables."""
    out = np.zeros((), layout.STREAM)
    kept = slots >= 0
    out["first"] = pool.add(table.first[kept])
    out["extra"] = pool.add(table.class_extra[kept])
    lengths = np.zeros((len(table.codes), layout.CODE_LENGTHS), np.uint16)
    symbols = np.zeros((len(table.codes), layout.CODE_SYMBOLS), np.uint16)
    for i, code in enumerate(table.codes):
        counts = code.codes_of_length
        lengths[i, : len(counts)] = counts
        lengths[i, 0] = 0
        symbols[i, : len(code.symbols)] = _slots_of_symbols(code, table, slots)
    out["lengths"], out["symbols"] = pool.add(lengths), pool.add(symbols)
    constant = table.constant_extra
    out["present"], out["codes"], out["group"] = 1, table.code_count, table.group
    if table.window is not None:
        out["window"], out["escape"] = table.window, table.escape_bits
    out["differing"], out["constant"] = constant is None, constant or 0
    out["least"], out["slots"] = table.least_extra, np.count_nonzero(kept)
    out["bits"] = _longest(table)
    return out


def _slots_of_symbols(code: PrefixCode, table: CodeTable, slots: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the slots of a code's symbols in canonical order; the second of a pair in the high byte."""
    if table.group == 1:
        return np.asarray(slots[code.symbols])
    second, first = np.divmod(code.symbols.astype(np.int64), table.classes)
    return np.asarray(slots[first] | slots[second] << 8)


def _place_tables(out: NDArray[np.void], at: int) -> int:
    """Sets the offsets of the look-up tables, from ``at`` on. Returns the offset of their end."""
    for stream in out["streams"]:
        stream["entries"] = at
        if not stream["window"]:
            at += _aligned(4 * int(stream["codes"]) << int(stream["bits"]))
    return at


def _fill(out: NDArray[np.void], entry: TensorEntry, vectors: dict[str, F32], pool: _Pool) -> None:
    """Fills all fields of the record except the streams."""
    fingerprints, importance = entry.fingerprints, entry.importance
    assert fingerprints is not None
    for field, name in (
        ("centroids", "fingerprint centroids"),
        ("scale", "scale"),
        ("importance_centroids", "importance centroids"),
        ("row_factors", "importance rows"),
        ("column_factors", "importance columns"),
    ):
        out[field] = pool.add(vectors[name].astype("<f4")) if name in vectors else 0
    if _looks_up(entry):
        patterns = level_patterns(entry, vectors)
        out["patterns"], out["looked_up"] = pool.add(patterns), len(patterns)
    out["columns"], out["segment"] = max(entry.columns, 1), entry.segment
    out["dtype"] = layout.FLOATS.index(entry.dtype.name)
    out["quantiser"], out["step"], out["coded"] = _quantiser(fingerprints.quantiser)
    out["scale_by"], out["scale_unit"] = scale_of(entry)
    out["multiplier"], out["mask"] = multiplier_of(entry), mask_kind_of(entry)
    if importance is not None and importance.quantiser is not None:
        kind, step, coded = _quantiser(importance.quantiser)
        out["importance_quantiser"], out["importance_step"], out["importance_coded"] = kind, step, coded


def _quantiser(quantiser: Quantiser) -> tuple[int, float, int]:
    """Returns kind, step and coded dtype."""
    if isinstance(quantiser, Exact):
        return layout.EXACT, 0.0, layout.FLOATS.index(quantiser.dtype.name)
    if isinstance(quantiser, Uniform):
        return layout.UNIFORM, float(quantiser.step), 0
    return layout.TABLE, 0.0, 0


def _looks_up(entry: TensorEntry) -> bool:
    """Returns whether a look-up table of patterns gives the weights of a tensor from its levels."""
    return (
        multiplier_of(entry) == NO_MULTIPLIER
        and scale_of(entry)[0] <= SCALE_TENSOR
        and entry.dtype.itemsize <= 4
        and not keeps_patterns(entry)
        and has_few_levels(entry, _MOST_PATTERNS)
    )


def _is_short(entry: TensorEntry) -> bool:
    """Returns whether the kernels with all tables in shared memory support the tensor."""
    assert entry.fingerprints is not None
    tables = [entry.fingerprints.table, *([entry.mask.table] if entry.mask is not None else [])]
    few = entry.fingerprints.table.top <= layout.SHORT_PATTERNS or not _looks_up(entry)
    short = all(t.top <= layout.SHORT_TOP and len(t.codes) <= layout.SHORT_CODES for t in tables)
    return few and short and entry.dtype.itemsize <= 4


def _residual_bits_of_sparse(entry: TensorEntry) -> int | None:
    """Returns the residual bits of the kernel `sparse_2_*` that supports the tensor; None if none does."""
    assert entry.fingerprints is not None
    quantiser, table, mask = entry.fingerprints.quantiser, entry.fingerprints.table, entry.mask
    if entry.dtype.itemsize != 2 or any(len(t.codes) > layout.SHORT_CODES for t in entry.streams().values()):
        return None
    if mask is not None and not mask.is_bitmap:
        coded = mask.table.classes > 1 and mask.table.group == 1 and mask.table.constant_extra == 0
        if mask.kind != "octets" or not coded:
            return None
    if isinstance(quantiser, Exact):
        bytewise = 1 < table.classes <= _MOST_SLOTS and table.group == 1 and table.constant_extra == 8
        whole = keeps_patterns(entry) and not quantiser.trim
        return 8 if mask is not None and bytewise and whole else None
    if table.classes == 1:
        plain = table.extra[0] <= _SHORT_BITS
    else:  # each class a magnitude and its negative
        plain = table.group == 1 and table.constant_extra == 1 and table.base % 2 == 0
    return 1 if plain and _looks_up(entry) else None


def _longest(table: CodeTable) -> int:
    """Returns the length of the longest codeword, in bits."""
    return max([int(code.symbol_bits[-1]) for code in table.codes], default=0)


# (bytes per weight, residual bits) with specialised kernels.
_WHOLE_BYTES = ((2, 8), (4, 24))


def kernel_of(entry: TensorEntry) -> str:
    """Returns the name of the kernel that decodes a tensor."""
    fingerprints, item = entry.fingerprints, entry.dtype.itemsize
    assert fingerprints is not None
    quantiser, table = fingerprints.quantiser, fingerprints.table
    as_it_is = keeps_patterns(entry)
    if multiplier_of(entry) != NO_MULTIPLIER or not (as_it_is or _looks_up(entry)):
        return f"any_{item}"
    width = table.constant_width
    dense = as_it_is and entry.mask is None and item in (2, 4) and table.group == 1 and width is not None
    whole = (item, width) in _WHOLE_BYTES and isinstance(quantiser, Exact) and not quantiser.trim
    if any(t.window is not None for name, t in entry.streams().items() if name != "importance"):
        return f"windows_{item}_{width}" if dense and whole else f"{'plain' if item > 1 else 'any'}_{item}"
    residual_bits = _residual_bits_of_sparse(entry)
    if residual_bits is not None:
        tables = [table, *([entry.mask.table] if entry.mask is not None else [])]
        is_short = max(map(_longest, tables)) <= _SHORT_BITS
        many = "one" if is_short and all(len(t.codes) <= 1 for t in tables) else "many"
        return f"sparse_2_{residual_bits}_{many}_{'short' if is_short else 'long'}"
    if not dense or not 1 < table.classes <= _MOST_SLOTS:
        kind = "short" if _is_short(entry) else "plain" if item > 1 else "any"
        return f"{kind}_{item}"
    if not whole:
        return f"dense_{item}_0"
    many = "many" if len(table.codes) > 1 else "one"
    length = "short" if _longest(table) <= _SHORT_BITS else "long"
    return f"dense_{item}_{width}_{many}_{length}"
