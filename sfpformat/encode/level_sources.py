"""Sources of levels: convert a block of a tensor's positions to levels, one class per quantiser."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..coding.exact_encoding import Patterns
from ..coding.mask import Mask
from ..coding.planes import AnyLevels
from ..coding.quantisers import (
    F32,
    MAX_CENTROIDS,
    Exact,
    Quantiser,
    Table,
    Uniform,
    float_patterns,
    scaled_down,
)
from ..container.entry import TensorEntry
from ..decode.tensor import scale_index
from ..dtypes import Dtype
from ..engines import Engine
from ..errors import OptionError
from ..io.threads import Workers
from .finite import Reconstruction
from .importances import Multiplier
from .quantise import TableNumbers, UniformNumbers, WeighedNumbers, exact_sum

Flat = NDArray[np.generic]

# The greatest number of different magnitudes for which a lossless tensor may be a table of them.
MAX_DISTINCT = 1024
_BLOCK = 1 << 18  # positions processed at a time
# Levels of tensors of at most this many positions are cached: they are used three times.
_KEPT_LEVELS = 1 << 25


class FingerprintSource(Protocol):
    """The fingerprint levels of a tensor."""

    @property
    def quantiser(self) -> Quantiser:
        """The quantiser as stored in the file."""

    def survives(self, block: slice) -> Mask:
        """Returns which positions of a block have a weight that is not coded as zero."""

    def count_survivors(self) -> int:
        """Returns the number of positions of the tensor for which `survives` is True."""

    def levels(self, block: slice, mask: Mask | None) -> AnyLevels:
        """Returns the levels of a block's survivors (all positions without a mask).

        For `exact`, returns the bit patterns instead of levels.
        """


@dataclass(frozen=True)
class ExactSource:
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

    @property
    def quantiser(self) -> Quantiser:
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

    def with_kept_levels(self, workers: Workers) -> ExactSource:
        """Returns the source with its levels cached, like `ValueSource.with_kept_levels`."""
        if self.coded == self.dtype or len(self.flat) > _KEPT_LEVELS:
            return self
        return replace(self, kept=_all_levels(self, len(self.flat), workers))


@dataclass(frozen=True)
class Scaling:
    """The scale of a tensor.

    Attributes:
        entry: the tensor's entry, with the scale.
        factors: the stored factors, widened to float32.
        unit: ratio of a root mean square to its factor: a power of two, equal for all factors. A step in
            units of root mean squares is multiplied by it before it is stored.
    """

    entry: TensorEntry
    factors: F32
    unit: float = 1.0

    def of(self, positions: NDArray[np.int64]) -> F32:
        """Returns the factor of each position."""
        return self.factors[scale_index(self.entry, positions)]


@dataclass(frozen=True)
class NumberSource:
    """Magnitude numbers and signs, of a `Uniform` or `Table` quantiser.

    Attributes:
        flat: the tensor.
        dtype: the tensor's dtype.
        quantiser: the quantiser as stored.
        numbers: converts magnitudes to numbers.
        engine: does the work on bits.
        weights: for `WeighedNumbers` the weight of each position's error, float32, flat; else None.
        scaling: magnitudes are first divided by its factors; or None.
        multiplier: returns the stored importance of positions, if it multiplies the weights; else None.
        given_step: whether the caller set the step. Such a step is refused if a weight whose nearest number
            is not 0 would get the number 0, because no other number is finite.
        kept: the cached levels of all positions; empty until they are needed.
    """

    flat: Flat
    dtype: Dtype
    quantiser: Uniform | Table
    numbers: UniformNumbers | WeighedNumbers | TableNumbers
    engine: Engine
    weights: F32 | None = None
    scaling: Scaling | None = None
    multiplier: Multiplier | None = None
    given_step: bool = False
    kept: list[AnyLevels] = field(default_factory=list)

    @property
    def reconstruction(self) -> Reconstruction:
        """How a reader reconstructs weights from the numbers."""
        centroids = self.numbers.centroids if isinstance(self.numbers, TableNumbers) else None
        return Reconstruction(self.dtype, self.quantiser, centroids)

    def survives(self, block: slice) -> Mask:
        if not isinstance(self.numbers, TableNumbers):
            return np.asarray(self._uniform_levels(block) != 0)
        return np.asarray(self.flat[block].astype(np.float32) != 0)

    def count_survivors(self) -> int:
        return sum(
            int(np.count_nonzero(self.survives(slice(start, min(start + _BLOCK, len(self.flat))))))
            for start in range(0, len(self.flat), _BLOCK)
        )

    def levels(self, block: slice, mask: Mask | None) -> AnyLevels:
        if not isinstance(self.numbers, TableNumbers):
            levels = self._uniform_levels(block)
            return levels if mask is None else self.engine.chosen(levels, mask)
        chosen = slice(None) if mask is None else mask
        weights = self.flat[block][chosen].astype(np.float32)
        magnitudes, (scale, multiplier) = np.abs(weights), self._factors(block)
        scale = None if scale is None else scale[chosen]
        multiplier = None if multiplier is None else multiplier[chosen]
        if scale is not None:
            magnitudes = scaled_down(magnitudes, scale)
        numbers = self.reconstruction.lowered(self.numbers(magnitudes), scale, multiplier)
        return numbers * np.uint64(2) + np.signbit(weights)

    def with_zero(self) -> NumberSource:
        """Returns a source with a number for 0. A table gets the centroid 0; a full one loses its least."""
        if not isinstance(self.numbers, TableNumbers) or self.numbers.centroids[0] == 0:
            return self
        others = self.numbers.centroids[-(MAX_CENTROIDS - 1) :]
        centroids = np.concatenate((np.zeros(1, np.float32), others))
        return replace(self, quantiser=Table(len(centroids)), numbers=TableNumbers(centroids))

    def _uniform_levels(self, block: slice) -> AnyLevels:
        """Returns the levels of all positions of a block. Caches the levels of tensors that are not large."""
        if len(self.flat) > _KEPT_LEVELS:
            return self._quantised(block)
        if not self.kept:
            starts = range(0, max(len(self.flat), 1), _BLOCK)
            self.kept.append(np.concatenate([self._quantised(slice(i, i + _BLOCK)) for i in starts]))
        return self.kept[0][block]

    def _quantised(self, block: slice) -> AnyLevels:
        weights = self.flat[block].astype(np.float32, copy=False)
        scale, multiplier = self._factors(block)
        if isinstance(self.numbers, UniformNumbers):
            levels = self.engine.uniform_levels(weights, scale, self.numbers.step, self.numbers.thresholds)
            return self._finite(levels, scale, multiplier)
        assert isinstance(self.numbers, WeighedNumbers)
        assert self.weights is not None
        magnitudes = np.abs(weights)
        if scale is not None:
            magnitudes = scaled_down(magnitudes, scale)
        levels = self.numbers(magnitudes, self.weights[block]) * np.uint32(2)
        return self._finite(levels + (np.signbit(weights) & (levels > 0)), scale, multiplier)

    def _finite(self, levels: AnyLevels, scale: F32 | None, multiplier: F32 | None) -> AnyLevels:
        """Returns the levels of a `Uniform`, lowered if the reconstructed weight would not be finite.

        Raises:
            OptionError: the caller's step is too great.
        """
        reconstruction, one = self.reconstruction, levels.dtype.type(1)
        if not len(levels) or reconstruction.is_finite(int(levels.max()) >> 1, scale, multiplier):
            return levels
        nearest = levels >> one
        numbers = reconstruction.lowered(nearest, scale, multiplier)
        lost = (numbers == 0) & (nearest > 0)
        if self.given_step and lost.any():
            at = int(np.flatnonzero(lost)[0])
            factor = "" if scale is None else f" times the scale factor {scale[at]!s}"
            assert isinstance(self.quantiser, Uniform)
            raise OptionError(
                f"a step of {self.quantiser.step!s}{factor} is too great for {self.dtype.name}; "
                "use a smaller step"
            )
        return np.asarray(numbers << one | (levels & one & (numbers > 0)), levels.dtype)

    def mean_error(self, mask: Mask | None) -> float:
        """Returns the mean squared error of the survivors, weighted by `weights`.

        An importance that multiplies the weights is not applied.

        Args:
            mask: the survivors, flat; None: all non-zero weights.
        """
        error, count = 0.0, 0
        for start in range(0, len(self.flat), _BLOCK):
            block = slice(start, min(start + _BLOCK, len(self.flat)))
            originals = self.flat[block].astype(np.float64)
            alive = originals != 0 if mask is None else mask[block]
            levels = self.levels(block, None)
            numbers = levels >> levels.dtype.type(1)
            scale, _ = self._factors(block)
            values = self.reconstruction.values(numbers, scale, None).astype(np.float64)
            squares = np.square(np.abs(originals) - values)[alive]
            error += exact_sum(squares if self.weights is None else squares * self.weights[block][alive])
            count += len(squares)
        return error / max(count, 1)

    def _factors(self, block: slice) -> tuple[F32 | None, F32 | None]:
        """Returns the scale factors and the importances that multiply the numbers of a block, or None."""
        block = slice(block.start, min(block.stop, len(self.flat)))
        scale = None if self.scaling is None else self.scaling.of(np.arange(block.start, block.stop))
        return scale, None if self.multiplier is None else self.multiplier(block)


@dataclass(frozen=True)
class ValueSource:
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

    @property
    def quantiser(self) -> Quantiser:
        return Table(len(self.centroids))

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

    def with_kept_levels(self, workers: Workers) -> ValueSource:
        """Returns the source with its levels cached, for callers that need them with and without a mask."""
        if len(self.flat) > _KEPT_LEVELS:
            return self
        return replace(self, kept=_all_levels(self, len(self.flat), workers))

    def of_survivors(self, mask: Mask | None) -> ValueSource:
        """Returns a source with only the centroids of survivors, at least one (R-CAN-007).

        Args:
            mask: the caller's mask, flat; None: all weights but +0 survive.
        """
        if mask is None:
            gone = int(self._has_positive_zero_alone() and len(self.magnitudes) > 1)
            return replace(
                self, magnitudes=self.magnitudes[gone:], centroids=self.centroids[gone:], kept_zero=gone
            )
        occur = np.zeros(len(self.magnitudes), np.bool_)
        for start in range(0, len(self.flat), _BLOCK):
            block = slice(start, start + _BLOCK)
            levels = self.levels(block, mask[block])
            occur |= np.bincount(levels >> levels.dtype.type(1), minlength=len(occur)) > 0
        occur[0] |= not occur.any()
        return replace(self, magnitudes=self.magnitudes[occur], centroids=self.centroids[occur], kept=None)

    def _has_positive_zero_alone(self) -> bool:
        """Whether +0 occurs and -0 does not."""
        if self.magnitudes[0]:
            return False
        negative = self.dtype.pattern.type(1 << (self.dtype.bits - 1))
        return not (float_patterns(self.flat, self.dtype) == negative).any()


def _all_levels(source: ExactSource | ValueSource, positions: int, workers: Workers) -> AnyLevels:
    """Returns the levels of all positions of a tensor."""
    blocks = (slice(start, start + _BLOCK) for start in range(0, positions, _BLOCK))
    return np.concatenate(list(workers.map(lambda block: source.levels(block, None), blocks)))


def value_source(flat: Flat, dtype: Dtype, magnitudes: Patterns | None, engine: Engine) -> ValueSource | None:
    """Returns the source of a tensor whose magnitudes are few, finite and exact in float32. Else None."""
    if magnitudes is None or not len(magnitudes):
        return None
    exact = magnitudes.view(dtype.numpy)
    with np.errstate(over="ignore", invalid="ignore"):
        values = exact.astype(np.float32)
    if not np.isfinite(values).all() or not np.array_equal(values.astype(dtype.numpy), exact):
        return None
    return ValueSource(flat, dtype, magnitudes, values, engine)
