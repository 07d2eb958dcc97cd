"""Vector operations that the compiler does not generate from loops, in LLVM's portable vector types.

Joining class and residual to a bit pattern takes a third of the time of a loop over bytes, because Numba
widens integers to 64 bits. Looking up by class and sign takes half the time of a loop, for the same reason.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import register_jitable
from numpy.typing import NDArray

from ...coding.bits import Bytes
from .compiling import Int, intrinsic
from .unaligned import pointer_to, require_inside

LANES16, LANES32 = 32, 16  # weights per step: 64 bytes of output
STEP_BYTES = 64

LANES_LOOKED_UP = 16  # weights per look-up step
BY_SLOT = 512  # entries of the table

_BYTE, _INDEX, _ADDRESS = ir.IntType(8), ir.IntType(32), ir.IntType(64)


def load_bytes(builder: Any, pointer: Any, count: int) -> Any:
    """Loads a vector of ``count`` bytes from any address."""
    vector = builder.load(builder.bitcast(pointer, ir.VectorType(_BYTE, count).as_pointer()))
    vector.align = 1
    return vector


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """Returns a vector whose lanes are all ``value``."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INDEX, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INDEX, lanes), [0] * lanes))


def _store(builder: Any, value: Any, target: Any, streamed: bool) -> None:
    """Stores 64 bytes at any address; if ``streamed``, non-temporally, at a multiple of 64."""
    store = builder.store(value, builder.bitcast(target, value.type.as_pointer()))
    store.align = 64 if streamed else 1
    if streamed:
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_INDEX, 1)]))


def _signs_moved(builder: Any, levels: Any, bits: int) -> Any:
    """Returns the bit patterns of levels: moves the sign from the lowest bit to the highest."""
    words = levels.type
    one, rest = (ir.Constant(words, [n] * words.count) for n in (1, bits - 1))
    return builder.or_(builder.lshr(levels, one), builder.shl(levels, rest))


def _joiner16(streamed: bool) -> Any:
    """Returns a function that joins 32 one-byte classes with one-byte residuals, and moves the sign."""
    words = ir.VectorType(ir.IntType(16), LANES16)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        slots, place, data, start, base, width, out, to = arguments
        slots_type, _, data_type, _, _, _, out_type, _ = signature.args
        classes = load_bytes(builder, pointer_to(context, builder, slots_type, slots, place, 8), LANES16)
        residuals = load_bytes(builder, pointer_to(context, builder, data_type, data, start, 8), LANES16)
        levels = builder.shl(builder.zext(classes, words), splat(builder, width, LANES16))
        low = builder.add(builder.zext(residuals, words), splat(builder, base, LANES16))
        patterns = _signs_moved(builder, builder.add(levels, low), 16)
        _store(builder, patterns, pointer_to(context, builder, out_type, out, to, 8), streamed)
        return context.get_dummy_value()

    def join(
        typing_context: Any,
        slots: Any,
        place: Any,
        data: Any,
        start: Any,
        base: Any,
        width: Any,
        out: Any,
        to: Any,
    ) -> Any:
        given = slots, types.int64, data, types.int64, types.uint16, types.uint16, out, types.int64
        return types.void(*given), generate

    return intrinsic(join)


