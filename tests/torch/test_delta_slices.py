"""Processes of ``torch.distributed`` that hold parts of a Llama apply a delta to their parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sfpformat import OptionError
from sfpformat.torch import apply_delta, write_delta

from ..support.delta_group import WORLDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of all processes."""
    out = tmp_path_factory.mktemp("group")
    words = [sys.executable, "-m", "tests.support.delta_group", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize("world", WORLDS)
def test_each_process_of_a_llama_changes_its_part(folder: Path, world: int) -> None:
    found = [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]
    meshes = ["mesh [2]"] if world == 2 else ["mesh [4]", "mesh [2, 2]"]
    for rank, each in enumerate(found):
        for name in (*meshes, "named slices", "strided slices"):
            assert each.pop(name) == [True, True], name
        for mesh in meshes:
            words_of, unchanged = each.pop(f"{mesh}, again")
            assert "the delta was applied before" in words_of
            assert unchanged
        expected = {
            "wrong base": "BaseMismatchError",
            "wrong step": "OptionError: slices: slice(None, None, 2)",
            "wrong size": "OptionError: slices: 'model.layers.0.mlp.up_proj.weight' has the shape",
            "unknown name": "OptionError: slices: no tensor name matches 'unknown'",
            "one process: unknown name": "OptionError: slices: no tensor name matches 'unknown'",
            "one process: no file": "FileNotFoundError: ",
        }
        assert each.keys() == expected.keys()
        for name, start in expected.items():
            if name.startswith("one process") and rank < world - 1:
                start = f"ProcessError: process {world - 1} of {world} failed; nothing was changed: {start}"
            assert each[name][0].startswith(start)
            assert each[name][1], name


def test_slices_of_one_process_must_be_the_whole_model(tmp_path: Path) -> None:
    base, new = torch.nn.Linear(8, 6), torch.nn.Linear(8, 6)
    write_delta(tmp_path / "d.sfp", base, new)
    part = {"weight": base.weight.detach()[:3].clone(), "bias": base.bias.detach().clone()}
    with pytest.raises(OptionError, match=r"'weight': the processes hold 24 of its 48 elements"):
        apply_delta(part, tmp_path / "d.sfp", slices={"weight": np.s_[:3]})
    whole = {name: weight.clone() for name, weight in base.state_dict().items()}
    apply_delta(whole, tmp_path / "d.sfp", slices={"weight": np.s_[...]})
    assert torch.equal(whole["weight"], new.weight)
