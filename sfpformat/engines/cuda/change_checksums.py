"""CRC-32 of elements in the memory of a device, from the sums that kernels compute for each tile."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from ...io.checksum import POLYNOMIAL, power, times
from . import layout

Words = NDArray[np.uint32]

# Elements of a part whose sums the host joins at once.
MOST_ELEMENTS = 1 << 24


@cache
def sum_tables(item: int) -> Words:
    """Returns the tables of the kernels for elements of ``item`` bytes: a `SumTables`, as words."""
    ahead = power(8 * item * layout.WARP)
    bits = [times(ahead, 1 << bit) for bit in range(32)]
    factor = np.zeros((4, 256), np.uint32)
    for byte in range(4):
        for bit in range(8):
            factor[byte] ^= np.where(np.arange(256) >> bit & 1, bits[8 * byte + bit], 0).astype(np.uint32)
    weights = np.zeros((2, layout.WARP), np.uint32)
    for word in range(-(-item // 4)):
        for lane in range(layout.WARP):
            weights[word, lane] = power(8 * item * (layout.WARP - lane) - 32 * word)
    return np.concatenate([factor.reshape(-1), weights.reshape(-1)])


@cache
def _powers_of_tiles(item: int) -> Words:
    """Returns the factor of a sum with 0, 1, 2, … whole tiles after it."""
    ahead, one = power(8 * item * layout.TILE_ELEMENTS), power(0)
    out = np.empty(MOST_ELEMENTS // layout.TILE_ELEMENTS, np.uint32)
    for i in range(len(out)):
        out[i] = one
        one = times(ahead, one)
    return out


def _products(a: Words, b: Words) -> Words:
    """Returns products modulo the polynomial of the CRC, like `io.checksum.times`."""
    product, b = np.zeros_like(a), b.copy()
    for bit in reversed(range(32)):
        product ^= np.where(a >> np.uint32(bit) & np.uint32(1), b, np.uint32(0))
        b = (b >> np.uint32(1)) ^ np.where(b & np.uint32(1), np.uint32(POLYNOMIAL), np.uint32(0))
    return product


def joined_sums(sums: Words, elements: NDArray[np.int64], item: int) -> list[int]:
    """Returns the sum of each part, given the sums of its tiles.

    Args:
        sums: of all tiles of the parts, in order.
        elements: number of elements of each part, at least 1 and at most `MOST_ELEMENTS`.
        item: bytes per element.
    """
    if not len(elements):
        return []
    tiles = -(-elements // layout.TILE_ELEMENTS)
    stops = np.cumsum(tiles)
    after = np.repeat(stops, tiles) - np.arange(len(sums)) - 2  # whole tiles before the last
    weighted = _products(sums, _powers_of_tiles(item)[np.maximum(after, 0)])
    weighted[stops - 1] = 0
    whole = np.bitwise_xor.reduceat(weighted, stops - tiles)
    rest = elements - (tiles - 1) * layout.TILE_ELEMENTS
    factors = np.array([power(8 * item * count) for count in rest.tolist()], np.uint32)
    joined: list[int] = (_products(whole, factors) ^ sums[stops - 1]).tolist()
    return joined


@cache
def crc_of_zeros(size: int) -> int:
    ones = 0xFFFFFFFF
    return times(power(8 * size), ones) ^ ones
