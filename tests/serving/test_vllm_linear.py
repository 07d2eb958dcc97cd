"""vLLM's quantization method sfp: with stand-ins for its layers, and with its own where it imports."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfpformat import InvalidFileError, MismatchError, OptionError, SfpWarning
from sfpformat.serving import register_vllm_quantization
from sfpformat.serving.vllm import LINEAR_ABSTRACT, LINEAR_INTERFACE
from sfpformat.torch import SfpLinear, load_file, safe_open, save_file
from sfpformat.torch.lazy_tensor import lazy_weights
from sfpformat.torch.packed import cut_out

from ..support import vllm_layers_stand_in as stand_in

BF16 = torch.bfloat16
METHOD = "sfpformat.serving.vllm_linear"
LAYERS = "vllm.model_executor.layers"
LINEAR, VOCABULARY = f"{LAYERS}.linear", f"{LAYERS}.vocab_parallel_embedding"
HIDDEN, HEAD, WORDS = 128, 32, 100


def imports_vllm() -> bool:
    """Whether the layers of vLLM can be imported on this machine."""
    if find_spec("vllm") is None:
        return False
    with warnings.catch_warnings(), suppress(ImportError):
        warnings.simplefilter("ignore")
        importlib.import_module("vllm.config")
        importlib.import_module(VOCABULARY)
        return True
    return False


IMPORTS_VLLM = imports_vllm()
needs_vllm = pytest.mark.skipif(not IMPORTS_VLLM, reason="vLLM is not installed")


@pytest.fixture(params=[False, pytest.param(True, marks=needs_vllm)], ids=["stand-in", "own"])
def config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The registered configuration, of the stand-in or of vLLM itself."""
    if not request.param:
        for name in [one for one in sys.modules if one.partition(".")[0] == "vllm"]:
            monkeypatch.delitem(sys.modules, name)
        for name, module in stand_in.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        stand_in.METHODS.clear()
    sys.modules.pop(METHOD, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        register_vllm_quantization()
    methods = importlib.import_module(f"{LAYERS}.quantization")
    yield methods._CUSTOMIZED_METHOD_TO_QUANT_CONFIG["sfp"]()
    sys.modules.pop(METHOD, None)


def become(rank: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the rank of tensor parallelism."""
    monkeypatch.setitem(stand_in.TP, "rank", rank)
    monkeypatch.setitem(stand_in.TP, "size", size)
    for name in (LINEAR, VOCABULARY, "vllm.model_executor.parameter"):
        module = importlib.import_module(name)
        if hasattr(module, "get_tensor_model_parallel_rank"):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)


def checkpoint() -> dict[str, torch.Tensor]:
    """The weights as on disk."""
    torch.manual_seed(0)
    shapes = {
        "q": (4 * HEAD, HIDDEN),
        "k": (2 * HEAD, HIDDEN),
        "v": (2 * HEAD, HIDDEN),
        "gate": (192, HIDDEN),
        "up": (192, HIDDEN),
        "o": (HIDDEN, HIDDEN),
        "all": (96, HIDDEN),
        "lm_head": (WORDS, HIDDEN),
    }
    return {name: torch.randn(shape).to(BF16) for name, shape in shapes.items()}


def build(config: Any) -> Any:
    """The layers of a model, for the rank that is set."""
    linear, vocabulary = importlib.import_module(LINEAR), importlib.import_module(VOCABULARY)
    own: dict[str, Any] = {"quant_config": config, "params_dtype": BF16}
    layers: dict[str, Any] = {
        "qkv": linear.QKVParallelLinear(HIDDEN, HEAD, 4, 2, bias=True, prefix="m.qkv", **own),
        "gate_up": linear.MergedColumnParallelLinear(HIDDEN, [192, 192], bias=False, prefix="m.gu", **own),
        "o": linear.RowParallelLinear(HIDDEN, HIDDEN, bias=False, reduce_results=False, prefix="m.o", **own),
        "all": linear.ReplicatedLinear(HIDDEN, 96, bias=True, prefix="m.all", skip_bias_add=True, **own),
        "lm_head": vocabulary.ParallelLMHead(WORDS, HIDDEN, prefix="lm_head", **own),
    }
    for layer in layers.values():
        if layer.bias is not None:
            layer.bias.data.copy_(torch.randn(layer.bias.shape))
    return nn.ModuleDict(layers)


PLACES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "q": ("qkv", ("q",)),
    "k": ("qkv", ("k",)),
    "v": ("qkv", ("v",)),
    "gate": ("gate_up", (0,)),
    "up": ("gate_up", (1,)),
}


def fill(model: Any, path: Path, without: str = "") -> None:
    """Loads a file, as vLLM's models do, and ends the loading."""
    with safe_open(path) as file:
        for name, tensor in lazy_weights(file):
            if name != without:
                place, shard = PLACES.get(name, (name, ()))
                weight = model[place].weight
                weight.weight_loader(weight, tensor, *shard)
    for layer in model.values():
        finish(layer)


def finish(layer: Any) -> None:
    """What vLLM does after loading."""
    layer.quant_method.process_weights_after_loading(layer)


def expected(weights: dict[str, torch.Tensor], rank: int, size: int) -> dict[str, list[torch.Tensor]]:
    """The parts of a rank."""
    rows = {name: weight.chunk(size)[rank] for name, weight in weights.items()}
    padded = F.pad(weights["lm_head"], (0, 0, 0, 128 - WORDS)).chunk(size)[rank]
    words = max(0, min(WORDS - rank * len(padded), len(padded)))
    return {
        "qkv": [rows["q"], rows["k"], rows["v"]],
        "gate_up": [rows["gate"], rows["up"]],
        "o": [weights["o"].chunk(size, 1)[rank]],
        "all": [weights["all"]],
        "lm_head": [one for one in (padded[:words], padded[words:]) if len(one)],
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the weights."""
    out = tmp_path_factory.mktemp("model") / "model.sfp"
    save_file(checkpoint(), out)
    return out


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_products_are_those_of_the_decoded_parts_of_the_rank(
    config: Any, path: Path, rank: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(rank, size, monkeypatch)
    model = build(config)
    assert all(layer.weight.is_meta for layer in model.values())
    fill(model, path)
    for name, parts in expected(checkpoint(), rank, size).items():
        layer = model[name]
        assert not any(key.endswith("weight") for key, _ in layer.named_parameters())
        assert [tuple(one.weight_shape) for one in layer.sfp_parts] == [tuple(one.shape) for one in parts]
        for held, part in zip(layer.sfp_parts, parts, strict=True):
            assert torch.equal(held.decoded_weight().view(torch.int16), part.contiguous().view(torch.int16))
        x = torch.randn(3, parts[0].shape[1]).to(BF16)
        bias: Any = None if layer.bias is None else layer.bias.split([len(one) for one in parts])
        apart = [F.linear(x, one, None if bias is None else bias[n]) for n, one in enumerate(parts)]
        assert torch.equal(layer.quant_method.apply(layer, x, layer.bias), torch.cat(apart, -1))
    x = torch.randn(2, HIDDEN).to(BF16)
    product, not_added = model["all"](x)
    assert torch.equal(product, F.linear(x, checkpoint()["all"]))
    assert not_added is model["all"].bias


def test_whole_tensors_keep_the_bytes_of_the_file_and_memory_is_theirs(
    config: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(0, 1, monkeypatch)
    model = build(config)
    fill(model, path)
    with safe_open(path) as file:
        for name, (layer, _) in PLACES.items():
            at = {"q": 0, "k": 1, "v": 2, "gate": 0, "up": 1}[name]
            part = model[layer].sfp_parts[at]
            assert torch.equal(part.weight_sfp, cut_out(file.file, name))
    held = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    dense = sum(one.nbytes for one in checkpoint().values())
    assert held < 0.75 * dense  # random bfloat16: 10.6 of 16 bits
    before = {name: sizes[0] for name, sizes in config.sizes.items()}
    assert before["m.qkv"] == 8 * HEAD * HIDDEN * 2
    assert sum(before.values()) == dense + (128 - WORDS) * HIDDEN * 2
    config.report()  # no warning


def test_layers_that_would_not_become_smaller_are_dense_with_a_warning_that_names_them(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(0, 1, monkeypatch)
    weights = checkpoint()
    noise = torch.randint(-(2**15), 2**15, weights["o"].shape).to(torch.int16)
    noise[(noise & 0x7F80) == 0x7F80] = 0  # neither infinite nor NaN
    weights["o"] = noise.view(BF16)
    save_file(weights, tmp_path / "model.sfp")
    model = build(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vLLM's own dense layer
        fill(model, tmp_path / "model.sfp")
    assert not hasattr(model["o"], "sfp_parts")
    assert type(model["o"].quant_method).__name__ == "UnquantizedLinearMethod"
    x = torch.ones(2, HIDDEN, dtype=BF16)
    found = model["o"].quant_method.apply(model["o"], x)
    assert torch.allclose(found, F.linear(x, weights["o"]), rtol=0.02, equal_nan=True)
    with pytest.warns(SfpWarning, match=r"1 layers are dense, .* would not be smaller: 'm\.o'"):
        config.report()


def test_a_matrix_of_a_combined_layer_that_is_missing_is_an_error(
    config: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(0, 1, monkeypatch)
    with pytest.raises(MismatchError, match=r"no tensor fills rows 192 to 256 of the weight of 'm\.qkv'"):
        fill(build(config), path, without="v")


def test_embeddings_and_tied_heads_are_dense(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    become(0, 1, monkeypatch)
    vocabulary = importlib.import_module(VOCABULARY)
    own: dict[str, Any] = {"quant_config": config, "params_dtype": BF16}
    embedding = vocabulary.VocabParallelEmbedding(WORDS, HIDDEN, prefix="embed", **own)
    head = vocabulary.ParallelLMHead(WORDS, HIDDEN, prefix="lm_head", **own)
    assert type(embedding.quant_method).__name__ == "UnquantizedEmbeddingMethod"
    head = head.tie_weights(embedding)
    assert head.weight is embedding.weight
    assert type(head.quant_method).__name__ == "UnquantizedEmbeddingMethod"
    config.report()
    assert not config.sizes


def test_keep_keeps_decoded_weights_in_one_cache(
    config: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(0, 1, monkeypatch)
    set_config(monkeypatch, keep=1 << 30)
    model = build(config)
    fill(model, path)
    for _ in range(2):
        model["gate_up"].quant_method.apply(model["gate_up"], torch.zeros(1, HIDDEN, dtype=BF16))
    assert config.kept.limit == 1 << 30
    assert config.kept.nbytes == 2 * 192 * HIDDEN * 2


def set_config(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Sets the configuration of vLLM that the method asks."""
    load = SimpleNamespace(
        load_format=changes.get("load_format", "sfp"),
        model_loader_extra_config={"keep": changes.get("keep", 0)},
    )
    device = SimpleNamespace(device="cpu")
    made = SimpleNamespace(load_config=load, lora_config=changes.get("lora"), device_config=device)
    monkeypatch.setattr(importlib.import_module(METHOD), "get_current_vllm_config_or_none", lambda: made)


def test_what_cannot_be_compressed_is_refused(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    become(0, 1, monkeypatch)
    experts = type("RoutedExperts", (nn.Module,), {})()
    with pytest.raises(OptionError, match=r"'m\.experts' has experts .* use --load-format sfp alone"):
        config.get_quant_method(experts, "m.experts")
    assert config.get_quant_method(nn.Module(), "m.attn") is None
    set_config(monkeypatch, load_format="auto")
    with pytest.raises(OptionError, match="needs --load-format sfp, not 'auto'"):
        build(config)
    set_config(monkeypatch, lora=object())
    with pytest.raises(OptionError, match="LoRA"):
        build(config)
    assert type(config).from_config({"quant_method": "sfp"}).get_name() == "sfp"
    with pytest.raises(OptionError, match="no option 'bits'"):
        type(config).from_config({"quant_method": "sfp", "bits": 4})


def test_a_load_in_steps_and_a_damaged_file_raise_errors(
    config: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(0, 1, monkeypatch)
    model = build(config)
    weight = model["all"].weight
    with pytest.raises(OptionError, match="compressed while it is loaded"):
        weight.data = torch.zeros(96, HIDDEN)  # as offloading does
    with pytest.raises((MismatchError, AssertionError)):
        weight.weight_loader(weight, torch.zeros(97, HIDDEN))
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    (tmp_path / "model.sfp").write_bytes(data)
    with pytest.raises(InvalidFileError, match="E_CRC"):
        fill(model, tmp_path / "model.sfp")


@needs_vllm
def test_the_stand_ins_have_the_signatures_of_vllm() -> None:
    def names(owner: Any, name: str, method: str) -> list[str]:
        found = getattr(owner, name)
        return list(inspect.signature(getattr(found, method) if method else found).parameters)

    for module, name, method, used in LINEAR_INTERFACE:
        theirs = names(importlib.import_module(module), name, method)
        assert set(used) <= set(theirs), (name, method)
        assert names(stand_in, name, method) == theirs, (name, method)
    for (module, name), methods in LINEAR_ABSTRACT.items():
        assert getattr(importlib.import_module(module), name).__abstractmethods__ == methods


def test_the_part_of_a_layer_is_an_ordinary_compressed_layer(
    config: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(0, 1, monkeypatch)
    model = build(config)
    fill(model, path)
    part = model["all"].sfp_parts[0]
    assert isinstance(part, SfpLinear)
    assert part.title() == "layer 'm.all'"
    assert torch.equal(part.weight, load_file(path)["all"])
