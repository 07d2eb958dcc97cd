"""Lets SGLang load folders with `.sfp` files. Written for SGLang 0.5.23.

SGLang calls `register_sglang_hook` in each of its processes (entry point group ``sglang.srt.plugins``).
It has no registry of load formats; a hook around a method of its default loader supplies the weights.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import OptionError, SfpWarning
from ..names import listed
from ..torch import safe_open
from ..torch.lazy_tensor import lazy_weights
from .sources import has_sfp_file

TARGET = "sglang.srt.model_loader.loader.DefaultModelLoader._get_all_weights"
Weights = Iterator[tuple[str, Any]]


def register_sglang_hook() -> None:
    """Registers the hook. Models without `.sfp` files load as before.

    Raises:
        ModuleNotFoundError: SGLang is not installed, or has no hooks.
    """
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry.register(TARGET, weights, hooks.HookType.AROUND)


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
    used: set[str] = set()
    with safe_open(model_config.model_path) as file:
        yield from lazy_weights(file, used=used)
        unused = sorted(set(file) - used)
    if unused:
        words = f"{type(model).__name__} does not use tensors of {model_config.model_path}: {listed(unused)}"
        warnings.warn(SfpWarning(words), stacklevel=2)
