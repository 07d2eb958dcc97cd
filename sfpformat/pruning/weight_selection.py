"""Selects the weights of a model to prune, and finds the dimension of their inputs.

Rules: the layer type determines the layout, because the shape does not tell which dimension the inputs are:
`nn.Linear` stores [outputs, inputs], the ``Conv1D`` of transformers' GPT-2 [inputs, outputs], convolutions
[outputs, inputs / groups, …], transposed ones [inputs, outputs / groups, …], and transformers' layers of
experts [experts, …]. By default, a warning lists weights that are not pruned.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..errors import OptionError, warn
from ..names import listed, require_known, require_mapping
from ..torch.tensors import missing_memory
from ..torch.ties import TiedNames
from .thresholds import Numbers, pattern_dim

T = TypeVar("T")
Weights = Mapping[str, Tensor]

# The weight matrices of transformers' layers of experts, stacked in one tensor.
_EXPERTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

# A warning lists matrices of unknown layers if together they have at least this share of the pruned weights.
# Smaller ones are usually position embeddings and the like.
_WORTH_A_WARNING = 0.1


@dataclass(frozen=True)
class Layout:
    """The layout of a weight's inputs.

    Attributes:
        inputs: the dimension of the inputs.
        stacked: whether the first dimension stacks independent matrices.
        groups: the number of independent groups of equal size that the inputs form.
    """

    inputs: int
    stacked: bool = False
    groups: int = 1

    def matrix(self, weight: Tensor) -> Tensor:
        """Returns a weight of rank 2 or more as [outputs, inputs of each output]; a view if possible."""
        if self.stacked:
            return self._swapped(weight).flatten(0, -2)
        return (weight.transpose(0, 1) if self.inputs == 0 else weight).flatten(1)

    def back(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Returns the matrix in the weight's shape; the inverse of `matrix`.

        Args:
            matrix: [outputs, inputs of each output], of any dtype.
            like: a tensor of the weight's shape.
        """
        if self.stacked:
            return self._swapped(matrix.reshape(self._swapped(like).shape))
        if self.inputs == 0:
            return matrix.reshape(like.transpose(0, 1).shape).transpose(0, 1)
        return matrix.reshape(like.shape)

    def _swapped(self, stack: Tensor) -> Tensor:
        """Swaps dimensions 1 and 2 of a stack of matrices if the inputs are dimension 1. Its own inverse."""
        return stack.transpose(1, 2) if self.inputs == 1 else stack


def layout_of(model: nn.Module, name: str) -> Layout:
    """Returns the layout of a parameter; that of `thresholds.pattern_dim` if its module type is unknown.

    Args:
        model: the model.
        name: name of the parameter. Any name of a tied parameter gives the layout of its layer, if it has
            one.
    """
    weight = model.get_parameter(name)
    for module, attribute in holders(model)[id(weight)]:
        if attribute in _matrices(module):
            return _layout_in(module, attribute, weight)
    return Layout(pattern_dim(tuple(weight.shape)))


def _layout_in(module: nn.Module, attribute: str, weight: Tensor) -> Layout:
    """Returns the layout of a weight matrix of a module."""
    if isinstance(module, _ConvTransposeNd):
        return Layout(0, groups=module.groups)
    if isinstance(module, _ConvNd):
        return Layout(1)
    if is_conv1d(module):
        return Layout(0)
    if attribute in _EXPERTS:
        return Layout(1 if getattr(module, "is_transposed", False) else 2, stacked=True)
    if isinstance(module, nn.Bilinear):
        return Layout(2)
    return Layout(pattern_dim(tuple(weight.shape)))


def holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Returns, by the `id` of each parameter, the modules and attributes that hold it; several if tied."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, attribute))
    return found


def is_conv1d(module: nn.Module) -> bool:
    """Returns whether a module is transformers' ``Conv1D``, a linear layer with weight [inputs, outputs]."""
    return any(
        one.__name__ == "Conv1D" and one.__module__.partition(".")[0] == "transformers"
        for one in type(module).__mro__
    )


