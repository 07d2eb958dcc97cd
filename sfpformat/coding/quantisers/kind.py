"""What every quantiser kind defines, and the arithmetic that kinds share (SPEC.md chapters 11, 13, 14).

Rules: every operation is one numpy operation on float32 (float64 where SPEC.md says so), in the order of
chapter 14, so that there is nothing to fuse and nothing to reorder.
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
    """The map of a stream in the directory, as a kind reads it."""

    def required(self, key: str, kind: type[T]) -> T:
        """The value of a key; raises R-DIR-002 where it is missing, R-DIR-003 where its type is wrong."""

    def place(self, key: str) -> int:
        """The byte offset of the value of a key."""


class Quantiser(ABC):
    """How the levels of a stream stand for numbers.

    Attributes:
        NAME: in the directory (R-QNT-001).
        KEYS: the keys that the kind adds to the map of its stream, in SPEC.md's order.
    """

    NAME: ClassVar[str]
    KEYS: ClassVar[tuple[str, ...]]

    @property
    def centroids(self) -> int:
        """How many float32 numbers the vector chunk holds for the stream."""
        return 0

    @abstractmethod
    def __str__(self) -> str:
        """The kind and its parameter, for a reader of `sfp info`."""

    # -------------------------------------------------------------------------------------- directory

    @abstractmethod
    def to_map(self) -> dict[str, object]:
        """The values of `KEYS`."""

    @classmethod
    @abstractmethod
    def from_map(cls, source: StreamMap) -> Self:
        """Reads `KEYS`; raises the clause of what is wrong."""

    # ----------------------------------------------------------------------------------------- checks

    @abstractmethod
    def fingerprint_bound(self, dtype: Dtype) -> int:
        """The bound on ``top`` of a fingerprint stream for a tensor of ``dtype`` (SPEC.md chapter 8)."""

    @abstractmethod
    def importance_bound(self) -> int:
        """The bound on ``top`` of an importance stream (SPEC.md chapter 8)."""

    def require_fits(self, dtype: Dtype, *, scaled: bool) -> None:  # noqa: B027 — most kinds fit every tensor
        """Raises the clause by which a fingerprint stream of this kind does not fit its tensor."""

    def require_finite(self, greatest_number: int, clause: str) -> None:  # noqa: B027 — a table shows none
        """Raises ``clause`` where the directory alone shows a magnitude that is not finite."""

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
        """The weights of survivors, in the tensor's dtype (SPEC.md chapter 14).

        Args:
            levels: of the survivors, shape [n]; the sign is the lowest bit.
            dtype: the tensor's.
            centroids: of a table.
            scale: the scale factor of each survivor, shape [n], or None.
            multiplier: the importance of each survivor, shape [n], or None.
        """

    @abstractmethod
    def importance_values(self, levels: Levels, centroids: F32 | None) -> F32:
        """The importances of an importance stream, float32 (SPEC.md chapter 13)."""


class NumberQuantiser(Quantiser):
    """A kind whose levels are a number, which stands for a magnitude, and a sign; only these have scales."""

    @abstractmethod
    def magnitudes(self, numbers: Levels, centroids: F32 | None) -> F32:
        """The magnitude of each number, shape [n]."""

    @abstractmethod
    def greatest_magnitude(self, greatest_number: int, centroids: F32 | None, clause: str) -> np.float32:
        """The magnitude of the greatest number of a stream; raises ``clause`` unless it is finite."""

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
    """Rounds to nearest, ties to even; beyond the greatest number by R-REC-002 and R-REC-003."""
    with np.errstate(over="ignore"):
        return values.astype(dtype.numpy)


def scaled_down(magnitudes: F32, factors: F32) -> F32:
    """Magnitudes divided by their factors; 0 where the factor is 0."""
    return np.divide(magnitudes, factors, out=np.zeros_like(magnitudes), where=factors > 0)
