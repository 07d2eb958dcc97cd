"""The computations of compressed layers as custom torch operators, which compilers treat as opaque.

Rules: the result of an operator depends only on the compressed bytes and the other inputs; the cache of
decoded weights only saves work. An operator returns a decoded weight only as a new tensor. No decoded weight
is saved for the backward pass, which decodes the weight again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import packed
from .files import is_decoded_on
from .weight_cache import cache_of

Operator = Callable[..., torch.Tensor]

# `cudagraph_unsafe`: the CPU inspects the bytes, which a recorded CUDA graph cannot repeat. Older versions of
# torch lack this tag.
_TAGS = tuple(
    getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "cudagraph_unsafe") if hasattr(torch.Tag, name)
)


def _operator(signature: str, compute: Operator, fake: Operator) -> Any:
    """Registers an operator with torch, in the namespace ``sfpformat``, and returns it.

    Args:
        signature: name and arguments. ``data`` is the compressed weight. The weight is converted to
            ``dtype``, then to ``compute``. ``kept`` is the token of the cache of decoded weights.
        compute: the implementation.
        fake: returns an empty tensor of the result's shape and dtype.
    """
    name, arguments = signature.split("(", 1)
    full_name = f"sfpformat::{name}"
    # Not `torch.library.custom_op`, which imports the compiler at the first call: a second and 70 MB.
    torch.library.define(full_name, f"({arguments} -> Tensor", tags=_TAGS)
    torch.library.impl(full_name, "CompositeExplicitAutograd", compute)
    torch.library.register_fake(full_name, fake)
    return getattr(torch.ops.sfpformat, name).default


def _weight(data: torch.Tensor, dtype: torch.dtype, compute: torch.dtype, kept: str) -> torch.Tensor:
    """Returns the decoded weight, on the device of its bytes. Read-only: it may be in the cache."""
    store = cache_of(kept)
    found = None if store is None else store.find(data, dtype, compute)
    if found is None:
        found = packed.decode(data).to(data.device, dtype).to(compute)
        if store is not None:
            store.keep(data, dtype, compute, found)
    return found


def _decode(data: torch.Tensor, shape: list[int], dtype: torch.dtype, kept: str) -> torch.Tensor:
    store = cache_of(kept)
    found = None if store is None else store.find(data, dtype, dtype)
    return packed.decode(data).to(data.device, dtype) if found is None else found.clone()


def _fake_decode(data: torch.Tensor, shape: list[int], dtype: torch.dtype, kept: str) -> torch.Tensor:
    return data.new_empty(shape, dtype=dtype)


def compute_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    data: torch.Tensor,
    features: int,
    turned: bool,
    dtype: torch.dtype,
    compute: torch.dtype,
    kept: str,
) -> torch.Tensor:
    """The implementation of the operator ``linear``."""
    if not turned and x.dtype == compute and is_decoded_on(data.device, None):
        from . import resident_weight  # lazy: the import prepares the kernels' tables

        out = resident_weight.multiply(x, bias, data, dtype)
        if out is not None:
            return out
    weight = _weight(data, dtype, compute, kept)
    return (x @ weight if turned else F.linear(x, weight, bias)).contiguous()


def _fake_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    data: torch.Tensor,
    features: int,
    turned: bool,
    dtype: torch.dtype,
    compute: torch.dtype,
    kept: str,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], features)


def _embedding(
    ids: torch.Tensor, data: torch.Tensor, columns: int, dtype: torch.dtype, kept: str
) -> torch.Tensor:
    store = cache_of(kept)
    whole = None if store is None else store.find(data, dtype, dtype)
    if whole is None:
        rows = packed.decode_rows(data, ids.detach().reshape(-1).to("cpu", torch.int64))
        if rows is not None:
            return rows.to(data.device, dtype).reshape(*ids.shape, columns)
        whole = _weight(data, dtype, dtype, kept)
    return F.embedding(ids, whole)


def _fake_embedding(
    ids: torch.Tensor, data: torch.Tensor, columns: int, dtype: torch.dtype, kept: str
) -> torch.Tensor:
    return data.new_empty(*ids.shape, columns, dtype=dtype)


# Returns the decoded weight, a new tensor of that shape.
decode = _operator(
    "decode(Tensor data, SymInt[] shape, ScalarType dtype, str kept)",
    _decode,
    _fake_decode,
)
# Returns x @ weight.T + bias, [..., columns] -> [..., rows]. If ``turned``, returns x @ weight, [..., rows]
# -> [..., columns], without bias. ``features`` is the size of the result's last dimension.
linear = _operator(
    "linear(Tensor x, Tensor? bias, Tensor data, SymInt features, bool turned, "
    "ScalarType dtype, ScalarType compute, str kept)",
    compute_linear,
    _fake_linear,
)
# Returns weight[ids], [...] -> [..., columns].
embedding = _operator(
    "embedding(Tensor ids, Tensor data, SymInt columns, ScalarType dtype, str kept)",
    _embedding,
    _fake_embedding,
)
