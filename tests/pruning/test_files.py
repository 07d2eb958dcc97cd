"""From masks to files and back: packing, pruning a file again, tuning with fixed masks, torch's masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import sfpformat
from sfpformat import Table, Uniform
from sfpformat.cli import main
from sfpformat.decode.reader import SfpFile
from sfpformat.errors import OptionError, SfpWarning
from sfpformat.numpy import load_file, save_file
from sfpformat.options import ImportanceOptions, Options
from sfpformat.pruning import scores
from sfpformat.pruning.calibration import statistics
from sfpformat.pruning.learning import learn_importance
from sfpformat.pruning.learning_settings import Settings
from sfpformat.pruning.masks import masks_of
from sfpformat.pruning.pipeline import apply_masks, give_masks, pack, prune, take_masks
from sfpformat.pruning.repruning import reprune
from sfpformat.pruning.thresholds import Pattern, Sparsity
from sfpformat.pruning.tuning import Tuning, fine_tune, fit_factors, fit_multipliers, scaled
from sfpformat.torch import load_model

from ..support.pruning_nets import loss_of, trained_net
from ..support.untyped import untyped

Pair = dict[str, np.ndarray]


def test_pruning_zeroes_the_masked_weights() -> None:
    net, _ = trained_net()
    importances = scores.magnitude(net)
    before = {name: net.get_parameter(name).detach().clone() for name in importances}
    masks = prune(net, importances, Sparsity(0.6))
    for name, mask in masks.items():
        assert torch.equal(net.get_parameter(name).detach(), torch.where(mask, before[name], 0.0))
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    assert pruned == int(0.6 * sum(mask.numel() for mask in masks.values()) + 0.5)


@pytest.mark.parametrize("teacher", [True, False])
def test_fine_tuning_keeps_the_masks_and_lowers_the_loss(teacher: bool) -> None:
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


def test_weights_of_16_bits_take_steps_smaller_than_their_resolution() -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        net, batches = trained_net()
        masks = prune(net, scores.fisher(net, statistics(net, batches)), Sparsity(0.8))
        net.to(dtype)
        cast = [(x.to(dtype), labels) for x, labels in batches]
        history = fine_tune(net, masks, cast, tuning=Tuning(200, 3e-4, "loss"))
        losses.append([sum(history[:20]), sum(history[-20:])])
        assert net.get_parameter("0.weight").dtype is dtype
    (before, after), (before_16, after_16) = losses
    assert after < 0.95 * before
    # Steps of 3e-4 are below half of the distance of numbers of BF16 above 0.08: most weights would not move.
    assert before_16 - after_16 > 0.8 * (before - after)


def test_weights_of_16_bits_learn_together_with_their_importances() -> None:
    (net, batches), settings = trained_net(), Settings(steps=100, weight_rate=3e-4)
    net.to(torch.bfloat16)
    cast = [(x.bfloat16(), labels) for x, labels in batches]
    learned = learn_importance(net, cast, 0.5, settings=settings)
    for name, weight in learned.weights.items():
        assert weight.dtype is torch.bfloat16
        changed = weight != net.get_parameter(name)
        assert changed.float().mean() > 0.25  # half are pruned


def test_factors_compensate_pruning_and_are_applied_when_decoding(tmp_path: Path) -> None:
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


def test_multipliers_compensate_pruning_and_take_no_bits(tmp_path: Path) -> None:
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


def test_multipliers_are_folded_into_written_weights_only(tmp_path: Path) -> None:
    net, _ = trained_net()
    masks = prune(net, scores.magnitude(net), Sparsity(0.5))
    before = net.get_parameter("0.weight").detach().clone()
    double = {"0.weight": torch.full_like(before, 2.0)}
    pack(net, tmp_path / "a.sfp", masks, multipliers=double)
    assert torch.equal(net.get_parameter("0.weight").detach(), before)
    np.testing.assert_array_equal(load_file(tmp_path / "a.sfp")["0.weight"], 2 * before.numpy())


def test_a_multiplier_that_makes_a_weight_infinite_is_refused_and_the_model_unchanged(
    tmp_path: Path,
) -> None:
    net = nn.Sequential(nn.Linear(8, 8)).half()
    nn.init.constant_(net.get_parameter("0.weight"), 60000)
    masks = {"0.weight": torch.ones(8, 8, dtype=torch.bool)}
    with pytest.raises(OptionError, match=r"'0.weight'.*multiplier.*float16"):
        pack(net, tmp_path / "a.sfp", masks, multipliers={"0.weight": torch.full((8, 8), 2.0)})
    assert not (tmp_path / "a.sfp").exists()
    assert (net.get_parameter("0.weight") == 60000).all()


def test_masks_are_exchanged_with_torch_prune() -> None:
    net, _ = trained_net()
    torch_prune.l1_unstructured(net[0], "weight", amount=0.4)
    torch_prune.random_unstructured(net[3], "weight", amount=0.7)
    pruned: Any = net[3]
    hidden = pruned.weight.detach().clone()
    masks = take_masks(net)
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {"0.weight": 115, "3.weight": 403}
    assert "0.weight" in dict(net.named_parameters())
    assert torch.equal(net.get_parameter("3.weight").detach(), hidden)
    give_masks(net, masks)
    assert torch_prune.is_pruned(net)
    again = take_masks(net)
    assert all(torch.equal(again[name], mask) for name, mask in masks.items())


class Everything(nn.Module):
    """Parameters of every rank, a float buffer, and a buffer that files do not contain."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 20)
        self.norm = nn.BatchNorm1d(20)
        self.conv = nn.Conv2d(3, 4, 3)
        self.embedding = nn.Embedding(9, 8)
        self.recurrent = nn.GRU(4, 4)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("table", torch.randn(5, 6))
        self.register_buffer("passing", torch.randn(5, 6), persistent=False)


