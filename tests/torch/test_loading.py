"""`load_model` against the loaders that it replaces: it accepts the same files and modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from sfpformat import MismatchError, OptionError, SfpWarning
from sfpformat.torch import compress_model, load_model, save_file, save_model
from sfpformat.torch.name_hints import hint

Tensors = dict[str, torch.Tensor]
Make = Callable[[], nn.Module]


class Scalar(nn.Module):
    """A module with a scalar, a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("count", torch.tensor(2))


class Places(nn.Module):
    """A module whose positions are in files of earlier versions."""

    position_ids: torch.Tensor

    def __init__(self, positions: torch.Tensor | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        positions = torch.arange(8)[None] if positions is None else positions
        self.register_buffer("position_ids", positions, persistent=False)


def by_torch(model: nn.Module, tensors: Tensors, path: Path) -> None:
    """Loads with ``torch.load`` and ``load_state_dict``."""
    model.load_state_dict(tensors)


def by_safetensors(model: nn.Module, tensors: Tensors, path: Path) -> None:
    safetensors.torch.save_file(tensors, path)
    safetensors.torch.load_model(model, path)


def by_sfp(model: nn.Module, tensors: Tensors, path: Path) -> None:
    save_file(tensors, path)
    assert load_model(model, path) == ([], [])


def tensors_of(model: nn.Module, *without: str, **other: torch.Tensor) -> Tensors:
    """A plain copy of a module's tensors, without some and with others."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in {**state, **other}.items() if name not in without}


def hooked(make: Make) -> Make:
    """The same module, with custom loading methods."""

    def made() -> nn.Module:
        model = make()
        model.register_load_state_dict_pre_hook(lambda *_: None)
        return model

    return made


def norm() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(4), nn.SyncBatchNorm(4))


TAKEN: dict[str, tuple[Make, Tensors]] = {
    "no counters": (norm, tensors_of(norm(), "0.num_batches_tracked", "1.num_batches_tracked")),
    "vector for scalar": (
        Scalar,
        tensors_of(Scalar(), scale=torch.tensor([5.0]), count=torch.tensor([5])),
    ),
    "other dtypes": (
        Scalar,
        tensors_of(Scalar(), scale=torch.tensor(5, dtype=torch.bfloat16), count=torch.tensor(5).int()),
    ),
    "instance norm": (
        lambda: nn.InstanceNorm1d(4, affine=True),
        tensors_of(nn.InstanceNorm1d(4, affine=True)),
    ),
}


@pytest.mark.parametrize("load", [by_torch, by_safetensors, by_sfp])
@pytest.mark.parametrize("own_way", [False, True])
@pytest.mark.parametrize("case", TAKEN)
def test_all_loaders_load_the_same_tensors(
    load: Callable[..., None], own_way: bool, case: str, tmp_path: Path
) -> None:
    make, tensors = TAKEN[case]
    model = (hooked(make) if own_way else make)()
    before = tensors_of(model)
    load(model, tensors, tmp_path / "m")
    for name, tensor in model.state_dict().items():
        wanted = tensors.get(name, before[name]).to(tensor.dtype).reshape(tensor.shape)
        assert torch.equal(tensor, wanted), name


@pytest.mark.parametrize("own_way", [False, True])
@pytest.mark.parametrize("case", TAKEN)
def test_a_model_on_the_meta_device_loads_the_same_tensors(own_way: bool, case: str, tmp_path: Path) -> None:
    make, tensors = TAKEN[case]
    with torch.device("meta"):
        model = (hooked(make) if own_way else make)()
    before = tensors_of(make())
    by_sfp(model, tensors, tmp_path / "m")
    for name, tensor in model.state_dict().items():
        wanted = tensors.get(name, before[name])
        assert torch.equal(tensor, wanted.to(tensor.dtype).reshape(tensor.shape)), name
        assert tensor.dtype == before[name].dtype


REFUSED: dict[str, tuple[Make, Tensors]] = {
    "two elements for a scalar": (Scalar, tensors_of(Scalar(), scale=torch.ones(2))),
    "a matrix for a scalar": (Scalar, tensors_of(Scalar(), scale=torch.ones(1, 1))),
    "a scalar for a vector": (lambda: nn.Linear(3, 1), tensors_of(nn.Linear(3, 1), bias=torch.tensor(1.0))),
    "no running mean": (norm, tensors_of(norm(), "0.running_mean")),
    "one too many": (Scalar, tensors_of(Scalar(), more=torch.ones(1))),
}


@pytest.mark.parametrize("load", [by_torch, by_safetensors, by_sfp])
@pytest.mark.parametrize("own_way", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_all_loaders_refuse_what_does_not_fit(
    load: Callable[..., None], own_way: bool, case: str, tmp_path: Path
) -> None:
    make, tensors = REFUSED[case]
    model = (hooked(make) if own_way else make)()
    with pytest.raises(MismatchError if load is by_sfp else RuntimeError):
        load(model, tensors, tmp_path / "m")


class NoSpace(torch.Tensor):
    """A tensor that has no memory left for a copy."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    ("held", "error"),
    [(torch.zeros(1).expand(3), MismatchError), (NoSpace(3), torch.cuda.OutOfMemoryError)],
)
def test_a_tensor_without_writable_memory_and_full_memory_raise_different_errors(
    held: torch.Tensor, error: type[Exception], tmp_path: Path
) -> None:
    model = nn.Module()
    model.register_buffer("w", held)
    save_file({"w": torch.ones(3)}, tmp_path / "m")
    with pytest.raises(error):
        load_model(model, tmp_path / "m")


