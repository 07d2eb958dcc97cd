"""Computes the products of the inputs of linear layers, with the changed weights of the layers before them.

Theory of operation: layers are visited in the order in which the model calls them. Layers with the same input
tensor (such as query, key and value) form a group. For each group the calibration batches run through the
model with the changed weights, up to the group, where the forward pass is stopped; H = 2/n Σ x xᵀ of the
group's inputs is summed. Blocks whose weights no longer change are not run again (`replay`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, warn
from ..names import listed
from .calibration import watched
from .padding import CountedInputs
from .replay import Reached, Replay
from .task import Task, with_weights
from .weight_selection import layout_of, linear_layers

Group = tuple[list[str], Tensor]


def grouped_products(
    model: nn.Module, weights: dict[str, Tensor], calibration: list[Any], task: Task, *, strict: bool
) -> Iterator[Group]:
    """Yields, in call order, the names of weights with the same input, and H of it, float32 [inputs, inputs].

    Args:
        model: in evaluation mode; gradients are off.
        weights: by name. The caller replaces the weights of a group before it asks for the next one.
        calibration: batches.
        task: runs the model on a batch.
        strict: whether to refuse weights of layers that are not linear, or that the model does not call.
            False omits them with a warning.

    Raises:
        OptionError: the model calls no linear layer with one of the weights; ``strict`` is true and this
            holds for any of the weights; or all inputs of a layer are padding.
    """
    groups, uncalled = _groups(model, weights, calibration[0], task)
    if uncalled:
        words = f"{listed(uncalled)}: not the weights of linear layers that the model calls"
        if strict or not groups:
            raise OptionError(words)
        warn(f"{words}; these tensors do not change")
    replay = Replay(model, lambda batch: task.run(with_weights(model, weights), batch), calibration)
    for group in groups:
        replay.advance([layer for _, layer in linear_layers(model, group)])
        yield group, _products(model, weights, group[0], calibration, task, replay)


def _groups(
    model: nn.Module, weights: dict[str, Tensor], batch: Any, task: Task
) -> tuple[list[list[str]], list[str]]:
    """Returns groups of names with the same input tensor, in call order, and the uncalled names."""
    seen: list[tuple[Tensor, list[str]]] = []
    called: set[str] = set()

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        if name not in called:
            called.add(name)
            if not seen or seen[-1][0] is not x:
                seen.append((x, []))
            seen[-1][1].append(name)

    with watched(linear_layers(model, weights), see):
        task.run(model, batch)
    return [names for _, names in seen], [name for name in weights if name not in called]


def _products(
    model: nn.Module,
    weights: dict[str, Tensor],
    name: str,
    calibration: list[Any],
    task: Task,
    replay: Replay,
) -> Tensor:
    """Returns 2/n Σ x xᵀ of a layer's inputs without padding, float32 [inputs, inputs]."""
    columns = layout_of(model, name).matrix(weights[name]).shape[1]
    total = torch.zeros(columns, columns, device=weights[name].device)
    count = 0
    counted = CountedInputs(model)
    layers = linear_layers(model, [name])
    awaited: set[nn.Module] = set()  # layers of the weight that are not called yet in this batch

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        nonlocal count
        if layer not in awaited:
            return
        awaited.remove(layer)
        flat = counted.of(name, layer, x)
        total.addmm_(flat.T, flat)
        count += len(flat)
        if not awaited:
            raise Reached

    with counted.watching(), watched(layers, see):
        for place, batch in enumerate(calibration):
            awaited.update(layer for _, layer in layers)
            counted.take(batch, task.unpadded(batch))
            with replay.running(place), suppress(Reached):
                task.run(with_weights(model, weights), batch)
    if not count:
        raise OptionError(f"all inputs of {name!r} in the calibration data are padding; give other data")
    return total * (2 / count)
