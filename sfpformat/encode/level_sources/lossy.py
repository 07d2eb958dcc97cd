"""What the sources of lossy quantisers share: the tensor, its scale, and how weights are reconstructed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ...coding.mask import Mask
from ...coding.quantisers import F32, NumberQuantiser, scaled_down
from ...dtypes import Dtype
from ...engines import Engine
from ..finite import Reconstruction
from ..importances import Multiplier
from ..quantise import exact_sum
from ..scales import Scaling
from .base import Flat, Source, blocks_of

# If the sample of a larger tensor has fewer survivors, the whole tensor is searched for survivors.
_LEAST_SAMPLED = 1 << 10


@dataclass(frozen=True)
class LossyTensor:
    """A tensor to quantise.

    Attributes:
        flat: its weights, finite as float32, one-dimensional.
        dtype: its dtype.
        mask: the survivors, flat; None: all non-zero weights.
        scaling: magnitudes are divided by its factors; or None.
        weights: the weight of each position's error, float32, flat; None: all errors are equal.
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

    def magnitudes(self, positions: NDArray[np.int64]) -> F32:
        """Returns the magnitudes of positions, float32, divided by their scale."""
        magnitudes = np.abs(self.flat[positions].astype(np.float32))
        return magnitudes if self.scaling is None else scaled_down(magnitudes, self.scaling.of(positions))

    def greatest_magnitude(self) -> float:
        """Returns the greatest magnitude after division by the scale."""
        ranges = (np.arange(block.start, block.stop) for block in blocks_of(len(self.flat)))
        return max((float(self.magnitudes(positions).max()) for positions in ranges), default=0.0)

    def mean_power(self) -> float:
        """Returns the mean square of the survivors, weighted by `weights`."""
        power, count = 0.0, 0
        for block in blocks_of(len(self.flat)):
            values = self.flat[block].astype(np.float64)
            alive = values != 0 if self.mask is None else self.mask[block]
            squares = np.square(values[alive])
            power += exact_sum(squares if self.weights is None else squares * self.weights[block][alive])
            count += len(squares)
        return power / max(count, 1)

    def factors(self, block: slice) -> tuple[F32 | None, F32 | None]:
        """Returns the scale factors and the importances that multiply the numbers of a block, or None."""
        block = slice(block.start, min(block.stop, len(self.flat)))
        scale = None if self.scaling is None else self.scaling.of(np.arange(block.start, block.stop))
        return scale, None if self.multiplier is None else self.multiplier(block)


@dataclass(frozen=True)
class NumberSource(Source):
    """Magnitude numbers and signs.

    Attributes:
        tensor: the tensor.
    """

    tensor: LossyTensor

    IS_LOSSLESS: ClassVar[bool] = False

    @property
    def positions(self) -> int:
        return len(self.tensor.flat)

    @property
    @abstractmethod
    def quantiser(self) -> NumberQuantiser:
        """The quantiser as stored in the file."""

    @property
    def centroids(self) -> F32 | None:
        """The centroids of the quantiser, ascending; None if it has none."""
        return None

    @property
    def reconstruction(self) -> Reconstruction:
        """How a reader reconstructs weights from the numbers."""
        return Reconstruction(self.tensor.dtype, self.quantiser, self.centroids)

    def vectors(self) -> Mapping[str, NDArray[np.generic]]:
        found: dict[str, NDArray[np.generic]] = {}
        if self.centroids is not None:
            found["fingerprint centroids"] = self.centroids
        if self.tensor.scaling is not None:
            found["scale"] = self.tensor.scaling.factors
        return found

    def mean_error(self) -> float:
        """Returns the mean squared error of the survivors, weighted by the tensor's `weights`.

        An importance that multiplies the weights is not applied.
        """
        flat, mask, weights = self.tensor.flat, self.tensor.mask, self.tensor.weights
        error, count = 0.0, 0
        for block in blocks_of(len(flat)):
            originals = flat[block].astype(np.float64)
            alive = originals != 0 if mask is None else mask[block]
            levels = self.levels(block, None)
            numbers = levels >> levels.dtype.type(1)
            scale, _ = self.tensor.factors(block)
            values = self.reconstruction.values(numbers, scale, None).astype(np.float64)
            squares = np.square(np.abs(originals) - values)[alive]
            error += exact_sum(squares if weights is None else squares * weights[block][alive])
            count += len(squares)
        return error / max(count, 1)


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
    survivors = np.concatenate(
        [
            block.start + np.flatnonzero(flat[block] != 0 if mask is None else mask[block])
            for block in blocks_of(len(flat))
        ]
    )
    if not len(survivors):
        return survivors, size
    kept = min(len(survivors), size)
    return survivors[np.arange(kept) * len(survivors) // kept], len(flat) * kept // len(survivors)
