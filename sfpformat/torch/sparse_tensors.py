"""Reads sparse tensors from a file: only survivors and their positions, never the dense tensor."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ..decode.reader import SfpFile
from ..decode.shards import ShardedFile
from ..dtypes import DTYPES
from ..errors import MismatchError, OptionError
from .tensors import Array, tensor_of

Layout = str | torch.layout

_LAYOUTS: dict[str, torch.layout] = {
    "strided": torch.strided,
    "coo": torch.sparse_coo,
    "csr": torch.sparse_csr,
}


def layout_of(layout: Layout) -> torch.layout:
    """Returns the torch layout of a name; returns a torch layout unchanged.

    Raises:
        OptionError: the layout is not one of strided, coo and csr.
    """
    found = _LAYOUTS.get(layout) if isinstance(layout, str) else layout
    if found not in _LAYOUTS.values() or found is None:
        raise OptionError(f"layout is {layout!r}, must be one of 'strided', 'coo', 'csr'")
    return found


def read_sparse(file: SfpFile | ShardedFile, name: str, layout: torch.layout) -> torch.Tensor:
    """Returns a sparse tensor of the survivors, on the CPU; indices are int64.

    Survivors are entries even if they are zero. If a tensor has no mask, its entries are all elements whose
    bits differ from +0.

    Raises:
        MissingTensorError: there is no tensor of that name.
        InvalidFileError, LimitError: the file is damaged or refused.
        MismatchError: the layout is CSR and the tensor does not have two dimensions.
    """
    entry = file.entry(name)
    shape = entry.shape
    if layout == torch.sparse_csr and len(shape) != 2:
        raise MismatchError(f"tensor {name!r}: CSR needs two dimensions, it has {len(shape)}; use 'coo'")
    positions, values = file.get_survivors(name)
    if entry.mask is None:
        alive = _not_plus_zero(values, DTYPES[entry.dtype.name].itemsize)
        positions, values = positions[alive], values[alive]
    if layout == torch.sparse_csr:
        return _csr(shape, positions, values)
    indices = np.empty((len(shape), len(positions)), np.int64)
    for axis in reversed(range(len(shape))):
        positions, indices[axis] = np.divmod(positions, max(shape[axis], 1))
    return torch.sparse_coo_tensor(
        torch.from_numpy(indices), tensor_of(values), shape, is_coalesced=True, check_invariants=False
    )


def _csr(shape: tuple[int, ...], positions: NDArray[np.int64], values: Array) -> torch.Tensor:
    rows, columns = shape
    starts = np.searchsorted(positions, np.arange(rows + 1) * columns)
    return torch.sparse_csr_tensor(
        torch.from_numpy(starts.astype(np.int64, copy=False)),
        torch.from_numpy(positions % max(columns, 1)),
        tensor_of(values),
        shape,
        check_invariants=False,
    )


def _not_plus_zero(values: Array, itemsize: int) -> NDArray[np.bool_]:
    """Returns which elements have any bit set: bool [elements]."""
    octets = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), itemsize)
    return np.asarray(octets.any(axis=1))
