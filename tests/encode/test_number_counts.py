"""Counts of numbers from sorted magnitudes equal those of the numbers of each magnitude."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sfpformat.coding.classes import log2_fixed
from sfpformat.dtypes import DTYPES
from sfpformat.encode import number_bits, step_search
from sfpformat.encode.number_bits import log2_of, numbers_bits, zeros_bits
from sfpformat.encode.number_counts import Magnitudes, NumberCounts
from sfpformat.encode.quantise import UniformNumbers, weighing_numbers
from sfpformat.encode.step_search import Sampled

RNG = np.random.default_rng(3)
NORMAL = np.abs(RNG.standard_normal(20_000)).astype(np.float32)


def require_equal(found: NumberCounts, numbers: np.ndarray) -> None:
    counts = np.bincount(numbers.astype(np.int64))
    assert np.array_equal(found.numbers, np.flatnonzero(counts))
    assert np.array_equal(found.often, counts[counts > 0])
    assert found.zeros == (counts[0] if len(counts) else 0)


@given(
    hnp.arrays(np.float32, st.integers(0, 300), elements=st.floats(0, 100, width=32)),
    st.floats(0.015625, 64, width=32),
    st.floats(0, 1),
)
def test_counts_equal_those_of_each_magnitude(magnitudes: np.ndarray, step: float, weight: float) -> None:
    quantiser = weighing_numbers(Magnitudes(magnitudes), step, weight)
    require_equal(Magnitudes(magnitudes).counts(quantiser), quantiser(magnitudes))


@pytest.mark.parametrize("step", [1e-5, 1e-3, 0.01, 0.3, 2.0, 100.0])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_counts_of_many_magnitudes_equal_those_of_each(step: float, dtype: type) -> None:
    magnitudes = NORMAL.astype(dtype).astype(np.float32)
    for quantiser in (
        UniformNumbers(np.float32(step), np.zeros(0, np.float32)),
        weighing_numbers(Magnitudes(magnitudes), step, 0.5),
    ):
        require_equal(Magnitudes(magnitudes).counts(quantiser), quantiser(magnitudes))


def test_numbers_that_are_not_finite_are_counted_as_lowered() -> None:
    """In F8_E4M3, 448 is the greatest weight; 2 steps of 300 would exceed it."""
    magnitudes = np.array([10, 448, 448, 200], np.float32)
    sample = Sampled(magnitudes, 4, None, 0.0, DTYPES["F8_E4M3"])
    assert sample.numbers(298.0).tolist() == [0, 1, 1, 1]
    require_equal(sample.counts(298.0), sample.numbers(298.0))


@pytest.mark.parametrize("step", [1e-4, 0.02, 0.3, 2.0, 50.0])
@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_errors_of_distinct_magnitudes_are_added_in_the_order_of_the_sample(
    step: float, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    magnitudes = NORMAL.astype(ml_dtypes.bfloat16).astype(np.float32)
    found = Sampled(magnitudes, len(magnitudes), None, 0.12, DTYPES[dtype])
    assert found._few is not None
    error = found.error(step)
    monkeypatch.setattr(step_search, "_REPEATED", 1 << 20)
    again = Sampled(magnitudes, len(magnitudes), None, 0.12, DTYPES[dtype])
    assert again._few is None
    assert again.error(step) == error


@given(st.integers(1, (1 << 53) - 1))
def test_the_logarithm_of_one_number_equals_that_of_an_array(number: int) -> None:
    assert log2_of(number) == int(log2_fixed(np.array([number]))[0])


@pytest.mark.parametrize("step", [0.01, 0.02, 0.05, 0.2, 1.0, 3.0])
def test_costs_and_bits_in_python_equal_those_in_numpy(step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sampled(NORMAL, len(NORMAL) + 500, None, 0.12)
    found = sample.quantiser(step), sample.bits(step)
    monkeypatch.setattr(number_bits, "_FEW_NUMBERS", 0)
    again = sample.quantiser(step)
    assert isinstance(found[0], UniformNumbers)
    assert isinstance(again, UniformNumbers)
    assert np.array_equal(found[0].thresholds, again.thresholds)
    assert found[1] == sample.bits(step)


def test_more_zeros_change_only_the_entropy_of_the_zeros() -> None:
    numbers = np.array([0, 0, 1, 2, 3, 3])
    few, many = NumberCounts.of(numbers), NumberCounts.of(np.append(numbers, [0] * 40))
    assert zeros_bits(few, 40) == zeros_bits(many)
    assert numbers_bits(many) - numbers_bits(few) == zeros_bits(few, 40) - zeros_bits(few)
