"""The interface of sources: a source converts blocks of a tensor's positions to fingerprint levels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ...coding.mask import Mask
from ...coding.planes import AnyLevels
from ...coding.quantisers import Quantiser
from ...dtypes import Dtype
from ...io.threads import Workers

Flat = NDArray[np.generic]
Survives = Callable[[slice], Mask]

BLOCK = 1 << 18  # positions processed at a time
# Levels of tensors of at most this many positions are cached: they are used three times.
CACHED_LEVELS = 1 << 25


class Source(ABC):
    """The fingerprint levels of a tensor, for one quantiser.

    The methods that are not abstract have the defaults of a quantiser without vectors.

    Attributes:
        IS_LOSSLESS: whether a reader decodes the bits of every survivor.
    """

    IS_LOSSLESS: ClassVar[bool]

    @property
    @abstractmethod
    def positions(self) -> int:
        """The number of positions of the tensor."""

    @property
    @abstractmethod
    def quantiser(self) -> Quantiser:
        """The quantiser as stored in the file."""

    @abstractmethod
    def survives(self, block: slice) -> Mask:
        """Returns which positions of a block have a weight that is not coded as zero."""

    @abstractmethod
    def levels(self, block: slice, mask: Mask | None) -> AnyLevels:
        """Returns the levels of a block's survivors (all positions without a mask).

        For `exact`, returns the bit patterns instead of levels.
        """

    def count_survivors(self) -> int:
        """Returns the number of positions of the tensor for which `survives` is True."""
        return sum(int(np.count_nonzero(self.survives(block))) for block in blocks_of(self.positions))

    def vectors(self) -> Mapping[str, NDArray[np.generic]]:
        """Returns the vectors that the quantiser and the scale need, by their names in the vector chunk."""
        return {}

    def bound(self, dtype: Dtype) -> int:
        """Returns the bound on the levels of the code table of a tensor of ``dtype``."""
        return self.quantiser.fingerprint_bound(dtype)

    def may_omit_mask(self, survivors: int) -> bool:
        """Returns whether the encoder may code all positions, zeros included, if that takes fewer bits."""
        return True

    @property
    def has_zero_first(self) -> bool:
        """Whether the number 0 is a weight of 0 whose sign must be preserved."""
        return False

    def with_zero(self) -> Self:
        """Returns a source that has a number for the weight 0, for coding without a mask."""
        return self

    def with_cached_levels(self, workers: Workers) -> Self:
        """Returns the source with its levels cached, for callers that need them with and without a mask."""
        return self

    def of_survivors(self, survives: Survives | None, given: Mask | None) -> Self:
        """Returns a source without the entries of its vectors that no survivor uses (R-CAN-007).

        Args:
            survives: returns the mask of a block of positions; None for no mask.
            given: the caller's mask, flat; None if the mask is that of `survives`.
        """
        return self


def blocks_of(positions: int, size: int = BLOCK) -> Iterator[slice]:
    """Yields slices that cover a tensor's positions."""
    for start in range(0, positions, size):
        yield slice(start, min(start + size, positions))


def all_levels(source: Source, workers: Workers) -> AnyLevels:
    """Returns the levels of all positions of a tensor, which has at least one."""
    return np.concatenate(
        list(workers.map(lambda block: source.levels(block, None), blocks_of(source.positions)))
    )