def _joiner32(streamed: bool) -> Any:
    """Returns a function that joins 16 one-byte classes with three-byte residuals, and moves the sign."""
    words = ir.VectorType(_INDEX, LANES32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        slots, place, data, start, above, out, to = arguments
        slots_type, _, data_type, _, _, out_type, _ = signature.args
        classes = load_bytes(builder, pointer_to(context, builder, slots_type, slots, place, 8), LANES32)
        classes = builder.zext(builder.add(classes, splat(builder, above, LANES32)), words)
        residuals = load_bytes(builder, pointer_to(context, builder, data_type, data, start, 8), 3 * LANES32)
        # Inserts a zero byte above each residual, for the class; it comes from the second operand.
        none = ir.Constant(residuals.type, [0] * (3 * LANES32))
        order = [3 * lane + byte if byte < 3 else 3 * LANES32 for lane in range(LANES32) for byte in range(4)]
        spread = builder.shuffle_vector(
            residuals, none, ir.Constant(ir.VectorType(_INDEX, len(order)), order)
        )
        above_residuals = builder.shl(classes, ir.Constant(words, [24] * LANES32))
        patterns = _signs_moved(builder, builder.or_(builder.bitcast(spread, words), above_residuals), 32)
        _store(builder, patterns, pointer_to(context, builder, out_type, out, to, 8), streamed)
        return context.get_dummy_value()

    def join(
        typing_context: Any, slots: Any, place: Any, data: Any, start: Any, above: Any, out: Any, to: Any
    ) -> Any:
        return types.void(slots, types.int64, data, types.int64, types.uint8, out, types.int64), generate

    return intrinsic(join)


_join16, _stream16 = _joiner16(False), _joiner16(True)
_join32, _stream32 = _joiner32(False), _joiner32(True)


@register_jitable
def join16(
    slots: Bytes, place: Int, residuals: Bytes, start: Int, base: Int, width: Int, out: Bytes, to: Int
) -> None:
    """Writes 32 weights of 2 bytes at byte ``to``: level base + (slot << width) + residual, sign moved."""
    require_inside(slots, place, LANES16)
    require_inside(residuals, start, LANES16)
    require_inside(out, to, 2 * LANES16)
    _join16(slots, place, residuals, start, base, width, out, to)


@register_jitable
def stream16(
    slots: Bytes, place: Int, residuals: Bytes, start: Int, base: Int, width: Int, out: Bytes, to: Int
) -> None:
    """Does the work of `join16` with non-temporal stores; only if `is_aligned`."""
    require_inside(slots, place, LANES16)
    require_inside(residuals, start, LANES16)
    require_inside(out, to, 2 * LANES16)
    _stream16(slots, place, residuals, start, base, width, out, to)


@register_jitable
def join32(slots: Bytes, place: Int, data: Bytes, start: Int, above: Int, out: Bytes, to: Int) -> None:
    """Writes 16 weights of 4 bytes at byte ``to``: (class + above) and three residual bytes, sign moved."""
    require_inside(slots, place, LANES32)
    require_inside(data, start, 3 * LANES32)
    require_inside(out, to, 4 * LANES32)
    _join32(slots, place, data, start, above, out, to)


@register_jitable
def stream32(slots: Bytes, place: Int, data: Bytes, start: Int, above: Int, out: Bytes, to: Int) -> None:
    """Does the work of `join32` with non-temporal stores; only if `is_aligned`."""
    require_inside(slots, place, LANES32)
    require_inside(data, start, 3 * LANES32)
    require_inside(out, to, 4 * LANES32)
    _stream32(slots, place, data, start, above, out, to)


def _level_bytes(lanes: int, item: int) -> Any:
    """Returns a function that writes all but the highest byte of the levels of patterns of ``item`` bytes."""
    words = ir.VectorType(ir.IntType(8 * item), lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source_type, _, target_type, _ = signature.args
        source, start, target, to = arguments
        pointer = pointer_to(context, builder, source_type, source, start, 8)
        patterns = builder.bitcast(load_bytes(builder, pointer, lanes * item), words)
        one, rest = (ir.Constant(words, [n] * lanes) for n in (1, 8 * item - 1))
        levels = builder.or_(builder.shl(patterns, one), builder.lshr(patterns, rest))
        every = builder.bitcast(levels, ir.VectorType(_BYTE, lanes * item))
        order = [lane * item + byte for lane in range(lanes) for byte in range(item - 1)]
        few = builder.shuffle_vector(every, every, ir.Constant(ir.VectorType(_INDEX, len(order)), order))
        place = pointer_to(context, builder, target_type, target, to, 8)
        builder.store(few, builder.bitcast(place, few.type.as_pointer())).align = 1
        return context.get_dummy_value()

    def write(typing_context: Any, source: Any, start: Any, target: Any, to: Any) -> Any:
        return types.void(source, types.int64, target, types.int64), generate

    return intrinsic(write)


_level_bytes16, _level_bytes32 = _level_bytes(LANES16, 2), _level_bytes(LANES32, 4)


@register_jitable
def level_bytes16(source: Bytes, start: Int, target: Bytes, to: Int) -> None:
    """Writes the lowest byte of the level of each of 32 patterns of 2 bytes, from byte ``start`` on."""
    require_inside(source, start, 2 * LANES16)
    require_inside(target, to, LANES16)
    _level_bytes16(source, start, target, to)


@register_jitable
def level_bytes32(source: Bytes, start: Int, target: Bytes, to: Int) -> None:
    """Writes the three lower bytes of the level of each of 16 patterns of 4 bytes, from byte ``start`` on."""
    require_inside(source, start, 4 * LANES32)
    require_inside(target, to, 3 * LANES32)
    _level_bytes32(source, start, target, to)


@intrinsic
def is_aligned(typing_context: Any, array: Any, offset: Any) -> Any:
    """Returns whether the address of a byte of an array is a multiple of 64."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, at = arguments
        pointer = pointer_to(context, builder, signature.args[0], target, at, 8)
        below = builder.and_(builder.ptrtoint(pointer, _ADDRESS), ir.Constant(_ADDRESS, 63))
        return builder.icmp_unsigned("==", below, ir.Constant(_ADDRESS, 0))

    return types.boolean(array, types.int64), codegen


def _looker(item: int) -> Any:
    """Returns a function that looks up weights of ``item`` bytes by one-byte classes and one-bit signs."""
    lanes, flags = LANES_LOOKED_UP, ir.VectorType(ir.IntType(1), LANES_LOOKED_UP)
    words, addresses = ir.VectorType(_INDEX, lanes), ir.VectorType(_ADDRESS, lanes)
    pointers, weights = ir.VectorType(_INDEX.as_pointer(), lanes), ir.VectorType(ir.IntType(8 * item), lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        slots, place, signs, table, out, to = arguments
        slots_type, _, _, table_type, out_type, _ = signature.args
        classes = load_bytes(builder, pointer_to(context, builder, slots_type, slots, place, 8), lanes)
        negative = builder.bitcast(builder.trunc(signs, ir.IntType(lanes)), flags)
        doubled = builder.shl(builder.zext(classes, words), ir.Constant(words, [1] * lanes))
        entries = builder.zext(builder.or_(doubled, builder.zext(negative, words)), addresses)
        base = pointer_to(context, builder, table_type, table, ir.Constant(_ADDRESS, 0), 32)
        start = splat(builder, builder.ptrtoint(base, _ADDRESS), lanes)
        places = builder.add(start, builder.shl(entries, ir.Constant(addresses, [2] * lanes)))
        gather = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(words, [pointers, _INDEX, flags, words]),
            f"llvm.masked.gather.v{lanes}i32.v{lanes}p0i32",
        )
        every, nothing = ir.Constant(flags, [1] * lanes), ir.Constant(words, ir.Undefined)
        aligned = ir.Constant(_INDEX, 4)
        found = builder.call(gather, [builder.inttoptr(places, pointers), aligned, every, nothing])
        target = pointer_to(context, builder, out_type, out, to, 8)
        narrow = found if item == 4 else builder.trunc(found, weights)
        builder.store(narrow, builder.bitcast(target, weights.as_pointer())).align = 1
        return context.get_dummy_value()

    def look_up(
        typing_context: Any, slots: Any, place: Any, signs: Any, table: Any, out: Any, to: Any
    ) -> Any:
        return types.void(slots, types.int64, types.uint64, table, out, types.int64), generate

    return intrinsic(look_up)


_look_up2, _look_up4 = _looker(2), _looker(4)


@register_jitable
def look_up2(
    slots: Bytes, place: Int, signs: np.uint64, table: NDArray[np.uint32], out: Bytes, to: Int
) -> None:
    """Writes 16 weights of 2 bytes at byte ``to``: the lower halves of entries 2 * slot + sign of a table."""
    require_inside(slots, place, LANES_LOOKED_UP)
    require_inside(table, 0, 4 * BY_SLOT)
    require_inside(out, to, 2 * LANES_LOOKED_UP)
    _look_up2(slots, place, signs, table, out, to)


@register_jitable
def look_up4(
    slots: Bytes, place: Int, signs: np.uint64, table: NDArray[np.uint32], out: Bytes, to: Int
) -> None:
    """Writes 16 weights of 4 bytes at byte ``to``: entries 2 * slot + sign of a table."""
    require_inside(slots, place, LANES_LOOKED_UP)
    require_inside(table, 0, 4 * BY_SLOT)
    require_inside(out, to, 4 * LANES_LOOKED_UP)
    _look_up4(slots, place, signs, table, out, to)
