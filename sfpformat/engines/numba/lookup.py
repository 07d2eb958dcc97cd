"""Tables for decoding a stream: classes, codewords, and look-up tables, in one byte array.

They are filled on first use, in memory that each thread keeps: `prepare` fills the tables of the classes,
`code_of` the look-up table of a code. A stream's `filled` holds the flags of the filled tables: first that of
the classes, then one for each code.

A *slot* is a byte that identifies a class: the class number if there are at most 256 classes, else its index
among the used classes. The tables of a stream are, in this order (`c` codes, look-up tables of `b` bits):

    first           uint64 [256]       first level of each slot's class
    extra           uint8 [256]        its residual bits
    of_length       int64 [c, 13]      number of codewords of each length
    symbol_slots    uint16 [c, 256]    in canonical order: the slot; with g = 2 the second in the high byte
    symbol_length   uint8 [c, 4096]    codeword length, of slot s at s; with g = 2 of s and t at s + 64 t
    entries         uint64 [c, 2^b]    next b bits of a prefix plane -> up to six slots

An entry is

    bits  0 to  5   number of bits of its codewords
    bits  8 to 55   the slots, the first one lowest; slots beyond the count are undefined
    bits 56 to 63   number of valid slots, 1 to 6

An entry is 0 if the next codeword is longer than `b` bits. Such codewords are rare; `decode_one` decodes them
bit by bit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.codetable import MAX_CODE_BITS, CodeTable
from ...coding.planes import Levels
from .compiling import Int, kernel
from .unaligned import count_ones

MAX_SLOTS = 6
# Five look-ups of at most this many bits consume at most 57 bits, which one unaligned 64-bit load always
# provides. A table of 2^11 entries occupies half of an L1 cache of 32 KiB.
MAX_BITS = 11
_MIN_BITS = 9
# The entry for a codeword that is longer than the index of the table.
LONG = 0
# Bit offsets in an entry of the slots and of their number.
SLOTS_AT, COUNT_AT = 8, 56
# An entry should serve at least 2^5 levels: filling it takes about as long as decoding 8.
_LEVELS_AN_ENTRY = 5

_EXTRA, _OF_LENGTH = 256 * 8, 256 * 9
_LENGTHS = MAX_CODE_BITS + 1
# Bytes per code, without its look-up table: of_length, symbol_slots, symbol_length.
_SYMBOLS = 64 * 64
_A_CODE = 8 * _LENGTHS + 512 + _SYMBOLS
# Constants for sums and comparisons of six bytes at once.
_ONES, _HIGHS, _BYTES = 0x010101010101, 0x808080808080, 0xFFFFFFFFFFFF


def table_bits(codes: int, levels: int) -> int:
    """Returns the index bits of the look-up tables for about ``levels`` levels; 0 for one class."""
    if codes == 0:
        return 0
    return min(max((levels // codes).bit_length() - _LEVELS_AN_ENTRY, _MIN_BITS), MAX_BITS)


def table_bytes(codes: int, bits: int) -> int:
    """Returns the size in bytes of the tables of a stream."""
    return _OF_LENGTH + codes * (_A_CODE + (8 << bits))


def lengths_of(table: CodeTable) -> bytes:
    """Returns the input of `prepare`: residual bits of each class, then the code lengths of each code."""
    return b"".join([table.extra, *[code.length for code in table.codes]])


class Classes(NamedTuple):
    """The tables of a stream's classes: ``first`` and ``extra`` of each slot."""

    first: Levels
    extra: Bytes


class Code(NamedTuple):
    """The tables of one code (module docstring); ``mask`` is the number of entries minus one."""

    group: Int
    of_length: NDArray[np.int64]
    symbol_slots: NDArray[np.uint16]
    symbol_length: Bytes
    entries: Levels
    mask: np.uint64


@kernel
def classes_of(tables: Bytes) -> Classes:
    """Returns the `Classes` of a stream's tables."""
    return Classes(tables[:_EXTRA].view(np.uint64), tables[_EXTRA:_OF_LENGTH])


