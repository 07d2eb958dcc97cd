"""Models for accelerate whose weights stay in the file."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from sfpformat import InvalidFileError, MismatchError, OptionError
from sfpformat.decode.reader import SfpFile
from sfpformat.torch import dispatch_model, parameters_on_meta, save_file, save_model

IDS = torch.arange(2, 12)[None]


def llama(tied: bool = False) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Linear(8, 3))


def empty_of(make: Callable[[], nn.Module]) -> nn.Module:
    with parameters_on_meta():
        return make().eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layer", ["cpu", "disk"])
def test_weights_on_disk_are_decoded_in_each_forward_pass_and_released(
    tied: bool, layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(tied)
    save_model(model, tmp_path / "m.sfp")
    with parameters_on_meta():
        empty = llama(tied)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": layer, "": "disk"}
    dispatched: Any = dispatch_model(empty, tmp_path / "m.sfp", device_map)
    read: list[str] = []
    real = SfpFile.get_tensor

    def get_tensor(self: SfpFile, name: str) -> Any:
        read.append(name)
        return real(self, name)

    monkeypatch.setattr(SfpFile, "get_tensor", get_tensor)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(dispatched(input_ids=IDS).logits, model(input_ids=IDS).logits)
    on_meta = {name for name, weight in dispatched.named_parameters() if weight.is_meta}
    assert all(name.startswith(("model.layers", "model.norm", "lm_head")) for name in on_meta)
    assert any(name.startswith("model.layers.0.") for name in on_meta) == (layer == "disk")
    assert "model.norm.weight" in on_meta
    assert read.count("model.norm.weight") == 2
    assert "model.embed_tokens.weight" not in read


def test_buffers_are_loaded_at_once_unless_they_are_offloaded(tmp_path: Path) -> None:
    model = convolutions()
    model(torch.randn(5, 2, 10))  # statistics of the batch norm
    save_model(model.eval(), tmp_path / "m.sfp")
    x = torch.randn(3, 2, 10)
    for offload in (False, True):
        dispatched = dispatch_model(
            empty_of(convolutions), tmp_path / "m.sfp", {"": "disk"}, offload_buffers=offload
        )
        assert dispatched.get_buffer("1.running_mean").is_meta == offload
        with torch.no_grad():
            assert torch.equal(dispatched(x), model(x))


def test_half_precision_of_the_module_counts(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    save_model(model, tmp_path / "m.sfp")
    dispatched = dispatch_model(empty_of(lambda: nn.Linear(4, 4)).half(), tmp_path / "m.sfp", {"": "disk"})
    with torch.no_grad():
        x = torch.ones(1, 4).half()
        assert torch.equal(dispatched(x), model.half()(x))


def test_the_file_is_closed_with_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(nn.Linear(4, 4), tmp_path / "m.sfp")
    closed: list[SfpFile] = []
    real = SfpFile.close

    def close(self: SfpFile) -> None:
        closed.append(self)
        real(self)

    monkeypatch.setattr(SfpFile, "close", close)
    dispatched: Any = dispatch_model(empty_of(lambda: nn.Linear(4, 4)), tmp_path / "m.sfp", {"": "disk"})
    assert not closed
    del dispatched
    gc.collect()
    assert len(closed) == 1


def test_maps_and_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = convolutions()
    save_model(model, tmp_path / "m.sfp")
    with pytest.raises(OptionError, match=r"device_map has no device for '1\.weight'"):
        dispatch_model(empty_of(convolutions), tmp_path / "m.sfp", {"0": "disk"})
    with pytest.raises(OptionError, match="device 'nowhere'"):
        dispatch_model(empty_of(convolutions), tmp_path / "m.sfp", {"": "nowhere"})
    save_file({"0.weight": torch.zeros(4, 2, 3)}, tmp_path / "part.sfp")
    with pytest.raises(MismatchError, match="missing in the file"):
        dispatch_model(empty_of(convolutions), tmp_path / "part.sfp", {"": "disk"})


def test_damage_is_found_when_the_weights_are_needed(tmp_path: Path) -> None:
    save_model(nn.Linear(64, 64), tmp_path / "m.sfp")
    data = bytearray((tmp_path / "m.sfp").read_bytes())
    data[5000] ^= 1
    (tmp_path / "m.sfp").write_bytes(data)
    dispatched = dispatch_model(empty_of(lambda: nn.Linear(64, 64)), tmp_path / "m.sfp", {"": "disk"})
    with pytest.raises(InvalidFileError, match="R-LAY-004"):
        dispatched(torch.ones(1, 64))
