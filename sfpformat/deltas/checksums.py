"""CRC-32 of tensors, computed in parts by several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..io.checksum import combined, crc32
from ..io.threads import for_each

T = TypeVar("T")

# Bytes per part. Two parts fit in the cache of a core.
PART = 1 << 20


def joined(parts: Iterable[int], length: int) -> int:
    """Returns the CRC-32 of ``length`` bytes, given that of each part of `PART` bytes."""
    total = 0
    for start, one in zip(range(0, length, PART), parts, strict=True):
        total = combined(total, one, min(PART, length - start))
    return total


def of_parts(work: Callable[[slice], T], length: int, threads: int) -> list[T]:
    """Calls ``work`` for each `PART` of ``length`` bytes, in several threads. Returns the results."""
    found: dict[int, T] = {}

    def part(start: int) -> None:
        found[start] = work(slice(start, start + PART))

    starts = range(0, length, PART)
    for_each(part, starts, max(min(threads, len(starts)), 1))
    return [found[start] for start in starts]


def checksum_of(array: NDArray[np.generic], threads: int = 1) -> int:
    """Returns the CRC-32 of the elements of a contiguous array."""
    data = array.reshape(-1).view(np.uint8)
    if threads <= 1 or len(data) <= PART:
        return crc32(data.data)
    return joined(of_parts(lambda part: crc32(data[part].data), len(data), threads), len(data))
