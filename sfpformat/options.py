"""What a caller can ask of the encoder. Every choice has a default; None leaves it to measured estimates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

from .coding.codetable import MAX_CODE_BITS, MAX_CODES
from .dtypes import FACTOR_DTYPES
from .errors import OptionError, UnknownPresetError
from .names import require_known, unknown_name

CODINGS = ("auto", "raw", "fingerprint")
QUANTISERS = ("lossless", "exact", "uniform", "table")
MASKS = ("auto", "none", "runs", "octets")
SCALES = ("tensor", "row", "column")
WEIGHTED = ("root", "full")
# Bits of a level, or of a position, that may be asked for.
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


def _use_plain_numbers(options: ImportanceOptions | Options) -> None:
    """Makes numbers of numpy Python's own, which a directory can hold."""
    for field in fields(options):
        value = getattr(options, field.name)
        if isinstance(value, Real) and hasattr(value, "item"):
            object.__setattr__(options, field.name, value.item())


@dataclass(frozen=True)
class ImportanceOptions:
    """How an importance is stored.

    Attributes:
        role: ``metadata`` (kept for fine-tuning and pruning again) or ``multiplier`` (enters reconstruction).
        over: ``survivors`` or ``all``; ignored for an importance given as two factors.
        quantiser: ``uniform`` with ``bits`` bits a level at most, or ``exact`` in ``dtype``.
        bits: of ``uniform``: the greatest importance has the level 2^bits - 1.
        dtype: of ``exact`` and of factors: ``F32``, ``F16`` or ``BF16``.
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


@dataclass(frozen=True)
class Options:
    """How a tensor is encoded.

    Attributes:
        coding: ``raw``, ``fingerprint``, or ``auto``: fingerprint for the float dtypes where it is smaller.
        quantiser: ``lossless`` is ``exact``, or a ``table`` of all values where they are few; ``exact``;
            ``uniform`` takes one of ``step``, ``bits``, ``budget``, ``error_db``; ``table`` takes
            ``centroids`` or ``bits``. A tensor that takes no more bits without loss than as ``bits``,
            ``budget``, ``error_db`` or a table ask for, or whose ``error_db`` no step meets, is kept
            lossless; not with ``step`` or ``fixed_width``.
        mantissa_bits: of ``exact``: how many top mantissa bits join the class (None: the smallest estimate).
        narrow: of ``exact``: whether to look for a narrower dtype that holds all values.
        trim: of ``exact``: whether segments may leave out mantissa bits that are all zero.
        step: of ``uniform``: the step; with a ``scale`` in root mean squares of what shares a factor. Numbers
            whose product would leave the tensor's dtype are lowered to the greatest that does not.
        bits: of ``uniform``: about so many bits for the level of each survivor, its sign included and the
            mask not; with the mask about so many a position at most, which counts where few are pruned: the
            file is at most 1 % larger than without pruning (not so where a mask that is given takes more than
            half of them alone).
            Of ``table``: 2^(bits - 1) centroids.
        budget: of ``uniform``: about so many bits a position for mask and levels together, index and tables
            not.
        error_db: at most this error, in dB and below 0: 10 log10 (mean squared error / mean square) of the
            survivors as a reader gives them, before an importance multiplies them; weighed if ``weighted``.
        centroids: of ``table``: how many magnitudes.
        weighted: of ``uniform`` and ``table``: errors count by the importance that comes with the tensor
            (``full``) or by its square root, or all alike (None). The root suits a Fisher information, which
            tells of small errors only; ``python -m tests.figures.weighted`` compares them.
        rate_weight: of ``uniform``: how much bits weigh against error when a weight lies between two levels;
            0 rounds to nearest, 0.12 (about ln(2) / 6) gives the fewest bits at equal error.
        scale: ``tensor``, ``row``, ``column``, the positions of a group, or None.
        scale_dtype: of the factors.
        mask: the mask's kind, ``none``, or ``auto``.
        polarity: of ``runs``: 1 codes survivors, 0 pruned positions, None whichever are fewer.
        group: levels a symbol, 1 or 2, or None.
        codes: the most codes that the segments of a stream may choose from, 1 to 16; None: up to 8.
        code_limit: longest prefix code, at most 12; 8 suits the tables of a GPU.
        fixed_width: of ``uniform`` and ``table``: one class each for mask and fingerprints, so that the mask
            is a plain bitmap and all levels have as many bits (of a table, where the number of its centroids
            is a power of two), and chunks of whole rows: what a product reads where it lies.
        segment: positions a segment (a multiple of 32), or None.
        segment_near: where ``segment`` is None: about how many, of whole rows or a whole part of a row where
            that is possible; None: more the fewer survive.
        chunk: positions a chunk, rounded to whole segments; fewer where readers would otherwise refuse a
            large tensor of few bits, such as one of zeros, because it expands too far (`Limits.expansion`).
        importance: how an importance that comes with the tensor is stored; None: it is not, and only weighs.
        zeros: of float tensors: ``keep`` gives back -0 as -0, at the cost of about a bit for each zero where
            both signs are common; ``positive`` writes +0 for -0, an equal number, so that all zeros are
            pruned. What multiplies weights by a mask, as `torch.nn.utils.prune` does, leaves -0 where a
            negative weight was.
    """

    coding: str = "auto"
    quantiser: str = "lossless"
    mantissa_bits: int | None = None
    narrow: bool = True
    trim: bool = True
    step: float | None = None
    bits: float | None = None
    budget: float | None = None
    error_db: float | None = None
    centroids: int | None = None
    weighted: str | None = None
    rate_weight: float = 0.12
    scale: str | int | None = None
    scale_dtype: str = "F16"
    mask: str = "auto"
    polarity: int | None = None
    group: int | None = None
    codes: int | None = None
    code_limit: int = MAX_CODE_BITS
    fixed_width: bool = False
    segment: int | None = None
    segment_near: int | None = None
    chunk: int = 1 << 18
    importance: ImportanceOptions | None = ImportanceOptions()
    zeros: str = "keep"

    def __post_init__(self) -> None:
        _use_plain_numbers(self)
        _one_of("coding", self.coding, CODINGS)
        _one_of("zeros", self.zeros, ZEROS)
        _one_of("quantiser", self.quantiser, QUANTISERS)
        _one_of("mask", self.mask, MASKS)
        _one_of("scale_dtype", self.scale_dtype, FACTOR_DTYPES)
        _one_of("polarity", self.polarity, (None, 0, 1))
        _one_of("group", self.group, (None, 1, 2))
        for name in ("narrow", "trim", "fixed_width"):
            _one_of(name, getattr(self, name), (True, False))
        _whole("code_limit", self.code_limit, 1, MAX_CODE_BITS)
        if self.codes is not None:
            _whole("codes", self.codes, 1, MAX_CODES)
        _whole("chunk", self.chunk, 1, 1 << 24)
        _in_range("rate_weight", self.rate_weight, 0, 10)
        if self.mantissa_bits is not None:
            _whole("mantissa_bits", self.mantissa_bits, -8, 52)
        if self.segment is not None:
            _whole("segment", self.segment, 32, 1 << 16)
            if self.segment % 32:
                raise OptionError(f"segment is {self.segment}, must be a multiple of 32")
        if self.segment_near is not None:
            _whole("segment_near", self.segment_near, 32, 1 << 16)
        if isinstance(self.scale, str):
            _one_of("scale", self.scale, SCALES)
        elif self.scale is not None:
            _whole("scale", self.scale, 1, 1 << 48)
        if self.importance is not None and not isinstance(self.importance, ImportanceOptions):
            raise OptionError(f"importance is {self.importance!r}, must be ImportanceOptions or None")
        self._require_one_target()

    def _require_one_target(self) -> None:
        targets = {
            "uniform": ("step", "bits", "budget", "error_db"),
            "table": ("centroids", "bits"),
        }.get(self.quantiser, ())
        given = [
            name
            for name in ("step", "bits", "budget", "error_db", "centroids")
            if getattr(self, name) is not None
        ]
        if set(given) - set(targets):
            raise OptionError(f"quantiser {self.quantiser!r} does not take {', '.join(given)}")
        if targets and len(given) != 1:
            raise OptionError(f"quantiser {self.quantiser!r} takes one of {', '.join(targets)}")
        if self.step is not None and not (isinstance(self.step, Real) and 0 < self.step < float("inf")):
            raise OptionError(f"step is {self.step!r}, must be above 0")
        if self.error_db is not None and not isinstance(self.error_db, Real):
            raise OptionError(f"error_db is {self.error_db!r}, must be a number of dB")
        if self.error_db is not None and not self.error_db < 0:
            raise OptionError(f"error_db is {self.error_db}, must be below 0, such as -30")
        if self.bits is not None:
            _in_range("bits", self.bits, *(BITS if self.quantiser == "uniform" else (1, 16)))
        if self.budget is not None:
            _in_range("budget", self.budget, *BITS)
        if self.centroids is not None:
            _whole("centroids", self.centroids, 1, 1 << 16)
        _one_of("weighted", self.weighted, (None, *WEIGHTED))
        if self.weighted and self.lossless:
            raise OptionError("weighted needs the quantiser uniform or table")
        if self.lossless and self.scale is not None:
            raise OptionError("a scale needs the quantiser uniform or table")

    @property
    def lossless(self) -> bool:
        """Whether the survivors come back bit for bit (zeros as ``zeros`` says)."""
        return self.quantiser in ("lossless", "exact")

    @property
    def is_plain(self) -> bool:
        """Whether ``fixed_width`` is asked for and has a meaning."""
        return self.fixed_width and not self.lossless

    @property
    def may_be_lossless(self) -> bool:
        """Whether a tensor that takes no more bits without loss is kept so: all but a step or a structure."""
        return not self.lossless and self.step is None and not self.fixed_width

    def without_loss(self) -> Options:
        """The same options with the quantiser ``lossless``."""
        none = dict.fromkeys(("step", "bits", "budget", "error_db", "centroids", "weighted", "scale"))
        return self.but(quantiser="lossless", **none)

    def but(self, **changes: Any) -> Options:
        """The same options with some changed."""
        return replace(self, **changes)


# One code a stream, of codewords that an 8-bit look-up holds, and residuals of whole bytes; segments short
# enough that a chunk has work for many lanes, each a part of a row.
_GPU = Options(mantissa_bits=0, trim=False, group=1, codes=1, code_limit=8, segment_near=512)


class _Presets(Mapping[str, Options]):
    """Options by the name of a preset; read-only. The error for an unknown name lists the presets."""

    def __init__(self, presets: dict[str, Options]) -> None:
        self._presets = presets

    def __getitem__(self, name: str) -> Options:
        """The options of a preset.

        Raises:
            UnknownPresetError: there is none of that name.
        """
        if name not in self._presets:
            raise UnknownPresetError(f"{unknown_name(name, self, 'preset')}; there are {', '.join(self)}")
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
        # Class = exponent: residuals of 8 bits (BF16) or 24 (F32) are whole bytes. One code a stream: one
        # look-up table to make and to keep in the cache; long segments: fewer beginnings and ends.
        "speed": Options(mantissa_bits=0, group=1, codes=1, segment=3072),
        # Two mantissa bits join the class.
        "size": Options(mantissa_bits=2, codes=16),
        # Decoded on a GPU.
        "gpu": _GPU,
        # Multiplied there without being decoded, where weights are quantised to 8 magnitudes.
        "fused": _GPU.but(fixed_width=True),
    }
)


def require_options(options: object, what: str) -> Options:
    """Options that a caller gave.

    Args:
        options: what was given; None means lossless.
        what: they are, for errors, such as ``the options of 'w'``.

    Raises:
        OptionError: they are something else.
    """
    if options is None:
        return Options()
    if not isinstance(options, Options):
        given = f", {options!r}," if isinstance(options, (str, int, float)) else ""
        hint = f"; PRESETS[{options!r}] are" if isinstance(options, str) and options in PRESETS else ""
        raise OptionError(f"{what}: a {type(options).__name__}{given} is not Options{hint}")
    return options


def options_by_name(
    options: Options | Mapping[str, Options] | None, names: Iterable[str]
) -> dict[str, Options]:
    """The options of each tensor.

    Args:
        options: for all tensors, or for each by name; None, and a tensor not named, means lossless.
        names: of all tensors.

    Raises:
        OptionError: a key is no tensor's name, or a value is not Options.
    """
    names = list(names)
    if not isinstance(options, Mapping):
        return dict.fromkeys(names, require_options(options, "options"))
    require_known(options, names, "options")
    chosen = {name: require_options(given, f"the options of {name!r}") for name, given in options.items()}
    return {name: chosen.get(name) or Options() for name in names}
