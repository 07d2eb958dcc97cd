"""Whole modules: tied tensors, strictness, the meta device, conversions, memory, damage."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from sfpformat import InvalidFileError, MismatchError, OptionError, Options, SfpWarning, Uniform
from sfpformat.decode.shard_index import ShardIndex
from sfpformat.torch import load_file, load_model, parameters_on_meta, safe_open, save, save_file, save_model

from ..support.untyped import untyped
from .test_files import assert_same, bits, pruned


class Tied(nn.Module):
    """A small language model whose embedding and head are the same tensor."""

    scratch: torch.Tensor

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.norm = nn.BatchNorm1d(16)
        self.mid = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.register_buffer("scratch", torch.arange(4), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.mid(self.norm(self.embed(ids))))
        return out


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a module's tensors."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(seed: int, *, tied: bool = True) -> Tied:
    """A module with other weights."""
    torch.manual_seed(seed)
    model = Tied(tied)
    model.norm.get_buffer("running_mean").normal_()
    return model


# ----------------------------------------------------------------------------------------- there and back


def test_a_module_is_restored_with_its_ties(tmp_path: Path) -> None:
    model, other = differing(0), differing(1)
    save_model(model, tmp_path / "m")
    with safe_open(tmp_path / "m") as file:
        assert "head.weight" not in file
        assert file.metadata() == {"head.weight": "embed.weight"}
    before = other.embed.weight
    assert load_model(other, tmp_path / "m") == ([], [])
    assert_same(state(other), state(model))
    assert other.head.weight is other.embed.weight is before


def test_tied_tensors_keep_the_names_that_safetensors_keeps(tmp_path: Path) -> None:
    model = differing(0)
    save_model(model, tmp_path / "m", {"who": "me"})
    safetensors.torch.save_model(model, str(tmp_path / "s"), {"who": "me"})
    with safe_open(tmp_path / "m") as ours, safetensors.safe_open(tmp_path / "s", "pt") as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        assert ours.metadata() == theirs.metadata()


def test_files_with_either_name_load_into_a_tied_module(tmp_path: Path) -> None:
    model = differing(0)
    for kept, dropped in (("embed.weight", "head.weight"), ("head.weight", "embed.weight")):
        tensors = state(model)
        del tensors[dropped]
        save_file(tensors, tmp_path / kept)
        other = differing(1)
        assert load_model(other, tmp_path / kept) == ([], [])
        assert_same(state(other), state(model))


def test_a_second_name_of_a_tied_tensor_is_unexpected(tmp_path: Path) -> None:
    save_file(state(differing(0, tied=False)), tmp_path / "m")
    assert load_model(differing(1), tmp_path / "m", strict=False) == ([], ["head.weight"])


def test_an_alias_loads_into_a_module_that_is_not_tied(tmp_path: Path) -> None:
    model, other = differing(0), differing(1, tied=False)
    save_model(model, tmp_path / "m")
    assert load_model(other, tmp_path / "m") == ([], [])
    assert_same(state(other), state(model))
    assert other.head.weight is not other.embed.weight


def test_an_alias_of_another_shape_or_without_a_tensor_is_ignored(tmp_path: Path) -> None:
    tensors = state(differing(0))
    del tensors["head.weight"]
    for alias in ("mid.weight", "nowhere"):
        save_file(tensors, tmp_path / "m", {"head.weight": alias})
        found = load_model(differing(1, tied=False), tmp_path / "m", strict=False)
        assert found == (["head.weight"], [])


def test_metadata_of_the_caller_are_kept(tmp_path: Path) -> None:
    mine = {"head.weight": "mine"}
    save_model(differing(0), tmp_path / "m", mine)
    with safe_open(tmp_path / "m") as file:
        assert file.metadata() == mine == {"head.weight": "mine"}


def test_tensors_that_overlap_are_written_in_full(tmp_path: Path) -> None:
    class Views(nn.Module):
        square: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("square", pruned(8, 8))
            self.register_buffer("turned", self.square.t())
            self.register_buffer("part", self.square[2:4])

    model, other = Views(), Views()
    other.square.zero_()
    save_model(model, tmp_path / "m")
    with safe_open(tmp_path / "m") as file:
        assert file.keys() == ["square", "turned", "part"]
    assert load_model(other, tmp_path / "m") == ([], [])
    assert torch.equal(other.square, model.square)
    with pytest.raises(OptionError, match="'turned' is not contiguous"):
        save_model(model, tmp_path / "n", force_contiguous=False)


def test_options_use_the_names_kept(tmp_path: Path) -> None:
    model = differing(0)
    options = {"embed.weight": Options(Uniform(bits=3.0))}
    save_model(model, tmp_path / "m", options=options, masks={"mid.weight": model.mid.weight > 0})
    with safe_open(tmp_path / "m") as file:
        assert file.info("embed.weight").quantiser == "uniform"
        assert torch.equal(file.get_mask("mid.weight"), model.mid.weight > 0)


def test_a_sharded_model_loads_into_a_module(tmp_path: Path) -> None:
    model, other = differing(0, tied=False), differing(1, tied=False)
    tensors = state(model)
    halves = {"1.sfp": list(tensors)[:4], "2.sfp": list(tensors)[4:]}
    for name, names in halves.items():
        save_file({n: tensors[n] for n in names}, tmp_path / name)
    index = ShardIndex({n: name for name, names in halves.items() for n in names}, {})
    (tmp_path / "m.sfp.index.json").write_bytes(index.to_bytes())
    assert load_model(other, tmp_path / "m.sfp.index.json") == ([], [])
    assert_same(state(other), tensors)


# --------------------------------------------------------------------------------------------- strictness


def test_missing_and_unexpected_names_raise_before_anything_changes(tmp_path: Path) -> None:
    tensors = state(differing(0, tied=False))
    del tensors["mid.bias"]
    save_file({**tensors, "extra": torch.zeros(2)}, tmp_path / "m")
    other = differing(1, tied=False)
    before = state(other)
    with pytest.raises(
        MismatchError, match=r"Tied: missing in the file: 'mid.bias'; unexpected .*'extra'"
    ) as told:
        load_model(other, tmp_path / "m")
    assert (told.value.missing, told.value.unexpected) == (("mid.bias",), ("extra",))
    assert isinstance(told.value, RuntimeError)
    assert_same(state(other), before)
    assert load_model(other, tmp_path / "m", strict=False) == (["mid.bias"], ["extra"])
    assert_same(state(other), {name: tensors.get(name, before[name]) for name in before})


def test_other_shapes_are_refused_before_anything_changes(tmp_path: Path) -> None:
    tensors = state(differing(0, tied=False))
    tensors["mid.weight"] = torch.zeros(16, 17)
    save_file(tensors, tmp_path / "m")
    other = differing(1, tied=False)
    before = state(other)
    with pytest.raises(MismatchError, match=r"'mid.weight' is \[16, 17\] in the file"):
        load_model(other, tmp_path / "m", strict=False)
    assert_same(state(other), before)


def test_a_state_dict_value_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"code": print}

    with pytest.raises(OptionError, match="'_extra_state' of the state_dict is a dict"):
        save_model(Extra(2, 2), tmp_path / "m")
    assert not (tmp_path / "m").exists()


# ------------------------------------------------------------------------------ memory, devices, conversions


def test_weights_are_loaded_into_the_existing_memory(tmp_path: Path) -> None:
    model, other = differing(0), differing(1)
    save_model(model, tmp_path / "m")
    places = {name: tensor.data_ptr() for name, tensor in other.state_dict().items()}
    versions = other.mid.weight._version
    load_model(other, tmp_path / "m")
    assert {name: tensor.data_ptr() for name, tensor in other.state_dict().items()} == places
    assert other.mid.weight._version > versions
    assert other.mid.weight.requires_grad


def test_a_backward_pass_through_overwritten_weights_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    save_model(model, tmp_path / "m")
    loss = model(torch.ones(1, 3)).sum()
    load_model(model, tmp_path / "m")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_module_on_the_meta_device_gets_memory(tmp_path: Path) -> None:
    model = differing(0)
    save_model(model, tmp_path / "m")
    with parameters_on_meta():
        other = Tied()
    other.mid.weight.requires_grad_(False)
    marked: Any = other.mid.weight
    marked.mark = "mine"
    assert load_model(other, tmp_path / "m") == ([], [])
    assert_same(state(other), state(model))
    assert other.head.weight is other.embed.weight
    assert isinstance(other.embed.weight, nn.Parameter)
    assert not other.mid.weight.requires_grad
    kept: Any = other.mid.weight
    assert kept.mark == "mine"
    assert other.mid.bias.requires_grad
    assert torch.equal(other.scratch, model.scratch)  # not persistent: in no file
    ids = torch.arange(6)
    assert torch.equal(other.eval()(ids), model.eval()(ids))


def test_tensors_missing_from_the_file_stay_on_the_meta_device_with_a_warning(tmp_path: Path) -> None:
    save_file({"weight": pruned(3, 4)}, tmp_path / "m")
    other = nn.Linear(4, 3, device="meta")
    with pytest.warns(SfpWarning, match="does not fill 'bias', which would stay on the meta device$"):
        assert load_model(other, tmp_path / "m", strict=False) == (["bias"], [])
    assert other.bias.is_meta
    assert not other.weight.is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("meta", [False, True])
def test_a_module_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype, meta: bool) -> None:
    tensors = {"weight": pruned(30, 40).to(dtype), "bias": pruned(30).to(dtype)}
    save_file(tensors, tmp_path / "m")
    other = nn.Linear(40, 30, device="meta" if meta else None)
    load_model(other, tmp_path / "m")
    assert other.weight.dtype == torch.float32
    assert torch.equal(other.weight, tensors["weight"].float())


def test_non_contiguous_memory_is_loaded(tmp_path: Path) -> None:
    model, other = nn.Conv2d(3, 4, 3), untyped(nn.Conv2d(3, 4, 3).to)(memory_format=torch.channels_last)
    save_model(model, tmp_path / "m")
    load_model(other, tmp_path / "m")
    assert torch.equal(other.weight, model.weight)
    assert other.weight.is_contiguous(memory_format=torch.channels_last)


def test_scalars_empty_tensors_and_integers_are_loaded(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.scalar = nn.Parameter(torch.tensor(value))
            self.none = nn.Parameter(torch.zeros(0, 4))
            self.register_buffer("count", torch.tensor(int(value)))
            self.register_buffer("flags", torch.arange(9) % 2 == int(value) % 2)
            self.register_parameter("absent", None)

    model, other = Odd(1.5), Odd(4.0)
    save_model(model, tmp_path / "m")
    assert load_model(other, tmp_path / "m") == ([], [])
    assert_same(state(other), state(model))


# ---------------------------------------------------------------------------- modules that load their own way


class Renaming(nn.Module):
    """Accepts weights under an old name by a hook, like modules that were renamed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.new = nn.Linear(4, 6)
        self.new.weight = self.embed.weight
        self.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(module: nn.Module, tensors: OrderedDict[str, torch.Tensor], prefix: str, *_: object) -> None:
        if prefix + "old.bias" in tensors:
            tensors[prefix + "new.bias"] = tensors.pop(prefix + "old.bias")


