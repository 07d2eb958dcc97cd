"""Calibration statistics: one pass over the data, optional single examples, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfpformat.errors import MismatchError, OptionError
from sfpformat.pruning.calibration import examples_of, statistics
from sfpformat.pruning.calibration_sums import Statistics
from sfpformat.pruning.task import Task, cross_entropy

from ..support.pruning_nets import loss_of, trained_net


def assert_same(found: dict[str, Statistics], wanted: dict[str, Statistics]) -> None:
    assert list(found) == list(wanted)
    for name, one in found.items():
        other = wanted[name]
        torch.testing.assert_close(one.gradient, other.gradient)
        torch.testing.assert_close(one.fisher, other.fisher)
        assert one.inputs is not None
        assert other.inputs is not None
        torch.testing.assert_close(one.inputs, other.inputs)


def test_gradients_and_their_squares_match_autograd() -> None:
    net, batches = trained_net()
    found = statistics(net, batches)
    net.eval()
    name = "3.weight"
    gradients = [
        torch.autograd.grad(nn.functional.cross_entropy(net(x), y), [net.get_parameter(name)])[0]
        for x, y in batches
    ]
    torch.testing.assert_close(found[name].gradient, torch.stack(gradients).mean(0))
    torch.testing.assert_close(found[name].fisher, torch.stack(gradients).square().mean(0))


def test_data_are_read_once_and_each_batch_is_reported() -> None:
    net, batches = trained_net()
    seen: list[tuple[int, float]] = []
    statistics(net, iter(batches), progress=lambda number, loss: seen.append((number, loss)))
    assert [number for number, _ in seen] == list(range(1, len(batches) + 1))
    assert seen[0][1] == pytest.approx(loss_of(net, batches[:1]))


def test_single_examples_are_processed_one_by_one_up_to_the_requested_number() -> None:
    net, batches = trained_net()
    found = statistics(net, batches, single=True, batches=70)
    ones = [(x[i : i + 1], y[i : i + 1]) for x, y in batches[:2] for i in range(64)][:70]
    assert_same(found, statistics(net, ones, batches=70))


def test_examples_keep_the_form_of_their_batch() -> None:
    x, y = torch.arange(6).view(3, 2), torch.arange(3)
    assert [part.tolist() for part in examples_of(x)] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert [sorted(part) for part in examples_of({"x": x, "y": y})] == [["x", "y"]] * 3
    assert [type(part) for part in examples_of((x, y))] == [tuple] * 3
    assert next(iter(examples_of([x, y])))[1].tolist() == [0]
    flagged = {"x": x, "rate": 3.0, "scalar": torch.tensor(1)}
    assert [part["x"].tolist() for part in examples_of(flagged)] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert {part["rate"] for part in examples_of(flagged)} == {3.0}
    for batch in ("words", [x, y[:2]], [3.0], 7):
        with pytest.raises(OptionError, match="cannot be split"):
            list(examples_of(batch))


def test_resumed_statistics_equal_uninterrupted_ones(tmp_path: Path) -> None:
    net, batches = trained_net()
    path = tmp_path / "statistics.pt"
    calls: list[Any] = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        calls.append(batch)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return cross_entropy(outputs, batch)

    task = Task(loss=loss)
    with pytest.raises(KeyboardInterrupt):
        statistics(net, batches, task=task, checkpoint=path, every=2)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    resumed = statistics(net, batches, task=task, checkpoint=path, every=2)
    assert len(calls) == 6 + 4  # four of eight were in the file
    assert_same(resumed, statistics(net, batches))
    with pytest.raises(MismatchError):
        statistics(net, batches, batches=7, checkpoint=path)


def test_the_model_keeps_its_gradients_and_its_flags() -> None:
    net, batches = trained_net()
    before = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    statistics(net, batches)
    assert all(p.requires_grad for p in net.parameters())
    for parameter, gradient in zip(net.parameters(), before, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        assert torch.equal(parameter.grad, gradient)


def test_no_data_are_refused() -> None:
    with pytest.raises(OptionError, match="no batch"):
        statistics(trained_net()[0], [])
