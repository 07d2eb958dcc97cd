"""The tensors of the models that deltas compare or change."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, MutableMapping
from typing import TypeAlias

import torch

from ..container.delta_map import DeltaMap
from ..decode.reader import SfpFile
from ..decode.shards import ShardedFile
from ..deltas.result import DeltaFile
from ..errors import OptionError
from ..names import listed, require_mapping
from .layers import compressed_weights
from .loading import identity
from .tensors import Array, array_of, memory_of, tensor_of, torch_dtype
from .ties import TiedNames

# What holds the tensors of a model.
Source: TypeAlias = (
    torch.nn.Module | Mapping[str, torch.Tensor] | SfpFile | ShardedFile | DeltaFile | str | os.PathLike[str]
)


def arrays_of(
    source: Source,
) -> Mapping[str, Array] | SfpFile | ShardedFile | DeltaFile | str | os.PathLike[str]:
    """Returns the tensors of a module or state dict as arrays; other sources unchanged."""
    named = named_tensors(source)
    if isinstance(named, Mapping):
        return {name: array_of(tensor, name) for name, tensor in named.items()}
    return named


def named_tensors(
    source: Source,
) -> Mapping[str, torch.Tensor] | SfpFile | ShardedFile | DeltaFile | str | os.PathLike[str]:
    """Returns the tensors of a module, tied ones under one name; other sources unchanged."""
    if not isinstance(source, torch.nn.Module):
        return source
    state = state_of(source)
    tied = TiedNames(state)
    return {name: tensor for name, tensor in state.items() if tied.kept(name) == name}


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the ``state_dict`` of a module, with its own tensors.

    Raises:
        OptionError: layers are compressed.
    """
    names = sorted(compressed_weights(model))
    if names:
        raise OptionError(
            f"layers of the module are compressed, so that a delta finds no elements: {listed(names)}; call "
            "decompress_model first"
        )
    return dict(model.state_dict(keep_vars=True))


def elements_of(name: str, tensor: torch.Tensor, copied: dict[str, tuple[Array, torch.Tensor]]) -> Array:
    """Returns the elements of a tensor: in its memory if it is contiguous there and on the CPU.

    Args:
        name: its name.
        tensor: the tensor.
        copied: otherwise, the copy and the tensor are added under this name, for `copy_back`.

    Raises:
        OptionError: the tensor has no memory of its own, or the format does not support its dtype.
    """
    array = array_of(tensor, name)
    if tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.is_contiguous():
        return memory_of(tensor)
    array = array.copy()
    copied[name] = array, tensor
    return array


def copy_back(copied: Mapping[str, tuple[Array, torch.Tensor]], delta: DeltaMap) -> None:
    """Copies the arrays of `elements_of` that a delta changed to their tensors."""
    with torch.no_grad():
        for each in delta.tensors:
            if each.kind != "unchanged" and each.name in copied:
                array, tensor = copied[each.name]
                tensor.copy_(tensor_of(array))


def without_other_names(state: Mapping[str, torch.Tensor], known: Container[str]) -> dict[str, torch.Tensor]:
    """Returns tensors without those names of tied ones that are not known, if another name is."""
    tied = {identity(tensor) for name, tensor in state.items() if name in known}
    return {name: tensor for name, tensor in state.items() if name in known or identity(tensor) not in tied}


def state_of_target(
    target: torch.nn.Module | MutableMapping[str, torch.Tensor], delta: DeltaMap
) -> Mapping[str, torch.Tensor]:
    """Returns the tensors of a target. Of a module, omits `without_other_names`.

    Raises:
        OptionError: the target is no mapping, or the delta changes the structure of a module.
    """
    if not isinstance(target, torch.nn.Module):
        require_mapping(target, "target")
        return target
    state = state_of(target)
    known = {tensor.name: tensor for tensor in delta.tensors}
    new = [
        tensor.name
        for tensor in delta.tensors
        if tensor.kind in ("added", "removed")
        or (
            tensor.kind == "replaced"
            and tensor.name in state
            and (state[tensor.name].dtype, tuple(state[tensor.name].shape))
            != (torch_dtype(tensor.dtype.name), tensor.shape)
        )
    ]
    if new:
        raise OptionError(
            f"the delta adds, removes, reshapes or changes the dtype of {listed(new)}, which a module "
            "cannot; pass a state dict"
        )
    return without_other_names(state, known)
