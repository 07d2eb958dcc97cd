"""SGLang's hook: with a stub of its registry, and with its own registry where SGLang is installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sfpformat import MismatchError, OptionError, SfpWarning
from sfpformat.serving import register_sglang_hook
from sfpformat.serving.sglang import TARGET
from sfpformat.torch import save_file
from sfpformat.torch.lazy_tensor import LazyTensor

from ..support.signatures import parameters

REGISTRY = "sglang.srt.plugins.hook_registry"
MODULE, KIND, METHOD = TARGET.rsplit(".", 2)


def sglang_folder() -> Path | None:
    """The folder of SGLang's source, without importing it."""
    found = find_spec("sglang")
    places = [] if found is None else list(found.submodule_search_locations or ())
    return Path(places[0]) if places else None


SGLANG = sglang_folder()
needs_sglang = pytest.mark.skipif(SGLANG is None, reason="SGLang is not installed")


class HookType(Enum):
    """As in SGLang 0.5.23; the others are not used."""

    AROUND = "around"


class HookRegistry:
    """As in SGLang 0.5.23."""

    @classmethod
    def register(cls, target: str, hook: Any, hook_type: HookType, *, source: Any = None) -> None:
        """Registers, and applies at once; SGLang applies hooks after all plug-ins."""
        assert hook_type is HookType.AROUND
        module, kind, method = target.rsplit(".", 2)
        owner = getattr(sys.modules[module], kind)
        original = getattr(owner, method)

        def around(*args: Any, **kwargs: Any) -> Any:
            return hook(original, *args, **kwargs)

        is_static = isinstance(owner.__dict__[method], staticmethod)
        setattr(owner, method, staticmethod(around) if is_static else around)

    @classmethod
    def apply_hooks(cls) -> None:
        """Nothing is left to do."""


@pytest.fixture(params=[False, pytest.param(True, marks=needs_sglang)])
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's loader, with the hook."""

    class DefaultModelLoader:
        def _get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
            yield "other", torch.ones(1)

        @staticmethod
        def load_weights_only(model: Any, weights: Any, target_device: torch.device) -> None:
            model.load_weights(weights)

    module = ModuleType(MODULE)
    module.__dict__[KIND] = DefaultModelLoader
    names = ("sglang", "sglang.srt", "sglang.srt.plugins", "sglang.srt.model_loader")
    for name, made in {**{name: ModuleType(name) for name in names}, MODULE: module}.items():
        made.__path__ = []
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setattr(sys.modules["sglang.srt.model_loader"], "loader", module, raising=False)
    if request.param:
        assert SGLANG is not None
        path = SGLANG / "srt" / "plugins" / "hook_registry.py"
        spec = importlib.util.spec_from_file_location(REGISTRY, path)
        assert spec is not None
        assert spec.loader is not None
        registry = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, REGISTRY, registry)
        spec.loader.exec_module(registry)
    else:
        registry = ModuleType(REGISTRY)
        registry.__dict__.update(HookRegistry=HookRegistry, HookType=HookType)
        monkeypatch.setitem(sys.modules, REGISTRY, registry)
    register_sglang_hook()
    registry.HookRegistry.apply_hooks()
    return DefaultModelLoader()


def model_config(path: Path) -> Any:
    return SimpleNamespace(model_path=str(path))


def test_a_folder_with_a_file_yields_lazy_tensors(loader: Any, tmp_path: Path) -> None:
    weight = torch.arange(64.0).reshape(8, 8)
    save_file({"w": weight}, tmp_path / "model.sfp")
    for source in (tmp_path, tmp_path / "model.sfp"):
        for name, tensor in loader._get_all_weights(model_config(source), torch.nn.Module()):
            assert name == "w"
            assert type(tensor) is LazyTensor
            assert torch.equal(tensor.narrow(1, 4, 4).clone(), weight[:, 4:])


