"""Code tables and canonical prefix codes (SPEC.md chapter 8).

The writer builds a table with `coding.classes` and `code_lengths`. The directory stores its four fields. The
reader creates a `CodeTable` from them; the constructor validates it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from ..errors import fault
from .bits import MAX_FIELD_BITS

MAX_CODE_BITS = 12  # R-TAB-005
MAX_SYMBOLS = 256  # used symbols, R-TAB-006: a symbol's rank fits a byte
MAX_CLASSES = {1: 4096, 2: 64}  # by group, R-TAB-001
MAX_CODES = 16  # R-TAB-009
MAX_WINDOW_BITS = 4  # R-TAB-011
MAX_WINDOWED_CLASSES = 256  # R-TAB-012: a class fits a byte
_FEW_ZEROS = 1 / 128  # share of levels; reports do not look for fewer zeros

# A directory has several codes for each tensor, and opening a file checks all of them. Code lengths are
# checked with methods of `bytes`, which take a fraction of the time of a loop.
_EXTRAS = bytes(range(MAX_FIELD_BITS + 1))
_CODE_BITS = bytes(range(MAX_CODE_BITS + 1))
# Code length -> the codeword's share of 2^12 (Kraft sum). In two bytes, because `translate` returns bytes.
_SHARES = [0] + [1 << (MAX_CODE_BITS - bits) for bits in range(1, MAX_CODE_BITS + 1)]
_SHARE_LOW = bytes(share & 255 for share in _SHARES) + bytes(256 - len(_SHARES))
_SHARE_HIGH = bytes(share >> 8 for share in _SHARES) + bytes(256 - len(_SHARES))
# Byte -> the byte with its halves exchanged. Hexadecimal digit -> its value.
_EXCHANGED = bytes(byte >> 4 | (byte & 15) << 4 for byte in range(256))
_DIGITS = bytes.maketrans(b"0123456789abcdef", bytes(range(16)))


@dataclass(frozen=True)
class PrefixCode:
    """A canonical prefix code, given by the code length of each symbol, 0 for unused symbols.

    Raises:
        InvalidFileError: E_RANGE by R-TAB-005 to R-TAB-007.
    """

    length: bytes

    def __post_init__(self) -> None:
        length = self.length
        if length.translate(None, _CODE_BITS):
            raise fault("R-TAB-005", f"a code length is {max(length)} bits, must be at most {MAX_CODE_BITS}")
        used = len(length) - length.count(0)
        if not 2 <= used <= MAX_SYMBOLS:
            raise fault("R-TAB-006", f"a code has {used} symbols, must have 2 to {MAX_SYMBOLS}")
        shares = sum(length.translate(_SHARE_LOW)) + (sum(length.translate(_SHARE_HIGH)) << 8)
        if shares != 1 << MAX_CODE_BITS:
            raise fault("R-TAB-007", "the code lengths of a code do not make a complete prefix code")

    @cached_property
    def symbols(self) -> NDArray[np.uint16]:
        """The used symbols in the order of their codewords: ascending code length, then symbol number."""
        lengths = np.frombuffer(self.length, np.uint8)
        used = np.flatnonzero(lengths)
        return used[np.argsort(lengths[used], kind="stable")].astype(np.uint16)

    @cached_property
    def symbol_bits(self) -> NDArray[np.uint8]:
        """The code length of each of `symbols`, ascending."""
        return np.frombuffer(self.length, np.uint8)[self.symbols]

    @cached_property
    def codes_of_length(self) -> list[int]:
        """Entry n is the number of codewords of n bits, up to the greatest code length."""
        return [int(n) for n in np.bincount(self.symbol_bits)]

    @cached_property
    def codewords(self) -> list[str]:
        """The codeword of each of `symbols`, as a string of 0 and 1, first bit first (R-COD-001)."""
        words, word, last = [], 0, 0
        for bits in map(int, self.symbol_bits):
            word <<= bits - last
            words.append(format(word, f"0{bits}b"))
            word, last = word + 1, bits
        return words


def require_shape(extra: bytes, group: int, codes: int, window: int | None = None) -> None:
    """Checks the fields on which the meaning of codewords depends (R-TAB-001 to -003, -009, -011, -012).

    ``window`` is the number of bits of a symbol in a window; None: the stream has prefix codes.
    """
    if group not in MAX_CLASSES:
        raise fault("R-TAB-003", f"group is {group}, must be 1 or 2")
    if not group <= len(extra) <= MAX_CLASSES[group]:
        most = MAX_CLASSES[group]
        raise fault("R-TAB-001", f"{len(extra)} classes with group {group}, must be {group} to {most}")
    if extra.translate(None, _EXTRAS):
        raise fault("R-TAB-002", f"a class has {max(extra)} residual bits, must have at most 56")
    without_codes = len(extra) == 1 or window is not None
    if not (codes == 0 if without_codes else 1 <= codes <= MAX_CODES):
        needed = 0 if without_codes else f"1 to {MAX_CODES}"
        windows = "" if window is None else " with windows"
        raise fault("R-TAB-009", f"{codes} codes for {len(extra)} classes{windows}, must be {needed}")
    if window is None:
        return
    if not 1 <= window <= MAX_WINDOW_BITS:
        raise fault("R-TAB-011", f"window is {window}, must be 1 to {MAX_WINDOW_BITS}")
    least = max((1 << window) - 1, 2)
    if group != 1 or not least <= len(extra) <= MAX_WINDOWED_CLASSES:
        words = f"{len(extra)} classes with group {group} and symbols of {window} bits"
        raise fault("R-TAB-012", f"{words}, must be {least} to {MAX_WINDOWED_CLASSES} with group 1")


@dataclass(frozen=True)
class CodeTable:
    """Classes of levels and the prefix codes of their symbols.

    Attributes:
        base: first level of class 0.
        extra: byte c is the number of residual bits of class c.
        codes: the prefix codes of the segments, each of which uses one; empty with one class or windows.
        group: levels per symbol, 1 or 2.
        window: the number of bits of a symbol in a window, None if the stream has prefix codes.
        top: the greatest level that the table can code, plus 1.

    Raises:
        InvalidFileError: E_RANGE, by R-TAB-001 to R-TAB-004, R-TAB-009, R-TAB-011 and R-TAB-012: the fields
            are not a valid table.
    """

    base: int
    extra: bytes
    codes: tuple[PrefixCode, ...] = ()
    group: int = 1
    window: int | None = None
    top: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_shape(self.extra, self.group, len(self.codes), self.window)
        symbols = len(self.extra) ** self.group
        for code in self.codes:
            if len(code.length) != symbols:
                raise fault("R-TAB-004", f"a code has {len(code.length)} code lengths, must have {symbols}")
        if self.constant_width is None:
            levels = sum([self.extra.count(width) << width for width in set(self.extra)])
        else:
            levels = len(self.extra) << self.constant_width
        object.__setattr__(self, "top", self.base + levels)

    @property
    def classes(self) -> int:
        """K, the number of classes."""
        return len(self.extra)

    @property
    def code_count(self) -> int:
        """The number of codes or windows that a segment can have; 0 for one class."""
        return len(self.codes) if self.window is None else windows_of(self.classes, self.window)

    @property
    def escape_bits(self) -> int:
        """The number of bits of the class of an escaped level."""
        return (self.classes - 1).bit_length()

    @cached_property
    def first(self) -> NDArray[np.uint64]:
        """The first level of each class, shape [K]. May overflow, unless `require_top` accepted the table."""
        sizes = np.uint64(1) << self.class_extra.astype(np.uint64)
        return np.asarray(np.cumsum(sizes) - sizes + np.uint64(self.base))

    def require_top(self, bound: int) -> None:
        """Raises R-TAB-008 if the table can code a level of ``bound`` or more."""
        if self.top > bound:
            raise fault("R-TAB-008", f"the classes cover levels up to {self.top - 1}, must be below {bound}")

    @cached_property
    def class_extra(self) -> NDArray[np.uint8]:
        """`extra` as an array, shape [K]."""
        return np.frombuffer(self.extra, np.uint8)

    @property
    def constant_extra(self) -> int | None:
        """The number of residual bits of all used classes, or None if it differs."""
        width = self.constant_width
        if width is not None:
            return width
        widths = self._used_extra
        return min(widths) if len(widths) == 1 else None

    @property
    def least_extra(self) -> int:
        """The least number of residual bits of a used class."""
        width = self.constant_width
        return min(self._used_extra) if width is None else width

    @cached_property
    def _used_extra(self) -> set[int]:
        """The different numbers of residual bits of used classes."""
        if self.window is not None:
            return set(self.extra)
        # For each symbol, the residual bits of its first class; with g = 2 of its second class too.
        each = [self.extra]
        if self.group == 2:
            each = [self.extra * self.classes, b"".join([bytes((n,)) * self.classes for n in self.extra])]
        return {n for code in self.codes for extra in each for n in set(compress(extra, code.length))}

    @property
    def may_have_many_zeros(self) -> bool:
        """Whether more than about 1 % of the levels can be 0 or 1: +0 or -0 in a stream with signs.

        True if a class contains only such a level. Else estimated by the code lengths of the first class.
        """
        if self.base > 1:
            return False
        if self.base + (1 << self.extra[0]) <= 2 or not self.codes:
            return True
        symbols = self.classes ** (self.group - 1)  # those whose first level is in the first class
        shares = [sum(2.0**-length for length in code.length[:symbols] if length) for code in self.codes]
        return max(shares) > _FEW_ZEROS

    def class_of(self, levels: NDArray[np.unsignedinteger]) -> NDArray[np.uint16]:
        """Returns the class of each level. The levels must be at least `base` and below `top`."""
        if self.classes == 1:
            return np.zeros(len(levels), np.uint16)
        constant = self.constant_width
        if constant is not None:
            offsets = levels - levels.dtype.type(self.base)
            return np.asarray(offsets >> levels.dtype.type(constant), np.uint16)
        if self.top <= 1 << 16:
            lookup = np.zeros(self.top, np.uint16)
            lookup[self.base :] = np.repeat(
                np.arange(self.classes, dtype=np.uint16), 1 << self.class_extra.astype(np.int64)
            )
            return np.asarray(lookup[levels])
        return np.asarray(np.searchsorted(self.first, levels, side="right") - 1, np.uint16)

    @property
    def constant_width(self) -> int | None:
        """The number of residual bits of all classes, used or not, or None if it differs."""
        return None if self.extra.strip(self.extra[:1]) else self.extra[0]


def windows_of(classes: int, window: int) -> int:
    """Returns the number of windows: each covers 2^window - 1 consecutive classes."""
    return classes - (1 << window) + 2


def pack_lengths(lengths: bytes) -> bytes:
    """Packs code lengths for the directory: two per byte, the first in the lower four bits."""
    digits = lengths.hex()[1::2]
    return bytes.fromhex(digits + "0" * (len(digits) % 2)).translate(_EXCHANGED)


def unpack_lengths(packed: bytes, symbols: int) -> bytes:
    """Unpacks code lengths; the inverse of `pack_lengths`.

    Raises:
        InvalidFileError: by R-TAB-004 or R-TAB-010.
    """
    if len(packed) != -(-symbols // 2) or not packed:
        needed = -(-symbols // 2)
        raise fault("R-TAB-004", f"a code has {len(packed)} bytes of code lengths, must have {needed}")
    lengths = packed.translate(_EXCHANGED).hex().encode().translate(_DIGITS)
    if len(lengths) == symbols:
        return lengths
    if lengths[symbols]:
        raise fault("R-TAB-010", "the last four bits of a code's lengths are not zero")
    return lengths[:symbols]


# The table of a stream without levels in a canonical file (R-CAN-006).
EMPTY_TABLE = CodeTable(0, b"\0")


def code_lengths(counts: NDArray[np.integer], limit: int = MAX_CODE_BITS) -> bytes:
    """Returns optimal code lengths of at most ``limit`` bits, by package-merge (SPEC.md 22, R-CAN-005).

    Larmore and Hirschberg, A fast algorithm for optimal length-limited Huffman codes, J. ACM 37 (1990).

    Args:
        counts: how often each symbol occurs, shape [symbols]; from 2 to 2^limit symbols must occur.
        limit: the greatest code length.

    Returns:
        A byte for each symbol: its code length in bits, 0 if it does not occur.

    Raises:
        ValueError: the number of symbols that occur is not possible.
    """
    used = [int(s) for s in np.flatnonzero(counts)]
    items = sorted((int(counts[s]), s) for s in used)
    if not 2 <= len(items) <= 1 << limit:
        raise ValueError(f"{len(items)} symbols cannot have codes of at most {limit} bits")
    # Twice each weight, plus 1 for a pair: sorted, an item then precedes an equal pair.
    single = np.array([2 * weight for weight, _ in items], np.int64)
    # The merged list of each round, as booleans: whether the element is an item (True) or a pair (False).
    rounds = [np.ones(len(items), np.bool_)]
    merged = single
    for _ in range(limit - 1):
        pairs = (merged[0 : len(merged) & ~1 : 2] >> 1) + (merged[1::2] >> 1)
        merged = np.sort(np.concatenate((single, 2 * pairs + 1)), kind="stable")
        rounds.append(merged & 1 == 0)
    lengths = bytearray(len(counts))
    taken = 2 * len(items) - 2
    for is_item in reversed(rounds):
        chosen = int(np.count_nonzero(is_item[:taken]))
        for _, symbol in items[:chosen]:
            lengths[symbol] += 1
        taken = 2 * (taken - chosen)
    return bytes(lengths)
