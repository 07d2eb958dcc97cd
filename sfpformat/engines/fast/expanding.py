"""Survivors to their positions, a vector at a time, where the processor has instructions for it.

One instruction expands 64 bytes where there is AVX-512; with AVX2 the survivors of eight positions are
permuted by a table. LLVM makes a branch a weight of the first where it is not there, and the others have no
name in its vector types, so callers ask `WAY2` and `WAY4` first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from .memory import count_ones, pointer_to, require_inside

_FEATURES = binding.get_host_cpu_features()
# How weights of 2 and of 4 bytes are expanded on this processor.
ONE_BY_ONE, PERMUTED, EXPANDED = range(3)
WAY2 = EXPANDED if _FEATURES.get("avx512vbmi2") else PERMUTED if _FEATURES.get("ssse3") else ONE_BY_ONE
WAY4 = EXPANDED if _FEATURES.get("avx512f") else PERMUTED if _FEATURES.get("avx2") else ONE_BY_ONE
# Positions of a step.
EXPANDED2, EXPANDED4, PERMUTED_AT_ONCE = 32, 16, 8

_PRUNED = 0x80  # in place of a number
# For each mask byte the number of the survivor at each of eight positions, and the same for each byte of
# survivors of two bytes.
_NUMBERS = np.full((256, PERMUTED_AT_ONCE), _PRUNED, np.uint8)
for _mask in range(256):
    _set = [_p for _p in range(PERMUTED_AT_ONCE) if _mask >> _p & 1]
    _NUMBERS[_mask, _set] = range(len(_set))
NUMBERS4 = _NUMBERS.reshape(-1)
NUMBERS2 = (
    np.where(
        _NUMBERS[:, :, None] == _PRUNED, _PRUNED, 2 * _NUMBERS[:, :, None] + np.arange(2, dtype=np.uint8)
    )
    .astype(np.uint8)
    .reshape(-1)
)


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


@intrinsic
def _permute2(
    typing_context: Any, values: Any, place: Any, numbers: Any, mask: Any, out: Any, to: Any
) -> Any:
    """Eight positions of two bytes: a permutation of 16 bytes, of which a set highest bit makes zero."""
    vector = ir.VectorType(ir.IntType(8), 16)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values_type, _, numbers_type, _, out_type, _ = signature.args
        source, place, numbers, mask, out, to = arguments
        survivors = _load(context, builder, values_type, source, place, vector)
        row = builder.shl(mask, ir.Constant(mask.type, 4))
        order = _load(context, builder, numbers_type, numbers, row, vector)
        kind = ir.FunctionType(vector, [vector, vector])
        permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.ssse3.pshuf.b.128")
        _store(context, builder, out_type, out, to, builder.call(permute, [survivors, order]))
        return context.get_dummy_value()

    return types.void(values, types.int64, numbers, types.int64, out, types.int64), generate


@intrinsic
def _permute4(
    typing_context: Any, values: Any, place: Any, numbers: Any, mask: Any, out: Any, to: Any
) -> Any:
    """Eight positions of four bytes: a permutation of eight words, and zeros where a number is negative."""
    bytes8, vector = ir.VectorType(ir.IntType(8), 8), ir.VectorType(ir.IntType(32), 8)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values_type, _, numbers_type, _, out_type, _ = signature.args
        source, place, numbers, mask, out, to = arguments
        survivors = _load(context, builder, values_type, source, place, vector)
        row = builder.shl(mask, ir.Constant(mask.type, 3))
        order = builder.sext(_load(context, builder, numbers_type, numbers, row, bytes8), vector)
        kind = ir.FunctionType(vector, [vector, vector])
        permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.permd")
        permuted = builder.call(permute, [survivors, order])
        nothing = ir.Constant(vector, [0] * 8)
        kept = builder.select(builder.icmp_signed("<", order, nothing), nothing, permuted)
        _store(context, builder, out_type, out, to, kept)
        return context.get_dummy_value()

    return types.void(values, types.int64, numbers, types.int64, out, types.int64), generate


def _load(context: Any, builder: Any, kind: Any, array: Any, offset: Any, vector: Any) -> Any:
    """A vector from any byte of an array."""
    pointer = pointer_to(context, builder, kind, array, offset, 8)
    loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    loaded.align = 1
    return loaded


def _store(context: Any, builder: Any, kind: Any, array: Any, offset: Any, value: Any) -> None:
    """Stores a vector at any byte of an array."""
    pointer = pointer_to(context, builder, kind, array, offset, 8)
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 1


@register_jitable
def permute2(values: Any, place: int, mask: int, out: Any, to: int) -> None:
    """Writes 8 weights of 2 bytes at byte ``to``, those of set mask bits from byte ``place`` on.

    16 bytes are read, however few bits are set.
    """
    require_inside(values, place, 2 * PERMUTED_AT_ONCE)
    require_inside(NUMBERS2, mask << 4, 16)
    require_inside(out, to, 2 * PERMUTED_AT_ONCE)
    _permute2(values, place, NUMBERS2, mask, out, to)


@register_jitable
def permute4(values: Any, place: int, mask: int, out: Any, to: int) -> None:
    """Writes 8 weights of 4 bytes at byte ``to``, those of set mask bits from byte ``place`` on.

    32 bytes are read, however few bits are set.
    """
    require_inside(values, place, 4 * PERMUTED_AT_ONCE)
    require_inside(NUMBERS4, mask << 3, 8)
    require_inside(out, to, 4 * PERMUTED_AT_ONCE)
    _permute4(values, place, NUMBERS4, mask, out, to)
