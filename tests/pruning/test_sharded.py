"""Models after fully_shard get the scores and masks of one process with whole weights."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from sfpformat.pruning.processes import ALONE
from sfpformat.pruning.sharded_pruning import _lowest
from sfpformat.pruning.weight_selection import is_sharded

from ..support.sharded_group import WORLDS
from .test_processes import assert_same

Results = dict[str, list[dict[str, Any]]]
REFUSED = ("otsu", "outliers")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of one process alone, and of each process of the groups."""
    folder = tmp_path_factory.mktemp("sharded")
    words = [sys.executable, "-m", "tests.support.sharded_group", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    found: Results = {"whole": [torch.load(folder / "whole.pt")]}
    for world in WORLDS:
        found[str(world)] = [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_scores_and_masks_have_the_bits_of_one_process(results: Results, world: int) -> None:
    (alone,) = results["whole"]
    checked = [name for name in alone if name.removeprefix("weights, ") not in REFUSED]
    assert len(checked) > 15
    for found in results[str(world)]:
        for name in checked:
            assert_same(found[name], alone[name])


def test_the_results_of_one_process_prune_what_they_should(results: Results) -> None:
    (alone,) = results["whole"]
    for name, share in (("60", 0.6), ("0", 0.0), ("100", 1.0)):
        masks = alone[f"masks at {name} %"]
        pruned = sum(int((~mask).sum()) for mask in masks.values())
        assert pruned == round(share * sum(mask.numel() for mask in masks.values()))
        weights = alone[f"weights, masks at {name} %"]
        assert all(not weights[key][~mask].any() for key, mask in masks.items())
    equal = alone["masks of equal numbers"]
    assert "last.weight" not in equal
    rows = equal["again.weight"][[0, *range(3, 9)]]
    assert (rows.any(0) & ~rows.all(0)).any()  # the threshold lies among equal importances


@pytest.mark.parametrize("world", WORLDS)
def test_what_needs_whole_weights_is_refused(results: Results, world: int) -> None:
    for found in results[str(world)]:
        for name in REFUSED:
            assert found[name].startswith("OptionError: ")
            assert "the weights are sharded: take a Sparsity" in found[name]
        assert found["by weights"].startswith("OptionError: these settings select the method weights")
        assert found["by a network"].startswith("OptionError: the shared network needs whole weights")
        assert "full_tensor()" in found["packed"]
        assert "are sharded (DTensors)" in found["multiplied"]
        assert "is not sharded like the weight" in found["plain importances"]


def test_learning_on_one_process_moves_the_masks(results: Results) -> None:
    (alone,) = results["whole"]
    learned = alone["learned from Fisher"]
    assert len(learned["history"]) == 6
    assert any(learned["shares"].values())
    assert learned["start"] == "given"
    assert len(alone["learned"]["losses"]) == 6  # of the candidates for the start
    pattern = alone["masks of a learned pattern"]["first.weight"]
    assert (pattern.view(22, -1, 2).sum(2) == 1).all()
    assert any((pattern != alone["masks of a pattern"]["first.weight"]).flatten())


@pytest.mark.parametrize("world", WORLDS)
def test_learning_on_shards_resumes_where_it_was_broken_off(results: Results, world: int) -> None:
    for found in (*results["whole"], *results[str(world)]):
        assert 0 < found["broken off after"] < 6
        for name in ("importances", "history", "shares"):
            assert_same(found["learned in two parts"][name], found["learned"][name])


@pytest.mark.parametrize("world", WORLDS)
def test_an_error_of_one_shard_is_an_error_on_all(results: Results, world: int) -> None:
    for rank, found in enumerate(results[str(world)]):
        assert found["damaged"].startswith("MismatchError: the files")
        assert "start of 'last.weight' has numbers that are negative" in found["negative start"] or (
            rank and "ProcessError: process 0 of" in found["negative start"]
        )


def test_the_lowest_numbers_are_those_of_a_stable_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = [torch.randint(-3, 4, (n, 5), generator=generator) * 0.5 for n in (4, 0, 7)]
        ties = [torch.randint(2, x.shape, generator=generator).float() for x in rows]
        rows[0][0, 0] = -0.0
        flat, second = torch.cat(rows).reshape(-1), torch.cat(ties).reshape(-1)
        order = sorted(range(len(flat)), key=lambda i: (float(flat[i]), float(second[i]), i))
        for count in (0, 1, 20, len(flat)):
            expected = torch.zeros(len(flat), dtype=torch.bool)
            expected[order[:count]] = True
            found = _lowest(rows, ties, count, ALONE)
            assert torch.equal(torch.cat(found).reshape(-1), expected)


def test_plain_models_are_not_sharded() -> None:
    assert not is_sharded(torch.nn.Linear(2, 2))
    assert not is_sharded(torch.zeros(2))
