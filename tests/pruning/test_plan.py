"""The plan for large models in the guide is what the command computes, by what the code does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sfpformat.pruning import processes as module
from sfpformat.pruning.processes import Processes

from ..figures.plan import COMMAND, LARGE, MEMORY, SHARDED, SMALL, WHOLE, Model, memory, sent, table

GUIDE = Path(__file__).parents[2] / ".github" / "guides" / "prune.md"


def test_the_table_in_the_guide_is_that_of_the_command() -> None:
    assert table() in GUIDE.read_text(encoding="utf-8")


def test_models_have_the_weights_of_llama_3() -> None:
    assert SMALL.weights == pytest.approx(8.03e9, rel=1e-3)
    assert LARGE.weights == pytest.approx(70.6e9, rel=1e-3)


def test_memory_falls_with_shards_and_rises_with_what_the_caller_holds() -> None:
    whole, held, sharded = (memory(SMALL, 8, way) for way in (WHOLE, COMMAND, SHARDED))
    assert held["state"] == whole["state"] * 1.4
    assert sharded["state"] == whole["state"] / 8
    assert sum(whole.values()) < MEMORY < sum(held.values())


def test_bytes_sent_are_those_of_the_exchange_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    world, bytes_sent = 8, 0

    def to_others(received: torch.Tensor, sent: torch.Tensor, group: Any) -> None:
        nonlocal bytes_sent
        bytes_sent += sent.nbytes * (world - 1) // world
        received.zero_()

    def to_all(received: list[torch.Tensor], sent: torch.Tensor, group: Any) -> None:
        nonlocal bytes_sent
        bytes_sent += sent.nbytes * (world - 1)

    distributed = SimpleNamespace(all_to_all_single=to_others, all_gather=to_all)
    monkeypatch.setattr(module, "_distributed", lambda: distributed)
    processes = Processes()
    processes.world, processes.rank = world, 3
    model = Model("tiny", blocks=2, hidden=64, keys=16, inner=128, vocabulary=512)
    shapes = [(64, 64), (16, 64), (16, 64), (64, 64), (128, 64), (128, 64), (64, 128)] * 2 + [(512, 64)]
    assert sum(rows * columns for rows, columns in shapes) == model.pruned
    for shape in shapes:
        processes.added(None, torch.zeros(shape))
    assert bytes_sent == pytest.approx(sent(model, world, WHOLE), rel=0.01)