@pytest.mark.parametrize("own_way", [False, True])
@pytest.mark.parametrize(
    ("stored", "held", "lost"),
    [
        (torch.tensor([1.0, 1e6]), torch.float16, True),
        (torch.tensor([1.0, float("inf"), float("nan")]), torch.float16, False),
        (torch.tensor([float("inf"), -1e6]), torch.float16, True),
        (torch.tensor([float("inf"), float("nan")]), torch.float16, False),
        (torch.tensor([65519.0, -65519.0]), torch.float16, False),  # rounded to the greatest
        (torch.tensor([1.0, -65521.0]), torch.float16, True),
        (torch.zeros(0), torch.float16, False),
        (torch.tensor([1.0, 1 / 3]), torch.bfloat16, False),  # rounded, as by torch
        (torch.tensor([1.0, 1e300], dtype=torch.float64), torch.float32, True),
        (torch.tensor([70000, 1]), torch.float16, True),
        (torch.tensor([300, 1]), torch.int8, True),
        (torch.tensor([100, 1]), torch.int8, False),
        (torch.tensor([0.5, 1]), torch.int64, True),
        (torch.tensor([2.0, 1]), torch.int64, False),
        (torch.tensor([2.0, 1]).to(torch.float8_e5m2), torch.bool, True),
        (torch.tensor([40000.0, 1]).to(torch.float8_e5m2), torch.float8_e4m3fn, True),
    ],
)
def test_numbers_that_the_modules_dtype_cannot_hold_warn(
    stored: torch.Tensor, held: torch.dtype, lost: bool, own_way: bool, tmp_path: Path
) -> None:
    def make() -> nn.Module:
        model = nn.Module()
        model.register_buffer("w", torch.zeros(stored.shape).to(held))
        return model

    save_file({"w": stored}, tmp_path / "m")
    for meta in (False, True):
        model = (hooked(make) if own_way else make)().to("meta" if meta else "cpu")
        if lost:
            with pytest.warns(SfpWarning, match="dtype cannot represent all values of 'w'") as told:
                load_model(model, tmp_path / "m")
            assert told[0].filename == __file__
        else:
            load_model(model, tmp_path / "m")
        assert torch.equal(model.get_buffer("w").float(), stored.to(held).float()) or stored.isnan().any()


# --------------------------------------------------------------------------------------------------- lazy


