"""Deltas of modules and state dicts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sfpformat
from sfpformat import BaseMismatchError, OptionError
from sfpformat.decode.reader import SfpFile
from sfpformat.torch import apply_delta, save_model, write_delta

from ..format.test_delta_parts import file_of, model


class Tied(nn.Module):
    """A model with tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16, dtype=torch.bfloat16)
        self.body = nn.Linear(16, 16, dtype=torch.bfloat16)
        self.head = nn.Linear(16, 50, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight


def pair() -> tuple[Tied, Tied]:
    """A model, and the same model after a small step."""
    base, new = Tied(), Tied()
    new.load_state_dict(base.state_dict())
    with torch.no_grad():
        for weight in new.parameters():
            weight.add_(1e-3 * torch.randn_like(weight))
    return base, new


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have equal weights."""
    mine, other = a.state_dict(), b.state_dict()
    return all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_module_with_tied_weights_becomes_the_result_in_place(tmp_path: Path) -> None:
    base, new = pair()
    place = base.embed.weight.data_ptr()
    told = write_delta(tmp_path / "d.sfp", base, new)
    assert {tensor.name for tensor in told.tensors} == {"body.weight", "body.bias", "embed.weight"}
    apply_delta(base, tmp_path / "d.sfp")
    assert same(base, new)
    assert base.embed.weight.data_ptr() == place
    with pytest.raises(BaseMismatchError, match="applied before"):
        apply_delta(base, tmp_path / "d.sfp")
    assert same(base, new)


def test_a_file_can_be_the_base_of_a_module(tmp_path: Path) -> None:
    base, new = pair()
    save_model(base, tmp_path / "base.sfp")
    write_delta(tmp_path / "d.sfp", tmp_path / "base.sfp", new)
    with sfpformat.open(tmp_path / "d.sfp", base=tmp_path / "base.sfp") as file:
        assert (
            file.get_tensor("embed.weight").tobytes()
            == new.embed.weight.view(torch.int16).detach().numpy().tobytes()
        )


def test_a_state_dict_gets_added_removed_and_strided_tensors(tmp_path: Path) -> None:
    transposed = torch.arange(12.0).reshape(3, 4).T
    base: dict[str, torch.Tensor] = {
        "a": transposed.clone(memory_format=torch.preserve_format),
        "gone": torch.ones(2),
    }
    new = {"a": transposed + 1, "new": torch.ones(3, dtype=torch.int8)}
    write_delta(tmp_path / "d.sfp", base, new)
    kept = base["a"]
    apply_delta(base, tmp_path / "d.sfp")
    assert base.keys() == new.keys()
    assert all(torch.equal(base[name], new[name]) for name in new)
    assert base["a"] is kept
    assert not kept.is_contiguous()


def test_a_module_refuses_a_change_of_its_structure(tmp_path: Path) -> None:
    base, new = pair()
    more = {**new.state_dict(), "extra": torch.ones(1)}
    write_delta(tmp_path / "d.sfp", base.state_dict(), more)
    with pytest.raises(OptionError, match="'extra', which a module cannot; pass a state dict"):
        apply_delta(base, tmp_path / "d.sfp")
    wrong: Any = 3
    with pytest.raises(OptionError, match="target"):
        apply_delta(wrong, tmp_path / "d.sfp")


WORKER = """
import sys, torch
from sfpformat.torch import apply_delta
model = torch.nn.Linear(32, 32, dtype=torch.bfloat16)
model.load_state_dict(torch.load(sys.argv[1]))
for line in sys.stdin:
    apply_delta(model, line.strip())
    print(float(model.weight.detach().double().sum()), flush=True)
"""


def test_a_trainer_sends_its_steps_to_a_worker_in_another_process(tmp_path: Path) -> None:
    model = nn.Linear(32, 32, dtype=torch.bfloat16)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    words = [sys.executable, "-c", WORKER, str(tmp_path / "model.pt")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        for step in range(3):
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            with torch.no_grad():
                model.weight.add_(1e-3 * torch.randn_like(model.weight))
            path = tmp_path / f"step-{step}.sfp"
            write_delta(path, before, model)
            worker.stdin.write(f"{path}\n")
            worker.stdin.flush()
            assert float(worker.stdout.readline()) == float(model.weight.detach().double().sum())
        worker.stdin.close()
    assert worker.returncode == 0


def test_a_delta_of_levels_is_refused_and_one_of_elements_is_the_default(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.sfp" for number in (1, 2)]
    for number, path in enumerate(files):
        path.write_bytes(file_of(model(number, 0.02 * number)))
    with SfpFile(files[0]) as base:
        state = {name: torch.from_numpy(array.copy()) for name, array in base.get_tensors().items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    write_delta(tmp_path / "parts.sfp", files[0], files[1], parts=True)
    with pytest.raises(OptionError, match="parts=False"):
        apply_delta(state, tmp_path / "parts.sfp")
    assert all(torch.equal(state[name], before[name]) for name in state)
    write_delta(tmp_path / "elements.sfp", files[0], files[1])
    apply_delta(state, tmp_path / "elements.sfp")
    with SfpFile(files[1]) as new:
        assert all(np.array_equal(state[name].numpy(), new.get_tensor(name)) for name in new)
