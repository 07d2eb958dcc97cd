"""Source of `table`: a magnitude number is the nearest of a few centroids, chosen for the tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ...coding.mask import Mask
from ...coding.planes import AnyLevels
from ...coding.quantisers import F32, MAX_CENTROIDS, Table, float_patterns, scaled_down
from ...errors import OptionError
from ...options import Table as Asked
from ..quantise import F64, SAMPLE
from .base import Survives, blocks_of
from .lossy import LossyTensor, NumberSource, sampled_survivors

_LOOKED_UP = 1 << 16  # positions; levels of smaller tensors are not looked up by bit patterns
_LLOYD_BITS = 14  # the histogram of magnitudes has 2^14 bins
_LLOYD_ROUNDS = 200


@dataclass(frozen=True)
class TableSource(NumberSource):
    """Numbers of a table.

    Attributes:
        tensor: the tensor.
        values: the centroids, ascending, float32.
    """

    values: F32

    @property
    def quantiser(self) -> Table:
        return Table(len(self.values))

    @property
    def centroids(self) -> F32:
        return self.values

    def may_omit_mask(self, survivors: int) -> bool:
        """False if a weight is 0: without a mask, the zeros would need a centroid."""
        return survivors == self.positions

    def survives(self, block: slice) -> Mask:
        return np.asarray(self.tensor.flat[block].astype(np.float32) != 0)

    def levels(self, block: slice, mask: Mask | None) -> AnyLevels:
        looked_up = self._by_pattern
        if looked_up is not None:
            patterns = float_patterns(self.tensor.flat[block], self.tensor.dtype)
            if mask is not None:
                patterns = self.tensor.engine.chosen(patterns, mask)
            return np.asarray(looked_up[patterns])
        chosen = slice(None) if mask is None else mask
        weights = self.tensor.flat[block][chosen].astype(np.float32)
        magnitudes, (scale, multiplier) = np.abs(weights), self.tensor.factors(block)
        scale = None if scale is None else scale[chosen]
        multiplier = None if multiplier is None else multiplier[chosen]
        if scale is not None:
            magnitudes = scaled_down(magnitudes, scale)
        numbers = self.reconstruction.lowered(nearest_numbers(magnitudes, self.values), scale, multiplier)
        return numbers * np.uint64(2) + np.signbit(weights)

    @cached_property
    def _by_pattern(self) -> NDArray[np.uint16] | None:
        """The level of each bit pattern, for large tensors of 2-byte weights without factors; else None.

        None, too, if no centroid is finite for some pattern, which may not occur in the tensor.
        """
        tensor = self.tensor
        if tensor.dtype.bits != 16 or tensor.scaling is not None or tensor.multiplier is not None:
            return None
        if self.positions < _LOOKED_UP or len(self.values) > 1 << 15:
            return None
        magnitudes = np.arange(1 << 15, dtype=np.uint16).view(tensor.dtype.numpy).astype(np.float32)
        finite = magnitudes[: tensor.dtype.nonfinite]
        try:
            numbers = self.reconstruction.lowered(nearest_numbers(finite, self.values), None, None)
        except OptionError:
            return None
        levels = np.zeros(1 << 16, np.uint16)
        levels[: len(numbers)] = numbers.astype(np.uint16) * np.uint16(2)
        levels[1 << 15 :] = levels[: 1 << 15] + np.uint16(1)
        return levels

    def with_zero(self) -> TableSource:
        """Adds the centroid 0 if a weight is 0. A full table loses its least centroid."""
        if self.values[0] == 0 or self.count_survivors() == self.positions:
            return self
        others = self.values[-(MAX_CENTROIDS - 1) :]
        return replace(self, values=np.concatenate((np.zeros(1, np.float32), others)))

    def of_survivors(self, survives: Survives | None, given: Mask | None) -> TableSource:
        """Keeps the first centroid if there are no levels."""
        used = np.zeros(len(self.values), np.bool_)
        for block in blocks_of(self.positions):
            levels = self.levels(block, None if survives is None else survives(block))
            used |= np.bincount((levels >> levels.dtype.type(1)).astype(np.int64), minlength=len(used)) > 0
        used[0] |= not used.any()
        return replace(self, values=self.values[used])


def source(tensor: LossyTensor, asked: Asked, *, fixed_width: bool) -> TableSource:
    """Returns the source with centroids chosen from a sample of survivors.

    Args:
        tensor: the tensor.
        asked: the caller's quantiser.
        fixed_width: as in `Options`; does not matter.
    """
    positions, _ = sampled_survivors(tensor.flat, tensor.mask, SAMPLE)
    weights = None if tensor.weights is None else tensor.weights[positions]
    centroids = lloyd_max(tensor.magnitudes(positions), asked.count, weights)
    return TableSource(tensor, centroids if len(centroids) else np.zeros(1, np.float32))


def greatest_errors(
    quantiser: Table,
    magnitudes: F64,
    scale: F64,
    centroids: F64 | None,
    greatest: float,
    *,
    weighted: bool,
) -> F64:
    """Returns the error of each weight: its distance to the nearest centroid whose product is finite.

    Args:
        quantiser: as stored.
        magnitudes: of the weights, shape [n].
        scale: the scale factor of each, shape [n].
        centroids: ascending.
        greatest: the greatest number of the tensor's dtype.
        weighted: does not matter.
    """
    assert centroids is not None
    safe = np.where(scale > 0, scale, 1.0)
    # For each weight, the greatest centroid whose product is finite; if there is none, the least centroid.
    with np.errstate(over="ignore"):
        last = np.searchsorted(centroids, greatest / safe, side="right") - 1
        above = np.searchsorted(centroids, magnitudes / safe)
    above = np.minimum(above, np.maximum(last, 0))
    below = np.maximum(above - 1, 0)
    errors = [np.abs(centroids[index] * scale - magnitudes) for index in (above, below)]
    return np.asarray(np.minimum(*errors), np.float64)


def nearest_numbers(magnitudes: F32, centroids: F32) -> NDArray[np.uint64]:
    """Returns the number of the centroid nearest to each magnitude; the lower of two equally near.

    Args:
        magnitudes: shape [n].
        centroids: ascending, at least one.
    """
    wide = centroids.astype(np.float64)
    middles = (wide[1:] + wide[:-1]) / 2
    return np.searchsorted(middles, magnitudes, side="left").astype(np.uint64)


def lloyd_max(magnitudes: F32, count: int, weights: F32 | None = None) -> F32:
    """Returns centroids of least mean squared error (Lloyd 1957, Max 1960), ascending, at most ``count``.

    Args:
        magnitudes: magnitudes of the survivors, shape [n].
        count: the greatest number of centroids.
        weights: the weight of each error, shape [n], or None if all errors are equal.
    """
    distinct = np.unique(magnitudes[: 4 * count + 64])
    if len(distinct) <= count:
        distinct = np.unique(magnitudes)
        if len(distinct) <= count:
            return distinct.astype(np.float32)
    # Integers only: sums are exact in any order, and so are differences of running sums. With at most 2^16
    # magnitudes, all numbers are below 2^53.
    greatest = float(magnitudes.max())
    places = (magnitudes.astype(np.float64) * ((1 << 20) / greatest)).astype(np.int64)
    mass = np.ones(len(magnitudes), np.int64)
    if weights is not None and weights.max() > 0:
        mass = (np.maximum(weights, 0).astype(np.float64) * ((1 << 16) / float(weights.max()))).astype(
            np.int64
        )
    bins = np.minimum(places >> (20 - _LLOYD_BITS), (1 << _LLOYD_BITS) - 1)
    mass_below = _running(bins, mass)
    moment_below = _running(bins, mass * places)
    # Start with equal shares of the square root of the mass, which is near the optimum for many centroids.
    spread = np.concatenate(([0.0], np.cumsum(np.sqrt(np.diff(mass_below)))))
    shares = (np.arange(count) + 0.5) / count * spread[-1]
    centroids = (np.searchsorted(spread, shares) - 0.5) * (1 << (20 - _LLOYD_BITS))
    for _ in range(_LLOYD_ROUNDS):
        middles = (centroids[1:] + centroids[:-1]) / 2
        cuts = np.ceil(middles / (1 << (20 - _LLOYD_BITS))).astype(np.int64)
        cuts = np.minimum(np.maximum(cuts, 0), 1 << _LLOYD_BITS)
        edges = np.concatenate(([0], cuts, [1 << _LLOYD_BITS]))
        inside = np.diff(mass_below[edges])
        moved = np.where(inside > 0, np.diff(moment_below[edges]) / np.maximum(inside, 1), centroids)
        if (moved == centroids).all():
            break
        centroids = moved
    return np.unique((centroids * (greatest / (1 << 20))).astype(np.float32))


def _running(bins: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns for each bin the sum of the values in all lower bins."""
    sums = np.zeros(1 << _LLOYD_BITS, np.int64)
    np.add.at(sums, bins, values)
    return np.concatenate(([0], np.cumsum(sums)))
