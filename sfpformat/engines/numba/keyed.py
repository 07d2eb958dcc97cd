"""Kernels of `coding.keyed`: hash keys, decode rows, and solve the equations of a bit array."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba.extending import register_jitable
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.codetable import EMPTY_TABLE, MAX_CODE_BITS
from ...coding.keyed.hashing import BLOCK, C1, C2, M1, M2, N1, N2, PLACES, Keys
from ...coding.keyed.rows import FoundRows, Lookup, RowCode
from ...coding.quantisers import F32
from .compiling import inlined_kernel, kernel
from .unaligned import load64, prefetch

if TYPE_CHECKING:
    from .compiling import Int

_SYMBOL = np.uint64((1 << MAX_CODE_BITS) - 1)
_AHEAD = 16  # keys whose bits are prefetched
# Bits of the number of an equation for the bit of its row, of at most 4,096 outputs; the rest is the row.
_BIT_FIELD = 24
_BIT = np.int64((1 << _BIT_FIELD) - 1)


def hash_keys(keys: Keys, seed: int) -> NDArray[np.uint32]:
    """Implements `coding.keyed.hashing.hash_keys`."""
    out = np.empty((len(keys), 2), np.uint64)
    data = np.concatenate((keys.data, np.zeros(BLOCK, np.uint8)))
    _hash(data, keys.offsets, np.uint64(seed), out)
    return out.astype("<u8", copy=False).view("<u4").astype(np.uint32, copy=False)


def decode_rows(code: RowCode, bits: Bytes, positions: NDArray[np.int64]) -> FoundRows:
    """Implements `coding.keyed.rows.decode_rows`."""
    count = len(positions)
    weights = np.zeros((count, code.outputs), np.float32)
    known, importance = np.zeros(count, np.bool_), np.zeros(count, np.float32)
    greatest = np.full(count, -1, np.int32)
    gaps, levels, importances = code.lookups
    none = Lookup.of(EMPTY_TABLE)
    _decode(
        np.ascontiguousarray(bits),
        positions,
        np.int64(code.outputs),
        gaps is not None,
        gaps or none,
        levels,
        importances is not None,
        importances or none,
        code.step,
        code.centroids,
        np.frombuffer(code.checks, np.uint8),
        code.importance_step,
        weights,
        known,
        importance,
        greatest,
    )
    return FoundRows(weights, known, importance, greatest)


def solve_rows(
    positions: NDArray[np.int64], sizes: NDArray[np.int64], rows: Bytes, free: Bytes
) -> Bytes | None:
    """Implements `coding.keyed.equations.solve_rows`."""
    total, size = int(sizes.sum()), 8 * len(free)
    starts = np.cumsum(sizes) - sizes
    counts, joined = np.zeros(size, np.uint32), np.zeros(size, np.int64)
    rounds = np.zeros(size, np.uint32)
    order, chosen = np.empty(total, np.int64), np.empty(total, np.int64)
    listed = np.empty(size, np.int64)
    if not _peel(positions, sizes, counts, joined, rounds, listed, order, chosen):
        return None
    out = free.copy()
    wanted = np.concatenate((rows, np.zeros(1, np.uint8)))
    _fill(positions, starts, wanted, order, chosen, out)
    return out


@register_jitable
def _rotated(x: np.uint64, bits: np.uint64) -> np.uint64:
    return (x << bits) | (x >> (np.uint64(64) - bits))


@register_jitable
def _mixed(x: np.uint64) -> np.uint64:
    x = (x ^ (x >> np.uint64(33))) * M1
    x = (x ^ (x >> np.uint64(33))) * M2
    return x ^ (x >> np.uint64(33))


@kernel
def _hash(data: Bytes, offsets: NDArray[np.int64], seed: np.uint64, out: NDArray[np.uint64]) -> None:
    """Hashes keys. At least 16 bytes follow the last key."""
    full = ~np.uint64(0)
    for i in range(len(offsets) - 1):
        at, end = offsets[i], offsets[i + 1]
        size = np.uint64(end - at)
        a = seed
        b = seed
        while at + 16 <= end:
            a ^= _rotated(load64(data, at) * C1, np.uint64(31)) * C2
            a = (_rotated(a, np.uint64(27)) + b) * np.uint64(5) + N1
            b ^= _rotated(load64(data, at + 8) * C2, np.uint64(33)) * C1
            b = (_rotated(b, np.uint64(31)) + a) * np.uint64(5) + N2
            at += 16
        left = end - at
        if left > 0:
            x = load64(data, at)
            if left < 8:
                x &= full >> np.uint64(8 * (8 - left))
            a ^= _rotated(x * C1, np.uint64(31)) * C2
            if left > 8:
                y = load64(data, at + 8) & (full >> np.uint64(8 * (16 - left)))
                b ^= _rotated(y * C2, np.uint64(33)) * C1
        a ^= size
        b ^= size
        a += b
        b += a
        a = _mixed(a)
        b = _mixed(b)
        a += b
        b += a
        out[i, 0] = a
        out[i, 1] = b


@inlined_kernel
def _window(bits: Bytes, positions: NDArray[np.int64], i: Int, at: Int) -> np.uint64:
    """Returns the bits of a row from bit ``at`` on, at least 57."""
    window = np.uint64(0)
    for k in range(PLACES):
        place = positions[i, k] + at
        window ^= load64(bits, place >> 3) >> np.uint64(place & 7)
    return window


@inlined_kernel
def _symbol(rest: np.uint64, lookup: Lookup) -> tuple[Int, np.uint64, Int]:
    """Reads a codeword and its residual. Returns the class, the level, and the number of bits."""
    symbol = np.int64(rest & _SYMBOL)
    c = np.int64(lookup.classes[symbol])
    length = np.int64(lookup.lengths[symbol])
    extra = np.int64(lookup.extra[c])
    residual = (rest >> np.uint64(length)) & ((np.uint64(1) << np.uint64(extra)) - np.uint64(1))
    return c, lookup.first[c] + residual, length + extra


@kernel
def _decode(
    bits: Bytes,
    positions: NDArray[np.int64],
    outputs: Int,
    has_gaps: bool,
    gaps: Lookup,
    levels: Lookup,
    has_importance: bool,
    importances: Lookup,
    step: np.float32,
    centroids: F32,
    checks: NDArray[np.uint8],
    importance_step: np.float32,
    weights: F32,
    known: NDArray[np.bool_],
    importance: F32,
    greatest: NDArray[np.int32],
) -> None:
    """Decodes rows, each from its first bit to its last."""
    count = len(positions)
    for i in range(count):
        for k in range(PLACES):
            prefetch(bits, positions[min(i + _AHEAD, count - 1), k] >> 3)
        window = _window(bits, positions, i, 0)
        used: Int = 0  # bits of the window that have been read
        start: Int = 0  # the bit of the row at which the window begins
        output: Int = 0
        most: Int = -1
        while output < outputs:
            if has_gaps:
                if used > 13:  # 44 bits are enough for a codeword and its residual
                    start += used
                    window = _window(bits, positions, i, start)
                    used = 0
                _, gap, size = _symbol(window >> np.uint64(used), gaps)
                output += np.int64(gap)
                used += size
            if output < outputs:
                if used > 13:
                    start += used
                    window = _window(bits, positions, i, start)
                    used = 0
                c, level, size = _symbol(window >> np.uint64(used), levels)
                used += size
                number = np.int64(level >> np.uint64(1))
                magnitude = centroids[number] if len(centroids) else np.float32(number) * step
                weights[i, output] = -magnitude if level & np.uint64(1) else magnitude
                most = max(most, c)
                output += 1
        found = np.float32(0)
        if has_importance:
            if used > 13:
                start += used
                window = _window(bits, positions, i, start)
                used = 0
            _, level, size = _symbol(window >> np.uint64(used), importances)
            found = np.float32(level) * importance_step
            used += size
        greatest[i] = most
        if most >= 0:
            if used > 25:
                start += used
                window = _window(bits, positions, i, start)
                used = 0
            check = (np.uint64(1) << np.uint64(checks[most])) - np.uint64(1)
            if (window >> np.uint64(used)) & check == np.uint64(0):
                known[i] = True
                importance[i] = found
        if not known[i]:
            for k in range(outputs):
                weights[i, k] = np.float32(0)


@kernel
def _peel(
    positions: NDArray[np.int64],
    sizes: NDArray[np.int64],
    counts: NDArray[np.uint32],
    joined: NDArray[np.int64],
    rounds: NDArray[np.uint32],
    listed: NDArray[np.int64],
    order: NDArray[np.int64],
    chosen: NDArray[np.int64],
) -> bool:
    """Removes equations round by round. Returns whether none is left.

    Args:
        positions, sizes: as in `solve_rows`.
        counts, joined: for each bit of the array, the number of its equations, and the exclusive or of their
            numbers; zeros before.
        rounds: for each bit that is listed, the number of the round, counted from 1; zeros before.
        listed: room for the bits that are in one equation only, in the order of rounds.
        order, chosen: room for the removed equations, in order, and for the bit that determines each.
    """
    for i in range(len(sizes)):
        for t in range(sizes[i]):
            equation = np.int64(i) << _BIT_FIELD | np.int64(t)
            for k in range(PLACES):
                place = positions[i, k] + t
                counts[place] += np.uint32(1)
                joined[place] ^= equation
    end: Int = 0
    for place in range(len(counts)):
        if counts[place] == 1:
            listed[end] = place
            rounds[place] = 1
            end += 1
    first: Int = 0
    removed: Int = 0
    number: Int = 1
    while first < end:
        stop = end
        for at in range(first, stop):
            place = listed[at]
            if counts[place] != 1:
                continue  # another bit of this round determined its equation
            equation = joined[place]
            i, t = equation >> _BIT_FIELD, equation & _BIT
            best = place
            for k in range(PLACES):
                other = positions[i, k] + t
                if rounds[other] == number and other < best:
                    best = other
            order[removed] = equation
            chosen[removed] = best
            removed += 1
            for k in range(PLACES):
                other = positions[i, k] + t
                counts[other] -= np.uint32(1)
                joined[other] ^= equation
                if counts[other] == 1 and rounds[other] == 0:
                    rounds[other] = np.uint32(number + 1)
                    listed[end] = other
                    end += 1
        first = stop
        number += 1
    return removed == len(order)


@kernel
def _fill(
    positions: NDArray[np.int64],
    starts: NDArray[np.int64],
    rows: Bytes,
    order: NDArray[np.int64],
    chosen: NDArray[np.int64],
    out: Bytes,
) -> None:
    """Sets the chosen bit of each equation, in the reverse order of their removal."""
    for n in range(len(order)):
        equation, place = order[len(order) - 1 - n], chosen[len(order) - 1 - n]
        i, t = equation >> _BIT_FIELD, equation & _BIT
        at = starts[i] + t
        bit = rows[at >> 3] >> np.uint8(at & 7)
        for k in range(PLACES):
            other = positions[i, k] + t
            bit ^= out[other >> 3] >> np.uint8(other & 7)
        out[place >> 3] ^= np.uint8((bit & np.uint8(1)) << np.uint8(place & 7))
