"""The numba engine against the reference, for streams with windows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfpformat import PRESETS, Table, Uniform
from sfpformat.coding.codetable import CodeTable
from sfpformat.coding.windows import encode_windows
from sfpformat.engines.numba.window_packing import pack_windows
from sfpformat.numpy import save

from ..support.conformance_cases import cases, data_of
from ..support.mutations import with_changed_chunks, with_random_planes
from .test_numba_decode import same_by_both

WINDOWS = [case for case in cases("yn") if case["recipe"] == "recipes.windows"]
SPEED = PRESETS["speed"]


def tensor(seed: int, dtype: Any, size: int, spread: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(size) * np.exp(spread * rng.standard_normal(size))).astype(dtype)


@pytest.mark.parametrize("case", WINDOWS, ids=lambda case: str(case["id"]))
def test_both_engines_return_the_same_weights_or_the_same_fault_of_a_golden_file(case: Any) -> None:
    found = same_by_both(data_of(case))
    assert isinstance(found, list) == (case["expected"]["outcome"] == "accept")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 99),
    st.sampled_from([ml_dtypes.bfloat16, np.float16, np.float32]),
    st.integers(1, 4),
    st.lists(st.integers(0, 150), max_size=6),
)
def test_both_engines_pack_windows_to_the_same_bits(
    seed: int, dtype: Any, width: int, counts: list[int]
) -> None:
    rng = np.random.default_rng(seed)
    item = np.dtype(dtype).itemsize
    values = tensor(seed, dtype, sum(counts)).view(f"u{item}")
    bits = 8 * item
    cut = {2: 11 if dtype is np.float16 else 8, 4: 24}[item]
    numbers = (values.astype(np.uint64) << np.uint64(1) & np.uint64((1 << bits) - 1)) >> np.uint64(cut)
    first = max(int(numbers.min(initial=40)) - 3, 0)
    classes = max(int(numbers.max(initial=0)) - first + 2, (1 << width) - 1, 2)
    table = CodeTable(first << cut, bytes([cut]) * classes, window=width)
    each = np.array(counts, np.int64)
    windows = rng.integers(0, table.code_count, len(counts))
    plane, sizes = pack_windows(values, each, windows, table)
    expected, expected_sizes = encode_windows((numbers - first).astype(np.uint16), each, windows, table)
    assert sizes.tolist() == expected_sizes.tolist()
    assert plane.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("options", [SPEED, SPEED.but(window=4), SPEED.but(quantiser=Uniform(bits=4))])
def test_both_engines_write_and_read_the_same_windows(dtype: Any, options: Any) -> None:
    arrays = {"w": tensor(1, dtype, 20_007, 0.0), "m": tensor(2, dtype, 5000, 0.0)}
    arrays["m"][::3] = 0
    data = save(arrays, options=options, engine="numba")
    assert data == save(arrays, options=options, engine="python")
    same_by_both(data)


FILES = [
    save(
        {"tensor": tensor(5, ml_dtypes.bfloat16, 700, 0.0)}, options=SPEED.but(segment=64, chunk=256, **more)
    )
    for more in ({}, {"quantiser": Table(centroids=9)}, {"window": 1})
]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FILES), st.integers(0, 2**32), st.booleans())
def test_damaged_windows_have_the_same_result_with_both_engines(file: bytes, seed: int, planes: bool) -> None:
    same_by_both(with_random_planes(file, seed) if planes else with_changed_chunks([file], seed))


def test_both_engines_return_the_same_slices_of_windows() -> None:
    whole = tensor(3, ml_dtypes.bfloat16, 4000, 0.0).reshape(40, 100)
    data = save({"w": whole}, options=SPEED.but(segment=96, chunk=960))
    found = same_by_both(data, lambda file: file.get_slice("w")[7:21, 3:].tobytes())
    assert found == whole[7:21, 3:].tobytes()