@pytest.mark.parametrize("path", ["layer", "norm", "conv", "embedding"])
def test_masks_from_torch_prune_are_packed_for_every_kind_of_parameter(path: str, tmp_path: Path) -> None:
    model = Everything()
    module = model.get_submodule(path)
    for name in [name for name, _ in module.named_parameters()]:
        torch_prune.l1_unstructured(module, name, amount=0.5)
    masks = take_masks(model)
    assert set(masks) == {f"{path}.{name}" for name, _ in module.named_parameters()}
    pack(model, tmp_path / "a.sfp", masks)
    with sfpformat.open(tmp_path / "a.sfp") as file:
        for name, mask in masks.items():
            np.testing.assert_array_equal(file.get_mask(name), mask.numpy())
            np.testing.assert_array_equal(file.get_tensor(name), model.get_parameter(name).detach().numpy())
    give_masks(model, masks)
    assert torch_prune.is_pruned(module)


def test_tensors_of_every_rank_and_buffers_have_masks_importances_and_multipliers(tmp_path: Path) -> None:
    model = Everything()
    state = model.state_dict()
    names = [name for name, tensor in state.items() if tensor.is_floating_point()]
    assert len(names) == 15
    masks = {name: torch.rand(state[name].shape) > 0.4 for name in names}
    before = {name: state[name].clone() for name in names}
    apply_masks(model, {name: mask.float() for name, mask in masks.items()})
    for name, mask in masks.items():
        assert torch.equal(state[name], torch.where(mask, before[name], 0.0))
    importances = {name: torch.rand(state[name].shape) for name in names}
    doubled = {name: torch.full(state[name].shape, 2.0) for name in names}
    pack(model, tmp_path / "a.sfp", masks, importances=importances, multipliers=doubled)
    with sfpformat.open(tmp_path / "a.sfp") as file:
        for name, mask in masks.items():
            np.testing.assert_array_equal(file.get_mask(name), mask.numpy())
            np.testing.assert_array_equal(file.get_tensor(name), 2 * state[name].numpy())
            assert (file.get_importance(name) is None) == (not name)


