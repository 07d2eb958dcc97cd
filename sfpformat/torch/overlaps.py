"""Tensors that share memory: a delta cannot give the same element two values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from ..container.delta_map import DeltaMap, DeltaTensor
from ..errors import OptionError
from ..names import quoted
from .loading import identity
from .tensors import address_of

_WRITTEN = ("changed", "replaced")


def require_separate(state: Mapping[str, torch.Tensor], delta: DeltaMap) -> None:
    """Refuses to change tensors whose elements share memory, except tied ones with equal results.

    Args:
        state: name -> tensor of the base.
        delta: what a delta says about the tensors.

    Raises:
        OptionError: elements of a tensor that the delta changes share memory with each other, or with those
            of another tensor that the delta does not change in the same way.
    """
    listed = {tensor.name: tensor for tensor in delta.tensors}
    groups: dict[tuple[torch.device, int], list[str]] = {}
    for name, tensor in state.items():
        if name not in listed or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            continue
        if not address_of(tensor) or not tensor.numel():
            continue
        if is_written(listed[name], state) and overlaps_itself(tensor):
            raise OptionError(
                f"tensor {quoted(name)}: its elements share memory, so that the delta cannot change each; "
                "pass a copy"
            )
        storage = tensor.untyped_storage()
        groups.setdefault((tensor.device, storage.data_ptr()), []).append(name)
    for names in groups.values():
        for one, other in _close_pairs({name: state[name] for name in names}):
            alike = identity(state[one]) == identity(state[other]) and _alike(listed[one], listed[other])
            if not alike and _written((one, other), listed) and share_elements(state[one], state[other]):
                raise OptionError(
                    f"{quoted(one)} and {quoted(other)} share memory, but differ in the result of the delta; "
                    "pass copies in a state dict"
                )


def _close_pairs(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Yields the names of two tensors of which one begins before the other ends."""
    names = sorted(tensors, key=lambda name: address_of(tensors[name]))
    for i, one in enumerate(names):
        end = _end_of(tensors[one])
        for other in names[i + 1 :]:
            if address_of(tensors[other]) >= end:
                break
            yield one, other


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Returns whether elements of a strided tensor may share memory, as after ``expand``."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def share_elements(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Returns whether two strided tensors of one storage share a byte.

    Needs as many bytes as both tensors span together, unless they are the same.
    """
    if identity(one) == identity(other):
        return True
    start = min(address_of(one), address_of(other))
    seen = torch.zeros(max(_end_of(one), _end_of(other)) - start, dtype=torch.uint8)

    def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
        strides = [stride * tensor.element_size() for stride in tensor.stride()]
        size = (*tensor.shape, tensor.element_size())
        return seen.as_strided(size, (*strides, 1), address_of(tensor) - start)

    bytes_of(one).fill_(1)
    return bool(bytes_of(other).any())


def is_written(tensor: DeltaTensor, state: Mapping[str, torch.Tensor]) -> bool:
    """Returns whether applying a delta writes into a tensor of the base that keeps its dtype and shape."""
    return tensor.kind in _WRITTEN and isinstance(state.get(tensor.name), torch.Tensor)


def _written(names: Iterable[str], listed: Mapping[str, DeltaTensor]) -> bool:
    return any(listed[name].kind in _WRITTEN for name in names)


def _alike(one: DeltaTensor, other: DeltaTensor) -> bool:
    """Returns whether two tensors are the same in the result."""
    return (one.result, one.dtype, one.shape) == (other.result, other.dtype, other.shape)


def _end_of(tensor: torch.Tensor) -> int:
    """Returns the address after a tensor's last element."""
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return address_of(tensor) + (reach + 1) * tensor.element_size()
