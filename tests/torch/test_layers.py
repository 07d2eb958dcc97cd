"""Layers that keep their weight compressed: bits, gradients, casts, state, compilers, the cache."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sfpformat import InvalidFileError, MismatchError, Options, Uniform
from sfpformat.torch import SfpEmbedding, SfpLinear, derivatives, operators, packed
from sfpformat.torch import save as save_tensors
from sfpformat.torch.weight_cache import KeptWeights

from .test_files import bits, pruned

FLOATS = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
SIZES = st.integers(1, 40)


def linear(rows: int = 24, columns: int = 40, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    """A dense layer with random weights."""
    torch.manual_seed(seed)
    return nn.Linear(columns, rows, bias=bias)


def embedding(rows: int = 60, columns: int = 16, seed: int = 0) -> nn.Embedding:
    """A dense layer with random weights."""
    torch.manual_seed(seed)
    return nn.Embedding(rows, columns, padding_idx=3)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the bytes of each weight that is decoded completely."""
    sizes: list[int] = []
    real = packed.decode

    def counting(data: torch.Tensor) -> torch.Tensor:
        weight = real(data)
        sizes.append(weight.nbytes)
        return weight

    monkeypatch.setattr(packed, "decode", counting)
    return sizes


# -------------------------------------------------------------------------------------------------- bits


@given(FLOATS, SIZES, SIZES, st.booleans(), st.lists(st.integers(0, 3), max_size=3))
def test_a_linear_layer_computes_the_bits_of_the_dense_one(
    dtype: torch.dtype, rows: int, columns: int, bias: bool, batch: list[int]
) -> None:
    dense = linear(rows, columns, bias=bias).to(dtype)
    x = torch.randn(*batch, columns, dtype=dtype)
    assert bits(SfpLinear.of(dense)(x)) == bits(dense(x))


@given(FLOATS, SIZES, SIZES, st.lists(st.integers(0, 3), max_size=3), st.data())
def test_an_embedding_computes_the_bits_of_the_dense_one(
    dtype: torch.dtype, rows: int, columns: int, batch: list[int], data: st.DataObject
) -> None:
    dense = nn.Embedding(rows, columns, dtype=dtype)
    kind = data.draw(st.sampled_from([torch.int64, torch.int32]))
    ids = torch.randint(0, rows, batch, dtype=kind)
    assert bits(SfpEmbedding.of(dense)(ids)) == bits(dense(ids))


@pytest.mark.parametrize("count", [1, 40, 20_000])
def test_few_embedding_rows_are_decoded_alone_and_many_with_the_whole_weight(
    count: int, decoded: list[int]
) -> None:
    dense = nn.Embedding(4000, 33)
    ids = torch.randint(0, 4000, (count,))
    assert bits(SfpEmbedding.of(dense, Options(segment=1056))(ids)) == bits(dense(ids))
    assert bool(decoded) == (count == 20_000)


@pytest.mark.parametrize("wrong", [-1, 60])
@pytest.mark.parametrize("count", [1, 1000])
def test_a_row_out_of_range_raises(wrong: int, count: int) -> None:
    with pytest.raises(IndexError):
        SfpEmbedding.of(embedding())(torch.full((count,), wrong))


def test_a_quantised_layer_computes_with_the_decoded_weights() -> None:
    dense, options = linear(64, 64), Options(Uniform(bits=3.0))
    layer = SfpLinear.of(dense, options)
    with torch.no_grad():
        dense.weight.copy_(packed.decode(packed.pack(dense.weight, options)))
    x = torch.randn(5, 64)
    assert bits(layer(x)) == bits(dense(x))
    assert bits(layer.weight) == bits(dense.weight)