def test_other_models_load_as_before(loader: Any, tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    for name in ("model.safetensors", "model.sfp"):
        (tmp_path / "both" / name).touch()
    for source in (tmp_path, tmp_path / "both", Path("team/small")):
        found = list(loader._get_all_weights(model_config(source), torch.nn.Module()))
        assert [name for name, _ in found] == ["other"]


def test_unused_tensors_are_a_warning_and_further_sources_an_error(loader: Any, tmp_path: Path) -> None:
    save_file({"w": torch.ones(4), "x": torch.ones(2)}, tmp_path / "model.sfp")
    model: Any = torch.nn.Module()
    found = loader._get_all_weights(model_config(tmp_path), model)
    next(found)[1].clone()
    next(found)
    with pytest.warns(SfpWarning, match=r"Module does not use tensors of .*: 'x'"):
        next(found, None)
    model.secondary_weights = ["team/audio"]
    with pytest.raises(OptionError, match="several sources"):
        next(loader._get_all_weights(model_config(tmp_path), model))


class Model(torch.nn.Module):
    """Query, key and value in one layer, an output head, and scales that have defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(4, 12)
        self.qkv.__dict__["output_partition_sizes"] = [4, 4, 4]
        self.head = torch.nn.Linear(4, 8, bias=False)
        self.head.__dict__["org_vocab_size"] = 8
        self.k_scale = torch.nn.Parameter(torch.ones(1))
        for layer in (self.qkv, self.head):
            layer.__dict__["quant_method"] = object()

    ignored: frozenset[str] | set[str] = frozenset()

    def load_weights(self, weights: Any) -> None:
        """Fills the layers."""
        with torch.no_grad():
            for name, tensor in list(weights):  # some models keep the tensors
                if name in self.ignored:
                    continue
                layer, _, part = name.partition(".")
                start = 4 * int(part or 0)
                getattr(self, layer).weight[start : start + len(tensor)] = tensor
                if layer == "qkv":
                    self.qkv.bias.zero_()


def test_linear_layers_without_values_are_an_error_and_heads_a_warning(loader: Any, tmp_path: Path) -> None:
    weights = {name: torch.rand(4, 4) for name in ("qkv.0", "qkv.1", "qkv.2")} | {"head": torch.rand(8, 4)}

    def load(model: Model, *without: str) -> Model:
        save_file({name: one for name, one in weights.items() if name not in without}, tmp_path / "m.sfp")
        found = loader._get_all_weights(model_config(tmp_path), model)
        loader.load_weights_only(model, found, torch.device("cpu"))
        return model

    model = load(Model())
    assert torch.equal(model.qkv.weight, torch.cat([weights[f"qkv.{n}"] for n in range(3)]))
    assert model.k_scale.tolist() == [1]
    with pytest.raises(MismatchError, match=r"parameters of Model: 'qkv\.weight, rows 8 to 12'$") as error:
        load(Model(), "qkv.2", "head")
    assert error.value.missing == ("qkv.weight, rows 8 to 12",)
    with pytest.warns(SfpWarning, match=r"Model: 'head\.weight'\. Their values are arbitrary"):
        load(Model(), "head")
    weights["x"] = torch.ones(3)
    model.ignored = {"x"}
    with pytest.warns(SfpWarning, match=r"Model does not use tensors of .*: 'x'$"):
        load(model)
    before = model.qkv.weight[8:].clone()
    load(model, "qkv.2", "head", "x")  # a second load may replace some weights only
    assert torch.equal(model.qkv.weight[8:], before)


def test_the_entry_point_names_the_function() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'sfpformat = "sfpformat.serving.sglang:register_sglang_hook"' in text


@needs_sglang
def test_the_hooked_methods_have_the_parameters_of_sglang() -> None:
    assert SGLANG is not None
    found = parameters(SGLANG / "srt" / "model_loader" / "loader.py")
    assert found[f"{KIND}.{METHOD}"] == ["model_config", "model"]
    assert found[f"{KIND}.load_weights_only"] == ["model", "weights", "target_device"]
