"""Solves the equations of a bit array: bit t of each row is the exclusive or of four bits of the array.

A bit of the array that is in one equation only can be chosen last, so that the equation holds. Such bits, and
their equations, are removed round by round until no equation is left, and then set in the reverse order. This
is the peeling of Botelho, Pagh and Ziviani (2007). The four positions of a row are in neighbouring segments,
so that few more bits than equations are enough: the binary fuse filters of Graf and Lemire (2022), with
equations for each bit of a row (Hreinsson, Kroyer and Pagh 2009).

In each round, an equation with several such bits is removed by the first of them. The result therefore does
not depend on the order of the work in a round, and engines give the same bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..bits import Bytes
from .hashing import PLACES

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def solve_rows(
    positions: NDArray[np.int64], sizes: NDArray[np.int64], rows: Bytes, free: Bytes
) -> Bytes | None:
    """Returns a bit array in which each row is at its positions; None if there is none, or it is not found.

    Args:
        positions: the four positions of each row, int64 [n, 4].
        sizes: the bits of each row, int64 [n].
        rows: the bits of all rows, one after another without padding.
        free: the bit array before: bits that no equation determines keep these values.
    """
    total = int(sizes.sum())
    owners = np.repeat(np.arange(len(sizes)), sizes)
    bits = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    places = positions[owners] + bits[:, None]  # [equations, 4]
    size = 8 * len(free)
    counts = np.bincount(places.reshape(-1), minlength=size).astype(np.int64)
    joined = np.zeros(size, np.int64)
    for k in range(PLACES):
        np.bitwise_xor.at(joined, places[:, k], np.arange(total))
    rounds: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    single = np.flatnonzero(counts == 1)
    removed = 0
    while len(single):
        equations, first = np.unique(joined[single], return_index=True)
        rounds.append((single[first], equations))
        removed += len(equations)
        touched = places[equations]
        np.subtract.at(counts, touched.reshape(-1), 1)
        for k in range(PLACES):
            np.bitwise_xor.at(joined, touched[:, k], equations)
        near = np.unique(touched)
        single = near[counts[near] == 1]
    if removed < total:
        return None
    values = np.unpackbits(free, bitorder="little")
    wanted = np.unpackbits(rows, count=total, bitorder="little")
    for chosen, equations in reversed(rounds):
        found = np.bitwise_xor.reduce(values[places[equations]], axis=1)
        values[chosen] ^= found ^ wanted[equations]
    return np.packbits(values, bitorder="little")


def random_bytes(size: int, seed: int) -> Bytes:
    """Returns bytes for the bits that no equation determines: SplitMix64 (Steele, Lea and Flood 2014).

    Args:
        size: the number of bytes, a multiple of 8.
        seed: the seed of the table.
    """
    with np.errstate(over="ignore"):
        z = (np.arange(1, size // 8 + 1, dtype=np.uint64) + (np.uint64(seed) << np.uint64(32))) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return z.astype("<u8").view(np.uint8)
