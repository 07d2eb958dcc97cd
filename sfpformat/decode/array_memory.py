"""Allocates memory for many arrays at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Arrays of SHARING bytes up to _OWN bytes share blocks of at most _BLOCK bytes. One large allocation is
# faster than many of medium size (measured: without blocks, loading takes up to a quarter longer), and numpy
# requests huge pages for arrays of at least 4 MiB. An array in use keeps its whole block alive; therefore a
# block has at most _SHARE times the bytes of any array in it. Smaller arrays have their own memory.
SHARING = 64 << 10
_OWN = 4 << 20
_BLOCK = 8 << 20
_SHARE = 8
_ALIGNMENT = 64


def arrays_of(
    kinds: Iterable[tuple[tuple[int, ...], np.dtype[Any], int]],
) -> Iterator[NDArray[Any]]:
    """Yields one uninitialised array, in C order, for each (shape, dtype, size in bytes).

    The addresses of arrays of at least 64 KiB are multiples of 64.
    """
    shared, used = np.empty(0, np.uint8), 0
    for shape, dtype, size in kinds:
        if size < SHARING:
            yield np.empty(shape, dtype)
            continue
        if size >= _OWN:
            yield _aligned_block(size).view(dtype).reshape(shape)
            continue
        if used + size > len(shared) or len(shared) > _SHARE * size:
            shared, used = _aligned_block(min(_SHARE * size, _BLOCK)), 0
        yield shared[used : used + size].view(dtype).reshape(shape)
        used += -(-size // _ALIGNMENT) * _ALIGNMENT


def _aligned_block(size: int) -> NDArray[np.uint8]:
    """Returns uninitialised memory whose address is a multiple of `_ALIGNMENT`."""
    block = np.empty(size + _ALIGNMENT, np.uint8)
    start = -block.ctypes.data % _ALIGNMENT
    return block[start : start + size]
