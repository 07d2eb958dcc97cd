"""Decodes a tensor's chunks (SPEC.md chapters 9 to 15), one run of segments at a time."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import Bytes
from ..coding.mask import Mask, decode_mask
from ..coding.planes import Levels
from ..coding.quantisers import F32, NumberQuantiser, require_centroids
from ..container.chunk import ChunkIndex, read_index, read_raw, read_vectors
from ..container.entry import MAX_POSITIONS, TensorEntry
from ..engines import Engine, Run
from ..errors import fault

Values = NDArray[np.generic]


@dataclass(frozen=True)
class Chunk:
    """A chunk whose checksum and segment index were checked.

    Attributes:
        k: number of the chunk in the tensor, from 0.
        data: the bytes of the chunk; for a raw tensor the bytes of the elements.
        index: the segment index; None for a raw tensor.
    """

    k: int
    data: Bytes
    index: ChunkIndex | None


class TensorDecoder:
    """Turns the chunks of one tensor into numbers.

    Methods that take ``first`` and ``stop`` decode a run of consecutive segments, numbered within the chunk.
    They raise a `FileFault` if the data break a clause; its offset is relative to the chunk.
    """

    def __init__(self, entry: TensorEntry, vector_chunk: Bytes | None, engine: Engine) -> None:
        """Reads and checks the vectors.

        Raises:
            InvalidFileError: by R-VEC-001, -002, R-QNT-005, -007, R-SCL-004, -006, R-IMP-004, -005.
        """
        self.entry = entry
        self.engine = engine
        self.vectors = {} if vector_chunk is None else read_vectors(vector_chunk, entry)
        if self.vectors:
            require_valid_vectors(entry, self.vectors)
        self._recipe: Any = None
        self._recipe_serves = 0
        self._preparing = threading.Lock()  # one per tensor, so that tensors are prepared in parallel

    def open_chunk(self, data: Bytes, k: int) -> Chunk:
        """Checks the structure of chunk ``k``. The caller has compared its checksum.

        Raises:
            InvalidFileError: the index or the padding breaks a clause.
        """
        if self.entry.coding == "raw":
            return Chunk(k, read_raw(data, self.entry, k), None)
        return Chunk(k, data, read_index(data, self.entry, k))

    # ------------------------------------------------------------------------------------ into an array
    #
    # ``data``: the bytes of chunk ``k``; the caller has compared its checksum.
    # ``out``: an array with one element for each position of the run.

    def expect(self, weights: int) -> None:
        """Sets the approximate number of weights that will be decoded; the engine prepares for this many."""
        with self._preparing:
            if weights > 8 * self._recipe_serves:
                self._recipe = self.engine.make_recipe(self.entry, self.vectors, weights)
                self._recipe_serves = weights

    def run(self, data: Bytes, k: int, first: int, stop: int, out: Values) -> Run[NDArray[Any]] | None:
        """Returns the run in the engine's form. None if the engine has no fast path for this tensor."""
        if self._recipe is None:
            return None
        start, total = self.entry.positions_of_chunk(k)
        return Run(self._recipe, data, total, start, first, stop, out)

    def weights_into(self, data: Bytes, k: int, first: int, stop: int, out: Values) -> None:
        """Writes the weights of all positions of a run. Decodes levels first; works for every tensor."""
        out[:] = self.values(self.open_chunk(data, k), first, stop)

    def mask_into(self, data: Bytes, k: int, first: int, stop: int, out: Mask) -> None:
        """Writes the mask bits of a run. The tensor must have a mask."""
        out[:] = self.mask(self.open_chunk(data, k), first, stop)

    def importance_into(self, data: Bytes, k: int, first: int, stop: int, out: F32) -> None:
        """Writes the importance of all positions of a run."""
        out[:] = self.importance(self.open_chunk(data, k), first, stop)

    # ------------------------------------------------------------------------------------- streams

    def levels(self, chunk: Chunk, stream: str, first: int, stop: int) -> Levels:
        """Decodes the levels of one stream in a run."""
        assert chunk.index is not None
        span = chunk.index.span(stream, first, stop)
        return self.engine.decode_levels(chunk.data, span, self.entry.streams()[stream])

    def mask(self, chunk: Chunk, first: int, stop: int) -> Mask | None:
        """Decodes the mask bits of a run. Returns None if the tensor has no mask."""
        if self.entry.mask is None:
            return None
        assert chunk.index is not None
        return decode_mask(
            self.entry.mask.kind,
            self.entry.mask.polarity,
            self.levels(chunk, "mask", first, stop),
            chunk.index.counts["mask"][first:stop],
            chunk.index.positions[first:stop],
            chunk.index.survivors[first:stop],
        )

    def values(self, chunk: Chunk, first: int, stop: int) -> Values:
        """Decodes the weights of all positions of a run, in the tensor's dtype."""
        dtype = self.entry.dtype
        if chunk.index is None:
            size = self.entry.segment * dtype.itemsize
            return chunk.data[first * size : stop * size].view(dtype.numpy)
        mask = self.mask(chunk, first, stop)
        survivors = self._survivor_values(chunk, first, stop, mask)
        if mask is None:
            return survivors
        out = np.zeros(len(mask), dtype.numpy)
        out[mask] = survivors
        return out

    def survivors(self, chunk: Chunk, first: int, stop: int) -> tuple[NDArray[np.int64], Values]:
        """Decodes the survivors of a run: their positions in the flattened tensor, and their weights."""
        start = self._first_position(chunk, first)
        if chunk.index is None:
            values = self.values(chunk, first, stop)
            return np.arange(start, start + len(values)), values
        mask = self.mask(chunk, first, stop)
        return (
            self._survivor_positions(chunk, first, stop, mask),
            self._survivor_values(chunk, first, stop, mask),
        )

    def importance(self, chunk: Chunk, first: int, stop: int) -> F32:
        """Decodes the importance of all positions of a run: float32, 0 at pruned positions that have none."""
        importance = self.entry.importance
        assert importance is not None
        assert chunk.index is not None
        if importance.over != "survivors" or self.entry.mask is None:
            return self._importances(chunk, first, stop, None)
        mask = self.mask(chunk, first, stop)
        assert mask is not None
        out = np.zeros(len(mask), np.float32)
        out[mask] = self._importances(chunk, first, stop, mask)
        return out

    # -------------------------------------------------------------------------------------- pieces

    def _first_position(self, chunk: Chunk, first: int) -> int:
        return (chunk.k * self.entry.chunk + first) * self.entry.segment

    def _survivor_positions(
        self, chunk: Chunk, first: int, stop: int, mask: Mask | None
    ) -> NDArray[np.int64]:
        assert chunk.index is not None
        start = self._first_position(chunk, first)
        if mask is None:
            return np.arange(start, start + int(chunk.index.positions[first:stop].sum()))
        return np.flatnonzero(mask) + start

    def _survivor_values(self, chunk: Chunk, first: int, stop: int, mask: Mask | None) -> Values:
        fingerprints, importance = self.entry.fingerprints, self.entry.importance
        assert fingerprints is not None
        multiplier = None
        if importance is not None and importance.role == "multiplier":
            multiplier = self._importances(chunk, first, stop, mask)
            if mask is not None and importance.over == "all":
                multiplier = multiplier[mask]
        return fingerprints.quantiser.fingerprint_values(
            self.levels(chunk, "fingerprints", first, stop),
            self.entry.dtype,
            self.vectors.get("fingerprint centroids"),
            self._scale_of_survivors(chunk, first, stop, mask),
            multiplier,
        )

    def _scale_of_survivors(self, chunk: Chunk, first: int, stop: int, mask: Mask | None) -> F32 | None:
        """Returns the scale factor of each survivor of a run (SPEC.md chapter 12). None without a scale."""
        scale = self.entry.scale
        if scale is None:
            return None
        positions = self._survivor_positions(chunk, first, stop, mask)
        return self.vectors["scale"][scale_index(self.entry, positions)]

    def _importances(self, chunk: Chunk, first: int, stop: int, mask: Mask | None) -> F32:
        """Decodes the stored importances of a run: one per level of the stream; for factors, per survivor."""
        importance = self.entry.importance
        assert importance is not None
        if importance.over == "factors":
            positions = self._survivor_positions(chunk, first, stop, mask)
            rows, columns = np.divmod(positions, self.entry.columns)
            row, column = self.vectors["importance rows"], self.vectors["importance columns"]
            return row[rows] * column[columns]
        assert importance.quantiser is not None
        levels = self.levels(chunk, "importance", first, stop)
        return importance.quantiser.importance_values(levels, self.vectors.get("importance centroids"))


