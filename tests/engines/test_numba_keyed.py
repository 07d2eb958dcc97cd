"""The kernels for keyed tables of the numba engine against the reference: equal hashes and bit arrays."""

from __future__ import annotations

import numpy as np
import pytest

from sfpformat import KeyedTable
from sfpformat.coding.keyed.equations import random_bytes
from sfpformat.engines import numba as fast
from sfpformat.engines import reference
from sfpformat.keyed.keys import packed
from sfpformat.options import Table, Uniform


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_hashes_are_the_same(seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys = packed([rng.bytes(int(size)) for size in rng.integers(0, 70, 400)])
    assert np.array_equal(fast.hash_keys(keys, seed), reference.hash_keys(keys, seed))


@pytest.mark.parametrize("outputs", [1, 3, 60])
@pytest.mark.parametrize("quantiser", [Uniform(step=0.1), Uniform(step=1e-6), Table(centroids=9)])
@pytest.mark.parametrize("importance_bits", [0, 7])
def test_rows_at_any_positions_are_the_same(
    outputs: int, quantiser: Uniform | Table, importance_bits: int
) -> None:
    rng = np.random.default_rng(outputs)
    weights = rng.laplace(size=(200, outputs)) * (rng.random((200, outputs)) < 0.4)
    importance = rng.random(200)
    table = KeyedTable.build(
        [f"key {i}" for i in range(200)],
        weights,
        quantiser=quantiser,
        importance=importance,
        importance_bits=importance_bits,
        engine="python",
    )
    code, bits = table.map.code, table._bits
    last = 8 * (len(bits) - 8) - code.most_bits  # the last bit at which a row may begin
    positions = rng.integers(0, last, (3000, 4))
    positions[0], positions[1] = 0, last
    one, other = fast.decode_rows(code, bits, positions), reference.decode_rows(code, bits, positions)
    for mine, its in zip(one, other, strict=True):
        assert mine.tobytes() == its.tobytes()


@pytest.mark.parametrize(
    ("rows", "longest", "bits"), [(1, 9, 64), (50, 30, 1280), (400, 20, 6400), (30, 40, 320)]
)
def test_equations_have_the_same_solution_or_none(rows: int, longest: int, bits: int) -> None:
    solved = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(0, longest, rows)
        quarter = (bits - longest) // 4
        positions = rng.integers(0, quarter, (rows, 4)) + quarter * np.arange(4)
        data = rng.integers(0, 256, (int(sizes.sum()) + 7) // 8, dtype=np.uint8)
        free = random_bytes(bits // 8, seed)
        one, other = (engine.solve_rows(positions, sizes, data, free) for engine in (fast, reference))
        assert (one is None) == (other is None)
        if one is None or other is None:
            continue
        assert np.array_equal(one, other)
        solved += 1
        values = np.unpackbits(one, bitorder="little")
        wanted = np.unpackbits(data, bitorder="little")
        at = 0
        for row, size in zip(positions, sizes, strict=True):
            for t in range(size):
                assert np.bitwise_xor.reduce(values[row + t]) == wanted[at + t]
            at += size
    assert solved == 0 if bits == 320 else solved > 5