@kernel
def code_at(tables: Bytes, codes: Int, bits: Int, code: Int, group: Int) -> Code:
    """Returns views of the tables of a code, filled or not."""
    lengths = _OF_LENGTH + code * 8 * _LENGTHS
    slots = _OF_LENGTH + codes * 8 * _LENGTHS + code * 512
    symbols = _OF_LENGTH + codes * (8 * _LENGTHS + 512) + code * _SYMBOLS
    entries = _OF_LENGTH + codes * _A_CODE + code * (8 << bits)
    return Code(
        group,
        tables[lengths : lengths + 8 * _LENGTHS].view(np.int64),
        tables[slots : slots + 512].view(np.uint16),
        tables[symbols : symbols + _SYMBOLS],
        tables[entries : entries + (8 << bits)].view(np.uint64),
        np.uint64((1 << bits) - 1),
    )


@kernel
def _slots_of_classes(
    base: np.uint64,
    extra: Bytes,
    lengths: Bytes,
    codes: Int,
    group: Int,
    tables: Bytes,
    slots: NDArray[np.int64],
) -> bool:
    """Fills `first` and `extra`, and ``slots`` with the slot of each class, -1 for none.

    False if more than 256 classes are used.
    """
    classes = extra.size
    symbols = classes if group == 1 else classes * classes
    for c in range(classes):
        slots[c] = c if classes <= 256 else -1
    if classes > 256:  # more than 64 classes: the group is 1
        for i in range(codes * symbols):
            if lengths[i]:
                slots[i % symbols] = 0
        used = 0
        for c in range(classes):
            if slots[c] == 0:
                slots[c] = used
                used += 1
        if used > 256:
            return False
    first, width = classes_of(tables)
    first[:], width[:] = np.uint64(0), np.uint8(0)
    level = base
    for c in range(classes):
        if slots[c] >= 0:
            first[slots[c]], width[slots[c]] = level, extra[c]
        level += np.uint64(1) << np.uint64(extra[c])
    return True


