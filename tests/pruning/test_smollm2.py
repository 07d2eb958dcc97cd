"""The figures of pruning a language model, on a tiny one of transformers."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from ..cli.test_learn import quiet
from ..figures import smollm2
from ..support.pruning_transformers import WORDS, saved

__all__ = ["quiet"]  # a fixture that restores threads and progress bars for other tests


def test_each_method_gives_one_row_measured_on_its_loaded_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "library"
    library.mkdir()
    for i in range(70):  # the evaluated code is from every third module from the 62nd on
        lines = [" ".join(WORDS[(i + j + k) % 35] for k in range(8)) for j in range(30)]
        (library / f"m{i:02}.py").write_text("\n".join(lines))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    monkeypatch.setattr(smollm2, "WINDOW", 16)
    saved("LlamaForCausalLM", tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    words = [str(tmp_path), "--rows", str(rows), "--sparsities", "0.5", "--calibration", "4"]
    words += ["--evaluated", "64", "--steps", "3"]
    smollm2.main(words)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["method"] for row in found] == ["dense", *smollm2.METHODS]
    for row in found[1:]:
        assert row["achieved_sparsity"] == pytest.approx(0.5, abs=0.02)
        assert 1 < row["code"] < 200
        assert 1 < row["prose"] < 200
        assert row["bytes"] == (tmp_path / f"{row['method']}-0.5.sfp").stat().st_size
        assert row["peak_bytes_a_weight"] > 0
    (learned,) = [row for row in found if row["method"] == "levels"]
    assert (learned["steps"], learned["tokens"]) == (3, (4 + 3 * 2 + smollm2.HELD_OUT) * 16)
    assert learned["held_out"]["chosen"] <= learned["held_out"]["start"]
    before = rows.read_text()
    capsys.readouterr()
    smollm2.main(words)
    assert rows.read_text() == before
    assert "| 0.5 | levels, 3 steps from " in capsys.readouterr().out
    smollm2.main([*words, "--methods", "levels", "--seed", "1"])
    assert len(rows.read_text().splitlines()) == len(found) + 1
    smollm2.main([*words, "--sparsities", "2:4", "--methods", "levels,fisher,wanda-swaps-reconstructed"])
    patterned = [json.loads(line) for line in rows.read_text().splitlines()][len(found) + 1 :]
    assert [row["method"] for row in patterned] == ["levels", "fisher", "wanda-swaps-reconstructed"]
    assert {(row["pattern"], row["achieved_sparsity"]) for row in patterned} == {("2:4", 0.5)}
