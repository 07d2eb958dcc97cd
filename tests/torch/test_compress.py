"""Whole models that stay compressed: from files and memory, ties, dense layers, and decompression."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sfpformat.decode.reader
from sfpformat import InvalidFileError, MismatchError, OptionError, Options, SfpWarning, Uniform
from sfpformat.decode.shard_index import ShardIndex
from sfpformat.torch import (
    SfpEmbedding,
    SfpLinear,
    compress_model,
    decompress_model,
    load_file,
    load_model,
    safe_open,
    save_file,
    save_model,
)
from sfpformat.torch.packed import cut_out

from .test_files import assert_same, bits
from .test_models import state

IDS = torch.arange(24).reshape(4, 6)


class Small(nn.Module):
    """A small language model whose embedding and head are the same tensor."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(64, 48, padding_idx=2)
        self.norm = nn.LayerNorm(48)
        self.mid = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 48))
        self.gate = nn.Linear(48, 1)
        self.head = nn.Linear(48, 64)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.arange(4.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(ids))
        out: torch.Tensor = self.head(self.mid(x) * torch.sigmoid(self.gate(x)))
        return out


def empty() -> Small:
    """The model on the meta device, except for buffers that no file has."""
    with torch.device("meta"):
        model = Small()
    model.scratch = torch.arange(4.0)
    return model


LAYERS = ("embed", "mid.0", "mid.2", "head")


# ------------------------------------------------------------------------------------------ from a file


def test_a_model_on_the_meta_device_loads_a_file_and_computes_the_same_bits(tmp_path: Path) -> None:
    dense, model = Small(), empty()
    save_model(dense, tmp_path / "m")
    report = compress_model(model, tmp_path / "m")
    assert bits(model(IDS)) == bits(dense(IDS))
    assert report.layers == LAYERS
    assert type(model.embed) is SfpEmbedding
    assert type(model.mid[0]) is SfpLinear
    assert type(model.gate) is nn.Linear  # its file would be larger than the weight
    assert model.embed.weight_sfp is model.head.weight_sfp
    assert model.embed.padding_idx == 2


def test_compressing_a_model_decodes_no_weight_of_a_compressed_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = sfpformat.decode.reader.SfpFile.read_into

    def noting(self: sfpformat.decode.reader.SfpFile, out: dict[str, Any]) -> None:
        read.extend(out)
        real(self, out)

    save_model(Small(), tmp_path / "m")
    model = empty()
    monkeypatch.setattr(sfpformat.decode.reader.SfpFile, "read_into", noting)
    compress_model(model, tmp_path / "m")
    assert sorted(read) == sorted(name for name, _ in model.named_parameters())


def test_the_report_counts_stored_and_dense_bytes(tmp_path: Path) -> None:
    dense = Small()
    save_model(dense, tmp_path / "m")
    whole = sum(t.nbytes for t in {id(t): t for t in (*dense.parameters(), *dense.buffers())}.values())
    large = 4 * (64 * 48 + 2 * 48 * 96)
    for model, source in ((empty(), tmp_path / "m"), (Small(), tmp_path / "m"), (Small(), None)):
        report = compress_model(model, source, keep=1000)
        after = sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
        assert (report.model_bytes_before, report.model_bytes_after) == (whole, after)
        assert (report.weight_bytes_before, report.largest_weight_bytes) == (large, 4 * 48 * 96)
        assert whole - after == large - report.weight_bytes_after > 0
        head: Any = model.head
        assert report.kept_bytes == head.kept.limit == 1000
        assert head.kept is model.embed.kept
        assert str(report).startswith("4 layers compressed")


def test_chunks_are_copied_without_recoding(tmp_path: Path) -> None:
    dense, model = Small(), empty()
    options = {"embed.weight": Options(Uniform(bits=4.0, scale="row"), chunk=1024)}
    save_model(dense, tmp_path / "m", options=options)
    compress_model(model, tmp_path / "m")
    loaded = Small(1)
    load_model(loaded, tmp_path / "m")
    assert bits(model(IDS)) == bits(loaded(IDS))
    save_model(model, tmp_path / "again")
    with safe_open(tmp_path / "m") as one, safe_open(tmp_path / "again") as other:
        assert sorted(one) == sorted(other)
        assert one.metadata() == other.metadata()
        for name in one:
            assert bits(cut_out(one.file, name)) == bits(cut_out(other.file, name))


def test_a_model_in_shards_is_compressed(tmp_path: Path) -> None:
    dense, model = Small(), empty()
    tensors = state(dense)
    del tensors["head.weight"]
    halves = {"1.sfp": list(tensors)[:3], "2.sfp": list(tensors)[3:]}
    for name, names in halves.items():
        save_file({n: tensors[n] for n in names}, tmp_path / name)
    index = ShardIndex({n: name for name, names in halves.items() for n in names}, {})
    (tmp_path / "m.sfp.index.json").write_bytes(index.to_bytes())
    compress_model(model, tmp_path / "m.sfp.index.json")
    assert bits(model(IDS)) == bits(dense(IDS))


