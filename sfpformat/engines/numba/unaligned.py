"""Unaligned loads and stores of whole words in byte arrays, for compiled kernels.

Rules: kernels access memory only through these functions or through plain indexing. The caller proves before
the loop that all offsets are in bounds. With the environment variable ``SFPFORMAT_CHECKED=1`` every access is
also checked and raises IndexError; the tests use this to find errors in those proofs (with
``NUMBA_BOUNDSCHECK=1`` for plain indexing, and a separate ``NUMBA_CACHE_DIR``, because the compiled code
differs).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import register_jitable
from numba.np.arrayobj import make_array, populate_array
from numpy.typing import NDArray

from .compiling import Int, intrinsic

CHECKED = os.environ.get("SFPFORMAT_CHECKED") == "1"


def pointer_to(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, bits: int) -> Any:
    """Returns a pointer to the word of ``bits`` bits that starts at byte ``offset`` of an array."""
    data = context.make_array(array_type)(context, builder, array).data
    bytewise = builder.bitcast(data, cgutils.voidptr_t)
    return builder.bitcast(builder.gep(bytewise, [offset]), ir.IntType(bits).as_pointer())


def _loader(word_type: Any) -> Callable[[Any, Int], Any]:
    """Returns a function (array, byte offset) -> little-endian word."""

    def load(typing_context: Any, array: Any, offset: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            target, at = arguments
            pointer = pointer_to(context, builder, signature.args[0], target, at, word_type.bitwidth)
            word = builder.load(pointer)
            word.align = 1
            return word

        return word_type(array, types.int64), codegen

    return intrinsic(load)


def _storer(word_type: Any) -> Callable[[Any, Int, Int], Any]:
    """Returns a function (array, byte offset, word) that stores a little-endian word."""

    def store(typing_context: Any, array: Any, offset: Any, word: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            target, at, value = arguments
            pointer = pointer_to(context, builder, signature.args[0], target, at, word_type.bitwidth)
            builder.store(value, pointer).align = 1
            return context.get_dummy_value()

        return types.void(array, types.int64, word_type), codegen

    return intrinsic(store)


_load16: Callable[[Any, Int], np.uint16] = _loader(types.uint16)
_load32: Callable[[Any, Int], np.uint32] = _loader(types.uint32)
_load64: Callable[[Any, Int], np.uint64] = _loader(types.uint64)
_store16, _store32, _store64 = map(_storer, (types.uint16, types.uint32, types.uint64))


@register_jitable
def require_inside(array: NDArray[Any], offset: Int, size: Int) -> None:
    """Raises IndexError in a checked build if an access is out of bounds."""
    if CHECKED and (offset < 0 or offset + size > array.nbytes):
        raise IndexError("an access outside its array")


@register_jitable
def load16(array: NDArray[Any], offset: Int) -> np.uint16:
    """Returns the uint16 at byte ``offset``."""
    require_inside(array, offset, 2)
    return _load16(array, offset)


@register_jitable
def load32(array: NDArray[Any], offset: Int) -> np.uint32:
    """Returns the uint32 at byte ``offset``."""
    require_inside(array, offset, 4)
    return _load32(array, offset)


@register_jitable
def load64(array: NDArray[Any], offset: Int) -> np.uint64:
    """Returns the uint64 at byte ``offset``."""
    require_inside(array, offset, 8)
    return _load64(array, offset)


@register_jitable
def store16(array: NDArray[Any], offset: Int, word: Int) -> None:
    """Writes a uint16 at byte ``offset``."""
    require_inside(array, offset, 2)
    _store16(array, offset, word)


@register_jitable
def store32(array: NDArray[Any], offset: Int, word: Int) -> None:
    """Writes a uint32 at byte ``offset``."""
    require_inside(array, offset, 4)
    _store32(array, offset, word)


@register_jitable
def store64(array: NDArray[Any], offset: Int, word: Int) -> None:
    """Writes a uint64 at byte ``offset``."""
    require_inside(array, offset, 8)
    _store64(array, offset, word)


@intrinsic
def prefetch(typing_context: Any, array: Any, offset: Any) -> Any:
    """Prefetches the cache line of a byte. The byte may lie outside the array."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, at = arguments
        pointer = pointer_to(context, builder, signature.args[0], target, at, 8)
        number = ir.IntType(32)
        hint = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, hint, "llvm.prefetch.p0i8")
        reading, nearest, of_data = 0, 3, 1
        builder.call(function, [pointer, *(ir.Constant(number, n) for n in (reading, nearest, of_data))])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@intrinsic
def bytes_at(typing_context: Any, address: Any, size: Any) -> Any:
    """Returns the memory at an address as a uint8 array. The caller must keep the memory alive."""
    array_type = types.Array(types.uint8, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, length = arguments
        array = make_array(array_type)(context, builder)
        one = ir.Constant(length.type, 1)
        data = builder.inttoptr(start, array.data.type)
        populate_array(array, data=data, shape=[length], strides=[one], itemsize=one, meminfo=None)
        return array._getvalue()

    return array_type(types.int64, types.int64), codegen


@intrinsic
def trailing_zeros(typing_context: Any, word: Any) -> Any:
    """Returns the number of zero bits below the lowest one bit of a uint64, which must not be 0."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), codegen


@intrinsic
def count_ones(typing_context: Any, word: Any) -> Any:
    """Returns the number of one bits of a uint64."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), codegen


@intrinsic
def leading_zeros(typing_context: Any, word: Any) -> Any:
    """Returns the number of zero bits above the highest one bit of a uint64, which must not be 0."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), codegen


@intrinsic
def fence(typing_context: Any) -> Any:
    """Full memory fence: makes all earlier stores, non-temporal ones too, visible to other threads."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen
