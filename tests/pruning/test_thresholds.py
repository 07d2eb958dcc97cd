"""Thresholds and grades: numbers in, masks out; properties before examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfpformat.decode.reader import SfpFile
from sfpformat.errors import OptionError, SfpWarning
from sfpformat.numpy import save
from sfpformat.options import Options
from sfpformat.pruning.allocation import Outliers, Rising
from sfpformat.pruning.by_magnitude import prune_fraction
from sfpformat.pruning.grades import BOUNDARIES, graded, options_for_grades
from sfpformat.pruning.masks import achieved, masks_of
from sfpformat.pruning.pipeline import prune
from sfpformat.pruning.scores import rows_mask
from sfpformat.pruning.thresholds import (
    Knee,
    MeanSigma,
    Otsu,
    Pattern,
    Quantile,
    Sparsity,
    Threshold,
    count_of_share,
)
from sfpformat.pruning.weight_selection import chosen_weights

from ..support.untyped import untyped

THRESHOLDS = (Sparsity(0.6), Quantile(0.6), MeanSigma(0.5), Otsu(), Otsu(log=True), Knee())


def importances(seed: int, *shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"t{i}": rng.gamma(0.5, size=shape) * (i + 1) for i, shape in enumerate(shapes)}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    share=st.floats(0, 1),
    scope=st.sampled_from(["model", "tensor"]),
    levels=st.sampled_from([None, 3]),
)
def test_a_sparsity_is_met_exactly_with_and_without_ties(
    seed: int, share: float, scope: str, levels: int | None
) -> None:
    found = importances(seed, (7, 11), (30,), (2, 3, 5))
    if levels is not None:
        found = {name: np.floor(array * levels) for name, array in found.items()}
    masks = masks_of(found, Sparsity(share), scope=scope)
    groups = [list(found)] if scope == "model" else [[name] for name in found]
    for names in groups:
        positions = sum(found[name].size for name in names)
        pruned = sum(int((~masks[name]).sum()) for name in names)
        assert pruned == int(np.floor(share * positions + 0.5))


@pytest.mark.parametrize(
    ("share", "positions", "count"),
    [(0.5, 5, 3), (0.25, 10, 3), (0.125, 4, 1), (0.124, 4, 0), (1.0, 7, 7), (0.0, 7, 0), (1.0, 0, 0)],
)
def test_a_share_of_positions_is_rounded_to_nearest_with_halves_up(
    share: float, positions: int, count: int
) -> None:
    assert count_of_share(share, positions) == count
    array = np.arange(1, positions + 1, dtype=np.float32)
    masks = masks_of({"w": array}, Sparsity(share))
    assert prune_fraction(array.copy(), share) == np.count_nonzero(~masks["w"]) == count
    if positions:
        rows = rows_mask(torch.from_numpy(array)[None], share)
        assert int((~rows).sum()) == count


class Sorted(Sparsity):
    """A sparsity that needs the sort of all positions, like thresholds of the distribution."""


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    share=st.floats(0, 1),
    scope=st.sampled_from(["model", "tensor", "row"]),
    levels=st.sampled_from([None, 1, 3]),
    dtypes=st.tuples(*[st.sampled_from([np.float32, np.float64, np.int16])] * 3),
    tied=st.booleans(),
)
def test_a_sparsity_prunes_the_first_of_all_sorted_positions(
    seed: int, share: float, scope: str, levels: int | None, dtypes: tuple[type, ...], tied: bool
) -> None:
    found = importances(seed, (7, 11), (), (2, 3, 5))
    if levels is not None:
        found = {name: np.floor(array * levels) for name, array in found.items()}
    found = {
        name: np.asarray(array, dtype, order="F")
        for (name, array), dtype in zip(found.items(), dtypes, strict=True)
    }
    rng = np.random.default_rng(seed)
    ties: Any = {name: rng.integers(-3, 3, array.shape) for name, array in found.items()} if tied else None
    masks = masks_of(found, Sparsity(share), scope=scope, tiebreak=ties)
    expected = masks_of(found, Sorted(share), scope=scope, tiebreak=ties)
    for name, mask in masks.items():
        assert mask.shape == found[name].shape
        assert (mask == expected[name]).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99), threshold=st.sampled_from(THRESHOLDS), scope=st.sampled_from(["model", "tensor"])
)
def test_no_survivor_is_less_important_than_a_pruned_weight(
    seed: int, threshold: Threshold, scope: str
) -> None:
    found = importances(seed, (9, 8), (40,))
    masks = masks_of(found, threshold, scope=scope)
    groups = [list(found)] if scope == "model" else [[name] for name in found]
    for names in groups:
        kept = np.concatenate([found[name][masks[name]] for name in names])
        gone = np.concatenate([found[name][~masks[name]] for name in names])
        assert not len(kept) or not len(gone) or kept.min() >= gone.max()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), share=st.floats(0, 0.9), floor=st.floats(0.01, 0.1))
def test_a_floor_keeps_its_share_and_the_total_is_still_met(seed: int, share: float, floor: float) -> None:
    found = importances(seed, (50,), (6, 10), (20,))
    found["weak"] = np.full((40,), 1e-9)
    masks = masks_of(found, Sparsity(share), floor=floor)
    assert all(mask.sum() >= floor * mask.size for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == int(np.floor(share * 170 + 0.5))


def test_exempt_tensors_have_no_mask_and_are_excluded_from_the_distribution() -> None:
    found = {"head.weight": np.zeros(100), "layers.0": np.arange(10.0), "layers.1": np.arange(10.0) + 10}
    masks = masks_of(found, Sparsity(0.5), exempt=("head*",))
    assert list(masks) == ["layers.0", "layers.1"]
    assert not masks["layers.0"].any()
    assert masks["layers.1"].all()


def test_equal_importances_are_ordered_by_the_tiebreak() -> None:
    weights = {"a": np.array([5.0, -1.0, 3.0, -4.0])}
    masks = masks_of({"a": np.ones(4)}, Sparsity(0.5), tiebreak=weights)
    assert masks["a"].tolist() == [True, False, False, True]


def test_a_quantile_keeps_values_equal_to_it() -> None:
    masks = masks_of({"a": np.array([1.0, 2.0, 2.0, 2.0, 3.0])}, Quantile(0.5))
    assert masks["a"].tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("log", [False, True])
def test_otsu_cuts_between_two_clusters(log: bool) -> None:
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(1, 0.1, 700), rng.normal(8, 0.5, 300)])
    masks = masks_of({"a": values}, Otsu(log=log))
    assert np.array_equal(masks["a"], values > 4)


def test_otsu_is_the_best_of_all_cuts() -> None:
    values = np.sort(np.random.default_rng(2).gamma(1.0, size=60))
    between = [cut * (60 - cut) * (values[:cut].mean() - values[cut:].mean()) ** 2 for cut in range(1, 60)]
    assert Otsu().count(values) == int(np.argmax(between)) + 1


def test_otsu_of_logarithms_prunes_zeros() -> None:
    values = np.concatenate([np.zeros(50), np.full(25, 1e-6), np.full(25, 1.0)])
    assert Otsu(log=True).count(np.sort(values)) == 75


def test_the_knee_is_where_the_curve_becomes_steep() -> None:
    values = np.concatenate([np.linspace(0, 1, 80, endpoint=False), np.linspace(1, 100, 20)])
    assert Knee().count(values) == 80


@pytest.mark.parametrize("threshold", [Otsu(), Knee(), Quantile(0.5), MeanSigma(0.0)])
def test_without_a_distribution_nothing_is_pruned(threshold: Threshold) -> None:
    assert achieved(masks_of({"a": np.full(20, 3.0)}, threshold)) == 0


def test_an_n_to_m_pattern_keeps_n_of_m() -> None:
    found = importances(3, (8, 12))
    mask = masks_of(found, Pattern(2, 4))["t0"]
    assert (mask.reshape(-1, 4).sum(1) == 2).all()
    groups = found["t0"].reshape(-1, 4)
    assert (np.where(mask.reshape(-1, 4), groups, np.inf).min(1) >= np.sort(groups, 1)[:, 1]).all()


def test_a_number_is_the_share_to_prune() -> None:
    found = importances(7, (8, 9), (11,))
    by_number, by_share = (masks_of(found, threshold) for threshold in (0.3, Sparsity(0.3)))
    assert all(np.array_equal(by_number[name], by_share[name]) for name in found)
    assert achieved(untyped(masks_of)(found, np.float32(0.5))) == pytest.approx(0.5, abs=0.01)
    assert achieved(masks_of(found, 0)) == 0
    assert achieved(masks_of(found, 1)) == 1


def test_a_single_string_for_exempt_is_one_pattern() -> None:
    found = {"head.weight": np.zeros(9), "a.weight": np.arange(10.0)}
    assert list(masks_of(found, 0.5, exempt="head*")) == ["a.weight"]


def test_a_floor_that_prevents_the_sparsity_warns() -> None:
    with pytest.warns(SfpWarning, match="it allows 50 pruned positions, not 80"):
        masks = masks_of({"a": np.arange(100.0)}, Sparsity(0.8), floor=0.5)
    assert achieved(masks) == 0.5


class Counting:
    """A threshold defined by a caller."""

    def __init__(self, count: object) -> None:
        self._count = count

    def count(self, ascending: np.ndarray) -> object:
        return self._count


A = {"a.weight": np.arange(8.0).reshape(2, 4)}


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (
            "'b' has numbers that are not finite",
            lambda: masks_of({**A, "b": np.array([1.0, np.nan, 2.0])}, Sparsity(0.5)),
        ),
        ("'b' has numbers that are not finite", lambda: masks_of({"b": np.array([np.inf])}, Pattern(2, 4))),
        ("'b' is not an array of numbers", lambda: masks_of({"b": np.array(["x"])}, Sparsity(0.5))),
        ("no importances", lambda: masks_of({}, Sparsity(0.5))),
        ("all tensors are exempt", lambda: masks_of(A, Sparsity(0.5), exempt=("*",))),
        ("matches 'b.weight'; the nearest is 'a.weight'", lambda: masks_of(A, 0.5, exempt=("b.weight",))),
        ("exempt: 3 is not a string", lambda: untyped(masks_of)(A, 0.5, exempt=(3,))),
        ("scope is 'layer'", lambda: masks_of(A, Sparsity(0.5), scope="layer")),
        ("floor is 2", lambda: masks_of(A, Sparsity(0.5), floor=2)),
        ("floor is '0'", lambda: untyped(masks_of)(A, 0.5, floor="0")),
        ("floor is nan", lambda: masks_of(A, 0.5, floor=float("nan"))),
        ("2:4 keeps, 0.5", lambda: masks_of(A, Pattern(2, 4), floor=0.6)),
        ("tiebreak: no tensor is named 'b'", lambda: masks_of(A, 0.5, tiebreak={"b": np.ones(8)})),
        ("tiebreak of 'a.weight' has 3", lambda: masks_of(A, 0.5, tiebreak={"a.weight": np.ones(3)})),
        ("along: no tensor is named 'b'", lambda: masks_of(A, Pattern(2, 4), along={"b": (0, 1)})),
        ("the class Knee; give Knee", lambda: untyped(masks_of)(A, Knee)),
        ("the threshold is '0.5'", lambda: untyped(masks_of)(A, "0.5")),
        ("the threshold is None", lambda: untyped(masks_of)(A, None)),
        ("the threshold is True", lambda: masks_of(A, True)),
        ("the threshold is \\[0.5\\]", lambda: untyped(masks_of)(A, [0.5])),
        ("sparsity is 1.5", lambda: masks_of(A, 1.5)),
        ("prunes -3 of 8", lambda: untyped(masks_of)(A, Counting(-3))),
        ("prunes 9 of 8", lambda: untyped(masks_of)(A, Counting(9))),
        ("prunes 0.5 of 8", lambda: untyped(masks_of)(A, Counting(0.5))),
        ("sparsity is 1.5", lambda: Sparsity(1.5)),
        ("sparsity is '0.5'", lambda: untyped(Sparsity)("0.5")),
        ("quantile is -0.1", lambda: Quantile(-0.1)),
        ("keeps 4 of 4", lambda: Pattern(4, 4)),
        ("keeps 2.0 of 4", lambda: untyped(Pattern)(2.0, 4)),
        ("k is nan", lambda: MeanSigma(float("nan"))),
        ("k is 1", lambda: untyped(MeanSigma)("1")),
        ("ascend", lambda: graded({"a": np.ones(3)}, (0.5, 0.4))),
        ("'a' has numbers that are not finite", lambda: graded({"a": np.array([1.0, np.nan])})),
    ],
)
def test_invalid_arguments_are_refused(words: str, made: Callable[[], object]) -> None:
    with pytest.raises(OptionError, match=words):
        made()


# ------------------------------------------------------------------------------------------- N:M patterns


def assert_two_of_four(mask: np.ndarray, dim: int) -> None:
    moved = np.moveaxis(mask, dim, -1)
    assert (moved.reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((8, 12), 1), ((6, 8, 3), 1), ((6, 8, 3, 3), 1), ((2, 4, 3, 3, 3), 1), ((3, 8, 132), 2), ((8,), 0)],
)
def test_a_pattern_runs_along_the_inputs(shape: tuple[int, ...], dim: int) -> None:
    found = np.random.default_rng(4).gamma(0.5, size=shape)
    mask = masks_of({"a": found}, Pattern(2, 4))["a"]
    assert_two_of_four(mask, dim)
    assert found[mask].sum() > 2 * found[~mask].sum()


def test_a_convolution_kernel_is_split_into_groups_like_nvidia_asp() -> None:
    kernel = np.random.default_rng(5).gamma(0.5, size=(6, 8, 3, 2))
    # ASP converts a kernel [K, C, R, S] to rows of C, one for each R, S and K, and prunes along the rows.
    rows = kernel.transpose(2, 3, 0, 1).reshape(-1, 8)
    expected = masks_of({"a": rows}, Pattern(2, 4))["a"].reshape(3, 2, 6, 8).transpose(2, 3, 0, 1)
    assert np.array_equal(masks_of({"a": kernel}, Pattern(2, 4))["a"], expected)


def test_the_dimension_of_a_pattern_can_be_set() -> None:
    found = np.random.default_rng(6).gamma(0.5, size=(8, 6))
    mask = masks_of({"a": found}, Pattern(2, 4), along={"a": (0, 1)})["a"]
    assert_two_of_four(mask, 0)
    assert np.array_equal(mask, masks_of({"a": found.T}, Pattern(2, 4))["a"].T)


def test_tensors_that_a_pattern_does_not_fit_are_skipped_and_named() -> None:
    found = {"fits": np.ones((3, 8)), "odd": np.ones((3, 7)), "stem": np.ones((4, 3, 3, 3))}
    with pytest.warns(SfpWarning, match=r"2:4 does not fit 'odd' .* 7 inputs .*, 'stem' .* 3 inputs"):
        masks = masks_of(found, Pattern(2, 4))
    assert list(masks) == ["fits"]
    with pytest.warns(SfpWarning, match="4 inputs along dimension 0 in each of 3 groups"):
        masks_of({"a": np.ones((12, 4)), "b": np.ones((2, 8))}, Pattern(2, 8), along={"a": (0, 3)})


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    found = {"odd": np.ones((3, 7)), "none": np.ones((3, 0)), "flat": np.ones((4, 4))}
    with pytest.raises(OptionError, match=r"2:4 does not fit 'odd'.*'none'.*'flat'.*no dimension 2"):
        masks_of(found, Pattern(2, 4), along={"flat": (2, 1)})


def test_equal_importances_of_a_pattern_are_ordered_by_tiebreak_then_position() -> None:
    weights = {"a": np.array([[5.0, -1.0, 3.0, -4.0]])}
    equal = {"a": np.ones((1, 4))}
    assert masks_of(equal, Pattern(2, 4), tiebreak=weights)["a"].tolist() == [[True, False, False, True]]
    assert masks_of(equal, Pattern(2, 4))["a"].tolist() == [[False, False, True, True]]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99))
def test_grades_keep_the_order_and_their_boundaries_are_exact(seed: int) -> None:
    found = importances(seed, (40, 25), (1000,))
    grades = graded(found)
    flat = np.concatenate([array.reshape(-1) for array in found.values()])
    grade = np.concatenate([array.reshape(-1) for array in grades.values()])
    assert (np.diff(grade[np.argsort(flat, kind="stable")]) >= 0).all()
    for number, share in enumerate(BOUNDARIES, 1):
        assert (grade < number).sum() == int(np.floor(share * 2000 + 0.5))
        by_grade = masks_of(grades, Sparsity(share), tiebreak=found)
        by_rank = masks_of(found, Sparsity(share))
        assert all(np.array_equal(by_grade[name], by_rank[name]) for name in found)


def test_grades_are_restored_from_a_file() -> None:
    found = importances(5, (64, 64), (64, 96))
    grades = graded(found)
    weights = {name: array.astype(np.float32) for name, array in found.items()}
    options = Options(importance=options_for_grades(over="all"))
    with SfpFile(save(weights, options=options, importances=grades)) as file:
        for name, grade in grades.items():
            assert grade.max() == len(BOUNDARIES)
            kept = file.get_importance(name)
            assert kept is not None
            np.testing.assert_array_equal(kept, grade)


# --------------------------------------------------------------------------------- rows, and shares a tensor


def test_scope_row_prunes_the_same_number_of_smallest_in_each_row() -> None:
    importances = np.random.default_rng(0).random((20, 3, 11))
    mask = masks_of({"w": importances}, Sparsity(0.3), scope="row")["w"]
    rows, kept = importances.reshape(20, 33), mask.reshape(20, 33)
    assert (kept.sum(1) == 33 - 10).all()
    for values, row in zip(rows, kept, strict=True):
        assert values[~row].max() < values[row].min()


def test_scope_row_masks_equal_those_of_the_wanda_reference() -> None:
    scores = torch.rand(12, 40, generator=torch.Generator().manual_seed(0))
    found = masks_of({"w": scores.numpy()}, Sparsity(0.55), scope="row")["w"]
    assert np.array_equal(found, rows_mask(scores, 0.55).numpy())


def test_scope_row_supports_ties_and_floors() -> None:
    importances, magnitudes = np.zeros((2, 4)), np.array([[3.0, -1.0, 2.0, -4.0], [1.0, 2.0, 3.0, 4.0]])
    tied = masks_of({"w": importances}, Sparsity(0.5), scope="row", tiebreak={"w": magnitudes})["w"]
    assert tied.tolist() == [[True, False, False, True], [False, False, True, True]]
    with pytest.warns(SfpWarning, match="in 2 of 2 rows"):
        kept = masks_of({"w": magnitudes**2}, Sparsity(1.0), scope="row", floor=0.3)["w"]
    assert (kept.sum(1) == 2).all()
    assert masks_of({"v": np.arange(4.0), "e": np.zeros((0, 3))}, Sparsity(0.5), scope="row")["v"].sum() == 2


def test_scope_row_has_one_threshold_for_each_row() -> None:
    rows = np.concatenate([np.full((1, 9), 1.0), np.full((1, 9), 100.0)])
    rows[0, :3], rows[1, :6] = 0.1, 10.0
    mask = masks_of({"w": rows}, Otsu(), scope="row")["w"]
    assert mask.sum(1).tolist() == [6, 3]


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_tensors_with_more_outliers_are_pruned_less_and_the_total_is_met(scope: str) -> None:
    generator = np.random.default_rng(0)
    importances = {name: generator.random((40, 100)) for name in "abc"}
    importances["b"][:, :10] *= 50
    importances["c"][:, :3] *= 50
    masks = masks_of(importances, Outliers(0.6, spread=0.1), scope=scope)
    lost = {name: 1 - float(mask.mean()) for name, mask in masks.items()}
    assert lost["a"] > lost["c"] > lost["b"]
    assert lost["a"] - lost["b"] == pytest.approx(0.2, abs=0.01)
    assert achieved(masks) == pytest.approx(0.6, abs=0.005)


def test_without_outliers_all_tensors_have_the_same_sparsity() -> None:
    assert Outliers(0.4).shares({"a": np.ones((3, 3)), "b": np.ones((2, 8))}) == pytest.approx(
        {"a": 0.4, "b": 0.4}
    )


def test_a_rising_profile_rises_by_equal_steps_and_meets_the_total() -> None:
    importances = {name: np.ones((4, n)) for name, n in (("a", 10), ("b", 30), ("c", 20))}
    shares = Rising(0.5, rise=0.3).shares(importances)
    assert shares["b"] - shares["a"] == pytest.approx(0.15)
    assert shares["c"] - shares["b"] == pytest.approx(0.15)
    assert sum(shares[name] * array.size for name, array in importances.items()) == pytest.approx(0.5 * 240)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.97, 1.0])
def test_shares_are_clamped_and_still_meet_the_total(share: float) -> None:
    importances = {str(i): np.ones((2, 10 + i)) for i in range(7)}
    shares = Rising(share, rise=0.5).shares(importances)
    assert all(0 <= value <= 1 for value in shares.values())
    size = sum(array.size for array in importances.values())
    assert sum(shares[name] * a.size for name, a in importances.items()) == pytest.approx(share * size)


def test_invalid_shares_are_refused() -> None:
    for made in (
        lambda: Outliers(1.5),
        lambda: Outliers(0.5, spread=-0.1),
        lambda: Outliers(0.5, multiple=0.0),
        lambda: Rising(-0.1),
        lambda: Rising(0.5, rise=2.0),
        lambda: masks_of({"a": np.ones((2, 2))}, Rising(0.5)),
    ):
        with pytest.raises(OptionError):
            made()


def test_rows_are_the_inputs_of_each_output_in_every_storage_layout() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 3), torch.nn.Conv2d(4, 6, 2), torch.nn.ConvTranspose1d(10, 3, 2)
    )
    importances = {
        name: torch.rand(weight.shape, generator=torch.Generator().manual_seed(0))
        for name, weight in chosen_weights(model, None).items()
    }
    masks = prune(model, importances, 0.5, scope="row")
    assert (masks["0.weight"].sum(1) == 4).all()
    assert (masks["1.weight"].flatten(1).sum(1) == 8).all()
    assert (masks["2.weight"].transpose(0, 1).flatten(1).sum(1) == 10).all()
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())


def test_rows_of_stacked_matrices_are_the_rows_of_each_matrix() -> None:
    stack = np.random.default_rng(0).random((2, 3, 200))
    assert (masks_of({"experts": stack}, Sparsity(0.3), scope="row")["experts"].sum(2) == 140).all()