def lazy_net() -> nn.Module:
    return nn.Sequential(nn.LazyConv1d(6, 3), nn.LazyBatchNorm1d(), nn.Flatten(), nn.LazyLinear(5))


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("load", [by_torch, by_sfp])
def test_lazy_modules_get_their_shapes_from_the_file(
    load: Callable[..., None], meta: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = lazy_net(), torch.randn(4, 2, 8)
    model(x)
    model.eval()
    with torch.device("meta" if meta and load is by_sfp else "cpu"):
        other = lazy_net().eval()
    load(other, tensors_of(model), tmp_path / "m")
    assert torch.equal(other(x), model(x))
    assert type(other.get_submodule("3")) is nn.Linear


def test_lazy_modules_that_have_their_shapes_refuse_others(tmp_path: Path) -> None:
    model = nn.LazyLinear(5)
    model(torch.ones(1, 4))
    save_file(tensors_of(nn.Linear(7, 5)), tmp_path / "m")
    with pytest.raises(MismatchError, match="weight"):
        load_model(model, tmp_path / "m")


def test_a_lazy_module_is_compressed_once_it_has_a_shape(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyLinear(64))
    with pytest.raises(OptionError, match=r"'0.weight' has no shape yet because it belongs to a lazy module"):
        compress_model(model)
    with pytest.raises(OptionError, match=r"'0.weight' has no shape yet because it belongs to a lazy module"):
        save_model(model, tmp_path / "m")
    save_model(nn.Sequential(nn.Linear(64, 64)), tmp_path / "m")
    load_model(model, tmp_path / "m")
    model(torch.ones(1, 64))
    assert compress_model(model).layers == ("0",)


# --------------------------------------------------------------------------- buffers that were in files once


@pytest.mark.parametrize("own_way", [False, True])
def test_a_non_persistent_buffer_in_a_file_is_not_unexpected(
    own_way: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    make = hooked(Places) if own_way else Places
    save_file(tensors_of(Places(), position_ids=torch.arange(8)[None]), tmp_path / "m")
    assert load_model(make(), tmp_path / "m") == ([], ["position_ids"])
    assert load_model(make(), tmp_path / "m", strict=False) == ([], ["position_ids"])
    assert not recwarn.list


@pytest.mark.parametrize("positions", [torch.arange(9)[None], torch.arange(1, 9)[None]])
@pytest.mark.parametrize("fill", [load_model, compress_model])
def test_a_computed_buffer_stays_and_different_numbers_in_the_file_warn(
    fill: Callable[..., object], positions: torch.Tensor, tmp_path: Path
) -> None:
    save_file(tensors_of(Places(), position_ids=positions), tmp_path / "m")
    model = Places()
    with pytest.warns(SfpWarning, match="other values for 'position_ids' than the module") as told:
        fill(model, tmp_path / "m")
    assert told[0].filename == __file__
    assert torch.equal(model.position_ids, torch.arange(8)[None])


def test_an_old_bert_file_loads_like_in_transformers(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.BertModel(config)
    tensors = tensors_of(model, **{"embeddings.position_ids": model.embeddings.position_ids})
    save_file(tensors, tmp_path / "m")
    other = transformers.BertModel(config)
    assert load_model(other, tmp_path / "m") == ([], ["embeddings.position_ids"])
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in other.state_dict().items())


# -------------------------------------------------------------------------------------------------- messages


def test_a_message_about_names_is_shortened_and_the_error_has_all_names(tmp_path: Path) -> None:
    deep = nn.Sequential(*[nn.Linear(2, 2) for _ in range(600)])
    save_model(deep, tmp_path / "m")
    other = nn.ModuleDict({f"block{k}": nn.Linear(2, 2) for k in range(600)})
    for model in (other, hooked(lambda: other)()):
        with pytest.raises(MismatchError) as told:
            load_model(model, tmp_path / "m")
        assert len(str(told.value)) < 1000
        assert "and 1,190 more" in str(told.value)
        assert len(told.value.missing) == len(told.value.unexpected) == 1200


@pytest.mark.parametrize("own_way", [False, True])
def test_a_message_about_shapes_is_shortened(own_way: bool, tmp_path: Path) -> None:
    save_model(nn.Sequential(*[nn.Linear(2, 2) for _ in range(600)]), tmp_path / "m")
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(600)])
    if own_way:
        model.register_load_state_dict_pre_hook(lambda *_: None)
    with pytest.raises(MismatchError, match=r"and 1,1\d\d more") as told:
        load_model(model, tmp_path / "m")
    assert len(str(told.value)) < 3000


