"""README.md and the guides: their examples are run."""

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
README = ROOT / "README.md"
GUIDES = sorted((ROOT / ".github" / "guides").glob("*.md"))
SHIP = ROOT / ".github" / "guides" / "ship.md"


def blocks(document: Path, language: str) -> list[str]:
    """The code blocks of a document in a language."""
    return re.findall(rf"```{language}\n(.*?)```", document.read_text("utf-8"), re.DOTALL)


def commands(document: Path) -> list[list[str]]:
    """The lines of a document that call `sfp` on the files of `test_the_commands_run`, as words."""
    lines = [line for block in blocks(document, "sh") if "sfp pack" in block for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("document", [README, *GUIDES], ids=lambda path: path.stem)
def test_the_python_examples_run(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(document, "python"):
        exec(compile(block, document.name, "exec"), names)
    assert not recwarn.list
    if document == README:
        assert np.asarray(names["part"]).shape == (10, 64)
        assert np.asarray(names["alive"]).mean() == pytest.approx(0.5, abs=0.01)
        assert load_file(tmp_path / "small.sfp")["w"].shape == (1024, 768)


@pytest.mark.parametrize("document", [README, SHIP], ids=lambda p: p.stem)
def test_the_commands_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    layers = {f"layer.{i}": rng.standard_normal((96, 64), dtype=np.float32) for i in range(2)}
    make(tmp_path / "model.safetensors", {"embed": layers["layer.0"] * 2, **layers})
    sharded(tmp_path / "checkpoint")
    (tmp_path / "packed").mkdir()
    monkeypatch.chdir(tmp_path)
    assert commands(document)
    for words in commands(document):
        assert words[0] == "sfp"
        differs = words[1] == "diff" and document == README  # its model was packed with 4 bits last
        assert main(words[1:]) == int(differs), words
    if document == README:
        with ShardedFile(tmp_path / "packed" / "model.sfp.index.json") as model:
            assert len(model)


@pytest.mark.parametrize("document", [README, *GUIDES, *ROOT.glob(".github/C*.md")], ids=lambda p: p.stem)
def test_links_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", document.read_text("utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_readme_has_at_most_200_lines() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 200


def test_the_job_that_the_guide_of_the_suite_prints_is_a_golden_one() -> None:
    suite = ROOT / "conformance"
    printed = re.search(r"```json\n(.*?)```", (suite / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert printed is not None
    golden = suite / "cases" / "IMP" / "e-IMP-001-bf16-survivors-runs.job.json"
    assert json.loads(printed[1]) == json.loads(golden.read_text(encoding="utf-8"))
