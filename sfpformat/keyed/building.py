"""Builds keyed tables: quantises weights, prunes keys, chooses codes and checks, and solves the equations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import Bytes
from ..coding.codetable import CodeTable
from ..coding.keyed.rows import NO_STEP, RowCode
from ..coding.quantisers import F32, Table, Uniform
from ..container.keyed_map import MAX_CHECK_BITS, MAX_OUTPUTS, KeyedMap
from ..dtypes import DTYPES
from ..encode.level_sources import KINDS, LossyTensor
from ..encode.quantise import F64
from ..engines import Engine
from ..errors import OptionError
from ..options.quantisers import LossyQuantiser
from ..options.quantisers import Table as TableOptions
from ..options.quantisers import Uniform as UniformOptions
from .design import Budget, check_sizes, class_probabilities, table_of
from .encoding import Rows, encode_rows, solve
from .keys import ManyKeys, packed, require_distinct, selected

# The expected error of an unknown key, relative to the mean weight of a key, without a budget.
DEFAULT_ERROR = 0.01
_OVERHEAD = 1.06  # bits of the array for each bit of a row, before it is known
_FITTINGS = 4  # attempts to reach a given size


@dataclass(frozen=True)
class Choices:
    """The choices of a caller; see `KeyedTable.build`."""

    quantiser: LossyQuantiser
    budget: Budget
    bits_per_key: float | None
    keep: int | float | None
    importance_bits: int
    name: str


@dataclass(frozen=True)
class Built:
    """A keyed table in memory.

    Attributes:
        map: its map in the directory.
        bits: its bit array.
        parts: the bits of all rows, by part.
    """

    map: KeyedMap
    bits: Bytes
    parts: dict[str, int]


def checked_choices(
    quantiser: LossyQuantiser,
    false_positive_cost: float | None,
    bits_per_key: float | None,
    expected_error: float | None,
    check_bits: int | None,
    keep: int | float | None,
    importance_bits: int,
    name: str,
) -> Choices:
    """Checks the arguments of `KeyedTable.build`.

    Raises:
        OptionError: an argument is not allowed, or several budgets are given.
    """
    if not isinstance(quantiser, (UniformOptions, TableOptions)):
        raise OptionError(f"quantiser is {quantiser!r}; a keyed table takes Uniform(...) or Table(...)")
    if quantiser.scale is not None or quantiser.weighted is not None:
        raise OptionError("a keyed table has no scale, and does not weight errors; leave them out")
    budgets = {
        "false_positive_cost": false_positive_cost,
        "bits_per_key": bits_per_key,
        "expected_error": expected_error,
        "check_bits": check_bits,
    }
    given = {word: value for word, value in budgets.items() if value is not None}
    if len(given) > 1:
        raise OptionError(f"give at most one of {', '.join(budgets)}; given: {', '.join(given)}")
    for word, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise OptionError(f"{word} is {value!r}, must be a number of at least 0")
    if check_bits is not None and (not isinstance(check_bits, int) or check_bits > MAX_CHECK_BITS):
        raise OptionError(f"check_bits is {check_bits!r}, must be an integer from 0 to {MAX_CHECK_BITS}")
    if not isinstance(importance_bits, int) or not 0 <= importance_bits <= 16:
        raise OptionError(f"importance_bits is {importance_bits!r}, must be an integer from 0 to 16")
    if not isinstance(name, str) or not name:
        raise OptionError(f"the name of a table is {name!r}, must be a string of at least one character")
    budget = Budget(check_bits, false_positive_cost, expected_error)
    return Choices(quantiser, budget, bits_per_key, keep, importance_bits, name)


def build(
    keys: ManyKeys, weights: NDArray[np.floating], importance: F64 | None, choices: Choices, engine: Engine
) -> Built:
    """Builds a table; see `KeyedTable.build`."""
    own = packed(keys)
    require_distinct(own, engine)
    matrix = _matrix(weights, len(own))
    importance = _importance(importance, len(own))
    if importance is None and choices.importance_bits:
        raise OptionError("importance_bits needs the importance of the keys")
    chosen = _kept(matrix, importance, choices.keep)
    if len(chosen) < len(own):
        own, matrix = selected(own, chosen), matrix[chosen]
        importance = None if importance is None else importance[chosen]
    step, centroids, levels, present = _quantised(matrix, choices.quantiser, engine)
    used = np.flatnonzero(present.any(axis=1))
    if len(used) < len(own):
        own, present = selected(own, used), present[used]
        importance = None if importance is None else importance[used]
    del matrix
    importance_step, importances = _importance_levels(importance, choices.importance_bits)
    ends = np.cumsum(np.count_nonzero(present, axis=1), dtype=np.int64)
    rows = Rows(ends, np.nonzero(present)[1].astype(np.int64), levels, importances)
    outputs = present.shape[1]
    bound = 2 * len(centroids) if len(centroids) else 1 << 32
    table = table_of(levels, bound, signed=True)
    code = RowCode(
        outputs,
        _gaps_table(rows, outputs),
        table,
        step,
        centroids,
        bytes(table.classes),
        None if importances is None else table_of(importances, 1 << 31, signed=False),
        importance_step,
    )
    unchecked, overhead = code, _OVERHEAD
    for attempt in range(_FITTINGS):
        code = replace(code, checks=_checks(unchecked, rows, choices, overhead))
        data, sizes = encode_rows(code, rows)
        solved = solve(own, code, data, sizes, engine)
        wanted = choices.bits_per_key
        found_bits = 8 * len(solved.bits)
        if wanted is None or found_bits <= 1.01 * wanted * len(own) or attempt == _FITTINGS - 1:
            break
        overhead *= found_bits / (wanted * len(own))
    found = KeyedMap(
        choices.name, choices.name + ".bits", len(own), solved.seed, solved.segment, solved.starts, code
    )
    return Built(found, solved.bits, _parts(code, rows, sizes, len(solved.bits)))


def _matrix(weights: NDArray[np.floating], keys: int) -> F32:
    """Returns the weights as float32 [n, C]."""
    found = np.asarray(weights)
    if found.dtype.kind not in "fiu":
        raise OptionError(f"the weights have the dtype {found.dtype}, must be numbers")
    if found.ndim == 1:
        found = found[:, None]
    if found.ndim != 2 or len(found) != keys:
        raise OptionError(
            f"weights of shape {list(found.shape)} do not fit {keys} keys: one row for each key"
        )
    if not 1 <= found.shape[1] <= MAX_OUTPUTS:
        raise OptionError(f"a key has {found.shape[1]} weights, must have 1 to {MAX_OUTPUTS}")
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(found, np.float32)
    if not np.isfinite(found).all():
        raise OptionError("a weight is infinite or NaN, or too great for float32")
    return found


def _importance(importance: F64 | None, keys: int) -> F64 | None:
    if importance is None:
        return None
    found = np.asarray(importance, np.float64)
    if found.shape != (keys,) or not np.isfinite(found).all() or (found < 0).any():
        raise OptionError(f"importance must be {keys} finite numbers that are not negative, one for each key")
    return found


def _kept(matrix: F32, importance: F64 | None, keep: int | float | None) -> NDArray[np.int64]:
    """Returns the numbers of the keys to keep, ascending: those of the greatest importance."""
    count = len(matrix)
    if keep is None:
        return np.arange(count)
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not keep >= 0:
        raise OptionError(f"keep is {keep!r}, must be an integer, or a share from 0.0 to 1.0")
    if isinstance(keep, float) and keep > 1:
        raise OptionError(f"keep is {keep}: a share is at most 1.0; give a number of keys as an integer")
    wanted = round(keep * count) if isinstance(keep, float) else keep
    if wanted > count:
        raise OptionError(f"keep is {keep}, but there are only {count} keys")
    scores = np.abs(matrix).max(axis=1).astype(np.float64) if importance is None else importance
    order = np.argsort(-scores, kind="stable")
    return np.sort(order[:wanted])


def _quantised(
    matrix: F32, asked: LossyQuantiser, engine: Engine
) -> tuple[np.float32, F32, NDArray[np.uint64], NDArray[np.bool_]]:
    """Returns step, centroids, the levels of weights that are not zero, and where they are."""
    present = matrix != 0
    flat = matrix[present]
    if not len(flat):
        return NO_STEP, np.zeros(0, np.float32), np.zeros(0, np.uint64), present
    tensor = LossyTensor(flat, DTYPES["F32"], None, None, None, None, engine)
    kind = KINDS[asked.NAME]
    source = kind.source(tensor, asked, fixed_width=False)
    if source is None:
        raise OptionError(kind.why_none(asked))
    levels = source.levels(slice(0, len(flat)), None).astype(np.uint64)
    centroids = np.zeros(0, np.float32) if source.centroids is None else source.centroids
    if isinstance(source.quantiser, Table):
        return NO_STEP, centroids, levels, present
    assert isinstance(source.quantiser, Uniform)
    alive = levels > 1  # without zeros of either sign
    present[present] = alive
    return source.quantiser.step, centroids, levels[alive], present


def _importance_levels(importance: F64 | None, bits: int) -> tuple[np.float32, NDArray[np.uint64] | None]:
    """Returns step and levels of stored importances."""
    if importance is None or not bits:
        return NO_STEP, None
    greatest = float(importance.max(initial=0)) or 1.0
    step = np.float32(greatest / ((1 << bits) - 1))
    if not 0 < step < np.inf:
        raise OptionError("the importances are too great or too small for float32")
    return step, np.floor(importance / step + 0.5).astype(np.uint64)


def _gaps_table(rows: Rows, outputs: int) -> CodeTable | None:
    if outputs == 1:
        return None
    before, last = rows.gaps(outputs)
    gaps = np.concatenate((before, last[~rows.is_full(outputs)])) if len(rows.ends) else before
    return table_of(gaps, outputs + 1, signed=False)


def _checks(code: RowCode, rows: Rows, choices: Choices, overhead: float) -> bytes:
    """Returns the number of check bits of each class.

    ``overhead`` is the expected size of the array, in bits for each bit of a row.
    """
    starts = rows.starts
    if not len(starts):  # no keys: every key is unknown
        return bytes([choices.budget.check_bits or 0]) * code.levels.classes
    greatest = np.maximum.reduceat(code.levels.class_of(rows.levels), starts)
    sums = np.add.reduceat(np.abs(code.weights_of(rows.levels)).astype(np.float64), starts)
    count = np.bincount(greatest, minlength=code.levels.classes)
    harm = np.bincount(greatest, sums, minlength=code.levels.classes) / np.maximum(count, 1)
    # A class that no key has as its greatest: its own weight, at least.
    alone = np.abs(code.weights_of(code.levels.first)).astype(np.float64)
    harm = np.where(count > 0, harm, alone)
    budget = choices.budget
    bits = _bits_without_checks(code, rows)
    if choices.bits_per_key is not None:
        budget = Budget(total_bits=choices.bits_per_key * len(starts) / overhead)
        if bits > (budget.total_bits or 0):
            words = f"the weights alone take {bits * overhead / len(starts):.2f} bits per key"
            raise OptionError(
                f"{words}, more than bits_per_key; use fewer quantisation levels, or keep fewer keys"
            )
    elif budget == Budget():
        budget = Budget(expected_error=DEFAULT_ERROR * float(np.cumsum(sums)[-1]) / len(starts))
    return check_sizes(class_probabilities(code), harm, count, bits, budget)


def _bits_without_checks(code: RowCode, rows: Rows) -> int:
    """Returns the bits of all rows without their checks."""
    bits = _bits_of(code.levels, rows.levels)
    if code.gaps is not None:
        before, last = rows.gaps(code.outputs)
        bits += _bits_of(code.gaps, before) + _bits_of(code.gaps, last[~rows.is_full(code.outputs)])
    if code.importance is not None and rows.importance is not None:
        bits += _bits_of(code.importance, rows.importance)
    return bits


def _parts(code: RowCode, rows: Rows, sizes: NDArray[np.int64], array: int) -> dict[str, int]:
    """Returns the bits of the parts of all rows."""
    total = int(sizes.sum())
    checks = 0
    if len(rows.ends):
        greatest = np.maximum.reduceat(code.levels.class_of(rows.levels), rows.starts)
        checks = int(np.frombuffer(code.checks, np.uint8)[greatest].sum(dtype=np.int64))
    weights = int(_bits_of(code.levels, rows.levels))
    importance = 0
    if code.importance is not None and rows.importance is not None:
        importance = int(_bits_of(code.importance, rows.importance))
    return {
        "weights": weights,
        "gaps": total - checks - weights - importance,
        "checks": checks,
        "importance": importance,
        "equations": 8 * array - total,
    }


def _bits_of(table: CodeTable, levels: NDArray[np.uint64]) -> int:
    classes = table.class_of(levels)
    lengths = table.codes[0].length if table.codes else bytes(table.classes)
    each = np.frombuffer(lengths, np.uint8).astype(np.int64) + table.class_extra
    return int(each[classes].sum())
