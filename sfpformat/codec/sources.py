"""What turns a block of a tensor's positions into levels, for each quantiser (the encoder's side)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..coding.exact import Patterns
from ..coding.mask import Mask
from ..coding.planes import AnyLevels
from ..coding.quantiser import (
    F32,
    Exact,
    Quantiser,
    Table,
    Uniform,
    float_patterns,
    scaled_down,
)
from ..container.entry import TensorEntry
from ..container.streams import ScaleEntry
from ..dtypes import DTYPES, Dtype
from ..engines import Engine
from ..errors import OptionError
from ..parallel import Workers
from .decode import scale_index
from .options import Options
from .quantise import (
    SAMPLE,
    Sampled,
    TableNumbers,
    UniformNumbers,
    WeighedNumbers,
    lloyd_max,
    mean_of,
    step_for_bits,
    step_for_error,
)

Flat = NDArray[np.generic]

# A lossless tensor of at most so many different magnitudes may be a table of them.
MAX_DISTINCT = 1024
_BLOCK = 1 << 18  # positions looked at together
_CACHED = 1 << 15  # the same, where what is made of them should stay in the nearest caches
# Levels of tensors up to so many positions are made once: they are gone through three times.
_KEPT_LEVELS = 1 << 25


class FingerprintSource(Protocol):
    """The fingerprint levels of a tensor."""

    @property
    def quantiser(self) -> Quantiser:
        """As stored."""

    def survives(self, block: slice) -> Mask:
        """Which positions of a block have a weight that is not coded as zero."""

    def count_survivors(self) -> int:
        """How many positions of the tensor `survives` has."""

    def levels(self, block: slice, mask: Mask | None) -> AnyLevels:
        """The levels of a block's survivors (all positions without a mask); of `exact` the bit patterns."""


