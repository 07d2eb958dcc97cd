"""Compressed layers with bytes on a CUDA device: kernels run on the host, in host memory."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from sfp_conformance.forge import Forge
from torch import nn

from kernels.tools import identity, shim
from sfpformat import PRESETS, InvalidFileError, Options, Table
from sfpformat.engines import get_device_engine
from sfpformat.engines.cuda import pinned_loading
from sfpformat.torch import (
    SfpEmbedding,
    SfpLinear,
    compress_model,
    decompress_model,
    device_memory,
    operators,
    packed,
    resident_weight,
)
from sfpformat.torch.by_memory import ByMemory
from sfpformat.torch.weight_cache import KeptWeights

from ..support.programs import needs
from ..torch.test_files import bits
from ..torch.test_layers import linear

pytestmark = needs("g++")

FUSED = PRESETS["fused"].but(quantiser=Table(centroids=8))


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> list[shim.HostDevice]:
    """The queues that were opened. Host memory stands for that of a device of capability 9.0."""
    queues: list[shim.HostDevice] = []

    def opening(number: int, stream: int | None) -> shim.HostDevice:
        queues.append(shim.HostDevice(at_once=True))
        return queues[-1]

    monkeypatch.setattr(pinned_loading, "open_device", opening)
    monkeypatch.setattr(device_memory, "engine_of", lambda _: get_device_engine("cuda"))
    monkeypatch.setattr(device_memory, "stream_of", lambda _: (0, 0))
    monkeypatch.setattr(device_memory, "current", nullcontext)
    monkeypatch.setattr(device_memory, "_thread", threading.local())
    monkeypatch.setattr(resident_weight, "capability_of", lambda _: (9, 0))
    monkeypatch.setattr(resident_weight, "_known", ByMemory())
    for module in (packed, operators):
        monkeypatch.setattr(module, "is_decoded_on", lambda where, engine: True)
    return queues


def launched(queues: list[shim.HostDevice]) -> list[str]:
    """Returns the names of the kernels launched on all queues, and clears the record."""
    found = [kernel for queue in queues for kernel in queue.launched]
    for queue in queues:
        queue.launched.clear()
    return found


def fused_linear(
    rows: int = 70, columns: int = 256, dtype: Any = torch.bfloat16, scale: str | None = None
) -> SfpLinear:
    dense = linear(rows, columns).to(dtype)
    pruned = torch.where(torch.rand(rows, columns) < 0.5, dense.weight.detach(), 0)
    dense.weight = nn.Parameter(pruned.to(dtype))
    return SfpLinear.of(dense, FUSED.but(quantiser=Table(centroids=8, scale=scale)))


def dense_of(layer: SfpLinear) -> nn.Linear:
    dense = copy.deepcopy(layer)
    decompress_model(dense)
    assert isinstance(dense, nn.Linear)
    return dense


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted)


# ------------------------------------------------------------------------------------------- multiplied


KERNELS = {torch.bfloat16: "multiply_bf16", torch.float16: "multiply_f16", torch.float32: "multiply_f32"}


@pytest.mark.parametrize("dtype", KERNELS)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (8,)])
def test_few_rows_are_multiplied_without_decoding(
    shape: tuple[int, ...], dtype: Any, opened: list[shim.HostDevice]
) -> None:
    layer = fused_linear(dtype=dtype)
    x = torch.randn(*shape, 256, dtype=dtype)
    found = layer(x)
    assert {"index_chunks", "place_matrix"} < set(kernels := launched(opened))
    assert not any(kernel.startswith(("sparse", "short", "plain", "any")) for kernel in kernels)
    close(found, dense_of(layer)(x))
    launched(opened)
    assert torch.equal(layer(x), found)
    assert set(launched(opened)) == {KERNELS[dtype]}


@pytest.mark.parametrize("shape", [(9,), (3, 4), (0,)])
def test_many_rows_and_zero_rows_are_decoded(shape: tuple[int, ...], opened: list[shim.HostDevice]) -> None:
    layer = fused_linear()
    x = torch.randn(*shape, 256, dtype=torch.bfloat16)
    assert bits(layer(x)) == bits(dense_of(layer)(x))
    kernels = launched(opened)
    assert "sparse_2_1_one_short" in kernels
    assert not any(kernel.startswith("multiply") for kernel in kernels)


def test_files_for_other_presets_are_decoded_on_the_device(opened: list[shim.HostDevice]) -> None:
    dense = linear(60, 50).to(torch.bfloat16)
    layer, x = SfpLinear.of(dense), torch.randn(2, 50, dtype=torch.bfloat16)
    for _ in range(2):
        assert bits(layer(x)) == bits(dense(x))
        assert [kernel.split("_")[0] for kernel in launched(opened) if kernel != "fill_tables"] == [
            "index",
            "dense",
        ]


def test_unaligned_and_non_contiguous_rows_are_copied_first() -> None:
    layer = fused_linear()
    memory = torch.randn(257 * 2, dtype=torch.bfloat16)
    x = memory[1:257]
    assert x.data_ptr() % 16
    assert torch.equal(layer(x), layer(x.clone()))
    turned = torch.randn(256, 3, dtype=torch.bfloat16).T
    assert torch.equal(layer(turned), layer(turned.contiguous()))


def test_a_device_without_tensor_cores_decodes(
    opened: list[shim.HostDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident_weight, "capability_of", lambda _: (7, 5))
    fused_linear()(torch.randn(1, 256, dtype=torch.bfloat16))
    assert "sparse_2_1_one_short" in launched(opened)


def test_an_input_of_another_dtype_raises_like_the_dense_layer() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        fused_linear()(torch.randn(1, 256))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # of torch.func itself
def test_gradients_go_through_the_decoded_weight(opened: list[shim.HostDevice]) -> None:
    layer = fused_linear(dtype=torch.float32)
    dense, x = dense_of(layer), torch.randn(3, 256, requires_grad=True)
    found = torch.autograd.grad(layer(x).square().sum(), [x, layer.bias])
    wanted = torch.autograd.grad(dense(x).square().sum(), [x, dense.bias])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert torch.func.jvp(layer, (x,), (x,))[1].shape == (3, 70)


def test_autocast_multiplies_in_its_dtype(opened: list[shim.HostDevice]) -> None:
    layer = fused_linear(dtype=torch.float32)
    x = torch.randn(2, 256)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = layer(x), dense_of(layer)(x)
    assert "multiply_bf16" in launched(opened)
    close(found, wanted)


def test_layers_with_the_fused_product_compile(opened: list[shim.HostDevice]) -> None:
    layer = fused_linear()
    x = torch.randn(2, 256, dtype=torch.bfloat16)
    wanted = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), wanted)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x), wanted)


def test_a_cast_layer_multiplies_with_the_cast_weights(opened: list[shim.HostDevice]) -> None:
    layer = fused_linear(dtype=torch.float32).to(torch.float16)
    x = torch.randn(2, 256, dtype=torch.float16)
    found = layer(x)
    assert "multiply_f16" in launched(opened)
    close(found, dense_of(layer)(x))


# ----------------------------------------------------------------------------------------- what is known


def test_bytes_that_were_written_to_are_checked_again() -> None:
    one, other = fused_linear(), fused_linear(scale="row")
    x = torch.randn(1, 256, dtype=torch.bfloat16)
    one(x)
    size = min(len(one.weight_sfp), len(other.weight_sfp))
    assert size == len(one.weight_sfp)
    bigger = SfpLinear(256, 70, dtype=torch.bfloat16)
    bigger.load_state_dict(other.state_dict())
    bigger(x)
    bigger.weight_sfp[:] = other.weight_sfp
    assert torch.equal(bigger(x), other(x))
    assert len(resident_weight._known) == 3


def test_the_cache_entry_is_freed_with_the_bytes() -> None:
    layer = fused_linear()
    layer(torch.randn(1, 256, dtype=torch.bfloat16))
    assert len(resident_weight._known) == 1
    del layer
    assert not resident_weight._known


def test_cached_weights_are_used_by_calls_with_many_rows(opened: list[shim.HostDevice]) -> None:
    layer = fused_linear()
    layer.kept = KeptWeights(1 << 20)
    x = torch.randn(20, 256, dtype=torch.bfloat16)
    found = layer(x)
    launched(opened)
    assert torch.equal(layer(x), found)
    assert launched(opened) == []


def test_models_are_multiplied_layer_by_layer(opened: list[shim.HostDevice]) -> None:
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)).to(torch.bfloat16)
    compress_model(model, FUSED, choose=lambda name, module: True)
    x = torch.randn(1, 256, dtype=torch.bfloat16)
    found = model(x)
    assert launched(opened).count("multiply_bf16") == 2
    decompress_model(model)
    close(found, model(x))


# ------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("columns", [96, 33])
def test_few_rows_of_an_embedding_are_decoded_by_the_device(
    columns: int, opened: list[shim.HostDevice]
) -> None:
    dense = nn.Embedding(3000, columns).to(torch.bfloat16)
    layer = SfpEmbedding.of(dense, Options(segment=96, chunk=96 * 100))
    ids = torch.tensor([[5, 2999, 0], [5, 1234, 1235]])
    assert bits(layer(ids)) == bits(dense(ids))
    assert "index_chunks" in launched(opened)
    with pytest.raises(IndexError):
        layer(torch.tensor([3000]))
    many = torch.randint(0, 3000, (4000,))
    assert bits(layer(many)) == bits(dense(many))


# ------------------------------------------------------------------------------------------------- damage


def damaged(layer: SfpLinear, part: str) -> torch.Tensor:
    forge = Forge.of(bytes(layer.weight_sfp.numpy().tobytes()))
    taken = forge.part("weight").take(0)
    if part == "plane":
        taken.quantities["survivors"][1] -= 1
        forge.part("weight").put(taken, 0)
        return torch.frombuffer(bytearray(forge.build()), dtype=torch.uint8)
    data = bytearray(forge.build())
    data[forge.start_of("weight") + 300] ^= 1
    return torch.frombuffer(data, dtype=torch.uint8)


@pytest.mark.parametrize("part", ["plane", "checksum"])
@pytest.mark.parametrize("rows", [1, 20])
def test_damaged_bytes_raise_the_same_error_as_on_the_cpu(
    rows: int, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = fused_linear()
    layer._put(damaged(layer, part))
    x = torch.randn(rows, 256, dtype=torch.bfloat16)
    faults = []
    for on_device in (True, False):
        for module in (packed, operators):
            monkeypatch.setattr(module, "is_decoded_on", lambda where, engine, there=on_device: there)
        for _ in range(2):
            with pytest.raises(InvalidFileError) as caught:
                layer(x)
            faults.append((caught.value.clause, caught.value.offset))
    assert len(set(faults)) == 1


def test_raw_and_empty_weights_are_decoded_on_the_cpu() -> None:
    dense = linear(4, 5).to(torch.bfloat16)
    layer = SfpLinear.of(dense, Options(coding="raw"))
    x = torch.randn(1, 5, dtype=torch.bfloat16)
    assert bits(layer(x)) == bits(dense(x))


def test_the_check_of_layers_runs_without_a_device() -> None:
    assert identity.compare_layers("cpu") == 3 * (3 * 3 + 3)
