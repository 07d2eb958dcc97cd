"""Warns of attempts to train weights that `compress_model` froze, which torch would silently ignore.

A compressed weight is not a parameter. Therefore an optimizer of ``model.parameters()`` does not include it,
an optimizer that was created before compression has a tensor that the model no longer uses, and the model's
``requires_grad_`` does not change it. Each of these causes a warning. If other parameters are frozen too, as
with adapters or a head that trains alone, there is no warning about the optimizer.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import warn
from ..names import listed
from .compressed import Compressed

REQUIRES_GRAD = "requires_grad_"
_some = partial(listed, most=3)
_ADVICE = "call decompress_model to train them"

# Replaced dense weights that required a gradient -> the name of the layer.
_replaced: Any = WeakTensorKeyDictionary()
# Models that `compress_model` changed.
_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Optimizers that were checked since a model was last compressed.
_seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class WarnsOfFrozen:
    """Replaces a model's ``requires_grad_`` while it has compressed layers, and warns.

    Copies and pickles of the model have their own instance.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, requires_grad: bool = True) -> nn.Module:
        """Calls the method of the model's class; compressed weights keep the setting for `decompress_model`.

        Warns:
            SfpWarning: compressed weights stay frozen.
        """
        names = [name for name, module in self.model.named_modules() if isinstance(module, Compressed)]
        if requires_grad and names:
            warn(f"requires_grad_ has no effect on compressed weights: {_some(names)} stay frozen; {_ADVICE}")
        for module in self.model.modules():
            if isinstance(module, Compressed):
                module.weight_trains = requires_grad
        done: nn.Module = type(self.model).requires_grad_(self.model, requires_grad)
        return done


def watch(model: nn.Module, replaced: Mapping[str, torch.Tensor]) -> None:
    """Enables warnings about attempts to train the compressed weights of a model.

    Args:
        model: a model with compressed layers.
        replaced: layer name -> the dense weight that the layer had before.
    """
    for name, weight in replaced.items():
        if weight.requires_grad:
            _replaced[weight] = name
    _models.add(model)
    _seen.clear()
    for module in _above_compressed(model):
        if REQUIRES_GRAD not in module.__dict__:
            setattr(module, REQUIRES_GRAD, WarnsOfFrozen(module))
    _install()


def unwatch(model: nn.Module) -> None:
    """Undoes `watch` for modules that have no compressed layer any more."""
    above = set(_above_compressed(model))
    for module in model.modules():
        if isinstance(module.__dict__.get(REQUIRES_GRAD), WarnsOfFrozen) and module not in above:
            delattr(module, REQUIRES_GRAD)


def _above_compressed(model: nn.Module) -> list[nn.Module]:
    """Returns the modules of a model that contain compressed layers."""
    named = dict(model.named_modules(remove_duplicate=False))
    parts = [path.split(".") for path, module in named.items() if path and isinstance(module, Compressed)]
    return [named[path] for path in {".".join(part[:i]) for part in parts for i in range(len(part))}]


@cache
def _install() -> None:
    """Registers `_check` as a global hook before each optimizer step; called when a model is compressed."""
    register_optimizer_step_pre_hook(_check)


def _check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Checks an optimizer before its first step, and before the first one after each compression.

    Warns:
        SfpWarning: the optimizer has weights that compress_model replaced, or all parameters of a model in
            which only the compressed weights are frozen.
    """
    if torch.compiler.is_compiling() or optimizer in _seen:
        return
    _seen.add(optimizer)
    trained = [param for group in optimizer.param_groups for param in group["params"]]
    gone = [_replaced[param] for param in trained if param in _replaced]
    if gone:
        warn(
            f"the optimizer has the old dense weights of {_some(gone)}, which are now compressed and frozen, "
            f"so its steps do not change the model; {_ADVICE} with a new optimizer"
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
                f"the optimizer trains all parameters of a model, but the weights of {_some(frozen)} are "
                f"compressed and frozen; {_ADVICE}; if this is intended, call model.requires_grad_(False) "
                "before compress_model"
            )