@pytest.mark.parametrize("meta", [False, True])
def test_hooks_of_a_module_are_called(tmp_path: Path, meta: bool) -> None:
    torch.manual_seed(0)
    model = Renaming()
    tensors = {"embed.weight": model.embed.weight.detach(), "old.bias": model.new.bias.detach()}
    save_file(tensors, tmp_path / "m")
    with torch.device("meta" if meta else "cpu"):
        other = Renaming()
    assert load_model(other, tmp_path / "m") == ([], [])
    assert_same(state(other), state(model))
    assert other.new.weight is other.embed.weight
    save_file({**tensors, "extra": torch.zeros(1)}, tmp_path / "m")
    with pytest.raises(MismatchError, match="'extra'"):
        load_model(other, tmp_path / "m")
    assert load_model(other, tmp_path / "m", strict=False) == ([], ["extra"])
    save_file({**tensors, "old.bias": torch.zeros(7)}, tmp_path / "m")
    with pytest.raises(MismatchError, match="size mismatch"):
        load_model(other, tmp_path / "m")


# ------------------------------------------------------------------------------------------------- damage


def damaged(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a file with one wrong bit in the last tensor's data."""
    data = bytearray(save(tensors, options=Options(coding="raw")))
    at = data.rfind(bits(next(reversed(tensors.values()))))
    data[at] ^= 1
    path.write_bytes(data)


def test_damage_raises_and_a_module_on_the_meta_device_is_unchanged(tmp_path: Path) -> None:
    damaged(tmp_path / "m", {"weight": pruned(30, 40), "bias": pruned(30)})
    other = nn.Linear(40, 30, device="meta")
    with pytest.raises(InvalidFileError, match=r"E_CRC.*'bias'") as told:
        load_model(other, tmp_path / "m")
    assert told.value.__notes__ == ["The module is unchanged."]
    assert other.weight.is_meta
    assert other.bias.is_meta


def test_damage_found_late_raises_with_a_note_that_weights_were_overwritten(tmp_path: Path) -> None:
    damaged(tmp_path / "m", {"weight": pruned(30, 40), "bias": pruned(30)})
    with pytest.raises(InvalidFileError, match=r"E_CRC.*'bias'") as told:
        load_model(nn.Linear(40, 30), tmp_path / "m")
    assert "overwritten" in told.value.__notes__[0]


def test_a_truncated_file_raises_and_the_module_is_unchanged(tmp_path: Path) -> None:
    model = nn.Linear(40, 30)
    save_model(model, tmp_path / "m")
    (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes()[:-1])
    before = state(model)
    with pytest.raises(InvalidFileError):
        load_model(model, tmp_path / "m")
    assert_same(state(model), before)


# ------------------------------------------------------------------------------------------------- memory

PEAK = """
import sys, threading, torch
from torch import nn
from sfpformat.torch import load_model, load_file

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

with torch.device("meta"):
    model = nn.Sequential(*[nn.Linear(2048, 1024, bias=False, dtype=torch.bfloat16) for _ in range(8)])
if sys.argv[2] == "there":
    model = model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.fill_(1)  # so that the memory is there
small = nn.Linear(2048, 1024, bias=False, dtype=torch.bfloat16)
load_model(small, sys.argv[3], threads=1, engine="python")  # what is imported and made once
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
load_model(model, sys.argv[1], threads=1, engine="python")
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A file of 32 MiB of weights, and one of a layer of it."""
    folder = tmp_path_factory.mktemp("large")
    layers = [nn.Linear(2048, 1024, bias=False, dtype=torch.bfloat16) for _ in range(8)]
    save_model(nn.Sequential(*layers), folder / "m")
    save_model(layers[0], folder / "s")
    return [folder / "m", folder / "s"]


@pytest.mark.parametrize(("start", "allowed"), [("meta", 32 << 20), ("there", 0)])
def test_loading_needs_the_memory_of_the_module_and_one_chunk(
    large: list[Path], start: str, allowed: int
) -> None:
    command = [sys.executable, "-c", PEAK, str(large[0]), start, str(large[1])]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak < allowed + (12 << 20)


def test_a_loaded_module_equals_the_tensors_of_load_file(tmp_path: Path) -> None:
    model = differing(0)
    save_model(model, tmp_path / "m")
    tensors = load_file(tmp_path / "m")
    assert_same(tensors, {name: t for name, t in state(model).items() if name != "head.weight"})


def test_complex_numbers_in_a_float_module_warn_only_if_numbers_are_lost(tmp_path: Path) -> None:
    real = torch.arange(6.0).reshape(2, 3)
    for name, imaginary in (("lost", 1.0), ("kept", 0.0)):
        save_file({"weight": torch.complex(real, torch.full_like(real, imaginary))}, tmp_path / f"{name}.sfp")
    layer = nn.Linear(3, 2, bias=False)
    for _ in range(2):  # torch itself warns only once
        with pytest.warns(SfpWarning, match="cannot represent all values of 'weight'"):
            load_model(layer, tmp_path / "lost.sfp")
        assert torch.equal(layer.weight, real)
    load_model(layer, tmp_path / "kept.sfp")
    assert torch.equal(layer.weight, real)


def test_a_state_dict_instead_of_a_module_is_refused(tmp_path: Path) -> None:
    state: Any = {"w": torch.ones(2)}
    for call in (load_model, save_model):
        with pytest.raises(OptionError, match=r"model is a dict, must be a torch\.nn\.Module"):
            call(state, tmp_path / "m.sfp")
