"""The tables that decoding a stream needs, laid out in bytes: classes, codewords, and look-up tables.

They are made in memory that each thread keeps, when the first segment asks for them: those of the classes by
`prepare`, the look-up table of a code by `fill_entries`. A stream's `filled` says which are there: the first
element for the classes, one more for each code.

A *slot* is a byte that stands for a class: the class itself where there are at most 256, else its place among
the used ones. The tables of a stream are these, one after another (`c` codes, look-up tables `b` bits wide):

    first           uint64 [256]       first level of each slot's class
    extra           uint8 [256]        its residual bits
    of_length       int64 [c, 13]      how many codewords of each length
    symbol_slots    uint16 [c, 256]    in canonical order: the slot, with g = 2 the second in the higher byte
    entries         uint64 [c, 2^b]    from the next b bits of a prefix plane to up to four slots at once

An entry is

    bits  0 to  7   bits that all its symbols take
    bits  8 to 11   how many slots it gives, 1 to 4
    bits 12 to 31   four bits each: bits taken by the symbols of its first 0, 1, 2, 3, 4 slots, 15 for those
                    that it does not give
    bits 32 to 63   the slots, the first one lowest

so that the sum of some entries has the sum of their bits and of their slots in its two lowest bytes. It is
`LONG` where the next codeword is longer than the table is wide; those are rare, and `decode_one` reads them
bit by bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...coding.codetable import MAX_CODE_BITS, CodeTable
from .compiling import kernel

MAX_SLOTS = 4
# Four look-ups of at most this many bits take at most the 57 that one unaligned load of 64 is sure to give.
MAX_BITS = 12
_MIN_BITS = 9
# The entry that gives nothing and takes nothing.
LONG = 0xFFFF0000
# An entry should serve at least 2^5 levels: making it takes about as long as decoding 8.
_LEVELS_AN_ENTRY = 5

_EXTRA, _OF_LENGTH = 256 * 8, 256 * 9
_LENGTHS = MAX_CODE_BITS + 1


def table_bits(codes: int, levels: int) -> int:
    """How wide the look-up tables of a stream with about so many levels should be; 0 for one class."""
    if codes == 0:
        return 0
    return min(max((levels // codes).bit_length() - _LEVELS_AN_ENTRY, _MIN_BITS), MAX_BITS)


def table_bytes(codes: int, bits: int) -> int:
    """Bytes that the tables of a stream take."""
    return _OF_LENGTH + codes * (8 * _LENGTHS + 512 + (8 << bits))


def lengths_of(table: CodeTable) -> bytes:
    """What `prepare` reads: residual bits of each class, then the code lengths of one code after another."""
    return b"".join([table.extra, *[code.length for code in table.codes]])


@kernel
def firsts(tables: Any) -> Any:
    """The first level of each slot."""
    return tables[:_EXTRA].view(np.uint64)


@kernel
def extras(tables: Any) -> Any:
    """The residual bits of each slot."""
    return tables[_EXTRA:_OF_LENGTH]


@kernel
def of_length_of(tables: Any, code: int) -> Any:
    """How many codewords of each length a code has."""
    at = _OF_LENGTH + code * 8 * _LENGTHS
    return tables[at : at + 8 * _LENGTHS].view(np.int64)


@kernel
def symbol_slots_of(tables: Any, codes: int, code: int) -> Any:
    """The slots of a code's symbols."""
    at = _OF_LENGTH + codes * 8 * _LENGTHS + code * 512
    return tables[at : at + 512].view(np.uint16)


@kernel
def entries_of(tables: Any, codes: int, bits: int, code: int) -> Any:
    """The look-up table of a code."""
    at = _OF_LENGTH + codes * (8 * _LENGTHS + 512) + code * (8 << bits)
    return tables[at : at + (8 << bits)].view(np.uint64)


@kernel
def _slot_of_class(base: Any, extra: Any, lengths: Any, codes: int, group: int, tables: Any) -> Any:
    """Fills `first` and `extra`. The slot of each class, -1 for none; shape [0] where 256 are too few."""
    classes = extra.size
    slots = np.full(classes, -1)
    symbols = classes * group if group == 1 else classes * classes
    if classes <= 256:
        slots[:] = np.arange(classes)
    else:  # more than 64 classes: the group is 1
        for i in range(codes * symbols):
            if lengths[i]:
                slots[i % symbols] = 0
        used = 0
        for c in range(classes):
            if slots[c] == 0:
                slots[c] = used
                used += 1
        if used > 256:
            return slots[:0]
    first, width = firsts(tables), extras(tables)
    first[:], width[:] = np.uint64(0), np.uint8(0)
    level = base
    for c in range(classes):
        if slots[c] >= 0:
            first[slots[c]], width[slots[c]] = level, extra[c]
        level += np.uint64(1) << np.uint64(extra[c])
    return slots


