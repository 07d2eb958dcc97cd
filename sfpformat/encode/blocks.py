"""Computes the masks and levels of a tensor's chunks, and caches them if memory allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..coding.mask import Mask
from ..coding.planes import AnyLevels, Counts
from ..engines import Engine
from .level_sources import Source, Survives

# The greatest size of the cached masks and levels of a tensor, in bytes.
_KEPT_BYTES = 1 << 26


@dataclass(frozen=True)
class Blocks:
    """Divides the positions of a tensor into chunks of whole segments.

    Attributes:
        positions: number of positions of the tensor.
        segment: positions per segment.
        chunk: segments per chunk.
    """

    positions: int
    segment: int
    chunk: int

    def __iter__(self) -> Iterator[tuple[slice, Counts]]:
        """Yields each chunk: its positions, and their number in each of its segments, int64 [segments]."""
        size = self.segment * self.chunk
        whole = np.full(self.chunk if self.positions >= size else 0, self.segment, np.int64)
        for start in range(0, self.positions, size):
            stop = min(start + size, self.positions)
            yield (
                slice(start, stop),
                whole if stop - start == size else segment_counts(stop - start, self.segment),
            )


def segment_counts(positions: int, segment: int) -> Counts:
    """Returns the number of positions of each segment of ``positions`` positions, int64 [segments]."""
    counts = np.full(-(-positions // segment), segment, np.int64)
    if len(counts):
        counts[-1] -= len(counts) * segment - positions
    return counts


class Survivors(NamedTuple):
    """The survivors of a chunk.

    Attributes:
        counts: number of survivors in each segment, int64 [segments].
        levels: their fingerprint levels, shape [survivors].
    """

    counts: Counts
    levels: AnyLevels


class CodedBlocks:
    """The masks and levels of the chunks of a tensor with coding fingerprint. Thread-safe."""

    def __init__(
        self,
        source: Source,
        survives: Survives | None,
        engine: Engine,
    ) -> None:
        """Stores the arguments. Computes nothing yet.

        Args:
            source: the source of the levels.
            survives: returns the mask of a block of positions, bool; None if no position is pruned.
            engine: the engine that counts the survivors.
        """
        self.source = source
        self._survives, self._engine = survives, engine
        self._masks: dict[int, Mask] = {}
        self._survivors: dict[int, Survivors] = {}
        self._mask_levels: dict[tuple[str, int, int], tuple[AnyLevels, Counts]] = {}
        self._room = _KEPT_BYTES

    def in_other_chunks(self) -> CodedBlocks:
        """Returns a copy with an empty cache, for chunks of another size."""
        return CodedBlocks(self.source, self._survives, self._engine)

    def mask(self, block: slice) -> Mask | None:
        """Returns the mask of a chunk, bool, given its positions. Returns None if no position is pruned."""
        if self._survives is None:
            return None
        mask = self._masks.get(block.start)
        if mask is None:
            mask = self._survives(block)
            if self._has_room(mask):
                self._masks[block.start] = mask
        return mask

    def mask_levels(
        self, kind: str, polarity: int, block: slice, positions: Counts
    ) -> tuple[AnyLevels, Counts]:
        """Returns the levels of the mask of a chunk, and their number in each segment. There must be a mask.

        Args:
            kind, polarity: those of `coding.mask.encode_mask`.
            block: the positions of the chunk.
            positions: their number in each segment.
        """
        key = kind, polarity, block.start
        found = self._mask_levels.get(key)
        if found is None:
            mask = self.mask(block)
            assert mask is not None
            found = self._engine.encode_mask(kind, polarity, mask, positions)
            if self._has_room(found[0]):
                self._mask_levels[key] = found
        return found

    def survivors(self, block: slice, positions: Counts) -> Survivors:
        """Returns the survivors of a chunk, given its positions and their number in each segment."""
        found = self._survivors.get(block.start)
        if found is None:
            mask = self.mask(block)
            counts = positions if mask is None else self._engine.survivors(mask, positions)
            found = Survivors(counts, self.source.levels(block, mask))
            if self._has_room(found.levels):
                self._survivors[block.start] = found
        return found

    def _has_room(self, array: NDArray[np.generic]) -> bool:
        """Returns whether the cache has room for an array, and reserves its bytes."""
        self._room -= array.nbytes
        return self._room >= 0
