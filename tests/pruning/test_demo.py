"""The demonstration's learning, and the benchmark of pruning methods: on the bundled model, for few steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import sfpformat
from sfpformat.bench import pruning, pruning_rows
from sfpformat.cli import main
from sfpformat.demo import bundled, bundled_importance, language, learned, methods, variants
from sfpformat.demo.methods import METHODS, Bench, steps_of
from sfpformat.demo.model import Config, logits
from sfpformat.numpy import load_file
from sfpformat.pruning.grades import BOUNDARIES
from sfpformat.pruning.masks import achieved
from sfpformat.pruning.thresholds import Sparsity

from ..figures.pruning import ROWS, counts, read, table

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Little text and little calibration; one thread, since the arrays are small."""
    monkeypatch.setattr(variants, "EVALUATED_TOKENS", {"code": 512, "prose": 256})
    monkeypatch.setattr(methods, "FACTOR_STEPS", 1)
    monkeypatch.setattr(language, "WINDOWS", 1)
    monkeypatch.setattr(pruning, "CALIBRATION_BATCHES", 2)
    monkeypatch.setattr(pruning, "EVALUATED_TOKENS", 512)
    monkeypatch.setattr(learned, "_CALIBRATION_BATCHES", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights() -> variants.Tensors:
    return bundled.weights()


def test_the_bundled_importance_has_a_grade_for_each_weight_of_the_linear_layers(
    weights: variants.Tensors,
) -> None:
    found = bundled.importances()
    assert list(found) == bundled.linear_layers(weights)
    flat = np.concatenate([grades.reshape(-1) for grades in found.values()])
    shares = np.bincount(np.rint(flat).astype(np.int64), minlength=len(BOUNDARIES) + 1) / flat.size
    np.testing.assert_allclose(np.cumsum(shares)[:-1], BOUNDARIES, atol=1e-5)


@pytest.mark.parametrize("share", [0.7, 0.9])
def test_the_bundled_importance_adds_a_quarter_of_the_perplexity_that_magnitude_adds(
    share: float, weights: variants.Tensors
) -> None:
    by = {
        "importance": variants.importance_masks(weights, Sparsity(share)),
        "magnitude": variants.magnitude_masks(weights, Sparsity(share)),
    }
    rises = {}
    for method, masks in by.items():
        assert achieved(masks) == pytest.approx(share, abs=1e-5)
        zero = {name: np.where(mask, weights[name], 0).astype(np.float32) for name, mask in masks.items()}
        rises[method] = variants.evaluate({**weights, **zero}, "code") - variants.evaluate(weights, "code")
    assert rises["importance"] < rises["magnitude"] / 4


def test_the_torch_and_numpy_models_return_the_same_outputs(weights: variants.Tensors) -> None:
    model = language.language_model(weights)
    ((inputs, _),) = list(language.Windows(2, 1, 0))
    with torch.no_grad():
        ours = model(inputs).numpy()
    np.testing.assert_allclose(ours, logits(weights, model_config(), inputs.numpy()), atol=2e-3)


def model_config() -> Config:
    return Config()


def test_windows_depend_only_on_the_seed() -> None:
    one = language.Windows(2, 3, 5)
    for (first, successors), (again, _), (other, _) in zip(one, one, language.Windows(2, 3, 6), strict=True):
        assert torch.equal(first, again)
        assert torch.equal(first[:, 1:], successors[:, :-1])
        assert not torch.equal(first, other)


def test_no_window_contains_held_out_text() -> None:
    text = language.training_tokens().numpy().tobytes()
    for kind in bundled.TEXTS:
        tokens = bundled.heldout_tokens(kind, 4096)
        assert not any(tokens[i : i + 256].tobytes() in text for i in range(0, 4096, 256))


@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith(("wanda-", "sparsegpt-f", "mag"))])
def test_every_method_meets_its_sparsity(method: str, weights: variants.Tensors) -> None:
    calls = []
    bench = Bench(weights, 2, calibration_batches=1, progress=lambda step, loss: calls.append(step))
    pruned = bench.prune(method, 0.7)
    masks = {name: mask.numpy() for name, mask in pruned.masks.items()}
    assert list(masks) == bundled.linear_layers(weights)
    assert achieved(masks) == pytest.approx(0.7, abs=0.002)
    assert len(calls) == steps_of(method, 2)
    assert all(bool((pruned.weights[name][~mask] == 0).all()) for name, mask in pruned.masks.items())
    assert bool(pruned.factors) == method.endswith("factors")
    assert np.isfinite(variants.evaluate(bench.arrays(pruned), "code"))


