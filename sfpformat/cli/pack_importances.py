"""Opens the importances that ``sfp pack --importance`` names, and checks that the options use them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..names import unknown_name
from ..options import Options
from .errors import CommandError
from .model_files import Model, as_bits, open_model
from .rules import Rules, TensorConfig


def open_importances(path: str | None, model: Model) -> Model | None:
    """Opens the importances, under the stored names of the tensors; None without a path.

    Raises:
        CommandError: an importance fits no tensor, or two importances of one tensor differ.
        OSError: the file cannot be read.
    """
    if path is None:
        return None
    found = open_model(path, kind="safetensors", strict_index=model.strict_index)
    try:
        if found.kind != "safetensors":
            raise CommandError(f"{path}: is an .sfp file; --importance needs a safetensors file")
        _use_kept_names(found, model.aliases())
        for name, spec in found.specs.items():
            tensor = model.specs.get(name)
            if tensor is None:
                raise CommandError(f"{path}: {unknown_name(name, model.specs, 'tensor of the checkpoint')}")
            if tensor.shape != spec.shape or not (spec.dtype.is_float and tensor.dtype.is_float):
                raise CommandError(
                    f"{path}: the importance of {name!r} is {spec.dtype.name} {list(spec.shape)}, but the "
                    f"tensor is {tensor.dtype.name} {list(tensor.shape)}; both must be float and have the "
                    "same shape"
                )
    except BaseException:
        found.close()
        raise
    return found


def require_use_of_importances(
    path: str | None, rules: Rules, configs: Mapping[str, TensorConfig], importances: Model | None
) -> None:
    """Checks that the options about importances have an effect.

    Raises:
        CommandError: ``--importance-bits`` is given without ``--importance``, nothing uses importances, or
            ``--weighted`` applies to a tensor without one.
    """
    known = {} if importances is None else importances.specs
    for name, config in configs.items():
        if _is_weighted(config.options) and name not in known:
            lacking = "" if path is None else f"; {path} has none"
            raise CommandError(f"--weighted needs --importance with an importance of {name!r}{lacking}")
    if importances is None:
        if rules.gives("importance_bits"):
            raise CommandError("--importance-bits needs --importance")
        return
    used = [configs[name].options for name in importances.specs]
    if not used:
        raise CommandError(f"--importance {path}: has no effect: the file has no tensors")
    if not any(options.importance is not None or _is_weighted(options) for options in used):
        raise CommandError(
            f"--importance {path}: has no effect: --importance-bits 0 stores none, and --weighted, which "
            "quantises by them, is not given"
        )


def _is_weighted(options: Options) -> bool:
    return options.lossy is not None and options.lossy.weighted is not None


def _use_kept_names(importances: Model, aliases: Mapping[str, str]) -> None:
    """Renames each importance that is named by an alias of a tensor to the stored name of that tensor.

    Raises:
        CommandError: two importances of one tensor differ.
    """
    for name in list(importances.specs):
        kept = aliases.get(name)
        if kept is None:
            continue
        if kept not in importances.specs:
            importances.rename(name, kept)
        elif np.array_equal(as_bits(importances.read(name)), as_bits(importances.read(kept))):
            importances.drop(name)
        else:
            raise CommandError(
                f"{importances.path}: {name!r} and {kept!r} are importances of one tensor but differ; "
                "remove one of them"
            )
