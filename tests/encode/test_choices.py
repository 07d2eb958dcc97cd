"""The choices of the encoder: steps, centroids, classes, codes, segments. The format leaves them open."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import sfpformat
from sfpformat import PRESETS, OptionError, Options, Table, Uniform
from sfpformat.coding.classes import FRACTION, best_layout, entropies, entropy_bits, log2_fixed
from sfpformat.coding.codetable import code_lengths
from sfpformat.encode.level_sources import table, uniform
from sfpformat.encode.level_sources.table import lloyd_max
from sfpformat.encode.number_counts import Magnitudes
from sfpformat.encode.quantise import weighing_numbers
from sfpformat.encode.segments import default_segment
from sfpformat.encode.step_search import Sampled, step_for_error
from sfpformat.numpy import load, save

RNG = np.random.default_rng(11)
PLAIN = PRESETS["fused"].but(quantiser=Table(centroids=8))
NORMAL = RNG.standard_normal((256, 384)).astype(np.float32)


def decibels(before: np.ndarray, after: np.ndarray) -> float:
    """10 log10 of the mean squared error over the mean square."""
    error = np.mean((before.astype(np.float64) - after.astype(np.float64)) ** 2)
    return float(10 * np.log10(error / np.mean(before.astype(np.float64) ** 2)))


# ---------------------------------------------------------------------------------------------- quantisers


@pytest.mark.parametrize("bits", [1.0, 2.0, 4.0, 6.0])
def test_a_bit_target_is_met_by_the_planes(bits: float) -> None:
    data = save({"w": NORMAL}, options=Options(Uniform(bits=bits)))
    with sfpformat.open(data) as file:
        entry = file.entry("w")
        index = file.read_head(entry, 0)
    planes = sum(int(b.sum()) for b in index.bits.values()) / NORMAL.size
    assert planes == pytest.approx(bits, rel=0.05)


@pytest.mark.parametrize("target", [-30.0, -20.0, -10.0, -6.0])
@pytest.mark.parametrize("rate_weight", [0.0, 0.12])
def test_an_error_target_is_met(target: float, rate_weight: float) -> None:
    options = Options(Uniform(error_db=target, rate_weight=rate_weight))
    found = decibels(NORMAL, load(save({"w": NORMAL}, options=options))["w"])
    assert target - 0.4 < found < target + 0.1


def test_the_step_for_an_error_target_stays_below_it() -> None:
    magnitudes = np.abs(NORMAL.reshape(-1))
    allowed = 10**-1.5 * float(np.mean(magnitudes.astype(np.float64) ** 2))
    step = step_for_error(Sampled(magnitudes, len(magnitudes), None, 0.12), allowed)
    assert step is not None
    numbers = weighing_numbers(Magnitudes(magnitudes), step, 0.12)(magnitudes)
    assert decibels(magnitudes, numbers * np.float32(step)) <= -15.0


def test_rate_distortion_weighting_needs_fewer_bits_for_the_same_error() -> None:
    """At equal error fewer bits are needed."""
    sizes = [
        len(save({"w": NORMAL}, options=Options(Uniform(error_db=-9, rate_weight=weight))))
        for weight in (0.0, 0.12)
    ]
    assert sizes[1] < 0.97 * sizes[0]


def test_centroids_have_less_error_than_evenly_spaced_ones() -> None:
    magnitudes = np.abs(NORMAL.reshape(-1))
    centroids = lloyd_max(magnitudes, 8).astype(np.float64)
    assert len(centroids) == 8
    even = (np.arange(8) + 0.5) * magnitudes.max() / 8

    def error(table: np.ndarray) -> float:
        return float(np.mean(np.min(np.abs(magnitudes[:, None] - table), axis=1) ** 2))

    assert error(centroids) < 0.5 * error(even)
    # The known optimum for a Gaussian with 16 levels, 8 magnitudes, is 20.22 dB.
    assert 10 * math.log10(error(centroids) / np.mean(magnitudes.astype(np.float64) ** 2)) < -20.0


def test_a_table_keeps_the_sign_of_its_least_magnitude() -> None:
    data = save({"w": NORMAL}, options=Options(Table(centroids=1)))
    decoded = load(data)["w"]
    assert np.array_equal(np.signbit(decoded), np.signbit(NORMAL))
    assert len(np.unique(decoded)) == 2


def test_a_few_distinct_magnitudes_become_the_centroids() -> None:
    magnitudes = np.repeat(np.array([0.5, 2.0, 3.0], np.float32), 50)
    assert lloyd_max(magnitudes, 4).tolist() == [0.5, 2.0, 3.0]


def test_weighted_centroids_are_closer_to_important_weights() -> None:
    importance = np.where(np.abs(NORMAL) > 1.5, np.float32(100), np.float32(0.01))
    results = {}
    for asked in (Table(centroids=4), Table(centroids=4, weighted="full")):
        data = save({"w": NORMAL}, options=Options(asked), importances={"w": importance})
        found: NDArray[Any] = load(data)["w"]
        results[asked.weighted] = (found - NORMAL) ** 2
    important = importance > 1
    assert results["full"][important].mean() < 0.5 * results[None][important].mean()
    assert results["full"][~important].mean() > results[None][~important].mean()


def test_weighted_without_an_importance_is_refused() -> None:
    with pytest.raises(OptionError, match="importance"):
        save({"w": NORMAL}, options=Options(Table(centroids=4, weighted="root")))


# -------------------------------------------------------------------------------------- classes and codes


def best_cost(counts: list[int], limit: int) -> int:
    """The least number of bits of any complete code, by a search over all lengths."""
    best = None
    for lengths in itertools.product(range(1, limit + 1), repeat=len(counts)):
        if sum(2.0**-n for n in lengths) == 1:
            cost = sum(n * count for n, count in zip(lengths, counts, strict=True))
            best = cost if best is None else min(best, cost)
    assert best is not None
    return best


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=5), st.integers(3, 5))
def test_code_lengths_are_optimal_under_their_limit(counts: list[int], limit: int) -> None:
    lengths = code_lengths(np.array(counts), limit)
    assert max(lengths) <= limit
    assert sum(n * c for n, c in zip(lengths, counts, strict=True)) == best_cost(counts, limit)


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=256))
def test_code_lengths_cost_less_than_a_bit_more_than_the_entropy(counts: list[int]) -> None:
    histogram = np.array(counts)
    if np.count_nonzero(histogram) < 2:
        return
    lengths = np.frombuffer(code_lengths(histogram), np.uint8)
    p = histogram[histogram > 0] / histogram.sum()
    entropy = float(-(p * np.log2(p)).sum())
    cost = float((lengths * histogram).sum() / histogram.sum())
    # A limit of 12 bits costs at most a little more than Huffman's one bit.
    assert entropy - 1e-9 <= cost <= entropy + 1.1


@given(st.integers(1, 2**52))
def test_logarithms_are_accurate_to_a_thousandth(n: int) -> None:
    assert log2_fixed(np.array([n]))[0] / (1 << FRACTION) == pytest.approx(math.log2(n), abs=1e-3)


def test_entropy_matches_its_definition() -> None:
    counts = np.array([50, 25, 0, 25])
    assert entropy_bits(counts) / (1 << FRACTION) == pytest.approx(150, rel=1e-4)


@given(st.lists(st.integers(0, 1 << 38), min_size=1, max_size=4))
def test_entropies_of_several_histograms_match_those_of_each(counts: list[int]) -> None:
    fine = np.array([0, *counts, 0, 0, 0])[: len(counts) // 2 * 2 + 2].astype(np.int64)
    histograms = [fine, fine[0::2] + fine[1::2]]
    assert entropies(histograms) == [entropy_bits(each) for each in histograms]


@given(
    st.lists(st.integers(0, 10000), min_size=1, max_size=3000).filter(any),
    st.booleans(),
)
def test_classes_cover_every_number_and_respect_the_bound(counts: list[int], signed: bool) -> None:
    used = np.flatnonzero(counts)
    bound = int(used[-1]) + 1  # the tightest there is
    layout = best_layout(np.array(counts), signed, bound)
    sign = 1 if signed else 0
    assert layout.base == int(used[0]) << sign
    assert layout.top == bound << sign
    assert all(extra >= sign for extra in layout.extra)


def test_a_skewed_stream_gets_single_number_classes_first() -> None:
    counts = (1e6 * 0.7 ** np.arange(60)).astype(np.int64)
    extra = best_layout(counts, signed=False, bound=1 << 16).extra
    assert set(extra[:8]) == {0}
    assert max(extra) >= 2


def test_rows_of_different_spread_get_separate_codes() -> None:
    rows = NORMAL * np.repeat(np.array([0.01, 1.0], np.float32), 128)[:, None]
    sizes = {}
    for codes in (1, None):
        data = save({"w": rows}, options=Options(Uniform(step=0.02), codes=codes))
        sizes[codes] = len(data)
        with sfpformat.open(data) as file:
            assert (len(file.entry("w").streams()["fingerprints"].codes) > 1) == (codes is None)
    assert sizes[None] < 0.97 * sizes[1]


def test_rows_from_a_narrower_float_are_trimmed() -> None:
    rows = NORMAL.copy()
    rows[::2] = rows[::2].astype(np.float16)
    trimmed = save({"w": rows}, options=Options(segment=384))
    untrimmed = save({"w": rows}, options=Options(segment=384, trim=False))
    assert load(trimmed)["w"].tobytes() == rows.tobytes()
    assert len(trimmed) < len(untrimmed) - rows.size // 2 * 12 // 8


@pytest.mark.parametrize(
    ("columns", "density", "exact", "expected"),
    [
        (384, 1.0, False, 1536),
        (384, 1.0, True, 3072),
        (1536, 1.0, False, 1536),
        (4096, 1.0, False, 2048),
        (4096, 1.0, True, 4096),
        (11008, 1.0, False, 1376),
        (768, 0.5, False, 1536),
        (768, 0.5, True, 1536),
        (384, 0.1, False, 12288),
        (1001, 1.0, False, 1536),
        (1, 1.0, True, 3072),
    ],
)
def test_segments_are_whole_rows_or_parts_of_rows(
    columns: int, density: float, exact: bool, expected: int
) -> None:
    segment = default_segment(columns, density, exact, Options())
    assert segment == expected
    assert segment % 32 == 0


@pytest.mark.parametrize(
    ("columns", "density", "near", "within"),
    [
        (4096, 1.0, 512, 512),
        (4096, 0.1, 512, 512),
        (768, 1.0, 384, 384),
        (11008, 0.5, 256, 256),
        (14336, 1.0, 512, 512),
        (256, 1.0, 512, 256),
        (128, 1.0, 512, 128),
        (1001, 1.0, 512, 512),
    ],
)
def test_segments_for_a_gpu_are_near_512_and_in_products_never_of_several_rows(
    columns: int, density: float, near: int, within: int
) -> None:
    assert default_segment(columns, density, True, PRESETS["gpu"]) == near
    assert default_segment(columns, density, False, PLAIN) == within
    assert default_segment(columns, density, True, PRESETS["fused"]) == near


# ------------------------------------------------------------------------------------------- fixed widths


def half_pruned(rows: int = 64, columns: int = 768) -> np.ndarray:
    return np.where(
        np.abs(RNG.standard_normal((rows, columns))) > 0.67, RNG.standard_normal((rows, columns)), 0
    )


@pytest.mark.parametrize("scale", [None, "row"])
def test_fixed_widths_change_no_weight_and_make_plain_planes_in_chunks_of_whole_rows(
    scale: str | None,
) -> None:
    array = half_pruned().astype(np.float32)
    options = PLAIN.but(quantiser=Table(centroids=8, scale=scale), chunk=3000)
    data, coded = (save({"w": array}, options=o) for o in (options, options.but(fixed_width=False)))
    assert load(data)["w"].tobytes() == load(coded)["w"].tobytes()
    report = sfpformat.validate(data)
    assert report.ok
    assert report.canonical
    with sfpformat.open(data) as file:
        entry = file.entry("w")
    assert entry.mask is not None
    assert entry.fingerprints is not None
    assert entry.mask.is_bitmap
    assert (entry.mask.table.base, entry.mask.table.extra) == (0, b"\x08")
    assert entry.fingerprints.table.extra == b"\x04"
    assert (entry.segment, entry.chunk * entry.segment) == (384, 3 * 768)
    assert 8 * entry.stored_bytes / entry.positions < 1 + 0.5 * 4 + 0.5


@given(st.integers(1, 40), st.integers(0, 4))
def test_levels_of_a_fixed_width_have_as_many_bits_as_the_greatest_needs(greatest: int, least: int) -> None:
    numbers = RNG.integers(least, least + greatest + 1, (32, 256)).astype(np.float32)
    numbers[0, :2] = least, least + greatest
    options = PRESETS["fused"].but(quantiser=Uniform(step=1.0, rate_weight=0.0), coding="fingerprint")
    data = save({"w": numbers}, options=options)
    assert (load(data)["w"] == numbers).all()
    with sfpformat.open(data) as file:
        fingerprints = file.entry("w").fingerprints
    assert fingerprints is not None
    low = max(least, 1) if file.entry("w").mask is not None else least
    assert fingerprints.table.base == 2 * low
    assert list(fingerprints.table.extra) == [(2 * (least + greatest) + 1 - 2 * low).bit_length()]


def test_nine_centroids_get_nine_classes_instead_of_a_fixed_width() -> None:
    array = half_pruned().astype(np.float32)
    options = PLAIN.but(quantiser=Table(centroids=9))
    with sfpformat.open(save({"w": array}, options=options)) as file:
        fingerprints = file.entry("w").fingerprints
    assert fingerprints is not None
    assert fingerprints.table.classes == 9


def test_fixed_widths_leave_lossless_tensors_coded() -> None:
    data = save({"w": NORMAL}, options=PRESETS["fused"])
    assert data == save({"w": NORMAL}, options=PRESETS["gpu"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mask", ["auto", "none"])
@pytest.mark.parametrize("centroids", [3, 16, 1000])
def test_levels_of_a_table_looked_up_by_bit_pattern_equal_those_of_a_search(
    dtype: str, mask: str, centroids: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = np.random.default_rng(1).standard_normal((256, 300)).astype(dtype)
    weights[3, :9], weights[4, :9] = 0.0, -0.0
    options = Options(Table(centroids=centroids), mask=mask)
    found = save({"w": weights}, options=options)
    monkeypatch.setattr(table, "_LOOKED_UP", 1 << 40)
    assert save({"w": weights}, options=options) == found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mask", ["auto", "none"])
@pytest.mark.parametrize(
    "quantiser", [Uniform(bits=4), Uniform(step=0.1), Uniform(step=0.7, rate_weight=0), Uniform(error_db=-30)]
)
def test_levels_of_a_step_looked_up_by_bit_pattern_equal_those_of_a_division(
    dtype: str, mask: str, quantiser: Uniform, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = np.random.default_rng(1).standard_normal((512, 300)).astype(dtype)
    weights[3, :9], weights[4, :9] = 0.0, -0.0
    weights[5, :2] = np.finfo(np.float16).max, -np.finfo(np.float16).max
    found = save({"w": weights}, options=Options(quantiser, mask=mask))
    monkeypatch.setattr(uniform, "_LOOKED_UP", 1 << 40)
    assert save({"w": weights}, options=Options(quantiser, mask=mask)) == found
