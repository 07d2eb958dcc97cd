"""Source of a lossless table: every magnitude of the tensor is a centroid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ...coding.exact_encoding import Patterns
from ...coding.mask import Mask
from ...coding.planes import AnyLevels
from ...coding.quantisers import F32, Table, float_patterns
from ...dtypes import Dtype
from ...engines import Engine
from ...io.threads import Workers
from .base import CACHED_LEVELS, Flat, Source, Survives, all_levels, blocks_of

# The greatest number of different magnitudes for which a lossless tensor may be a table of them.
MAX_DISTINCT = 1024
# A table of all values is tried if the tensor has more than this many bits per value.
_CENTROID_BITS = 64


@dataclass(frozen=True)
class ValueSource(Source):
    """Numbers of a lossless table: every magnitude of the tensor is a centroid. All weights but +0 survive.

    Attributes:
        flat: the tensor.
        dtype: its dtype.
        magnitudes: the patterns of its magnitudes, ascending.
        centroids: the magnitudes in float32.
        engine: does the work on bits.
        kept: the cached levels of all positions, or None.
        kept_zero: 1 if the cached levels count a magnitude 0 that was removed later, else 0.
    """

    flat: Flat
    dtype: Dtype
    magnitudes: Patterns
    centroids: F32
    engine: Engine
    kept: AnyLevels | None = None
    kept_zero: int = 0

    IS_LOSSLESS: ClassVar[bool] = True

    @property
    def positions(self) -> int:
        return len(self.flat)

    @property
    def quantiser(self) -> Table:
        return Table(len(self.centroids))

    def vectors(self) -> Mapping[str, NDArray[np.generic]]:
        return {"fingerprint centroids": self.centroids}

    @property
    def has_zero_first(self) -> bool:
        return not self.magnitudes[0]

    def survives(self, block: slice) -> Mask:
        return np.asarray(float_patterns(self.flat[block], self.dtype) != 0)

    def count_survivors(self) -> int:
        return int(np.count_nonzero(float_patterns(self.flat, self.dtype)))

    def levels(self, block: slice, mask: Mask | None) -> AnyLevels:
        if self.kept is not None:
            levels = self.kept[block] if mask is None else self.engine.chosen(self.kept[block], mask)
            return levels - levels.dtype.type(2 * self.kept_zero) if self.kept_zero else levels
        patterns = float_patterns(self.flat[block], self.dtype)
        if mask is not None:
            patterns = self.engine.chosen(patterns, mask)
        count = 2 * len(self.magnitudes)
        meanings = np.arange(count, dtype=np.min_scalar_type(max(count - 1, 0)))
        return self.engine.translate(patterns, self.magnitudes, meanings)

    def with_cached_levels(self, workers: Workers) -> ValueSource:
        if len(self.flat) > CACHED_LEVELS:
            return self
        return replace(self, kept=all_levels(self, workers))

    def of_survivors(self, survives: Survives | None, given: Mask | None) -> ValueSource:
        """Keeps at least one centroid. Without a mask, every magnitude of the tensor is used."""
        if survives is None:
            return self
        if given is None:
            gone = int(self._has_positive_zero_alone() and len(self.magnitudes) > 1)
            return replace(
                self, magnitudes=self.magnitudes[gone:], centroids=self.centroids[gone:], kept_zero=gone
            )
        occur = np.zeros(len(self.magnitudes), np.bool_)
        for block in blocks_of(len(self.flat)):
            levels = self.levels(block, given[block])
            occur |= np.bincount(levels >> levels.dtype.type(1), minlength=len(occur)) > 0
        occur[0] |= not occur.any()
        return replace(self, magnitudes=self.magnitudes[occur], centroids=self.centroids[occur], kept=None)

    def _has_positive_zero_alone(self) -> bool:
        """Whether +0 occurs and -0 does not."""
        if self.magnitudes[0]:
            return False
        negative = self.dtype.pattern.type(1 << (self.dtype.bits - 1))
        return not (float_patterns(self.flat, self.dtype) == negative).any()


def may_be_values(magnitudes: Patterns, flat: Flat) -> bool:
    """Returns whether a tensor with these magnitudes, of which there is at least one, may be a table."""
    return len(magnitudes) * _CENTROID_BITS < flat.nbytes * 8


def value_source(flat: Flat, dtype: Dtype, magnitudes: Patterns | None, engine: Engine) -> ValueSource | None:
    """Returns the source if the magnitudes are few, finite and exact in float32. Else None.

    Args:
        flat: the tensor, shape [n].
        dtype: its dtype.
        magnitudes: the patterns of all its magnitudes, ascending; None if there are more than `MAX_DISTINCT`.
        engine: does the work on bits.
    """
    if magnitudes is None or not len(magnitudes) or not may_be_values(magnitudes, flat):
        return None
    exact = magnitudes.view(dtype.numpy)
    with np.errstate(over="ignore", invalid="ignore"):
        values = exact.astype(np.float32)
    if not np.isfinite(values).all() or not np.array_equal(values.astype(dtype.numpy), exact):
        return None
    return ValueSource(flat, dtype, magnitudes, values, engine)