def test_the_benchmark_prints_a_list_of_objects(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "pruning", "--seeds", "1", "--sparsity", "0.7,0.8", "--methods", "magnitude,learned"]
    words += ["--steps", "1", "--threads", "1"]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["method"], row["sparsity"], row["seed"]) for row in rows] == [
        (method, sparsity, 0) for sparsity in (0.7, 0.8) for method in ("magnitude", "learned")
    ]
    for row in rows:
        assert list(row) == list(pruning_rows.FIELDS)
        assert row["perplexity"] > row["dense_perplexity"]
        assert row["training_seconds"] is None
    header, table = pruning_rows.summary(rows)
    assert len(table) == 4
    assert all(len(cells) == len(header) for cells in table)


def test_rows_are_saved_one_by_one_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    words = ["bench", "pruning", "--seeds", "1", "--sparsity", "0.7", "--steps", "1", "--threads", "1"]
    words += ["--rows", str(path), "--json"]
    assert main([*words, "--methods", "magnitude"]) == 0
    (magnitude,) = json.loads(capsys.readouterr().out)
    lines = path.read_bytes()
    path.write_bytes(lines + lines[:40])  # the process ended within a row
    asked = []
    prune = Bench.prune

    def noted(bench: Bench, method: str, *args: Any) -> methods.Pruned:
        asked.append(method)
        return prune(bench, method, *args)

    monkeypatch.setattr(Bench, "prune", noted)
    assert main([*words, "--methods", "magnitude,fisher"]) == 0
    assert asked == ["fisher"]
    first, second = json.loads(capsys.readouterr().out)
    assert first == magnitude
    assert [json.loads(line) for line in path.read_text().splitlines()] == [first, second]
    assert main([*words, "--methods", "fisher", "--steps", "2"]) == 0  # rows of other steps are others
    assert asked == ["fisher", "fisher"]


def test_the_readme_shows_the_rows_recorded_in_the_repository() -> None:
    readme = (Path(__file__).parents[1] / "figures" / "README.md").read_text(encoding="utf-8")
    found = read(ROWS)
    assert all(list(row) == list(pruning_rows.FIELDS) for row in found)
    assert "\n".join(table(found)) in readme


def test_a_cell_is_the_mean_over_the_seeds_and_half_of_their_spread() -> None:
    def row(seed: int, perplexity: float) -> pruning_rows.Row:
        whole = {"method": "fisher", "sparsity": 0.7, "seed": seed, "seconds": 3 - seed}
        code = {"perplexity": perplexity, "dense_perplexity": 2.0}
        return {**whole, **code, "prose_perplexity": 4.0, "dense_prose_perplexity": 3.5}

    found = [row(0, 2.5), row(1, 4.5)]
    assert table(found)[-1] == "| `fisher` | 1.50 ± 1.00, 0.50 ± 0.00 | 2 |"
    assert table(found[:1])[-1] == "| `fisher` | 0.50, 0.50 | 3 |"
    assert counts(found) == ["70 %, methods: 1 of seed 0, 1 of seed 1"]