@kernel
def prepare(base: Any, classes: int, lengths: Any, codes: int, group: int, tables: Any, filled: Any) -> bool:
    """Fills the tables of a stream but for the entries; False where its codes use more than 256 classes.

    Args:
        base: uint64, the first level of class 0.
        lengths: uint8, of `lengths_of`.
        tables: uint8 [table_bytes].
        filled: int64 [1 + codes], set to 1 and zeros.
    """
    if filled[0]:
        return True
    extra, lengths = lengths[:classes], lengths[classes:]
    slots = _slot_of_class(base, extra, lengths, codes, group, tables)
    if slots.size == 0:
        return False
    symbols = classes if group == 1 else classes * classes
    for code in range(codes):
        of_length, symbol_slots = of_length_of(tables, code), symbol_slots_of(tables, codes, code)
        of_length[:] = 0
        own = lengths[code * symbols : (code + 1) * symbols]
        for symbol in range(symbols):
            of_length[own[symbol]] += 1
        of_length[0] = 0
        ranks = np.zeros(_LENGTHS, np.int64)
        for length in range(1, MAX_CODE_BITS):
            ranks[length + 1] = ranks[length] + of_length[length]
        for symbol in range(symbols):
            length = own[symbol]
            if length:
                slot = slots[symbol % classes]
                if group == 2:
                    slot |= slots[symbol // classes] << 8
                symbol_slots[ranks[length]] = slot
                ranks[length] += 1
    filled[:] = 0
    filled[0] = 1
    return True


@kernel
def entries_of_code(tables: Any, codes: int, bits: int, code: int, group: int, filled: Any) -> Any:
    """The look-up table of a code, filled if it was not."""
    entries = entries_of(tables, codes, bits, code)
    if not filled[1 + code]:
        of_length, symbol_slots = of_length_of(tables, code), symbol_slots_of(tables, codes, code)
        _fill_entries(of_length, symbol_slots, group, bits, entries)
        filled[1 + code] = 1
    return entries


@kernel
def _fill_entries(of_length: Any, symbol_slots: Any, group: int, bits: int, entries: Any) -> None:
    """Fills the look-up table of one code.

    What a window of bits gives is its first symbol and then what the window of the rest gives, as far as that
    does not look beyond the end; windows ascend, so the rest's entry is there already.
    """
    single = np.empty(np.int64(1) << bits, np.uint32)  # of each window the first symbol: slots, and length
    size = np.int64(1) << bits
    single[:] = np.uint32(0)
    codeword, rank = np.int64(0), np.int64(0)
    for length in range(1, bits + 1):
        for _ in range(of_length[length]):
            first = np.int64(0)  # the codeword's first bit is the lowest of the window
            for b in range(length):
                first |= ((codeword >> b) & 1) << (length - 1 - b)
            symbol = np.uint32(symbol_slots[rank]) << np.uint32(8) | np.uint32(length)
            for window in range(first, size, np.int64(1) << length):
                single[window] = symbol
            codeword += 1
            rank += 1
        codeword <<= 1
    entries[0] = _entry_of_zeros(np.uint64(single[0]), group, bits)
    low4, all16 = np.uint64(15), np.uint64(0xFFFF)
    for window in range(1, size):
        symbol = np.uint64(single[window])
        length = symbol & np.uint64(255)
        if length == np.uint64(0):
            entries[window] = np.uint64(LONG)
            continue
        tail = entries[np.uint64(window) >> length]
        rest = np.uint64(bits) - length
        ends = tail >> np.uint64(16) & all16
        if group == 1:
            more = np.uint64(ends & low4 <= rest)
            more += np.uint64(ends >> np.uint64(4) & low4 <= rest)
            more += np.uint64(ends >> np.uint64(8) & low4 <= rest)
            given = (np.uint64(1) << np.uint64(4) * more) - np.uint64(1)
            moved = (ends & given) + length * (np.uint64(0x111) & given)
            taken = (moved << np.uint64(4)) | length
            total = taken >> np.uint64(4) * more & low4
            taken |= all16 << np.uint64(4) * (more + np.uint64(1))
        else:
            second = ends >> np.uint64(4) & low4
            more = np.uint64(2) * np.uint64(second <= rest)
            total = length + (second if more else np.uint64(0))
            taken = np.uint64(0x0F0F) | length << np.uint64(4)
            taken |= (total if more else low4) << np.uint64(12)
        slots = tail >> np.uint64(32) & ((np.uint64(1) << np.uint64(8) * more) - np.uint64(1))
        slots = slots << np.uint64(8 * group) | symbol >> np.uint64(8)
        count = more + np.uint64(group)
        entries[window] = (
            total | count << np.uint64(8) | (taken & all16) << np.uint64(16) | slots << np.uint64(32)
        )


@kernel
def _entry_of_zeros(symbol: Any, group: int, bits: int) -> Any:
    """The entry of the window whose bits are all zero: the same symbol again and again."""
    length, slots = symbol & np.uint64(255), symbol >> np.uint64(8)
    if length == np.uint64(0):
        return np.uint64(LONG)
    entry, taken, count = np.uint64(0xFFFF0000), np.uint64(0), np.uint64(0)
    while count < np.uint64(MAX_SLOTS) and taken + length <= np.uint64(bits):
        entry |= slots << np.uint64(32) + np.uint64(8) * count
        taken += length
        count += np.uint64(group)
        entry ^= (taken ^ np.uint64(15)) << np.uint64(12) + np.uint64(4) * count
    return entry | taken | count << np.uint64(8)


@kernel
def decode_one(window: Any, of_length: Any, symbol_slots: Any) -> tuple[int, int]:
    """The slots of the first symbol in a window of at least 12 bits, and its length, read bit by bit."""
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
