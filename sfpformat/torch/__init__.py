"""PyTorch API: the functions of `safetensors.torch`, for `.sfp` files.

Needs torch 2.4 or later (``pip install 'sfpformat[torch]'``). Loading a file never executes code from it.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("torch") is None:
    raise ModuleNotFoundError("sfpformat.torch needs torch: pip install 'sfpformat[torch]'", name="torch")

from .compress import CompressionReport, compress_model, decompress_model
from .deltas import apply_delta, write_delta
from .files import TorchFile, TorchSlice, load, load_file, safe_open
from .layers import SfpEmbedding, SfpLinear
from .meta import parameters_on_meta
from .models import load_model, save_model
from .offloading import dispatch_model
from .saving import options_for_weights, save, save_file

open = safe_open

# Without `open`, so that ``from sfpformat.torch import *`` does not shadow the built-in.
__all__ = [
    "CompressionReport",
    "SfpEmbedding",
    "SfpLinear",
    "TorchFile",
    "TorchSlice",
    "apply_delta",
    "compress_model",
    "decompress_model",
    "dispatch_model",
    "load",
    "load_file",
    "load_model",
    "options_for_weights",
    "parameters_on_meta",
    "safe_open",
    "save",
    "save_file",
    "save_model",
    "write_delta",
]
