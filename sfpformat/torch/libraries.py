"""Integration of compressed models with other libraries: ``save_pretrained``, and the adapters of peft.

Rules: this module does not import those libraries. It recognises them by the names of methods and submodules,
which are part of their interfaces.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..errors import OptionError
from . import packed
from .compressed import Compressed, dense_states
from .decoded import before_first_layer
from .loading import identity

SAVE = "save_pretrained"


class SavesDense:
    """Replaces a model's ``save_pretrained`` while it has compressed layers, and writes dense weights.

    All decoded weights are in memory at the same time. If only adapters are written, only the embeddings are
    decoded, because peft may write these too. Copies and pickles of the model have their own instance.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls ``save_pretrained`` of the model's class with the same arguments and dense weights."""
        save: Callable[..., Any] = getattr(type(self.model), SAVE)
        given = inspect.signature(save).bind(self.model, *args, **kwargs)
        named = given.arguments if "state_dict" in given.arguments else given.arguments.get("kwargs", {})
        layers = _embeddings(self.model) if _saves_adapters(self.model) else _compressed(self.model)
        if named.get("state_dict") is not None:
            named["state_dict"] = _decoded(self.model, layers, named["state_dict"])
        with dense_states(layers):
            return save(*given.args, **given.kwargs)


def save_dense(model: nn.Module) -> None:
    """Makes each ``save_pretrained`` of the model and its submodules write dense weights."""
    for module in model.modules():
        if hasattr(type(module), SAVE) and _compressed(module):
            setattr(module, SAVE, SavesDense(module))


def restore_save(model: nn.Module) -> None:
    """Undoes `save_dense` for modules that have no compressed layer any more."""
    for module in model.modules():
        if isinstance(module.__dict__.get(SAVE), SavesDense) and not _compressed(module):
            delattr(module, SAVE)


def in_adapters(model: nn.Module) -> set[nn.Module]:
    """Returns the trainable layers that peft adds to a model: adapters, and copies of ``modules_to_save``."""
    found: set[nn.Module] = set()
    for module in model.modules():
        children = module._modules
        names = children.keys() - {"base_layer"} if "base_layer" in children else set()
        for name in names | (children.keys() & {"modules_to_save"}):
            child = children[name]
            if child is not None:
                found.update(child.modules())
    return found


def _compressed(model: nn.Module) -> set[Compressed]:
    return {module for module in model.modules() if isinstance(module, Compressed)}


def _embeddings(model: nn.Module) -> set[Compressed]:
    """Returns the compressed layers in the input and output embeddings of a transformers model."""
    found: set[Compressed] = set()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        get = getattr(model, name, None)
        try:
            embedding = None if get is None else get()
        except NotImplementedError:  # in transformers: the model has no such embeddings
            continue
        found |= set() if embedding is None else _compressed(embedding)
    return found


def _saves_adapters(model: nn.Module) -> bool:
    """Returns whether ``save_pretrained`` writes only the adapters of peft, not the model."""
    return type(model).__module__.startswith("peft.") or getattr(model, "_hf_peft_config_loaded", False)


def _decoded(model: nn.Module, layers: set[Compressed], state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a ``state_dict`` in which bytes of some layers are replaced by decoded weights; keeps ties."""
    made: dict[tuple[object, ...], torch.Tensor] = {}
    out = dict(state)
    for path, module in model.named_modules(remove_duplicate=False):
        name = f"{path}.weight" if path else "weight"
        data: Any = out.get(name)
        if isinstance(module, Compressed) and module in layers and packed.may_be_bytes(data):
            same = *identity(data), module.weight_dtype
            if same not in made:
                made[same] = packed.decode(data).to(data.device, module.weight_dtype)
            out[name] = made[same]
    return out


def _watch_peft(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """Hook that torch calls before it registers any submodule; installs `SavesDense` on peft models.

    Raises:
        OptionError: ``modules_to_save`` would train a copy of a compressed layer, which cannot train.
    """
    if child is None or name not in ("base_model", "original_module"):
        return
    if name == "base_model" and type(module).__module__.startswith("peft.") and hasattr(type(module), SAVE):
        if _compressed(child):
            setattr(module, SAVE, SavesDense(module))
    elif type(module).__name__ == "ModulesToSaveWrapper":
        titles = sorted(layer.title() for layer in _compressed(child))
        if titles:
            raise OptionError(
                f"modules_to_save would train a copy of {titles[0]}, which is compressed and frozen: call "
                "decompress_model for that module first"
            )


# torch has only a global hook for this, which affects all modules of the process. Therefore it is installed
# only when the process creates its first compressed layer.
before_first_layer(lambda: register_module_module_registration_hook(_watch_peft))