def linear_layers(model: nn.Module, names: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """Returns the names of weights of linear layers, including ``Conv1D``, each with its layer.

    Args:
        model: the model.
        names: names of parameters. A tied parameter gives one item for each of its layers.
    """
    there = holders(model)
    return [
        (name, module)
        for name in names
        for module, attribute in there[id(model.get_parameter(name))]
        if attribute == "weight" and (isinstance(module, nn.Linear) or is_conv1d(module))
    ]


def is_sharded(value: object) -> bool:
    """Returns whether a tensor is a ``DTensor``, or a model has such parameters or was given to FSDP2."""
    if isinstance(value, nn.Module):
        modules = sys.modules.get("torch.distributed.fsdp")  # not imported: the model was not given to it
        found = getattr(modules, "FSDPModule", None)
        wrapped = found is not None and any(isinstance(module, found) for module in value.modules())
        return wrapped or any(map(is_sharded, value.parameters()))
    kinds = sys.modules.get("torch.distributed.tensor")
    return kinds is not None and isinstance(value, kinds.DTensor)


def as_matrix(weight: Tensor) -> Tensor:
    """Returns a weight of rank 2 or more as the matrix [rows, columns] of SPEC.md chapter 2."""
    return weight.flatten(1)


def as_numbers(tensor: Tensor) -> Numbers:
    """Returns a tensor as a numpy array: float64 if it is float64, else float32."""
    plain = tensor.detach().cpu()
    return cast(Numbers, np.asarray((plain if plain.dtype is torch.float64 else plain.float()).numpy()))


# ------------------------------------------------------------------------------------ what can be pruned


def prunable(model: nn.Module) -> list[str]:
    """Returns the names of the weight matrices that are pruned by default, each tensor once.

    These are the weights of linear, bilinear and convolutional layers (including transposed ones and
    transformers' ``Conv1D``), recurrent layers, attention, and transformers' experts. Embeddings and weights
    tied to them are not included.

    Example: ``prunable(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))`` returns ``["0.weight"]``.
    """
    return _found(model, sharded=True)[0]


def _found(model: nn.Module, *, sharded: bool = False) -> tuple[list[str], dict[str, str]]:
    """Returns the names of `prunable`; and, for each weight of these layers that cannot be pruned, why.

    Args:
        model: the model.
        sharded: whether a ``DTensor`` can be pruned.
    """
    embeddings = {
        id(module._parameters.get("weight"))
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }
    names: dict[int, str] = {}
    left: dict[str, str] = {}
    for path, module in model.named_modules():
        for attribute in _matrices(module):
            name = f"{path}.{attribute}" if path else attribute
            weight = module._parameters.get(attribute)
            reason = _why_not(module, attribute, weight)
            if sharded and hasattr(weight, "full_tensor"):
                reason = ""
            if reason:
                left[name] = reason
            elif weight is not None and id(weight) not in embeddings:
                names.setdefault(id(weight), name)
    return list(names.values()), left


def _matrices(module: nn.Module) -> list[str]:
    """Returns the attributes of a module that are weight matrices, including hidden ones (`_is_hidden`)."""
    if isinstance(module, (nn.Linear, nn.Bilinear, _ConvNd)) or is_conv1d(module):
        return ["weight"]
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        names = [name.removesuffix("_orig") for name in module._parameters]
        return [name for name in names if name.startswith("weight")]
    if isinstance(module, nn.MultiheadAttention):
        return [name for name in _ATTENTION if getattr(module, name, None) is not None]
    if isinstance(getattr(module, "is_transposed", None), bool):
        there = {name: module._parameters.get(name) for name in _EXPERTS}
        return [name for name, weight in there.items() if weight is not None and weight.dim() == 3]
    return []


def _is_hidden(module: nn.Module, attribute: str) -> bool:
    """Returns whether a module computes an attribute from parameters or buffers with other names."""
    return (
        f"{attribute}_orig" in module._parameters
        or f"{attribute}_sfp" in module._buffers
        or parametrize.is_parametrized(module, attribute)
    )


def _why_not(module: nn.Module, attribute: str, weight: Tensor | None) -> str:
    """Returns why a weight cannot be pruned, and the remedy; "" if it can."""
    if weight is None:
        if f"{attribute}_orig" in module._parameters:
            return "torch.nn.utils.prune manages its mask; call take_masks first"
        if f"{attribute}_sfp" in module._buffers:
            return "the layer is compressed; call decompress_model first"
        if parametrize.is_parametrized(module, attribute):
            return "it is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
        return "it is not a parameter"
    if is_lazy(weight):
        return "it has no shape yet; run a batch through the model first"
    if not weight.is_floating_point():
        return f"its dtype is {weight.dtype}"
    if weight.is_meta:
        return "it is on the meta device and has no data"
    missing = missing_memory(weight)
    return f"it {missing}" if missing else ""


def chosen_weights(model: nn.Module, names: Sequence[str] | None) -> dict[str, Tensor]:
    """Returns the weights to prune, detached, by name.

    Args:
        model: the model.
        names: names of parameters. None takes `prunable`, and warns about layers whose weights cannot be
            pruned, and about large matrices of other modules.

    Raises:
        OptionError: a name is not that of a prunable float parameter of rank 2 or more, two names belong to
            the same tensor, or there are no names.
    """
    _require_whole(model)
    if names is None:
        names, left = _found(model)
        _warn_of_unpruned(model, names, left)
        if not names:
            raise OptionError("the model has no linear or convolutional layers; name the tensors to prune")
    chosen = chosen_tensors(model, names)
    for name, weight in chosen.items():
        if weight.dim() < 2:
            raise OptionError(f"{name!r} has shape {list(weight.shape)}, must be a matrix or of higher rank")
    return chosen


def _require_whole(model: nn.Module) -> None:
    """Refuses a model with sharded weights.

    Raises:
        OptionError: it has such weights.
    """
    if is_sharded(model):
        raise OptionError(
            "the weights of this model are sharded (DTensors), which only statistics, magnitude, fisher, "
            "wanda, comparable, best_start, learn_importance and prune support; here give a model with whole "
            "weights"
        )


def chosen_tensors(model: nn.Module, names: Sequence[str], *, buffers: bool = False) -> dict[str, Tensor]:
    """Returns float parameters of any rank, detached, by name.

    Args:
        model: the model.
        names: names of parameters; any name of a tied parameter is valid.
        buffers: whether names of buffers are valid too.

    Raises:
        OptionError: there are no names, a name is not that of a prunable float parameter, or two names belong
            to the same tensor.
    """
    _require_whole(model)
    if isinstance(names, str):
        raise OptionError(f"tensors is the string {names!r}; give a list of names")
    if not names:
        raise OptionError("no tensors are named: there is nothing to prune")
    there: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    if buffers:
        there |= dict(model.named_buffers(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen: dict[str, Tensor] = {}
    name_of: dict[int, str] = {}
    for name in names:
        path, _, attribute = name.rpartition(".") if isinstance(name, str) else ("", "", "")
        weight = there.get(name)
        module = modules.get(path)
        if weight is None and (module is None or not _is_hidden(module, attribute)):
            require_known([name], there, kind="parameter")
        reason = "" if module is None else _why_not(module, attribute, weight)
        if weight is None or reason:
            raise OptionError(f"{name!r} cannot be pruned: {reason}")
        other = name_of.setdefault(id(weight), name)
        if other != name:
            raise OptionError(f"{other!r} and {name!r} are the same tensor; give one of these names")
        chosen[name] = weight.detach()
    return chosen


def _warn_of_unpruned(model: nn.Module, names: Sequence[str], left: Mapping[str, str]) -> None:
    """Warns about weights that cannot be pruned, and about large matrices of unknown modules."""
    if left:
        (name, reason), *others = left.items()
        also = f"; nor can {listed([other for other, _ in others])}" if others else ""
        warn(f"{name!r} cannot be pruned: {reason}{also}")
    known = {
        id(weight)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag, parametrize.ParametrizationList))
        or _matrices(module)
        for weight in module._parameters.values()
    }
    unknown = {
        name: weight.numel()
        for name, weight in model.named_parameters()
        if id(weight) not in known and not is_lazy(weight)
        if weight.dim() > 1 and weight.is_floating_point()
    }
    size = sum(unknown.values())
    if size > _WORTH_A_WARNING * sum(model.get_parameter(name).numel() for name in names):
        warn(
            f"{listed(list(unknown))}: {size:,} weights of modules with an unknown layout are not pruned; "
            "give their names in tensors to prune them too"
        )


def named_once(model: nn.Module, given: Mapping[str, T], argument: str) -> dict[str, T]:
    """Returns the given values, one for each tensor. Keeps unknown names, which `chosen_tensors` refuses.

    Args:
        model: the model.
        given: values by name; any name of a tied tensor is valid.
        argument: name of the caller's argument, for errors.

    Raises:
        OptionError: ``given`` is not a mapping, or two names of one tensor have different values.
    """
    require_mapping(given, argument)
    there: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    there |= dict(model.named_buffers(remove_duplicate=False))
    known = {name: value for name, value in given.items() if name in there}
    once = TiedNames(there).one_each(known, argument)
    return {name: value for name, value in given.items() if name in once or name not in there}


def require_shapes(weights: Weights, given: Weights, what: str) -> None:
    """Refuses values whose shapes differ from those of the weights with the same names.

    Args:
        weights: weights by name, including all names in ``given``.
        given: values by name.
        what: description of the values for errors, such as "mask".

    Raises:
        OptionError: a value is not a tensor, or a shape differs.
    """
    for name, numbers in given.items():
        if not isinstance(numbers, Tensor):
            raise OptionError(f"the {what} of {name!r} is a {type(numbers).__name__}, must be a tensor")
        if numbers.shape != weights[name].shape:
            raise OptionError(
                f"the {what} of {name!r} has shape {list(numbers.shape)}, not {list(weights[name].shape)}"
            )


def require_masks(weights: Weights, masks: Weights) -> None:
    """Refuses values that are not masks of the weights with the same names.

    Raises:
        OptionError: a value is not a tensor, a shape differs, or a number is neither 0 nor 1.
    """
    require_shapes(weights, masks, "mask")
    for name, mask in masks.items():
        if mask.dtype is not torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise OptionError(f"the mask of {name!r} has numbers other than 0 and 1; 1 keeps a weight")
