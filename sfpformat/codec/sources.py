"""What turns a block of a tensor's positions into levels, for each quantiser (the encoder's side)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

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
    sample,
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
    """Bit patterns in the dtype ``coded``, which holds all values of ``flat``."""

    flat: Flat
    dtype: Dtype
    coded: Dtype
    engine: Engine

    @property
    def quantiser(self) -> Quantiser:
        return Exact(self.coded)

    def survives(self, block: slice) -> Mask:
        return np.asarray(float_patterns(self.flat[block], self.dtype) != 0)

    def count_survivors(self) -> int:
        return int(np.count_nonzero(float_patterns(self.flat, self.dtype)))

    def levels(self, block: slice, mask: Mask | None) -> AnyLevels:
        values = self.flat[block]
        if mask is not None:
            values = self.engine.chosen(values.view(self.dtype.pattern), mask).view(self.dtype.numpy)
        if self.coded != self.dtype:
            values = values.astype(self.coded.numpy)
        return float_patterns(values, self.coded)


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
        zero_survives: whether a weight with the number 0 is a survivor (all but +0 are, where the table holds
            every value).
        kept: the levels of all positions, if they were made and kept.
    """

    flat: Flat
    quantiser: Quantiser
    numbers: UniformNumbers | WeighedNumbers | TableNumbers
    engine: Engine
    weights: F32 | None = None
    scaling: Scaling | None = None
    zero_survives: bool = False
    kept: list[AnyLevels] = field(default_factory=list)

    def survives(self, block: slice) -> Mask:
        if not isinstance(self.numbers, TableNumbers):
            return np.asarray(self._uniform_levels(block) != 0)
        values = self.flat[block].astype(np.float32)
        if self.zero_survives:
            return np.asarray((values != 0) | np.signbit(values))
        return np.asarray(values != 0)

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


def few_values(flat: Flat, dtype: Dtype) -> F32 | None:
    """All magnitudes of a tensor, ascending, where they are few, finite and fit float32; else None."""
    sign = dtype.pattern.type((1 << (dtype.bits - 1)) - 1)
    seen = _Seen(dtype.pattern)
    for block in _growing_blocks(flat):
        if seen.add(float_patterns(np.ascontiguousarray(block), dtype) & sign) > MAX_DISTINCT:
            return None
    exact = seen.values().view(dtype.numpy)
    with np.errstate(over="ignore", invalid="ignore"):
        values = exact.astype(np.float32)
    if not np.isfinite(values).all() or not np.array_equal(values.astype(dtype.numpy), exact):
        return None
    return values


def _growing_blocks(flat: Flat) -> Iterator[Flat]:
    """A sample, which tells most tensors, and then all values, a few at first."""
    yield sample(flat, 4 * MAX_DISTINCT)
    start, size = 0, 16 * MAX_DISTINCT
    while start < len(flat):
        yield flat[start : start + size]
        start, size = start + size, min(4 * size, SAMPLE)


class _Seen:
    """The different values of some unsigned integers."""

    def __init__(self, dtype: np.dtype[np.unsignedinteger]) -> None:
        self._values: NDArray[np.unsignedinteger] = np.zeros(0, dtype)
        # One of so few values is noted where it stands.
        self._flags = np.zeros(1 << 8 * dtype.itemsize, np.bool_) if dtype.itemsize <= 2 else None

    def add(self, more: NDArray[np.unsignedinteger]) -> int:
        """Adds values; returns how many different ones there are."""
        if self._flags is not None:
            self._flags[more] = True
            return int(np.count_nonzero(self._flags))
        self._values = np.union1d(self._values, more)
        return len(self._values)

    def values(self) -> NDArray[np.unsignedinteger]:
        """All of them, ascending."""
        if self._flags is not None:
            return np.flatnonzero(self._flags).astype(self._values.dtype)
        return self._values


def table_of_values(flat: Flat, values: F32, engine: Engine) -> NumberSource:
    """A lossless source: every magnitude of the tensor is a centroid."""
    # The patterns ascend with the magnitudes, so `values` does too.
    return NumberSource(flat, Table(len(values)), TableNumbers(values), engine, zero_survives=True)


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
                "a lossy quantiser takes finite float32 only, no infinities or NaNs; use lossless"
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
