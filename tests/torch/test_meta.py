"""Models on the meta device: tensors that stay there warn, and buffers that no file has are computed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from sfpformat import MismatchError, SfpWarning
from sfpformat.torch import compress_model, load_model, parameters_on_meta, save_file, save_model

LLAMA = transformers.LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
BERT = transformers.BertConfig(
    vocab_size=100, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
)
GPT2 = transformers.GPT2Config(vocab_size=100, n_embd=48, n_layer=2, n_head=4, n_positions=32)
MODELS = [
    (transformers.LlamaForCausalLM, LLAMA),
    (transformers.BertModel, BERT),
    (transformers.GPT2LMHeadModel, GPT2),
]
IDS = torch.arange(14).reshape(2, 7)
Fill = Callable[..., object]
DOORS = pytest.mark.parametrize("fill", [load_model, compress_model])


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=IDS)[0]
    return found


class Positions(nn.Module):
    """A module with a buffer that is in no file."""

    places: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.register_buffer("places", torch.arange(64.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(x + self.places)
        return out


@DOORS
@pytest.mark.parametrize(("kind", "config"), MODELS)
def test_transformers_models_loaded_from_meta_compute_the_same_as_the_original(
    kind: Any, config: Any, fill: Fill, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = kind(config)
    save_model(model, tmp_path / "m")
    with parameters_on_meta():
        other = kind(config)
    assert all(parameter.is_meta for parameter in other.parameters())
    fill(other, tmp_path / "m")
    assert not [name for name, tensor in other.named_buffers() if tensor.is_meta]
    assert torch.equal(outputs(other), outputs(model))


@DOORS
@pytest.mark.parametrize(
    ("kind", "config", "buffer"),
    [(*MODELS[0], "model.rotary_emb.inv_freq"), (*MODELS[1], "embeddings.position_ids")],
)
def test_buffers_that_would_stay_on_the_meta_device_are_refused_before_anything_changes(
    kind: Any, config: Any, buffer: str, fill: Fill, tmp_path: Path
) -> None:
    save_model(kind(config), tmp_path / "m")
    with torch.device("meta"):
        other = kind(config)
    with pytest.raises(MismatchError, match=rf"does not fill '{buffer}'.*parameters_on_meta\(\)") as told:
        fill(other, tmp_path / "m")
    assert buffer in told.value.missing
    assert all(tensor.is_meta for tensor in other.state_dict().values())
    assert all(type(module) is not nn.Linear or module.weight.is_meta for module in other.modules())


@DOORS
def test_without_strict_tensors_that_stay_on_the_meta_device_warn(fill: Fill, tmp_path: Path) -> None:
    save_model(Positions(), tmp_path / "m")
    with torch.device("meta"):
        other = Positions()
    with pytest.warns(SfpWarning, match="does not fill 'places', which would stay") as told:
        fill(other, tmp_path / "m", strict=False)
    assert told[0].filename == __file__
    assert other.places.is_meta
    assert not other.fc.bias.is_meta


def test_a_module_with_custom_loading_has_no_buffer_left_on_the_meta_device(tmp_path: Path) -> None:
    def hooked() -> Positions:
        model = Positions()
        model.register_load_state_dict_pre_hook(lambda *_: None)
        return model

    save_model(Positions(), tmp_path / "m")
    with torch.device("meta"):
        other = hooked()
    with pytest.raises(MismatchError, match="'places', which would stay"):
        load_model(other, tmp_path / "m")
    assert other.fc.weight.is_meta
    with pytest.warns(SfpWarning, match="'places', which would stay"):
        load_model(other, tmp_path / "m", strict=False)
    with parameters_on_meta():
        other = hooked()
    assert load_model(other, tmp_path / "m") == ([], [])
    assert torch.equal(other.places, Positions().places)


@pytest.mark.filterwarnings("ignore:the model has no linear layer:sfpformat.errors.SfpWarning")
@DOORS
@pytest.mark.parametrize("hook", [False, True])
def test_the_counter_of_batch_norm_is_zero_if_a_file_lacks_it(fill: Fill, hook: bool, tmp_path: Path) -> None:
    tensors = nn.BatchNorm1d(8).state_dict()
    del tensors["num_batches_tracked"]
    save_file(tensors, tmp_path / "m")
    model = nn.BatchNorm1d(8, device="meta")
    if hook and fill is load_model:
        model.register_load_state_dict_pre_hook(lambda *_: None)
    fill(model, tmp_path / "m")
    assert model.get_buffer("num_batches_tracked").item() == 0
    assert model.get_buffer("num_batches_tracked").dtype == torch.int64
    model(torch.randn(4, 8))
    assert model.get_buffer("num_batches_tracked").item() == 1


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_modules_that_hold_their_weights_twice_are_loaded(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind(5, 6, num_layers=2)
    save_model(model, tmp_path / "m")
    for other in (kind(5, 6, num_layers=2, device="meta"), kind(5, 6, num_layers=2)):
        load_model(other, tmp_path / "m")
        x = torch.randn(3, 2, 5)
        assert torch.equal(other(x)[0], model(x)[0])


# -------------------------------------------------------------------------------------- parameters_on_meta


def test_parameters_are_created_on_the_meta_device_and_buffers_are_computed() -> None:
    with parameters_on_meta():
        model = nn.Sequential(Positions(), nn.BatchNorm1d(64), nn.Linear(64, 2))
    model[2].weight.requires_grad_(False)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model.get_buffer("0.places"), torch.arange(64.0))
    assert torch.equal(model.get_buffer("1.running_var"), torch.ones(64))
    assert not nn.Linear(2, 2).weight.is_meta  # it ended


def test_ties_attributes_and_dtypes_of_parameters_are_kept() -> None:
    shared = nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16), requires_grad=False)
    marked: Any = shared
    marked.mark = "mine"
    with parameters_on_meta():
        one, two = nn.Linear(4, 3), nn.Linear(4, 3)
        one.weight, two.weight = shared, shared
        two.bias = one.bias
        two.bias = one.bias
    assert one.weight is two.weight
    assert one.bias is two.bias
    assert one.weight.is_meta
    assert one.weight.dtype == torch.bfloat16
    assert not one.weight.requires_grad
    kept: Any = one.weight
    assert kept.mark == "mine"
    assert not shared.is_meta


def test_lazy_and_none_parameters_are_unchanged() -> None:
    with parameters_on_meta():
        lazy, without = nn.LazyLinear(3), nn.Linear(3, 3, bias=False)
    assert isinstance(lazy.weight, nn.UninitializedParameter)
    assert without.bias is None


def test_other_threads_are_unaffected() -> None:
    made = []
    with parameters_on_meta():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
    assert not made[0].weight.is_meta


def test_the_hook_is_removed_if_the_constructor_raises() -> None:
    with pytest.raises(ZeroDivisionError), parameters_on_meta():
        _ = 1 / 0
    assert not nn.Linear(2, 2).weight.is_meta
