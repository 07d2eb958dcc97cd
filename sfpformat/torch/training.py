"""Attempts to train weights that `compress_model` froze: what would pass them by in silence warns here.

Rules: a compressed weight is no parameter. An optimizer of ``model.parameters()`` does not have it, one that
was made before has a tensor that the model no longer uses, and ``requires_grad_`` of the model does not reach
it. Each of these warns. Where other parameters are frozen too, as under adapters or a head that trains alone,
an optimizer gives no warning.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import warn
from .layers import Compressed

REQUIRES_GRAD = "requires_grad_"
_MOST_NAMED = 3
_ADVICE = "decompress_model makes them dense, and they train again"

# Weights that trained and that compressed layers took the place of -> the name of the layer.
_replaced: Any = WeakTensorKeyDictionary()
# Models that were given to `compress_model`.
_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Optimizers that were looked at.
_seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class WarnsOfFrozen:
    """Stands for a model's own ``requires_grad_`` while it has compressed layers.

    Copies and pickles of the model have one of their own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, requires_grad: bool = True) -> nn.Module:
        """Calls the method of the model's class; compressed weights have it once they are dense again.

        Warns:
            SfpWarning: compressed weights stay frozen.
        """
        names = [name for name, module in self.model.named_modules() if isinstance(module, Compressed)]
        if requires_grad and names:
            warn(f"requires_grad_ does not reach compressed weights: {listed(names)} stay frozen; {_ADVICE}")
        for module in self.model.modules():
            if isinstance(module, Compressed):
                module.weight_trains = requires_grad
        done: nn.Module = type(self.model).requires_grad_(self.model, requires_grad)
        return done


def watch(model: nn.Module, replaced: Mapping[str, torch.Tensor]) -> None:
    """Has attempts to train the compressed weights of a model warn from now on.

    Args:
        model: one that has compressed layers.
        replaced: the weights that layers had before, by the names of the layers.
    """
    for name, weight in replaced.items():
        if weight.requires_grad:
            _replaced[weight] = name
    _models.add(model)
    for module in _above_compressed(model):
        if REQUIRES_GRAD not in module.__dict__:
            setattr(module, REQUIRES_GRAD, WarnsOfFrozen(module))
    _install()


def unwatch(model: nn.Module) -> None:
    """Takes back `watch` where no layer is compressed any more."""
    above = set(_above_compressed(model))
    for module in model.modules():
        if isinstance(module.__dict__.get(REQUIRES_GRAD), WarnsOfFrozen) and module not in above:
            delattr(module, REQUIRES_GRAD)


def listed(names: Iterable[str]) -> str:
    """Some names of layers for a message."""
    names = list(names)
    first = ", ".join(repr(name) for name in names[:_MOST_NAMED])
    more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    return f"{first}{more}"


def _above_compressed(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that have compressed layers in them."""
    named = dict(model.named_modules(remove_duplicate=False))
    parts = [path.split(".") for path, module in named.items() if path and isinstance(module, Compressed)]
    return [named[path] for path in {".".join(part[:i]) for part in parts for i in range(len(part))}]


@cache
def _install() -> None:
    """Has torch call `_look` before each step of each optimizer; only once a model was compressed."""
    register_optimizer_step_pre_hook(_look)


def _look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Looks at an optimizer before its first step.

    Warns:
        SfpWarning: it has weights that compress_model replaced, or all parameters of a model in which only
            the compressed weights are frozen.
    """
    if torch.compiler.is_compiling() or optimizer in _seen:
        return
    _seen.add(optimizer)
    trained = [param for group in optimizer.param_groups for param in group["params"]]
    gone = [_replaced[param] for param in trained if param in _replaced]
    if gone:
        warn(
            f"the optimizer has the dense weights of {listed(gone)}, which are compressed and frozen since: "
            f"its steps do not reach the model; {_ADVICE} by a new optimizer"
        )
        return
    own = {id(param) for param in trained}
    for model in list(_models):
        frozen = [
            name
            for name, module in model.named_modules()
            if isinstance(module, Compressed) and module.weight_trains
        ]
        others = list(model.parameters())
        if frozen and others and all(param.requires_grad and id(param) in own for param in others):
            warn(
                f"the optimizer trains all parameters of a model, but the weights of {listed(frozen)} are "
                f"compressed and frozen; {_ADVICE}; if this is meant, model.requires_grad_(False) "
                "before compress_model says so"
            )
