"""Applies deltas to tensors on a GPU, where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ..container.delta_map import DeltaMap
from ..deltas.applying import uninterrupted
from ..deltas.checksums import checksum_of
from ..deltas.on_device import DeviceChange, DeviceTensor
from ..deltas.reading import Delta
from ..deltas.tensors import Spec, patterns_of
from ..errors import OptionError
from . import device_memory
from .files import is_decoded_on
from .tensors import array_of, format_dtype, require_memory, tensor_of

if TYPE_CHECKING:
    from ..dtypes import Dtype

# Deltas of more tensors are applied by the CPU: the kernels number the parts of a block with 20 bits.
_MOST_TENSORS = 1 << 16


def device_for(state: Mapping[str, torch.Tensor], delta: Delta) -> torch.device | None:
    """Returns the device that applies a delta to its own tensors, or None if the CPU applies it.

    The device does if it has all tensors that the delta changes or replaces, strided; it has an engine, which
    was not excluded by the name of another; the delta lists at most 65,536 tensors; and no two tensors
    overlap, except those that have the same memory.
    """
    kinds = ("changed", "replaced")
    changed = [state[each.name] for each in delta.map.tensors if each.kind in kinds and each.name in state]
    if not changed or len(delta.map.tensors) > _MOST_TENSORS:
        return None
    if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        return None  # the CPU raises the error
    device = changed[0].device
    if any(tensor.device != device or tensor.layout != torch.strided for tensor in changed):
        return None
    if not is_decoded_on(device, delta.requested):
        return None
    own = [tensor for tensor in state.values() if tensor.device == device and _is_plain(tensor)]
    places = sorted(
        {(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in own if tensor.nbytes}
    )
    return None if any(stop > start for (_, stop), (start, _) in pairwise(places)) else device


def _is_plain(tensor: torch.Tensor) -> bool:
    """Returns whether the elements of a tensor are in its memory, in order."""
    is_lazy = tensor.is_conj() or tensor.is_neg()
    return tensor.layout == torch.strided and tensor.is_contiguous() and not is_lazy


def apply_on_device(
    state: Mapping[str, torch.Tensor],
    delta: Delta,
    device: torch.device,
    finish: Callable[[dict[str, torch.Tensor], list[str]], None],
) -> DeltaMap:
    """Changes tensors of a device in place. Changes all or none.

    Tensors with gaps or in another order are copied on the device, changed, and copied back. Replaced tensors
    are kept in the memory of the host, before and after.

    Args:
        state: name -> tensor.
        delta: the delta.
        device: the result of `device_for`.
        finish: called after all changes, with the tensors to add by name, and the names of those to remove.

    Returns:
        What the delta says about the tensors.

    Raises:
        OptionError, BaseMismatchError, InvalidFileError, LimitError, OSError, PartlyChangedError: as in
            `sfpformat.torch.apply_delta`.
    """
    specs: dict[str, Spec] = {}
    for name, tensor in state.items():
        require_memory(tensor, f"tensor {name!r}")
        specs[name] = Spec(_dtype_of(tensor, name), tuple(tensor.shape))
    delta.require_base(specs)
    index, stream = device_memory.stream_of(device)
    engine = device_memory.engine_of(device)
    own: dict[str, DeviceTensor] = {}
    copied: dict[str, torch.Tensor] = {}
    others: dict[str, Callable[[], int]] = {}
    kinds = {tensor.name: tensor.kind for tensor in delta.map.tensors}
    for name, tensor in state.items():
        plain = tensor.detach()
        if kinds[name] == "changed" and not _is_plain(plain):
            plain = copied[name] = (
                plain.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
            )
        if plain.device == device and _is_plain(plain):
            own[name] = DeviceTensor(plain.data_ptr(), specs[name].dtype, plain.nbytes)
        else:
            others[name] = partial(_checksum_of, plain, name, specs[name].dtype)
    with (
        device_memory.current(device),
        DeviceChange(delta, own, others, engine.open_changes(index, stream)) as change,
    ):
        change.check()
        stored = {
            each.name: tensor_of(delta.stored(each))
            for each in delta.map.tensors
            if each.kind in ("replaced", "added")
        }
        same = {each.name for each in delta.map.tensors if specs.get(each.name) == (each.dtype, each.shape)}
        copied |= {name: tensor for name, tensor in stored.items() if name in same}
        old = {name: tensor_of(array_of(state[name], name).copy()) for name in stored if name in same}
        new = {name: tensor for name, tensor in stored.items() if name not in same}
        gone = [tensor.name for tensor in delta.map.tensors if tensor.kind == "removed"]

        def work() -> None:
            with device_memory.current(device), torch.no_grad():
                changes = engine.open_changes(index, stream)
                change.apply(changes)
                begun: list[str] = []
                try:
                    for name, values in copied.items():
                        begun.append(name)
                        state[name].copy_(values)
                except BaseException:
                    try:
                        change.restore(changes)
                    finally:
                        for name in begun:
                            state[name].copy_(old.get(name, copied[name]))
                    raise
                finish(new, gone)

        uninterrupted(work)
    return delta.map


def _dtype_of(tensor: torch.Tensor, name: str) -> Dtype:
    found = format_dtype(tensor.dtype)
    if found is None:
        raise OptionError(f"tensor {name!r}: the format does not support the dtype {tensor.dtype}")
    return found


def _checksum_of(tensor: torch.Tensor, name: str, dtype: Dtype) -> int:
    return checksum_of(patterns_of(array_of(tensor, name), dtype))
