"""Several processes learn the same as one process, and none waits for another without a time limit."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from sfpformat.errors import OptionError
from sfpformat.pruning.learning import learn_importance
from sfpformat.pruning.learning_settings import Settings
from sfpformat.pruning.masks import masks_of
from sfpformat.pruning.processes import ALONE, Processes
from sfpformat.pruning.thresholds import Sparsity

from ..support.learning_group import WORLD
from ..support.pruning_nets import trained_net

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of each process."""
    folder = tmp_path_factory.mktemp("group")
    words = [sys.executable, "-m", "tests.support.learning_group", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=400)
    assert done.stdout.strip() == "[0, 0, 0, 7]", done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def of(results: Results, name: str, world: int = WORLD) -> list[Any]:
    """The results of a scenario, of the processes that took part."""
    return [result[name] for result in results[:world]]


def assert_same(one: Any, other: Any) -> None:
    """Compares nested results, bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, (tuple, list)):
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


@pytest.mark.parametrize("world", [2, 4])
def test_masks_equal_those_of_one_process(results: Results, world: int) -> None:
    (alone,) = of(results, "learned by 1", 1)
    for found in of(results, f"learned by {world}", world):
        assert_same(found, alone)
        masks, expected = (
            masks_of({k: v.numpy() for k, v in x["importances"].items()}, Sparsity(0.6))
            for x in (found, alone)
        )
        assert all((masks[name] == mask).all() for name, mask in expected.items())
    assert len(alone["history"]) == 8
    assert any(alone["shares"].values())


@pytest.mark.parametrize("world", [2, 4])
def test_statistics_equal_those_of_one_process(results: Results, world: int) -> None:
    (alone,) = of(results, "statistics by 1", 1)
    for found in of(results, f"statistics by {world}", world):
        assert_same(found, alone)
    assert alone["seen"] == list(range(1, 38))


def test_sums_are_computed_in_the_order_of_the_processes(results: Results) -> None:
    assert all(all(found.values()) for found in of(results, "sums"))


def test_two_processes_resume_a_run_of_four(results: Results) -> None:
    whole = results[0]["whole"]
    assert all(0 < steps < len(whole["history"]) for steps in of(results, "broken off after"))
    for found in of(results, "resumed", 2):
        assert_same(found, whole)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fewer", "OptionError: the processes have different numbers of batches"),
        ("fewer statistics", "OptionError: the processes have different numbers of batches"),
        ("others", "OptionError: the processes have different batches"),
        ("other statistics", "OptionError: the processes have different batches"),
    ],
)
def test_different_data_are_an_error_on_all_processes(results: Results, name: str, words: str) -> None:
    assert all(str(found).startswith(words) for found in of(results, name))


def test_an_error_of_one_process_is_an_error_on_the_others(results: Results) -> None:
    found = of(results, "not finite")
    assert found[2].startswith("LossError: the loss is nan")
    for rank in (0, 1, 3):
        assert found[rank] == "ProcessError: process 2 of 4 failed; see the error on that process"


def test_the_end_of_one_process_is_an_error_on_the_others_at_once(results: Results) -> None:
    for found in results[:3]:
        assert found["gone"].startswith("ProcessError: process ")
        assert found["gone after"] < 50  # the time limit of the group is 60 seconds
    assert "gone" not in results[3]


def test_one_process_needs_no_group() -> None:
    part = torch.randn(5)
    assert torch.equal(ALONE.added(None, part.clone()), part)
    assert torch.equal(ALONE.added(part.clone(), part), part + part)
    assert ALONE.exchanged(lambda: [1.0, 2.0], 2) == [[1.0, 2.0]]
    with pytest.raises(OptionError, match="init_process_group"):
        Processes(group=object())


def test_only_the_method_levels_accepts_several_batches_per_step() -> None:
    net, batches = trained_net()
    with pytest.raises(OptionError, match="batches"):
        Settings(method="weights", batches=2)
    with pytest.raises(OptionError, match="batches"):
        Settings(batches=0)
    with pytest.raises(OptionError, match="group"):
        learn_importance(net, batches, 0.5, settings=Settings(method="weights", steps=1), group=object())
