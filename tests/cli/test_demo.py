"""The demonstration: the bundled model, and the table that is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sfpformat
from sfpformat import Uniform
from sfpformat.cli import main
from sfpformat.demo import bundled, perplexity_plot, variants
from sfpformat.demo.model import (
    CHARACTERS,
    OTHER_TOKEN,
    Config,
    encode_text,
    logits,
    perplexity,
    weight_shapes,
)
from sfpformat.options import Options
from sfpformat.pruning.thresholds import Pattern, Sparsity, Threshold


@pytest.fixture(scope="module")
def weights() -> variants.Tensors:
    return bundled.weights()


@pytest.fixture
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Perplexities over a few windows, so that the tests are quick."""
    monkeypatch.setattr(variants, "EVALUATED_TOKENS", {"code": 1024, "prose": 512})


def test_the_bundled_file_is_canonical_and_small() -> None:
    assert sfpformat.validate(bundled.model_bytes()).canonical
    assert len(bundled.model_bytes()) < 2_000_000


def test_the_bundled_model_has_the_shapes_of_its_config(weights: variants.Tensors) -> None:
    assert {name: array.shape for name, array in weights.items()} == weight_shapes(Config())
    assert 900_000 < sum(array.size for array in weights.values()) < 1_100_000


def test_the_bundled_model_predicts_held_out_text(weights: variants.Tensors) -> None:
    tokens = bundled.heldout_tokens("code", 2049)
    assert perplexity(weights, Config(), tokens) < 3.5
    shuffled = np.random.default_rng(0).permutation(tokens)
    assert perplexity(weights, Config(), shuffled) > 20


def test_outputs_do_not_depend_on_later_positions(weights: variants.Tensors) -> None:
    tokens = bundled.heldout_tokens("prose", 64)
    changed = tokens.copy()
    changed[40:] = OTHER_TOKEN
    before, after = (logits(weights, Config(), t[None])[0, :40] for t in (tokens, changed))
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)


def test_text_is_encoded_character_by_character() -> None:
    assert encode_text("\tA~é").tolist() == [0, CHARACTERS.index("A"), CHARACTERS.index("~"), OTHER_TOKEN]


def test_magnitude_pruning_keeps_the_largest_weights() -> None:
    array = np.array([[4.0, -1.0, 3.0, -2.0], [0.5, 8.0, -7.0, 6.0]], np.float32)
    tensors: variants.Tensors = {"layers.a": array, "layers.b": 9 * array, "head.weight": array}

    def masks(threshold: Threshold | Pattern) -> dict[str, object]:
        return {name: mask.tolist() for name, mask in variants.magnitude_masks(tensors, threshold).items()}

    half = [[True, False, False, False], [False, True, True, True]]
    assert masks(Sparsity(0.5)) == {"layers.a": half, "layers.b": half}
    two_of_four = [[True, False, True, False], [False, True, True, False]]
    assert masks(Pattern(2, 4)) == {"layers.a": two_of_four, "layers.b": two_of_four}


def test_a_lossless_variant_has_the_same_perplexity(
    weights: variants.Tensors, short_texts: None, tmp_path: Path
) -> None:
    result = variants.run(weights, variants.Variant("lossless", None, Options()), tmp_path / "a.sfp")
    assert result.error_db is None
    assert result.verified
    assert result.code == variants.evaluate(weights, "code")
    assert result.bits_per_weight < 11


def test_a_pruned_and_quantised_variant_is_measured(
    weights: variants.Tensors, short_texts: None, tmp_path: Path
) -> None:
    variant = variants.Variant("half", Sparsity(0.5), Options(Uniform(error_db=-20)))
    result = variants.run(weights, variant, tmp_path / "b.sfp")
    assert result.verified
    assert result.sparsity == pytest.approx(0.5, abs=0.01)
    assert result.error_db == pytest.approx(-11, abs=2)
    assert result.bits_per_weight < 3.5
    assert variants.evaluate(weights, "code") < result.code < 6


