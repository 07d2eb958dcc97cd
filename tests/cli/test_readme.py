"""README.md: what it shows is run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from sfpformat.cli import main
from sfpformat.decode.shards import ShardedFile
from sfpformat.numpy import load_file

from .test_main import make, sharded

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert np.asarray(names["part"]).shape == (10, 64)
    assert np.asarray(names["alive"]).mean() == pytest.approx(0.5, abs=0.01)
    assert load_file(tmp_path / "small.sfp")["w"].shape == (1024, 768)


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    layers = {f"layer.{i}": rng.standard_normal((96, 64), dtype=np.float32) for i in range(2)}
    make(tmp_path / "model.safetensors", {"embed": layers["layer.0"] * 2, **layers})
    sharded(tmp_path / "checkpoint")
    (tmp_path / "packed").mkdir()
    monkeypatch.chdir(tmp_path)
    (commands,) = [block for block in blocks("sh") if "sfp pack" in block]
    for line in commands.strip().splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "sfp"
        assert main(words[1:]) == (1 if words[1] == "diff" else 0), line
    with ShardedFile(tmp_path / "packed" / "model.sfp.index.json") as model:
        assert len(model)


def test_the_job_that_the_guide_of_the_suite_prints_is_a_golden_one() -> None:
    suite = ROOT / "conformance"
    printed = re.search(r"```json\n(.*?)```", (suite / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert printed is not None
    golden = suite / "cases" / "IMP" / "e-IMP-001-bf16-survivors-runs.job.json"
    assert json.loads(printed[1]) == json.loads(golden.read_text(encoding="utf-8"))
