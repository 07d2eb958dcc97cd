"""Applies deltas to models whose parameters are parts of tensors: DTensors, or named slices."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from types import EllipsisType
from typing import Any, TypeAlias

import torch

from ..container.delta_map import DeltaMap
from ..deltas.applying import uninterrupted
from ..deltas.reading import Delta
from ..deltas.slices import Slice, apply_to_slices
from ..errors import OptionError
from ..names import listed, quoted, require_mapping, unmatched
from .overlaps import is_written, require_separate
from .tensors import Array, address_of, array_of, count_write, memory_of, require_memory, tensor_of

# The part of a tensor that a process holds, such as ``np.s_[:, 64:128]``.
SliceIndex: TypeAlias = slice | EllipsisType | tuple[slice | EllipsisType, ...]


def is_distributed(tensor: object) -> bool:
    """Returns whether a tensor is a DTensor, of which this process holds a part."""
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, "full_tensor")


def apply_slices(
    target: torch.nn.Module | MutableMapping[str, torch.Tensor],
    delta: Delta,
    slices: Mapping[str, SliceIndex],
    group: Any,
) -> DeltaMap:
    """Applies a delta to the parts of tensors that this process holds; same as `apply_delta`."""
    if isinstance(target, torch.nn.Module):
        state: Mapping[str, torch.Tensor] = dict(target.state_dict(keep_vars=True))
    else:
        require_mapping(target, "target")
        state = target
    for name in slices:
        if name not in state:
            raise OptionError(f"slices: {unmatched(name, state)}")
    shapes = {tensor.name: tensor.shape for tensor in delta.map.tensors}
    held = {name: _part_of(name, tensor, slices.get(name), shapes) for name, tensor in state.items()}
    if isinstance(target, torch.nn.Module):  # a tied tensor needs only one of its names
        places = {address_of(held[name][0]) for name in shapes if name in held}
        held = {n: part for n, part in held.items() if n in shapes or address_of(part[0]) not in places}
    locals_ = {name: local for name, (local, _, _) in held.items()}
    require_separate(locals_, delta.map)
    copied: dict[str, tuple[Array, torch.Tensor]] = {}
    parts = {
        name: Slice(_array(name, local, copied), shape, start) for name, (local, shape, start) in held.items()
    }
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank(group) if distributed else 0
    if rank < 0:
        raise OptionError("this process is not a member of group")

    def exchange(payload: object) -> list[Any]:
        if not distributed:
            return [payload]
        received: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(received, payload, group=group)
        return received

    found = apply_to_slices(parts, delta, exchange, rank)

    def finish() -> None:
        changed = {tensor.name for tensor in found.tensors if tensor.kind != "unchanged"}
        with torch.no_grad():
            for name, (array, tensor) in copied.items():
                if name in changed:
                    tensor.copy_(tensor_of(array))

    uninterrupted(finish)
    for tensor in found.tensors:
        if is_written(tensor, locals_):
            count_write(locals_[tensor.name])
    return found


def _array(name: str, tensor: torch.Tensor, copied: dict[str, tuple[Array, torch.Tensor]]) -> Array:
    """Returns the elements of a part. Adds it to ``copied`` if they are not the tensor's memory."""
    require_memory(tensor, f"tensor {name!r}")
    array = array_of(tensor, name)
    if tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.is_contiguous():
        return memory_of(tensor)
    array = array.copy()
    copied[name] = array, tensor
    return array


def _part_of(
    name: str, tensor: torch.Tensor, index: SliceIndex | None, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
    """Returns the elements that this process holds, the shape of the whole tensor, and their start in it.

    Raises:
        OptionError: the part is not a box of the tensor, or does not have the size that it should.
    """
    if is_distributed(tensor):
        if index is not None:
            raise OptionError(f"slices: {quoted(name)} is a DTensor, which knows its part; omit it")
        return _part_of_dtensor(name, tensor)
    if index is None:
        return tensor, tuple(tensor.shape), (0,) * tensor.ndim
    shape = shapes.get(name)
    if shape is None:
        raise OptionError(f"slices: the delta has no tensor {quoted(name)}")
    start, size = _box(name, index, shape)
    if tuple(tensor.shape) != size:
        raise OptionError(
            f"slices: {quoted(name)} has the shape {list(tensor.shape)}, but {index!r} of {list(shape)} "
            f"has {list(size)}"
        )
    return tensor, shape, start


def _box(name: str, index: SliceIndex, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns start and size of a slice of a tensor."""
    items = index if isinstance(index, tuple) else (index,)
    if items.count(...) > 1 or len(items) - items.count(...) > len(shape):
        raise OptionError(f"slices: {index!r} of {quoted(name)} has too many items for {list(shape)}")
    at = items.index(...) if ... in items else len(items)
    missing = len(shape) - (len(items) - items.count(...))
    ranges = []
    for item, length in zip((*items[:at], *[slice(None)] * missing, *items[at + 1 :]), shape, strict=True):
        found = range(length)[item] if isinstance(item, slice) else None
        if found is None or found.step != 1:
            raise OptionError(f"slices: {index!r} of {quoted(name)} must consist of slices without steps")
        ranges.append(found)
    return tuple(r.start for r in ranges), tuple(len(r) for r in ranges)


def _part_of_dtensor(name: str, tensor: Any) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
    """Returns the local tensor of a DTensor, the shape of the whole, and the start of the local one.

    Raises:
        OptionError: it is not in plain shards, or this process is not in its mesh.
    """
    from torch.distributed.tensor import Replicate, Shard  # lazy: slow to import

    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        raise OptionError(f"tensor {quoted(name)}: this process is not in the mesh of the DTensor")
    wrong = [placement for placement in tensor.placements if type(placement) not in (Shard, Replicate)]
    if wrong:
        raise OptionError(f"tensor {quoted(name)}: the placement {wrong[0]} is neither Shard nor Replicate")
    start, size = [0] * tensor.ndim, list(tensor.shape)
    for placement, number, count in zip(tensor.placements, coordinate, tensor.device_mesh.shape, strict=True):
        if isinstance(placement, Shard):
            dim = placement.dim
            chunk = -(-size[dim] // count)  # as torch.chunk divides
            first = min(number * chunk, size[dim])
            start[dim] += first
            size[dim] = min(chunk, size[dim] - first)
    with torch.no_grad():
        local: torch.Tensor = tensor.to_local()
    if list(local.shape) != size:
        raise OptionError(
            f"tensor {quoted(name)}: the local part has the shape {list(local.shape)}, not {size} as its "
            f"placements {listed([str(one) for one in tensor.placements])} say"
        )
    return local, tuple(tensor.shape), tuple(start)
