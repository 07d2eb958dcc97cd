"""Tensors without their own memory: freed, truncated, wrappers. Each is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sfpformat import MismatchError, OptionError, Options
from sfpformat.torch import (
    SfpEmbedding,
    SfpLinear,
    compress_model,
    load,
    load_file,
    load_model,
    safe_open,
    save,
    save_file,
    save_model,
)

from .test_files import pruned

OUTSIDE = "memory and needs"


class Wrapper(torch.Tensor):
    """A tensor that only wraps another one, as in quantisation libraries."""

    wrapped: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.wrapped = inner
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch does not declare the class method
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].wrapped)
        raise NotImplementedError(f"{function} of a wrapper")


class Named(torch.Tensor):
    """A tensor with memory and a class of its own, without operators of its own."""


def freed(*shape: int) -> torch.Tensor:
    """A tensor whose memory was freed, as FSDP does between calls."""
    tensor = pruned(*shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def cut(*shape: int) -> torch.Tensor:
    """A tensor that ends beyond its memory."""
    tensor = pruned(*shape)
    tensor.untyped_storage().resize_(tensor.nbytes - 4)
    return tensor


def shifted(*shape: int) -> torch.Tensor:
    """A view that begins inside of memory and ends beyond it."""
    base = pruned(*shape, 2).reshape(-1)
    view = base.as_strided(shape, pruned(*shape).stride(), pruned(*shape).numel())
    base.untyped_storage().resize_(base.nbytes - 4)
    return view


def freed_sparse(*shape: int) -> torch.Tensor:
    """A sparse tensor whose values were freed."""
    tensor = pruned(*shape).to_sparse()
    tensor._values().untyped_storage().resize_(0)
    return tensor


FREED = pytest.mark.parametrize("made", [freed, cut, shifted])


def model_of(weight: torch.Tensor) -> nn.Sequential:
    """A linear layer inside a module, with that weight."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


# ------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("made", [freed, cut, shifted, freed_sparse])
def test_tensors_without_memory_are_refused(made: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"^tensor 'w': has .* {OUTSIDE}"):
        save_file({"v": pruned(2, 2), "w": made(30, 40)}, tmp_path / "m")
    with pytest.raises(OptionError, match=f"^mask of 'w': has .* {OUTSIDE}|must be bool"):
        save({"w": pruned(30, 40)}, masks={"w": made(30, 40)})
    with pytest.raises(OptionError, match=f"^importance of 'w': has .* {OUTSIDE}"):
        save({"w": pruned(30, 40)}, importances={"w": made(30, 40)})
    assert not list(tmp_path.iterdir())


@FREED
def test_models_with_tensors_without_memory_are_refused(
    made: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    model = model_of(made(30, 40))
    with pytest.raises(OptionError, match=f"^tensor '0.weight': has .* {OUTSIDE}"):
        save_model(model, tmp_path / "m")
    with pytest.raises(OptionError, match=f"'0.weight' cannot be compressed: .* {OUTSIDE}"):
        compress_model(model)
    assert type(model[0]) is nn.Linear
    with pytest.raises(OptionError, match=OUTSIDE):
        SfpLinear.of(model[0])
    with pytest.raises(OptionError, match=OUTSIDE):
        SfpEmbedding.of(nn.Embedding(30, 40, _weight=made(30, 40)))


def test_a_layer_refuses_freed_bytes(tmp_path: Path) -> None:
    layer = SfpLinear.of(nn.Linear(40, 30))
    state = layer.state_dict()
    name = next(name for name in state if name.startswith("weight"))
    state[name] = state[name].clone()
    state[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=OUTSIDE):
        SfpLinear(40, 30).load_state_dict(state)
    layer.weight_sfp = layer.weight_sfp.clone()
    layer.weight_sfp.untyped_storage().resize_(0)
    with pytest.raises(OptionError, match=OUTSIDE):
        save_model(layer, tmp_path / "m")
    with pytest.raises(OptionError, match=OUTSIDE):
        layer(torch.ones(1, 40))


def test_views_that_end_with_their_memory_are_written() -> None:
    base = pruned(30, 40)
    tensors = {"turned": base.t(), "last": base[-1].clone()[-3:], "none": pruned(0, 3)}
    tensors["none"].untyped_storage().resize_(0)
    loaded = load(save(tensors))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


# ------------------------------------------------------------------------------------------------- loading


@FREED
def test_loading_into_tensors_without_memory_is_refused(
    made: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    save_model(model_of(pruned(30, 40) + 1), tmp_path / "m")
    model = model_of(made(30, 40))
    before = model.get_parameter("0.bias").clone()
    for strict in (True, False):
        with pytest.raises(OptionError, match=f"^'0.weight' of the module has .* {OUTSIDE}"):
            load_model(model, tmp_path / "m", strict=strict)
    with pytest.raises(OptionError, match=f"^'0.weight' of the module has .* {OUTSIDE}"):
        compress_model(model, tmp_path / "m")
    hooked = model_of(made(30, 40))
    hooked.register_load_state_dict_pre_hook(lambda *_: None)
    with pytest.raises(OptionError, match=f"^'0.weight' of the module has .* {OUTSIDE}"):
        load_model(hooked, tmp_path / "m")
    assert torch.equal(model.get_parameter("0.bias"), before)


# ------------------------------------------------------------------------------------------ other tensors


def nested() -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: Wrapper(torch.ones(3)), "is a Wrapper, which wraps other tensors"),
        (nested, "is a nested tensor; pass its values and offsets"),
        (lambda: nn.LazyLinear(3).weight, "has no shape yet because it belongs to a lazy module"),
        (lambda: torch.zeros(3, dtype=torch.bits8), "the format does not support the dtype"),
    ],
    ids=["wrapper", "jagged", "lazy", "dtype"],
)
def test_wrapper_tensors_are_refused_by_name(
    made: Callable[[], torch.Tensor], words: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=f"^tensor 'w': .*{words}"):
        save_file({"v": torch.ones(1), "w": made()}, tmp_path / "m")
    model = nn.Module()
    model.register_buffer("w", made())
    with pytest.raises(OptionError, match=f"'w':? .*{words}"):
        save_model(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_quantised_nested_and_strided_tensors_of_torch_are_refused_by_name() -> None:
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    with pytest.raises(OptionError, match=r"^tensor 'w': is quantised by torch; pass its dequantize"):
        save({"w": quantised})
    with pytest.raises(OptionError, match=r"^tensor 'w': is a nested tensor"):
        save({"w": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])})


