"""Thresholds found from the distribution of importances, and the masks that they give. Numpy alone.

Rules: a threshold is a rule that looks at importances in ascending order and says how many go. So exact
targets and cuts found in the curve are one kind of thing, and ties are settled in one place: of equal
importances those of least ``tiebreak`` go first, then the first in the order of tensors and positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..coding.mask import Mask
from ..errors import OptionError

Numbers = NDArray[np.floating]
F64 = NDArray[np.float64]

SCOPES = ("model", "tensor")


class Threshold(Protocol):
    """How many importances go."""

    def count(self, ascending: F64) -> int:
        """How many of these go, from the first on.

        Args:
            ascending: the importances, float64 [n], n > 0, ascending.
        """


@dataclass(frozen=True)
class Sparsity:
    """The given share of all positions goes, to the nearest whole number."""

    share: float

    def __post_init__(self) -> None:
        _require_share("sparsity", self.share)

    def count(self, ascending: F64) -> int:
        return min(math.floor(self.share * len(ascending) + 0.5), len(ascending))


@dataclass(frozen=True)
class Quantile:
    """What lies under the quantile goes: as `Sparsity`, but of equal importances all or none."""

    share: float

    def __post_init__(self) -> None:
        _require_share("quantile", self.share)

    def count(self, ascending: F64) -> int:
        return _below(ascending, float(np.quantile(ascending, self.share)))


@dataclass(frozen=True)
class MeanSigma:
    """What lies under mean − k · standard deviation goes."""

    k: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.k):
            raise OptionError(f"k is {self.k}, must be finite")

    def count(self, ascending: F64) -> int:
        return _below(ascending, float(ascending.mean() - self.k * ascending.std()))


@dataclass(frozen=True)
class Otsu:
    """The cut into two classes of greatest variance between them (Otsu, 1979), without a histogram.

    Attributes:
        log: whether the logarithms are looked at, which suits importances over many powers of ten. What is
            zero then goes, and does not count.
    """

    log: bool = False

    def count(self, ascending: F64) -> int:
        zeros = _below(ascending, np.nextafter(0, 1)) if self.log else 0
        values = np.log(ascending[zeros:]) if self.log else ascending
        if len(values) < 2 or values[0] == values[-1]:
            return zeros
        values = values - values.mean()
        below = np.arange(1, len(values))
        sums = np.cumsum(values)[:-1]
        # With the mean at zero, the variance between the classes is sums² · n / (below · above).
        between = sums**2 / (below * (len(values) - below))
        between[values[1:] == values[:-1]] = -1.0  # never between equal importances
        return zeros + int(np.argmax(between)) + 1


@dataclass(frozen=True)
class Knee:
    """The point of the sorted curve that lies farthest from the chord between its ends, on its bulging side.

    Importances are usually many small and a few great ones: the curve rises late, and what lies before the
    bend goes.
    """

    def count(self, ascending: F64) -> int:
        span = ascending[-1] - ascending[0]
        if len(ascending) < 3 or span <= 0:
            return 0
        chord = np.linspace(0.0, 1.0, len(ascending))
        bend = int(np.argmax(chord - (ascending - ascending[0]) / span))
        return _below(ascending, float(ascending[bend]))


@dataclass(frozen=True)
class Pattern:
    """The ``keep`` greatest of every ``of`` neighbours in a row stay, as in 2:4; of equal ones the last."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of:
            raise OptionError(f"a pattern keeps some of its positions, not {self.keep} of {self.of}")


