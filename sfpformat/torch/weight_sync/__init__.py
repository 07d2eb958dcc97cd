"""Sends the weights of a model in training to other processes, as deltas.

`DeltaSender` writes a file for each step into a folder, and `DeltaReceiver` reads them. Adapters connect them
to trainers and inference engines: `WeightSyncCallback` to trainers of transformers and TRL,
`DeltaWeightTransfer` to TRL's `AsyncGRPOTrainer`, and `register_vllm_engines` to vLLM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .receiver import DeltaReceiver
from .sender import DeltaSender, Sent

if TYPE_CHECKING:
    from .callback import WeightSyncCallback
    from .trl_transfer import DeltaWeightTransfer
    from .vllm_plugin import register_vllm_engines

__all__ = [
    "DeltaReceiver",
    "DeltaSender",
    "DeltaWeightTransfer",
    "Sent",
    "WeightSyncCallback",
    "register_vllm_engines",
]

# Lazy: they import other libraries.
_MODULE_OF = {
    "DeltaWeightTransfer": ".trl_transfer",
    "WeightSyncCallback": ".callback",
    "register_vllm_engines": ".vllm_plugin",
}


def __getattr__(name: str) -> object:
    """Imports the module that defines a lazy name, and returns its value.

    Raises:
        AttributeError: the package has no such name.
        ModuleNotFoundError: the library that the name connects to is not installed.
    """
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
