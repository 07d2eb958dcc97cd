"""The encoder of the numba engine against the reference: the same counts, choices and bytes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from conformance.recipes.samples import weights
from sfpformat import Lossless, Options, Uniform, Writer
from sfpformat.coding import counts as counting
from sfpformat.coding import exact_encoding, magnitudes, planes
from sfpformat.coding import mask as masks
from sfpformat.coding.bits import MAX_FIELD_BITS
from sfpformat.coding.classes import CLASS_COST, Layout, best_layout
from sfpformat.coding.codetable import CodeTable, PrefixCode, code_lengths
from sfpformat.coding.quantisers import uniform_levels
from sfpformat.dtypes import DTYPES as ALL_DTYPES
from sfpformat.encode.sink import MemorySink
from sfpformat.engines import numba as numba_engine
from sfpformat.engines.numba.compiling import kernel
from sfpformat.engines.numba.unaligned import load64
from sfpformat.errors import OptionError
from sfpformat.numpy import save

from ..support.bounds_check import RECORD, sources_digest
from ..support.strategies import Job, jobs

DTYPES: list[type[np.unsignedinteger[Any]]] = [np.uint8, np.uint16, np.uint32, np.uint64]
seeds = st.integers(0, 2**32 - 1)


def segments(rng: np.random.Generator, most: int = 90) -> NDArray[np.int64]:
    """Levels of some segments, some of which may be empty."""
    sizes = rng.integers(0, most, rng.integers(1, 9))
    return sizes * (rng.random(len(sizes)) < 0.9)


def outcome(job: Job, engine: str) -> bytes | str:
    """Returns the file of a job, or the error."""
    out = MemorySink()
    try:
        with Writer(out, metadata=job.metadata, engine=engine, threads=1) as writer:
            writer.add("tensor", job.array, job.options, mask=job.mask, importance=job.importance)
    except OptionError as error:
        return str(error)
    return out.data


# ------------------------------------------------------------------------------------------------ whole files


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_levels_that_are_not_cached_between_passes_are_recomputed_identically(job: Job) -> None:
    kept = outcome(job, "numba")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfpformat.encode.blocks._KEPT_BYTES", 0)
        assert outcome(job, "numba") == kept


@settings(max_examples=150, deadline=None)
@given(
    seeds,
    st.sampled_from(["F64", "F32", "F16", "BF16", "F8_E4M3"]),
    st.sampled_from([1, 2, 3, 9, 40]),
    st.sampled_from([0.3, 0.7, 1.0]),
    st.sampled_from([Options(coding="fingerprint"), Options(mantissa_bits=2), Options(trim=False)]),
    st.booleans(),
)
def test_skipping_the_plan_of_bit_patterns_changes_no_bytes(
    seed: int, dtype: str, distinct: int, density: float, options: Options, masked: bool
) -> None:
    rng = np.random.default_rng(seed)
    few = (rng.standard_normal(distinct) * 2.0 ** rng.integers(-4, 4, distinct)).round(rng.integers(0, 5))
    array = np.where(rng.random(6000) < density, rng.choice(few, 6000), 0).astype(ALL_DTYPES[dtype].numpy)
    job = Job(array + array.dtype.type(0), options, rng.random(6000) < 0.6 if masked else None)
    written = outcome(job, "python")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfpformat.encode.planner.takes_more_bits", lambda *_: False)
        assert outcome(job, "python") == written


def test_a_table_of_few_values_skips_the_plan_of_bit_patterns() -> None:
    array = np.random.default_rng(0).choice(np.array([0.1, 0.2, -0.7], np.float32), 5000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfpformat.encode.planner.choose_exact", lambda *_: pytest.fail("it was planned"))
        assert outcome(Job(array, Options()), "python") == outcome(Job(array, Options()), "numba")


@settings(max_examples=250, deadline=None)
@given(jobs())
def test_both_engines_write_the_same_bytes(job: Job) -> None:
    assert outcome(job, "numba") == outcome(job, "python")


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64", "F8_E4M3"])
@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(codes=16, segment=32),
        Options(mantissa_bits=2),
        Options(Lossless(), group=2),
        Options(mask="runs", group=2),
        Options(mask="octets", trim=False),
    ],
)
def test_both_engines_write_the_same_bytes_for_every_level_size(dtype: str, options: Options) -> None:
    tensors = {
        "a": weights(300, 70).astype(ALL_DTYPES[dtype].numpy),
        "b": (weights(64, 64, seed=1) * 3).round().astype(ALL_DTYPES[dtype].numpy),
    }
    assert save(tensors, options=options, engine="numba") == save(tensors, options=options, engine="python")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_bytes_do_not_depend_on_the_thread_count(threads: int) -> None:
    tensors = {"a": weights(700, 900), "b": weights(3, 5)}
    options = Options(Uniform(bits=3), chunk=1 << 15)
    data = save(tensors, options=options, engine="numba", threads=threads)
    assert data == save(tensors, options=options, engine="python", threads=1)


# ------------------------------------------------------------------------------------------------- its pieces


@settings(max_examples=150, deadline=None)
@given(seeds, st.sampled_from(DTYPES), st.sampled_from([1, 2, 7, 120]), st.sampled_from([1, 6, 7, 100, 1024]))
def test_both_engines_find_and_translate_the_same_magnitudes(
    seed: int, dtype: Any, distinct: int, most: int
) -> None:
    rng = np.random.default_rng(seed)
    known = rng.integers(0, np.iinfo(dtype).max, distinct, dtype, endpoint=True)
    patterns = rng.choice(known, int(rng.integers(0, 5000)))
    low = magnitudes.magnitude_bits(patterns.dtype)
    every = np.unique(patterns & low)
    found = numba_engine.few_magnitudes(patterns, most)
    for few in (found, magnitudes.few_magnitudes(patterns, most)):
        if len(every) > most:
            assert few is None
        else:
            assert few is not None
            assert np.array_equal(few, every)
    if found is None:
        return
    kinds: Any = [np.uint8, np.uint16]
    meanings = rng.integers(0, 200, 2 * len(found)).astype(rng.choice(kinds))
    number = 2 * np.searchsorted(found, patterns & low) + (patterns > low)
    for translate in (numba_engine.translate, magnitudes.translate):
        assert np.array_equal(translate(patterns, found, meanings), meanings[number])


@settings(max_examples=100, deadline=None)
@given(
    seeds, st.sampled_from(["runs", "octets"]), st.sampled_from([0, 1]), st.sampled_from([0, 1, 0.02, 0.5])
)
def test_both_engines_encode_the_same_masks(seed: int, kind: str, polarity: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    positions = np.full(int(rng.integers(1, 5)), rng.choice([32, 96, 1 << 16]))
    positions[-1] -= rng.integers(0, 31)
    mask = rng.random(int(positions.sum())) < density
    levels, counts = masks.encode_mask(kind, polarity, mask, positions)
    found, found_counts = numba_engine.encode_mask(kind, polarity, mask, positions)
    assert np.array_equal(found, levels)
    assert np.array_equal(found_counts, counts)


@settings(max_examples=150, deadline=None)
@given(seeds, st.sampled_from(DTYPES), st.integers(0, 9), st.integers(0, 3))
def test_both_engines_count_the_same_classes(seed: int, dtype: Any, width: int, first: int) -> None:
    rng = np.random.default_rng(seed)
    counts, classes = segments(rng), int(rng.integers(1, 40))
    low, high = first << width, min((first + classes) << width, np.iinfo(dtype).max)
    if low >= high:
        return
    levels = rng.integers(low, high, int(counts.sum())).astype(dtype)
    want = counting.count_classes(levels, counts, width, first, classes)
    assert np.array_equal(numba_engine.count_classes(levels, counts, width, first, classes), want)
    assert want.sum() == len(levels)


@settings(max_examples=150, deadline=None)
@given(seeds, st.sampled_from(DTYPES), st.sampled_from([1, 2]))
def test_both_engines_count_the_same_symbols(seed: int, dtype: Any, group: int) -> None:
    rng = np.random.default_rng(seed)
    counts = segments(rng)
    extra = bytes(rng.choice([0, 0, 1, 2, 3], int(rng.integers(2, 12))).astype(np.uint8))
    layout = Layout(int(rng.integers(0, 20)), extra)
    levels = rng.integers(layout.base, layout.top, int(counts.sum())).astype(dtype)
    want = counting.count_symbols(levels, counts, layout, group)
    assert np.array_equal(numba_engine.count_symbols(levels, counts, layout, group), want)


@settings(max_examples=150, deadline=None)
@given(seeds, st.sampled_from(DTYPES), st.integers(0, 63))
def test_both_engines_find_the_same_common_trailing_zeros(seed: int, dtype: Any, zeros: int) -> None:
    rng = np.random.default_rng(seed)
    counts = segments(rng)
    bits = 8 * np.dtype(dtype).itemsize
    patterns = (rng.integers(0, 1 << 32, int(counts.sum()), np.uint64) << np.uint64(zeros)).astype(dtype)
    want = exact_encoding.exact_zeros(patterns, counts)
    assert np.array_equal(numba_engine.exact_zeros(patterns, counts), want)
    assert want.max(initial=0) < bits


@settings(max_examples=150, deadline=None)
@given(seeds, st.sampled_from(DTYPES), st.data())
def test_both_engines_count_and_pack_the_same_bit_patterns(seed: int, dtype: Any, data: Any) -> None:
    rng = np.random.default_rng(seed)
    bits = 8 * np.dtype(dtype).itemsize
    width = data.draw(st.integers(min(max(bits - 9, 1), 50), min(bits - 1, MAX_FIELD_BITS)))
    trim = data.draw(st.integers(0, width - 1))
    counts = segments(rng)
    # Any signs, few classes, and as many low zero bits as the trim omits.
    first = int(rng.integers(0, 1 << (bits - width)))
    classes = int(rng.integers(1, min(1 << (bits - width), first + 40) - first + 1))
    size = int(counts.sum())
    classed = rng.integers(first, first + classes, size).astype(np.uint64) << np.uint64(width - 1)
    rest = rng.integers(0, 1 << (width - 1), size).astype(np.uint64) >> np.uint64(trim) << np.uint64(trim)
    sign = rng.integers(0, 2, size).astype(np.uint64) << np.uint64(bits - 1)
    patterns = (classed | rest | sign).astype(dtype)
    rows = exact_encoding.count_exact(patterns, counts, width, first, classes)
    assert np.array_equal(numba_engine.count_exact(patterns, counts, width, first, classes), rows)
    codes = tuple(PrefixCode(code_lengths(rng.integers(1, 99, classes))) for _ in range(2 * (classes > 1)))
    table = CodeTable(first << width, bytes([width]) * classes, codes)
    numbers = rng.integers(0, max(len(codes), 1), len(counts))
    trims = np.where(rng.random(len(counts)) < 0.5, trim, 0)
    one = exact_encoding.encode_exact(patterns, counts, numbers, trims, table)
    other = numba_engine.encode_exact(patterns, counts, numbers, trims, table)
    for field in dataclasses.fields(one):
        assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name


@settings(max_examples=120, deadline=None)
@given(seeds, st.integers(2, 70), st.integers(1, 300), st.sampled_from([1, 2, 8, 16]), st.booleans())
def test_both_engines_assign_segments_to_the_same_codes(
    seed: int, symbols: int, size: int, most: int, skewed: bool
) -> None:
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(symbols, 0.3), 4)[rng.integers(0, 4, size)]
    rows = rng.poisson(shares * 800).astype(np.int32)
    if skewed:
        rows[:, rng.integers(0, symbols)] += 40_000
    order = rng.integers(0, 1 << 12, symbols)
    costs = counting.cluster(rows, order, most, size * 3)
    assert np.array_equal(numba_engine.cluster(rows, order, most, size * 3), costs)
    codes, totals = counting.assign(rows, costs)
    found_codes, found_totals = numba_engine.assign(rows, costs)
    assert np.array_equal(found_codes, codes)
    assert np.array_equal(found_totals, totals)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 3000),
    st.lists(st.sampled_from([0, 0, 1, 2, 7, 900, 10**6, 10**9]), min_size=1, max_size=3000).filter(any),
    st.integers(0, 40),
    st.integers(0, 16),
    st.booleans(),
)
def test_both_engines_choose_the_same_classes(
    before: int, counts: list[int], above: int, doublings: int, signed: bool
) -> None:
    numbers = np.array([0] * before + counts, np.int64)
    bound = int(np.flatnonzero(numbers)[-1]) + 1 + above
    want = best_layout(numbers, signed, bound, CLASS_COST << doublings)
    assert numba_engine.best_layout(numbers, signed, bound, CLASS_COST << doublings) == want


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 1, 2, 7, 900, 10**6, 10**12]), min_size=2, max_size=300),
    st.integers(9, 12),
)
def test_both_engines_compute_the_same_code_lengths(counts: list[int], limit: int) -> None:
    counts[0] += 1
    counts[1] += 1
    totals = np.array([counts, counts[::-1]], np.int64)
    want = counting.lengths_of_codes(totals, limit)
    assert np.array_equal(numba_engine.lengths_of_codes(totals, limit), want)


@settings(max_examples=250, deadline=None)
@given(
    seeds, st.sampled_from([1, 2]), st.integers(1, 12), st.integers(1, 3), st.integers(0, 6), st.booleans()
)
def test_both_engines_pack_levels_to_the_same_bits(
    seed: int, group: int, classes: int, codes: int, trim: int, one_width: bool
) -> None:
    rng = np.random.default_rng(seed)
    extra = bytes(rng.choice([1, 8] if one_width else [0, 1, 3, 8, 20], classes).astype(np.uint8))
    extra = extra[:1] * classes if one_width else extra
    group = group if classes > 1 else 1
    symbols = max(classes**group, 2)
    made = [PrefixCode(code_lengths(rng.integers(1, 1000, symbols))) for _ in range(codes)]
    base = int(rng.integers(0, 4)) << (extra[0] if rng.random() < 0.5 else 0)
    table = CodeTable(base, extra, tuple(made) if classes > 1 else (), group)
    counts = segments(rng)
    trims = np.full(len(counts), max(min(trim, min(extra) - 1), 0))
    levels = rng.integers(table.base, table.top, int(counts.sum())).astype(np.uint64)
    classes_of = table.class_of(levels)
    residuals = levels - table.first[classes_of]
    keep = ~(((np.uint64(1) << np.uint64(int(trims[0]))) - np.uint64(1)) << np.uint64(1))
    levels = table.first[classes_of] + (residuals & keep)
    numbers = rng.integers(0, max(len(table.codes), 1), len(counts))
    want = planes.encode_levels(levels, counts, numbers, trims, table)
    for dtype in DTYPES:
        if table.top - 1 <= np.iinfo(dtype).max:
            found = numba_engine.encode_levels(levels.astype(dtype), counts, numbers, trims, table)
            for part in ("prefix", "prefix_bits", "residual", "residual_bits"):
                assert np.array_equal(getattr(found, part), getattr(want, part)), part


@settings(max_examples=200, deadline=None)
@given(seeds, st.floats(1e-3, 10), st.booleans(), st.integers(0, 6))
def test_both_engines_quantise_to_the_same_levels(
    seed: int, step: float, scaled: bool, thresholds: int
) -> None:
    rng = np.random.default_rng(seed)
    flat = (rng.standard_normal(int(rng.integers(0, 400))) * 10 ** rng.uniform(-3, 3)).astype(np.float32)
    flat[rng.random(len(flat)) < 0.1] = -0.0
    factors = rng.choice([0.0, 0.1, 3.0], len(flat)).astype(np.float32) if scaled else None
    least = (np.arange(thresholds) + rng.uniform(0.3, 0.9, thresholds)).astype(np.float32)
    want = uniform_levels(flat, factors, np.float32(step), least)
    found = numba_engine.uniform_levels(flat, factors, np.float32(step), least)
    assert found.dtype == want.dtype
    assert np.array_equal(found, want)


def test_both_engines_refuse_a_step_that_is_too_small() -> None:
    for engine in ("python", "numba"):
        with pytest.raises(OptionError, match="too small for the weight"):
            save({"w": weights(40, 40) * 1e6}, options=Options(Uniform(step=1e-9)), engine=engine)


@settings(max_examples=100, deadline=None)
@given(seeds, st.sampled_from(DTYPES))
def test_both_engines_count_and_select_the_same_survivors(seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    counts = segments(rng)
    mask = rng.random(int(counts.sum())) < rng.random()
    values = rng.integers(0, 256, len(mask)).astype(dtype)
    assert np.array_equal(numba_engine.survivors(mask, counts), masks.survivors(mask, counts))
    assert np.array_equal(numba_engine.chosen(values, mask), masks.chosen(values, mask))


# ------------------------------------------------------------------------------------ engines, checked builds


def test_a_writer_uses_the_numba_engine_only_for_much_work() -> None:
    program = (
        "import sys, numpy as np, sfpformat.numpy as n;"
        "n.save({'w': np.ones(int(sys.argv[1]), np.float32)}); print('numba' in sys.modules)"
    )
    for size, imported in (("5000", "False"), ("9000000", "True")):
        done = subprocess.run(
            [sys.executable, "-c", program, size],
            capture_output=True,
            text=True,
            env={key: value for key, value in os.environ.items() if key != "SFPFORMAT_ENGINE"},
            check=True,
        )
        assert done.stdout.strip() == imported


# ------------------------------------------------------------------------------------------- bounds of arrays


@kernel
def load_one(array: Any, offset: int) -> Any:
    return load64(array, offset)


def test_the_bounds_of_all_accesses_were_checked_for_these_sources() -> None:
    if os.environ.get("SFPFORMAT_CHECKED"):  # this is that check
        with pytest.raises(IndexError):
            load_one(np.zeros(8, np.uint8), 1)
        return
    assert RECORD.read_text().strip() == sources_digest(), "run python -m tests.support.bounds_check"