def masks_of(
    importances: Mapping[str, Numbers],
    threshold: Threshold | Pattern,
    *,
    scope: str = "model",
    exempt: Sequence[str] = (),
    floor: float = 0.0,
    tiebreak: Mapping[str, Numbers] | None = None,
) -> dict[str, Mask]:
    """The masks that a threshold gives: bool, True for survivors, of each importance's shape.

    Args:
        importances: tensor name -> finite numbers of any shape; greater ones matter more.
        threshold: the rule.
        scope: ``model`` for one threshold over all tensors, or ``tensor`` for one in each.
        exempt: patterns of names (as a shell's) that are not pruned; they have no part in the distribution
            and no mask.
        floor: the share of its positions that each tensor keeps at least. Over the model, what the floor
            keeps is pruned elsewhere instead, so that the whole loses as many as without.
        tiebreak: numbers by name that settle equal importances, such as magnitudes.

    Memory: about 40 bytes a position of what shares a threshold.

    Raises:
        OptionError: importances that are not finite, a scope or share that is none, a pattern that does not
            divide a row.
    """
    if scope not in SCOPES:
        raise OptionError(f"scope is {scope!r}, must be one of {', '.join(SCOPES)}")
    _require_share("floor", floor)
    chosen = {
        name: np.asarray(array)
        for name, array in importances.items()
        if not any(fnmatchcase(name, pattern) for pattern in exempt)
    }
    for name, array in chosen.items():
        if not np.isfinite(array).all():
            raise OptionError(f"the importance of {name!r} is not finite everywhere")
    if isinstance(threshold, Pattern):
        return {name: _patterned(name, array, threshold) for name, array in chosen.items()}
    ties = tiebreak or {}
    groups = [list(chosen)] if scope == "model" else [[name] for name in chosen]
    out: dict[str, Mask] = {}
    for names in groups:
        out |= _masks_of_group({name: chosen[name] for name in names}, threshold, floor, ties)
    return out


def achieved(masks: Mapping[str, Mask]) -> float:
    """The share of positions that masks prune; 0 of none."""
    positions = sum(mask.size for mask in masks.values())
    kept = sum(int(np.count_nonzero(mask)) for mask in masks.values())
    return 1 - kept / positions if positions else 0.0


def _masks_of_group(
    arrays: Mapping[str, Numbers], threshold: Threshold, floor: float, tiebreak: Mapping[str, Numbers]
) -> dict[str, Mask]:
    """The masks of tensors that share a threshold."""
    sizes = np.array([array.size for array in arrays.values()], np.int64)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    values = _joined([array.reshape(-1) for array in arrays.values()])
    if not len(values):
        return {name: np.ones(array.shape, np.bool_) for name, array in arrays.items()}
    seconds = [np.abs(np.asarray(tiebreak.get(name, np.zeros(1)))) for name in arrays]
    second = _joined(
        [np.broadcast_to(s.reshape(-1), (n,)) for s, n in zip(seconds, sizes, strict=True)]
        if tiebreak
        else [np.zeros(len(values))]
    )
    order = np.lexsort((second, values))
    count = threshold.count(values[order])
    alive = np.ones(len(values), np.bool_)
    alive[_going(order, owner, sizes, count, floor)] = False
    parts = np.split(alive, np.cumsum(sizes)[:-1])
    return {
        name: part.reshape(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)
    }


def _going(
    order: NDArray[np.intp], owner: NDArray[np.intp], sizes: NDArray[np.int64], count: int, floor: float
) -> NDArray[np.intp]:
    """The first ``count`` positions, in order, of which no tensor loses more than its floor allows.

    Going through the order and skipping what a floor keeps is the same as lowering the others' threshold
    until the count is reached again.
    """
    if floor <= 0:
        return order[:count]
    most = sizes - np.ceil(floor * sizes).astype(np.int64)
    owners = owner[order]
    # A position's rank among its tensor's own, in the order: those under the tensor's most may go.
    by_owner = np.argsort(owners, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[by_owner] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    going: NDArray[np.intp] = order[rank < most[owners]][:count]
    return going


def _joined(parts: list[Numbers]) -> F64:
    return np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)


def _patterned(name: str, array: Numbers, pattern: Pattern) -> Mask:
    if array.ndim == 0 or array.shape[-1] % pattern.of:
        raise OptionError(
            f"tensor {name!r} of shape {list(array.shape)} has no rows of whole groups of {pattern.of}"
        )
    groups = array.reshape(-1, pattern.of)
    mask = np.ones(groups.shape, np.bool_)
    going = np.argsort(groups, axis=1, kind="stable")[:, : pattern.of - pattern.keep]
    np.put_along_axis(mask, going, False, axis=1)
    return mask.reshape(array.shape)


def _below(ascending: F64, value: float) -> int:
    return int(np.searchsorted(ascending, value, side="left"))


def _require_share(what: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise OptionError(f"{what} is {share}, must be from 0 to 1")
