"""Thresholds found from the distribution of importances, and the masks that they give. Numpy alone.

Rules: a threshold is a rule that looks at importances in ascending order and says how many go. So exact
targets and cuts found in the curve are one kind of thing, and ties are settled in one place: of equal
importances those of least ``tiebreak`` go first, then the first in the order of tensors and positions.

An N:M pattern looks at groups of consecutive inputs of each output, as sparse tensor cores read them: along
the rows of a matrix, and along the input channels of a kernel for each output channel and kernel position
(as NVIDIA's ASP lays them out). Tensors whose inputs do not divide into groups have no mask.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..coding.mask import Mask
from ..errors import OptionError, warn
from ..names import MOST_LISTED, require_known, require_matches

Numbers = NDArray[np.floating]
F64 = NDArray[np.float64]

# The dimension of a tensor's inputs, and in how many separate groups of equal size they lie.
Along = tuple[int, int]

SCOPES = ("model", "tensor", "row")

# A tensor of rank 3 with more in its last dimension is no kernel of a convolution but a stack of matrices.
_LONGEST_KERNEL = 128


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
        require_share("sparsity", self.share)

    def count(self, ascending: F64) -> int:
        return self.count_of(len(ascending))

    def count_of(self, positions: int) -> int:
        """How many of so many positions go."""
        return min(math.floor(self.share * positions + 0.5), positions)


@dataclass(frozen=True)
class Quantile:
    """What lies under the quantile goes: as `Sparsity`, but of equal importances all or none."""

    share: float

    def __post_init__(self) -> None:
        require_share("quantile", self.share)

    def count(self, ascending: F64) -> int:
        return _below(ascending, float(np.quantile(ascending, self.share)))


@dataclass(frozen=True)
class MeanSigma:
    """What lies under mean − k · standard deviation goes."""

    k: float

    def __post_init__(self) -> None:
        if not _is_number(self.k) or not math.isfinite(self.k):
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
    """The ``keep`` greatest of every ``of`` consecutive inputs of an output stay, as in 2:4.

    Of equal importances those of greatest ``tiebreak`` stay, then the last.
    """

    keep: int
    of: int

    def __post_init__(self) -> None:
        whole = all(isinstance(n, numbers.Integral) for n in (self.keep, self.of))
        if not whole or not 0 < self.keep < self.of:
            raise OptionError(f"a pattern keeps some of its positions, not {self.keep} of {self.of}")

    def why_not(self, shape: Sequence[int], along: Along) -> str:
        """Why the pattern does not fit a tensor, in words; empty where it does."""
        dim, groups = along
        if not 0 <= dim < len(shape):
            return f"its shape {list(shape)} has no dimension {dim}"
        inputs = shape[dim] // groups
        if inputs % self.of or not inputs:
            within = f" in each of {groups} groups" if groups > 1 else ""
            return (
                f"its shape {list(shape)} has {inputs:,} inputs along dimension {dim}{within}, "
                f"which are no whole groups of {self.of}"
            )
        return ""


def pattern_dim(shape: Sequence[int]) -> int:
    """The dimension of a tensor's inputs, as far as its shape tells.

    The last one of a matrix [outputs, inputs] and of a vector, dimension 1 of a kernel [outputs, inputs, …].
    A tensor of rank 3 whose last dimension is greater than 128 is taken for a stack of matrices
    [matrices, outputs, inputs].
    """
    if len(shape) == 3 and shape[2] > _LONGEST_KERNEL:
        return 2
    return 1 if len(shape) > 1 else 0


@runtime_checkable
class Allocation(Protocol):
    """How much each tensor loses; within it, or within each of its rows, the least importances go."""

    def shares(self, importances: Mapping[str, Numbers]) -> dict[str, float]:
        """The sparsity of each tensor, from 0 to 1, by name.

        Args:
            importances: finite, by name, in the order of the model's layers.
        """


def masks_of(
    importances: Mapping[str, Numbers],
    threshold: Threshold | Pattern | Allocation | float,
    *,
    scope: str = "model",
    exempt: str | Sequence[str] = (),
    floor: float = 0.0,
    tiebreak: Mapping[str, Numbers] | None = None,
    along: Mapping[str, Along] | None = None,
) -> dict[str, Mask]:
    """The masks that a threshold gives: bool, True for survivors, of each importance's shape.

    Args:
        importances: tensor name -> finite numbers of any shape; greater ones matter more.
        threshold: the rule; a number is the share of a `Sparsity`.
        scope: ``model`` for one threshold over all tensors, ``tensor`` for one in each, or ``row`` for one in
            each row, which are the positions of one index in the first dimension, and in a stack of matrices
            the rows of each. An `Allocation` has a threshold in each tensor or row.
        exempt: patterns of names (as a shell's) that are not pruned; they have no part in the distribution
            and no mask.
        floor: the share of its positions that each tensor keeps at least, or each row, where that is the
            scope. Over the model, what the floor keeps is pruned elsewhere instead, so that the whole loses
            as many as without.
        tiebreak: numbers by name that settle equal importances, such as magnitudes, of any shape with one
            number or as many as the importance has.
        along: where a `Pattern` runs, by name; of others, along `pattern_dim`.

    Warns: a `Pattern` does not fit some tensors, which have no mask then; the floor keeps more than the
    threshold leaves.

    Memory: about 40 bytes a position of what shares a threshold; of a `Sparsity` without a floor about 16.

    Raises:
        OptionError: there are no importances, or none that is not exempt; they are not finite; a name in
            ``exempt``, ``tiebreak`` or ``along`` matches none; a scope, share or threshold that is none; a
            pattern that fits no tensor.
    """
    rule = _rule(threshold)
    if scope not in SCOPES:
        raise OptionError(f"scope is {scope!r}, must be one of {', '.join(SCOPES)}")
    require_share("floor", floor)
    if not importances:
        raise OptionError("there are no importances: nothing would be pruned")
    patterns = (exempt,) if isinstance(exempt, str) else tuple(exempt)
    require_matches(patterns, importances, "exempt")
    for argument, given in (("tiebreak", tiebreak), ("along", along)):
        require_known(given or {}, importances, argument)
    chosen = {
        name: _finite(name, array)
        for name, array in importances.items()
        if not any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not chosen:
        raise OptionError("all tensors are exempt: nothing would be pruned")
    ties = {name: _ties(name, (tiebreak or {}).get(name), array.size) for name, array in chosen.items()}
    if isinstance(rule, Pattern):
        if floor > rule.keep / rule.of:
            raise OptionError(f"floor is {floor}, but {rule.keep}:{rule.of} keeps {rule.keep / rule.of:.3g}")
        return _patterned(chosen, rule, along or {}, ties)
    rules: dict[str, Threshold]
    if isinstance(rule, Allocation):
        if scope == "model":
            raise OptionError(f"{rule!r} gives each tensor its own sparsity: take the scope tensor or row")
        rules = {name: Sparsity(share) for name, share in rule.shares(chosen).items()}
    else:
        rules = dict.fromkeys(chosen, rule)
    if scope == "row":
        return {name: _rows_masked(array, rules[name], floor, ties[name]) for name, array in chosen.items()}
    groups = [list(chosen)] if scope == "model" else [[name] for name in chosen]
    out: dict[str, Mask] = {}
    for names in groups:
        out |= _masks_of_group({name: chosen[name] for name in names}, rules[names[0]], floor, ties)
    return out


def _rule(threshold: Any) -> Threshold | Pattern | Allocation:
    if _is_number(threshold):
        return Sparsity(float(threshold))
    if isinstance(threshold, type):
        raise OptionError(f"the threshold is the class {threshold.__name__}; give {threshold.__name__}(…)")
    if isinstance(threshold, Allocation):
        return threshold
    # Strings and sequences have a method of this name, which counts something else.
    countable = callable(getattr(threshold, "count", None)) and not isinstance(
        threshold, (str, bytes, Sequence)
    )
    if not isinstance(threshold, Pattern) and not countable:
        raise OptionError(
            f"the threshold is {threshold!r}; give a share such as 0.5, Pattern(2, 4), or another of "
            "sfpformat.pruning"
        )
    checked: Threshold | Pattern = threshold
    return checked


def _finite(name: str, array: Numbers) -> Numbers:
    """An importance as an array.

    Raises:
        OptionError: it is not finite everywhere.
    """
    found = np.asarray(array)
    try:
        finite = bool(np.isfinite(found).all())
    except TypeError:
        raise OptionError(f"the importance of {name!r} is no array of numbers") from None
    if not finite:
        raise OptionError(f"the importance of {name!r} is not finite everywhere")
    return found


def _ties(name: str, given: Numbers | None, size: int) -> F64 | None:
    """What settles equal importances of a tensor, float64 [size]; None where nothing does."""
    if given is None:
        return None
    numbers = np.abs(np.asarray(given)).reshape(-1)
    if len(numbers) not in (1, size):
        raise OptionError(f"the tiebreak of {name!r} has {len(numbers):,} numbers, the importance {size:,}")
    return np.broadcast_to(numbers.astype(np.float64), (size,))


def achieved(masks: Mapping[str, Mask]) -> float:
    """The share of positions that masks prune; 0 of none."""
    positions = sum(mask.size for mask in masks.values())
    kept = sum(int(np.count_nonzero(mask)) for mask in masks.values())
    return 1 - kept / positions if positions else 0.0


def _rows_masked(array: Numbers, threshold: Threshold, floor: float, ties: F64 | None) -> Mask:
    """The mask of a tensor whose rows have a threshold each."""
    if not array.size:
        return np.ones(array.shape, np.bool_)
    stacked = array.ndim > 2 and pattern_dim(array.shape) == 2
    if not array.ndim:
        return _rows_masked(array.reshape(1), threshold, floor, ties).reshape(())
    shape = (-1, array.shape[-1]) if stacked or array.ndim < 2 else (array.shape[0], -1)
    rows = array.reshape(shape)
    width = rows.shape[1]
    most = width - math.ceil(floor * width)
    mask = np.ones(rows.shape, np.bool_)
    if type(threshold) is Sparsity:
        count = threshold.count_of(width)
        fewer = len(rows) if count > most else 0
        count = min(count, most)
        if count:
            np.greater(rows, np.partition(rows, count - 1, axis=-1)[:, count - 1 : count], out=mask)
        # Where several importances equal the last one to go, more went than are to go.
        left = [(int(row), count) for row in np.flatnonzero((~mask).sum(1) > count)]
    else:
        counts = [_counted(threshold, row) for row in np.sort(rows.astype(np.float64), axis=-1)]
        fewer = sum(count > most for count in counts)
        left = [(row, min(count, most)) for row, count in enumerate(counts)]
    second = np.zeros(rows.shape) if ties is None else ties.reshape(rows.shape)
    for row, count in left:
        mask[row] = True
        mask[row, np.lexsort((second[row], rows[row]))[:count]] = False
    if fewer:
        warn(f"the floor {floor} keeps more than the threshold leaves, in {fewer:,} of {len(rows):,} rows")
    return mask.reshape(array.shape)


def _counted(threshold: Threshold, ascending: F64) -> int:
    """How many go.

    Raises:
        OptionError: the threshold gives no number of them.
    """
    count = threshold.count(ascending)
    if not isinstance(count, numbers.Integral) or not 0 <= count <= len(ascending):
        raise OptionError(f"{threshold!r} prunes {count!r} of {len(ascending):,} positions")
    return int(count)


def _masks_of_group(
    arrays: Mapping[str, Numbers], threshold: Threshold, floor: float, ties: Mapping[str, F64 | None]
) -> dict[str, Mask]:
    """The masks of tensors that share a threshold."""
    if type(threshold) is Sparsity and floor <= 0:
        return _least_masked(arrays, threshold, ties)
    sizes = np.array([array.size for array in arrays.values()], np.int64)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    values = _joined([array.reshape(-1) for array in arrays.values()])
    if not len(values):
        return {name: np.ones(array.shape, np.bool_) for name, array in arrays.items()}
    order = np.lexsort((_seconds(arrays, ties), values))
    count = _counted(threshold, values[order])
    going = _going(order, owner, sizes, count, floor)
    if len(going) < count:
        warn(
            f"the floor {floor} keeps more than the threshold leaves: {len(going):,} positions are pruned, "
            f"not {count:,}"
        )
    alive = np.ones(len(values), np.bool_)
    alive[going] = False
    parts = np.split(alive, np.cumsum(sizes)[:-1])
    return {
        name: part.reshape(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)
    }


def _least_masked(
    arrays: Mapping[str, Numbers], threshold: Sparsity, ties: Mapping[str, F64 | None]
) -> dict[str, Mask]:
    """The masks without so many of the least importances, as by a sort of all, but without sorting."""
    total = sum(array.size for array in arrays.values())
    count = threshold.count_of(total)
    if not count:
        return {name: np.ones(array.shape, np.bool_) for name, array in arrays.items()}
    joined = np.concatenate([array.reshape(-1) for array in arrays.values()])
    joined.partition(count - 1)
    last = joined[count - 1]
    left = count - int(np.count_nonzero(joined < last))
    del joined
    masks = {
        name: np.greater(array, last, out=np.empty(array.shape, np.bool_)) for name, array in arrays.items()
    }
    # Of importances that equal the last one to go, those with the least ties go, and the first of these.
    equal = {name: np.flatnonzero(array == last) for name, array in arrays.items()}
    seconds = _joined(
        [
            np.zeros(len(places)) if (tie := ties[name]) is None else tie[places]
            for name, places in equal.items()
        ]
    )
    stays = np.ones(len(seconds), np.bool_)
    stays[np.argsort(seconds, kind="stable")[:left]] = False
    parts = np.split(stays, np.cumsum([len(places) for places in equal.values()])[:-1])
    for (name, places), part in zip(equal.items(), parts, strict=True):
        masks[name].reshape(-1)[places] = part
    return masks


def _seconds(arrays: Mapping[str, Numbers], ties: Mapping[str, F64 | None]) -> F64:
    """What settles equal importances of several tensors, one after the other; 0 where nothing does."""
    found = {name: ties[name] for name in arrays}
    return _joined(
        [np.zeros(array.size) if (tie := found[name]) is None else tie for name, array in arrays.items()]
    )


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


def _patterned(
    arrays: Mapping[str, Numbers],
    pattern: Pattern,
    along: Mapping[str, Along],
    ties: Mapping[str, F64 | None],
) -> dict[str, Mask]:
    """The masks of the tensors that a pattern fits; warns of the others."""
    where = {name: along.get(name, (pattern_dim(array.shape), 1)) for name, array in arrays.items()}
    left = {name: pattern.why_not(array.shape, where[name]) for name, array in arrays.items()}
    left = {name: reason for name, reason in left.items() if reason}
    if left:
        words = f"{pattern.keep}:{pattern.of} does not fit {reasons(left)}"
        if len(left) == len(arrays):
            raise OptionError(f"{words}: nothing would be pruned")
        warn(f"{words}: left as they are")
    return {
        name: _pattern_mask(array, pattern, where[name][0], ties[name])
        for name, array in arrays.items()
        if name not in left
    }


def _pattern_mask(array: Numbers, pattern: Pattern, dim: int, ties: F64 | None) -> Mask:
    if not array.size:
        return np.ones(array.shape, np.bool_)
    # [what is before, groups, members of a group, what is after]
    shape = (math.prod(array.shape[:dim]), -1, pattern.of, math.prod(array.shape[dim + 1 :]))
    groups = array.reshape(shape)
    if ties is None:
        order = np.argsort(groups, axis=2, kind="stable")
    else:
        order = np.lexsort((ties.reshape(shape), groups), axis=2)
    mask = np.ones(groups.shape, np.bool_)
    np.put_along_axis(mask, order[:, :, : pattern.of - pattern.keep], False, axis=2)
    return mask.reshape(array.shape)


def reasons(left: Mapping[str, str]) -> str:
    """Tensors with the reason why each is left as it is, for a message."""
    words = [f"{name!r} ({reason})" for name, reason in list(left.items())[:MOST_LISTED]]
    more = f" and {len(left) - MOST_LISTED:,} more" if len(left) > MOST_LISTED else ""
    return ", ".join(words) + more


def _below(ascending: F64, value: float) -> int:
    return int(np.searchsorted(ascending, value, side="left"))


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def require_share(what: str, share: Any) -> None:
    """Refuses what is no share.

    Raises:
        OptionError: it is no number from 0 to 1.
    """
    if not _is_number(share) or not 0 <= share <= 1:
        raise OptionError(f"{what} is {share!r}, must be a number from 0 to 1")
