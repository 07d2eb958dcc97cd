"""``sfp info`` and ``sfp verify`` of keyed tables; other commands refuse files that have them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import sfpformat
from sfpformat import KeyedTable
from sfpformat.errors import OptionError

from .test_main import run
from .test_pack import Capture


@pytest.fixture
def path(tmp_path: Path) -> Path:
    keys = [f"key {i}" for i in range(3000)]
    rng = np.random.default_rng(1)
    weights = rng.laplace(size=(3000, 5)) * (rng.random((3000, 5)) < 0.5)
    found = tmp_path / "words.sfp"
    KeyedTable.build(keys, weights, name="words").write(found)
    return found


def test_info_shows_the_bits_per_key_of_each_part(path: Path, capsys: Capture) -> None:
    assert run("info", path) == 0
    shown = capsys.readouterr().out
    assert "keyed table 'words': 2," in shown
    assert "5 outputs" in shown
    assert "bits per key (weights " in shown
    assert run("info", path, "--json") == 0
    [table] = json.loads(capsys.readouterr().out)["keyed"]
    opened = KeyedTable.open(path)
    assert sum(table["bits_per_key"].values()) == pytest.approx(opened.bits_per_key)
    assert table["bits_per_key"]["checks"] == pytest.approx(opened.parts["checks"])
    assert table["false_matches"] == pytest.approx(opened.false_matches().sum())


def test_expected_parts_are_near_those_of_the_keys(path: Path) -> None:
    keys = [f"key {i}" for i in range(9000)]
    weights = np.random.default_rng(1).laplace(size=(9000, 5))
    weights *= np.random.default_rng(2).random((9000, 5)) < 0.5
    built = KeyedTable.build(keys, weights)
    built.write(path)
    expected, real = KeyedTable.open(path).parts, built.parts
    assert expected.keys() == real.keys()
    for part in ("weights", "gaps", "checks"):
        assert expected[part] == pytest.approx(real[part], rel=0.3)


def test_verify_counts_keyed_tables(path: Path, capsys: Capture) -> None:
    assert run("verify", path) == 0
    assert "1 keyed table" in capsys.readouterr().out
    assert sfpformat.validate(path).keyed == 1


@pytest.mark.parametrize("words", [("unpack", "-o", "out.safetensors"), ("pack", "-o", "out.sfp")])
def test_commands_that_would_lose_the_tables_refuse_the_file(
    path: Path, words: tuple[str, ...], tmp_path: Path, capsys: Capture
) -> None:
    command, option, output = words
    assert run(command, path, option, tmp_path / output) == 2
    assert "keyed tables" in capsys.readouterr().err
    assert not (tmp_path / output).exists()


def test_a_delta_of_a_file_with_keyed_tables_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="keyed tables"):
        sfpformat.write_delta(tmp_path / "delta.sfp", path, path)
