"""Encodes the rows of keys, and solves their equations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import Bytes, write_bits
from ..coding.codetable import CodeTable
from ..coding.keyed.equations import random_bytes
from ..coding.keyed.hashing import Keys, positions_of
from ..coding.keyed.rows import RowCode
from ..container.keyed_map import MAX_SEGMENT, MAX_STARTS, MIN_SEGMENT
from ..engines import Engine
from ..errors import OptionError

_ATTEMPTS = 100
# The array has at first 1.045 + 1.2 / cbrt(keys) bits for each bit of a row, and more with each attempt.
# Measured: 1.06 suffices for a million keys, 1.11 for 100,000 and 1.2 for 10,000.
_LEAST, _FOR_FEW, _STEP = 1.045, 1.2, 0.012


class Rows(NamedTuple):
    """The weights of keys that are not zero, key by key.

    Attributes:
        ends: for each key, the number of weights up to its last, int64 [n].
        outputs: the output of each weight, ascending within a key: int64 [m].
        levels: the level of each weight, uint64 [m].
        importance: the level of each key's importance, uint64 [n], or None.
    """

    ends: NDArray[np.int64]
    outputs: NDArray[np.int64]
    levels: NDArray[np.uint64]
    importance: NDArray[np.uint64] | None

    @property
    def starts(self) -> NDArray[np.int64]:
        """For each key, the number of weights before its first."""
        return np.concatenate((np.zeros(1, np.int64), self.ends[:-1]))[: len(self.ends)]

    @property
    def owners(self) -> NDArray[np.int64]:
        """The key of each weight."""
        return np.repeat(np.arange(len(self.ends)), self.ends - self.starts)

    def gaps(self, outputs: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Returns the gap before each weight, and the last gap of each key.

        A key whose last weight is not that of the last output ends with the gap C, whatever is left, so that
        one codeword ends all rows. For other keys the last gap has no meaning.
        """
        before = np.concatenate((np.full(1, -1, np.int64), self.outputs[:-1]))[: len(self.outputs)]
        before[self.starts] = -1
        return (self.outputs - before - 1).astype(np.uint64), np.full(len(self.ends), outputs, np.uint64)

    def is_full(self, outputs: int) -> NDArray[np.bool_]:
        """Returns for each key whether its last weight is that of the last output."""
        return np.asarray(self.outputs[self.ends - 1] == outputs - 1)


def encode_rows(code: RowCode, rows: Rows) -> tuple[Bytes, NDArray[np.int64]]:
    """Returns the bits of all rows, one after another, and the number of bits of each.

    Each key must have a weight.
    """
    count, found = len(rows.ends), len(rows.levels)
    values = np.zeros(4 * found + 5 * count, np.uint64)
    widths = np.zeros(len(values), np.uint8)
    owners = rows.owners
    at = 4 * np.arange(found) + 5 * owners
    tail = 4 * rows.ends + 5 * np.arange(count)
    if code.gaps is not None:
        before, last = rows.gaps(code.outputs)
        _put(code.gaps, before, values, widths, at)
        open_rows = np.flatnonzero(~rows.is_full(code.outputs))
        _put(code.gaps, last[open_rows], values, widths, tail[open_rows])
    _put(code.levels, rows.levels, values, widths, at + 2)
    if code.importance is not None and rows.importance is not None:
        _put(code.importance, rows.importance, values, widths, tail + 2)
    greatest = np.maximum.reduceat(code.levels.class_of(rows.levels), rows.starts)
    widths[tail + 4] = np.frombuffer(code.checks, np.uint8)[greatest]
    data, ends = write_bits(values, widths)
    return data, np.diff(ends[tail + 4], prepend=0)


def _put(
    table: CodeTable,
    levels: NDArray[np.uint64],
    values: NDArray[np.uint64],
    widths: NDArray[np.uint8],
    at: NDArray[np.int64],
) -> None:
    """Puts the codeword and the residual of levels into two fields each, from ``at`` on."""
    classes = table.class_of(levels)
    if table.codes:
        code = table.codes[0]
        words, sizes = np.zeros(table.classes, np.uint64), np.frombuffer(code.length, np.uint8)
        for symbol, word in zip(code.symbols.tolist(), code.codewords, strict=True):
            words[symbol] = int(word[::-1], 2)
        values[at], widths[at] = words[classes], sizes[classes]
    values[at + 1] = levels - table.first[classes]
    widths[at + 1] = table.class_extra[classes]


class Solved(NamedTuple):
    """A bit array and what a reader needs to find rows in it."""

    seed: int
    segment: int
    starts: int
    bits: Bytes


def solve(keys: Keys, code: RowCode, data: Bytes, sizes: NDArray[np.int64], engine: Engine) -> Solved:
    """Returns a bit array with the rows of keys: the smallest of several attempts.

    Args:
        keys: distinct keys.
        code: how the rows are coded.
        data, sizes: from `encode_rows`.
        engine: solves the equations.

    Raises:
        OptionError: the rows have too many bits, or no attempt succeeds.
    """
    total = int(sizes.sum())
    factor = _LEAST + _FOR_FEW / _cube_root(max(len(keys), 1))
    exponent = int(0.63 * _log2(total) + 0.6)
    for seed in range(_ATTEMPTS):
        wider = exponent + seed % 2
        segment = min(max(1 << wider, MIN_SEGMENT), MAX_SEGMENT)
        segments = max(round(total * (factor + _STEP * (seed // 2)) / segment) - 3, 1)
        starts = segments * segment
        if starts > MAX_STARTS:
            raise OptionError(f"the rows have {total:,} bits, more than a keyed table can have; use several")
        words = engine.hash_keys(keys, seed)
        free = random_bytes(code.array_bytes(starts, segment), seed)
        bits = engine.solve_rows(positions_of(words, starts, segment), sizes, data, free)
        if bits is not None:
            return Solved(seed, segment, starts, bits)
    raise OptionError(f"no bit array was found in {_ATTEMPTS} attempts: the hashes of the keys coincide")


def _cube_root(number: int) -> int:
    """Returns the greatest integer whose cube is at most a number."""
    root: int = round(float(number) ** (1 / 3))
    while root**3 > number:
        root -= 1
    while (root + 1) ** 3 <= number:
        root += 1
    return root


def _log2(number: int) -> float:
    """Returns log2 of a number, exact to 1/64 of a bit and the same on every machine."""
    power = int(pow(max(number, 1), 64))
    return (power.bit_length() - 1) / 64
