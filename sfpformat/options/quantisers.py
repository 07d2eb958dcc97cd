"""The options of the quantisers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from ..dtypes import FACTOR_DTYPES
from ..errors import OptionError
from .checks import in_range, is_number, one_of, use_plain_numbers, whole

SCALES = ("tensor", "row", "column")
WEIGHTED = ("root", "full")
# The allowed range of bits per level or per position.
BITS = (0.05, 32)


@dataclass(frozen=True)
class Lossless:
    """Stores every bit, like `Exact` or, if the tensor has few different values, as a table of them."""

    NAME: ClassVar[str] = "lossless"


@dataclass(frozen=True)
class Exact:
    """Stores every bit, as the bit patterns of the weights. Never uses a table of all values."""

    NAME: ClassVar[str] = "exact"


@dataclass(frozen=True, kw_only=True)
class LossyQuantiser(ABC):
    """The options that all lossy quantisers have.

    Attributes:
        NAME: the name of the kind in a file (R-QNT-001).
    """

    NAME: ClassVar[str]

    weighted: str | None = None
    scale: str | int | None = None
    scale_dtype: str | None = None

    def __post_init__(self) -> None:
        use_plain_numbers(self)
        one_of("weighted", self.weighted, (None, *WEIGHTED))
        if isinstance(self.scale, str):
            one_of("scale", self.scale, SCALES)
        elif self.scale is not None:
            whole("scale", self.scale, 1, 1 << 48)
        one_of("scale_dtype", self.scale_dtype, (None, *FACTOR_DTYPES))
        if self.scale_dtype is not None and self.scale is None:
            raise OptionError(f"scale_dtype is {self.scale_dtype!r} without a scale; add scale=...")

    @abstractmethod
    def describe(self) -> str:
        """Returns the target in a few words, such as ``4 bits per survivor``."""

    def _require_one_of(self, *targets: str) -> None:
        """Raises `OptionError` unless exactly one of the fields is given."""
        given = [name for name in targets if getattr(self, name) is not None]
        if len(given) != 1:
            kind, found = type(self).__name__, " and ".join(given) or "none"
            raise OptionError(f"{kind} takes exactly one of {', '.join(targets)}; given: {found}")


@dataclass(frozen=True, kw_only=True)
class Uniform(LossyQuantiser):
    """Rounds magnitudes to multiples of a step.

    Takes exactly one of ``step``, ``bits``, ``budget`` and ``error_db``, such as ``Uniform(bits=4)``. A
    tensor stays lossless if lossless coding takes no more bits, or if no step reaches ``error_db``.
    Exceptions: ``step`` and `Options.fixed_width` are always lossy.

    Attributes:
        step: the step. With a ``scale``, in units of the root mean square of the weights that share a factor.
            If the decoded weight would not be finite in the tensor's dtype, the encoder uses the greatest
            multiple that is finite.
        bits: approximate bits per survivor for its level and sign, without the mask. Also an approximate
            upper bound on the bits per position with the mask, which matters if few positions are pruned: the
            file is at most 1 % larger than without pruning. This second bound does not apply if a given mask
            alone takes more than half of it. With a given mask or `Options.fixed_width`, it is an error if
            all weights would become 0. The same holds for ``budget``.
        budget: approximate bits per position for mask and levels together, without index and tables.
        error_db: the greatest error, in dB, below 0: 10 log10 (mean squared error / mean square) of the
            decoded survivors, before an importance multiplies them. Weighted if ``weighted`` is set.
        rate_weight: weight of bits against error in rounding. 0 rounds to nearest; 0.12 (about ln(2) / 6)
            takes the fewest bits at equal error.
        weighted: the weight of each error. ``full``: the importance of the position. ``root``: its square
            root. None: all errors have equal weight. The root suits a Fisher information, which is valid only
            for small errors; ``python -m tests.figures.weighted`` compares both.
        scale: the positions that share a scale factor: ``tensor``, ``row``, ``column``, or the number of
            positions in a group. None: no factors.
        scale_dtype: dtype of the factors: ``F32``, ``F16`` or ``BF16``. None: F16.

    Raises:
        OptionError: a value is not allowed, or not exactly one target is given.
    """

    NAME: ClassVar[str] = "uniform"

    step: float | None = None
    bits: float | None = None
    budget: float | None = None
    error_db: float | None = None
    rate_weight: float = 0.12

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_of("step", "bits", "budget", "error_db")
        if self.step is not None and not (is_number(self.step) and 0 < self.step < float("inf")):
            raise OptionError(f"step is {self.step!r}, must be above 0")
        if self.error_db is not None and not is_number(self.error_db):
            raise OptionError(f"error_db is {self.error_db!r}, must be a number of dB")
        if self.error_db is not None and not self.error_db < 0:
            raise OptionError(f"error_db is {self.error_db}, must be below 0, such as -30")
        if self.bits is not None:
            in_range("bits", self.bits, *BITS)
        if self.budget is not None:
            in_range("budget", self.budget, *BITS)
        in_range("rate_weight", self.rate_weight, 0, 10)

    def describe(self) -> str:
        """Returns the target in a few words, such as ``4 bits per survivor``."""
        if self.bits is not None:
            return f"{self.bits:g} bits per survivor"
        if self.budget is not None:
            return f"{self.budget:g} bits per position"
        return f"{self.error_db:g} dB" if self.error_db is not None else f"step {self.step:g}"


@dataclass(frozen=True)
class Table(LossyQuantiser):
    """Replaces magnitudes by the nearest of several centroids, which are chosen for each tensor.

    Takes exactly one of ``centroids`` and ``bits``, such as ``Table(centroids=16, scale="row")``. A tensor
    stays lossless if lossless coding takes no more bits, unless `Options.fixed_width` is set.

    Attributes:
        centroids: the number of centroids.
        bits: the number of bits per level with its sign, for 2^(bits - 1) centroids.
        weighted, scale, scale_dtype: same as in `Uniform`.

    Raises:
        OptionError: a value is not allowed, or not exactly one target is given.
    """

    NAME: ClassVar[str] = "table"

    centroids: int | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_of("centroids", "bits")
        if self.centroids is not None:
            whole("centroids", self.centroids, 1, 1 << 16)
        if self.bits is not None:
            in_range("bits", self.bits, 1, 16)

    def describe(self) -> str:
        """Returns the target in a few words, such as ``table of 16``."""
        return f"table of {self.count}"

    @property
    def count(self) -> int:
        """The number of centroids."""
        return self.centroids or max(round(2 ** (self.bits or 1)) // 2, 1)


Quantiser = Lossless | Exact | LossyQuantiser

# Name of a quantiser in a file -> how to write it in Python, for messages.
_WRITTEN = {
    Lossless.NAME: "Lossless()",
    Exact.NAME: "Exact()",
    Uniform.NAME: "Uniform(bits=...)",
    Table.NAME: "Table(centroids=...)",
}


def require_quantiser(given: object) -> None:
    """Raises `OptionError` if a value is not a quantiser. The message says how to write one."""
    if isinstance(given, Quantiser):
        return
    name = given if isinstance(given, str) else getattr(given, "NAME", None)
    ways = _WRITTEN[name] if name in _WRITTEN else " or ".join(_WRITTEN.values())
    raise OptionError(f"quantiser is {getattr(given, '__name__', repr(given))}; write {ways}")