@dataclass(frozen=True)
class ExactSource:
    """Bit patterns in the dtype ``coded``, which holds all values of ``flat``.

    Attributes:
        magnitudes: the patterns of all magnitudes, ascending, where they are few; else None.
        kept: the coded patterns of all positions, if they were made and kept.
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
        """As `ValueSource.with_kept_levels`."""
        if self.coded == self.dtype or len(self.flat) > _KEPT_LEVELS:
            return self
        return replace(self, kept=_all_levels(self, len(self.flat), workers))


@dataclass(frozen=True)
class Scaling:
    """The scale of a tensor: its factors, as stored and widened to float32."""

    entry: TensorEntry
    factors: F32

    def of(self, positions: NDArray[np.int64]) -> F32:
        """The factor of each position."""
        return self.factors[scale_index(self.entry, positions)]


@dataclass(frozen=True)
class NumberSource:
    """Magnitude numbers and signs, of a `Uniform` or `Table` quantiser.

    Attributes:
        flat: the tensor.
        quantiser: as stored.
        numbers: magnitude -> number.
        weights: for `WeighedNumbers` how much the error of each position counts, float32, flat; else None.
        scaling: what magnitudes are divided by first, or None.
        kept: the levels of all positions, if they were made and kept.
    """

    flat: Flat
    quantiser: Quantiser
    numbers: UniformNumbers | WeighedNumbers | TableNumbers
    engine: Engine
    weights: F32 | None = None
    scaling: Scaling | None = None
    kept: list[AnyLevels] = field(default_factory=list)

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
        values = self.flat[block] if mask is None else self.flat[block][mask]
        weights = values.astype(np.float32)
        magnitudes = np.abs(weights)
        factors = self._factors(block)
        if factors is not None:
            magnitudes = scaled_down(magnitudes, factors if mask is None else factors[mask])
        return self.numbers(magnitudes) * np.uint64(2) + np.signbit(weights)

    def _uniform_levels(self, block: slice) -> AnyLevels:
        """The levels of all positions of a block, kept where the tensor is not too large."""
        if len(self.flat) > _KEPT_LEVELS:
            return self._quantised(block)
        if not self.kept:
            starts = range(0, max(len(self.flat), 1), _BLOCK)
            self.kept.append(np.concatenate([self._quantised(slice(i, i + _BLOCK)) for i in starts]))
        return self.kept[0][block]

    def _quantised(self, block: slice) -> AnyLevels:
        weights = self.flat[block].astype(np.float32, copy=False)
        factors = self._factors(block)
        if isinstance(self.numbers, UniformNumbers):
            return self.engine.uniform_levels(weights, factors, self.numbers.step, self.numbers.thresholds)
        assert isinstance(self.numbers, WeighedNumbers)
        assert self.weights is not None
        magnitudes = np.abs(weights)
        if factors is not None:
            magnitudes = scaled_down(magnitudes, factors)
        levels = self.numbers(magnitudes, self.weights[block]) * np.uint32(2)
        return levels + (np.signbit(weights) & (levels > 0))

    def _factors(self, block: slice) -> F32 | None:
        """What the magnitudes of a block are divided by."""
        if self.scaling is None:
            return None
        return self.scaling.of(np.arange(block.start, min(block.stop, len(self.flat))))


@dataclass(frozen=True)
class ImportanceSource:
    """The importance levels of a tensor: numbers of a uniform quantiser, or bit patterns."""

    flat: F32
    quantiser: Quantiser
    over_survivors: bool
    numbers: UniformNumbers | None = field(default=None)

    def levels(self, block: slice, mask: Mask | None) -> AnyLevels:
        """The levels of a block, of `exact` the bit patterns: of its survivors, or of all its positions."""
        values = self.flat[block]
        if mask is not None and self.over_survivors:
            values = values[mask]
        if isinstance(self.quantiser, Exact):
            coded = self.quantiser.dtype
            return float_patterns(values.astype(coded.numpy), coded)
        assert self.numbers is not None
        return self.numbers(values)


@dataclass(frozen=True)
class ValueSource:
    """Numbers of a lossless table: every magnitude of the tensor is a centroid, and all but +0 survives.

    Attributes:
        flat: the tensor.
        dtype: its dtype.
        magnitudes: the patterns of its magnitudes, ascending.
        centroids: the same as numbers.
        kept: the levels of all positions, if they were made and kept.
        kept_zero: 1 where they were made when the magnitude 0 was still there, else 0.
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
        """The same, its levels made: for a caller that needs them both with and without a mask."""
        if len(self.flat) > _KEPT_LEVELS:
            return self
        return replace(self, kept=_all_levels(self, len(self.flat), workers))

    def of_survivors(self, mask: Mask | None) -> ValueSource:
        """The same with the centroids of the survivors alone, one at least (R-CAN-007).

        Args:
            mask: the caller's, flat; None: all but +0 survives.
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
    """The levels of all positions of a tensor."""
    blocks = (slice(start, start + _BLOCK) for start in range(0, positions, _BLOCK))
    return np.concatenate(list(workers.map(lambda block: source.levels(block, None), blocks)))


def value_source(flat: Flat, dtype: Dtype, magnitudes: Patterns | None, engine: Engine) -> ValueSource | None:
    """The source of a tensor whose magnitudes are few, finite and float32; None for any other."""
    if magnitudes is None or not len(magnitudes):
        return None
    exact = magnitudes.view(dtype.numpy)
    with np.errstate(over="ignore", invalid="ignore"):
        values = exact.astype(np.float32)
    if not np.isfinite(values).all() or not np.array_equal(values.astype(dtype.numpy), exact):
        return None
    return ValueSource(flat, dtype, magnitudes, values, engine)


def scaling_of(flat: Flat, entry: TensorEntry, options: Options, mask: Mask | None) -> Scaling | None:
    """The scale that the options ask for: root mean squares of what shares a factor, survivors only."""
    if options.scale is None:
        return None
    per = options.scale if isinstance(options.scale, str) else "group"
    size = 0 if isinstance(options.scale, str) else int(options.scale)
    dtype = DTYPES[options.scale_dtype]
    shaped = replace(entry, scale=ScaleEntry(per, size, dtype))
    count = next(v.size for v in shaped.vector_list() if v.name == "scale")
    squares, counts = np.zeros(count), np.zeros(count, np.int64)
    for start in range(0, len(flat), SAMPLE):
        block = slice(start, min(start + SAMPLE, len(flat)))
        index = scale_index(shaped, np.arange(block.start, block.stop))
        values = flat[block].astype(np.float64)
        alive = values != 0 if mask is None else mask[block]
        squares += np.bincount(index[alive], values[alive] ** 2, count)
        counts += np.bincount(index[alive], minlength=count)
    with np.errstate(over="ignore"):
        factors = np.sqrt(squares / np.maximum(counts, 1)).astype(dtype.numpy).astype(np.float32)
    return Scaling(shaped, np.minimum(factors, np.finfo(np.float32).max / 4))


def require_finite(flat: Flat) -> None:
    """Refuses what a lossy quantiser cannot take."""
    for start in range(0, len(flat), _CACHED):
        with np.errstate(over="ignore", invalid="ignore"):
            values = flat[start : start + _CACHED].astype(np.float32, copy=False)
            extremes = np.array([values.min(), values.max()])  # both are NaN where one value is
        if not np.isfinite(extremes).all():
            raise OptionError(
                "a lossy quantiser takes finite float32 only, no infinities or NaNs; leave the tensor out of "
                "the lossy options, such as by options={name: ...} for the others"
            )


def checked_importance(importance: NDArray[np.floating], dtype: Dtype | None = None) -> F32:
    """An importance as flat float32, through a narrower dtype where it is kept in one."""
    with np.errstate(over="ignore"):
        flat = np.ascontiguousarray(importance, np.float32).reshape(-1)
        if dtype is not None:
            flat = flat.astype(dtype.numpy).astype(np.float32)
    if not np.isfinite(flat).all() or (flat < 0).any():
        raise OptionError("importances must be finite and not negative")
    return flat


def number_source(
    flat: Flat,
    options: Options,
    mask: Mask | None,
    scaling: Scaling | None,
    weights: F32 | None,
    engine: Engine,
) -> NumberSource:
    """The source of a lossy quantiser, its step or centroids chosen on a sample.

    Args:
        flat: the tensor.
        mask: the caller's mask, or None.
        scaling: what magnitudes are divided by.
        weights: how much the error of each position counts, flat, or None for all alike.
    """
    if options.step is not None and not options.rate_weight:  # nothing to be chosen
        numbers = UniformNumbers(_checked_step(options.step), np.zeros(0, np.float32))
        return NumberSource(flat, Uniform(numbers.step), numbers, engine, scaling=scaling)
    size = min(len(flat), SAMPLE)
    chosen = np.arange(size) * len(flat) // max(size, 1)
    alive = flat[chosen] != 0 if mask is None else mask[chosen]
    positions = chosen[alive]
    magnitudes = np.abs(flat[positions].astype(np.float32))
    if scaling is not None:
        magnitudes = scaled_down(magnitudes, scaling.of(positions))
    if options.quantiser == "table":
        count = options.centroids or max(round(2 ** (options.bits or 1)) // 2, 1)
        centroids = lloyd_max(magnitudes, count, None if weights is None else weights[positions])
        if not len(centroids):
            centroids = np.zeros(1, np.float32)
        return NumberSource(flat, Table(len(centroids)), TableNumbers(centroids), engine, scaling=scaling)
    if weights is not None:
        weights = weights / mean_of(weights[positions])
    some = Sampled(
        magnitudes, len(chosen), None if weights is None else weights[positions], options.rate_weight
    )
    if options.step is not None:
        step = options.step
    elif options.bits is not None:
        step = step_for_bits(some, options.bits)
    else:
        assert options.error_db is not None
        step = step_for_error(some, options.error_db)
    quantiser = some.quantiser(_checked_step(step))
    return NumberSource(flat, Uniform(quantiser.step), quantiser, engine, weights, scaling)


def _checked_step(step: float) -> np.float32:
    with np.errstate(over="ignore"):
        rounded = np.float32(step)
    if not 0 < rounded < np.inf:
        raise OptionError(f"a step of {step} is no float32 above 0")
    return rounded
