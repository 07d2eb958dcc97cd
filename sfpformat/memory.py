"""Memory for many arrays at once: few large pieces, which systems hand out faster than many small ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# Numpy asks for huge pages from 4 MiB on. Smaller arrays share blocks of this size, so that whoever keeps one
# of them alive keeps no more than this alive.
_BLOCK = 8 << 20
_OWN = 4 << 20
_ALIGNMENT = 64


def blocks_of(sizes: list[int]) -> Iterator[NDArray[np.uint8]]:
    """Memory for each of some sizes, in bytes: uint8, flat, aligned to 64 bytes, not initialised."""
    shared, used = np.empty(0, np.uint8), 0
    left = sum(_aligned(size) for size in sizes if size < _OWN)
    for size in sizes:
        if size >= _OWN:
            yield _aligned_block(size)
            continue
        if used + size > len(shared):
            shared, used = _aligned_block(max(min(left, _BLOCK), size)), 0
        yield shared[used : used + size]
        used += _aligned(size)
        left -= _aligned(size)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _aligned_block(size: int) -> NDArray[np.uint8]:
    block = np.empty(size + _ALIGNMENT, np.uint8)
    start = -block.ctypes.data % _ALIGNMENT
    return block[start : start + size]
