"""The hash of keys, and the positions of their rows in the bit array (SPEC.md 17.2).

MurmurHash3_x64_128 by Austin Appleby, who placed it in the public domain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..bits import Bytes

C1, C2 = np.uint64(0x87C37B91114253D5), np.uint64(0x4CF5AD432745937F)
N1, N2 = np.uint64(0x52DCE729), np.uint64(0x38495AB5)
M1, M2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
PLACES = 4  # positions of a row in the bit array
BLOCK = 16  # bytes

Words = NDArray[np.uint64]


@dataclass(frozen=True)
class Keys:
    """Byte strings.

    Attributes:
        data: all of them, one after another.
        offsets: the start of each in ``data``, and the end of the last, int64 [n + 1], ascending.
    """

    data: Bytes
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def hash_keys(keys: Keys, seed: int) -> NDArray[np.uint32]:
    """Returns the four words of the hash of each key: uint32 [n, 4]."""
    sizes = np.diff(keys.offsets)
    # Bytes after the last key stand for the missing bytes of an incomplete block.
    data = np.concatenate((keys.data, np.zeros(BLOCK, np.uint8)))
    a = np.full(len(sizes), seed, np.uint64)
    b = a.copy()
    with np.errstate(over="ignore"):
        for at in range(0, int(sizes.max(initial=0)), BLOCK):
            left = sizes - at
            some = np.flatnonzero(left > 0)
            x, y = _block(data, keys.offsets[some] + at, np.minimum(left[some], BLOCK))
            whole = left[some] >= BLOCK
            mixed = a[some] ^ (_rotated(x * C1, 31) * C2)
            a[some] = np.where(whole, (_rotated(mixed, 27) + b[some]) * np.uint64(5) + N1, mixed)
            mixed = b[some] ^ (_rotated(y * C2, 33) * C1)
            b[some] = np.where(whole, (_rotated(mixed, 31) + a[some]) * np.uint64(5) + N2, mixed)
        a ^= sizes.astype(np.uint64)
        b ^= sizes.astype(np.uint64)
        a += b
        b += a
        a, b = _mixed(a), _mixed(b)
        a += b
        b += a
    both = np.stack((a, b), axis=1).astype("<u8")
    return both.view("<u4").astype(np.uint32, copy=False)


def _block(data: Bytes, starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> tuple[Words, Words]:
    """Returns the two words of up to 16 bytes from each start. Missing bytes are zeros."""
    columns = np.arange(BLOCK)
    found = data[starts[:, None] + columns]
    found[columns >= sizes[:, None]] = 0
    words = found.view("<u8").astype(np.uint64, copy=False)
    return words[:, 0], words[:, 1]


def _rotated(x: Words, bits: int) -> Words:
    return np.asarray((x << np.uint64(bits)) | (x >> np.uint64(64 - bits)))


def _mixed(x: Words) -> Words:
    half = np.uint64(33)
    x = (x ^ (x >> half)) * M1
    x = (x ^ (x >> half)) * M2
    return np.asarray(x ^ (x >> half))


def positions_of(words: NDArray[np.uint32], starts: int, segment: int) -> NDArray[np.int64]:
    """Returns the four positions of each key's row, in bits: int64 [n, 4].

    Args:
        words: from `hash_keys`.
        starts: the number of possible first positions.
        segment: Z, a power of two.
    """
    out = np.empty(words.shape, np.int64)
    out[:, 0] = (words[:, 0].astype(np.uint64) * np.uint64(starts)) >> np.uint64(32)
    for k in range(1, PLACES):
        out[:, k] = (out[:, 0] + k * segment) ^ (words[:, k] & np.uint32(segment - 1))
    return out
