"""`save_file`, `save` and `options_for_weights`: write tensors. Same interface as `safetensors.torch`."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from ..coding.mask import Mask
from ..encode.planner import Importance
from ..encode.weights import Outline, options_for, warn_of_quantised
from ..encode.writer import Writer
from ..errors import OptionError
from ..limits import DEFAULT_LIMITS, Limits
from ..names import checked_by_name, require_mapping
from ..options import Options, options_by_name
from .tensors import address_of, array_of, format_dtype

Numbers = torch.Tensor | NDArray[np.generic]
ImportanceTensor = Numbers | tuple[Numbers, Numbers]


def save_file(
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
    *,
    options: Options | Mapping[str, Options] | None = None,
    masks: Mapping[str, Numbers] | None = None,
    importances: Mapping[str, ImportanceTensor] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    engine: str | None = None,
) -> None:
    """Writes tensors to a file. The file at ``path`` is replaced only on success.

    Example: ``save_file({"w": weight}, "model.sfp", options=Options(Uniform(bits=4)))``.

    Args:
        tensors: name -> tensor of any shape, device and strides, and of any dtype that the format names.
            Sparse layouts are written as dense tensors.
        path: path of the file.
        metadata: str -> str; stored unchanged.
        options: options for all tensors, or by name. Lossless by default. A single lossy `Options` applies to
            every float tensor; `options_for_weights` returns options for the weights alone.
        masks: name -> bool tensor of the tensor's shape, True for survivors.
        importances: name -> float tensor of the tensor's shape, or two vectors (rows, columns).
        limits: the limits of the readers. If they are not the defaults, open the file with the same limits.
        threads: the maximum number of threads; the bytes do not depend on it.
        engine: as in `sfpformat.open`; the bytes do not depend on it.

    Raises:
        OptionError: an option, mask or importance does not fit its tensor; readers would refuse a tensor by
            their limits; a name in an argument is unknown; a tensor has no memory of its own (freed, on the
            meta device, a wrapper of other tensors); or two tensors share memory, which the file would
            contain twice; `save_model` writes it once.
        OSError: the file cannot be written.
    """
    require_unshared(tensors)
    with Writer(path, metadata=metadata, limits=limits, engine=engine, threads=threads) as writer:
        _add_all(writer, tensors, options, masks, importances)


def save(
    tensors: Mapping[str, torch.Tensor],
    metadata: dict[str, str] | None = None,
    *,
    options: Options | Mapping[str, Options] | None = None,
    masks: Mapping[str, Numbers] | None = None,
    importances: Mapping[str, ImportanceTensor] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    engine: str | None = None,
) -> bytes:
    """Returns the bytes of the file that `save_file` would write. Same arguments and errors.

    Example: ``data = save({"w": weight})``.
    """
    require_unshared(tensors)
    out = io.BytesIO()
    with Writer(out, metadata=metadata, limits=limits, engine=engine, threads=threads) as writer:
        _add_all(writer, tensors, options, masks, importances)
    return out.getvalue()


def _add_all(
    writer: Writer,
    tensors: Mapping[str, torch.Tensor],
    options: Options | Mapping[str, Options] | None,
    masks: Mapping[str, Numbers] | None,
    importances: Mapping[str, ImportanceTensor] | None,
) -> None:
    """Adds tensors to a writer; each is copied to the CPU just before it is encoded."""
    chosen = options_by_name(options, tensors)
    masks = checked_by_name(masks, tensors, "masks")
    importances = checked_by_name(importances, tensors, "importances")
    warn_of_quantised(outlines(tensors), options)
    for name, tensor in tensors.items():
        add_tensor(writer, name, tensor, chosen[name], masks.get(name), importances.get(name))


def options_for_weights(tensors: Mapping[str, torch.Tensor], options: Options) -> dict[str, Options]:
    """Returns options by name for the weights alone, like `sfpformat.numpy.options_for_weights`.

    The result omits tensors with a NaN, or with a magnitude beyond the range of float32, which cannot be
    quantised.

    Example: ``options = options_for_weights(tensors, Options(Uniform(bits=4)))``.

    Args:
        tensors: all tensors of a model, such as its ``state_dict()``: whether a tensor is a weight can depend
            on the others.
        options: options for the weights.
    """
    chosen = options_for(outlines(tensors), options)
    single = torch.finfo(torch.float32).max
    return {name: o for name, o in chosen.items() if _largest_magnitude(tensors[name]) <= single}


def _largest_magnitude(tensor: torch.Tensor) -> float:
    """Returns the greatest magnitude; NaN if the tensor has one, 0 on the meta device."""
    if tensor.is_meta:
        return 0.0
    values = tensor.detach()
    return float((values.float() if values.element_size() == 1 else values).abs().max())


def outlines(tensors: Mapping[str, torch.Tensor]) -> Iterator[Outline]:
    """Yields name, dtype and shape of the tensors whose dtypes the format supports."""
    for name, tensor in tensors.items():
        dtype = format_dtype(tensor.dtype) if isinstance(tensor, torch.Tensor) else None
        if dtype is not None and isinstance(name, str):
            yield Outline(name, dtype, tuple(tensor.shape))


def add_tensor(
    writer: Writer,
    name: str,
    tensor: torch.Tensor,
    options: Options,
    mask: Numbers | None,
    importance: ImportanceTensor | None,
) -> None:
    """Adds one tensor to a writer, which may encode it later (`Writer.add_later`).

    The arguments are as in `save_file`, for this tensor.

    Raises:
        OptionError: the arguments do not fit the tensor or an earlier one, or the tensor has no memory.
    """
    try:
        array = array_of(tensor, name)
        mask_array = None if mask is None else cast(Mask, _array(mask, name, "mask of"))
        importance_array = None if importance is None else _importance(importance, name)
    except OptionError:
        writer.flush()  # an earlier tensor's error comes first
        raise
    writer.add_later(name, array, options, mask=mask_array, importance=importance_array)


def _array(numbers: Numbers, name: str, kind: str) -> NDArray[np.generic]:
    return array_of(numbers, name, kind) if isinstance(numbers, torch.Tensor) else numbers


def _importance(importance: ImportanceTensor, name: str) -> Importance:
    kind = "importance of"
    if isinstance(importance, tuple):
        return cast(Importance, tuple(_array(vector, name, kind) for vector in importance))
    return cast(Importance, _array(importance, name, kind))


def require_unshared(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuses tensors whose memory overlaps. Checks contiguous strided tensors only.

    Raises:
        OptionError: two tensors share memory, or ``tensors`` is not a mapping.
    """
    require_mapping(tensors, "tensors")
    ends: dict[torch.device, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            continue
        start = address_of(tensor)
        if start and tensor.nbytes and tensor.is_contiguous():
            ends.setdefault(tensor.device, []).append((start, start + tensor.nbytes, name))
    for places in ends.values():
        places.sort()
        for (_, stop, one), (start, _, other) in pairwise(places):
            if start < stop:
                raise OptionError(
                    f"tensors {one!r} and {other!r} share memory, which would be written twice; "
                    "use save_model, or pass copies"
                )
