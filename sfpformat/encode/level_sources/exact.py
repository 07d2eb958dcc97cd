"""Source of bit patterns, for `exact`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ...coding.exact_encoding import Patterns
from ...coding.mask import Mask
from ...coding.planes import AnyLevels
from ...coding.quantisers import Exact, float_patterns
from ...dtypes import Dtype
from ...engines import Engine
from ...io.threads import Workers
from .base import CACHED_LEVELS, Flat, Source, all_levels


@dataclass(frozen=True)
class ExactSource(Source):
    """Bit patterns in the dtype ``coded``, which represents all values of ``flat``.

    Attributes:
        flat: the tensor.
        dtype: its dtype.
        coded: the dtype of the stored patterns: ``dtype`` or a narrower one.
        magnitudes: the patterns of all magnitudes, ascending, if there are few; else None.
        engine: does the work on bits.
        kept: the cached coded patterns of all positions, or None.
    """

    flat: Flat
    dtype: Dtype
    coded: Dtype
    magnitudes: Patterns | None
    engine: Engine
    kept: Patterns | None = None

    IS_LOSSLESS: ClassVar[bool] = True

    @property
    def positions(self) -> int:
        return len(self.flat)

    @property
    def quantiser(self) -> Exact:
        return Exact(self.coded)

    def survives(self, block: slice) -> Mask:
        return np.asarray(float_patterns(self.flat[block], self.dtype) != 0)

    def count_survivors(self) -> int:
        return int(np.count_nonzero(float_patterns(self.flat, self.dtype)))

    def levels(self, block: slice, mask: Mask | None) -> AnyLevels:
        kept = self.kept is not None
        patterns = self.kept[block] if self.kept is not None else float_patterns(self.flat[block], self.dtype)
        if mask is not None:
            patterns = self.engine.chosen(patterns, mask)
        if kept or self.coded == self.dtype:
            return patterns
        if self.magnitudes is None:
            return float_patterns(patterns.view(self.dtype.numpy).astype(self.coded.numpy), self.coded)
        values = np.repeat(self.magnitudes.view(self.dtype.numpy).astype(self.coded.numpy), 2)
        meanings = float_patterns(values, self.coded)
        meanings[1::2] |= self.coded.pattern.type(1 << (self.coded.bits - 1))
        return self.engine.translate(patterns, self.magnitudes, meanings)

    def with_cached_levels(self, workers: Workers) -> ExactSource:
        if self.coded == self.dtype or len(self.flat) > CACHED_LEVELS:
            return self
        return replace(self, kept=all_levels(self, workers))
