"""Masks from importances and a threshold. Needs only numpy.

Rules: ties are resolved in one place: of equal importances, those with the least ``tiebreak`` are pruned
first, then the first in the order of tensors and positions.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..coding.mask import Mask
from ..errors import OptionError, warn
from ..names import MOST_LISTED, require_known, require_matches
from ..options.checks import is_number
from .thresholds import (
    F64,
    Allocation,
    Along,
    Numbers,
    Pattern,
    Sparsity,
    Threshold,
    count_of_share,
    pattern_dim,
    require_share,
)

SCOPES = ("model", "tensor", "row")


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
    """Computes masks from importances: bool, True for survivors, of each importance's shape.

    Example: ``masks_of({"w": np.array([3.0, 1.0, 2.0, 4.0])}, 0.5)`` returns the mask ``[True, False, False,
    True]`` for ``w``.

    Args:
        importances: tensor name -> finite numbers of any shape; greater means more important.
        threshold: the rule; a number is the share of a `Sparsity`.
        scope: ``model`` for one threshold over all tensors, ``tensor`` for one in each tensor, or ``row`` for
            one in each row. A row is one index of the first dimension; in a stack of matrices, a row of each
            matrix. An `Allocation` needs ``tensor`` or ``row``.
        exempt: shell-style patterns of names that are not pruned. These tensors are not part of the
            distribution and get no mask.
        floor: the minimum share of positions that each tensor keeps; with scope ``row``, each row. With scope
            ``model``, other positions are pruned instead, so that the total stays the same.
        tiebreak: numbers by name that order equal importances, such as magnitudes: one number, or as many as
            the importance has, in any shape. Signs are ignored.
        along: the inputs along which a `Pattern` runs, by name; for other names, `pattern_dim`.

    Warns: a `Pattern` does not fit some tensors, which then get no mask; or the floor keeps more than the
    threshold would.

    Memory: about 40 bytes for each position that shares a threshold; about 16 for a `Sparsity` without a
    floor.

    Raises:
        OptionError: there are no importances, or all are exempt; they are not finite; a name in ``exempt``,
            ``tiebreak`` or ``along`` matches nothing; the scope, floor or threshold is invalid; or a pattern
            fits no tensor.
    """
    rule = rule_of(threshold)
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
            raise OptionError(
                f"floor is {floor}, must be at most the share that {rule.keep}:{rule.of} keeps, "
                f"{rule.keep / rule.of:.3g}"
            )
        return _patterned(chosen, rule, along or {}, ties)
    rules: dict[str, Threshold]
    if isinstance(rule, Allocation):
        if scope == "model":
            raise OptionError(f"{rule!r} gives each tensor its own sparsity; use the scope tensor or row")
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


def rule_of(threshold: Any) -> Threshold | Pattern | Allocation:
    """Returns a caller's threshold as a rule; a number is the share of a `Sparsity`.

    Raises:
        OptionError: it is no threshold.
    """
    if is_number(threshold):
        return Sparsity(float(threshold))
    if isinstance(threshold, type):
        raise OptionError(f"the threshold is the class {threshold.__name__}; give {threshold.__name__}(…)")
    if isinstance(threshold, Allocation):
        return threshold
    # Strings and sequences have an unrelated method of this name.
    countable = callable(getattr(threshold, "count", None)) and not isinstance(
        threshold, (str, bytes, Sequence)
    )
    if not isinstance(threshold, Pattern) and not countable:
        raise OptionError(
            f"the threshold is {threshold!r}; give a share such as 0.5, Pattern(2, 4), or another threshold "
            "of sfpformat.pruning"
        )
    checked: Threshold | Pattern = threshold
    return checked


def _finite(name: str, array: Numbers) -> Numbers:
    """Returns an importance as an array.

    Raises:
        OptionError: the importance is not an array of finite numbers.
    """
    found = np.asarray(array)
    try:
        finite = bool(np.isfinite(found).all())
    except TypeError:
        raise OptionError(f"the importance of {name!r} is not an array of numbers") from None
    if not finite:
        raise OptionError(f"the importance of {name!r} has numbers that are not finite")
    return found


def _ties(name: str, given: Numbers | None, size: int) -> F64 | None:
    """Returns the tiebreak of a tensor, float64 [size]; None if there is none."""
    if given is None:
        return None
    numbers = np.abs(np.asarray(given)).reshape(-1)
    if len(numbers) not in (1, size):
        raise OptionError(
            f"the tiebreak of {name!r} has {len(numbers):,} numbers, must have 1, or as many as the "
            f"importance: {size:,}"
        )
    return np.broadcast_to(numbers.astype(np.float64), (size,))


def achieved(masks: Mapping[str, Mask]) -> float:
    """Returns the share of positions that masks prune; 0 if there are no positions."""
    positions = sum(mask.size for mask in masks.values())
    kept = sum(int(np.count_nonzero(mask)) for mask in masks.values())
    return 1 - kept / positions if positions else 0.0


def _rows_masked(array: Numbers, threshold: Threshold, floor: float, ties: F64 | None) -> Mask:
    """Returns the mask of a tensor with a threshold in each row."""
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
        count = count_of_share(threshold.share, width)
        fewer = len(rows) if count > most else 0
        count = min(count, most)
        if count:
            np.greater(rows, np.partition(rows, count - 1, axis=-1)[:, count - 1 : count], out=mask)
        # If several importances equal the last pruned one, too many are pruned so far.
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
        warn(
            f"in {fewer:,} of {len(rows):,} rows, the floor {floor} keeps more positions than the threshold "
            "would"
        )
    return mask.reshape(array.shape)


def _counted(threshold: Threshold, ascending: F64) -> int:
    """Returns the number of importances that the threshold prunes.

    Raises:
        OptionError: the threshold returns something other than a number from 0 to len(ascending).
    """
    count = threshold.count(ascending)
    if not isinstance(count, numbers.Integral) or not 0 <= count <= len(ascending):
        raise OptionError(
            f"{threshold!r} prunes {count!r} of {len(ascending):,} positions; its count must return a whole "
            "number in this range"
        )
    return int(count)


def _masks_of_group(
    arrays: Mapping[str, Numbers], threshold: Threshold, floor: float, ties: Mapping[str, F64 | None]
) -> dict[str, Mask]:
    """Returns the masks of tensors that share a threshold."""
    if type(threshold) is Sparsity and floor <= 0:
        return _least_masked(arrays, threshold, ties)
    sizes = np.array([array.size for array in arrays.values()], np.int64)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    values = _joined([array.reshape(-1) for array in arrays.values()])
    if not len(values):
        return {name: np.ones(array.shape, np.bool_) for name, array in arrays.items()}
    order = np.lexsort((_seconds(arrays, ties), values))
    count = _counted(threshold, values[order])
    pruned = _to_prune(order, owner, sizes, count, floor)
    if len(pruned) < count:
        warn(
            f"the floor {floor} keeps more positions than the threshold would: it allows {len(pruned):,} "
            f"pruned positions, not {count:,}"
        )
    alive = np.ones(len(values), np.bool_)
    alive[pruned] = False
    parts = np.split(alive, np.cumsum(sizes)[:-1])
    return {
        name: part.reshape(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)
    }


def _least_masked(
    arrays: Mapping[str, Numbers], threshold: Sparsity, ties: Mapping[str, F64 | None]
) -> dict[str, Mask]:
    """Returns the masks that prune the lowest importances; same result as sorting, but by partition."""
    total = sum(array.size for array in arrays.values())
    count = count_of_share(threshold.share, total)
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
    # Of importances equal to the last pruned one, prune those with the least tiebreak, then the first ones.
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
    """Returns the tiebreaks of several tensors, concatenated; 0 for tensors without one."""
    found = {name: ties[name] for name in arrays}
    return _joined(
        [np.zeros(array.size) if (tie := found[name]) is None else tie for name, array in arrays.items()]
    )


def _to_prune(
    order: NDArray[np.intp], owner: NDArray[np.intp], sizes: NDArray[np.int64], count: int, floor: float
) -> NDArray[np.intp]:
    """Returns the first ``count`` positions in order, without those that the tensors' floors keep.

    Skipping the positions that a floor keeps is equivalent to raising the threshold of the other tensors
    until the count is reached again.
    """
    if floor <= 0:
        return order[:count]
    most = sizes - np.ceil(floor * sizes).astype(np.int64)
    owners = owner[order]
    # The rank of a position within its tensor, in the order; ranks below the tensor's maximum can be pruned.
    by_owner = np.argsort(owners, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[by_owner] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    pruned: NDArray[np.intp] = order[rank < most[owners]][:count]
    return pruned


def _joined(parts: list[Numbers]) -> F64:
    return np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)


def _patterned(
    arrays: Mapping[str, Numbers],
    pattern: Pattern,
    along: Mapping[str, Along],
    ties: Mapping[str, F64 | None],
) -> dict[str, Mask]:
    """Returns the masks of the tensors that a pattern fits; warns about the others."""
    where = {name: along.get(name, (pattern_dim(array.shape), 1)) for name, array in arrays.items()}
    left = unfit(pattern, {name: (array.shape, where[name]) for name, array in arrays.items()})
    return {
        name: _pattern_mask(array, pattern, where[name][0], ties[name])
        for name, array in arrays.items()
        if name not in left
    }


def unfit(pattern: Pattern, tensors: Mapping[str, tuple[Sequence[int], Along]]) -> set[str]:
    """Returns the names of the tensors that a pattern does not fit, after a warning about them.

    Args:
        pattern: the pattern.
        tensors: name -> shape, and the inputs along which the pattern runs.

    Raises:
        OptionError: the pattern fits no tensor.
    """
    left = {name: pattern.why_not(shape, along) for name, (shape, along) in tensors.items()}
    left = {name: reason for name, reason in left.items() if reason}
    if left:
        words = f"{pattern.keep}:{pattern.of} does not fit {reasons(left)}"
        if len(left) == len(tensors):
            raise OptionError(f"{words}: nothing would be pruned")
        warn(f"{words}: these tensors are not pruned")
    return set(left)


def _pattern_mask(array: Numbers, pattern: Pattern, dim: int, ties: F64 | None) -> Mask:
    if not array.size:
        return np.ones(array.shape, np.bool_)
    # [dimensions before, groups, members of a group, dimensions after]
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
    """Formats tensor names with the reason why each is not pruned, for a message."""
    words = [f"{name!r} ({reason})" for name, reason in list(left.items())[:MOST_LISTED]]
    more = f" and {len(left) - MOST_LISTED:,} more" if len(left) > MOST_LISTED else ""
    return ", ".join(words) + more
