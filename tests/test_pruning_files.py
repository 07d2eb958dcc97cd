"""From masks to files and back: packing, pruning a file again, fine-tuning with masks held, torch's masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import prune as torch_prune

import sfpformat
from sfpformat.cli import main
from sfpformat.codec.options import ImportanceOptions, Options
from sfpformat.errors import OptionError
from sfpformat.numpy import load_file, save_file
from sfpformat.pruning import scores
from sfpformat.pruning.calibration import statistics
from sfpformat.pruning.files import reprune
from sfpformat.pruning.pipeline import apply_masks, give_masks, pack, prune, take_masks
from sfpformat.pruning.thresholds import Sparsity, masks_of
from sfpformat.pruning.tuning import Tuning, fine_tune, fit_factors, fit_multipliers, scaled
from sfpformat.reader import SfpFile
from sfpformat.torch import load_model

from .pruning_nets import loss_of, trained_net

Pair = dict[str, np.ndarray]


def test_pruning_zeroes_what_its_masks_say() -> None:
    net, _ = trained_net()
    importances = scores.magnitude(net)
    before = {name: net.get_parameter(name).detach().clone() for name in importances}
    masks = prune(net, importances, Sparsity(0.6))
    for name, mask in masks.items():
        assert torch.equal(net.get_parameter(name).detach(), torch.where(mask, before[name], 0.0))
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    assert pruned == int(0.6 * sum(mask.numel() for mask in masks.values()) + 0.5)


@pytest.mark.parametrize("teacher", [True, False])
def test_fine_tuning_holds_the_masks_and_lowers_the_loss(teacher: bool) -> None:
    (net, batches), (dense, _) = trained_net(), trained_net()
    masks = prune(net, scores.fisher(net, statistics(net, batches)), Sparsity(0.8))
    bias, before = net.get_parameter("0.bias").detach().clone(), loss_of(net, batches)
    tuning = Tuning(150, 1e-2, "divergence" if teacher else "loss")
    history = fine_tune(net, masks, batches, teacher=dense if teacher else None, tuning=tuning)
    assert len(history) == 150
    assert loss_of(net, batches) < 0.7 * before
    assert torch.equal(net.get_parameter("0.bias").detach(), bias)
    for name, mask in masks.items():
        weight = net.get_parameter(name).detach()
        assert (weight[~mask] == 0).all()
        assert not torch.signbit(weight[~mask]).any()


def test_factors_make_up_for_a_part_and_enter_reconstruction(tmp_path: Path) -> None:
    (net, batches), (dense, _) = trained_net(), trained_net()
    masks = prune(net, scores.fisher(net, statistics(net, batches)), Sparsity(0.8))
    weights = {name: net.get_parameter(name).detach().clone() for name in masks}
    before = loss_of(net, batches)
    factors = fit_factors(net, masks, batches, teacher=dense, tuning=Tuning(150))
    assert all(torch.equal(net.get_parameter(name).detach(), weights[name]) for name in masks)
    pack(net, tmp_path / "factors.sfp", masks, factors=factors)
    with sfpformat.open(tmp_path / "factors.sfp") as file:
        assert file.info("0.weight").role == "multiplier"
    load_model(net, tmp_path / "factors.sfp")
    assert loss_of(net, batches) < 0.8 * before
    for name, (rows, columns) in factors.items():
        expected = scaled(weights[name], rows.half(), columns.half())
        assert torch.equal(net.get_parameter(name).detach(), torch.where(masks[name], expected, 0.0))


def test_a_file_keeps_masks_survivors_and_grades(tmp_path: Path) -> None:
    net, batches = trained_net()
    importances = scores.fisher(net, statistics(net, batches))
    masks = prune(net, importances, Sparsity(0.5))
    pack(net, tmp_path / "a.sfp", masks, importances=importances, metadata={"made": "here"})
    assert sfpformat.validate(tmp_path / "a.sfp").canonical
    with sfpformat.open(tmp_path / "a.sfp") as file:
        assert file.metadata()["made"] == "here"
        for name, mask in masks.items():
            np.testing.assert_array_equal(file.get_mask(name), mask.numpy())
            assert file.info(name).role == "metadata"
    loaded = load_file(tmp_path / "a.sfp")
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(loaded[name], tensor.numpy())


def test_multipliers_make_up_for_a_part_and_take_no_bits(tmp_path: Path) -> None:
    (net, batches), (dense, _) = trained_net(), trained_net()
    masks = prune(net, scores.fisher(net, statistics(net, batches)), Sparsity(0.8))
    weights = {name: net.get_parameter(name).detach().clone() for name in masks}
    before = loss_of(net, batches)
    found = fit_multipliers(net, masks, batches, teacher=dense, tuning=Tuning(150))
    assert all(torch.equal(net.get_parameter(name).detach(), weights[name]) for name in masks)
    assert all((found[name][~mask] == 1).all() for name, mask in masks.items())
    pack(net, tmp_path / "folded.sfp", masks, multipliers=found)
    with sfpformat.open(tmp_path / "folded.sfp") as file:
        assert file.info("0.weight").role is None
    load_model(net, tmp_path / "folded.sfp")
    for name, multiplier in found.items():
        assert torch.equal(net.get_parameter(name).detach(), weights[name] * multiplier)
    assert loss_of(net, batches) < 0.8 * before


def test_multipliers_are_folded_into_what_is_written_alone(tmp_path: Path) -> None:
    net, _ = trained_net()
    masks = prune(net, scores.magnitude(net), Sparsity(0.5))
    before = net.get_parameter("0.weight").detach().clone()
    double = {"0.weight": torch.full_like(before, 2.0)}
    pack(net, tmp_path / "a.sfp", masks, multipliers=double)
    assert torch.equal(net.get_parameter("0.weight").detach(), before)
    np.testing.assert_array_equal(load_file(tmp_path / "a.sfp")["0.weight"], 2 * before.numpy())


def test_torchs_masks_are_taken_and_given() -> None:
    net, _ = trained_net()
    torch_prune.l1_unstructured(net[0], "weight", amount=0.4)
    torch_prune.random_unstructured(net[3], "weight", amount=0.7)
    hidden = net[3].weight.detach().clone()
    masks = take_masks(net)
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {"0.weight": 115, "3.weight": 403}
    assert "0.weight" in dict(net.named_parameters())
    assert torch.equal(net.get_parameter("3.weight").detach(), hidden)
    give_masks(net, masks)
    assert torch_prune.is_pruned(net)
    again = take_masks(net)
    assert all(torch.equal(again[name], mask) for name, mask in masks.items())


# ------------------------------------------------------------------------------------ pruning a file again


def graded_file(path: Path, options: Options, pruned: float) -> tuple[Pair, Pair]:
    """A file of two tensors with importances and one without; the weights and importances."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((40, 60), dtype=np.float32) for name in ("a", "b")}
    importances = {name: rng.integers(0, 16, (40, 60)).astype(np.float32) for name in weights}
    masks = masks_of(importances, Sparsity(pruned), tiebreak=weights)
    save_file(
        {"norm": np.ones(9, np.float32), **weights},
        path,
        {"note": "kept"},
        options=dict.fromkeys(weights, options),
        masks=masks if pruned else None,
        importances=importances,
    )
    return weights, importances


