"""Lets SGLang load folders with `.sfp` files. Written for SGLang 0.5.23.

SGLang calls `register_sglang_hook` in each of its processes (entry point group ``sglang.srt.plugins``).
It has no registry of load formats; a hook around a method of its default loader supplies the weights, another
checks that they fill the model.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from ..errors import MismatchError, OptionError, SfpWarning
from ..names import listed
from ..torch import safe_open
from ..torch.lazy_tensor import lazy_weights
from .sources import has_sfp_file
from .unfilled import Marks

TARGET = "sglang.srt.model_loader.loader.DefaultModelLoader._get_all_weights"
CHECKED = "sglang.srt.model_loader.loader.DefaultModelLoader.load_weights_only"
Weights = Iterator[tuple[str, Any]]


@dataclass
class _Load:
    """One call of `checked`.

    Attributes:
        files: closes the file at the end: some models keep the tensors until they have all.
        source: the path or URL of the `.sfp` model; None for other models.
        names, used: the names of its tensors, and of those that were used.
        marks: the marks in the weights; None if the model had values before, of which some may stay.
    """

    files: ExitStack = field(default_factory=ExitStack)
    source: str | None = None
    names: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    marks: Marks | None = None


_loads: WeakKeyDictionary[nn.Module, _Load] = WeakKeyDictionary()  # of the models that are loading
_loaded: WeakSet[nn.Module] = WeakSet()


def register_sglang_hook() -> None:
    """Registers the hooks. Models without `.sfp` files load as before.

    Raises:
        ModuleNotFoundError: SGLang is not installed, or has no hooks.
    """
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry.register(TARGET, weights, hooks.HookType.AROUND)
    hooks.HookRegistry.register(CHECKED, checked, hooks.HookType.AROUND)


def weights(original: Callable[..., Weights], loader: Any, model_config: Any, model: Any) -> Weights:
    """Yields names and tensors: those of the `.sfp` model, else what SGLang's method yields.

    Args:
        original: the method ``DefaultModelLoader._get_all_weights``.
        loader: its object.
        model_config: SGLang's configuration; used is ``model_path``, a folder, a file, an index or a URL.
        model: a model of SGLang.

    Warns:
        SfpWarning: tensors of the file are not used.

    Raises:
        OptionError: the model takes weights from further sources.
        InvalidFileError, UnsupportedError, LimitError: the file is damaged or refused.
        OSError: the file cannot be read.
    """
    if not has_sfp_file(str(model_config.model_path)):
        yield from original(loader, model_config, model)
        return
    if getattr(model, "secondary_weights", ()):
        raise OptionError(f"{type(model).__name__} takes weights from several sources; .sfp has one")
    load = _loads.get(model)
    if load is None:  # another loader of SGLang
        used: set[str] = set()
        with safe_open(model_config.model_path) as file:
            yield from lazy_weights(file, used=used)
            unused = set(file) - used
        _warn_of_unused(model, model_config.model_path, unused)
        return
    load.source = str(model_config.model_path)
    if model not in _loaded:
        load.marks = Marks(model, every=True)
    file = load.files.enter_context(safe_open(model_config.model_path))
    load.names |= set(file)
    yield from lazy_weights(file, used=load.used)


def checked(original: Callable[..., Any], model: Any, weights: Weights, target_device: Any) -> Any:
    """Loads weights by SGLang's method, then checks that those of an `.sfp` model fill its layers.

    Args:
        original: the method ``DefaultModelLoader.load_weights_only``.
        model: a model of SGLang.
        weights: names and tensors.
        target_device: the device of the model.

    Warns:
        SfpWarning: tensors of the file are not used; or an embedding or output head has no values: draft
            models share those of another model.

    Raises:
        MismatchError: a linear layer, or one of its matrices, has no values. The model must not be used.
    """
    load = _loads[model] = _Load()
    try:
        with load.files:
            out = original(model, weights, target_device)
    finally:
        del _loads[model]
    if load.source is None:
        return out
    _loaded.add(model)
    _warn_of_unused(model, load.source, load.names - load.used)
    missing = [] if load.marks is None else load.marks.unfilled()
    words = f"no tensor of the file fills parameters of {type(model).__name__}: "
    layers = [one.name for one in missing if not hasattr(one.layer, "org_vocab_size")]
    if layers:
        raise MismatchError(words + listed(layers), layers)
    if missing:
        names = listed([one.name for one in missing])
        warnings.warn(SfpWarning(f"{words}{names}. Their values are arbitrary"), stacklevel=2)
    return out


def _warn_of_unused(model: nn.Module, source: object, unused: set[str]) -> None:
    if unused:
        words = f"{type(model).__name__} does not use tensors of {source}: {listed(sorted(unused))}"
        warnings.warn(SfpWarning(words), stacklevel=3)
