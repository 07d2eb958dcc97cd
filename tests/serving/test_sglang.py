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

from sfpformat import OptionError, SfpWarning
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
        owner = getattr(sys.modules[MODULE], KIND)
        original = getattr(owner, METHOD)
        setattr(owner, METHOD, lambda *args, **kwargs: hook(original, *args, **kwargs))

    @classmethod
    def apply_hooks(cls) -> None:
        """Nothing is left to do."""


@pytest.fixture(params=[False, pytest.param(True, marks=needs_sglang)])
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's loader, with the hook."""

    class DefaultModelLoader:
        def _get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
            yield "other", torch.ones(1)

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
    for source in (tmp_path, Path("team/small")):
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


def test_the_entry_point_names_the_function() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'sfpformat = "sfpformat.serving.sglang:register_sglang_hook"' in text


@needs_sglang
def test_the_hooked_method_has_the_parameters_of_sglang() -> None:
    assert SGLANG is not None
    found = parameters(SGLANG / "srt" / "model_loader" / "loader.py")
    assert found[f"{KIND}.{METHOD}"] == ["model_config", "model"]