CODINGS = {
    "exact": Options(importance=ImportanceOptions(bits=4)),
    "all": Options(importance=ImportanceOptions(over="all", bits=4)),
    "exact importance": Options(importance=ImportanceOptions(quantiser="exact", dtype="F16")),
    "uniform": Options(quantiser="uniform", step=0.1, importance=ImportanceOptions(bits=4)),
    "scaled": Options(quantiser="uniform", step=0.1, scale="row", importance=ImportanceOptions(bits=4)),
    "table": Options(quantiser="table", centroids=8, importance=ImportanceOptions(bits=4)),
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("first", [0.0, 0.5])
def test_a_file_pruned_again_is_as_if_it_had_been_pruned_so_at_once(
    coding: str, first: float, tmp_path: Path
) -> None:
    weights, importances = graded_file(tmp_path / "a.sfp", CODINGS[coding], first)
    with sfpformat.open(tmp_path / "a.sfp") as file:
        values = {name: file.get_tensor(name) for name in file}
        found = reprune(file, tmp_path / "b.sfp", Sparsity(0.8))
        magnitudes = {name: values[name] for name in weights}
    assert found.before == 2 * round(first * 2400)
    assert found.after == round(0.8 * 4800)
    expected = masks_of(
        {name: np.where(values[name] == 0, -1, importances[name]) for name in weights}
        if first
        else importances,
        Sparsity(0.8),
        tiebreak=magnitudes,
    )
    assert sfpformat.validate(tmp_path / "b.sfp").canonical
    with sfpformat.open(tmp_path / "b.sfp") as file:
        assert file.metadata() == {"note": "kept"}
        np.testing.assert_array_equal(file.get_tensor("norm"), values["norm"])
        for name in weights:
            mask = file.get_mask(name)
            if coding in ("exact", "all", "exact importance"):
                np.testing.assert_array_equal(mask, expected[name])
            np.testing.assert_array_equal(file.get_tensor(name), np.where(mask, values[name], 0))
            kept = file.get_importance(name)
            assert kept is not None
            np.testing.assert_array_equal(kept[mask], importances[name][mask])


def test_step_by_step_is_the_same_as_at_once(tmp_path: Path) -> None:
    graded_file(tmp_path / "0.sfp", CODINGS["exact"], 0.0)
    for before, after, share in (
        ("0", "1", 0.4),
        ("1", "2", 0.7),
        ("2", "stepwise", 0.9),
        ("0", "once", 0.9),
    ):
        with sfpformat.open(tmp_path / f"{before}.sfp") as file:
            reprune(file, tmp_path / f"{after}.sfp", Sparsity(share))
    assert (tmp_path / "stepwise.sfp").read_bytes() == (tmp_path / "once.sfp").read_bytes()


def test_less_than_was_pruned_is_nothing_and_importances_can_be_dropped(tmp_path: Path) -> None:
    graded_file(tmp_path / "a.sfp", CODINGS["exact"], 0.5)
    with sfpformat.open(tmp_path / "a.sfp") as file:
        found = reprune(file, tmp_path / "b.sfp", Sparsity(0.3), keep_importance=False)
    assert found.before == found.after
    with sfpformat.open(tmp_path / "b.sfp") as file:
        assert file.get_importance("a") is None
        with pytest.raises(OptionError):
            reprune(file, tmp_path / "c.sfp", Sparsity(0.9))
    assert not (tmp_path / "c.sfp").exists()


def test_tensors_with_multipliers_are_copied_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 16)).astype(np.float32)
    factors = (rng.random(8).astype(np.float32), rng.random(16).astype(np.float32))
    save_file(
        {"m": weight, "a": weight},
        tmp_path / "a.sfp",
        options={"m": Options(importance=ImportanceOptions(role="multiplier"))},
        importances={"m": factors, "a": np.abs(weight)},
    )
    with SfpFile(tmp_path / "a.sfp") as file:
        before = file.get_tensor("m")
        reprune(file, tmp_path / "b.sfp", Sparsity(0.5))
        with SfpFile(tmp_path / "b.sfp") as pruned:
            np.testing.assert_array_equal(pruned.get_tensor("m"), before)
            assert pruned.info("m") == file.info("m")


