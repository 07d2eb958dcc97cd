"""Applies deltas to models whose parameters are parts of tensors: DTensors, or named slices."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import EllipsisType
from typing import Any, TypeAlias

import torch

from ..container.delta_map import DeltaMap
from ..deltas.applying import uninterrupted
from ..deltas.reading import Delta
from ..deltas.slices import Slice, apply_to_slices
from ..errors import OptionError
from ..io.source import Readable
from ..names import listed, quoted, require_mapping, unmatched
from .delta_models import copy_back, elements_of, state_of, without_other_names
from .groups import Group, is_distributed
from .overlaps import is_written, require_separate
from .tensors import Array, count_write

# The part of a tensor that a process holds, such as ``np.s_[:, 64:128]``.
SliceIndex: TypeAlias = slice | EllipsisType | tuple[slice | EllipsisType, ...]


@dataclass(frozen=True)
class _Held:
    """The parts that this process holds.

    Attributes:
        tensors: name -> the part.
        copied: the parts that are not contiguous in CPU memory; see `elements_of`.
        slices: the same parts as arrays, with their places.
    """

    tensors: dict[str, torch.Tensor]
    copied: dict[str, tuple[Array, torch.Tensor]]
    slices: dict[str, Slice]


def apply_slices(
    target: torch.nn.Module | MutableMapping[str, torch.Tensor],
    delta: Readable | Delta,
    slices: Mapping[str, SliceIndex],
    group: Any,
    options: Mapping[str, Any],
) -> DeltaMap:
    """Applies a delta to the parts of tensors that this process holds; same as `apply_delta`.

    Args:
        target, delta, slices, group: same as for `apply_delta`.
        options: the other arguments of `Delta`, if it is not open.
    """
    members = Group(group)
    prepared: list[tuple[Delta, _Held]] = []
    with ExitStack() as stack:

        def prepare() -> None:
            opened = delta if isinstance(delta, Delta) else stack.enter_context(Delta(delta, **options))
            opened.require_elements()
            prepared.append((opened, _held_by(target, opened.map, slices)))

        members.agreed(prepare, "nothing was changed")
        opened, held = prepared[0]
        found = apply_to_slices(held.slices, opened, members.exchange, members.rank)
        uninterrupted(partial(copy_back, held.copied, found))
    for tensor in found.tensors:
        if is_written(tensor, held.tensors):
            count_write(held.tensors[tensor.name])
    return found


def _held_by(
    target: torch.nn.Module | MutableMapping[str, torch.Tensor],
    delta: DeltaMap,
    slices: Mapping[str, SliceIndex],
) -> _Held:
    """Returns the parts that this process holds.

    Raises:
        OptionError: they do not fit the delta, have no memory of their own, or overlap.
    """
    shapes = {tensor.name: tensor.shape for tensor in delta.tensors}
    if isinstance(target, torch.nn.Module):
        state: Mapping[str, torch.Tensor] = state_of(target)
    else:
        require_mapping(target, "target")
        state = target
    for name in slices:
        if name not in state:
            raise OptionError(f"slices: {unmatched(name, state)}")
    if isinstance(target, torch.nn.Module):
        state = without_other_names(state, shapes)
    places = {name: _part_of(name, tensor, slices.get(name), shapes) for name, tensor in state.items()}
    tensors = {name: local for name, (local, _, _) in places.items()}
    require_separate(tensors, delta)
    copied: dict[str, tuple[Array, torch.Tensor]] = {}
    parts = {
        name: Slice(elements_of(name, local, copied), shape, start)
        for name, (local, shape, start) in places.items()
    }
    return _Held(tensors, copied, parts)


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
