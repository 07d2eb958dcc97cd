"""Writing bits to a plane, its lowest bit first.

Theory of operation: a bit writer is a word, how many of its lowest bits are taken, and the byte that it goes
to. It is stored whole, 8 bytes, and moved on by the bytes that are full; so at most 7 bits are left in it,
and 57 may be added between two stores. Planes have room for 8 bytes after their last one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .compiling import inlined_kernel
from .memory import store64


@inlined_kernel
def flush(plane: Any, to: int, word: int, taken: int) -> tuple[int, int, int]:
    """Stores the word at byte ``to``; returns the next byte, what is left of the word, and its bits."""
    store64(plane, to, word)
    seven = np.uint64(7)
    return to + np.int64(taken >> np.uint64(3)), word >> (taken & ~seven), taken & seven


@inlined_kernel
def close(plane: Any, to: int, word: int, taken: int) -> int:
    """Stores what is left of the word after a flush; returns how many bytes of the plane are used."""
    if taken:
        plane[to] = np.uint8(word)
        to += 1
    return to
