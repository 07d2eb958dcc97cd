"""Converts torch tensors to numpy arrays and back. Both share the same memory, so that no bit changes.

Rules: no number is converted. If numpy has no dtype of its own for a torch dtype (BF16, FP8), the memory is
shared through integers of the same width.
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

# Name in the format -> torch's name. Older versions of torch lack some of them.
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

# For the dtypes of `ml_dtypes`: bytes an element -> integer dtypes of torch and numpy of that width.
_AS_INTEGERS = {1: (torch.uint8, np.dtype("u1")), 2: (torch.int16, np.dtype("<i2"))}


def torch_dtype(name: str) -> torch.dtype:
    """Returns the torch dtype for a dtype name of the format.

    Raises:
        MismatchError: this version of torch has no such dtype.
    """
    if name not in _TO_TORCH:
        raise MismatchError(f"torch {torch.__version__} has no dtype for {name}; a newer torch may have one")
    return _TO_TORCH[name]


def format_dtype(dtype: torch.dtype) -> Dtype | None:
    """Returns the format's dtype for a torch dtype, or None."""
    return _FROM_TORCH.get(dtype)


def _is_foreign(dtype: Dtype) -> bool:
    """Returns whether numpy needs `ml_dtypes` for the dtype, which torch does not support."""
    return dtype.numpy.isbuiltin == 2


def memory_of(tensor: torch.Tensor) -> Array:
    """Returns a contiguous CPU tensor as an array that shares its memory: writes change the tensor.

    Args:
        tensor: strided, contiguous, on the CPU, of a dtype of the format.
    """
    dtype = _FROM_TORCH[tensor.dtype]
    plain: Any = tensor.detach()
    if not _is_foreign(dtype):
        return np.asarray(plain.numpy())
    as_torch, _ = _AS_INTEGERS[dtype.itemsize]
    return np.asarray(plain.view(as_torch).numpy().view(dtype.numpy))


def count_write(tensor: torch.Tensor) -> None:
    """Tells autograd that memory was written, as an operation of torch does."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def array_of(tensor: torch.Tensor, name: str = "", kind: str = "tensor") -> Array:
    """Returns a tensor as an array of the same shape and bits. Shares its memory if possible.

    Args:
        tensor: any device and strides; a sparse layout is made dense.
        name: name of the tensor, for errors.
        kind: kind of the value, for errors: ``tensor``, or for example ``mask of``.

    Raises:
        OptionError: the value is not a tensor, has no data (`require_memory`), or has a dtype that the format
            does not support.
    """
    what = f"{kind} {name!r}"
    require_memory(tensor, what)
    if tensor.dtype not in _FROM_TORCH:
        raise OptionError(f"{what}: the format does not support the dtype {tensor.dtype}")
    plain = tensor.detach()
    try:
        if plain.layout != torch.strided:
            plain = plain.to_dense()
        return memory_of(plain.to("cpu").resolve_conj().resolve_neg().contiguous())
    except (RuntimeError, TypeError) as error:  # for example inside torch.func.vmap
        raise OptionError(f"{what}: torch cannot read its values: {first_line(error)}") from error


def require_memory(tensor: object, what: str) -> None:
    """Refuses objects that are not a tensor with memory for all of its elements.

    Args:
        tensor: any object.
        what: description for errors, such as ``tensor 'w'``.

    Raises:
        OptionError: the object is not a tensor; the tensor has no data (on the meta device, of a lazy module,
            freed memory); or it is a nested, quantised or wrapper tensor, such as a DTensor.
    """
    reason = _reason_against(tensor)
    if reason is None and isinstance(tensor, torch.Tensor):
        reason = missing_memory(tensor)
        if tensor.is_meta:
            reason = "is on the meta device and has no data"
    if reason is not None:
        raise OptionError(f"{what}: {reason}")


def _reason_against(tensor: object) -> str | None:
    """Returns why an object is not a tensor with its own memory, or None."""
    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__} is not a tensor"
    if is_lazy(tensor):
        return "has no shape yet because it belongs to a lazy module: call the module once first"
    if tensor.is_nested:
        return "is a nested tensor; pass its values and offsets, or its to_padded_tensor()"
    if tensor.is_quantized:
        return "is quantised by torch; pass its dequantize(), or its int_repr(), scale and zero point"
    if is_wrapper(tensor):
        if hasattr(tensor, "full_tensor"):
            return "is a distributed DTensor; pass its full_tensor()"
        return f"is a {type(tensor).__name__}, which wraps other tensors; pass those, or a plain tensor"
    return None


def require_module(model: object) -> None:
    """Refuses an object that is not a module.

    Raises:
        OptionError: it is another object, such as a state dict.
    """
    if not isinstance(model, torch.nn.Module):
        raise OptionError(
            f"model is a {type(model).__name__}, must be a torch.nn.Module; load_file and save_file are for "
            "tensors by name"
        )


def require_known_shapes(model: torch.nn.Module) -> None:
    """Refuses a module with lazy parameters or buffers that have no shape yet.

    Raises:
        OptionError: there is such a parameter or buffer.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise OptionError(
                f"{name!r} has no shape yet because it belongs to a lazy module: call the model "
                "once, or use load_model"
            )


class ReadsAsPlain:
    """Marker for tensor classes that override operators, but return the same results as a plain tensor."""


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor's class overrides operators, so that the tensor may have no memory."""
    own = type(tensor).__torch_dispatch__ != torch.Tensor.__torch_dispatch__
    return own and not isinstance(tensor, ReadsAsPlain)


def missing_memory(tensor: torch.Tensor) -> str | None:
    """Returns an error text if a tensor's memory is smaller than its shape and strides need, else None.

    Such memory was freed or resized, as FSDP does between calls.
    """
    for part in _parts_of(tensor):
        if part.is_meta or not part.numel():
            continue
        try:
            size = part.untyped_storage().nbytes()
        except NotImplementedError:  # no storage, for example in torch.func.vmap
            continue
        last = part.storage_offset() + sum(
            (n - 1) * stride for n, stride in zip(part.shape, part.stride(), strict=True)
        )
        needed = (last + 1) * part.itemsize
        if size < needed:
            return (
                f"has {size:,} bytes of memory and needs {needed:,}: its storage was freed or resized; "
                "gather or load the weights first"
            )
    return None


def address_of(tensor: torch.Tensor) -> int:
    """Returns the address of a strided tensor's first element; 0 if torch gives none."""
    if is_lazy(tensor) or is_wrapper(tensor) or tensor.is_meta:
        return 0
    try:
        return int(tensor.data_ptr())
    except RuntimeError:  # the tensor has no storage, as in torch.func.vmap; torch has no narrower class
        return 0


def _parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Returns the strided tensors that a tensor consists of; empty if torch does not give them."""
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
    """Returns the first line of an error's message, at most 200 characters: torch's messages can be long."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


def tensor_of(array: Array) -> torch.Tensor:
    """Returns a tensor that shares the memory of a decoded array.

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
