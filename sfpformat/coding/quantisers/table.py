"""The kind ``table``: the magnitude is one of a few centroids in the vector chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...dtypes import Dtype
from ...errors import fault, placed
from ..planes import Levels
from .kind import F32, NumberQuantiser, StreamMap

MAX_CENTROIDS = 1 << 16  # R-QNT-004


@dataclass(frozen=True)
class Table(NumberQuantiser):
    """The magnitude is one of ``count`` centroids in the vector chunk."""

    count: int

    NAME: ClassVar[str] = "table"
    KEYS: ClassVar[tuple[str, ...]] = ("count",)

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_CENTROIDS:
            raise fault("R-QNT-004", f"count is {self.count}, must be 1 to {MAX_CENTROIDS}")

    @property
    def centroids(self) -> int:
        return self.count

    def __str__(self) -> str:
        return f"table {self.count}"

    def to_map(self) -> dict[str, object]:
        return {"count": self.count}

    @classmethod
    def from_map(cls, source: StreamMap) -> Table:
        count = source.required("count", int)
        with placed(base=source.place("count")):
            return cls(count)

    def fingerprint_bound(self, dtype: Dtype) -> int:
        return 2 * self.count

    def importance_bound(self) -> int:
        return self.count

    def greatest_magnitude(self, greatest_number: int, centroids: F32 | None) -> np.float32:
        assert centroids is not None
        return np.float32(centroids[-1])  # finite by R-QNT-005

    def magnitudes(self, numbers: Levels, centroids: F32 | None) -> F32:
        assert centroids is not None
        return centroids[numbers.astype(np.int64)]


def require_centroids(centroids: F32) -> None:
    """Checks the centroids in the vector chunk (R-QNT-005, R-QNT-007)."""
    if not np.isfinite(centroids).all() or np.signbit(centroids).any():
        raise fault("R-QNT-005", "a centroid is negative or not finite")
    if (np.diff(centroids) <= 0).any():
        raise fault("R-QNT-007", "the centroids are not in ascending order")
