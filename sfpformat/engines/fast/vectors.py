"""Vector steps that a compiler does not find by itself, written in LLVM's vector types for any processor.

Joining class and residual to a weight's bit pattern: Numba's integers widen to 64 bits, in which a loop over
bytes runs at a third of the speed. Expanding survivors to their positions: one instruction for a vector where
the processor has it; LLVM makes a branch a weight of it where not, so callers ask `EXPANDS2` and `EXPANDS4`
first. Looking up by class and sign: half the time of a loop, which widens here too.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from .memory import count_ones, pointer_to, require_inside

LANES16, LANES32 = 32, 16  # weights a step: 64 bytes of output

# Positions that one step expands to weights of 2 and of 4 bytes, and whether that is one instruction here.
EXPANDED2, EXPANDED4 = 32, 16
_FEATURES = binding.get_host_cpu_features()
EXPANDS2, EXPANDS4 = bool(_FEATURES.get("avx512vbmi2")), bool(_FEATURES.get("avx512f"))

LANES_LOOKED_UP = 16  # weights that one step looks up
BY_SLOT = 512  # entries of the table

_BYTE, _INDEX, _ADDRESS = ir.IntType(8), ir.IntType(32), ir.IntType(64)


def _load_bytes(builder: Any, pointer: Any, count: int) -> Any:
    """A vector of ``count`` bytes from anywhere."""
    vector = builder.load(builder.bitcast(pointer, ir.VectorType(_BYTE, count).as_pointer()))
    vector.align = 1
    return vector


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    """A vector whose lanes are all ``value``."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INDEX, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INDEX, lanes), [0] * lanes))


