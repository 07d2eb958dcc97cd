"""Finite weights decode to finite values from every lossy code, or are refused (SPEC.md chapter 14)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import sfpformat
from sfpformat import ImportanceOptions, Lossless, OptionError, Options, Table, Uniform
from sfpformat.coding import quantisers
from sfpformat.decode.validate import validate
from sfpformat.dtypes import DTYPES, Dtype
from sfpformat.encode.finite import Reconstruction, greatest_codable
from sfpformat.numpy import load, save
from sfpformat.options import Quantiser

from ..support.clauses import clauses
from ..support.forge import accepted
from ..support.strategies import FLOATS, seeds

Array = NDArray[np.generic]
ENGINES = ("python", "numba")
F16, BF16, E4M3 = np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


def decoded(array: Array, options: Options, importance: Any = None) -> Array:
    """Returns the decoded tensor. Asserts that both engines write the same valid file."""
    importances = {} if importance is None else {"w": importance}
    files = [save({"w": array}, options=options, importances=importances, engine=e) for e in ENGINES]
    assert files[0] == files[1]
    assert validate(files[0]).canonical
    return load(files[0])["w"]


def fp8_by_rows(rows: int = 24, columns: int = 256) -> Array:
    """Normal weights, each row scaled so that its greatest magnitude is 448, as in FP8 checkpoints."""
    normal = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    scaled: Array = (normal / (np.abs(normal).max(1, keepdims=True) / 448)).astype(E4M3)
    return scaled


def decibels(before: Array, after: Array) -> float:
    """10 log10 of the mean squared error over the mean square."""
    wide = before.astype(np.float64)
    return 10 * math.log10(np.square(after.astype(np.float64) - wide).sum() / np.square(wide).sum())


# ------------------------------------------------------------------------------------------ single examples


@clauses("R-REC-003")
@pytest.mark.parametrize("scale", ["row", "column", "tensor", 128, None])
@pytest.mark.parametrize("quantiser", [Uniform(bits=4.0), Table(centroids=8)])
def test_fp8_weights_scaled_to_448_decode_without_nan(scale: Any, quantiser: Uniform | Table) -> None:
    weights = fp8_by_rows()
    found = decoded(weights, Options(replace(quantiser, scale=scale)))
    assert np.isfinite(found.astype(np.float32)).all()
    assert decibels(weights, found) < -15


@clauses("R-REC-002")
@pytest.mark.parametrize(
    ("dtype", "greatest"),
    [(F16, 65504), (BF16, 3.3e38), (np.float32, 3.4e38), (ml_dtypes.float8_e5m2, 57344)],
)
def test_the_largest_weights_of_a_dtype_stay_within_the_requested_error(dtype: Any, greatest: float) -> None:
    weights = np.full((16, 64), greatest).astype(dtype)
    found = decoded(weights, Options(Uniform(error_db=-30.0))).astype(np.float64)
    wide = weights.astype(np.float64)
    assert 10 * math.log10(max(np.square((found - wide) / wide).mean(), 1e-30)) <= -30


def test_a_weight_whose_nearest_multiple_is_infinite_rounds_down() -> None:
    weights = np.array([[65504, -65504, 30000, 0]] * 8, np.float16)
    found = decoded(weights, Options(Uniform(step=26000, rate_weight=0), coding="fingerprint"))
    assert found[0].tolist() == [52000, -52000, 26000, 0]


def test_a_step_that_rounds_every_weight_to_zero_is_refused() -> None:
    weights = np.full((4, 32), 65504, np.float16)
    with pytest.raises(OptionError, match=r"'w'.*100000.*F16.*smaller"):
        save({"w": weights}, options=Options(Uniform(step=1e5)))
    zeros = decoded(weights, Options(Uniform(step=1e6), coding="fingerprint"))
    assert not zeros.any()  # zero is the nearest multiple of a step above twice the weight


@pytest.mark.parametrize("scale_dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-9, 1.0, 1e30, 8e37])
@pytest.mark.parametrize("target", [{"bits": 5.0}, {"error_db": -25.0}, {"step": 0.05}])
def test_scaled_weights_of_any_size_are_as_precise_as_others(
    scale_dtype: str, size: float, target: dict[str, Any]
) -> None:
    normal = np.random.default_rng(1).standard_normal((8, 64))
    weights = (normal * size).astype(np.float32)
    options = Options(Uniform(scale="row", scale_dtype=scale_dtype, **target))
    found = decoded(weights, options).astype(np.float64) / size
    error = np.square(found - weights.astype(np.float64) / size).mean()
    # Below 1e-40 float32 itself is coarse.
    assert 10 * math.log10(error) < (-24 if size > 1e-40 else -20)


def test_rows_far_smaller_than_others_get_a_scale_factor_above_zero() -> None:
    weights = np.random.default_rng(2).standard_normal((4, 256)) * np.array([[1.0], [1e-4], [1e-7], [1e-8]])
    found = decoded(weights.astype(np.float32), Options(Uniform(bits=5.0, scale="row")))
    for row, wide in zip(found.astype(np.float64), weights, strict=True):
        assert np.square(row - wide).mean() < 0.02 * np.square(wide).mean()


def test_a_few_survivors_of_a_large_tensor_stay_close_to_their_values() -> None:
    weights = np.zeros(1 << 18, np.float32)
    weights[12345::40000] = 0.01
    for quantiser in (Uniform(bits=2.0), Table(centroids=4)):
        found: NDArray[Any] = load(save({"w": weights}, options=Options(quantiser)))["w"]
        assert np.count_nonzero(found) == np.count_nonzero(weights)
        assert np.abs(found - weights).max() < 0.005


def test_an_error_target_is_met_even_if_a_sample_misestimates_the_mean_square() -> None:
    weights = np.random.default_rng(3).standard_normal(1 << 18).astype(np.float32)
    weights[0] = 3000.0  # in every sample of every fourth weight
    found = load(save({"w": weights}, options=Options(Uniform(error_db=-30.0))))["w"]
    assert -31 < decibels(weights, found) <= -29.9


def test_the_error_is_computed_from_weights_rounded_like_a_reader() -> None:
    weights = fp8_by_rows()
    for scale in (None, "row"):
        found = decoded(weights, Options(Uniform(error_db=-24.0, scale=scale)))
        assert -26 < decibels(weights, found) <= -24 + 1e-6


def test_weights_for_which_no_step_reaches_the_error_stay_lossless() -> None:
    weights = np.random.default_rng(4).standard_normal((64, 64)).astype(np.float32)
    options = Options(Uniform(error_db=-200.0))
    assert np.array_equal(decoded(weights, options), weights)
    with pytest.raises(OptionError, match=r"'w'.*-200.*lossless"):
        save({"w": weights}, options=options.but(fixed_width=True))  # asks for levels of a step


@pytest.mark.parametrize("error_db", [0.0, 30.0])
def test_an_error_as_great_as_the_weights_is_refused(error_db: float) -> None:
    with pytest.raises(OptionError, match="below 0"):
        Options(Uniform(error_db=error_db))


# ---------------------------------------------------------------------------------------------- multipliers


@pytest.mark.parametrize("bits", [1, 6])
@pytest.mark.parametrize("quantiser", [Lossless(), Uniform(step=100.0), Table(centroids=2)], ids=str)
def test_a_multiplier_that_is_rounded_up_makes_no_weight_infinite(bits: int, quantiser: Quantiser) -> None:
    weights = np.full((8, 32), 65504, np.float16)
    weights[1:] = 1.0
    importance = np.full((8, 32), 1.0, np.float32)
    importance[1:] = 1.3
    stored = ImportanceOptions(role="multiplier", bits=bits)
    options = Options(quantiser, coding="fingerprint", importance=stored)
    found = decoded(weights, options, importance).astype(np.float64)
    assert np.isfinite(found).all()
    assert found[0].min() > (0.95 if bits == 6 else 0.0) * 65504 or options.lossless


@pytest.mark.parametrize("quantiser", [Lossless(), Uniform(step=100.0)], ids=str)
@pytest.mark.parametrize("form", ["each", "factors"])
def test_a_multiplier_that_overflows_a_weight_is_refused(quantiser: Quantiser, form: str) -> None:
    weights = np.full((8, 32), 60000, np.float16)
    importance: Any = np.full((8, 32), 2.0, np.float32)
    if form == "factors":
        importance = (np.full(8, 2.0), np.ones(32))
    options = Options(quantiser, importance=ImportanceOptions(role="multiplier"))
    with pytest.raises(OptionError, match=r"'w'.*60000.*importance.*F16"):
        save({"w": weights}, options=options, importances={"w": importance})


def test_pruned_positions_may_have_any_multiplier() -> None:
    weights = np.full((8, 32), 60000, np.float16)
    mask = np.zeros((8, 32), bool)
    mask[0] = True
    importance = np.where(mask, np.float32(1), np.float32(2))
    options = Options(importance=ImportanceOptions(role="multiplier", over="all", quantiser="exact"))
    data = save({"w": weights}, options=options, importances={"w": importance}, masks={"w": mask})
    assert np.array_equal(load(data)["w"], np.where(mask, weights, np.float16(0)))


# ------------------------------------------------------------------------------ all dtypes, at their ends


@st.composite
def at_the_ends(draw: st.DrawFn, dtype: Dtype) -> Array:
    """Weights of the greatest or the least magnitudes of a dtype, or of both, all of them finite."""
    rng = np.random.default_rng(draw(seeds))
    shape = draw(st.sampled_from([(4, 32), (33,), (3, 5, 7), (16, 40), (1, 1)]))
    count = math.prod(shape)
    # A lossy quantiser accepts only numbers of float32.
    greatest = min(dtype.greatest, DTYPES["F32"].greatest)
    great = greatest * draw(st.sampled_from([1.0, 0.5])) * rng.choice([1.0, 1.0, 0.99, 0.9, 0.6], count)
    least = max(dtype.least, DTYPES["F32"].least) * rng.integers(0, 9, count)
    usual = np.minimum(np.abs(rng.standard_normal(count)), greatest)
    kinds = {"great": (great, great), "least": (least, least), "both": (great, least), "some": (great, usual)}
    one, other = kinds[draw(st.sampled_from(sorted(kinds)))]
    signed = np.where(rng.random(count) < 0.5, one, other) * rng.choice([1.0, -1.0, 1.0, 0.0], count)
    with np.errstate(under="ignore"):
        array: Array = signed.astype(dtype.numpy).reshape(shape)
    return array


@st.composite
def lossy_options(draw: st.DrawFn, greatest: float) -> Options:
    """Every quantiser, scale and role of an importance."""
    role = draw(st.sampled_from(["metadata", "multiplier"]))
    importance = ImportanceOptions(
        role=role,
        over=draw(st.sampled_from(["survivors", "all"])),
        quantiser=draw(st.sampled_from(["uniform", "exact"])),
        bits=draw(st.sampled_from([1, 6, 24])),
        dtype=draw(st.sampled_from(["F32", "F16", "BF16"])),
    )
    scale = draw(st.sampled_from([None, "tensor", "row", "column", 1, 7, 64]))
    scale_dtype = draw(st.sampled_from(["F32", "F16", "BF16"])) if scale else None
    lossy: dict[str, Any] = {"scale": scale, "scale_dtype": scale_dtype}
    rate_weight = draw(st.sampled_from([0.0, 0.12]))
    targets: list[dict[str, Any]] = [
        {"step": (1.0 if scale else max(greatest, 1e-30)) * draw(st.sampled_from([0.003, 0.3, 0.7, 1.5]))},
        {"bits": draw(st.sampled_from([0.5, 2.0, 6.0, 16.0]))},
        {"budget": draw(st.sampled_from([1.0, 3.0, 10.0]))},
        {"error_db": draw(st.sampled_from([-3.0, -20.0, -60.0]))},
    ]
    uniform = Uniform(**draw(st.sampled_from(targets)), rate_weight=rate_weight, **lossy)
    table = Table(draw(st.sampled_from([1, 2, 7, 500])), **lossy)
    # Of six, four are uniform: one for each target.
    kinds: list[Quantiser] = [uniform, uniform, uniform, uniform, table, Lossless()]
    return Options(draw(st.sampled_from(kinds)), coding="fingerprint", importance=importance)


@st.composite
def importances_for(draw: st.DrawFn, array: Array) -> Any:
    """None, an importance for each weight, or two factors; of usual or of great size."""
    rng = np.random.default_rng(draw(seeds))
    size = draw(st.sampled_from([1.0, 1.3, 1e-3, 1e4]))
    form = draw(st.sampled_from(["none", "each", "factors"]))
    if form == "none":
        return None
    if form == "each":
        return (size * rng.choice([0.5, 0.77, 1.0], array.shape)).astype(np.float32)
    rows = array.shape[0] if array.ndim >= 2 else 1
    return size * rng.choice([0.5, 1.0], rows), rng.choice([-1.0, 0.77, 1.0], array.size // rows)


@clauses("R-REC-001", "R-REC-002", "R-REC-003", "R-QNT-006", "R-SCL-006")
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FLOATS), st.data())
def test_finite_weights_decode_to_finite_values_or_are_refused(name: str, data: st.DataObject) -> None:
    array = data.draw(at_the_ends(DTYPES[name]))
    greatest = float(np.abs(array.astype(np.float64)).max(initial=0))
    options = data.draw(lossy_options(min(greatest, 2e38)))
    importance = data.draw(importances_for(array))
    importances = {} if importance is None else {"w": importance}
    outcomes: list[bytes | str] = []
    for engine in ENGINES:
        try:
            outcomes.append(save({"w": array}, options=options, importances=importances, engine=engine))
        except OptionError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    if isinstance(outcomes[0], str):
        assert outcomes[0].startswith("tensor 'w': ")
        return
    found = accepted(outcomes[0])["w"]
    assert np.isfinite(found.astype(np.float64)).all()
    with sfpformat.open(outcomes[0]) as file:
        assert not found[~file.get_mask("w")].any()


# ---------------------------------------------------------------------------------------- the search itself


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"]),
    st.lists(st.integers(0, 60), min_size=1, max_size=8),
    st.floats(0.001, 0.6),
    st.floats(0.015625, 2.0, width=32),
    st.booleans(),
)
def test_a_number_is_lowered_to_the_largest_with_a_finite_value(
    name: str, numbers: list[int], share: float, factor: float, table: bool
) -> None:
    dtype = DTYPES[name]
    step = np.float32(min(dtype.greatest, 1e38) * share)
    if table:
        made = Reconstruction(
            dtype, quantisers.Table(61), np.arange(61, dtype=np.float32) * np.float32(dtype.greatest / 60)
        )
    else:
        made = Reconstruction(dtype, quantisers.Uniform(step))
    given_numbers = np.array(numbers, np.uint32)
    scale = np.full(len(numbers), factor, np.float32)
    found = made.lowered(given_numbers, scale, None)
    for number, lowered in zip(numbers, found, strict=True):
        one = np.full(number + 1, factor, np.float32)
        finite = np.isfinite(made.values(np.arange(number + 1, dtype=np.uint32), one, None))
        assert lowered == np.flatnonzero(finite)[-1]


@pytest.mark.parametrize("step", [1e-30, 0.5, 1e30, 3e38])
@pytest.mark.parametrize("scale", [1.0, 3.0, 1e-3])
def test_the_largest_codable_number_has_a_finite_product_and_the_next_overflows(
    step: float, scale: float
) -> None:
    greatest = greatest_codable(np.float32(step), np.float32(scale))
    with np.errstate(over="ignore"):
        products = np.float32(step) * np.array([greatest, greatest + 1], np.float32) * np.float32(scale)
    assert np.isfinite(products[0])
    assert greatest == (1 << 31) - 1 or not np.isfinite(products[1])


def test_numbers_that_are_not_finite_with_the_greatest_scale_factor_are_refused() -> None:
    choices = [1.7e38, -1.7e38, 1e38, 1e-44, -4e-45, 0.0]
    array = np.random.default_rng(18).choice(choices, (2, 16))
    with pytest.raises(OptionError, match="'w': a weight is 1 steps, but with the greatest scale factor"):
        save({"w": array}, options=Options(Uniform(bits=0.5, scale=7, rate_weight=0.0)))
