"""Grades: importances as a few whole numbers in the same order, which take little space. Needs only numpy.

Only the order of importances decides which weights a threshold prunes. A grade is therefore a range of ranks
over all tensors: at any sparsity the weights of grade 0 are pruned first, then those of grade 1. Weights of
one grade are ordered by magnitude, which the file has anyway. At a sparsity that equals a boundary, grades
and importances prune the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import OptionError
from ..options import ImportanceOptions
from .thresholds import Numbers, count_of_share

# Sixteen grades, finer at the usual sparsities: about 3.5 bits per weight in a file.
BOUNDARIES = (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.875, 0.9, 0.925, 0.95, 0.975)


def graded(
    importances: Mapping[str, Numbers], boundaries: Sequence[float] = BOUNDARIES
) -> dict[str, NDArray[np.float32]]:
    """Returns the grade of each position over all tensors: whole numbers from 0 to len(boundaries), float32.

    Args:
        importances: tensor name -> finite numbers of any shape.
        boundaries: the shares of all positions below grade 1, 2, …, ascending.

    Example: ``graded({"w": np.arange(10.0)}, (0.5, 0.9))`` returns the grade 0 for the five lowest
    importances, 1 for the next four, and 2 for the highest.

    Raises:
        OptionError: the boundaries do not ascend from 0 to 1, or an importance is not finite.
    """
    shares = np.asarray(boundaries, np.float64)
    if not len(shares) or (np.diff(shares) <= 0).any() or not 0 < shares[0] <= shares[-1] < 1:
        raise OptionError("boundaries must be between 0 and 1, in ascending order")
    for name, array in importances.items():
        if not np.isfinite(array).all():
            raise OptionError(f"the importance of {name!r} has numbers that are not finite")
    flat = np.concatenate([np.asarray(array).reshape(-1) for array in importances.values()])
    if flat.dtype != np.float32:
        flat = flat.astype(np.float64)
    grades = _grades_of(flat, [count_of_share(share, len(flat)) for share in shares])
    parts = np.split(grades, np.cumsum([array.size for array in importances.values()])[:-1])
    return {
        name: part.reshape(array.shape)
        for (name, array), part in zip(importances.items(), parts, strict=True)
    }


def _grades_of(flat: Numbers, cuts: Sequence[int]) -> NDArray[np.float32]:
    """Returns for each number how many of the cuts its rank reaches; equal numbers rank by position.

    Only numbers that are equal to the one at a cut need their rank, and to sort takes much less time than to
    find all ranks.
    """
    ordered = np.sort(flat)
    at = ordered[[cut for cut in cuts if cut < len(flat)]]
    grades = np.searchsorted(at, flat, side="right").astype(np.float32)
    for value in np.unique(at):
        equal = np.flatnonzero(flat == value)
        ranks = np.searchsorted(ordered, value) + np.arange(len(equal))
        grades[equal] = np.searchsorted(cuts, ranks, side="right")
    return grades


def options_for_grades(grades: int = len(BOUNDARIES) + 1, over: str = "survivors") -> ImportanceOptions:
    """Returns the options with which a file stores grades.

    If a tensor contains the highest grade, its grades are stored exactly. Otherwise the stored numbers differ
    from the grades by less than half, and have the same order.

    Args:
        grades: the number of grades.
        over: ``survivors``, or ``all`` to store the grades of pruned positions too.
    """
    return ImportanceOptions(over=over, bits=max((grades - 1).bit_length(), 1))
