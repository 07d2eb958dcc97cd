"""Base classes of quantiser kinds, and their shared arithmetic (SPEC.md chapters 11, 13, 14).

Rules: every arithmetic operation is one numpy operation on float32 (float64 if SPEC.md requires it), in the
order of chapter 14, so that no compiler can fuse or reorder operations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...dtypes import Dtype
from ..planes import Levels

F32 = NDArray[np.float32]
T = TypeVar("T")


class StreamMap(Protocol):
    """The map of a stream in the directory, from which a kind reads its keys."""

    def required(self, key: str, kind: type[T]) -> T:
        """Returns the value of a key. Raises R-DIR-002 if it is missing, R-DIR-003 if its type is wrong."""

    def place(self, key: str) -> int:
        """Returns the byte offset of the value of a key."""


class Quantiser(ABC):
    """A kind of quantiser: converts the levels of a stream to numbers.

    Attributes:
        NAME: name in the directory (R-QNT-001).
        KEYS: the keys that the kind adds to the map of its stream, in SPEC.md's order.
    """

    NAME: ClassVar[str]
    KEYS: ClassVar[tuple[str, ...]]

    @property
    def centroids(self) -> int:
        """Number of float32 centroids in the vector chunk for the stream."""
        return 0

    @abstractmethod
    def __str__(self) -> str:
        """The kind and its parameter, for the output of `sfp info`."""

    # -------------------------------------------------------------------------------------- directory

    @abstractmethod
    def to_map(self) -> dict[str, object]:
        """Returns the keys in `KEYS` with their values."""

    @classmethod
    @abstractmethod
    def from_map(cls, source: StreamMap) -> Self:
        """Reads the keys in `KEYS`. Raises the clause of an invalid value."""

    # ----------------------------------------------------------------------------------------- checks

    @abstractmethod
    def fingerprint_bound(self, dtype: Dtype) -> int:
        """Returns the bound on ``top`` of a fingerprint stream of a tensor of ``dtype`` (SPEC.md 8)."""

    @abstractmethod
    def importance_bound(self) -> int:
        """Returns the bound on ``top`` of an importance stream (SPEC.md chapter 8)."""

    def widens_to(self, dtype: Dtype) -> bool:
        """Returns whether a tensor of ``dtype`` may have fingerprints of this quantiser (R-QNT-002)."""
        return True

    def known_magnitude(self, number: int) -> np.float32:
        """Returns the magnitude of a number, if it follows from the directory alone; else 0."""
        return np.float32(0)

    # ---------------------------------------------------------------------------------------- numbers

    @abstractmethod
    def fingerprint_values(
        self,
        levels: Levels,
        dtype: Dtype,
        centroids: F32 | None = None,
        scale: F32 | None = None,
        multiplier: F32 | None = None,
    ) -> NDArray[np.generic]:
        """Returns the weights of survivors, in the tensor's dtype (SPEC.md chapter 14).

        Args:
            levels: the levels of the survivors, shape [n]; the sign is the lowest bit.
            dtype: the tensor's dtype.
            centroids: the centroids of a table; else None.
            scale: the scale factor of each survivor, shape [n], or None.
            multiplier: the importance of each survivor, shape [n], or None.
        """

    @abstractmethod
    def importance_values(self, levels: Levels, centroids: F32 | None) -> F32:
        """Returns the importances of an importance stream, float32 (SPEC.md chapter 13)."""


class NumberQuantiser(Quantiser):
    """A kind whose levels consist of a sign and the number of a magnitude. Only such kinds have scales."""

    @abstractmethod
    def magnitudes(self, numbers: Levels, centroids: F32 | None) -> F32:
        """Returns the magnitude of each number, shape [n]."""

    @abstractmethod
    def greatest_magnitude(self, greatest_number: int, centroids: F32 | None) -> np.float32:
        """Returns the greatest magnitude of a stream with that greatest number (R-SCL-006)."""

    def fingerprint_values(
        self,
        levels: Levels,
        dtype: Dtype,
        centroids: F32 | None = None,
        scale: F32 | None = None,
        multiplier: F32 | None = None,
    ) -> NDArray[np.generic]:
        values = self.magnitudes(levels >> np.uint64(1), centroids)
        np.negative(values, out=values, where=(levels & np.uint64(1)).astype(bool))
        if scale is not None:
            values = values * scale
        if multiplier is not None:
            with np.errstate(over="ignore"):
                values = values * multiplier
        return round_to(values, dtype)

    def importance_values(self, levels: Levels, centroids: F32 | None) -> F32:
        return self.magnitudes(levels, centroids)


def round_to(values: NDArray[np.floating], dtype: Dtype) -> NDArray[np.generic]:
    """Rounds to nearest, ties to even. R-REC-002 and R-REC-003 define results beyond the greatest number."""
    with np.errstate(over="ignore"):
        return values.astype(dtype.numpy)


def scaled_down(magnitudes: F32, factors: F32) -> F32:
    """Returns magnitudes divided by their factors; 0 if the factor is 0."""
    return np.divide(magnitudes, factors, out=np.zeros_like(magnitudes), where=factors > 0)
