"""The plan for large models in the guide is what the command computes, by what the code does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sfpformat.pruning import processes as module
from sfpformat.pruning.accumulation import Accumulation
from sfpformat.pruning.levels import Levels
from sfpformat.pruning.masked import _masked_product
from sfpformat.pruning.processes import Processes
from sfpformat.pruning.sharded import Sharded

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
        for one in received:
            one.copy_(sent)

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
    bytes_sent = 0
    weights = {str(i): torch.zeros(shape) for i, shape in enumerate(shapes)}
    sharded = Rows(weights, processes)
    starts = {name: weight.square() for name, weight in weights.items()}
    levels = Levels(weights, starts, network=False, own=torch.float16, temperature=1.0, sharded=sharded)
    ready = Accumulation(list(levels.scored.values()), processes, lambda place, gradient: None)
    bytes_sent = 0
    ready.begin(last=True)
    x = torch.ones(1, 1)
    for name, part in levels.scored.items():
        weight = weights[name]
        out = _masked_product(x.expand(1, weight.shape[1]), weight, None, part, False, *part.logits())
        out.sum().backward()
    ready.end()
    of_weights = 3 * 2 * model.weights * (world - 1) / world  # by FSDP
    assert bytes_sent + of_weights == pytest.approx(sent(model, world, SHARDED), rel=0.02)


class Rows(Sharded):
    """Weights of which each of the processes has an equal share of rows, without DTensors."""

    def __init__(self, weights: dict[str, Any], group: Processes) -> None:
        self.weights, self.processes = weights, group

    def local(self, name: str, given: Any = None, what: str = "importance") -> torch.Tensor:
        first = self.first_row(name)
        rows = len(self.weights[name]) // self.processes.world
        found: torch.Tensor = (self.weights[name] if given is None else given)[first : first + rows]
        return found
