"""Encodes importances, and checks their products with weights (the encoder's side of SPEC.md chapter 13)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..coding.mask import Mask
from ..coding.planes import AnyLevels
from ..coding.quantisers import (
    F32,
    Exact,
    Quantiser,
    Uniform,
    float_patterns,
    multiplied,
    patterns_to_levels,
    round_to,
)
from ..dtypes import DTYPES, Dtype
from ..errors import OptionError
from ..options import ImportanceOptions
from .quantise import UniformNumbers

Flat = NDArray[np.generic]
# Positions of a tensor: a range, or any positions in ascending order.
Where = slice | NDArray[np.int64]
Multiplier = Callable[[Where], F32]

_SMALLEST = np.finfo(np.float32).smallest_subnormal
_BLOCK = 1 << 18  # positions processed at a time


def _are_finite(values: Flat) -> Mask:
    """Returns a mask of the finite values. Signalling NaNs of a dtype of `ml_dtypes` raise no warning."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.isfinite(values))


@dataclass(frozen=True)
class ImportanceSource:
    """The importance levels of a tensor: numbers of a uniform quantiser, or bit patterns.

    Attributes:
        flat: the importance of each position, float32, flat.
        quantiser: the quantiser as stored.
        over_survivors: whether only survivors have a level.
        numbers: converts importances to numbers, for a `Uniform`; else None.
        exact_weights: the flat tensor and its dtype, if the importance multiplies lossless weights; else
            None. An importance is then rounded down if its product with the weight would not be finite.
    """

    flat: F32
    quantiser: Quantiser
    over_survivors: bool
    numbers: UniformNumbers | None = None
    exact_weights: tuple[Flat, Dtype] | None = None

    def levels(self, block: slice, mask: Mask | None) -> AnyLevels:
        """Returns the levels of a block's survivors, or of all its positions; for `exact`, bit patterns."""
        chosen = mask if self.over_survivors else None
        values = self.flat[block] if chosen is None else self.flat[block][chosen]
        levels = self._rounded(values)
        if self.exact_weights is not None:
            weights, dtype = self.exact_weights
            coded_weights = weights[block] if chosen is None else weights[block][chosen]
            alive = mask if mask is not None and chosen is None else np.ones(len(coded_weights), np.bool_)
            levels = self._with_finite_products(levels, coded_weights, alive, dtype)
        return levels

    def stored(self, where: Where) -> F32:
        """Returns the importances of positions, as a reader reconstructs them, float32 [positions]."""
        return self._values(self._rounded(self.flat[where]))

    def _rounded(self, values: F32) -> AnyLevels:
        """Returns the nearest level of each importance. For `exact`, returns bit patterns."""
        if isinstance(self.quantiser, Exact):
            coded = self.quantiser.dtype
            return float_patterns(values.astype(coded.numpy), coded)
        assert self.numbers is not None
        return self.numbers(values)

    def _values(self, levels: AnyLevels) -> F32:
        coded = patterns_to_levels(levels) if isinstance(self.quantiser, Exact) else levels
        return self.quantiser.importance_values(coded.astype(np.uint64), None)

    def _with_finite_products(self, levels: AnyLevels, weights: Flat, alive: Mask, dtype: Dtype) -> AnyLevels:
        """Lowers levels until the product with the weight of each survivor is finite.

        The loop terminates: the original importance has a finite product (`require_finite_products`), and the
        level below the nearest is not above the importance.
        """
        counts = _are_finite(weights) & alive
        while True:
            over = ~_are_finite(multiplied(weights, self._values(levels), dtype)) & counts
            if not over.any():
                return levels
            levels = levels - over.astype(levels.dtype)


@dataclass(frozen=True)
class StoredFactors:
    """An importance as the product of one factor per row and one factor per column.

    Attributes:
        rows, columns: the factors, float32.
    """

    rows: F32
    columns: F32

    def stored(self, where: Where) -> F32:
        """Returns the importances of positions as a reader reconstructs them."""
        if isinstance(where, slice):
            where = np.arange(where.start, min(where.stop, len(self.rows) * len(self.columns)))
        row, column = np.divmod(where, max(len(self.columns), 1))
        return self.rows[row] * self.columns[column]


