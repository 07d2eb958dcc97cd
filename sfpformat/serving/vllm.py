"""Registers ``--load-format sfp`` and ``--quantization sfp`` with vLLM. Written for vLLM 0.33.

vLLM calls `plugin` in each of its processes (entry point group ``vllm.general_plugins``).
"""

from __future__ import annotations

import importlib
import warnings

from ..errors import MismatchError, SfpWarning
from ..torch.weight_sync.vllm_plugin import Interface, require_interface

LOAD_FORMAT = "sfp"
QUANTIZATION = "sfp"
_LOADERS = "vllm.model_executor.model_loader"
_LAYERS = "vllm.model_executor.layers"
# As `sfpformat.torch.weight_sync.vllm_plugin.INTERFACE`.
INTERFACE: Interface = (
    (_LOADERS, "register_model_loader", "", ("load_format",)),
    (f"{_LOADERS}.base_loader", "BaseModelLoader", "__init__", ("load_config",)),
    (f"{_LOADERS}.base_loader", "BaseModelLoader", "download_model", ("model_config",)),
    (f"{_LOADERS}.base_loader", "BaseModelLoader", "load_weights", ("model", "model_config")),
    (f"{_LOADERS}.base_loader", "BaseModelLoader", "load_model", ("vllm_config", "model_config", "prefix")),
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
# The same for `--quantization sfp`.
LINEAR_INTERFACE: Interface = (
    (f"{_LAYERS}.quantization", "register_quantization_config", "", ("quantization",)),
    (f"{_LAYERS}.quantization.base_config", "QuantizationConfig", "__init__", ()),
    (f"{_LAYERS}.quantization.base_config", "QuantizationConfig", "get_quant_method", ("layer", "prefix")),
    (
        f"{_LAYERS}.linear",
        "LinearMethodBase",
        "create_weights",
        (
            "layer",
            "input_size_per_partition",
            "output_partition_sizes",
            "input_size",
            "output_size",
            "params_dtype",
        ),
    ),
    (f"{_LAYERS}.linear", "LinearMethodBase", "apply", ("layer", "x", "bias")),
    (f"{_LAYERS}.linear", "LinearMethodBase", "process_weights_after_loading", ("layer",)),
    (f"{_LAYERS}.linear", "LinearMethodBase", "tie_weights", ("layer", "embed_tokens")),
    (f"{_LAYERS}.linear", "register_weight_loader_v2_supported_method", "", ("cls",)),
    (f"{_LAYERS}.linear", "LinearBase", "__init__", ("quant_config", "prefix")),
    (f"{_LAYERS}.vocab_parallel_embedding", "ParallelLMHead", "tie_weights", ("embed_tokens",)),
    ("vllm.model_executor.parameter", "ModelWeightParameter", "__init__", ("output_dim",)),
)
LINEAR_ABSTRACT = {
    (f"{_LAYERS}.linear", "LinearMethodBase"): {"create_weights", "apply"},
    (f"{_LAYERS}.quantization.base_config", "QuantizationConfig"): {
        "get_name",
        "get_supported_act_dtypes",
        "get_min_capability",
        "get_config_filenames",
        "from_config",
        "get_quant_method",
    },
}


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


def register_vllm_quantization() -> None:
    """Registers the quantization method ``sfp``, with which linear layers keep their weights compressed.

    ``vllm serve folder/ --load-format sfp --quantization sfp``. Does nothing if it was called before.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        MismatchError: this version of vLLM has another interface.
    """
    require_interface(LINEAR_INTERFACE, LINEAR_ABSTRACT, "quantization")
    config = importlib.import_module("sfpformat.serving.vllm_linear").SfpQuantizationConfig
    methods = importlib.import_module(f"{_LAYERS}.quantization")
    if methods._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get(QUANTIZATION) is not config:
        methods.register_quantization_config(QUANTIZATION)(config)


def plugin() -> None:
    """Registers both. If vLLM has another interface, warns, so that vLLM starts without them."""
    for register in (register_vllm_loader, register_vllm_quantization):
        try:
            register()
        except MismatchError as error:
            warnings.warn(str(error), SfpWarning, stacklevel=2)
