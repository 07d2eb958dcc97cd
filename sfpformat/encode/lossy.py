"""Chooses the parameters of a lossy quantiser: its scale and, from a sample, its step or its centroids."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..coding.mask import Mask
from ..coding.quantisers import F32, Table, Uniform, scaled_down
from ..container.entry import TensorEntry
from ..container.stream_maps import ScaleEntry
from ..decode.tensor import scale_index
from ..dtypes import DTYPES, Dtype
from ..engines import Engine
from ..errors import OptionError
from ..options import Table as TableOptions
from ..options import Uniform as UniformOptions
from .importances import Multiplier
from .level_sources import Flat, NumberSource, Scaling
from .quantise import (
    F64,
    SAMPLE,
    Sampled,
    TableNumbers,
    UniformNumbers,
    WeighedNumbers,
    exact_sum,
    lloyd_max,
    mean_of,
    step_for_bits,
    step_for_budget,
    step_for_error,
)

_BLOCK = 1 << 18  # positions processed at a time
_CACHED = 1 << 15  # the same for results that should stay in the fastest caches
# If the sample of a larger tensor has fewer survivors, the whole tensor is searched for survivors.
_LEAST_SAMPLED = 1 << 10
# The greatest power of two by which factors are scaled: the step is scaled inversely and must stay a normal
# float32.
_MOST_MOVED = 120
# Exponent of the greatest factor after scaling: F16 has a range of 2^-24 to 2^15, BF16 and F32 far more.
_MOVED_TO = {"F16": 14, "BF16": 100, "F32": 100}
# How often a step is reduced if its error over the whole tensor is too great, and the tolerance: 0.05 dB.
_ERROR_ROUNDS = 8
_ERROR_TOLERANCE = 10.0**0.005


@dataclass(frozen=True)
class LossyTensor:
    """A tensor to quantise.

    Attributes:
        flat: its weights, finite as float32, one-dimensional.
        dtype: its dtype.
        mask: the survivors, flat; None: all non-zero weights.
        scaling: magnitudes are divided by its factors; or None.
        weights: the weight of each position's error, flat; None: all errors are equal.
        multiplier: returns the stored importance of positions, if it multiplies the weights; else None.
        engine: does the work on bits.
    """

    flat: Flat
    dtype: Dtype
    mask: Mask | None
    scaling: Scaling | None
    weights: F32 | None
    multiplier: Multiplier | None
    engine: Engine

    def source(self, asked: UniformOptions | TableOptions, *, fixed_width: bool) -> NumberSource | None:
        """Returns the source for a quantiser. None if no step reaches its `error_db`, `bits` or `budget`.

        Args:
            asked: the caller's quantiser.
            fixed_width: as in `Options`.

        Raises:
            OptionError: the step is not a positive float32, or the mask alone takes more than the budget.
        """
        if isinstance(asked, TableOptions):
            return self._table(sampled_survivors(self.flat, self.mask, SAMPLE)[0], asked.count)
        if asked.step is not None and self.scaling is not None:
            asked = replace(asked, step=asked.step * self.scaling.unit)
        if asked.step is not None and not asked.rate_weight:  # nothing to choose
            numbers = UniformNumbers(_checked_step(asked.step), np.zeros(0, np.float32))
            return self._uniform(numbers, given=True)
        positions, represented = sampled_survivors(self.flat, self.mask, SAMPLE)
        tensor = self
        if self.weights is not None:
            tensor = replace(self, weights=self.weights / mean_of(self.weights[positions]))
        return tensor._by_sample(positions, represented, asked, fixed_width=fixed_width)

    def _by_sample(
        self, positions: NDArray[np.int64], represented: int, asked: UniformOptions, *, fixed_width: bool
    ) -> NumberSource | None:
        """Returns the `Uniform` source with the caller's step, or a step chosen from a sample of survivors.

        Args:
            positions: of the sampled survivors.
            represented: how many positions the sample represents, pruned ones included.
            asked: the caller's quantiser, with its step in the unit of the scale.
            fixed_width: as in `Options`.

        Returns:
            The source, or None if no step reaches the error or the bits in the options.

        Raises:
            OptionError: as in `source`.
        """
        originals = np.abs(self.flat[positions].astype(np.float64))
        some = Sampled(
            self._magnitudes(positions),
            represented,
            None if self.weights is None else self.weights[positions],
            asked.rate_weight,
            self.dtype,
            originals,
            None if self.scaling is None else self.scaling.of(positions),
            None if self.multiplier is None else self.multiplier(positions),
            self.mask is not None,
            self._widest() if fixed_width else None,
        )
        if asked.step is not None:
            return self._uniform(some.quantiser(_checked_step(asked.step)), given=True)
        if asked.error_db is not None:
            return self._for_error(some, asked.error_db)
        if asked.bits is not None:
            step = step_for_bits(some, asked.bits)
        else:
            assert asked.budget is not None
            step = step_for_budget(some, asked.budget)
        return None if step is None else self._uniform(some.quantiser(_checked_step(step)))

    def _for_error(self, some: Sampled, error_db: float) -> NumberSource | None:
        """Returns the source with a mean squared error of at most ``error_db``, relative to the mean square.

        Returns None if no step reaches that error.
        """
        sampled = len(self.flat) > SAMPLE
        power = self._mean_power() if sampled else some.power() / max(len(some.magnitudes), 1)
        allowed = power * 10.0 ** (error_db / 10)
        step = step_for_error(some, allowed)
        for _ in range(_ERROR_ROUNDS):
            if step is None:
                return None
            source = self._uniform(some.quantiser(_checked_step(step)))
            if not sampled:
                return source
            error = source.mean_error(self.mask)
            if error <= allowed * _ERROR_TOLERANCE:
                return source
            step *= 0.99 * math.sqrt(allowed / error)
        return None

    def _widest(self) -> float:
        """Returns the greatest magnitude after division by the scale."""
        starts = range(0, len(self.flat), _BLOCK)
        blocks = (np.arange(start, min(start + _BLOCK, len(self.flat))) for start in starts)
        return max((float(self._magnitudes(block).max()) for block in blocks), default=0.0)

    def _mean_power(self) -> float:
        """Returns the mean square of the survivors, weighted by `weights`."""
        power, count = 0.0, 0
        for start in range(0, len(self.flat), _BLOCK):
            block = slice(start, start + _BLOCK)
            values = self.flat[block].astype(np.float64)
            alive = values != 0 if self.mask is None else self.mask[block]
            squares = np.square(values[alive])
            power += exact_sum(squares if self.weights is None else squares * self.weights[block][alive])
            count += len(squares)
        return power / max(count, 1)

    def _table(self, positions: NDArray[np.int64], count: int) -> NumberSource:
        weights = None if self.weights is None else self.weights[positions]
        centroids = lloyd_max(self._magnitudes(positions), count, weights)
        if not len(centroids):
            centroids = np.zeros(1, np.float32)
        return self._made(Table(len(centroids)), TableNumbers(centroids), None, given=False)

    def _uniform(self, numbers: UniformNumbers | WeighedNumbers, *, given: bool = False) -> NumberSource:
        weights = self.weights if isinstance(numbers, WeighedNumbers) else None
        return self._made(Uniform(numbers.step), numbers, weights, given=given)

    def _made(
        self,
        quantiser: Uniform | Table,
        numbers: UniformNumbers | WeighedNumbers | TableNumbers,
        weights: F32 | None,
        *,
        given: bool,
    ) -> NumberSource:
        return NumberSource(
            self.flat,
            self.dtype,
            quantiser,
            numbers,
            self.engine,
            weights,
            self.scaling,
            self.multiplier,
            given,
        )

    def _magnitudes(self, positions: NDArray[np.int64]) -> F32:
        """Returns the magnitudes of positions, float32, divided by their scale."""
        magnitudes = np.abs(self.flat[positions].astype(np.float32))
        return magnitudes if self.scaling is None else scaled_down(magnitudes, self.scaling.of(positions))


def sampled_survivors(flat: Flat, mask: Mask | None, size: int) -> tuple[NDArray[np.int64], int]:
    """Samples survivors of a tensor, evenly spaced.

    Args:
        flat: the tensor.
        mask: the survivors, flat; None: all non-zero weights.
        size: about how many positions to sample.

    Returns:
        The positions of the sampled survivors, and how many positions they represent, pruned ones included.
    """
    size = min(len(flat), size)
    chosen = np.arange(size) * len(flat) // max(size, 1)
    alive = flat[chosen] != 0 if mask is None else mask[chosen]
    positions = chosen[alive]
    if size == len(flat) or len(positions) >= _LEAST_SAMPLED:
        return positions, size
    found = []
    for start in range(0, len(flat), _BLOCK):
        block = slice(start, start + _BLOCK)
        found.append(start + np.flatnonzero(flat[block] != 0 if mask is None else mask[block]))
    survivors = np.concatenate(found)
    if not len(survivors):
        return survivors, size
    kept = min(len(survivors), size)
    return survivors[np.arange(kept) * len(survivors) // kept], len(flat) * kept // len(survivors)


def _checked_step(step: float) -> np.float32:
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.float32(step)
    if not 0 < rounded < np.inf:
        raise OptionError(f"a step of {step} is no float32 above 0")
    return rounded


# ------------------------------------------------------------------------------------------------- scales


def scaling_of(
    flat: Flat, entry: TensorEntry, asked: UniformOptions | TableOptions, mask: Mask | None
) -> Scaling | None:
    """Returns the scale of a tensor, or None if the caller's quantiser has none.

    The factors are the root mean squares of the survivors that share a factor.
    """
    if asked.scale is None:
        return None
    per = asked.scale if isinstance(asked.scale, str) else "group"
    size = 0 if isinstance(asked.scale, str) else int(asked.scale)
    dtype = DTYPES[asked.scale_dtype or "F16"]
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
    return Scaling(shaped, *_stored_factors(np.sqrt(squares / np.maximum(counts, 1)), dtype, entry.dtype))


def _stored_factors(roots: F64, dtype: Dtype, of_weights: Dtype) -> tuple[F32, float]:
    """Returns the stored factors for root mean squares, widened to float32, and their `Scaling.unit`.

    If a factor would overflow or be subnormal in its dtype, all factors are scaled by one power of two, and
    the step inversely. A factor that would still become 0 becomes the least positive number, so that no
    weight is lost.

    Args:
        roots: root mean square of the survivors of each factor, 0 if there are none.
        dtype: the dtype in which factors are stored.
        of_weights: the tensor's dtype.
    """
    greatest = float(roots.max(initial=0))
    unit = 1.0
    if greatest > dtype.greatest or ((roots > 0) & (roots < dtype.least_normal)).any():
        moved = _MOVED_TO[dtype.name] - math.frexp(greatest)[1]
        unit = math.ldexp(1.0, -min(max(moved, -_MOST_MOVED), _MOST_MOVED))
    # A factor is at most the greatest weight, and small enough that other groups' numbers stay in float32.
    limit = min(of_weights.greatest, DTYPES["F32"].greatest / 4) / unit
    with np.errstate(over="ignore", under="ignore"):
        factors = np.minimum(roots / unit, limit).astype(dtype.numpy)
        rounded_up = factors.astype(np.float64) > limit
        patterns = factors.view(dtype.pattern)
        patterns[rounded_up] -= dtype.pattern.type(1)
    factors[(factors == 0) & (roots > 0)] = dtype.numpy.type(dtype.least)
    return factors.astype(np.float32), unit


# --------------------------------------------------------------------------------------- supported weights


def require_finite(flat: Flat) -> None:
    """Raises if a lossy quantiser does not support the weights.

    Raises:
        OptionError: a weight is not finite in float32, or all weights are too small for float32.
    """
    for start in range(0, len(flat), _CACHED):
        with np.errstate(over="ignore", invalid="ignore"):
            values = flat[start : start + _CACHED].astype(np.float32, copy=False)
            extremes = np.array([values.min(), values.max()])  # both are NaN if any value is
        if not np.isfinite(extremes).all():
            raise OptionError(
                "a lossy quantiser takes finite float32 only, no infinities or NaNs; leave the tensor out of "
                "the lossy options, such as by options={name: ...} for the others"
            )
    if flat.dtype == np.float64 and np.any(flat) and not _has_normal_float32(flat):
        raise OptionError(
            "all weights are too small for float32, in which a lossy quantiser works; use lossless"
        )


def _has_normal_float32(flat: Flat) -> bool:
    """Whether the magnitude of at least one weight is a normal number in float32."""
    least = DTYPES["F32"].least_normal
    return any(
        bool((np.abs(flat[start : start + _BLOCK].astype(np.float64)) >= least).any())
        for start in range(0, len(flat), _BLOCK)
    )