def importance_source(
    importance: NDArray[np.floating],
    options: ImportanceOptions,
    exact_weights: tuple[Flat, Dtype] | None = None,
) -> ImportanceSource:
    """Returns the source of an importance that is given for each position.

    Args:
        importance: float array of any shape, finite and not negative.
        options: how the importance is stored.
        exact_weights: same as in `ImportanceSource`; ignored unless the importance is a multiplier.

    Raises:
        OptionError: an importance is negative, not finite, or too great or too small for its dtype.
    """
    over_survivors = options.over == "survivors"
    if options.role != "multiplier":
        exact_weights = None
    if options.quantiser == "exact":
        flat = checked_importance(importance, DTYPES[options.dtype])
        return ImportanceSource(
            flat + np.float32(0), Exact(DTYPES[options.dtype]), over_survivors, None, exact_weights
        )
    flat = checked_importance(importance)
    greatest = np.float32(flat.max()) if len(flat) else np.float32(0)
    most = np.float32((1 << options.bits) - 1)
    step = np.float32(greatest / most) or (_SMALLEST if greatest else np.float32(1))
    # The quotient is rounded: with a step that is too small, the greatest importance would get most + 1.
    while np.floor(greatest / step + np.float32(0.5)) > most:
        step = np.nextafter(step, np.float32(np.inf))
    numbers = UniformNumbers(step, np.zeros(0, np.float32))
    return ImportanceSource(flat, Uniform(step), over_survivors, numbers, exact_weights)


def checked_importance(importance: NDArray[np.floating], dtype: Dtype | None = None) -> F32:
    """Returns an importance as flat float32, after checking it.

    Args:
        importance: float array of any shape, finite and not negative.
        dtype: the dtype in which the importance will be stored exactly, or None.

    Raises:
        OptionError: an importance is not a real number, negative or not finite; one overflows or becomes 0
            in ``dtype``; or without ``dtype``, all become 0 in float32.
    """
    _require_real("importances", importance)
    with np.errstate(over="ignore", under="ignore"):
        flat = np.ascontiguousarray(importance, np.float32).reshape(-1)
    if not np.isfinite(flat).all() or (flat < 0).any():
        raise OptionError("importances must be finite and not negative")
    if dtype is not None:
        _require_stored("an importance", np.ascontiguousarray(importance).reshape(-1), dtype)
    elif not flat.any() and np.any(importance):
        raise OptionError("the importances are too small for float32; multiply them by a common factor")
    return flat


def checked_factor(name: str, factor: NDArray[np.floating], size: int, dtype: Dtype) -> F32:
    """Returns a vector of importance factors as float32, after checking it.

    Args:
        name: name of the vector, for messages.
        factor: the vector, shape [size], finite.
        size: the required number of factors.
        dtype: the dtype in which the factors will be stored.

    Raises:
        OptionError: the shape differs, or a factor is not a real number, is not finite, overflows or becomes
            0 in ``dtype``.
    """
    _require_real(name, factor)
    if factor.shape != (size,) or not np.isfinite(factor).all():
        raise OptionError(f"{name} must be {size} finite numbers")
    _require_stored(f"one of the {name}", factor, dtype)
    return np.asarray(factor, np.float32)


def _require_real(what: str, values: NDArray[np.generic]) -> None:
    """Raises `OptionError` for complex numbers, whose imaginary part would be lost, strings and objects."""
    if values.dtype.kind in "cSUOmM":
        raise OptionError(f"{what} must be real numbers, not {values.dtype}")


def _require_stored(what: str, values: NDArray[np.floating], dtype: Dtype) -> None:
    """Raises `OptionError` if a value overflows in a dtype, or if a value other than 0 becomes 0."""
    with np.errstate(over="ignore", under="ignore"):
        stored = values.astype(np.float32).astype(dtype.numpy)
    wrongs = {"great": ~np.isfinite(stored), "small": (stored == 0) & (values != 0)}
    for word, wrong in wrongs.items():
        if wrong.any():
            value = float(values[np.flatnonzero(wrong)[0]])
            wider = "" if dtype.name == "F32" else "; store it as BF16 or F32"
            raise OptionError(f"{what}, {value:.4g}, is too {word} for {dtype.name}{wider}")


def require_finite_products(
    flat: Flat, dtype: Dtype, multiplier: Multiplier, mask: Mask | None, *, exact: bool
) -> None:
    """Raises if the product of a finite weight and its importance is not finite in the tensor's dtype.

    Args:
        flat: the tensor.
        dtype: its dtype.
        multiplier: returns the importance of positions.
        mask: the survivors, flat; None for all positions.
        exact: whether the weights are lossless. If not, products are computed in float32 and then rounded.

    Raises:
        OptionError: a product is not finite.
    """
    for start in range(0, len(flat), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(flat)))
        weights, factors = flat[block], multiplier(block)
        if exact:
            products = multiplied(weights, factors, dtype)
        else:
            with np.errstate(over="ignore"):
                products = round_to(weights.astype(np.float32) * factors, dtype)
        over = ~_are_finite(products) & _are_finite(weights)
        if mask is not None:
            over &= mask[block]
        if over.any():
            at = int(np.flatnonzero(over)[0])
            raise OptionError(
                f"the weight {float(weights[at])!r} times its importance {factors[at]!s} is too great for "
                f"{dtype.name}; scale the importances down"
            )
