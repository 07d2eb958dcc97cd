"""Slices of a file in transformers: models load lazily, tensor by tensor, without a patch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sfpformat import Options, Uniform
from sfpformat.decode.shard_index import ShardIndex
from sfpformat.torch import TorchSlice, load_file, safe_open, save_file, save_model

from .test_files import assert_same
from .test_models import state

# Like saved configurations, it names a dtype; without one, transformers asks its slices for their dtypes.
CONFIG = transformers.BertConfig(
    dtype="float32",
    vocab_size=120,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
)
IDS = torch.arange(30).reshape(2, 15)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Disables progress bars."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def bert(seed: int) -> Any:
    torch.manual_seed(seed)
    return transformers.BertModel(CONFIG).eval()


def loaded(slices: dict[str, TorchSlice], **words: Any) -> Any:
    """Loads a model from slices with transformers; no name may be missing or unexpected."""
    found: Any = transformers.BertModel.from_pretrained(
        None, config=CONFIG, state_dict=slices, output_loading_info=True, **words
    )
    model, info = found
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def test_bert_loads_slices_of_a_file_bit_for_bit(tmp_path: Path) -> None:
    dense = bert(0)
    save_model(dense, tmp_path / "m.sfp")
    with safe_open(tmp_path / "m.sfp") as file:
        model = loaded({name: file.get_slice(name) for name in file})
    assert_same(state(model), state(dense))
    with torch.inference_mode():
        assert torch.equal(model(IDS).last_hidden_state, dense(IDS).last_hidden_state)


def test_each_slice_is_decoded_once_when_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(bert(0), tmp_path / "m.sfp")
    read: list[str] = []
    real = TorchSlice.__getitem__
    with safe_open(tmp_path / "m.sfp") as file:
        slices = {name: file.get_slice(name) for name in file}
        names = {id(part): name for name, part in slices.items()}

        def noting(part: TorchSlice, index: Any) -> torch.Tensor:
            read.append(names[id(part)])
            return real(part, index)

        monkeypatch.setattr(TorchSlice, "__getitem__", noting)
        assert not read
        loaded(slices)
        assert sorted(read) == sorted(file.keys())


def test_slices_are_converted_to_the_requested_dtype(tmp_path: Path) -> None:
    dense = bert(0)
    save_model(dense, tmp_path / "m.sfp")
    with safe_open(tmp_path / "m.sfp") as file:
        model = loaded({name: file.get_slice(name) for name in file}, dtype=torch.bfloat16)
    assert_same(state(model), state(dense.bfloat16()))


def test_pruned_and_quantised_slices_equal_the_decoded_file(tmp_path: Path) -> None:
    dense = bert(0)
    names = [name for name, weight in dense.named_parameters() if weight.dim() == 2]
    masks = {name: dense.get_parameter(name).abs() > 0.02 for name in names}
    options = dict.fromkeys(names, Options(Uniform(bits=3.0)))
    save_model(dense, tmp_path / "m.sfp", masks=masks, options=options)
    tensors = load_file(tmp_path / "m.sfp")
    with safe_open(tmp_path / "m.sfp") as file:
        model = loaded({name: file.get_slice(name) for name in file})
    assert_same(dict(sorted(state(model).items())), dict(sorted(tensors.items())))


def test_transformers_loads_a_sharded_model(tmp_path: Path) -> None:
    tensors = state(bert(0))
    halves = {"1.sfp": list(tensors)[::2], "2.sfp": list(tensors)[1::2]}
    for shard, names in halves.items():
        save_file({name: tensors[name] for name in names}, tmp_path / shard)
    index = ShardIndex({name: shard for shard, names in halves.items() for name in names}, {})
    (tmp_path / "m.sfp.index.json").write_bytes(index.to_bytes())
    with safe_open(tmp_path / "m.sfp.index.json") as file:
        model = loaded({name: file.get_slice(name) for name in file})
    assert_same(state(model), tensors)