def _joiner(lanes: int, residual_bytes: int) -> Any:
    """A function that joins ``lanes`` classes of a byte with residuals of some bytes, and moves the sign."""
    word_bits = 8 * (residual_bytes + 1)
    words = ir.VectorType(ir.IntType(word_bits), lanes)

    def constant(value: int) -> Any:
        return ir.Constant(words, [value] * lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        slots, place, data, start, above, out, to = arguments
        slots_type, _, data_type, _, _, out_type, _ = signature.args
        classes = _load_bytes(builder, pointer_to(context, builder, slots_type, slots, place, 8), lanes)
        classes = builder.zext(builder.add(classes, _splat(builder, above, lanes)), words)
        residuals = _load_bytes(
            builder, pointer_to(context, builder, data_type, data, start, 8), residual_bytes * lanes
        )
        # Room for the class above each residual: a byte of zero, taken from the second operand.
        none = ir.Constant(residuals.type, [0] * (residual_bytes * lanes))
        order = [
            lane * residual_bytes + byte if byte < residual_bytes else residual_bytes * lanes
            for lane in range(lanes)
            for byte in range(residual_bytes + 1)
        ]
        spread = builder.shuffle_vector(
            residuals, none, ir.Constant(ir.VectorType(_INDEX, len(order)), order)
        )
        levels = builder.or_(
            builder.bitcast(spread, words), builder.shl(classes, constant(8 * residual_bytes))
        )
        patterns = builder.or_(
            builder.lshr(levels, constant(1)), builder.shl(levels, constant(word_bits - 1))
        )
        target = pointer_to(context, builder, out_type, out, to, 8)
        builder.store(patterns, builder.bitcast(target, words.as_pointer())).align = 1
        return context.get_dummy_value()

    def join(
        typing_context: Any, slots: Any, place: Any, data: Any, start: Any, above: Any, out: Any, to: Any
    ) -> Any:
        return types.void(slots, types.int64, data, types.int64, types.uint8, out, types.int64), generate

    return intrinsic(join)


_join16, _join32 = _joiner(LANES16, 1), _joiner(LANES32, 3)


@register_jitable
def join16(slots: Any, place: int, data: Any, start: int, above: int, out: Any, to: int) -> None:
    """Writes 32 weights of 2 bytes at byte ``to``: (class + above) and residual byte, sign moved."""
    require_inside(slots, place, LANES16)
    require_inside(data, start, LANES16)
    require_inside(out, to, 2 * LANES16)
    _join16(slots, place, data, start, above, out, to)


@register_jitable
def join32(slots: Any, place: int, data: Any, start: int, above: int, out: Any, to: int) -> None:
    """Writes 16 weights of 4 bytes at byte ``to``: (class + above) and three residual bytes, sign moved."""
    require_inside(slots, place, LANES32)
    require_inside(data, start, 3 * LANES32)
    require_inside(out, to, 4 * LANES32)
    _join32(slots, place, data, start, above, out, to)


def _expander(item: int) -> Any:
    """A function that writes values to the positions whose mask bits are set, and zero to the others."""
    lanes, word = 64 // item, ir.IntType(8 * item)
    vector, flags = ir.VectorType(word, lanes), ir.VectorType(ir.IntType(1), lanes)
    name = f"llvm.masked.expandload.v{lanes}i{8 * item}"

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, place, mask, out, to = arguments
        values_type, _, _, out_type, _ = signature.args
        source = pointer_to(context, builder, values_type, values, place, 8 * item)
        set_bits = builder.bitcast(builder.trunc(mask, ir.IntType(lanes)), flags)
        kind = ir.FunctionType(vector, [source.type, flags, vector])
        expand = cgutils.get_or_insert_function(builder.module, kind, name)
        expanded = builder.call(expand, [source, set_bits, ir.Constant(vector, [0] * lanes)])
        target = pointer_to(context, builder, out_type, out, to, 8)
        builder.store(expanded, builder.bitcast(target, vector.as_pointer())).align = 1
        return context.get_dummy_value()

    def expand(typing_context: Any, values: Any, place: Any, mask: Any, out: Any, to: Any) -> Any:
        return types.void(values, types.int64, types.uint64, out, types.int64), generate

    return intrinsic(expand)


_expand2, _expand4 = _expander(2), _expander(4)


@register_jitable
def expand2(values: Any, place: int, mask: Any, out: Any, to: int) -> None:
    """Writes 32 weights of 2 bytes at byte ``to``, those of set mask bits from byte ``place`` on."""
    require_inside(values, place, 2 * count_ones(mask))
    require_inside(out, to, 2 * EXPANDED2)
    _expand2(values, place, mask, out, to)


@register_jitable
def expand4(values: Any, place: int, mask: Any, out: Any, to: int) -> None:
    """Writes 16 weights of 4 bytes at byte ``to``, those of set mask bits from byte ``place`` on."""
    require_inside(values, place, 4 * count_ones(mask))
    require_inside(out, to, 4 * EXPANDED4)
    _expand4(values, place, mask, out, to)


def _looker(item: int) -> Any:
    """A function that looks up weights of ``item`` bytes by classes of a byte and signs of a bit."""
    lanes, flags = LANES_LOOKED_UP, ir.VectorType(ir.IntType(1), LANES_LOOKED_UP)
    words, addresses = ir.VectorType(_INDEX, lanes), ir.VectorType(_ADDRESS, lanes)
    pointers, weights = ir.VectorType(_INDEX.as_pointer(), lanes), ir.VectorType(ir.IntType(8 * item), lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        slots, place, signs, table, out, to = arguments
        slots_type, _, _, table_type, out_type, _ = signature.args
        classes = _load_bytes(builder, pointer_to(context, builder, slots_type, slots, place, 8), lanes)
        negative = builder.bitcast(builder.trunc(signs, ir.IntType(lanes)), flags)
        doubled = builder.shl(builder.zext(classes, words), ir.Constant(words, [1] * lanes))
        entries = builder.zext(builder.or_(doubled, builder.zext(negative, words)), addresses)
        base = pointer_to(context, builder, table_type, table, ir.Constant(_ADDRESS, 0), 32)
        start = _splat(builder, builder.ptrtoint(base, _ADDRESS), lanes)
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
def look_up2(slots: Any, place: int, signs: Any, table: Any, out: Any, to: int) -> None:
    """Writes 16 weights of 2 bytes at byte ``to``: the lower halves of entries 2 * slot + sign of a table."""
    require_inside(slots, place, LANES_LOOKED_UP)
    require_inside(table, 0, 4 * BY_SLOT)
    require_inside(out, to, 2 * LANES_LOOKED_UP)
    _look_up2(slots, place, signs, table, out, to)


@register_jitable
def look_up4(slots: Any, place: int, signs: Any, table: Any, out: Any, to: int) -> None:
    """Writes 16 weights of 4 bytes at byte ``to``: entries 2 * slot + sign of a table."""
    require_inside(slots, place, LANES_LOOKED_UP)
    require_inside(table, 0, 4 * BY_SLOT)
    require_inside(out, to, 4 * LANES_LOOKED_UP)
    _look_up4(slots, place, signs, table, out, to)
