"""Memory for many arrays at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Arrays from SHARING bytes to under _OWN come in blocks, of at most _BLOCK bytes: systems hand out a large
# piece faster than many of middle size (measured: loading takes up to a quarter longer without), and numpy
# asks for huge pages from 4 MiB on. An array that is kept keeps its block alive, so a block has at most
# _SHARE times the bytes of any array in it; smaller arrays have memory of their own.
SHARING = 64 << 10
_OWN = 4 << 20
_BLOCK = 8 << 20
_SHARE = 8
_ALIGNMENT = 64


def arrays_of(
    kinds: Iterable[tuple[tuple[int, ...], np.dtype[Any], int]],
) -> Iterator[NDArray[Any]]:
    """An array of each of some shapes, dtypes and sizes in bytes; C order, not initialised.

    Those of 64 KiB and more are aligned to 64 bytes.
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
    block = np.empty(size + _ALIGNMENT, np.uint8)
    start = -block.ctypes.data % _ALIGNMENT
    return block[start : start + size]
