"""Decodes weights whose compressed bytes are on a CUDA device, or multiplies by them without decoding.

Rules: the CPU inspects the bytes once and compares their checksums. The result is cached (`by_memory`). If
the kernels refuse or do not support a weight, the CPU decodes it, which gives the weight or raises the error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ..coding.quantisers import F32
from ..container.entry import TensorEntry
from ..decode.jobs import fill_gaps
from ..decode.reader import require_within_limits
from ..decode.selection import Selection
from ..engines import Operands, ResidentMatrix, ResidentRun, ResidentTensor
from ..errors import FileFault
from . import device_memory as devices
from .by_memory import ByMemory
from .tensors import format_dtype, torch_dtype
from .weight_file import TENSOR_NAME, open_weight

MOST_ROWS = 8  # activations with more rows: decoding the weight first is faster
_ALIGNMENT = 16  # bytes: the width of a kernel's loads

# Returns the compute capability of a device.
capability_of: Callable[[torch.device], tuple[int, int]] = torch.cuda.get_device_capability


@dataclass
class _Weight:
    """Cached information about the bytes of a weight.

    Attributes:
        entry: the directory entry of the weight.
        vectors: the vectors of its vector chunk.
        resident: its chunks, on the device.
        is_checked: whether all of them were decoded successfully once.
        placed: (weight dtype, compute dtype) -> the prepared product, or None if kernels do not support it.
    """

    entry: TensorEntry
    vectors: dict[str, F32]
    resident: ResidentTensor
    is_checked: bool = False
    placed: dict[tuple[torch.dtype, torch.dtype], ResidentMatrix | None] = field(default_factory=dict)


# The value is None for bytes that the CPU has to decode.
_known: ByMemory[_Weight | None] = ByMemory()
_lock = threading.RLock()  # so that two threads do not inspect the same bytes


def decode(data: torch.Tensor) -> torch.Tensor | None:
    """Decodes the weight into a new tensor on the device of its bytes; None if the CPU has to decode it.

    Args:
        data: a file with one tensor, uint8 [bytes], on a CUDA device.
    """
    with devices.current(data.device), torch.inference_mode(False):
        weight = _weight_of(data)
        if weight is None:
            return None
        entry, queue = weight.entry, devices.queue_of(data.device)
        out = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype.name), device=data.device)
        if weight.is_checked:
            weight.resident.decode(queue, out.data_ptr())
        elif weight.resident.is_good(queue, out.data_ptr()):
            weight.is_checked = True
        else:
            _known.put(None, data)
            return None
        return out


def entry_of(data: torch.Tensor) -> TensorEntry | None:
    """Returns the directory entry of the weight; None if the CPU has to decode it.

    Args:
        data: as for `decode`.
    """
    with devices.current(data.device):
        weight = _weight_of(data)
        return None if weight is None else weight.entry


def decode_rows(data: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor | None:
    """Decodes rows of a matrix into a new tensor on the device of its bytes; None if the CPU has to.

    Args:
        data: as for `decode`.
        rows: row indices, ascending.
    """
    with devices.current(data.device), torch.inference_mode(False):
        weight = _weight_of(data)
        if weight is None:
            return None
        entry, queue = weight.entry, devices.queue_of(data.device)
        starts, columns, segment = rows * entry.columns, entry.columns, entry.segment
        if not len(rows):
            return torch.empty(0, columns, dtype=torch_dtype(entry.dtype.name), device=data.device)
        wanted = Selection((len(starts), columns), starts, range(columns)).segments(segment)
        segments = fill_gaps(wanted)
        size = len(segments) * segment
        out = torch.empty(size, dtype=torch_dtype(entry.dtype.name), device=data.device)
        if not weight.resident.decode_runs(queue, _runs(entry, segments), out.data_ptr()):
            return None
        first = np.searchsorted(segments, starts // segment) * segment + starts % segment
        places = torch.from_numpy(first).to(data.device)[:, None] + torch.arange(columns, device=data.device)
        return out[places]


def _runs(entry: TensorEntry, segments: NDArray[np.int64]) -> list[ResidentRun]:
    """Groups adjacent segments of a chunk into runs, which are decoded one after the other."""
    chunks, inside = np.divmod(segments, entry.chunk)
    breaks = np.flatnonzero((np.diff(segments) > 1) | (np.diff(chunks) > 0)) + 1
    item = entry.segment * entry.dtype.itemsize
    return [
        (int(chunks[first]), int(inside[first]), int(inside[stop - 1]) + 1, first * item)
        for first, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(segments)], strict=True)
    ]


def multiply(
    x: torch.Tensor, bias: torch.Tensor | None, data: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """Returns x @ weight.T + bias without decoding the weight; None if unsupported, or if decoding is faster.

    The weights equal the decoded ones. Products are summed in float32, always in the same order.

    Args:
        x: [..., columns].
        bias: [rows], or None.
        data: as for `decode`.
        dtype: the dtype that the weight is converted to, before it is converted to the dtype of x.
    """
    # The processor's time of a call counts: a small product is as fast as the launch of its kernel.
    shape, device = x.shape, data.device
    batch = x.numel() // max(shape[-1], 1)
    if not 1 <= batch <= MOST_ROWS or x.device != device:
        return None
    if bias is not None and (bias.dtype != x.dtype or bias.device != device):
        return None
    with devices.current(device):
        weight = _weight_of(data)
        placed = None if weight is None else _placed(weight, device, dtype, x.dtype)
        if placed is None or shape[-1] != placed.product.columns:
            return None
        product, own = placed.product, _aligned(x)
        y = x.new_empty((*shape[:-1], product.rows))
        # torch's caching allocator reuses this memory in stream order, so that it may be released here.
        size = product.sums_bytes(batch)
        sums = x.new_empty(size, dtype=torch.uint8) if size else None
        offset = None if bias is None else bias.contiguous()
        queue, counters = devices.queue_and_counters_of(device, product.blocks)
        operands = Operands(
            own.data_ptr(),
            0 if offset is None else offset.data_ptr(),
            y.data_ptr(),
            batch,
            0 if sums is None else sums.data_ptr(),
            counters,
        )
        placed.multiply(queue, operands)
        return y


def _aligned(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


def _placed(
    weight: _Weight, device: torch.device, dtype: torch.dtype, compute: torch.dtype
) -> ResidentMatrix | None:
    """Returns the prepared product of a weight, created on first use; None if kernels do not support it."""
    key = dtype, compute
    if key in weight.placed:  # no lock: entries are never removed
        return weight.placed[key]
    with _lock:
        if key not in weight.placed:
            weight.placed[key] = _place(weight, device, dtype, compute)
        return weight.placed[key]


def _place(
    weight: _Weight, device: torch.device, dtype: torch.dtype, compute: torch.dtype
) -> ResidentMatrix | None:
    """Prepares a weight for products; None if kernels or device do not support them."""
    kept, other = format_dtype(dtype), format_dtype(compute)
    if kept is None or other is None:
        return None
    capability = capability_of(device)
    product = devices.engine_of(device).make_product(
        weight.entry, weight.vectors, kept.name, other.name, capability
    )
    return None if product is None else weight.resident.place(devices.queue_of(device), product)


# ------------------------------------------------------------------------------------- inspection of bytes


def _weight_of(data: torch.Tensor) -> _Weight | None:
    """Returns the cached information about some bytes; inspects them if there is none."""
    found = _known.entry(data)
    if found is not None:
        return found.value
    with _lock:
        found = _known.entry(data)  # another thread may have inspected them
        if found is not None:
            return found.value
        weight = _inspect(data)
        _known.put(weight, data)
        return weight


def _inspect(data: torch.Tensor) -> _Weight | None:
    """Inspects the bytes on the CPU; None if the CPU has to decode them."""
    if data.data_ptr() % _ALIGNMENT or not data.is_contiguous():
        return None
    engine = devices.engine_of(data.device)
    try:
        with open_weight(data) as file:
            entry = file.entry(TENSOR_NAME)
            if entry.fingerprints is None or not entry.positions:
                return None
            require_within_limits(file, entry)
            decoder = file.decoder(entry)
            recipe = engine.make_recipe(entry, decoder.vectors)
            if recipe is None:
                return None
            file.read_chunks([(entry, k) for k in range(len(entry.chunks))])
            at = data.data_ptr() + file.chunk_offset(entry, 0)
    except FileFault:  # the CPU decodes instead and raises the error
        return None
    resident = engine.hold(devices.queue_of(data.device), recipe, entry, at)
    return _Weight(entry, decoder.vectors, resident)
