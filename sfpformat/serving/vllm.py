"""Registers the loader of ``--load-format sfp`` with vLLM. Written for vLLM 0.33.

vLLM calls `plugin` in each of its processes (entry point group ``vllm.general_plugins``).
"""

from __future__ import annotations

import importlib
import warnings

from ..errors import MismatchError, SfpWarning
from ..torch.weight_sync.vllm_plugin import Interface, require_interface

LOAD_FORMAT = "sfp"
_LOADERS = "vllm.model_executor.model_loader"
# As `sfpformat.torch.weight_sync.vllm_plugin.INTERFACE`.
INTERFACE: Interface = (
    (_LOADERS, "register_model_loader", "", ("load_format",)),
    (f"{_LOADERS}.base_loader", "BaseModelLoader", "__init__", ("load_config",)),
    (f"{_LOADERS}.base_loader", "BaseModelLoader", "download_model", ("model_config",)),
    (f"{_LOADERS}.base_loader", "BaseModelLoader", "load_weights", ("model", "model_config")),
    ("vllm.config.vllm", "get_current_vllm_config_or_none", "", ()),
    (
        f"{_LOADERS}.default_loader",
        "DefaultModelLoader",
        "track_weights_loading",
        ("model", "loaded_weights", "quantized"),
    ),
)
# Methods that a subclass must have. More of them are another interface.
ABSTRACT = {(f"{_LOADERS}.base_loader", "BaseModelLoader"): {"download_model", "load_weights"}}


def register_vllm_loader() -> None:
    """Registers the load format ``sfp``: ``vllm serve folder/ --load-format sfp``.

    Does nothing if it was called before.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        MismatchError: this version of vLLM has another interface.
    """
    require_interface(INTERFACE, ABSTRACT, "model loaders")
    loader = importlib.import_module("sfpformat.serving.vllm_loader").SfpModelLoader
    loaders = importlib.import_module(_LOADERS)
    if getattr(loaders, "_LOAD_FORMAT_TO_MODEL_LOADER", {}).get(LOAD_FORMAT) is not loader:
        loaders.register_model_loader(LOAD_FORMAT)(loader)


def plugin() -> None:
    """Registers the loader. If vLLM has another interface, warns, so that vLLM starts without it."""
    try:
        register_vllm_loader()
    except MismatchError as error:
        warnings.warn(str(error), SfpWarning, stacklevel=2)