@kernel
def prepare(
    base: np.uint64,
    classes: Int,
    lengths: Bytes,
    codes: Int,
    group: Int,
    tables: Bytes,
    filled: NDArray[np.int64],
    slots: NDArray[np.int64],
) -> bool:
    """Fills the tables of a stream except the entries. False if its codes use more than 256 classes.

    Does nothing if they are filled.

    Args:
        base: uint64, the first level of class 0.
        lengths: uint8, from `lengths_of`.
        tables: uint8 [table_bytes].
        filled: int64 [1 + codes], set to 1 and zeros.
        slots: int64 [MAX_CLASSES + 13], scratch memory.
    """
    if filled[0]:
        return True
    extra, lengths = lengths[:classes], lengths[classes:]
    if not _slots_of_classes(base, extra, lengths, codes, group, tables, slots):
        return False
    ranks = slots[classes : classes + _LENGTHS]
    symbols = classes if group == 1 else classes * classes
    for code in range(codes):
        of_length, symbol_slots, symbol_length = code_at(tables, codes, 0, code, group)[1:4]
        of_length[:] = 0
        own = lengths[code * symbols : (code + 1) * symbols]
        for symbol in range(symbols):
            of_length[own[symbol]] += 1
        of_length[0] = 0
        ranks[:] = 0
        for length in range(1, MAX_CODE_BITS):
            ranks[length + 1] = ranks[length] + of_length[length]
        for symbol in range(symbols):
            length = own[symbol]
            if length:
                slot = slots[symbol % classes]
                if group == 2:
                    second = slots[symbol // classes]
                    symbol_length[slot + 64 * second] = length
                    slot |= second << 8
                else:
                    symbol_length[slot] = length
                symbol_slots[ranks[length]] = slot
                ranks[length] += 1
    filled[:] = 0
    filled[0] = 1
    return True


@kernel
def code_of(
    tables: Bytes,
    codes: Int,
    bits: Int,
    code: Int,
    group: Int,
    filled: NDArray[np.int64],
    single: NDArray[np.uint32],
    ends: Levels,
) -> Code:
    """Returns the `Code` of a code. Fills its look-up table on first use."""
    found = code_at(tables, codes, bits, code, group)
    if not filled[1 + code]:
        _fill_entries(found.of_length, found.symbol_slots, group, bits, single, ends, found.entries)
        filled[1 + code] = 1
    return found


@kernel
def _fill_entries(
    of_length: NDArray[np.int64],
    symbol_slots: NDArray[np.uint16],
    group: Int,
    bits: Int,
    single: NDArray[np.uint32],
    ends: Levels,
    entries: Levels,
) -> None:
    """Fills the look-up table of one code.

    Args:
        single, ends: uint32, uint64 [2^bits or more], scratch memory.

    The entry of a window of bits is its first symbol, followed by the symbols of the window shifted right by
    that codeword, with zero bits above. The shifted window is a smaller number, so its entry has already been
    filled. Only symbols that end inside the window count: the end offsets of six symbols, one byte each, are
    stored with the entry and compared in one operation.
    """
    size = np.int64(1) << bits
    single[:size] = np.uint32(0)  # the first symbol of each window: slots and length
    # Unsigned indices from here on, because Numba tests signed ones for negative values.
    stop = np.uint64(size)
    length: Int
    symbol: np.uint32 | np.uint64
    codeword, rank = np.int64(0), np.int64(0)
    for length in range(1, bits + 1):
        for _ in range(of_length[length]):
            first = np.int64(0)  # the codeword's first bit is the lowest of the window
            for b in range(length):
                first |= ((codeword >> b) & 1) << (length - 1 - b)
            symbol = np.uint32(symbol_slots[rank]) << np.uint32(8) | np.uint32(length)
            window, every = np.uint64(first), np.uint64(1) << np.uint64(length)
            while window < stop:
                single[window] = symbol
                window += every
            codeword += 1
            rank += 1
        codeword <<= 1
    ones, highs, low48 = np.uint64(_ONES), np.uint64(_HIGHS), np.uint64(_BYTES)
    eight, width = np.uint64(8), np.uint64(8 * group)
    of_symbols = np.uint64((1 << (8 * (MAX_SLOTS // group))) - 1)
    inside = (np.uint64(0x80) + np.uint64(bits)) * ones
    # The window of zeros repeats one symbol.
    symbol = np.uint64(single[0])
    length = symbol & np.uint64(255)
    same, end = symbol >> eight, np.uint64(0)
    entries[0], ends[0] = np.uint64(0), np.uint64(0x40) * ones
    if length:
        ends[0] = np.uint64(0)
        for i in range(MAX_SLOTS):
            end += length
            ends[0] |= end << np.uint64(8 * i)
        for i in range(MAX_SLOTS // group):
            entries[0] |= same << np.uint64(SLOTS_AT + 8 * group * i)
    window = np.uint64(0)
    while window < stop:
        symbol = np.uint64(single[window])
        length = symbol & np.uint64(255)
        rest = window >> length
        found = ((ends[rest] + length * ones) << eight | length) & low48
        slots = ((entries[rest] >> np.uint64(SLOTS_AT) & low48) << width | symbol >> eight) & low48
        count = count_ones((inside - found) & highs & of_symbols)
        taken = found >> (eight * count - eight) & np.uint64(255)
        count *= np.uint64(group)
        if length:
            ends[window] = found
            entries[window] = taken | slots << np.uint64(SLOTS_AT) | count << np.uint64(COUNT_AT)
        else:
            entries[window], ends[window] = np.uint64(LONG), np.uint64(0x40) * ones
        window += np.uint64(1)


@kernel
def decode_one(
    window: np.uint64, of_length: NDArray[np.int64], symbol_slots: NDArray[np.uint16]
) -> tuple[Int, Int]:
    """Decodes the first codeword of a window of at least 12 bits, bit by bit.

    Returns its slots and length.
    """
    codeword, first, rank = np.int64(0), np.int64(0), np.int64(0)
    for length in range(1, MAX_CODE_BITS + 1):
        codeword |= np.int64(window & np.uint64(1))
        window >>= np.uint64(1)
        count = of_length[length]
        if codeword - first < count:
            return np.int64(symbol_slots[rank + codeword - first]), np.int64(length)
        rank += count
        first = (first + count) << 1
        codeword <<= 1
    return np.int64(0), np.int64(MAX_CODE_BITS)  # not reached: a code is complete