def test_a_distributed_tensor_is_refused_by_name(tmp_path: Path) -> None:
    class Distributed(Wrapper):  # the attribute that identifies a DTensor; a real one needs a process group
        def full_tensor(self) -> torch.Tensor:
            return self.wrapped

    model = nn.Module()
    model.register_parameter("w", nn.Parameter(Distributed(torch.ones(3)), requires_grad=False))
    with pytest.raises(
        OptionError, match=r"^tensor 'w': is a distributed DTensor.* pass its full_tensor\(\)"
    ):
        save_model(model, tmp_path / "m")
    save_file({"w": torch.ones(3)}, tmp_path / "n")
    with pytest.raises(OptionError, match=r"^'w' of the module is a distributed DTensor"):
        load_model(model, tmp_path / "n")


def test_a_module_with_a_wrapper_that_cannot_be_written_to_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "m")
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(Wrapper(torch.ones(3)), requires_grad=False))
    with pytest.raises(MismatchError, match=r"cannot be written to 'w' of the module, a Wrapper: "):
        load_model(model, tmp_path / "m")


def test_a_tensor_inside_of_a_transform_is_refused() -> None:
    def inside(w: torch.Tensor) -> torch.Tensor:
        with pytest.raises(OptionError, match=r"^tensor 'w': torch cannot read its values"):
            save({"w": w})
        return w

    torch.func.vmap(inside)(torch.ones(2, 3))


def test_subclasses_buffers_and_other_layouts_are_written() -> None:
    w = pruned(30, 40)
    tensors = {
        "named": w.clone().as_subclass(Named),
        "buffer": nn.Buffer(w + 1) if hasattr(nn, "Buffer") else w + 1,
        "parameter": nn.Parameter(w + 2),
        "opaque": (w + 3).to_mkldnn(),
    }
    loaded = load(save(tensors, options=Options(coding="raw")))
    for k, name in enumerate(tensors):
        assert torch.equal(loaded[name], w + k), name


# ------------------------------------------------------------------------------------------------ devices


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", 0, torch.device("cuda", 1)])
def test_every_function_refuses_a_missing_device(device: str | int | torch.device, tmp_path: Path) -> None:
    save_model(nn.Linear(3, 4), tmp_path / "m")
    functions: list[Callable[[], object]] = [
        lambda: load_file(tmp_path / "m", device=device),
        lambda: safe_open(tmp_path / "m", device=device),
        lambda: load_model(nn.Linear(3, 4), tmp_path / "m", device=device),
        lambda: compress_model(nn.Linear(3, 4), tmp_path / "m", device=device),
        lambda: SfpLinear(3, 4, device=device),
        lambda: SfpEmbedding(3, 4, device=device),
    ]
    for function in functions:
        with pytest.raises(OptionError, match=r"^device .*cuda.*: torch finds no CUDA devices|^device 0: "):
            function()


@pytest.mark.parametrize("device", ["gpu", "cuda:x", 1.5])
def test_an_invalid_device_is_refused(device: Any) -> None:
    with pytest.raises(OptionError, match=f"^device {device!r}: "):
        safe_open(save({"w": torch.ones(1)}), device=device)


def test_a_device_without_a_backend_is_refused() -> None:
    with pytest.raises(OptionError, match=r"^device 'xla' cannot be used: "):
        safe_open(save({"w": torch.ones(1)}), device="xla")