def test_weights_have_the_dtype_of_the_module(tmp_path: Path) -> None:
    dense, model = Small(), empty().bfloat16()
    save_model(dense, tmp_path / "m")
    model.scratch = model.scratch.bfloat16()
    compress_model(model, tmp_path / "m")
    assert bits(model(IDS)) == bits(dense.bfloat16()(IDS))


@pytest.mark.parametrize(("name", "tensor"), [("other", torch.zeros(2)), ("head.bias", None)])
def test_names_that_do_not_fit_are_refused(tmp_path: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = state(Small())
    del tensors["head.weight"], tensors["head.bias"]
    if tensor is not None:
        tensors |= {"head.bias": torch.zeros(64), name: tensor}
    save_file(tensors, tmp_path / "m")
    model = Small(1)
    before = state(model)
    with pytest.raises(MismatchError, match=name):
        compress_model(model, tmp_path / "m")
    assert_same(state(model), before)
    compress_model(model, tmp_path / "m", strict=False)
    assert bits(model.embed.weight) == bits(tensors["embed.weight"])


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tensors = state(Small())
    del tensors["head.weight"]
    save_file({**tensors, "mid.0.weight": torch.zeros(48, 96)}, tmp_path / "m")
    with pytest.raises(MismatchError, match="shapes differ"):
        compress_model(Small(), tmp_path / "m")


def test_damage_raises_with_tensor_and_offset_and_the_model_is_unchanged(tmp_path: Path) -> None:
    dense, model = Small(), Small(1)
    save_model(dense, tmp_path / "m")
    data = bytearray((tmp_path / "m").read_bytes())
    with safe_open(bytes(data)) as file:
        place = file.file.chunk_offset(file.file.entry("mid.2.weight"), 0)
    data[place + 100] ^= 1
    before = state(model)
    with pytest.raises(InvalidFileError, match=r"mid\.2\.weight") as caught:
        compress_model(model, bytes(data))
    assert caught.value.offset == place
    assert_same(state(model), before)
    assert type(model.mid[0]) is nn.Linear


def test_a_model_with_custom_loading_or_compressed_layers_is_refused(tmp_path: Path) -> None:
    model = Small()
    save_model(model, tmp_path / "m")
    compress_model(model, tmp_path / "m")
    with pytest.raises(OptionError, match="compressed already"):
        compress_model(model, tmp_path / "m")
    with pytest.raises(OptionError, match="compressed layers"):
        load_model(model, tmp_path / "m")
    hooked = Small()
    hooked.register_load_state_dict_post_hook(lambda *_: None)
    with pytest.raises(OptionError, match="customises loading"):
        compress_model(hooked, tmp_path / "m")


# ----------------------------------------------------------------------------------------- from memory


def test_the_models_own_weights_are_encoded_losslessly() -> None:
    dense, model = Small(), Small()
    assert compress_model(model).layers == LAYERS
    assert bits(model(IDS)) == bits(dense(IDS))
    assert compress_model(model).layers == ()
    assert bits(model(IDS)) == bits(dense(IDS))


@pytest.mark.parametrize("by_name", [False, True])
def test_options_determine_how_weights_are_encoded(tmp_path: Path, by_name: bool) -> None:
    options = Options(Uniform(bits=4.0))
    # Of the two names of the tied weight, either does.
    chosen = {"head.weight": options} if by_name else options
    model, loaded = Small(), Small(1)
    named = [name for name, p in model.named_parameters() if p.dim() == 2 and p.numel() > 1000]
    save_model(
        model, tmp_path / "m", options={name: options for name in named if not by_name or "embed" in name}
    )
    load_model(loaded, tmp_path / "m")
    compress_model(model, chosen)
    assert bits(model(IDS)) == bits(loaded(IDS))


def test_an_invalid_option_is_refused_and_the_model_is_unchanged() -> None:
    model = Small()
    with pytest.raises(OptionError, match=r"weight 'embed.weight' cannot be compressed: .*no data"):
        compress_model(empty())
    with pytest.raises(OptionError, match=r"the options of 'embed.weight': a Tensor is not Options"):
        compress_model(model, model.state_dict())
    with torch.no_grad():
        model.get_parameter("mid.2.weight")[0, 0] = torch.nan
    with pytest.raises(OptionError, match="finite"):
        compress_model(model, Options(Uniform(bits=4.0)))
    assert not any(isinstance(module, SfpLinear) for module in model.modules())


def test_choose_selects_layers_and_a_tied_layer_stays_dense_with_its_tie() -> None:
    asked: list[str] = []

    def choose(name: str, module: nn.Module) -> bool:
        asked.append(name)
        assert type(module) in (nn.Linear, nn.Embedding)
        return name != "head"

    model = Small()
    with pytest.warns(
        SfpWarning, match=r"^'embed.weight' stays dense: it is the same tensor as 'head.weight'"
    ):
        assert compress_model(model, choose=choose).layers == ("mid.0", "mid.2", "gate")
    assert set(asked) == {*LAYERS, "gate"}
    assert model.head.weight is model.embed.weight


def test_layers_with_custom_behaviour_stay_dense() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    class Borrowed(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.taken = weight

    parts = [Doubled(48, 48), nn.Embedding(48, 48, max_norm=1.0), nn.Linear(48, 48), nn.Conv1d(48, 48, 1)]
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(48, 48))
    model = nn.Sequential(*parts, normed, Borrowed(parts[2].get_parameter("weight")))
    with pytest.warns(SfpWarning, match="no linear layer or embedding that can be compressed"):
        assert compress_model(model).layers == ()


def test_a_model_that_is_one_layer_is_compressed_in_place() -> None:
    dense = nn.Linear(48, 48)
    model, x = copy.deepcopy(dense), torch.randn(2, 48)
    assert compress_model(model).layers == ("",)
    assert bits(model(x)) == bits(dense(x))
    assert list(model.state_dict()) == list(dense.state_dict())


def test_a_layer_under_two_names_is_compressed_once() -> None:
    layer, x = nn.Linear(48, 48), torch.randn(2, 48)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    want = bits(model(x))
    assert compress_model(model).layers == ("0",)
    assert bits(model(x)) == want
    decompress_model(model)
    assert bits(model(x)) == want
    assert model[0] is model[2] is layer


def test_hooks_and_references_to_layers_stay_valid() -> None:
    model, seen = Small(), []
    layer = model.mid[0]
    layer.register_forward_hook(lambda *_: seen.append("called"))
    compress_model(model)
    model(IDS)
    assert seen == ["called"]
    assert layer is model.mid[0]


# ------------------------------------------------------------------------------------------------ back


def test_decompressing_restores_the_dense_model() -> None:
    model = Small().eval()
    model.mid[0].weight.requires_grad_(False)
    before, shape = state(model), repr(model)
    compress_model(model, keep=1 << 20)
    model(IDS)
    decompress_model(model)
    assert repr(model) == shape
    assert_same(state(model), before)
    assert model.head.weight is model.embed.weight
    assert vars(model.mid[0]).keys() == vars(nn.Linear(1, 1)).keys()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"mid.0.weight"}