def test_autocast_gives_the_dtype_and_bits_of_the_dense_layer() -> None:
    for dtype in (torch.float32, torch.float16, torch.float64):
        dense = linear().to(dtype)
        x = torch.randn(3, 40, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            want, found = dense(x), SfpLinear.of(dense)(x)
        assert found.dtype == want.dtype
        assert bits(found) == bits(want)


def test_an_input_of_another_dtype_raises_like_the_dense_layer() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        SfpLinear.of(linear())(torch.randn(3, 40, dtype=torch.float64))


# --------------------------------------------------------------------------------------------- gradients


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    """The gradient of a tensor that has one."""
    assert tensor.grad is not None
    return tensor.grad


def test_gradients_of_input_and_bias_equal_those_of_the_dense_layer() -> None:
    dense, x = linear(), torch.randn(2, 3, 40)
    layer = SfpLinear.of(copy.deepcopy(dense))
    found, want = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(found).square().sum().backward()
    dense(want).square().sum().backward()
    assert torch.equal(gradient(found), gradient(want))
    assert torch.equal(gradient(layer.bias), gradient(dense.bias))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_gradients_of_both_orders_are_right() -> None:
    layer = SfpLinear.of(linear(3, 4).double())
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(lambda x: layer(x).square(), (x,))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # of torch.func itself
def test_calls_without_forward_derivatives_use_no_autograd_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*given: object) -> None:
        raise AssertionError("a function was made")

    layer, x = SfpLinear.of(linear()), torch.randn(2, 40, requires_grad=True)
    monkeypatch.setattr(derivatives._Linear, "apply", slow)
    layer(x).square().sum().backward()
    with torch.inference_mode():
        layer(x)
    with torch.autograd.forward_ad.dual_level():
        layer(x)
        with pytest.raises(AssertionError):
            layer(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace.*deprecated")
def test_dispatch_modes_and_profilers_see_the_operator() -> None:
    class Looking(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(func.name())
            return func(*args, **(kwargs or {}))

    layer, x = SfpLinear.of(linear()), torch.randn(2, 40)
    with torch.no_grad():
        wanted = layer(x)
        with Looking():
            assert bits(layer(x)) == bits(wanted)
        with torch.autograd.profiler.profile() as profile:
            layer(x)
        traced = torch.jit.trace(layer, (x,))
    assert "sfpformat::linear" in Looking.seen
    assert "sfpformat::linear" in {event.name for event in profile.function_events or ()}
    assert "sfpformat::linear" in str(traced.inlined_graph)
    assert layer.to("meta")(x.to("meta")).is_meta


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # of torch.func itself
def test_other_derivatives_equal_those_of_the_dense_layer() -> None:
    dense = linear(3, 4).double()
    layer, x = SfpLinear.of(dense), torch.randn(2, 4, dtype=torch.float64)
    x2 = torch.randn(2, 4, dtype=torch.float64)

    def both(work: Callable[[Any], torch.Tensor]) -> None:
        torch.testing.assert_close(work(layer), work(dense), rtol=1e-12, atol=0)

    both(lambda f: torch.func.grad(lambda x: f(x).square().sum())(x))
    both(lambda f: torch.func.jvp(f, (x,), (x2,))[1])
    both(lambda f: torch.func.vmap(f)(x))
    both(lambda f: torch.func.jacfwd(f)(x))
    both(lambda f: torch.func.jacrev(f)(x))
    both(lambda f: torch.func.hessian(lambda x: f(x).square().sum())(x))
    with torch.autograd.forward_ad.dual_level():
        both(
            lambda f: torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(x, x2)))[1]
        )

    def of_bias(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        rest = {name: tensor for name, tensor in module.state_dict().items() if name != "bias"}
        return lambda bias: torch.func.functional_call(module, {**rest, "bias": bias}, (x,))

    both(lambda f: torch.func.jacfwd(of_bias(f))(f.bias))
    both(lambda f: torch.func.jacrev(of_bias(f))(f.bias))
    both(lambda f: torch.func.vmap(of_bias(f))(torch.stack([f.bias, 2 * f.bias])))


def test_a_batch_of_compressed_weights_is_refused() -> None:
    layer, x = SfpLinear.of(linear(3, 4)), torch.randn(2, 4)
    state = {name: torch.stack([tensor, tensor]) for name, tensor in layer.state_dict().items()}
    with pytest.raises(MismatchError, match="vmap over compressed weights"):
        torch.func.vmap(lambda own: torch.func.functional_call(layer, own, (x,)))(state)


def test_no_decoded_weight_is_kept_for_the_backward_pass() -> None:
    saved: list[torch.Tensor] = []
    layer, x = SfpLinear.of(linear(200, 100)), torch.randn(1, 100, requires_grad=True)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert {tensor.data_ptr() for tensor in saved} <= {layer.weight_sfp.data_ptr(), x.data_ptr()}


# ------------------------------------------------------------------------------------------------- casts


@given(FLOATS, FLOATS)
def test_a_cast_changes_the_dtype_of_the_decoded_weight(dtype: torch.dtype, other: torch.dtype) -> None:
    dense = linear().to(dtype)
    layer = SfpLinear.of(copy.deepcopy(dense)).to(other)
    x = torch.randn(3, 40, dtype=other)
    assert bits(layer(x)) == bits(dense.to(other)(x))
    assert layer.weight.dtype == layer.bias.dtype == other


def test_casting_to_half_precision_and_back_is_lossless() -> None:
    layer = SfpLinear.of(linear(bias=False))
    before = bits(layer.weight)
    assert bits(layer.half().float().weight) == before
    assert bits(layer.type(torch.float16).type(torch.float32).weight) == before


def test_layers_compute_shapes_on_the_meta_device() -> None:
    layer, table = SfpLinear.of(linear()).to("meta"), SfpEmbedding.of(embedding()).to("meta")
    assert layer(torch.empty(2, 40, device="meta")).shape == (2, 24)
    assert table(torch.empty(2, 5, device="meta", dtype=torch.int64)).shape == (2, 5, 16)


# ------------------------------------------------------------------------------------------------- state


def test_a_state_dict_contains_the_bytes_and_loads_into_another_layer() -> None:
    layers: Any = nn.ModuleList([SfpLinear.of(linear()), SfpEmbedding.of(embedding())])
    others: Any = nn.ModuleList([SfpLinear(40, 24), SfpEmbedding(60, 16, padding_idx=3)])
    assert list(layers.state_dict()) == ["0.weight", "0.bias", "1.weight"]
    assert layers.state_dict()["1.weight"].dtype == torch.uint8
    for assign in (False, True):
        file = io.BytesIO()
        torch.save(layers.state_dict(), file)
        file.seek(0)
        others.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        for layer, other in zip(layers, others, strict=True):
            assert bits(layer.weight) == bits(other.weight)
            assert layer.weight_sfp is not other.weight_sfp
    assert repr(layers) == repr(others)


def test_a_dense_state_dict_is_encoded_losslessly() -> None:
    layer, dense = SfpLinear(40, 24), linear()
    layer.load_state_dict(dense.state_dict())
    assert bits(layer.weight) == bits(dense.weight)


def test_an_invalid_weight_in_a_state_dict_is_refused_and_nothing_changes() -> None:
    layer = SfpLinear.of(linear(bias=False))
    before = bits(layer.weight)
    damaged = layer.weight_sfp.clone()
    damaged[-1] ^= 1
    for wrong, message in [
        (packed.pack(torch.zeros(40, 24)), r"shape \[40, 24\], the module's weight \[24, 40\]"),
        (
            torch.frombuffer(bytearray(save_tensors({"w": pruned(24, 40)})), dtype=torch.uint8),
            "must contain the tensor 'weight' alone; this one contains 'w'",
        ),
        (damaged, "E_CRC"),
        (torch.zeros(0, dtype=torch.uint8), "no weight yet"),
        (torch.zeros(24, 40, dtype=torch.uint8), "uint8"),
        (torch.zeros(40, 24), r"shape \[40, 24\], the module's weight \[24, 40\]"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict({"weight": wrong})
        assert bits(layer.weight) == before
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        layer.load_state_dict({})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        layer.load_state_dict({**layer.state_dict(), "other": torch.zeros(1)})
    assert layer.load_state_dict({}, strict=False).missing_keys == ["weight"]


def test_a_layer_without_a_weight_raises() -> None:
    with pytest.raises(MismatchError, match="call load_state_dict"):
        SfpLinear(40, 24)(torch.randn(2, 40))


def test_calling_a_layer_with_damaged_bytes_raises() -> None:
    layer = SfpLinear.of(linear())
    layer.weight_sfp[200] ^= 1
    with pytest.raises(InvalidFileError, match="R-LAY-004"):
        layer(torch.randn(2, 40))


def test_copies_and_pickles_compute_the_same() -> None:
    layer, x = SfpLinear.of(linear()).eval(), torch.randn(2, 40)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert bits(other(x)) == bits(layer(x))
        assert other.weight_sfp.data_ptr() != layer.weight_sfp.data_ptr()
        assert not other.training


def test_an_embedding_with_max_norm_is_refused() -> None:
    with pytest.raises(MismatchError, match="max_norm"):
        SfpEmbedding.of(nn.Embedding(5, 4, max_norm=1.0))
    with pytest.raises(MismatchError, match="padding_idx is 5"):
        SfpEmbedding(5, 4, padding_idx=5)


# --------------------------------------------------------------------------------------------- compilers


class Model(nn.Module):
    """An embedding and a linear layer with one tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = SfpEmbedding.of(embedding())
        self.mid = SfpLinear.of(linear(16, 16))
        self.head = SfpLinear(16, 60, bias=False)
        self.head._put(self.embed.weight_sfp)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.relu(self.mid(self.embed(ids)))) + self.mid.weight.sum()
        return out


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_a_model_compiles_without_graph_breaks(limit: int) -> None:
    model, ids = Model(), torch.randint(0, 60, (2, 5))
    module: Any
    for module in model.children():
        module.kept = KeptWeights(limit)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model(ids).square().sum().backward()
    want = gradient(model.mid.bias).clone()
    model.zero_grad()
    compiled(ids).square().sum().backward()
    assert bits(gradient(model.mid.bias)) == bits(want)
    with torch.no_grad():
        assert bits(compiled(ids)) == bits(model(ids))
        assert bits(compiled(ids[:1])) == bits(model(ids[:1]))


def test_autocast_is_compiled_too() -> None:
    layer, x = SfpLinear.of(linear()), torch.randn(3, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert bits(compiled(x)) == bits(layer(x))


def test_calls_avoid_functions_that_some_compilers_cannot_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def untraceable(kind: str) -> bool:
        raise AssertionError(f"asked for {kind}")

    layer, x = SfpLinear.of(linear()), torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = layer(x)
        with monkeypatch.context() as patched:
            patched.setattr(torch.amp, "is_autocast_available", untraceable)
            assert bits(layer(x)) == bits(wanted)
        monkeypatch.setattr("sfpformat.torch.layers._SUPPORTS_AUTOCAST", {})  # as for a custom device type
        assert bits(layer(x)) == bits(wanted)


def test_an_exported_model_can_be_saved_and_loaded() -> None:
    model, ids = Model(), torch.randint(0, 60, (2, 5))
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (ids,)), file)
    file.seek(0)
    assert bits(torch.export.load(file).module()(ids)) == bits(model(ids))


def test_operators_pass_the_opcheck_of_torch() -> None:
    data, dtype = packed.pack(pruned(6, 5)), torch.float32
    x, y, bias = torch.randn(3, 5), torch.randn(3, 6), torch.randn(6)
    torch.library.opcheck(operators.decode, (data, [6, 5], dtype, ""))
    torch.library.opcheck(operators.linear, (x, bias, data, 6, False, dtype, dtype, ""))
    torch.library.opcheck(operators.linear, (y, None, data, 5, True, dtype, dtype, ""))
    torch.library.opcheck(operators.embedding, (torch.tensor([[1, 5]]), data, 5, dtype, ""))


# ---------------------------------------------------------------------------------------- what is kept


def keeping(limit: int, *layers: SfpLinear | SfpEmbedding) -> KeptWeights:
    """Gives layers a common cache of decoded weights."""
    kept = KeptWeights(limit)
    for layer in layers:
        layer.kept = kept
    return kept


def test_a_cached_weight_is_decoded_once(decoded: list[int]) -> None:
    layer, x = SfpLinear.of(linear()), torch.randn(2, 40)
    kept = keeping(1 << 20, layer)
    results = {bits(layer(x)) for _ in range(3)} | {bits(copy.copy(layer)(x))}
    assert len(results) == 1
    assert decoded == [24 * 40 * 4]
    assert kept.nbytes == 24 * 40 * 4
    layer.half()(x.half())
    assert decoded == [24 * 40 * 4] * 2


def test_a_write_to_the_weight_does_not_change_the_cached_one(decoded: list[int]) -> None:
    layer, x = SfpLinear.of(linear()), torch.randn(2, 40)
    keeping(1 << 20, layer)
    layer(x)
    weight = layer.weight
    plain = weight.clone()
    layer.decoded_weight().zero_()
    assert bits(layer(x)) == bits(F.linear(x, plain, layer.bias))
    weight.zero_()
    assert bits(layer(x)) == bits(F.linear(x, 0 * plain, layer.bias))


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(0, 3))
def test_the_cache_keeps_the_most_recently_used_weights_within_its_limit(calls: list[int], room: int) -> None:
    layers = [SfpLinear.of(linear(8, 8, seed=i)) for i in range(4)]
    kept = keeping(room * 8 * 8 * 4, *layers)
    x = torch.randn(2, 8)
    for call in calls:
        layers[call](x)
    last = list(dict.fromkeys(reversed(calls)))[:room]
    assert kept.nbytes == len(last) * 8 * 8 * 4
    for i, layer in enumerate(layers):
        found = kept.find(layer.weight_sfp, torch.float32, torch.float32)
        assert (found is not None) == (i in last)


def test_a_weight_over_the_limit_is_not_cached_and_evicts_none() -> None:
    small, large = SfpLinear.of(linear(8, 8)), SfpLinear.of(linear(8, 9))
    kept = keeping(8 * 8 * 4, small, large)
    small(torch.randn(2, 8))
    large(torch.randn(2, 9))
    assert kept.nbytes == 8 * 8 * 4


def test_a_cached_weight_is_freed_with_its_bytes() -> None:
    layer, x = SfpLinear.of(linear()), torch.randn(2, 40)
    kept = keeping(1 << 20, layer)
    layer(x)
    del layer
    gc.collect()
    assert kept.nbytes == 0


def test_new_bytes_invalidate_the_cached_weight() -> None:
    layer, other, x = SfpLinear.of(linear()), SfpLinear.of(linear(seed=1)), torch.randn(2, 40)
    keeping(1 << 20, layer)
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert bits(layer(x)) == bits(other(x))
    same_size = packed.pack(-other.weight)
    assert same_size.shape == layer.weight_sfp.shape
    layer.weight_sfp.copy_(same_size)
    without_bias: Any = layer
    without_bias.bias = None
    assert bits(layer(x)) == bits(x @ -other.weight.T)


def test_tied_layers_cache_one_weight_and_stay_tied_when_moved(decoded: list[int]) -> None:
    model = Model()
    kept = keeping(1 << 20, model.embed, model.head)
    model.embed(torch.arange(60))
    model.head(torch.randn(2, 16))
    assert len(decoded) == 1
    assert kept.nbytes == 60 * 16 * 4
    for moved in (copy.deepcopy(model), copy.deepcopy(model).to("meta"), copy.deepcopy(model).double()):
        assert moved.embed.weight_sfp is moved.head.weight_sfp
    other = Model()
    other.embed._put(packed.pack(torch.zeros(60, 16)))
    other.head._put(other.embed.weight_sfp)
    other.load_state_dict(model.state_dict())
    assert other.embed.weight_sfp is other.head.weight_sfp


def test_a_call_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from sfpformat.torch import SfpLinear\n"
        "SfpLinear.of(torch.nn.Linear(8, 8))(torch.randn(2, 8)).sum().backward()\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
