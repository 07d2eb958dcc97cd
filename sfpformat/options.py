"""The options of the encoder. Each has a default. For None, the encoder chooses by measured estimates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from numbers import Real
from typing import Any, ClassVar, Self

from .coding.codetable import MAX_CODE_BITS, MAX_CODES, MAX_WINDOW_BITS
from .dtypes import FACTOR_DTYPES
from .errors import OptionError, UnknownPresetError
from .names import require_known, unknown_name

CODINGS = ("auto", "raw", "fingerprint")
MASKS = ("auto", "none", "runs", "octets")
SCALES = ("tensor", "row", "column")
WEIGHTED = ("root", "full")
# The allowed range of bits per level or per position.
BITS = (0.05, 32)
ZEROS = ("keep", "positive")


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{name} is {value!r}, must be one of {', '.join(map(str, allowed))}")


def _in_range(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, Real) or not low <= float(value) <= high:
        raise OptionError(f"{name} is {value!r}, must be from {low} to {high}")


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if not hasattr(value, "__index__") or not low <= value <= high:
        raise OptionError(f"{name} is {value!r}, must be a whole number from {low} to {high}")


def _use_plain_numbers(options: ImportanceOptions | LossyQuantiser | Options) -> None:
    """Converts numpy numbers in the fields to Python numbers, which the directory can store."""
    for field in fields(options):
        value = getattr(options, field.name)
        if isinstance(value, Real) and hasattr(value, "item"):
            object.__setattr__(options, field.name, value.item())


@dataclass(frozen=True)
class ImportanceOptions:
    """How an importance is stored.

    Attributes:
        role: ``metadata``, for fine-tuning and further pruning, or ``multiplier``: readers multiply the
            weights by it.
        over: the positions that have an importance, ``survivors`` or ``all``. Ignored for two factors.
        quantiser: ``uniform`` with at most ``bits`` bits per level, or ``exact`` in ``dtype``.
        bits: bits per level of ``uniform``. The greatest importance has the level 2^bits - 1.
        dtype: dtype of ``exact`` and of two factors: ``F32``, ``F16`` or ``BF16``.

    Raises:
        OptionError: a value is not allowed.
    """

    role: str = "metadata"
    over: str = "survivors"
    quantiser: str = "uniform"
    bits: int = 6
    dtype: str = "F32"

    def __post_init__(self) -> None:
        _use_plain_numbers(self)
        _one_of("role", self.role, ("metadata", "multiplier"))
        _one_of("over", self.over, ("survivors", "all"))
        _one_of("quantiser", self.quantiser, ("uniform", "exact"))
        _one_of("dtype", self.dtype, FACTOR_DTYPES)
        _whole("bits", self.bits, 1, 24)


# ---------------------------------------------------------------------------------------------- quantisers


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
        _use_plain_numbers(self)
        _one_of("weighted", self.weighted, (None, *WEIGHTED))
        if isinstance(self.scale, str):
            _one_of("scale", self.scale, SCALES)
        elif self.scale is not None:
            _whole("scale", self.scale, 1, 1 << 48)
        _one_of("scale_dtype", self.scale_dtype, (None, *FACTOR_DTYPES))
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
        if self.step is not None and not (isinstance(self.step, Real) and 0 < self.step < float("inf")):
            raise OptionError(f"step is {self.step!r}, must be above 0")
        if self.error_db is not None and not isinstance(self.error_db, Real):
            raise OptionError(f"error_db is {self.error_db!r}, must be a number of dB")
        if self.error_db is not None and not self.error_db < 0:
            raise OptionError(f"error_db is {self.error_db}, must be below 0, such as -30")
        if self.bits is not None:
            _in_range("bits", self.bits, *BITS)
        if self.budget is not None:
            _in_range("budget", self.budget, *BITS)
        _in_range("rate_weight", self.rate_weight, 0, 10)

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
            _whole("centroids", self.centroids, 1, 1 << 16)
        if self.bits is not None:
            _in_range("bits", self.bits, 1, 16)

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


# -------------------------------------------------------------------------------------------------- options


class _NoQuantiserFields:
    """Base class of `Options` that refuses fields of the quantisers.

    The error says where to write such a field. This is a base class, so that the signature of `Options` has
    only its own fields.
    """

    def __new__(cls, *args: object, **given: object) -> Self:
        """Raises `OptionError` for a field of a quantiser; the message says where to write it."""
        for name in given:
            kinds = [kind for kind in (Uniform, Table) if name in {field.name for field in fields(kind)}]
            if kinds:
                target = "" if name in ("step", "bits", "budget", "error_db", "centroids") else "..., "
                places = " or ".join(f"Options({kind.__name__}({target}{name}=...))" for kind in kinds)
                raise OptionError(f"Options takes no {name!r}: it belongs to the quantiser; write {places}")
        return super().__new__(cls)


@dataclass(frozen=True)
class Options(_NoQuantiserFields):
    """How a tensor is encoded.

    ``Options()`` is lossless; ``Options(Uniform(bits=4))`` is lossy. Of the other options, only ``zeros``
    changes the decoded weights, by the signs of zeros. All others choose between size and speed.

    Attributes:
        quantiser: how weights are stored: `Lossless`, `Exact`, `Uniform` or `Table`.
        coding: ``raw``, ``fingerprint``, or ``auto``: fingerprint for float dtypes if it is smaller. ``raw``
            is always lossless.
        mantissa_bits: number of top mantissa bits in the class, for weights that are stored as bit patterns
            (also if the quantiser is lossy but would take more bits). None: the number with the smallest
            estimated size.
        narrow: whether to search for a narrower dtype that represents all values, for weights that are stored
            as bit patterns.
        trim: whether segments can omit mantissa bits that are all zero, for weights and importances that are
            stored as bit patterns.
        mask: the mask's kind, ``none``, or ``auto``.
        polarity: what ``runs`` codes: 1 for survivors, 0 for pruned positions, None for the fewer of both.
        group: levels per symbol, 1 or 2, or None.
        codes: the greatest number of codes for the segments of a stream, 1 to 16. None: up to 8.
        code_limit: the greatest code length in bits, at most 12; 8 suits the tables of a GPU.
        window: bits of a symbol, 1 to 4, to code levels in windows of 2^window - 1 classes, of fixed width,
            instead of prefix codes (the mask excepted). Files are larger and decode faster. A stream of
            which more than an eighth of the levels would be outside has prefix codes. None: prefix codes.
        fixed_width: whether mask and fingerprints have one class each, and chunks have whole rows. Only for
            ``Uniform`` and ``Table``. The mask is then a plain bitmap, and all levels have the same number of
            bits (for a table, if its number of centroids is a power of two). Fused kernels multiply such
            weights without decoding them first.
        segment: positions per segment (a multiple of 32), or None.
        segment_near: if ``segment`` is None: about this many positions per segment, made of whole rows or an
            equal part of a row if possible. None: more positions for fewer survivors.
        chunk: positions per chunk, rounded to whole segments. Chunks have fewer positions if readers would
            otherwise refuse the tensor because of `Limits.expansion`, such as a large tensor of zeros.
        importance: how the importance of the tensor is stored. None: it is not stored, but can weight errors.
        zeros: the signs of zeros in float tensors. ``keep`` keeps -0, which costs about one bit per zero if
            both signs are common. ``positive`` writes +0 for -0, an equal number, so that all zeros are
            pruned. Code that multiplies weights by a mask, like `torch.nn.utils.prune`, turns negative
            weights into -0.

    Raises:
        OptionError: a value is not allowed, or options contradict each other.
    """

    quantiser: Quantiser = Lossless()
    _: KW_ONLY
    coding: str = "auto"
    mantissa_bits: int | None = None
    narrow: bool = True
    trim: bool = True
    mask: str = "auto"
    polarity: int | None = None
    group: int | None = None
    codes: int | None = None
    code_limit: int = MAX_CODE_BITS
    window: int | None = None
    fixed_width: bool = False
    segment: int | None = None
    segment_near: int | None = None
    chunk: int = 1 << 18
    importance: ImportanceOptions | None = ImportanceOptions()
    zeros: str = "keep"

    def __post_init__(self) -> None:
        _require_quantiser(self.quantiser)
        _use_plain_numbers(self)
        _one_of("coding", self.coding, CODINGS)
        if self.coding == "raw" and self.lossy is not None:
            raise OptionError("coding 'raw' is lossless; for a lossy quantiser, use coding 'auto'")
        _one_of("zeros", self.zeros, ZEROS)
        _one_of("mask", self.mask, MASKS)
        _one_of("polarity", self.polarity, (None, 0, 1))
        _one_of("group", self.group, (None, 1, 2))
        for name in ("narrow", "trim", "fixed_width"):
            _one_of(name, getattr(self, name), (True, False))
        _whole("code_limit", self.code_limit, 1, MAX_CODE_BITS)
        if self.codes is not None:
            _whole("codes", self.codes, 1, MAX_CODES)
        if self.window is not None:
            _whole("window", self.window, 1, MAX_WINDOW_BITS)
        _whole("chunk", self.chunk, 1, 1 << 24)
        if self.mantissa_bits is not None:
            _whole("mantissa_bits", self.mantissa_bits, -8, 52)
        if self.segment is not None:
            _whole("segment", self.segment, 32, 1 << 16)
            if self.segment % 32:
                raise OptionError(f"segment is {self.segment}, must be a multiple of 32")
        if self.segment_near is not None:
            _whole("segment_near", self.segment_near, 32, 1 << 16)
        if self.importance is not None and not isinstance(self.importance, ImportanceOptions):
            raise OptionError(f"importance is {self.importance!r}, must be ImportanceOptions or None")

    @property
    def lossy(self) -> LossyQuantiser | None:
        """The quantiser if it is lossy, else None."""
        return self.quantiser if isinstance(self.quantiser, LossyQuantiser) else None

    @property
    def lossless(self) -> bool:
        """Whether the survivors are bit-exact after decoding (except zeros if ``zeros`` is ``positive``)."""
        return self.lossy is None

    @property
    def is_plain(self) -> bool:
        """Whether ``fixed_width`` is set and the quantiser is lossy."""
        return self.fixed_width and not self.lossless

    @property
    def may_be_lossless(self) -> bool:
        """Whether a tensor with a lossy quantiser is stored lossless if that takes no more bits.

        False with a step or fixed width.
        """
        has_step = isinstance(self.quantiser, Uniform) and self.quantiser.step is not None
        return not (self.lossless or has_step or self.fixed_width)

    def without_loss(self) -> Options:
        """Returns a copy with the quantiser `Lossless`."""
        return self.but(quantiser=Lossless())

    def but(self, **changes: Any) -> Options:
        """Returns a copy with some options changed, such as ``PRESETS["gpu"].but(quantiser=Table(8))``.

        To change one field of the quantiser, pass ``quantiser=dataclasses.replace(options.quantiser, ...)``.
        """
        return replace(self, **changes)


def _require_quantiser(given: object) -> None:
    """Raises `OptionError` if a value is not a quantiser. The message says how to write one."""
    if isinstance(given, Quantiser):
        return
    name = given if isinstance(given, str) else getattr(given, "NAME", None)
    ways = _WRITTEN[name] if name in _WRITTEN else " or ".join(_WRITTEN.values())
    raise OptionError(f"quantiser is {getattr(given, '__name__', repr(given))}; write {ways}")


# One code per stream, codewords that fit an 8-bit look-up table, and residuals of whole bytes. Segments are
# parts of rows, and short, so that a chunk has work for many lanes.
_GPU = Options(mantissa_bits=0, trim=False, group=1, codes=1, code_limit=8, segment_near=512)


class _Presets(Mapping[str, Options]):
    """Read-only mapping: name of a preset -> options. The error for an unknown name lists the presets."""

    def __init__(self, presets: dict[str, Options]) -> None:
        self._presets = presets

    def __getitem__(self, name: str) -> Options:
        """Returns the options of a preset.

        Raises:
            UnknownPresetError: there is no preset of that name.
        """
        if name not in self._presets:
            raise UnknownPresetError(f"{unknown_name(name, self, 'preset')}; choose from {', '.join(self)}")
        return self._presets[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._presets)

    def __len__(self) -> int:
        return len(self._presets)

    def __repr__(self) -> str:
        return f"PRESETS({', '.join(self)})"


PRESETS: Mapping[str, Options] = _Presets(
    {
        "default": Options(),
        # Class = exponent: residuals of 8 bits (BF16) or 24 (F32) are whole bytes. Windows of seven
        # exponents, which vector registers decode. Where windows do not fit, one code per stream: one
        # look-up table to build and to keep in the cache. Long segments: less overhead per segment.
        "speed": Options(mantissa_bits=0, group=1, codes=1, window=3, segment=3072),
        # The class includes two mantissa bits.
        "size": Options(mantissa_bits=2, codes=16),
        # For decoding on a GPU.
        "gpu": _GPU,
        # For matrix products on a GPU without decoding, if weights are quantised to 8 magnitudes.
        "fused": _GPU.but(fixed_width=True),
    }
)


def require_options(options: object, what: str) -> Options:
    """Checks the type of the caller's options, and returns them.

    Args:
        options: `Options`, or None for lossless.
        what: name of the argument in messages, such as ``the options of 'w'``.

    Raises:
        OptionError: ``options`` has another type.
    """
    if options is None:
        return Options()
    if not isinstance(options, Options):
        given = f", {options!r}," if isinstance(options, (str, int, float)) else ""
        hint = f"; pass PRESETS[{options!r}]" if isinstance(options, str) and options in PRESETS else ""
        raise OptionError(f"{what}: a {type(options).__name__}{given} is not Options{hint}")
    return options


def options_by_name(
    options: Options | Mapping[str, Options] | None, names: Iterable[str]
) -> dict[str, Options]:
    """Returns the options of each tensor.

    Args:
        options: one `Options` for all tensors, or name -> `Options`. None is lossless. Tensors that the
            mapping does not name are lossless, too.
        names: the names of all tensors.

    Raises:
        OptionError: a key is not the name of a tensor, or a value is not `Options`.
    """
    names = list(names)
    if not isinstance(options, Mapping):
        return dict.fromkeys(names, require_options(options, "options"))
    require_known(options, names, "options")
    chosen = {name: require_options(given, f"the options of {name!r}") for name, given in options.items()}
    return {name: chosen.get(name) or Options() for name in names}