def test_importances_of_every_rank_prune_and_survivors_of_every_rank_are_tuned() -> None:
    net, batches = trained_net()
    names = ["0.weight", "0.bias", "5.weight"]
    masks = prune(net, scores.magnitude(net, names), 0.5)
    assert list(masks) == names
    assert int((~masks["0.bias"]).sum()) > 0
    bias = net.get_parameter("0.bias").detach().clone()
    fine_tune(net, masks, batches, tuning=Tuning(3, objective="loss"))
    tuned = net.get_parameter("0.bias").detach()
    assert not torch.equal(tuned, bias)
    assert (tuned[~masks["0.bias"]] == 0).all()
    factors = fit_factors(net, masks, batches, tuning=Tuning(2, objective="loss"))
    assert list(factors) == ["0.weight", "5.weight"]
    assert list(fit_multipliers(net, masks, batches, tuning=Tuning(2, objective="loss"))) == names


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_every_float_dtype_are_pruned_to_plus_zero(dtype: torch.dtype) -> None:
    layer = nn.Linear(8, 8, bias=False)
    layer.to(dtype)
    before = layer.weight.detach().double()
    mask = prune(layer, scores.magnitude(layer), Sparsity(0.25))["weight"]
    after = layer.weight.detach().double()
    assert int((~mask).sum()) == 16
    assert torch.equal(after, torch.where(mask, before, 0.0))
    assert not torch.signbit(after[~mask]).any()


def test_importances_in_double_precision_are_not_rounded() -> None:
    layer = nn.Linear(2, 2, bias=False)
    close = torch.tensor([[1 + 3e-9, 1 + 1e-9], [1 + 2e-9, 1.0]], dtype=torch.float64)
    assert prune(layer, {"weight": close}, 0.5)["weight"].tolist() == [[True, False], [True, False]]


def test_a_tensor_with_two_names_is_written_once_and_its_values_must_agree(tmp_path: Path) -> None:
    head, embedding = nn.Linear(4, 6, bias=False), nn.Embedding(6, 4)
    head.weight = embedding.weight
    model = nn.ModuleDict({"head": head, "embedding": embedding})
    mask = torch.rand(6, 4) > 0.5
    both = {"head.weight": mask, "embedding.weight": mask.clone()}
    apply_masks(model, both)
    pack(model, tmp_path / "a.sfp", both, importances={"head.weight": torch.rand(6, 4)})
    with sfpformat.open(tmp_path / "a.sfp") as file:
        np.testing.assert_array_equal(file.get_mask("embedding.weight"), mask.numpy())
        assert file.get_importance("embedding.weight") is not None
    for differ in (apply_masks, lambda model, masks: pack(model, tmp_path / "b.sfp", masks), give_masks):
        with pytest.raises(OptionError, match="are the same tensor, but their values differ"):
            differ(model, {**both, "embedding.weight": ~mask})
    ones = torch.rand(6, 4)
    with pytest.raises(OptionError, match="are the same tensor, but their values differ"):
        prune(model, {"head.weight": ones, "embedding.weight": ones + 1}, 0.5)
    assert list(prune(model, {"head.weight": ones, "embedding.weight": ones}, 0.5)) == ["head.weight"]


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
    "uniform": Options(Uniform(step=0.1), importance=ImportanceOptions(bits=4)),
    "scaled": Options(Uniform(step=0.1, scale="row"), importance=ImportanceOptions(bits=4)),
    "table": Options(Table(centroids=8), importance=ImportanceOptions(bits=4)),
}


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("first", [0.0, 0.5])
def test_pruning_a_file_again_gives_the_bytes_of_pruning_once(
    coding: str, first: float, tmp_path: Path
) -> None:
    weights, importances = graded_file(tmp_path / "a.sfp", CODINGS[coding], first)
    with sfpformat.open(tmp_path / "a.sfp") as file:
        values = {name: file.get_tensor(name) for name in file}
        found = reprune(file, tmp_path / "b.sfp", Sparsity(0.8))
        magnitudes: dict[str, Any] = {name: values[name] for name in weights}
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


