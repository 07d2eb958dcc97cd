"""Thresholds: rules for how many of the importances are pruned. Needs only numpy.

Rules: a threshold takes importances in ascending order and returns how many to prune: an exact share, or a
number that depends on the distribution of the importances. `masks.masks_of` applies it.

An N:M pattern applies to groups of consecutive inputs of each output, as sparse tensor cores read them: along
the rows of a matrix, and along the input channels of a kernel for each output channel and kernel position
(the layout of NVIDIA's ASP). Tensors whose inputs do not divide into groups get no mask.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..errors import OptionError
from ..options.checks import is_number

Numbers = NDArray[np.floating]
F64 = NDArray[np.float64]

# The dimension of a tensor's inputs, and the number of independent groups of equal size that they form.
Along = tuple[int, int]

# A tensor of rank 3 with a larger last dimension is a stack of matrices, not a convolution kernel.
_LONGEST_KERNEL = 128


class Threshold(Protocol):
    """A rule for the number of importances to prune."""

    def count(self, ascending: F64) -> int:
        """Returns how many of the lowest importances to prune.

        Args:
            ascending: the importances, float64 [n], n > 0, ascending.
        """


def count_of_share(share: float, positions: int) -> int:
    """Returns the number of positions in a share of them, rounded to the nearest whole number, halves up.

    All pruning by a share uses this rule, so that every method prunes the same number of weights.

    Args:
        share: from 0 to 1.
        positions: at least 0.
    """
    return min(math.floor(share * positions + 0.5), positions)


@dataclass(frozen=True)
class Sparsity:
    """Prunes the given share of all positions, rounded by `count_of_share`."""

    share: float

    def __post_init__(self) -> None:
        require_share("sparsity", self.share)

    def count(self, ascending: F64) -> int:
        return count_of_share(self.share, len(ascending))


@dataclass(frozen=True)
class Quantile:
    """Prunes importances below a quantile: like `Sparsity`, but prunes all of equal importances, or none."""

    share: float

    def __post_init__(self) -> None:
        require_share("quantile", self.share)

    def count(self, ascending: F64) -> int:
        return _below(ascending, float(np.quantile(ascending, self.share)))


@dataclass(frozen=True)
class MeanSigma:
    """Prunes importances below mean − k · standard deviation."""

    k: float

    def __post_init__(self) -> None:
        if not is_number(self.k) or not math.isfinite(self.k):
            raise OptionError(f"k is {self.k}, must be finite")

    def count(self, ascending: F64) -> int:
        return _below(ascending, float(ascending.mean() - self.k * ascending.std()))


@dataclass(frozen=True)
class Otsu:
    """Prunes the lower of two classes, with the greatest variance between the classes (Otsu, 1979). All cuts
    are compared, without a histogram.

    Attributes:
        log: whether to use logarithms, for importances that span many powers of ten. Importances that are not
            positive are then pruned and do not enter the variance.
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
        # With mean 0, the variance between the classes is sums² · n / (below · above).
        between = sums**2 / (below * (len(values) - below))
        between[values[1:] == values[:-1]] = -1.0  # no cut between equal importances
        return zeros + int(np.argmax(between)) + 1


@dataclass(frozen=True)
class Knee:
    """Prunes importances before the knee: the point of the sorted curve that is farthest below its chord.

    Usually there are many small importances and a few large ones, so that the curve rises late.
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
    """Keeps the ``keep`` greatest of every ``of`` consecutive inputs of an output, as in 2:4 sparsity.

    Example: ``prune(model, importances, Pattern(2, 4))``.

    Of equal importances, those with the greatest ``tiebreak`` are kept, then the last ones.
    """

    keep: int
    of: int

    def __post_init__(self) -> None:
        whole = all(isinstance(n, numbers.Integral) for n in (self.keep, self.of))
        if not whole or not 0 < self.keep < self.of:
            raise OptionError(
                f"the pattern keeps {self.keep} of {self.of}; it must keep at least 1 and fewer than all"
            )

    @classmethod
    def parse(cls, words: str) -> Pattern:
        """Returns the pattern that is written ``keep:of``, such as ``2:4``.

        Raises:
            OptionError: the words have another form, or the numbers are out of range.
        """
        keep, _, of = words.partition(":")
        if not (keep.isdecimal() and of.isdecimal()):
            raise OptionError(f"{words!r} is not N:M, such as 2:4")
        return cls(int(keep), int(of))

    def why_not(self, shape: Sequence[int], along: Along) -> str:
        """Returns why the pattern does not fit a tensor; "" if it fits."""
        dim, groups = along
        if not 0 <= dim < len(shape):
            return f"its shape {list(shape)} has no dimension {dim}"
        inputs = shape[dim] // groups
        if inputs % self.of or not inputs:
            within = f" in each of {groups} groups" if groups > 1 else ""
            return (
                f"its shape {list(shape)} has {inputs:,} inputs along dimension {dim}{within}, "
                f"which is not a multiple of {self.of}"
            )
        return ""


def pattern_dim(shape: Sequence[int]) -> int:
    """Returns the dimension of a tensor's inputs, derived from its shape alone.

    This is the last dimension of a matrix [outputs, inputs] or vector, and dimension 1 of a kernel [outputs,
    inputs, …]. A tensor of rank 3 whose last dimension is greater than 128 counts as a stack of matrices
    [matrices, outputs, inputs].
    """
    if len(shape) == 3 and shape[2] > _LONGEST_KERNEL:
        return 2
    return 1 if len(shape) > 1 else 0


@runtime_checkable
class Allocation(Protocol):
    """A rule for the sparsity of each tensor; the lowest importances in a tensor or row are pruned."""

    def shares(self, importances: Mapping[str, Numbers]) -> dict[str, float]:
        """Returns the sparsity of each tensor, from 0 to 1, by name.

        Args:
            importances: finite, by name, in the order of the model's layers.
        """


def _below(ascending: F64, value: float) -> int:
    return int(np.searchsorted(ascending, value, side="left"))


def require_share(what: str, share: Any) -> None:
    """Refuses values that are not shares.

    Raises:
        OptionError: the value is not a number from 0 to 1.
    """
    if not is_number(share) or not 0 <= share <= 1:
        raise OptionError(f"{what} is {share!r}, must be a number from 0 to 1")
