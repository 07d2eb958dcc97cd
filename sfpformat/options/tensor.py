"""The options of a tensor and of its importance."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, Self

from ..coding.codetable import MAX_CODE_BITS, MAX_CODES, MAX_WINDOW_BITS
from ..dtypes import FACTOR_DTYPES
from ..errors import OptionError
from .checks import one_of, use_plain_numbers, whole
from .quantisers import Lossless, LossyQuantiser, Quantiser, Table, Uniform, require_quantiser

CODINGS = ("auto", "raw", "fingerprint")
MASKS = ("auto", "none", "runs", "octets")
ZEROS = ("keep", "positive")
_LOSSLESS = Lossless()


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
        use_plain_numbers(self)
        one_of("role", self.role, ("metadata", "multiplier"))
        one_of("over", self.over, ("survivors", "all"))
        one_of("quantiser", self.quantiser, ("uniform", "exact"))
        one_of("dtype", self.dtype, FACTOR_DTYPES)
        whole("bits", self.bits, 1, 24)


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
            (also if the quantiser is lossy but would take more bits). None: up to 3, each only if it saves at
            least 0.75 % of the estimated size.
        narrow: whether to search for a narrower dtype that represents all values, for weights that are stored
            as bit patterns.
        trim: whether segments can omit mantissa bits that are all zero, for weights and importances that are
            stored as bit patterns.
        mask: the mask's kind, ``none``, or ``auto``.
        polarity: what ``runs`` codes: 1 for survivors, 0 for pruned positions, None for the fewer of both.
        group: levels per symbol, 1 or 2, or None.
        codes: the greatest number of codes for the segments of a stream, 1 to 16. None: up to 8.
        code_limit: the greatest code length in bits, at most 12; 8 suits the tables of a GPU.
        window: bits of a symbol, 1 to 4: levels have symbols of this width, in windows of 2^window - 1
            classes, instead of prefix codes (the mask excepted). Files are larger and decode faster, which
            ``python -m tests.figures.processor_time`` measures. A stream has prefix codes if more than an
            eighth of its levels would be outside, or if it has more than 256 classes. None: prefix codes.
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

    quantiser: Quantiser = _LOSSLESS
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
        require_quantiser(self.quantiser)
        use_plain_numbers(self)
        one_of("coding", self.coding, CODINGS)
        if self.coding == "raw" and self.lossy is not None:
            raise OptionError("coding 'raw' is lossless; for a lossy quantiser, use coding 'auto'")
        one_of("zeros", self.zeros, ZEROS)
        one_of("mask", self.mask, MASKS)
        one_of("polarity", self.polarity, (None, 0, 1))
        one_of("group", self.group, (None, 1, 2))
        for name in ("narrow", "trim", "fixed_width"):
            one_of(name, getattr(self, name), (True, False))
        whole("code_limit", self.code_limit, 1, MAX_CODE_BITS)
        if self.codes is not None:
            whole("codes", self.codes, 1, MAX_CODES)
        if self.window is not None:
            whole("window", self.window, 1, MAX_WINDOW_BITS)
        whole("chunk", self.chunk, 1, 1 << 24)
        if self.mantissa_bits is not None:
            whole("mantissa_bits", self.mantissa_bits, -8, 52)
        if self.segment is not None:
            whole("segment", self.segment, 32, 1 << 16)
            if self.segment % 32:
                raise OptionError(f"segment is {self.segment}, must be a multiple of 32")
        if self.segment_near is not None:
            whole("segment_near", self.segment_near, 32, 1 << 16)
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