def test_pruning_in_steps_gives_the_same_result_as_at_once(tmp_path: Path) -> None:
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


def test_a_lower_sparsity_changes_nothing_and_importances_can_be_dropped(tmp_path: Path) -> None:
    graded_file(tmp_path / "a.sfp", CODINGS["exact"], 0.5)
    with sfpformat.open(tmp_path / "a.sfp") as file:
        found = reprune(file, tmp_path / "b.sfp", Sparsity(0.3), keep_importance=False)
    assert found.before == found.after
    with sfpformat.open(tmp_path / "b.sfp") as file:
        assert file.get_importance("a") is None
        with pytest.raises(OptionError):
            reprune(file, tmp_path / "c.sfp", Sparsity(0.9))
    assert not (tmp_path / "c.sfp").exists()


def test_tensors_with_multipliers_are_copied_without_recoding(tmp_path: Path) -> None:
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


def mixed_file(path: Path) -> None:
    """Writes a file of a matrix, kernels and an odd matrix, all with importances of few grades."""
    rng = np.random.default_rng(1)
    shapes = {"fits": (6, 8), "kernel": (4, 8, 3, 3), "stem": (4, 3, 3, 3), "odd": (5, 7)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    importances = {name: rng.integers(0, 4, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, path, options=CODINGS["all"], importances=importances)


def test_a_pattern_prunes_the_tensors_of_a_file_that_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed_file(tmp_path / "a.sfp")
    with sfpformat.open(tmp_path / "a.sfp") as file:
        before = {name: file.get_tensor(name) for name in file}
        with pytest.warns(SfpWarning, match="2:4 does not fit 'stem' .*'odd'"):
            found = reprune(file, tmp_path / "b.sfp", Pattern(2, 4))
    assert found.pruned == ("fits", "kernel")
    assert list(found.unfit) == ["stem", "odd"]
    assert "3 inputs along dimension 1" in found.unfit["stem"]
    after = load_file(tmp_path / "b.sfp")
    assert all(np.array_equal(after[name], before[name]) for name in found.unfit)
    for name in found.pruned:
        groups = np.moveaxis(after[name], 1, -1).reshape(-1, 4)
        assert (np.count_nonzero(groups, axis=1) == 2).all()
    words = ["prune", str(tmp_path / "a.sfp"), "-o", str(tmp_path / "c.sfp"), "--threshold", "2:4"]
    assert main([*words, "--json"]) == 0
    told = capsys.readouterr()
    assert [entry["name"] for entry in json.loads(told.out)["unpruned"]] == ["stem", "odd"]
    assert "7 inputs" in json.loads(told.out)["unpruned"][1]["because"]
    assert told.err.startswith("sfp: warning: 2:4 does not fit 'stem'")
    assert (tmp_path / "b.sfp").read_bytes() == (tmp_path / "c.sfp").read_bytes()
    assert main([*words, "--exempt", "fits", "--exempt", "kernel"]) == 2
    assert "nothing would be pruned" in capsys.readouterr().err


def test_of_equal_importances_a_pattern_keeps_the_largest_weights(tmp_path: Path) -> None:
    weights = np.array([[4, -1, 3, 2], [-1, 2, -3, 4]], np.float32)
    equal = np.ones((2, 4), np.float32)
    save_file({"w": weights}, tmp_path / "a.sfp", options=CODINGS["all"], importances={"w": equal})
    with sfpformat.open(tmp_path / "a.sfp") as file:
        reprune(file, tmp_path / "b.sfp", Pattern(2, 4))
    assert load_file(tmp_path / "b.sfp")["w"].tolist() == [[4, 0, 3, 0], [0, 0, -3, 4]]


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
def test_the_command_refuses_invalid_thresholds(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graded_file(tmp_path / "a.sfp", CODINGS["exact"], 0.5)
    assert main(["prune", str(tmp_path / "a.sfp"), "-o", str(tmp_path / "b.sfp"), *words]) == 2
    assert capsys.readouterr().err.startswith("sfp: error: ")
    assert not (tmp_path / "b.sfp").exists()


def test_invalid_arguments_are_refused(tmp_path: Path) -> None:
    net, batches = trained_net()
    masks = {"0.weight": torch.ones(24, 12, dtype=torch.bool)}
    wrong = {"0.weight": torch.ones(3, 3)}
    pair = (torch.ones(24), torch.ones(12))
    made: Any
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
        lambda: Tuning(steps=0),
        lambda: Tuning(rate=-1.0),
        lambda: Tuning(rate=float("nan")),
        lambda: prune(net, {}, Sparsity(0.5)),
        lambda: untyped(prune)(net, scores.magnitude(net), "0.5"),
        lambda: prune(net, scores.magnitude(net), 1.5),
        lambda: prune(net, scores.magnitude(net), 0.5, exempt=("x*",)),
        lambda: prune(net, scores.magnitude(net), 0.5, exempt="*"),
        lambda: prune(net, scores.magnitude(net), 0.5, floor=-0.1),
        lambda: prune(net, {"0.weight": torch.full((24, 12), torch.nan)}, 0.5),
        lambda: untyped(prune)(net, {"0.weight": np.ones((24, 12))}, 0.5),
        lambda: apply_masks(net, {"0.weight": torch.full((24, 12), 0.5)}),
        lambda: apply_masks(net, {}),
        lambda: give_masks(net, {"0.weight": torch.full((24, 12), 0.5)}),
        lambda: untyped(pack)(net, tmp_path / "a.sfp", masks, options={"0.weight": Options()}),
        lambda: pack(net, tmp_path / "a.sfp", {"0.weight": torch.full((24, 12), 0.5)}),
        lambda: pack(
            net, tmp_path / "a.sfp", masks, importances={"0.weight": torch.full((24, 12), torch.nan)}
        ),
        lambda: pack(net, tmp_path / "a.sfp", masks, factors={"0.bias": (torch.ones(24), torch.ones(1))}),
        lambda: pack(Everything(), tmp_path / "a.sfp", {"passing": torch.ones(5, 6, dtype=torch.bool)}),
        lambda: pack(
            Everything(), tmp_path / "a.sfp", {"norm.num_batches_tracked": torch.ones((), dtype=torch.bool)}
        ),
        lambda: fit_factors(net, {"0.bias": torch.ones(24, dtype=torch.bool)}, batches, teacher=net),
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


def test_other_keys_of_an_entry_are_kept_when_a_file_is_pruned_again(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
    keys = {"x-note": {"a": 1}}
    with sfpformat.Writer(tmp_path / "a.sfp") as writer:
        writer.add("pruned", weights, importance=np.abs(weights), other=keys)
        writer.add("copied", weights, other=keys)
    with sfpformat.open(tmp_path / "a.sfp") as file:
        assert reprune(file, tmp_path / "b.sfp", Sparsity(0.5)).pruned == ("pruned",)
    with sfpformat.open(tmp_path / "b.sfp") as file:
        assert [file.info(name).unknown for name in file] == [keys, keys]


def test_a_floor_that_pruned_tensors_are_below_is_reported(tmp_path: Path) -> None:
    array = np.arange(1, 1001, dtype=np.float32).reshape(20, 50)
    pruned = np.where(array > 300, array, 0).astype(np.float32)
    save_file({"w": pruned}, tmp_path / "a.sfp", importances={"w": array})
    with sfpformat.open(tmp_path / "a.sfp") as file, pytest.warns(SfpWarning) as found:
        assert reprune(file, tmp_path / "b.sfp", 0.5, floor=0.9).after == 300
    messages = [str(each.message) for each in found]
    assert any("allows 100 pruned positions, not 500" in words for words in messages)
    assert any("already keep less than the floor 0.9 (1): 'w'" in words for words in messages)