@pytest.mark.parametrize("fill", [load_model, compress_model])
def test_the_state_of_a_compressed_model_is_recognised(fill: Callable[..., object], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    compress_model(model)
    save_file(dict(model.state_dict()), tmp_path / "m")
    words = (
        r"'0\.weight' is \[\d+\] in the file, \[64, 64\].* compressed model; write the model with save_model"
    )
    with pytest.raises(MismatchError, match=words):
        fill(nn.Sequential(nn.Linear(64, 64)), tmp_path / "m")
    save_file({"0.weight": torch.ones(3), "0.bias": torch.ones(64)}, tmp_path / "n")
    with pytest.raises(MismatchError, match=r"\[64, 64\] in the module$"):
        fill(nn.Sequential(nn.Linear(64, 64)), tmp_path / "n")


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4))


def compiled() -> Any:
    return torch.compile(linear())


def compiled_inside() -> nn.Module:
    inside: Any = torch.compile(nn.Linear(4, 4))
    return nn.Sequential(inside)


def in_parallel() -> nn.Module:
    return nn.DataParallel(linear())


def pruned_by_torch() -> nn.Module:
    model = linear()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def parametrised() -> nn.Module:
    model = linear()
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    return model


def normed() -> nn.Module:
    model = linear()
    parametrizations.weight_norm(model[0])
    return model


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")  # torch.compile imports what warns
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (compiled, "torch.compile adds it"),
        (compiled_inside, "torch.compile adds it"),
        (in_parallel, "DistributedDataParallel add it"),
        (pruned_by_torch, "call sfpformat.pruning.take_masks"),
        (parametrised, "remove_parametrizations"),
        (normed, "remove_parametrizations"),
        (lambda: nn.ModuleDict({"model": linear()}), "start with 'model.'"),
    ],
)
def test_names_that_a_library_changed_are_recognised_in_file_and_module(
    make: Make, words: str, tmp_path: Path
) -> None:
    plain, changed = linear(), make()
    save_file(tensors_of(changed), tmp_path / "changed")
    save_file(tensors_of(plain), tmp_path / "plain")
    with pytest.raises(MismatchError, match=f"names in the file .*{words}"):
        load_model(plain, tmp_path / "changed")
    with pytest.raises(MismatchError, match=f"names in the module .*{words}"):
        load_model(changed, tmp_path / "plain")
    with pytest.raises(MismatchError, match=f"names in the file .*{words}"):
        compress_model(plain, tmp_path / "changed")


@pytest.mark.parametrize(
    ("missing", "unexpected", "words"),
    [
        (["fc.weight"], ["base_model.model.fc.weight"], "peft adds it"),
        (["fc.weight"], ["fc.base_layer.weight"], "peft adds it"),
        (["fc.weight"], ["_fsdp_wrapped_module.fc.weight"], "FSDP adds it"),
        (["fc.weight"], ["fc.weight_g", "fc.weight_v"], "remove_weight_norm"),
        (["fc.weight"], ["encoder.fc.weight"], "start with 'encoder.'"),
        (["fc.weight"], ["other"], "^$"),
        (["fc.weight"], [], "^$"),
        ([], [], "^$"),
    ],
)
def test_messages_suggest_the_reason_that_the_names_show(
    missing: list[str], unexpected: list[str], words: str
) -> None:
    import re

    assert re.search(words, hint(missing, unexpected))
