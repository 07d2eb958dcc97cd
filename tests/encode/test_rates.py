"""Bits per survivor, budgets per position, and tensors that fit losslessly."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import sfpformat
from sfpformat import PRESETS, ImportanceOptions, OptionError, Options, Table, Uniform, steps_for_budget
from sfpformat.coding import quantisers
from sfpformat.coding.classes import FRACTION
from sfpformat.encode.number_bits import numbers_bits, pairs_bits
from sfpformat.encode.number_counts import NumberCounts
from sfpformat.numpy import load, save
from sfpformat.options import Quantiser

Array = NDArray[np.generic]
RNG = np.random.default_rng(9)
NORMAL = RNG.standard_normal((128, 384)).astype(np.float32)
HEAVY = RNG.standard_t(4, (128, 384)).astype(np.float32)
BF16 = ml_dtypes.bfloat16


def pruned(array: Array, share: float) -> Array:
    """Returns the weights with the least magnitudes set to 0."""
    magnitudes = np.abs(array.astype(np.float32))
    return np.where(magnitudes > np.quantile(magnitudes, share), array, array.dtype.type(0))


def rates(data: bytes) -> tuple[float, float]:
    """Bits of levels for each survivor, and of all planes for each position."""
    with sfpformat.open(data) as file:
        entry = file.entry("w")
        heads = [file.read_head(entry, k) for k in range(len(entry.chunks))]
        survivors = int(np.count_nonzero(file.get_mask("w")))
    bits = {"mask": 0, "fingerprints": 0}
    for head in heads:
        for (stream, _), plane in head.bits.items():
            bits[stream] += int(plane.sum())
    return bits["fingerprints"] / survivors, sum(bits.values()) / entry.positions


def size(array: Array, options: Options, mask: NDArray[np.bool_] | None = None) -> int:
    return len(save({"w": array}, options=options, masks={} if mask is None else {"w": mask}))


# ------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("bits", [2.0, 4.0, 8.0, 14.0])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_bits_count_the_levels_of_survivors_without_the_mask(bits: float, share: float) -> None:
    data = save({"w": pruned(NORMAL, share)}, options=Options(Uniform(bits=bits)))
    found, _ = rates(data)
    assert found == pytest.approx(bits, rel=0.06)


@pytest.mark.parametrize(
    ("share", "budget"), [(0.0, 1.0), (0.0, 4.0), (0.5, 2.0), (0.5, 6.0), (0.9, 1.0), (0.9, 2.5)]
)
def test_a_budget_includes_the_mask(share: float, budget: float) -> None:
    data = save({"w": pruned(NORMAL, share)}, options=Options(Uniform(budget=budget)))
    _, found = rates(data)
    assert found == pytest.approx(budget, rel=0.06)


@pytest.mark.parametrize("bits", [2.0, 3.0, 5.0])
def test_without_pruning_bits_and_budget_give_the_same_bytes(bits: float) -> None:
    asked, budget = Options(Uniform(bits=bits)), Options(Uniform(budget=bits))
    assert save({"w": HEAVY}, options=asked) == save({"w": HEAVY}, options=budget)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bits", [2.0, 5.0])
@pytest.mark.parametrize("array", [NORMAL, HEAVY], ids=["normal", "heavy tails"])
def test_pruning_makes_a_file_with_a_bit_target_at_most_one_percent_larger(
    array: Array, bits: float, masked: bool
) -> None:
    options = Options(Uniform(bits=bits))
    dense = size(array, options)
    for share in (0.02, 0.1, 0.2, 0.3, 0.5, 0.9):
        sparse = pruned(array, share)
        found = size(sparse, options, sparse != 0 if masked else None)
        # The step is chosen by an estimate of levels and mask; index and tables add to it.
        assert found <= 1.01 * dense


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_fixed_width_levels_have_at_most_the_requested_bits(bits: int, share: float) -> None:
    data = save({"w": pruned(HEAVY, share)}, options=PRESETS["fused"].but(quantiser=Uniform(bits=bits)))
    with sfpformat.open(data) as file:
        fingerprints = file.entry("w").fingerprints
    assert fingerprints is not None
    assert list(fingerprints.table.extra) == [bits]


def test_a_mask_that_alone_takes_more_than_the_budget_is_refused() -> None:
    mask = RNG.random(NORMAL.shape) < 0.5
    with pytest.raises(OptionError, match=r"'w'.*mask alone.*0.5 bits per position"):
        save({"w": NORMAL}, options=Options(Uniform(budget=0.5)), masks={"w": mask})
    with pytest.raises(OptionError, match=r"masks alone.*0.5 bits per position"):
        steps_for_budget({"w": NORMAL}, 0.5, masks={"w": mask})


@pytest.mark.parametrize("asked", [Uniform(bits=1.3), Uniform(budget=1.2), Uniform(budget=1.6)])
def test_bits_that_would_quantise_all_survivors_to_zero_are_refused(asked: Uniform) -> None:
    """A mask of half the positions takes one bit per position, and each survivor has a sign."""
    mask = np.abs(NORMAL) > np.quantile(np.abs(NORMAL), 0.5)
    with pytest.raises(OptionError, match=r"'w'.*with .* bits.*all weights would become 0"):
        save({"w": NORMAL}, options=Options(asked), masks={"w": mask})
    fits = Options(Uniform(budget=2.2))
    found = load(save({"w": NORMAL}, options=fits, masks={"w": mask}))["w"]
    assert np.count_nonzero(found[mask]) > mask.sum() / 2


@pytest.mark.parametrize("asked", [Uniform(bits=1.9), Uniform(budget=1.9)])
def test_fixed_width_bits_that_would_quantise_all_weights_to_zero_are_refused(asked: Uniform) -> None:
    with pytest.raises(OptionError, match=r"'w'.*with .* bits.*all weights would become 0"):
        save({"w": NORMAL}, options=PRESETS["fused"].but(quantiser=asked))
    fits = PRESETS["fused"].but(quantiser=Uniform(bits=2.0))
    assert load(save({"w": NORMAL}, options=fits))["w"].any()


def test_a_tensor_without_a_step_for_its_bits_stays_lossless_if_that_fits() -> None:
    """A table of one value takes no bits per survivor; a number other than 0 takes a sign."""
    mask = np.arange(NORMAL.size).reshape(NORMAL.shape) % 384 < 192
    array = np.where(mask, np.float32(3), np.float32(0))
    data = save({"w": array}, options=Options(Uniform(bits=0.5)), masks={"w": mask})
    assert np.array_equal(load(data)["w"], array)


@pytest.mark.parametrize("budget", [1.2, 1.4, 1.6])
def test_a_shared_budget_that_would_quantise_all_survivors_to_zero_is_refused(budget: float) -> None:
    half = {name: np.abs(a) > np.quantile(np.abs(a), 0.5) for name, a in (("a", NORMAL), ("b", HEAVY))}
    with pytest.raises(OptionError, match="all weights would become 0"):
        steps_for_budget({"a": NORMAL, "b": HEAVY}, budget, masks=half)
    with pytest.raises(OptionError, match="all weights would become 0"):
        steps_for_budget({"a": NORMAL, "b": HEAVY}, 0.55, masks={"a": half["a"]})
    steps = steps_for_budget({"a": NORMAL, "b": HEAVY}, 2.2, masks=half)
    assert steps["a"] < NORMAL.max()


def test_the_estimate_is_not_too_low_for_many_distinct_numbers() -> None:
    """A sample of the numbers, of 20 bits each, has an entropy of only 12 bits."""
    counts = NumberCounts.of(RNG.integers(1 << 19, 1 << 20, 1 << 12))
    assert numbers_bits(counts) / (1 << FRACTION) / (1 << 12) == pytest.approx(19 + 1, abs=0.2)


def test_a_dominant_number_is_estimated_with_a_code_of_pairs() -> None:
    """Of the 64 pairs, 49 have one bit, 7 two, and 8 three; the only number above 0 has a sign."""
    found = pairs_bits(NumberCounts(np.arange(2), np.array([7, 1]) * 1000))
    assert found / (1 << FRACTION) / 8000 == pytest.approx((49 + 2 * 7 + 3 * 8) / 128 + 1 / 8, abs=1e-4)


@pytest.mark.parametrize("name", ["bits", "budget"])
@pytest.mark.parametrize("value", [0.0, 33.0, "4"])
def test_bits_and_budgets_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{name} is"):
        Uniform(**{name: value})


# ----------------------------------------------------------------------------- the weights' own precision


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32, ml_dtypes.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("asked", [Uniform(bits=28.0), Uniform(budget=28.0), Uniform(error_db=-300.0)])
def test_a_tensor_stays_lossless_if_that_fits_the_bits(dtype: Any, share: float, asked: Uniform) -> None:
    array = pruned(NORMAL.astype(dtype), share)
    if array.itemsize == 1 and asked.error_db is not None:
        return  # a step can reproduce every FP8 weight with fewer bits
    data = save({"w": array}, options=Options(asked))
    assert load(data)["w"].tobytes() == array.tobytes()
    assert len(data) == len(save({"w": array}))


def test_a_table_larger_than_the_lossless_tensor_stays_lossless() -> None:
    array = NORMAL[:16].astype(np.float16)
    data = save({"w": array}, options=Options(Table(centroids=4096)))
    assert load(data)["w"].tobytes() == array.tobytes()


@pytest.mark.parametrize("coding", ["auto", "fingerprint"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("asked", [Uniform(bits=32.0), Uniform(budget=32.0), Table(4096)])
@pytest.mark.parametrize("count", [0, 1, 100])
def test_a_small_tensor_whose_raw_bytes_fit_is_stored_raw(
    coding: Any, given: bool, asked: Quantiser, count: int
) -> None:
    """The bit patterns are random, so that nothing can be saved."""
    array = np.random.default_rng(3).integers(1 << 20, 1 << 30, count, np.uint32).view(np.float32)
    options = Options(asked, coding=coding, importance=ImportanceOptions())
    importances = {"w": np.ones(count, np.float32)} if given else {}
    data = save({"w": array}, options=options, importances=importances)
    with sfpformat.open(data) as file:
        kept_raw = file.entry("w").coding == "raw"
    assert load(data)["w"].shape == array.shape
    if count == 100:
        assert kept_raw == (coding == "auto" and not given)
    if kept_raw:
        assert load(data)["w"].tobytes() == array.tobytes()


def test_an_explicit_step_or_fixed_width_is_applied_at_any_size() -> None:
    array = NORMAL.astype(np.float16)
    for options in (
        Options(Uniform(step=1e-6)),
        PRESETS["fused"].but(quantiser=Uniform(bits=16.0)),
    ):
        with sfpformat.open(save({"w": array}, options=options)) as file:
            fingerprints = file.entry("w").fingerprints
        assert fingerprints is not None
        assert isinstance(fingerprints.quantiser, quantisers.Uniform)


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("budget", [4.0, 9.0, 12.0, 28.0])
def test_steps_for_budget_never_give_a_file_larger_than_the_lossless_one(
    dtype: Any, share: float, budget: float
) -> None:
    tensors = {"a": pruned(NORMAL.astype(dtype), share), "b": pruned((HEAVY / 50).astype(dtype), share)}
    steps = steps_for_budget(tensors, budget)
    options = {name: Options(Uniform(step=step)) for name, step in steps.items()}
    found, lossless = len(save(tensors, options=options)), len(save(tensors))
    assert found <= lossless
    assert 8 * found / (2 * NORMAL.size) < budget + 0.3


def test_bits_that_lossless_tensors_save_are_spent_on_the_others() -> None:
    few = RNG.choice(np.array([-1.0, -0.5, 0.5, 1.0], np.float32), NORMAL.shape)
    steps = steps_for_budget({"few": few, "many": NORMAL}, 4)
    assert list(steps) == ["many"]
    data = save({"few": few, "many": NORMAL}, options={"many": Options(Uniform(step=steps["many"]))})
    assert 8 * len(data) / (2 * NORMAL.size) == pytest.approx(4, abs=0.25)
    with sfpformat.open(data) as file:
        fingerprints = file.entry("few").fingerprints
        assert fingerprints is not None
        assert isinstance(fingerprints.quantiser, quantisers.Table)
        assert np.array_equal(file.get_tensor("few"), few)


def test_nothing_is_quantised_if_all_tensors_fit_losslessly() -> None:
    assert steps_for_budget({"a": NORMAL, "b": HEAVY}, 28) == {}
