"""Working memory for a run of segments, inside memory that the calling thread keeps between calls."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.codetable import MAX_CLASSES, MAX_CODE_BITS, MAX_CODES
from ...coding.planes import Levels
from ...coding.quantisers import F32
from .compiling import Int, kernel
from .index import ROWS
from .lookup import MAX_BITS
from .prefix import CHAINS, SLACK, STATE
from .unaligned import require_inside
from .vectors import BY_SLOT
from .windows import PLACES_SLACK

_ALIGNMENT = 64
_CLASS_SLOTS = MAX_CLASSES[1] + MAX_CODE_BITS + 1


class Working(NamedTuple):
    """Working memory for ``n`` segments of ``segment`` positions, of a chunk of ``m`` segments.

    Attributes:
        positions: int64 [m], number of positions of each segment.
        segment_index: int64 [ROWS, m], filled by `index.read_index`.
        order, begins: int64 [n], [MAX_CODES + 1], filled by `prefix.order_by_code`.
        places: int64 [3, n], for each stream the first slot index of each segment.
        slots: uint8, slots of the current stream; ``importance_slots``: slots of the importance.
        state, taken, chain_places: int64 [STATE, CHAINS], [CHAINS], [CHAINS], used by `slots`.
        escaped: int64 [segment + PLACES_SLACK], for `windows.decode_window`.
        bits: uint8 [n * segment / 8], mask bits.
        levels, inside, numbers: uint64, int64, float32 [segment]: levels, positions in the segment, and
            values of the current segment.
        residuals: uint8 [segment + 8], unpacked residuals.
        survivors: uint8 [8 * segment], bit patterns of the current segment's survivors.
        by_slot: uint32 [BY_SLOT], filled by `values.signed_patterns`.
        class_slots: int64 [maximum classes + 13], for `lookup.prepare`.
        single, ends: uint32, uint64 [2^MAX_BITS], for `lookup.code_of`.
    """

    positions: NDArray[np.int64]
    segment_index: NDArray[np.int64]
    order: NDArray[np.int64]
    begins: NDArray[np.int64]
    places: NDArray[np.int64]
    slots: Bytes
    importance_slots: Bytes
    state: NDArray[np.int64]
    taken: NDArray[np.int64]
    chain_places: NDArray[np.int64]
    escaped: NDArray[np.int64]
    bits: Bytes
    levels: Levels
    inside: NDArray[np.int64]
    numbers: F32
    residuals: Bytes
    survivors: Bytes
    by_slot: NDArray[np.uint32]
    class_slots: NDArray[np.int64]
    single: NDArray[np.uint32]
    ends: Levels


@kernel
def _aligned(size: Int) -> Int:
    return (size + _ALIGNMENT - 1) & -_ALIGNMENT


@kernel
def slots_room(n: Int, segment: Int) -> Int:
    """Returns the bytes for the slots of ``n`` + 1 segments of at most ``segment`` levels each."""
    return (n + 1) * (segment + 1 + SLACK)


@kernel
def _sizes(m: Int, n: Int, segment: Int) -> tuple[Int, ...]:
    """Returns the size in bytes of each field of `Working`, in order."""
    slots = max(slots_room(n, segment), slots_room(CHAINS, segment))
    return (
        8 * m,
        8 * ROWS * m,
        8 * n,
        8 * (MAX_CODES + 1),
        8 * 3 * n,
        slots,
        slots,
        8 * STATE * CHAINS,
        8 * CHAINS,
        8 * CHAINS,
        8 * (segment + PLACES_SLACK),
        n * (segment >> 3),
        8 * segment,
        8 * segment,
        4 * segment,
        segment + 8,
        8 * segment,
        4 * BY_SLOT,
        8 * _CLASS_SLOTS,
        4 << MAX_BITS,
        8 << MAX_BITS,
    )


@kernel
def working_bytes(m: Int, n: Int, segment: Int) -> Int:
    """Returns the size in bytes that `carve` needs."""
    total = 0
    for size in _sizes(m, n, segment):
        total += _aligned(size)
    return total


@kernel
def _carve(memory: Bytes, used: Int, size: Int) -> tuple[Bytes, Int]:
    require_inside(memory, used, size)
    return memory[used : used + size], used + _aligned(size)


@kernel
def carve(memory: Bytes, m: Int, n: Int, segment: Int) -> Working:
    """Divides memory into the fields of `Working`, for ``n`` segments of a chunk of ``m`` segments.

    Args:
        memory: uint8 [`working_bytes`] or more; its address is a multiple of 8.
    """
    sizes = _sizes(m, n, segment)
    positions, at = _carve(memory, 0, sizes[0])
    index, at = _carve(memory, at, sizes[1])
    order, at = _carve(memory, at, sizes[2])
    begins, at = _carve(memory, at, sizes[3])
    places, at = _carve(memory, at, sizes[4])
    slots, at = _carve(memory, at, sizes[5])
    importance_slots, at = _carve(memory, at, sizes[6])
    state, at = _carve(memory, at, sizes[7])
    taken, at = _carve(memory, at, sizes[8])
    chain_places, at = _carve(memory, at, sizes[9])
    escaped, at = _carve(memory, at, sizes[10])
    bits, at = _carve(memory, at, sizes[11])
    levels, at = _carve(memory, at, sizes[12])
    inside, at = _carve(memory, at, sizes[13])
    numbers, at = _carve(memory, at, sizes[14])
    residuals, at = _carve(memory, at, sizes[15])
    survivors, at = _carve(memory, at, sizes[16])
    by_slot, at = _carve(memory, at, sizes[17])
    class_slots, at = _carve(memory, at, sizes[18])
    single, at = _carve(memory, at, sizes[19])
    ends, at = _carve(memory, at, sizes[20])
    return Working(
        positions.view(np.int64),
        index.view(np.int64).reshape(ROWS, m),
        order.view(np.int64),
        begins.view(np.int64),
        places.view(np.int64).reshape(3, n),
        slots,
        importance_slots,
        state.view(np.int64).reshape(STATE, CHAINS),
        taken.view(np.int64),
        chain_places.view(np.int64),
        escaped.view(np.int64),
        bits,
        levels.view(np.uint64),
        inside.view(np.int64),
        numbers.view(np.float32),
        residuals,
        survivors,
        by_slot.view(np.uint32),
        class_slots.view(np.int64),
        single.view(np.uint32),
        ends.view(np.uint64),
    )