def test_the_command_prints_a_row_for_each_variant(
    short_texts: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(variants, "VARIANTS", variants.VARIANTS[:2])
    assert main(["demo", "--json", "--keep", str(tmp_path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in shown["results"]] == [v.name for v in variants.VARIANTS]
    assert len(list(tmp_path.glob("*.sfp"))) == 2
    assert main(["demo"]) == 0
    table = capsys.readouterr().out
    assert all(variant.name in table for variant in variants.VARIANTS)


def test_the_command_prunes_to_any_sparsity_by_learned_importance(
    short_texts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--sparsity", "0.65,0.925", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["name"] for row in rows] == [
        f"{share} % by {by}, -20 dB" for share in ("65", "92.5") for by in ("magnitude", "importance")
    ]
    for magnitude, importance in zip(rows[::2], rows[1::2], strict=True):
        assert magnitude["sparsity"] == pytest.approx(importance["sparsity"], abs=0.01)
        assert importance["code"] < 0.7 * magnitude["code"]
    assert rows[1]["sparsity"] == pytest.approx(0.65, abs=0.02)
    assert rows[3]["sparsity"] == pytest.approx(0.925, abs=0.02)


def test_the_command_draws_a_curve_by_magnitude_and_one_by_importance(
    short_texts: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    drawn: list[Any] = []
    figure_of = perplexity_plot.figure_of

    def kept(*args: Any) -> Any:
        drawn.append(figure_of(*args))
        return drawn[-1]

    monkeypatch.setattr(perplexity_plot, "figure_of", kept)
    picture = tmp_path / "picture.png"
    assert main(["demo", "--sparsity", "0.8,0.6", "--json", "--plot", str(picture)]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    for axis, kind in zip(figure.axes, ("code", "prose"), strict=True):
        for line, by in zip(axis.lines, variants.PRUNED_BY, strict=False):
            assert line.get_label() == variants.PRUNED_BY[by]
            own = [row for row in reversed(results) if by in row["name"]]
            assert line.get_xdata().tolist() == [row["bits_per_weight"] for row in own]
            assert line.get_ydata().tolist() == [row[kind] for row in own]


SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
CURVES = {  # method -> bits per weight, perplexities of code and of prose, by share; close to real values
    "magnitude": ((2.9, 2.5, 2.1, 1.7, 1.2), (3.3, 4.8, 8.1, 27, 32), (4.8, 7.1, 11, 33, 58)),
    "importance": ((3.1, 2.7, 2.3, 1.8, 1.2), (2.7, 2.8, 3.1, 3.4, 4.7), (4.1, 4.2, 4.6, 5.3, 7.6)),
}


def test_labels_of_the_plot_overlap_neither_labels_nor_points() -> None:
    found = [
        variants.Row(method, share, variants.Result("", share, 0, bits, None, code, prose, True))
        for method, numbers in CURVES.items()
        for share, bits, code, prose in zip(SHARES, *numbers, strict=True)
    ]
    figure = perplexity_plot.figure_of(found, variants.PRUNED_BY, {"code": 2.55, "prose": 3.8})
    figure.canvas.draw()
    for axis in figure.axes:
        assert [text.get_text() for text in axis.texts] == [f"{100 * share:g} %" for share in SHARES]
        boxes = [text.get_window_extent() for text in axis.texts]
        curves = [line.get_xydata() for line in axis.lines[: len(CURVES)]]
        for i, box in enumerate(boxes):
            assert axis.bbox.containsx(box.x0)
            assert axis.bbox.containsx(box.x1)
            assert axis.bbox.containsy(box.y0)
            assert not any(box.overlaps(other) for other in boxes[:i])
        for box in (*boxes, axis.get_legend().get_window_extent()):
            assert not any(box.contains(x, y) for x, y in axis.transData.transform(np.concatenate(curves)))
