"""Registers the engines for deltas with vLLM. Written for vLLM 0.33.

vLLM calls `plugin` in each of its processes (entry point group ``vllm.general_plugins``).
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import MismatchError, SfpWarning
from ...names import listed
from .versions import version_of

BACKEND = "sfp_delta"
WRITTEN_FOR = "0.33"
_ENGINES = "sfpformat.torch.weight_sync.vllm_engine"
_PACKAGE = "vllm.distributed.weight_transfer"
_PATCHES = "vllm.model_executor.model_loader.checkpoint_weight_patch"
_REGISTER = ("name", "module_path_or_cls", "class_name")

# Module, then name of a class or function, then of a method or "", then the parameters that are used.
Interface = tuple[tuple[str, str, str, tuple[str, ...]], ...]
INTERFACE: Interface = (
    (f"{_PACKAGE}.base", "WeightTransferEngine", "__init__", ("config", "vllm_config", "device", "model")),
    (f"{_PACKAGE}.base", "WeightTransferEngine", "init_transfer_engine", ("init_info",)),
    (f"{_PACKAGE}.base", "WeightTransferEngine", "start_weight_update", ()),
    (f"{_PACKAGE}.base", "WeightTransferEngine", "finish_weight_update", ()),
    (f"{_PACKAGE}.base", "WeightTransferEngine", "receive_weights", ("update_info",)),
    (f"{_PACKAGE}.base", "WeightTransferEngine", "shutdown", ()),
    (
        f"{_PACKAGE}.base",
        "TrainerWeightTransferEngine",
        "__init__",
        ("client", "source", "is_sender", "rank"),
    ),
    (f"{_PACKAGE}.base", "TrainerWeightTransferEngine", "trainer_init", ("init_info", "client", "source")),
    (f"{_PACKAGE}.base", "TrainerWeightTransferEngine", "send_weights", ()),
    (f"{_PACKAGE}.base", "WeightSource", "iter_full", ()),
    (f"{_PACKAGE}.base", "WeightSource", "implements_iter_full", ()),
    (f"{_PACKAGE}.base", "WeightSource", "owned_names", ("rank",)),
    (f"{_PACKAGE}.factory", "WeightTransferEngineFactory", "register_engine", _REGISTER),
    (f"{_PACKAGE}.factory", "WeightTransferTrainerFactory", "register_engine", _REGISTER),
    (_PATCHES, "load_checkpoint_weight_patches", "", ("model", "patches")),
    (_PATCHES, "CheckpointWeightPatch", "__new__", ("name", "shape", "dtype", "values", "indices")),
)
# Methods that a subclass must have. More of them are another interface.
ABSTRACT = {
    "WeightTransferEngine": {
        "init_transfer_engine",
        "start_weight_update",
        "finish_weight_update",
        "receive_weights",
        "shutdown",
    },
    "TrainerWeightTransferEngine": {"trainer_init", "send_weights"},
}


def register_vllm_engines() -> None:
    """Registers the backend ``sfp_delta`` of vLLM's weight transfer, for workers and trainers.

    Workers: ``vllm serve MODEL --weight-transfer-config '{"backend": "sfp_delta"}'``. Trainers:
    ``WeightTransferTrainerFactory.trainer_init(DeltaTrainerInitInfo(...), client=..., source=...)``. Does
    nothing if it was called before.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        MismatchError: this version of vLLM has another interface.
    """
    abstract = {(f"{_PACKAGE}.base", name): methods for name, methods in ABSTRACT.items()}
    require_interface(INTERFACE, abstract, "weight transfer")
    factory = importlib.import_module(f"{_PACKAGE}.factory")
    for kind, name in (
        (factory.WeightTransferEngineFactory, "DeltaWeightTransferEngine"),
        (factory.WeightTransferTrainerFactory, "DeltaTrainerWeightTransferEngine"),
    ):
        if BACKEND not in kind._registry:
            kind.register_engine(BACKEND, _ENGINES, name)


def plugin() -> None:
    """Registers the engines. If vLLM has another interface, warns, so that vLLM starts without them."""
    try:
        register_vllm_engines()
    except MismatchError as error:
        warnings.warn(str(error), SfpWarning, stacklevel=2)


def require_interface(
    interface: Interface, abstract: Mapping[tuple[str, str], set[str]], purpose: str
) -> None:
    """Checks what is used of vLLM.

    Args:
        interface: functions and their parameters, as `INTERFACE`.
        abstract: (module, class) -> the methods that a subclass must have.
        purpose: what the interface is for, in an error.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        MismatchError: something is missing, or has other parameters. Names it and both versions.
    """
    package = importlib.import_module("vllm")
    wrong = [words for entry in interface if (words := _difference(*entry)) is not None]
    for (module, name), methods in abstract.items():
        found = _found(module, name)
        more = sorted(set(getattr(found, "__abstractmethods__", ())) - methods)
        if more:
            wrong.append(f"{name} also has {listed(more)}")
    if wrong:
        version = getattr(package, "__version__", None) or version_of("vllm")  # packages have several names
        raise MismatchError(
            f"vLLM {version} has another interface of {purpose} than {WRITTEN_FOR}, "
            f"for which sfpformat was written: {'; '.join(wrong)}. Use another version of one of them"
        )


def _found(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        return None


def _difference(module: str, name: str, method: str, parameters: tuple[str, ...]) -> str | None:
    """Returns what differs in a function, or None."""
    what = f"{name}.{method}" if method else name
    found: Callable[..., object] | None = _found(module, name)
    if found is not None and method:
        found = getattr(found, method, None)
    if found is None:
        return f"{module} has no {what}"
    has = set(inspect.signature(found).parameters)
    missing = [parameter for parameter in parameters if parameter not in has]
    return f"{what} has no parameter {listed(missing)}" if missing else None
