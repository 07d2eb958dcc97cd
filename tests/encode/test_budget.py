"""Errors weighted by importance, and shared bit budgets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from safetensors.numpy import save_file

import sfpformat
from sfpformat import OptionError, Options, Uniform, steps_for_budget
from sfpformat.encode.number_counts import Magnitudes
from sfpformat.encode.quantise import WeighedNumbers, weighed_numbers
from sfpformat.numpy import load, save

from ..cli.test_main import error_of, run
from ..cli.test_pack import Capture

RNG = np.random.default_rng(5)
SHAPE = (128, 256)
WEIGHTS = RNG.standard_normal(SHAPE).astype(np.float32)
# Importances that span some orders of magnitude, like the Fisher information.
IMPORTANCE = np.exp(2 * RNG.standard_normal(SHAPE)).astype(np.float32)
FEW_BITS = Uniform(bits=2.5)
NOT_KEPT = Options(FEW_BITS, importance=None)


def weighed_error(found: np.ndarray, importance: np.ndarray) -> float:
    return float(((found - WEIGHTS).astype(np.float64) ** 2 * importance).sum())


def test_errors_are_larger_where_the_importance_is_lower() -> None:
    errors, sizes = {}, []
    for weighted in (None, "root", "full"):
        options = NOT_KEPT.but(quantiser=replace(FEW_BITS, weighted=weighted))
        data = save({"w": WEIGHTS}, options=options, importances={"w": IMPORTANCE})
        errors[weighted] = weighed_error(load(data)["w"], IMPORTANCE)
        sizes.append(len(data))
    assert max(sizes) < 1.06 * min(sizes)
    assert errors["full"] < 0.75 * errors[None]
    assert errors["full"] < errors["root"] < 0.95 * errors[None]


def test_an_importance_that_is_only_a_weight_is_not_stored() -> None:
    options = NOT_KEPT.but(quantiser=replace(FEW_BITS, weighted="root"))
    data = save({"w": WEIGHTS}, options=options, importances={"w": IMPORTANCE})
    with sfpformat.open(data) as file:
        assert file.entry("w").importance is None
    kept = save({"w": WEIGHTS}, options=Options(Uniform(bits=2.5)), importances={"w": IMPORTANCE})
    with sfpformat.open(kept) as file:
        assert file.get_importance("w") is not None


def test_equal_importances_give_the_same_bytes_as_none() -> None:
    """Except for zeros: only a weighted error may quantise to them."""
    asked = Uniform(bits=4.0)
    plain = load(save({"w": WEIGHTS}, options=Options(asked)))["w"]
    same = {"w": np.full(SHAPE, np.float32(3))}
    options = NOT_KEPT.but(quantiser=replace(asked, weighted="full"))
    weighed = load(save({"w": WEIGHTS}, options=options, importances=same))["w"]
    assert np.mean(plain == weighed) > 0.99


@pytest.mark.parametrize("step", [0.1, 0.5])
def test_zero_importance_quantises_to_zero_and_high_importance_rounds_to_nearest(step: float) -> None:
    magnitudes = np.abs(WEIGHTS.reshape(-1))
    quantiser = weighed_numbers(Magnitudes(magnitudes), step, 0.12)
    assert not quantiser(magnitudes, np.zeros_like(magnitudes)).any()
    nearest = np.floor(magnitudes / np.float32(step) + np.float32(0.5))
    assert np.array_equal(quantiser(magnitudes, np.full_like(magnitudes, 1e6)), nearest)


@given(
    hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(0, 100, width=32)),
    hnp.arrays(np.float32, 40, elements=st.floats(0, 1000, width=32)),
    st.lists(st.floats(0, 4, width=32), min_size=1, max_size=60),
)
def test_the_cheapest_of_three_candidate_numbers_is_chosen(
    magnitudes: np.ndarray, weights: np.ndarray, rises: list[float]
) -> None:
    costs = np.cumsum(np.array([0.0, *rises])).astype(np.float32)
    weights = weights[: len(magnitudes)]
    found = WeighedNumbers(np.float32(0.5), costs)(magnitudes, weights)
    for magnitude, weight, number in zip(magnitudes, weights, found, strict=True):
        nearest = int(np.floor(magnitude / np.float32(0.5) + np.float32(0.5)))
        if not 0 < nearest < len(costs):
            assert number == nearest
            continue
        candidates = [nearest, nearest - 1, 0]
        prices = [weight * (magnitude / np.float32(0.5) - np.float32(n)) ** 2 + costs[n] for n in candidates]
        assert number == candidates[int(np.argmin(prices))]


# ------------------------------------------------------------------------------------------- shared bits


def model() -> dict[str, np.ndarray]:
    """Tensors of different size and spread."""
    return {
        "wide": RNG.standard_normal((64, 512)).astype(np.float32),
        "small": (RNG.standard_normal((32, 96)) * 0.01).astype(np.float32),
        "tails": RNG.standard_t(3, (256, 128)).astype(np.float32),
    }


@pytest.mark.parametrize("bits", [1.5, 3.0, 5.0])
def test_all_tensors_together_meet_the_bit_budget(bits: float) -> None:
    tensors = model()
    steps = steps_for_budget(tensors, bits)
    options = {name: Options(Uniform(step=step)) for name, step in steps.items()}
    taken = 8 * len(save(tensors, options=options)) / sum(a.size for a in tensors.values())
    assert bits - 0.05 < taken < bits + 0.4  # tables and index add to it


def test_without_importance_steps_are_proportional_to_the_spread() -> None:
    tensors = {"a": WEIGHTS, "b": WEIGHTS * np.float32(0.125)}
    steps = steps_for_budget(tensors, 3)
    assert steps["b"] == pytest.approx(steps["a"] / 8, rel=1e-6)


@pytest.mark.parametrize(("weighted", "ratio"), [("full", 4.0), ("root", 2.0)])
def test_tensors_of_higher_importance_have_smaller_steps(weighted: str, ratio: float) -> None:
    tensors = {"a": WEIGHTS, "b": WEIGHTS[::-1].copy()}
    importances = {"a": IMPORTANCE * np.float32(16), "b": IMPORTANCE[::-1].copy()}
    steps = steps_for_budget(tensors, 3, importances=importances, weighted=weighted)
    assert steps["b"] / steps["a"] == pytest.approx(ratio, rel=1e-4)


def test_bits_saved_by_a_mask_are_spent_on_other_tensors() -> None:
    tensors = {"a": WEIGHTS, "b": WEIGHTS[::-1].copy()}
    masked = steps_for_budget(tensors, 3, masks={"a": np.abs(WEIGHTS) > 1})
    assert masked["b"] < steps_for_budget(tensors, 3)["b"]


@settings(max_examples=30)
@given(
    st.lists(
        hnp.arrays(np.float32, st.integers(0, 60), elements=st.floats(-(2.0**127), 2.0**127, width=32)),
        max_size=4,
    ),
    st.sampled_from([0.1, 2.0, 12.0]),
)
def test_every_returned_step_can_be_written(arrays: list[np.ndarray], bits: float) -> None:
    tensors = {str(i): array for i, array in enumerate(arrays)}
    steps = steps_for_budget(tensors, bits)
    options = {name: Options(Uniform(step=step)) for name, step in steps.items()}
    assert set(load(save(tensors, options=options))) == set(tensors)


def test_tensors_that_cannot_share_a_budget_are_refused() -> None:
    with pytest.raises(OptionError, match=r"'w'.*importance"):
        steps_for_budget({"w": WEIGHTS}, 3, weighted="root")
    with pytest.raises(OptionError, match=r"'w'.*negative"):
        steps_for_budget({"w": WEIGHTS}, 3, importances={"w": -IMPORTANCE}, weighted="root")
    with pytest.raises(OptionError, match=r"'w'.*finite"):
        steps_for_budget({"w": np.array([np.inf], np.float32)}, 3)


def test_pack_distributes_bits_by_importance(tmp_path: Path, capsys: Capture) -> None:
    tensors = {"a": WEIGHTS, "b": WEIGHTS[::-1].copy()}
    save_file(tensors, tmp_path / "m.safetensors")
    save_file({"a": IMPORTANCE * np.float32(16), "b": IMPORTANCE}, tmp_path / "i.safetensors")
    words = ["--budget", 3, "--weighted", "root", "--importance", tmp_path / "i.safetensors"]
    target = tmp_path / "m.sfp"
    assert run("pack", tmp_path / "m.safetensors", "-o", target, *words, "--importance-bits", 0) == 0
    found: dict[str, NDArray[Any]] = sfpformat.numpy.load_file(target)
    errors = {name: float(np.mean((found[name] - tensors[name]) ** 2)) for name in tensors}
    assert errors["a"] < 0.5 * errors["b"]
    assert 8 * target.stat().st_size / (2 * WEIGHTS.size) == pytest.approx(3.2, abs=0.1)
    capsys.readouterr()
    assert "--scale" in error_of(
        capsys, "pack", tmp_path / "m.safetensors", "-o", target, "--budget", 3, "--scale", "row"
    )
