"""`AutoModel.from_pretrained` and its relatives on folders whose weights are in an `.sfp` file.

transformers has no interface for formats of files: a quantizer is asked only after weights in one of its own
formats were found, and a file of bytes under such a name would load as random weights where this package is
not imported. So the import of `sfpformat.hf` wraps ``PreTrainedModel.from_pretrained``, which all classes,
pipelines, sentence-transformers and peft call. The wrapper first calls transformers. Only if that finds no
weights, and there is an `.sfp` model, it loads the model by the public arguments of transformers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from ..errors import OptionError
from ..io.paths import INDEX_SUFFIX, SUFFIX, model_path, models_in
from ..torch import safe_open
from .folders import PATTERNS
from .loading import require_filled, restore_generation
from .saving import weights_in

_MARK = "_loads_sfp"
# Arguments that ask for other weights.
_OTHERS = ("gguf_file", "state_dict", "use_safetensors", "variant")
# Ends of names of weights that transformers loads.
_DENSE = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
# Arguments that are not needed once the folder is found.
_PLACE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def install() -> None:
    """Wraps ``PreTrainedModel.from_pretrained``, once."""
    base: Any = transformers.PreTrainedModel
    original = base.from_pretrained.__func__
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **words: Any) -> Any:
        strict = words.pop("strict", None)  # an argument of this package alone
        try:
            return original(cls, pretrained_model_name_or_path, *args, **words)
        except OSError as error:
            folder = None if error.errno is not None else _folder(pretrained_model_name_or_path, words)
            if folder is None:
                raise
        call = functools.partial(original, cls)
        return _load(cls, call, folder, pretrained_model_name_or_path, args, words, strict is not False)

    setattr(from_pretrained, _MARK, True)
    base.from_pretrained = classmethod(from_pretrained)


def _folder(source: Any, words: dict[str, Any]) -> Path | None:
    """Returns the folder of an `.sfp` model; None if there is none, or other weights are there or wanted."""
    if not isinstance(source, (str, os.PathLike)) or any(words.get(name) for name in _OTHERS):
        return None
    folder = Path(source)
    if not folder.is_dir():
        found = _repository(os.fspath(source), words)
        if found is None:
            return None
        folder = found
    folder /= words.get("subfolder") or ""
    if not folder.is_dir() or any(weights_in(folder)) or not models_in(folder):
        return None
    return folder


def _repository(source: str, words: dict[str, Any]) -> Path | None:
    """Fetches a repository whose weights are in an `.sfp` file. Returns None if it has others, or on errors.

    The error of transformers that led here is the one to raise, so errors of the hub are not.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    at: dict[str, Any] = {name: words.get(name) for name in ("revision", "token")}
    local = bool(words.get("local_files_only")) or constants.HF_HUB_OFFLINE
    try:
        if not local:
            inside = f"{words.get('subfolder') or ''}/".lstrip("/")
            names = [name for name in HfApi().list_repo_files(source, **at) if name.startswith(inside)]
            if any(name.endswith(_DENSE) for name in names) or not any(map(_is_model, names)):
                return None
        at |= {"cache_dir": words.get("cache_dir"), "local_files_only": local}
        folder = snapshot_download(source, allow_patterns=list(PATTERNS), **at)
    except Exception:
        return None
    return Path(folder)


def _is_model(name: str) -> bool:
    return name.endswith((SUFFIX, SUFFIX + INDEX_SUFFIX))


def _load(
    cls: Any,
    call: Callable[..., Any],
    folder: Path,
    source: Any,
    args: tuple[Any, ...],
    words: dict[str, Any],
    strict: bool,
) -> Any:
    """Loads the model as transformers would, except that weights that are missing raise an error."""
    words = {name: value for name, value in words.items() if name not in _PLACE + _OTHERS}
    if words.get("config") is None:
        words["config"] = str(folder)
    wanted = words.pop("output_loading_info", False)
    ignored = bool(words.pop("ignore_mismatched_sizes", False))
    if _on_disk(words.get("device_map")):
        raise OptionError(
            "device_map has parts on 'disk', which transformers cannot load from an .sfp file: use "
            "sfpformat.torch.dispatch_model"
        )
    with safe_open(model_path(folder)) as file:
        model, info = call(
            None,
            *args,
            state_dict=file.slices(),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
            **words,
        )
    require_filled(type(model), info, strict=strict, unexpected=False, mismatched=not ignored)
    model.config.name_or_path = model.name_or_path = str(source)
    if words.get("generation_config") is None:
        restore_generation(model, folder)
    return (model, info) if wanted else model


def _on_disk(device_map: Any) -> bool:
    return device_map == "disk" or (isinstance(device_map, dict) and "disk" in device_map.values())