def scale_index(entry: TensorEntry, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the index of the scale factor of each position."""
    assert entry.scale is not None
    if entry.scale.per == "tensor":
        return np.zeros(len(positions), np.int64)
    if entry.scale.per == "row":
        return positions // entry.columns
    if entry.scale.per == "column":
        return positions % entry.columns
    # The size of a group may exceed int64. Positions are below 2^48, so the minimum gives the same result.
    return positions // min(entry.scale.size, MAX_POSITIONS)


def require_valid_vectors(entry: TensorEntry, vectors: dict[str, F32]) -> None:
    """Checks the values of the vectors.

    Raises:
        InvalidFileError: by R-QNT-005, R-QNT-006, R-QNT-007, R-SCL-004, R-SCL-006, R-IMP-004 or R-IMP-005.
    """
    for name in ("fingerprint centroids", "importance centroids"):
        if name in vectors:
            require_centroids(vectors[name])
    scale = vectors.get("scale")
    with np.errstate(over="ignore", invalid="ignore"):
        if scale is not None and len(scale):
            if not np.isfinite(scale).all():
                raise fault("R-SCL-004", "a scale factor is not finite")
            assert entry.fingerprints is not None
            quantiser, top = entry.fingerprints.quantiser, entry.fingerprints.table.top
            assert isinstance(quantiser, NumberQuantiser)  # R-DIR-007
            centroids = vectors.get("fingerprint centroids")
            greatest = quantiser.greatest_magnitude((top - 1) // 2, centroids)
            if not np.isfinite(greatest * np.abs(scale).max()):
                raise fault("R-SCL-006", "the greatest weight times the greatest scale factor is not finite")
        if "importance rows" in vectors and len(vectors["importance rows"]):
            rows, columns = vectors["importance rows"], vectors["importance columns"]
            if not (np.isfinite(rows).all() and np.isfinite(columns).all()):
                raise fault("R-IMP-004", "an importance factor is not finite")
            if not np.isfinite(np.abs(rows).max() * np.abs(columns).max()):
                raise fault("R-IMP-005", "the product of two importance factors is not finite")
