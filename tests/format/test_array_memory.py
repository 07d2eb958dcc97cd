"""Memory for decoded tensors: arrays of medium size share blocks that consist of huge pages."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sfpformat.decode.array_memory import SHARING, arrays_of

HUGE_PAGE = 2 << 20
sizes = st.lists(st.integers(0, 6 << 20) | st.integers(SHARING - 1, SHARING << 4), max_size=40)


def arrays(wanted: list[int]) -> list[NDArray[Any]]:
    """Arrays of bytes."""
    return list(arrays_of(((size,), np.dtype(np.uint8), size) for size in wanted))


def address(array: NDArray[Any]) -> int:
    """The address of an array's first byte."""
    return array.ctypes.data


def blocks(found: list[NDArray[Any]]) -> list[list[NDArray[Any]]]:
    """The arrays of at least `SHARING` bytes, by the memory that they are in, in the order of addresses."""
    out = defaultdict(list)
    for array in found:
        if array.nbytes >= SHARING:
            out[id(array.base)].append(array)
    return [sorted(each, key=address) for each in out.values()]


@given(sizes)
def test_arrays_have_the_sizes_and_do_not_overlap(wanted: list[int]) -> None:
    found = arrays(wanted)
    assert [array.nbytes for array in found] == wanted
    for block in blocks(found):
        assert all(address(array) % 64 == 0 for array in block)
        for left, right in itertools.pairwise(block):
            assert address(left) + left.nbytes <= address(right)


@given(sizes)
def test_a_block_has_at_most_eight_times_the_bytes_of_any_array_in_it(wanted: list[int]) -> None:
    for block in blocks(arrays(wanted)):
        for array in block:
            assert array.base is not None
            assert address(block[-1]) + block[-1].nbytes - address(block[0]) <= 8 * array.nbytes
            # A block of one huge page lies in an allocation of two.
            least = 2 * HUGE_PAGE if 8 * array.nbytes >= HUGE_PAGE else 0
            assert array.base.nbytes <= max(8 * array.nbytes, least) + 64


def test_blocks_of_huge_pages_begin_at_one_and_are_filled() -> None:
    found = blocks(arrays([600_000, 1_200_000] * 20))  # as in a transformer, in turns
    assert sorted(len(block) for block in found) == [2, *(3,) * 6, *(5,) * 4]
    assert all(address(block[0]) % HUGE_PAGE == 0 for block in found)


def test_arrays_of_an_eighth_of_a_huge_page_share_one() -> None:
    (found,) = blocks(arrays([256 << 10] * 8))
    assert address(found[0]) % HUGE_PAGE == 0
    assert len(found) == 8


def test_large_arrays_begin_at_a_huge_page() -> None:
    assert all(address(array) % HUGE_PAGE == 0 for array in arrays([4 << 20, 5_000_000, 30_000_000]))


def test_arrays_have_the_shape_and_dtype() -> None:
    kinds: list[tuple[tuple[int, ...], np.dtype[Any], int]] = [
        ((300, 200), np.dtype(np.float32), 240_000),
        ((0, 3), np.dtype(np.int8), 0),
    ]
    assert [(array.shape, array.dtype) for array in arrays_of(kinds)] == [kind[:2] for kind in kinds]
