"""Torch tensors as arrays and back: the same memory under another name, so that no bit can change.

Rules: where numpy has no dtype for torch's (BF16, FP8), both sides are looked at as integers of the same
width. Nothing here converts a number.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.parameter import is_lazy

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


def array_of(tensor: torch.Tensor, name: str = "", kind: str = "tensor") -> Array:
    """A tensor as an array of the same shape and bits; its own memory where that is possible.

    Args:
        tensor: any device; any strides; a sparse layout is made dense.
        name: of the tensor, for errors.
        kind: what it is, for errors: ``tensor``, or such as ``mask of``.

    Raises:
        OptionError: it is no tensor, has no data (as `require_memory`), or its dtype has no name in the
            format.
    """
    what = f"{kind} {name!r}"
    require_memory(tensor, what)
    if tensor.dtype not in _FROM_TORCH:
        raise OptionError(f"{what}: dtype {tensor.dtype} has no name in the format")
    plain = tensor.detach()
    try:
        if plain.layout != torch.strided:
            plain = plain.to_dense()
        return memory_of(plain.to("cpu").resolve_conj().resolve_neg().contiguous())
    except (RuntimeError, TypeError) as error:  # such as inside of torch.func.vmap
        raise OptionError(f"{what}: torch does not give its numbers: {first_line(error)}") from error


def require_memory(tensor: object, what: str) -> None:
    """Refuses what has no memory with all of its numbers.

    Args:
        tensor: any object.
        what: it is, for errors, such as ``tensor 'w'``.

    Raises:
        OptionError: it is no tensor, or one without data: on the meta device, of a lazy module, with freed
            memory; or a tensor made of other tensors: a DTensor, a nested, a quantised or another wrapper.
    """
    reason = _reason_against(tensor)
    if reason is None and isinstance(tensor, torch.Tensor):
        reason = missing_memory(tensor)
        if tensor.is_meta:
            reason = "has no data, it is on the meta device"
    if reason is not None:
        raise OptionError(f"{what}: {reason}")


def _reason_against(tensor: object) -> str | None:
    """Why an object is no tensor with memory of its own, or None."""
    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__} is no tensor"
    if is_lazy(tensor):
        return "has no shape yet, it is of a lazy module: call the module once before"
    if tensor.is_nested:
        return "is a nested tensor; give its values and offsets, or to_padded_tensor() of it"
    if tensor.is_quantized:
        return "is quantised by torch; give dequantize() of it, or its int_repr(), scale and zero point"
    if is_wrapper(tensor):
        if hasattr(tensor, "full_tensor"):
            return "is a DTensor, spread over processes; give full_tensor() of it"
        return f"is a {type(tensor).__name__}, which wraps other tensors; give those, or a plain tensor of it"
    return None


def require_known_shapes(model: torch.nn.Module) -> None:
    """Refuses a module with lazy modules that have no shape yet.

    Raises:
        OptionError: there is one.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise OptionError(
                f"{name!r} has no shape yet, it is of a lazy module: call the model once, or use load_model"
            )


class ReadsAsPlain:
    """A mark of tensor classes whose operators are their own and give what those of a plain tensor give."""


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor's class has operators of its own, so that it may have no memory."""
    own = type(tensor).__torch_dispatch__ != torch.Tensor.__torch_dispatch__
    return own and not isinstance(tensor, ReadsAsPlain)


def missing_memory(tensor: torch.Tensor) -> str | None:
    """What is wrong where the memory of a tensor is smaller than its shape and strides say; else None.

    Such memory was freed or resized under the tensor, as FSDP does between calls.
    """
    for part in _parts_of(tensor):
        if part.is_meta or not part.numel():
            continue
        try:
            there = part.untyped_storage().nbytes()
        except (RuntimeError, NotImplementedError):  # torch shows none, such as inside of torch.func.vmap
            continue
        last = part.storage_offset() + sum(
            (n - 1) * stride for n, stride in zip(part.shape, part.stride(), strict=True)
        )
        needed = (last + 1) * part.itemsize
        if there < needed:
            return (
                f"has {there:,} bytes of memory and needs {needed:,}: its storage was freed or resized; "
                "gather or load the weights first"
            )
    return None


def address_of(tensor: torch.Tensor) -> int:
    """Where the memory of a strided tensor begins; 0 where it has none that torch shows."""
    if is_lazy(tensor) or is_wrapper(tensor) or tensor.is_meta:
        return 0
    try:
        return int(tensor.data_ptr())
    except (RuntimeError, NotImplementedError):  # such as inside of torch.func.vmap
        return 0


def _parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The strided tensors that a tensor consists of; none where torch does not show them."""
    if is_wrapper(tensor) or is_lazy(tensor):
        return []
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def first_line(error: Exception) -> str:
    """The beginning of an error's message: those of torch can be long."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


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
