"""Classes of the numbers of a delta: counted as few small numbers."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
from numpy.typing import NDArray

from sfpformat.coding.classes import Layout
from sfpformat.encode.number_sequences import fine_classes, octaves, of_fine_classes


def firsts(layout: Layout) -> list[int]:
    """The first number of each class."""
    return list(accumulate((1 << width for width in layout.extra), initial=layout.base))[:-1]


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("fraction", [0, 1, 2, 3])
def test_counting_fine_classes_gives_the_class_of_each_number(dtype: type, fraction: int) -> None:
    bits = 8 * np.dtype(dtype).itemsize
    rng = np.random.default_rng(0)
    powers = [1 << n for n in range(bits)]
    drawn = (rng.integers(0, 1 << 62, 9000) >> rng.integers(0, 62, 9000)).tolist()
    found = {
        n % (1 << bits) for n in (*drawn, *powers, *(n - 1 for n in powers), *range(600), (1 << bits) - 1)
    }
    numbers: NDArray[np.unsignedinteger] = np.array(sorted(found), dtype)
    for least, greatest in ((0, (1 << bits) - 1), (5, 1 << 20), (70_000, (1 << 31) - 5), (3, 3_000_000)):
        layout = octaves(fraction, least, greatest)
        some = numbers[(numbers >= dtype(least)) & (numbers <= dtype(greatest))]
        expected = np.searchsorted(np.array(firsts(layout), np.uint64), some.astype(np.uint64), side="right")
        fine = of_fine_classes(layout)
        assert len(fine.extra) == len(layout.extra)
        assert np.array_equal(np.searchsorted(firsts(fine), fine_classes(some), side="right"), expected)
