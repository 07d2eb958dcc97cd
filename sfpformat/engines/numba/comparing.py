"""Keys of elements, and comparisons of 64 elements at once.

The result of a comparison is a mask of 64 bits. LLVM translates the vectors for the processor.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import register_jitable
from numpy.typing import NDArray

from .compiling import Int, intrinsic
from .unaligned import pointer_to, require_inside

Masks: TypeAlias = tuple[np.uint64, np.uint64, np.uint64, np.uint64]

# Elements per comparison, the bits of a mask.
COMPARED = 64


def _vector(context: Any, builder: Any, array_type: Any, array: Any, start: Any) -> Any:
    """Returns the vector of `COMPARED` elements from ``start`` on."""
    bits = array_type.dtype.bitwidth
    offset = builder.mul(start, ir.Constant(start.type, bits // 8))
    pointer = pointer_to(context, builder, array_type, array, offset, bits)
    kind = ir.VectorType(ir.IntType(bits), COMPARED)
    vector = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    vector.align = 1
    return vector


def _mask(builder: Any, comparison: str, left: Any, right: Any) -> Any:
    return builder.bitcast(builder.icmp_unsigned(comparison, left, right), ir.IntType(COMPARED))


@intrinsic
def _differing(typing_context: Any, first: Any, second: Any, start: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right = (
            _vector(context, builder, signature.args[i], arguments[i], arguments[2]) for i in (0, 1)
        )
        return _mask(builder, "!=", left, right)

    return types.uint64(first, second, types.int64), codegen


@intrinsic
def _inside(typing_context: Any, array: Any, start: Any, low: Any, first: Any, size: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_type = signature.args[0]
        vector = _vector(context, builder, array_type, arguments[0], arguments[1])
        number = ir.IntType(array_type.dtype.bitwidth)

        def repeated(value: Any) -> Any:
            if number.width < 64:
                value = builder.trunc(value, number)
            undefined = ir.Constant(vector.type, ir.Undefined)
            index = ir.VectorType(ir.IntType(32), COMPARED)
            one = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(one, undefined, ir.Constant(index, [0] * COMPARED))

        below = repeated(arguments[2])
        ones = ir.Constant(vector.type, [1] * COMPARED)
        magnitude = builder.and_(builder.sub(builder.and_(vector, below), ones), below)
        return _mask(builder, "<", builder.sub(magnitude, repeated(arguments[3])), repeated(arguments[4]))

    return types.uint64(array, types.int64, types.uint64, types.uint64, types.uint64), codegen


@register_jitable
def first_start(size: Int) -> Int:
    """Returns the start of the first comparison of an array of ``size`` elements; the last one ends with it.

    Negative if the size is no multiple of `COMPARED`: the first comparison is then of fewer elements, and
    the caller makes it without `differing` and `inside`.
    """
    return -(-size % COMPARED)


@register_jitable
def differing(first: NDArray[Any], second: NDArray[Any], start: Int) -> np.uint64:
    """Returns the mask of the 64 elements from ``start`` on that differ between arrays of one dtype."""
    require_inside(first, start * first.itemsize, COMPARED * first.itemsize)
    require_inside(second, start * second.itemsize, COMPARED * second.itemsize)
    mask: np.uint64 = _differing(first, second, start)
    return mask


@register_jitable
def inside(array: NDArray[Any], start: Int, low: Int, first: Int, size: Int) -> np.uint64:
    """Returns the mask of the 64 elements from ``start`` on whose magnitude minus 1 is in a range.

    Args:
        array: bit patterns.
        start: index of the first element.
        low: mask of a magnitude; the magnitude minus 1 is taken modulo its width.
        first, size: the range ``first`` to ``first + size - 1``.
    """
    require_inside(array, start * array.itemsize, COMPARED * array.itemsize)
    mask: np.uint64 = _inside(array, start, low, first, size)
    return mask


@register_jitable
def key_of(old: np.uint64, low: np.uint64, shift: Int, is_float: bool) -> np.uint64:
    """Returns the key of an element, given the mask of its magnitude."""
    return (((old & low) - np.uint64(1)) & low) >> np.uint64(shift) if is_float else np.uint64(0)


@register_jitable
def masks_of(bits: Int, is_float: bool) -> Masks:
    """Returns the place of the sign, and the masks of magnitude and pattern and of the bits to flip."""
    top = np.uint64(bits - 1)
    low = (np.uint64(1) << top) - np.uint64(1)
    return top, low, low | (np.uint64(1) << top), low if is_float else np.uint64(0)
