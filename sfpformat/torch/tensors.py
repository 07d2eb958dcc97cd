"""Torch tensors as arrays and back: the same memory under another name, so that no bit can change.

Rules: where numpy has no dtype for torch's (BF16, FP8), both sides are looked at as integers of the same
width. Nothing here converts a number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..dtypes import DTYPES, Dtype, of_numpy
from ..errors import MismatchError, OptionError

Array = NDArray[np.generic]

# Name in the format -> torch's name. A torch that is too old for one of them does not have it.
_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "C64": "complex64",
    "C128": "complex128",
}
_TO_TORCH: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name)
    for name, torch_name in _TORCH_NAMES.items()
    if hasattr(torch, torch_name)
}
_FROM_TORCH = {dtype: DTYPES[name] for name, dtype in _TO_TORCH.items()}

# For the dtypes of `ml_dtypes`: what both sides know, by bytes an element.
_AS_INTEGERS = {1: (torch.uint8, np.dtype("u1")), 2: (torch.int16, np.dtype("<i2"))}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a dtype of the format.

    Raises:
        MismatchError: this version of torch has none.
    """
    if name not in _TO_TORCH:
        raise MismatchError(f"torch {torch.__version__} has no dtype for {name}; a newer one may")
    return _TO_TORCH[name]


def format_dtype(dtype: torch.dtype) -> Dtype | None:
    """The dtype of the format for a torch dtype, or None."""
    return _FROM_TORCH.get(dtype)


def _is_foreign(dtype: Dtype) -> bool:
    """Whether numpy needs `ml_dtypes` for it, which torch does not know."""
    return dtype.numpy.isbuiltin == 2


def memory_of(tensor: torch.Tensor) -> Array:
    """The memory of a contiguous tensor of the processor as an array: what is written there is in the tensor.

    Args:
        tensor: strided, contiguous, on the processor, of a dtype of the format.
    """
    dtype = _FROM_TORCH[tensor.dtype]
    plain: Any = tensor.detach()
    if not _is_foreign(dtype):
        return np.asarray(plain.numpy())
    as_torch, _ = _AS_INTEGERS[dtype.itemsize]
    return np.asarray(plain.view(as_torch).numpy().view(dtype.numpy))


def array_of(tensor: torch.Tensor, name: str = "") -> Array:
    """A tensor as an array of the same shape and bits; its own memory where that is possible.

    Args:
        tensor: any device; any strides; a sparse layout is made dense.
        name: for errors.

    Raises:
        OptionError: it is no tensor, has no data, or its dtype has no name in the format.
    """
    if not isinstance(tensor, torch.Tensor):
        raise OptionError(f"tensor {name!r}: a {type(tensor).__name__} is no tensor")
    if tensor.is_meta:
        raise OptionError(f"tensor {name!r}: has no data, it is on the meta device")
    if tensor.dtype not in _FROM_TORCH:
        raise OptionError(f"tensor {name!r}: dtype {tensor.dtype} has no name in the format")
    plain = tensor.detach()
    if plain.layout != torch.strided:
        plain = plain.to_dense()
    return memory_of(plain.to("cpu").resolve_conj().resolve_neg().contiguous())


def tensor_of(array: Array) -> torch.Tensor:
    """A tensor over the memory of an array that was decoded.

    Args:
        array: writable, C order, of a dtype of the format.

    Raises:
        MismatchError: this version of torch has no such dtype.
    """
    dtype = of_numpy(array.dtype)
    assert dtype is not None
    wanted = torch_dtype(dtype.name)
    if not _is_foreign(dtype):
        return torch.from_numpy(array)
    _, as_numpy = _AS_INTEGERS[dtype.itemsize]
    return torch.from_numpy(array.view(as_numpy)).view(wanted)
