"""The weight of a compressed layer: writes change the layer, or are refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize, prune

from sfpformat import MismatchError, OptionError, Options, Uniform
from sfpformat.torch import SfpEmbedding, SfpLinear, compress_model, decompress_model, packed
from sfpformat.torch.decoded import holders_of
from sfpformat.torch.weight import DecodedWeight

from .test_files import bits
from .test_layers import embedding, linear

Layer = Any
OTHER = torch.rand(6, 6, generator=torch.Generator().manual_seed(5)) + 0.5
ROWS = torch.tensor([1, 0, 2, 3, 5, 4])


def square(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A dense layer of 6 × 6 positive weights, frozen like those of compressed layers."""
    layer = nn.Linear(6, 6)
    layer.weight = nn.Parameter(OTHER.flip(0).to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(torch.zeros(6, dtype=dtype))
    return layer


def assert_same_layer(layer: Layer, dense: nn.Linear) -> None:
    """The weight is the dense one's, and the layer computes with it."""
    assert layer.weight.dtype == dense.weight.dtype
    assert bits(layer.weight) == bits(dense.weight)
    x = torch.randn(3, layer.weight.shape[1], dtype=dense.weight.dtype)
    assert bits(layer(x)) == bits(dense(x))


class Tied(nn.Module):
    """An embedding and a head with one weight, and a layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = embedding(48, 32)
        self.mid = linear(32, 32, seed=1)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.relu(self.mid(self.embed(ids))))
        return out


IDS = torch.arange(12).reshape(2, 6)


def tied() -> Any:
    """A compressed model with names and a tie."""
    model = Tied()
    compress_model(model)
    assert model.embed.weight_sfp is model.head.weight_sfp
    return model


# ---------------------------------------------------------------------------------------- writes that reach


def set_elements(layer: Layer) -> None:
    layer.weight[3] = 0
    layer.weight[:, 1:3] = OTHER[:, :2]
    layer.weight[ROWS > 2] = 1


def add_in_data(layer: Layer) -> None:
    layer.weight.data += 1


def multiply_in_place(layer: Layer) -> None:
    layer.weight *= 2


def exchange_data(layer: Layer) -> None:
    layer.weight.data = OTHER.to(layer.weight.dtype)


def exchange_data_for_another_dtype(layer: Layer) -> None:
    layer.weight.data = OTHER.double()
    layer.bias.data = layer.bias.data.double()


def write_twice(layer: Layer) -> None:
    weight = layer.weight
    weight.data.add_(1)
    weight.data = weight.data
    weight.mul_(2)


def write_to_rows(layer: Layer) -> None:
    for row in layer.weight:
        row.mul_(0.5)


def write_to_views(layer: Layer) -> None:
    layer.weight.T[0].zero_()
    layer.weight.view(-1)[7:9].fill_(3)
    layer.weight.detach().flatten().mul_(2)
    first, _ = layer.weight.chunk(2)
    first.neg_()


def give_as_out(layer: Layer) -> None:
    torch.add(OTHER.to(layer.weight.dtype), 1, out=layer.weight)
    torch.neg(OTHER[0].to(layer.weight.dtype), out=layer.weight[1])


def call_operators(layer: Layer) -> None:
    torch.ops.aten.add_(layer.weight, 1)
    torch.ops.aten.mul_.Scalar(layer.weight, 2)
    torch._foreach_add_([layer.weight, torch.zeros(2)], 1)


def renormalise(layer: Layer) -> None:
    F.embedding(torch.tensor([0, 4]), layer.weight, max_norm=1.0)


WRITES: list[Callable[[Layer], object]] = [
    lambda layer: layer.weight.mul_(2),
    lambda layer: layer.weight.copy_(OTHER),
    lambda layer: layer.weight.data.copy_(OTHER),
    lambda layer: layer.weight.clamp_(min=0.8).masked_fill_(OTHER > 1, 0),
    lambda layer: layer.weight.index_copy_(0, ROWS, OTHER.to(layer.weight.dtype)),
    lambda layer: layer.weight.index_put_((ROWS, ROWS), torch.zeros(6, dtype=layer.weight.dtype)),
    lambda layer: nn.init.normal_(layer.weight),
    lambda layer: nn.init.kaiming_uniform_(layer.weight),
    lambda layer: nn.init.orthogonal_(layer.weight),
    lambda layer: nn.init.sparse_(layer.weight, 0.5),
    lambda layer: layer.reset_parameters(),
    lambda layer: layer.weight.apply_(lambda value: value + 1),
    lambda layer: layer.weight.map_(OTHER, lambda value, other: value + other),
    set_elements,
    add_in_data,
    multiply_in_place,
    exchange_data,
    exchange_data_for_another_dtype,
    write_twice,
    write_to_rows,
    write_to_views,
    give_as_out,
    call_operators,
    renormalise,
]


@pytest.mark.parametrize("write", WRITES)
def test_a_write_has_the_same_result_as_on_the_dense_layer(write: Callable[[Layer], object]) -> None:
    dense, layer = square(), SfpLinear.of(square())
    for one in (dense, layer):
        torch.manual_seed(0)
        with torch.no_grad():
            write(one)
    assert_same_layer(layer, dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_writes_change_layers_of_other_dtypes(dtype: torch.dtype) -> None:
    dense, layer = square(dtype), SfpLinear.of(square(dtype))
    for one in (dense, layer):
        for write in (set_elements, add_in_data, write_to_views, give_as_out):
            write(one)
    assert_same_layer(layer, dense)


MASK = OTHER > 1
INDEX = ROWS[None].expand(6, 6)
ARGUMENTS: list[tuple[Any, ...]] = [
    *((), (2,), (0.5,), (OTHER,), (OTHER, OTHER), (0.2, 0.3), (MASK, 0.5), (0, ROWS, OTHER), (0, ROWS, 0.5)),
    *(
        (0, 1),
        (0, 1, 2),
        (MASK, OTHER),
        (ROWS, OTHER[0]),
        (2, 0, 1),
        (2, 0),
        (OTHER[0], OTHER[1]),
        (OTHER, 0.5),
    ),
    *(((6, 6), (6, 1)), (lambda value: 1.0,), (OTHER, lambda value, other: 1.0), ((ROWS, ROWS), OTHER[0])),
    *((0, INDEX, OTHER), (0, INDEX, 0.5), (0, INDEX, OTHER, "amax"), (0, ROWS, OTHER, "amax")),
]


def arguments_of(name: str) -> tuple[tuple[Any, ...], torch.Tensor] | None:
    """Arguments of an in-place method, and its result on the dense weight."""
    for arguments in ARGUMENTS:
        weight = square().weight.detach().clone()
        torch.default_generator.manual_seed(0)
        try:
            getattr(weight, name)(*arguments)
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue
        return arguments, weight
    return None


@pytest.mark.filterwarnings("ignore")  # of old methods, by torch
def test_every_in_place_method_of_torch_changes_the_layer_or_is_refused() -> None:
    names = [name for name in dir(torch.Tensor) if name.endswith("_") and not name.endswith("__")]
    called, refused = 0, set()
    for name in sorted(set(names) - {"requires_grad_"}):
        found = arguments_of(name)
        if found is None:
            continue
        called += 1
        layer = SfpLinear.of(square())
        torch.default_generator.manual_seed(0)
        try:
            getattr(layer.weight, name)(*found[0])
        except OptionError:
            refused.add(name)
        else:
            assert torch.equal(layer.weight.nan_to_num(), found[1].nan_to_num()), name
    assert called > 100
    moving = {"resize_", "set_", "t_", "transpose_", "swapaxes_", "swapdims_", "unsqueeze_", "share_memory_"}
    assert refused <= moving | {"squeeze_", "as_strided_", "resize_as_"}


STEPS = st.lists(
    st.tuples(st.sampled_from(["embed", "head"]), st.integers(0, 5), st.integers(0, 3)), max_size=8
)


@settings(max_examples=15)
@given(STEPS)
def test_a_sequence_of_writes_to_tied_layers_ends_like_in_the_dense_model(
    steps: list[tuple[str, int, int]],
) -> None:
    dense, model = Tied().requires_grad_(False), tied()
    held: list[Any] = []
    for name, kind, row in steps:
        for one in (dense, model):
            weight = getattr(one, name).weight
            if kind == 0:
                weight[row] = row
            elif kind == 1:
                weight.data[:, row].mul_(-2)
            elif kind == 2:
                weight.data = weight.data * 0.5
            elif kind == 3:
                weight.data += one.mid.weight[row].sum()
            elif kind == 4:
                getattr(one, name).load_state_dict({"weight": torch.full((48, 32), float(row))})
            else:
                held.append(weight)  # of memory that somebody has
    assert bits(model.embed.weight) == bits(model.head.weight) == bits(dense.head.weight)
    assert bits(model(IDS)) == bits(dense(IDS))


def test_a_write_to_a_quantised_weight_is_encoded_losslessly() -> None:
    layer = SfpLinear.of(linear(64, 64), Options(Uniform(bits=3.0)))
    wanted = layer.weight.clone()
    wanted[0] += 1e-3
    layer.weight.data[0] += 1e-3
    assert bits(layer.weight) == bits(wanted)


def test_writes_change_tied_layers_and_all_references_to_the_weight() -> None:
    model = tied()
    one, other = model.embed.weight, model.head.weight
    assert one.data_ptr() == other.data_ptr()
    one.data.mul_(2)
    assert bits(other) == bits(one) == bits(model.head.weight)
    assert model.embed.weight_sfp is model.head.weight_sfp
    copied = copy.deepcopy(model)
    copied.head.weight.zero_()
    assert not copied.embed.weight.any()
    assert bits(model.head.weight) == bits(one)


def test_writes_in_inference_mode_and_under_a_default_device_change_the_layer() -> None:
    layer = SfpLinear.of(square())
    with torch.inference_mode():
        layer.weight.mul_(2)
        layer.weight.data[0] = 0
    with torch.device("meta"):
        layer.weight.add_(1)
        assert not layer(torch.ones(1, 6, device="cpu")).is_meta
    dense = square()
    dense.weight.mul_(2)[0] = 0
    dense.weight.add_(1)
    assert_same_layer(layer, dense)


def test_writes_change_models_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer = SfpLinear.of(square())
    layer.weight.mul_(2)
    assert bits(layer.weight) == bits(square().weight * 2)


def test_writes_that_bypass_torch_functions_are_detected() -> None:
    layer = SfpLinear.of(square())
    with torch._C.DisableTorchFunctionSubclass():
        weight = layer.weight
        weight.mul_(2)
        weight.view(-1)[:2].zero_()
        torch.add(OTHER, 1, out=layer.weight[0:6])
    assert bits(layer.weight) == bits(OTHER + 1)


def test_a_parameter_created_from_the_weight_trains_like_the_dense_one() -> None:
    dense, layer = square(), SfpLinear.of(square())
    for one in (dense, layer):
        parameter = nn.Parameter(one.weight)
        assert isinstance(parameter, nn.Parameter)
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        (parameter * OTHER).sum().backward()
        optimizer.step()
    assert_same_layer(layer, dense)


def test_a_failed_write_leaves_the_layer_unchanged() -> None:
    def fail(value: float) -> float:
        if value < 1:
            raise ZeroDivisionError
        return 0.0

    layer = SfpLinear.of(square())
    with pytest.raises(ZeroDivisionError):
        layer.weight.apply_(fail)
    assert_same_layer(layer, square())


def test_writes_on_the_meta_device_change_nothing() -> None:
    layer = SfpLinear.of(square()).to("meta")
    layer.weight.mul_(2)
    assert layer.weight.is_meta
    assert layer.weight_sfp.is_meta


# -------------------------------------------------------------------------------------- writes refused


def retain(weight: torch.Tensor) -> None:
    weight.requires_grad = True


def give_gradient(weight: torch.Tensor) -> None:
    weight.grad = torch.zeros(32, 32)


REFUSED: list[tuple[str, Callable[[Any], object]]] = [
    ("decompress_model to train", lambda weight: weight.requires_grad_()),
    ("decompress_model to train", retain),
    ("decompress_model to train", give_gradient),
    ("decompress_model to train", lambda weight: torch.optim.SGD([weight], lr=0.1)),
    ("decompress_model to train", lambda weight: torch.optim.AdamW([{"params": [weight]}])),
    ("does not support gradients", lambda weight: weight.add_(torch.ones(32, 32, requires_grad=True))),
    ("does not support gradients", lambda weight: weight[0].add_(torch.ones(32, requires_grad=True))),
    (
        "does not support gradients",
        lambda weight: (
            weight.data.requires_grad_().mul(2).sum() + weight.mul_(torch.ones(1, requires_grad=True))
        ),
    ),
    ("would share memory", lambda weight: torch.utils.dlpack.from_dlpack(weight)),
    ("would share memory", lambda weight: weight.share_memory_()),
    ("change its shape", lambda weight: weight.t_()),
    ("change its shape", lambda weight: weight.unsqueeze_(0)),
    ("move its weight", lambda weight: weight.set_(torch.zeros(32, 32))),
    ("is a matrix", lambda weight: setattr(weight, "data", torch.zeros(3))),
    ("data of a view", lambda weight: setattr(weight[0], "data", torch.zeros(32))),
]


@pytest.mark.parametrize(("message", "write"), REFUSED)
def test_writes_that_cannot_change_the_layer_are_refused_with_its_name(
    message: str, write: Callable[[Any], object]
) -> None:
    model = tied()
    before = bits(model.mid.weight)
    with pytest.raises(OptionError, match=rf"layer 'mid' is compressed.*{message}"):
        write(model.mid.weight)
    assert bits(model.mid.weight) == before


def test_assignments_that_change_nothing_are_accepted() -> None:
    layer = SfpLinear.of(square())
    weight = layer.weight
    assert weight.requires_grad_(False) is weight
    weight.grad = None
    assert weight.grad is None
    assert not weight.requires_grad


def test_gradients_flow_to_values_written_through_data_like_in_the_dense_layer() -> None:
    change = torch.ones(6, 6, requires_grad=True)
    dense, layer = square(), SfpLinear.of(square())
    for one in (dense, layer):
        one.weight.data += change
    assert_same_layer(layer, dense)


def test_numpy_gets_a_read_only_view_of_the_weight() -> None:
    layer = SfpLinear.of(square())
    for array in (layer.weight.numpy(), np.asarray(layer.weight), layer.weight[1:].numpy()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    own = np.asarray(layer.weight).copy()
    own[:] = 0
    assert_same_layer(layer, square())


def test_other_tensors_cannot_be_set_to_its_memory() -> None:
    layer, dense = SfpLinear.of(square()), nn.Linear(6, 6)
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        dense.weight.data = layer.weight.data
    dense.weight.data = layer.weight.clone()
    assert bits(dense.weight) == bits(layer.weight)


def test_writes_that_bypass_torch_are_not_detected() -> None:
    layer = SfpLinear.of(square())
    weight = layer.weight
    weight.untyped_storage().fill_(0)  # as documented
    del weight
    assert_same_layer(layer, square())


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    stores: Any = torch.distributed  # torch's own types omit the stores
    store = stores.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_collectives_on_the_weight_are_refused_and_data_parallel_models_work() -> None:
    model, dense = tied(), Tied()
    with pytest.raises(OptionError, match="collectives cannot write"):
        torch.distributed.broadcast(model.mid.weight, 0)
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(IDS).square().sum().backward()
    dense(IDS).square().sum().backward()
    wanted = dense.mid.bias.grad
    assert wanted is not None
    assert torch.equal(model.mid.bias.grad, wanted)


def load_zeros(model: Any) -> None:
    model.mid.load_state_dict({"weight": torch.zeros(32, 32), "bias": torch.zeros(32)})


def damage(model: Any) -> None:
    model.mid.weight_sfp[200] ^= 1


@pytest.mark.parametrize("replace", [load_zeros, damage, nn.Module.double, decompress_model])
def test_a_reference_to_a_replaced_weight_can_be_read_but_not_written(
    replace: Callable[[Any], object],
) -> None:
    model = tied()
    weight, row = model.mid.weight, model.mid.weight[0]
    before = bits(weight)
    replace(model)
    state = bits(model.mid.state_dict()["weight"])
    assert bits(weight) == before
    for one in (row,) if replace is damage else (row, weight):
        with pytest.raises(OptionError, match="replaced after"):
            one.zero_()
    assert bits(model.mid.state_dict()["weight"]) == state


# ------------------------------------------------------------------------------------------------- set


def test_a_tensor_assigned_to_the_weight_is_encoded() -> None:
    layer = SfpLinear.of(square())
    layer.weight = OTHER
    assert bits(layer.weight) == bits(OTHER)
    layer.weight = layer.weight.T
    assert bits(layer.weight) == bits(OTHER.T)
    layer.weight = OTHER.double()
    assert layer.weight_dtype == torch.float64
    fresh = SfpLinear(6, 6)
    fresh.weight = OTHER
    assert bits(fresh(OTHER)) == bits(OTHER @ OTHER.T)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (nn.Parameter(torch.zeros(32, 32)), OptionError, "cannot be a Parameter.*decompress_model"),
        (nn.Parameter(torch.zeros(32, 32), requires_grad=False), OptionError, "cannot be a Parameter"),
        (torch.zeros(32, 32, requires_grad=True) * 1, OptionError, "does not support gradients"),
        (torch.zeros(32, 31), MismatchError, r"must have the shape \[32, 32\], not \[32, 31\]"),
        (torch.zeros(32), OptionError, "is a matrix"),
        (torch.zeros(32, 32, device="meta"), OptionError, "meta device"),
        (None, OptionError, "cannot be a NoneType"),
        (np.zeros((32, 32)), OptionError, "cannot be a ndarray"),
    ],
)
def test_invalid_values_for_the_weight_are_refused(
    value: object, error: type[Exception], message: str
) -> None:
    model = tied()
    before = bits(model.mid.weight)
    with pytest.raises(error, match=message):
        model.mid.weight = value
    with pytest.raises(OptionError, match="its weight cannot be deleted"):
        del model.mid.weight
    assert bits(model.mid.weight) == before


def test_a_weight_can_be_exchanged_and_restored() -> None:
    layer = SfpLinear.of(square())
    data, old = layer.weight_sfp, layer.weight
    layer.weight = OTHER
    assert bits(old) == bits(square().weight)
    layer.weight = old
    assert layer.weight_sfp is data
    old.mul_(2)
    assert bits(layer.weight) == bits(square().weight * 2)


def test_assigning_the_weight_of_another_compressed_layer_ties_them() -> None:
    model: Any = nn.ModuleDict({"embed": SfpEmbedding.of(embedding()), "head": SfpLinear(16, 60, bias=False)})
    model["head"].weight = model["embed"].weight
    assert model["head"].weight_sfp is model["embed"].weight_sfp
    model["head"].weight.mul_(2)
    assert bits(model["embed"].weight) == bits(embedding().weight * 2)
    dense = nn.Linear(16, 60, bias=False)
    dense.weight = model["embed"].weight  # a frozen Parameter to it
    model["embed"].weight.data += 1
    assert bits(dense(torch.ones(1, 16))) == bits(model["head"](torch.ones(1, 16)))
    copied: Any = copy.deepcopy(nn.ModuleList([dense, model]))
    assert bits(copied[0].weight) == bits(dense.weight)


def test_a_layer_does_not_train() -> None:
    model = tied()
    with pytest.raises(OptionError, match="layer 'mid' is compressed and its weight is frozen"):
        model.mid.requires_grad_()
    model.mid.requires_grad_(False)
    assert not model.mid.bias.requires_grad


def test_pruning_and_parametrising_by_torch_are_refused() -> None:
    model = tied()
    before, hooks = bits(model.mid.weight), dict(model.mid._forward_pre_hooks)
    with pytest.raises(OptionError, match=r"layer 'mid'.*decompress_model"):
        prune.l1_unstructured(model.mid, "weight", 0.5)
    with pytest.raises(OptionError, match="decompress_model"):
        prune.global_unstructured([(model.mid, "weight")], prune.L1Unstructured, amount=0.5)
    with pytest.raises(ValueError, match="does not have a parameter"):
        parametrize.register_parametrization(model.mid, "weight", nn.Identity())
    with pytest.raises(ValueError, match="does not have a parameter"):
        nn.utils.parametrizations.spectral_norm(model.mid)
    for old in (nn.utils.spectral_norm,):
        with pytest.raises(KeyError, match="weight"):
            old(model.mid)
    assert model.mid._forward_pre_hooks == hooks
    assert bits(model.mid.weight) == before


# ------------------------------------------------------------------------------------------- what is read


def test_shape_dtype_and_size_are_returned_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SfpLinear.of(linear(24, 40)).bfloat16()

    def decode(data: torch.Tensor) -> torch.Tensor:
        raise AssertionError("decoded")

    monkeypatch.setattr(packed, "decode", decode)
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device) == ((24, 40), torch.bfloat16, torch.device("cpu"))
    assert (weight.size(1), weight.dim(), len(weight), weight.numel(), weight.nbytes) == (
        40,
        2,
        24,
        960,
        1920,
    )
    assert (weight.stride(), weight.is_contiguous(), weight.is_cpu, weight.is_meta) == (
        (40, 1),
        True,
        True,
        False,
    )
    assert weight.is_floating_point()
    assert isinstance(weight, nn.Parameter)
    assert hasattr(SfpLinear(3, 4), "weight")
    with pytest.raises(AssertionError, match="decoded"):
        weight.sum()


def test_reading_operations_return_plain_tensors() -> None:
    layer, dense = SfpLinear.of(square()), square()
    x = torch.randn(2, 6, requires_grad=True)
    for found, wanted in [
        (x @ layer.weight.T, x @ dense.weight.T),
        (F.linear(x, layer.weight), F.linear(x, dense.weight)),
        (layer.weight + layer.weight, dense.weight + dense.weight),
        (torch.cat([layer.weight, x]), torch.cat([dense.weight, x])),
        (layer.weight.half(), dense.weight.half()),
        (layer.weight.clone(), dense.weight.clone()),
        (torch.linalg.svd(layer.weight)[1], torch.linalg.svd(dense.weight)[1]),
    ]:
        assert type(found) is torch.Tensor
        assert bits(found) == bits(wanted)
    assert repr(layer.weight) == repr(dense.weight.data)
    assert torch.equal(layer.weight, dense.weight)
    assert layer.weight.tolist() == dense.weight.tolist()
    assert isinstance(layer.weight.T, DecodedWeight)


def test_copies_and_pickles_of_the_weight_are_independent_plain_tensors() -> None:
    layer = SfpLinear.of(square())
    file = io.BytesIO()
    torch.save({"weight": layer.weight, "row": layer.weight[0]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded["row"]) is torch.Tensor
    for copied in (copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight)), loaded["weight"]):
        assert type(copied) is nn.Parameter
        copied.data.zero_()
    assert_same_layer(layer, square())


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_tracers_accept_the_weight() -> None:
    class Uses(nn.Module):
        def __init__(self, layer: SfpLinear) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = x @ self.layer.weight.T
            return out

    x, layer = torch.randn(2, 6), SfpLinear.of(square())
    module = Uses(layer)
    held = layer.weight  # decoded by others, which the tracer must not record
    assert bits(held) == bits(square().weight)
    wanted = bits(module(x))
    traced = torch.jit.trace(module, (x,))
    assert "sfpformat::decode" in str(traced.inlined_graph)
    assert bits(traced(x)) == wanted
    assert bits(torch.compile(module, fullgraph=True, backend="aot_eager")(x)) == wanted
    assert bits(torch.export.export(module, (x,)).module()(x)) == wanted
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        assert layer.weight.sum().shape == ()
    assert torch.func.grad(lambda x: module(x).sum())(x).shape == x.shape


def test_graphs_of_fx_call_the_layers() -> None:
    model = tied()
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["embed", "mid", "head"]
    assert bits(graph(IDS)) == bits(model(IDS))
    with pytest.raises(OptionError, match="cannot be traced by itself"):
        torch.fx.symbolic_trace(SfpLinear.of(square()))


# --------------------------------------------------------------------------------------------- state dicts


def test_a_dense_model_refuses_the_compressed_bytes_in_every_loading_mode() -> None:
    state = tied().state_dict()
    assert list(state) == list(Tied().state_dict())
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"size mismatch for mid\.weight"):
            Tied().load_state_dict(state, strict=strict)


@pytest.mark.parametrize("name", ["embed", "head"])
def test_one_name_of_a_tied_weight_loads_all_layers(name: str) -> None:
    model, dense, wanted = tied(), Tied(), torch.randn(48, 32)
    for one in (model, dense):
        found = one.load_state_dict({f"{name}.weight": wanted}, strict=False)
        assert not found.unexpected_keys
        assert bits(one.embed.weight) == bits(one.head.weight) == bits(wanted)
    assert model.embed.weight_sfp is model.head.weight_sfp


def test_functional_call_accepts_a_dense_or_compressed_state() -> None:
    model, other = tied(), Tied()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    before, wanted = bits(model(IDS)), bits(other(IDS))
    call = torch.func.functional_call
    assert bits(call(model, model.state_dict(), (IDS,))) == before
    dense = {name: weight.detach() for name, weight in other.state_dict().items()}
    assert bits(call(model, dense, (IDS,))) == wanted
    compress_model(other)
    assert bits(call(model, other.state_dict(), (IDS,))) == wanted
    assert bits(model(IDS)) == before
    assert model.embed.weight_sfp is model.head.weight_sfp
    with pytest.raises(OptionError, match="does not support gradients"):
        torch.func.grad(lambda given: call(model, given, (IDS,)).sum())(dense)
    with pytest.raises(OptionError, match="cannot be a Parameter"):
        call(model, dict(Tied().named_parameters()), (IDS,))
    assert bits(model(IDS)) == before


def test_averaged_models_contain_the_weights() -> None:
    model = tied()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert bits(averaged(IDS)) == bits(model(IDS))
    model.mid.weight.mul_(0)  # fewer bytes
    with pytest.raises(RuntimeError, match="size"):
        averaged.update_parameters(model)


# ---------------------------------------------------------------------------------------------- dense again


def test_decompressing_a_part_also_decompresses_the_layers_tied_to_it() -> None:
    model = tied()
    decompress_model(model.head)
    assert type(model.embed) is nn.Embedding
    assert model.embed.weight is model.head.weight
    assert type(model.mid) is SfpLinear
    assert bits(model(IDS)) == bits(Tied()(IDS))


def test_freed_layers_hold_no_bytes() -> None:
    layer = SfpLinear.of(square())
    data = layer.weight_sfp
    assert holders_of(data) == [layer]
    other = copy.copy(layer)
    other.weight.mul_(2)
    assert bits(layer.weight) == bits(other.weight)
    decompress_model(other)
    assert holders_of(data) == []
