"""Writes survivors to their positions with vector instructions, if the processor has them.

With AVX-512, one instruction expands 64 bytes. With SSSE3 (2-byte weights) or AVX2 (4-byte weights), a
look-up table permutes the survivors of eight positions. Otherwise a loop over survivors is faster, so callers
check `WAY2` and `WAY4` first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import register_jitable

from ...coding.bits import Bytes
from .compiling import Int, intrinsic
from .unaligned import count_ones, pointer_to, require_inside

_FEATURES = binding.get_host_cpu_features()
# The method for weights of 2 and of 4 bytes on this processor.
ONE_BY_ONE, PERMUTED, EXPANDED = range(3)
WAY2 = EXPANDED if _FEATURES.get("avx512vbmi2") else PERMUTED if _FEATURES.get("ssse3") else ONE_BY_ONE
WAY4 = EXPANDED if _FEATURES.get("avx512f") else PERMUTED if _FEATURES.get("avx2") else ONE_BY_ONE
PERMUTED_AT_ONCE = 8  # positions

_PRUNED = 0x80  # marks a position without a survivor
# For each mask byte: the index of the survivor at each of eight positions. NUMBERS2 holds the same for each
# byte of two-byte survivors.
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
    """Returns a function that writes values to positions with a set mask bit, and zero to the others."""
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


@intrinsic
def _permute2(
    typing_context: Any, values: Any, place: Any, numbers: Any, mask: Any, out: Any, to: Any
) -> Any:
    """Expands eight positions of two bytes: permutes 16 bytes; an index with its high bit set gives zero."""
    vector = ir.VectorType(ir.IntType(8), 16)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not _FEATURES.get("ssse3"):  # compiled anyway, but LLVM lacks the instruction
            return context.get_dummy_value()
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
    """Expands eight positions of four bytes: permutes eight words; a negative index gives zero."""
    bytes8, vector = ir.VectorType(ir.IntType(8), 8), ir.VectorType(ir.IntType(32), 8)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not _FEATURES.get("avx2"):  # compiled anyway, but LLVM lacks the instruction
            return context.get_dummy_value()
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
    """Loads a vector from any byte of an array."""
    pointer = pointer_to(context, builder, kind, array, offset, 8)
    loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    loaded.align = 1
    return loaded


def _store(context: Any, builder: Any, kind: Any, array: Any, offset: Any, value: Any) -> None:
    """Stores a vector at any byte of an array."""
    pointer = pointer_to(context, builder, kind, array, offset, 8)
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 1


@register_jitable
def expand2(values: Bytes, place: Int, mask: np.uint64, out: Bytes, to: Int) -> None:
    """Writes 32 weights of 2 bytes at byte ``to``: survivors from byte ``place`` on, and zeros.

    May read up to 16 bytes past the last survivor. Not for `WAY2` equal to `ONE_BY_ONE`.
    """
    require_inside(out, to, 64)
    if WAY2 == EXPANDED:
        require_inside(values, place, 2 * count_ones(mask))
        _expand2(values, place, mask, out, to)
    else:
        for start in range(0, 32, PERMUTED_AT_ONCE):
            eight = np.int64(mask >> np.uint64(start) & np.uint64(255))
            require_inside(values, place, 2 * PERMUTED_AT_ONCE)
            _permute2(values, place, NUMBERS2, eight, out, to + 2 * start)
            place += 2 * np.int64(count_ones(np.uint64(eight)))


@register_jitable
def expand4(values: Bytes, place: Int, mask: np.uint64, out: Bytes, to: Int) -> None:
    """Writes 32 weights of 4 bytes at byte ``to``: survivors from byte ``place`` on, and zeros.

    May read up to 32 bytes past the last survivor. Not for `WAY4` equal to `ONE_BY_ONE`.
    """
    require_inside(out, to, 128)
    if WAY4 == EXPANDED:
        for start in range(0, 32, 16):
            few = mask >> np.uint64(start) & np.uint64(0xFFFF)
            require_inside(values, place, 4 * count_ones(few))
            _expand4(values, place, few, out, to + 4 * start)
            place += 4 * np.int64(count_ones(few))
    else:
        for start in range(0, 32, PERMUTED_AT_ONCE):
            eight = np.int64(mask >> np.uint64(start) & np.uint64(255))
            require_inside(values, place, 4 * PERMUTED_AT_ONCE)
            _permute4(values, place, NUMBERS4, eight, out, to + 4 * start)
            place += 4 * np.int64(count_ones(np.uint64(eight)))
