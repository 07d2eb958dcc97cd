"""Encodes the symbols of windows from the bit patterns of floats (SPEC.md chapter 9), 32 levels per step.

The result is bit-identical to that of `coding.windows.encode_windows`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import register_jitable
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ...coding.codetable import CodeTable
from ...coding.exact_encoding import Patterns
from ...coding.planes import Counts
from .compiling import Int, intrinsic, kernel
from .unaligned import load64, pointer_to, require_inside, store64, trailing_zeros
from .vectors import load_bytes, splat

_STEP = 32  # levels


def pack_windows(
    values: Patterns, counts: Counts, windows: Counts, table: CodeTable
) -> tuple[NDArray[np.uint8], Counts]:
    """Implements `coding.windows.encode_windows` for bit patterns of 2 or 4 bytes.

    The classes have one width, which divides the first level of class 0.
    """
    assert table.window is not None
    assert table.constant_width is not None
    most = len(values) * (table.window + table.escape_bits) // 8
    plane, sizes = np.zeros(most + 16, np.uint8), np.empty(len(counts), np.int64)
    symbols = np.empty(int(counts.max(initial=0)), np.uint8)
    bits = _pack(
        values,
        values.view(np.uint8),
        counts,
        windows,
        table.base >> table.constant_width,
        table.constant_width,
        table.window,
        table.escape_bits,
        symbols,
        plane,
        sizes,
    )
    return plane[: (bits + 7) // 8].copy(), sizes  # a copy, because the buffer is usually much larger


def _symbol_writer(item: int) -> Any:
    """Returns a function that writes the symbols of 32 patterns of ``item`` bytes, one byte each."""
    words = ir.VectorType(ir.IntType(8 * item), _STEP)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, at, cut, first, last, target, to = arguments
        source_type, _, _, _, _, target_type, _ = signature.args
        pointer = pointer_to(context, builder, source_type, source, at, 8)
        patterns = builder.bitcast(load_bytes(builder, pointer, item * _STEP), words)
        unsigned = builder.shl(patterns, ir.Constant(words, [1] * _STEP))
        classes = builder.lshr(unsigned, splat(builder, cut, _STEP))
        offsets = builder.sub(classes, splat(builder, first, _STEP))
        escape = splat(builder, last, _STEP)
        symbols = builder.select(builder.icmp_unsigned("<", offsets, escape), offsets, escape)
        few = builder.trunc(symbols, ir.VectorType(ir.IntType(8), _STEP))
        place = pointer_to(context, builder, target_type, target, to, 8)
        builder.store(few, builder.bitcast(place, few.type.as_pointer())).align = 1
        return context.get_dummy_value()

    word = types.uint16 if item == 2 else types.uint32

    def write(
        typing_context: Any, source: Any, at: Any, cut: Any, first: Any, last: Any, target: Any, to: Any
    ) -> Any:
        return types.void(source, types.int64, word, word, word, target, types.int64), generate

    return intrinsic(write)


_symbols16, _symbols32 = _symbol_writer(2), _symbol_writer(4)


@register_jitable
def _write_symbols(
    raw: Bytes, item: Int, at: Int, width: Int, first: Int, last: Int, symbols: Bytes, to: Int
) -> None:
    """Writes the symbols of the 32 patterns from index ``at`` on."""
    require_inside(raw, item * at, item * _STEP)
    require_inside(symbols, to, _STEP)
    if item == 2:
        _symbols16(raw, 2 * at, np.uint16(width), np.uint16(first), np.uint16(last), symbols, to)
    else:
        _symbols32(raw, 4 * at, np.uint32(width), np.uint32(first), np.uint32(last), symbols, to)


@intrinsic
def _word_of(typing_context: Any, symbols: Any, at: Any, above: Any) -> Any:
    """Returns bit 7 - ``above`` of each of 32 bytes, as a word."""
    flags = ir.IntType(_STEP)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, place, shift = arguments
        pointer = pointer_to(context, builder, signature.args[0], source, place, 8)
        moved = builder.shl(load_bytes(builder, pointer, _STEP), splat(builder, shift, _STEP))
        negative = builder.icmp_signed("<", moved, ir.Constant(moved.type, [0] * _STEP))
        return builder.zext(builder.bitcast(negative, flags), ir.IntType(64))

    return types.uint64(symbols, types.int64, types.uint8), generate


@kernel
def _add_bits(plane: Bytes, bit: Int, word: np.uint64) -> None:
    """Sets bits of a plane from a bit offset on; at most 57 bits of the word."""
    store64(plane, bit >> 3, load64(plane, bit >> 3) | word << np.uint64(bit & 7))


@kernel
def _class_of(pattern: Int, kept: np.uint64, cut: Int) -> Int:
    """Returns the class of a pattern, counted from that of level 0. ``kept`` has the bits of a pattern."""
    return np.int64((np.uint64(pattern) << np.uint64(1) & kept) >> np.uint64(cut))


@kernel
def _pack(
    patterns: Patterns,
    raw: Bytes,
    counts: Counts,
    windows: Counts,
    base: Int,
    cut: Int,
    width: Int,
    escape_bits: Int,
    symbols: Bytes,
    plane: Bytes,
    sizes: Counts,
) -> Int:
    """Encodes the prefix plane of whole segments. Returns its number of bits.

    Args:
        patterns: of 2 or 4 bytes; ``raw``: the same memory as uint8.
        counts, windows: int64, number of patterns and window of each segment.
        base: the class of level 0 of the table, counted in classes of 2^cut levels.
        cut: residual bits of a class.
        width, escape_bits: bits of a symbol, and of the class of an escaped level.
        symbols: uint8 [greatest count], scratch memory.
        plane: uint8, zeros; needs 8 bytes more than all bits.
        sizes: int64, set to the number of bits of each segment.
    """
    item, one = np.int64(patterns.itemsize), np.uint64(1)
    kept = ~np.uint64(0) >> np.uint64(64 - 8 * item)
    last = (np.int64(1) << width) - 1
    begin, at = np.int64(0), np.int64(0)
    for s in range(counts.size):
        count, first = counts[s], base + windows[s]
        whole = count - count % _STEP
        for i in range(0, whole, _STEP):
            _write_symbols(raw, item, begin + i, cut, first, last, symbols, i)
        for i in range(whole, count):
            number = _class_of(patterns[begin + i], kept, cut) - first
            symbols[i] = np.uint8(number if 0 <= number < last else last)
        to = at + width * count
        for i in range(0, whole, _STEP):
            hits = np.uint64(0xFFFFFFFF)
            for k in range(width):
                word = _word_of(symbols, i, np.uint8(7 - k))
                _add_bits(plane, at + k * count + i, word)
                hits &= word
            while hits:
                escaped = begin + i + np.int64(trailing_zeros(hits))
                number = _class_of(patterns[escaped], kept, cut) - base
                _add_bits(plane, to, np.uint64(number))
                to += escape_bits
                hits &= hits - one
        for i in range(whole, count):
            for k in range(width):
                _add_bits(plane, at + k * count + i, np.uint64(symbols[i] >> k & 1))
            if symbols[i] == last:
                number = _class_of(patterns[begin + i], kept, cut) - base
                _add_bits(plane, to, np.uint64(number))
                to += escape_bits
        sizes[s] = to - at
        begin, at = begin + count, to
    return at