def test_decompressing_damaged_layers_raises_and_the_model_stays_compressed() -> None:
    model = Small()
    compress_model(model)
    damaged: Any = model.mid[2]
    damaged.weight_sfp[100] ^= 1
    with pytest.raises(InvalidFileError):
        decompress_model(model)
    assert type(model.embed) is SfpEmbedding


def test_a_compressed_model_is_saved_under_the_names_of_the_dense_one(tmp_path: Path) -> None:
    dense, model = Small(), Small()
    compress_model(model)
    save_model(model, tmp_path / "m")
    tensors = state(dense)
    del tensors["head.weight"]
    found = load_file(tmp_path / "m")
    assert_same(dict(sorted(found.items())), dict(sorted(tensors.items())))
    other = Small(1)
    assert load_model(other, tmp_path / "m") == ([], [])
    assert_same(state(other), state(dense))


# ----------------------------------------------------------------------------- larger than memory allows

LARGER = """
import copy, resource, sys, torch
from torch import nn
from sfpformat.torch import compress_model, load_model

torch.set_num_threads(1)

def taken():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmData")) * 1024

def empty(layers):
    with torch.device("meta"):
        layer = nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16)
        return nn.Sequential(*[copy.deepcopy(layer) for _ in range(layers)])

x = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
small = empty(1)
compress_model(small, sys.argv[2])
with torch.inference_mode():
    small(x)  # what is imported and made once
room = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (taken() + room, taken() + room))
model = empty(8)
report = compress_model(model, sys.argv[1])
assert report.model_bytes_before > room > report.model_bytes_after
with torch.inference_mode():
    torch.save(model(x), sys.argv[4])
del model
try:
    load_model(empty(8), sys.argv[1])
except RuntimeError as error:
    assert "memory" in str(error), error
else:
    raise SystemExit("the dense model has room")
"""


# Only Linux reports memory in /proc, and counts all private memory against RLIMIT_DATA. On other systems the
# limit is missing or has no effect, so that the test could not fail.
@pytest.mark.skipif(sys.platform != "linux", reason="the system has no such limit")
def test_a_model_larger_than_memory_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    dense = nn.Sequential(*[nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16) for _ in range(8)])
    for weight in dense.parameters():
        kept = torch.rand(weight.shape, generator=generator) < 0.1
        weight.data = torch.where(kept, torch.randn(weight.shape, generator=generator), 0).bfloat16()
    save_model(dense, tmp_path / "m")
    save_model(nn.Sequential(dense[0]), tmp_path / "s")
    room = 40 << 20  # of 64 MiB dense
    monkeypatch.setenv("SFPFORMAT_ENGINE", "python")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # so that released memory can be allocated again
    out = tmp_path / "out"
    command = [sys.executable, "-c", LARGER, *map(str, (tmp_path / "m", tmp_path / "s", room, out))]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    x = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            assert torch.equal(torch.load(out), dense(x))
    finally:
        torch.set_num_threads(threads)
