"""Writes bits to a plane, lowest bit first.

Theory of operation: the state of a bit writer is a 64-bit word, the number of its used low bits, and the byte
offset of its next store. A flush stores all 8 bytes and advances by the number of full bytes. At most 7 bits
then remain, so 57 can be added before the next flush. Planes need 8 spare bytes after their last byte.
"""

from __future__ import annotations

import numpy as np

from ...coding.bits import Bytes
from .compiling import inlined_kernel
from .unaligned import store64


@inlined_kernel
def flush(
    plane: Bytes, to: np.int64, word: np.uint64, taken: np.uint64
) -> tuple[np.int64, np.uint64, np.uint64]:
    """Stores the word at byte ``to``. Returns the next byte offset, the remaining bits, and their number."""
    store64(plane, to, word)
    seven = np.uint64(7)
    return to + np.int64(taken >> np.uint64(3)), word >> (taken & ~seven), taken & seven


@inlined_kernel
def close(plane: Bytes, to: np.int64, word: np.uint64, taken: np.uint64) -> np.int64:
    """Stores the bits that remain after a flush. Returns the number of used bytes of the plane."""
    if taken:
        plane[to] = np.uint8(word)
        to += 1
    return to