@pytest.mark.parametrize("text", ["no rows", "no rows\n", "3\n", '{"method": "guess"}\n'])
def test_an_unrelated_file_is_refused_and_unchanged(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    assert main(["bench", "pruning", "--seeds", "1", "--rows", str(path)]) == 2
    assert "give another file" in capsys.readouterr().err
    assert path.read_text() == text


def test_a_model_of_another_seed_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pruning.CACHE, str(tmp_path))
    first, seconds = pruning.model_of(1, 2, 1)
    assert seconds is not None
    monkeypatch.setattr(pruning, "run_python", lambda words: pytest.fail("trained again"))
    again, _ = pruning.model_of(1, 2, 1)
    assert all(first[name].tobytes() == again[name].tobytes() for name in first)
    assert first["head.weight"].tobytes() != bundled.weights()["head.weight"].tobytes()


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "pruning", "--methods", "guess"],
        ["bench", "pruning", "--sparsity", "most"],
        ["bench", "pruning", "--sparsity", "1"],
        ["bench", "pruning", "--seeds", "0"],
        ["bench", "pruning", "--only", "load"],
        ["bench", "--seeds", "3"],
        ["demo", "--plot", "a.png"],
        ["demo", "--learn", "--plot", "a.txt"],
        ["demo", "--sparsity", "0.7", "--plot", "a.txt"],
        ["demo", "--sparsity", "0.7", "--plot", "nowhere/a.png"],
        ["demo", "--learn", "--steps", "0"],
        ["demo", "--sparsity", "0.7", "--steps", "3"],
    ],
)
def test_invalid_arguments_are_refused_at_once(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("sfp: error: ")


def test_the_demonstration_prints_a_comparison_and_writes_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(learned, "SPARSITIES", (0.6, 0.8))
    monkeypatch.setattr(learned, "COMPARED", {"magnitude": "magnitude", "learned": "learned"})
    picture = tmp_path / "picture.svg"
    words = ["demo", "--learn", "--steps", "2", "--keep", str(tmp_path), "--plot", str(picture)]
    assert main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(row["method"], row["asked"]) for row in shown["results"]] == [
        (method, share) for method in ("magnitude", "learned") for share in (0.6, 0.8)
    ]
    for row in shown["results"]:
        assert row["verified"]
        assert row["sparsity"] == pytest.approx(row["asked"], abs=0.02)
        path = tmp_path / f"{row['method']}-{round(100 * row['asked'])}.sfp"
        assert path.stat().st_size == row["file_bytes"]
        assert variants.evaluate(load_file(path), "code") == row["code"]
    curves = [group for group in ElementTree.parse(picture).iter(f"{SVG}g") if "clip-path" in group.attrib]
    markers = sum(len(group.findall(f"{SVG}use")) for group in curves)
    assert markers == 8  # two panels, two methods, two sparsities


def test_the_command_learns_the_importance_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: variants.Tensors
) -> None:
    path = tmp_path / "model.sfp"
    path.write_bytes(bundled.model_bytes())
    monkeypatch.setattr(bundled_importance, "Bench", partial(Bench, calibration_batches=2))
    bundled_importance.main([str(path), "--steps", "1"])
    assert [file.name for file in tmp_path.iterdir()] == ["model.sfp"]
    with sfpformat.open(path) as file:
        for name, array in weights.items():
            assert file.get_tensor(name).tobytes() == array.tobytes()
            assert (file.get_importance(name) is not None) == (name in bundled.linear_layers(weights))
    assert sfpformat.validate(path).canonical
    assert path.stat().st_size < 2_000_000


def test_the_command_prunes_the_bundled_file(tmp_path: Path, weights: variants.Tensors) -> None:
    source, target = tmp_path / "model.sfp", tmp_path / "pruned.sfp"
    source.write_bytes(bundled.model_bytes())
    assert main(["prune", str(source), "--sparsity", "0.8", "-o", str(target)]) == 0
    expected = variants.importance_masks(weights, Sparsity(0.8))
    with sfpformat.open(target) as file:
        for name, mask in expected.items():
            np.testing.assert_array_equal(file.get_mask(name), mask)
