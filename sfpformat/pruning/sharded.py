"""Weights that ``torch.distributed.fsdp.fully_shard`` divides by rows among processes.

A process has its own rows of each weight. While a layer runs, FSDP gathers its whole weight.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import OptionError
from ..names import require_known
from .masked import about_values
from .processes import Processes
from .weight_selection import holders, is_sharded, prunable


def reshard(model: nn.Module) -> None:
    """Releases whole parameters that a forward pass left in a model after ``fully_shard``."""
    for module in model.modules():
        method = getattr(module, "reshard", None)
        if callable(method) and is_sharded(module):
            method()  # after a pass without gradients, those of the outermost module are still whole


@contextmanager
def resharding(model: nn.Module) -> Iterator[None]:
    """Context for passes without gradients: at its end, sharded parameters are sharded again."""
    try:
        yield
    finally:
        reshard(model)


class Sharded:
    """The sharded weights of a model, with their names.

    Attributes:
        weights: name -> the weight, a ``DTensor`` whose rows are divided among the processes.
        processes: the processes.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] | None, group: Any = None) -> None:
        """Args:
        model: a model after ``fully_shard``. Its parameters are resharded.
        names: names of parameters of rank 2 or more; None takes `weight_selection.prunable`.
        group: the process group of the caller; None takes that of the weights.

        Raises:
            OptionError: there are no such weights, a name is unknown, or a weight is not divided by rows
                among the processes of the group.
        """
        reshard(model)
        names = prunable(model) if names is None else list(names)
        if not names:
            raise OptionError("the model has no linear or convolutional layers; name the tensors to prune")
        parameters = dict(model.named_parameters())
        require_known(names, parameters, kind="parameter")
        self._model = model
        self.weights: dict[str, Any] = {name: parameters[name].detach() for name in names}
        meshes = []
        for name, weight in self.weights.items():
            if not is_sharded(weight):
                raise OptionError(f"{name!r} is not sharded, but other weights are: call fully_shard on all")
            one_dimension = weight.device_mesh.ndim == 1 and weight.placements[0].is_shard(0)
            if weight.dim() < 2 or not one_dimension or not weight.is_floating_point():
                raise OptionError(
                    f"{name!r} has shape {list(weight.shape)}, dtype {weight.dtype} and placements "
                    f"{weight.placements}: only float matrices that fully_shard divides by rows, over a mesh "
                    "of one dimension, are supported"
                )
            meshes.append(weight.device_mesh)
        first = next(iter(self.weights.values()))
        if any(mesh != meshes[0] for mesh in meshes):
            raise OptionError("the weights are sharded over different meshes; use one")
        own = meshes[0].get_group()
        self.processes = Processes(own, first.to_local().device)
        if group is not None and Processes(group).world != self.processes.world:
            raise OptionError("group has other processes than the mesh of the weights; leave group out")
        self.group = own if group is None else group

    def share_of(self, name: str) -> int:
        """Returns the number of elements of a process's share of a weight; the last ones may have fewer."""
        weight = self.weights[name]
        rows = -(-int(weight.shape[0]) // self.processes.world)
        return rows * (int(weight.numel()) // max(int(weight.shape[0]), 1))

    def first_row(self, name: str) -> int:
        """Returns the number of this process's first row of a weight."""
        rows = -(-int(self.weights[name].shape[0]) // self.processes.world)
        return min(rows * self.processes.rank, int(self.weights[name].shape[0]))

    def local(self, name: str, given: Any = None, what: str = "importance") -> Tensor:
        """Returns this process's rows of a weight, or of a tensor that is sharded like it.

        Raises:
            OptionError: the tensor is not sharded like the weight.
        """
        weight = self.weights[name]
        if given is None:
            return self._rows(weight)
        if not is_sharded(given) or given.shape != weight.shape or given.placements != weight.placements:
            raise OptionError(f"the {what} of {name!r} is not sharded like the weight; shard it by rows")
        return self._rows(given)

    def _rows(self, tensor: Any) -> Tensor:
        rows: Tensor = tensor.to_local()
        return rows.detach()

    def whole(self, name: str, rows: Tensor) -> Tensor:
        """Returns the rows of all processes as a plain tensor of a weight's shape. All call it together."""
        shape = self.weights[name].shape
        share = rows.new_zeros(self.share_of(name))
        share[: rows.numel()] = rows.reshape(-1)
        return self.processes.joined(share, shape.numel()).view(shape)

    def like(self, name: str, rows: Tensor) -> Tensor:
        """Returns this process's rows as a tensor that is sharded like a weight, with its shape."""
        weight = self.weights[name]
        tensors: Any = sys.modules["torch.distributed.tensor"]
        found: Tensor = tensors.DTensor.from_local(
            rows.contiguous(),
            weight.device_mesh,
            weight.placements,
            run_check=False,
            shape=weight.shape,
            stride=torch.empty(weight.shape, device="meta").stride(),
        )
        return found


class GatheredNames:
    """Finds the names of whole weights that FSDP gathered."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        """Args:
        model: a model after ``fully_shard``.
        names: names of its sharded weights.
        """
        places = holders(model)
        self._places = {name: places[id(model.get_parameter(name))] for name in names}
        # With each weight, which this keeps alive, so that its id stays unique.
        self._found: dict[int, tuple[Tensor, str | None]] = {}

    def forget(self) -> None:
        """Forgets the weights of earlier calls, so that their memory can be released."""
        self._found = {}

    def of(self, value: object) -> str | None:
        """Returns the name of a gathered weight; None for other values."""
        if not isinstance(value, nn.Parameter) or is_sharded(value):
            return None
        known = self._found.get(id(value))
        if known is None:
            name = next(
                (
                    name
                    for name, places in self._places.items()
                    if any(module._parameters.get(attribute) is value for module, attribute in places)
                ),
                None,
            )
            known = self._found[id(value)] = value, name
        return known[1]


class WholeWeights(TorchFunctionMode):
    """Context in which torch functions get a leaf in place of each whole weight that FSDP gathered.

    The gradient of a leaf is that of the whole weight on this process's batch.

    Attributes:
        leaves: the leaves of the current batch by name.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], seen: Callable[[str, Tensor], None]) -> None:
        """Args:
        model: a model after ``fully_shard``.
        names: names of its sharded weights.
        seen: called with the name and the leaf as soon as its gradient is complete.
        """
        super().__init__()
        self._names, self._seen = GatheredNames(model, names), seen
        self.leaves: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Begins a batch."""
        self.leaves = {}
        self._names.forget()

    def _replaced(self, value: Any) -> Any:
        name = self._names.of(value)
        if name is not None:
            leaf = self.leaves.get(name)
            if leaf is None:
                leaf = self.leaves[name] = value.detach().requires_grad_()
                untyped: Any = leaf
                untyped.register_post_accumulate_grad_hook(lambda x, name=name: self._seen(name, x))
            return leaf
        if type(value) in (tuple, list):
            return type(value)(self._replaced(part) for part in value)
        return value

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls a torch function with whole weights in its arguments replaced by their leaves."""
        named = kwargs or {}
        if about_values(func):
            args = self._replaced(args)
            named = {key: self._replaced(value) for key, value in named.items()}
        return func(*args, **named)