def test_the_command_prunes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graded_file(tmp_path / "a.sfp", CODINGS["exact"], 0.5)
    source, target = str(tmp_path / "a.sfp"), str(tmp_path / "b.sfp")
    assert main(["prune", source, "--sparsity", "0.9", "-o", target, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["sparsity_before"] == 0.5
    assert shown["sparsity"] == 0.9
    assert shown["output_bytes"] < shown["input_bytes"]
    for threshold in ("otsu", "otsu-log", "knee", "sigma:0.5", "quantile:0.7", "2:4"):
        assert main(["prune", source, "--threshold", threshold, "-o", target]) == 0
        assert "pruned" in capsys.readouterr().out
    assert (
        main(["prune", source, "--sparsity", "0.9", "--scope", "tensor", "--exempt", "a", "-o", target]) == 0
    )
    with sfpformat.open(target) as file:
        assert file.get_mask("b").mean() == pytest.approx(0.1)
        assert file.get_mask("a").mean() > 0.4


@pytest.mark.parametrize(
    "words",
    [
        ["--sparsity", "0.9", "--exempt", "guess*"],
        ["--threshold", "best"],
        ["--threshold", "sigma:x"],
        ["--sparsity", "2"],
        ["--threshold", "4:2"],
        [],
    ],
)
def test_the_command_refuses_thresholds_that_make_no_sense(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graded_file(tmp_path / "a.sfp", CODINGS["exact"], 0.5)
    assert main(["prune", str(tmp_path / "a.sfp"), "-o", str(tmp_path / "b.sfp"), *words]) == 2
    assert capsys.readouterr().err.startswith("sfp: error: ")
    assert not (tmp_path / "b.sfp").exists()


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    net, batches = trained_net()
    masks = {"0.weight": torch.ones(24, 12, dtype=torch.bool)}
    wrong = {"0.weight": torch.ones(3, 3)}
    pair = (torch.ones(24), torch.ones(12))
    for made in (
        lambda: prune(net, wrong, Sparsity(0.5)),
        lambda: prune(net, {"x": torch.ones(3, 3)}, Sparsity(0.5)),
        lambda: apply_masks(net, {"x": torch.ones(3, 3)}),
        lambda: apply_masks(net, wrong),
        lambda: give_masks(net, wrong),
        lambda: pack(net, tmp_path / "a.sfp", wrong),
        lambda: pack(net, tmp_path / "a.sfp", masks, importances=wrong),
        lambda: pack(net, tmp_path / "a.sfp", masks, multipliers=wrong),
        lambda: pack(net, tmp_path / "a.sfp", masks, factors={"0.weight": pair[::-1]}),
        lambda: fit_factors(net, masks, [], teacher=net),
        lambda: fit_multipliers(net, wrong, batches, teacher=net),
        lambda: give_masks(net, {"x": torch.ones(3, 3)}),
        lambda: fine_tune(net, masks, batches),
        lambda: fine_tune(net, wrong, batches, teacher=net),
        lambda: Tuning(objective="accuracy"),
        lambda: pack(net, tmp_path / "a.sfp", {"x": masks["0.weight"]}),
        lambda: pack(
            net,
            tmp_path / "a.sfp",
            masks,
            importances={"0.weight": torch.ones(24, 12)},
            factors={"0.weight": pair},
        ),
    ):
        with pytest.raises(OptionError):
            made()
    assert not list(tmp_path.iterdir())
