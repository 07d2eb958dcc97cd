"""The rows of a keyed table: how many bits they can have, and how they are decoded (SPEC.md 17.1, 17.3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bits import Bytes
from ..codetable import MAX_CODE_BITS, CodeTable
from ..quantisers import F32

SLACK_BYTES = 8  # after the last bit of a row, so that 8 bytes can be loaded at every bit
NO_STEP = np.float32(1)


class Lookup(NamedTuple):
    """A code table as arrays, for decoding.

    Attributes:
        classes: the class of each 12 bits, the first bit lowest: uint16 [4096].
        lengths: the number of bits of its codeword: uint8 [4096].
        extra: residual bits of each class: uint8 [K].
        first: the first level of each class: uint64 [K].
    """

    classes: NDArray[np.uint16]
    lengths: NDArray[np.uint8]
    extra: NDArray[np.uint8]
    first: NDArray[np.uint64]

    @classmethod
    def of(cls, table: CodeTable) -> Lookup:
        """Returns the arrays of a table with at most one code."""
        size = 1 << MAX_CODE_BITS
        classes, lengths = np.zeros(size, np.uint16), np.zeros(size, np.uint8)
        for code in table.codes:
            for symbol, word in zip(code.symbols.tolist(), code.codewords, strict=True):
                classes[int(word[::-1], 2) :: 1 << len(word)] = symbol
                lengths[int(word[::-1], 2) :: 1 << len(word)] = len(word)
        return cls(classes, lengths, table.class_extra, table.first)


class FoundRows(NamedTuple):
    """What look-ups found.

    Attributes:
        weights: float32 [n, C]; zeros of unknown keys.
        known: bool [n].
        importance: float32 [n]; zeros of unknown keys, and if the table has none.
        greatest: the greatest class of each row, int32 [n], also of unknown keys; -1 without weights.
    """

    weights: F32
    known: NDArray[np.bool_]
    importance: F32
    greatest: NDArray[np.int32]


@dataclass(frozen=True)
class RowCode:
    """How rows are coded.

    Attributes:
        outputs: C, the number of weights of a key.
        gaps: the code table of the gaps; None with one output.
        levels: the code table of the weights.
        step: the step of the weights with the quantiser ``uniform``, else 1.
        centroids: the centroids of the weights with the quantiser ``table``, else empty: float32 [count].
        checks: byte c is the number of check bits of a row whose greatest class is c.
        importance: the code table of the importances, or None.
        importance_step: their step.
    """

    outputs: int
    gaps: CodeTable | None
    levels: CodeTable
    step: np.float32
    centroids: F32
    checks: bytes
    importance: CodeTable | None = None
    importance_step: np.float32 = NO_STEP

    @cached_property
    def most_bits(self) -> int:
        """R, the greatest number of bits of a row."""
        each = _most_bits(self.gaps) + _most_bits(self.levels)
        return self.outputs * each + _most_bits(self.importance) + max(self.checks)

    def array_bytes(self, starts: int, segment: int) -> int:
        """Returns the size of the bit array, in bytes."""
        return 8 * -(-(starts + 3 * segment + self.most_bits) // 64) + SLACK_BYTES

    @cached_property
    def lookups(self) -> tuple[Lookup | None, Lookup, Lookup | None]:
        """Gaps, levels and importance as arrays."""
        gaps = None if self.gaps is None else Lookup.of(self.gaps)
        importance = None if self.importance is None else Lookup.of(self.importance)
        return gaps, Lookup.of(self.levels), importance

    def weights_of(self, levels: NDArray[np.uint64]) -> F32:
        """Returns the weights of levels, of any shape."""
        numbers = (levels >> np.uint64(1)).astype(np.int64)
        magnitudes = (
            self.centroids[numbers] if len(self.centroids) else numbers.astype(np.float32) * self.step
        )
        return np.where(levels & np.uint64(1), -magnitudes, magnitudes).astype(np.float32)


def _most_bits(table: CodeTable | None) -> int:
    """Returns the greatest number of bits of a codeword with its residual; 0 for no table."""
    if table is None:
        return 0
    lengths = table.codes[0].length if table.codes else bytes(table.classes)
    return max(length + extra for length, extra in zip(lengths, table.extra, strict=True))


def decode_rows(code: RowCode, bits: Bytes, positions: NDArray[np.int64]) -> FoundRows:
    """Decodes the rows at the positions of keys, one output of all keys at a time.

    Args:
        code: how the rows are coded.
        bits: the bit array; its size is that of `RowCode.array_bytes`.
        positions: from `hashing.positions_of`.
    """
    count = len(positions)
    rows = _Rows(bits, positions)
    gaps, levels, importances = code.lookups
    weights = np.zeros((count, code.outputs), np.float32)
    greatest = np.full(count, -1, np.int32)
    output = np.zeros(count, np.int64)
    left = np.arange(count)
    while len(left):
        if gaps is not None:
            output[left] += rows.next(gaps, left)[1].astype(np.int64)
            left = left[output[left] < code.outputs]
        classes, found = rows.next(levels, left)
        weights[left, output[left]] = code.weights_of(found)
        greatest[left] = np.maximum(greatest[left], classes)
        output[left] += 1
        left = left[output[left] < code.outputs]
    everything = np.arange(count)
    importance = np.zeros(count, np.float32)
    if importances is not None:
        importance = rows.next(importances, everything)[1].astype(np.float32) * code.importance_step
    checked = np.frombuffer(code.checks, np.uint8)[greatest].astype(np.uint64)
    zeros = rows.window(everything) & ((np.uint64(1) << checked) - np.uint64(1)) == 0
    known = zeros & (greatest >= 0)
    weights[~known] = 0
    importance[~known] = 0
    return FoundRows(weights, known, importance, greatest)


class _Rows:
    """Rows that are read from their first bits on."""

    def __init__(self, bits: Bytes, positions: NDArray[np.int64]) -> None:
        self._words = np.ndarray((len(bits) - 7,), dtype="<u8", buffer=bits, strides=(1,))
        self._at = positions.copy()

    def window(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Returns the next bits of rows, at least 57 each, the first bit lowest."""
        at = self._at[rows]
        loaded = self._words[at >> 3] >> (at & 7).astype(np.uint64)
        return np.asarray(np.bitwise_xor.reduce(loaded, axis=1), np.uint64)

    def next(self, lookup: Lookup, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint16], NDArray[np.uint64]]:
        """Reads the next level of rows. Returns classes and levels."""
        window = self.window(rows)
        symbols = (window & np.uint64((1 << MAX_CODE_BITS) - 1)).astype(np.int64)
        classes, lengths = lookup.classes[symbols], lookup.lengths[symbols].astype(np.uint64)
        extra = lookup.extra[classes].astype(np.uint64)
        residuals = (window >> lengths) & ((np.uint64(1) << extra) - np.uint64(1))
        self._at[rows] += (lengths + extra).astype(np.int64)[:, None]
        return classes, lookup.first[classes] + residuals
