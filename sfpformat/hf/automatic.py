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
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import transformers

from ..errors import OptionError, RemoteError
from ..io.paths import DENSE, INDEX_SUFFIX, SUFFIX, dense_weights_in, model_path, models_in
from ..io.remote.location import first_line
from ..torch import safe_open
from .folders import PATTERNS, require_config
from .loading import in_model, require_filled, restore_generation

_MARK = "_loads_sfp"
# Arguments that ask for other weights.
_OTHERS = ("gguf_file", "state_dict", "use_safetensors", "variant")
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
        try:
            return original(cls, pretrained_model_name_or_path, *args, **words)
        except OSError as error:
            folder = None if error.errno is not None else _folder(pretrained_model_name_or_path, words)
            if folder is None:
                raise
        call = functools.partial(original, cls)
        return _load(call, folder, pretrained_model_name_or_path, args, words)

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
    if not folder.is_dir() or dense_weights_in(folder) or not models_in(folder):
        return None
    return folder


def _repository(source: str, words: dict[str, Any]) -> Path | None:
    """Fetches a repository whose weights are in an `.sfp` file. Returns None if it has none, or others.

    Also returns None if the repository cannot be listed: the error of transformers that led here says why.

    Raises:
        RemoteError: the repository has an `.sfp` model, but cannot be fetched.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    at: dict[str, Any] = {name: words.get(name) for name in ("revision", "token")}
    local = bool(words.get("local_files_only")) or constants.HF_HUB_OFFLINE
    try:
        if not local:
            inside = PurePosixPath(words.get("subfolder") or "")
            paths = map(PurePosixPath, HfApi().list_repo_files(source, **at))
            names = [path.name for path in paths if path.parent == inside]
            if any(fnmatchcase(name, pattern) for name in names for pattern in DENSE):
                return None
            if not any(name.endswith((SUFFIX, SUFFIX + INDEX_SUFFIX)) for name in names):
                return None
    except Exception:
        return None
    at |= {"cache_dir": words.get("cache_dir"), "local_files_only": local}
    at["force_download"] = bool(words.get("force_download")) and not local
    try:
        return Path(snapshot_download(source, allow_patterns=list(PATTERNS), **at))
    except Exception as error:
        if local:
            return None
        why = f"{type(error).__name__}: {first_line(error)}"
        raise RemoteError(
            f"the {SUFFIX} model of the repository {source} cannot be fetched: {why}"
        ) from error


def _load(
    call: Callable[..., Any],
    folder: Path,
    source: Any,
    args: tuple[Any, ...],
    words: dict[str, Any],
) -> Any:
    """Loads the model as transformers would, except that weights that are missing raise an error."""
    words = {name: value for name, value in words.items() if name not in _PLACE + _OTHERS}
    if "stay_compressed" in words:
        raise OptionError("stay_compressed is an argument of sfpformat.hf.from_pretrained only")
    strict = words.pop("strict", True)
    if not isinstance(strict, bool):
        raise OptionError(f"strict is {strict!r}, must be True or False")
    if words.get("config") is None:
        require_config(folder)  # transformers would take a default configuration, of another size
        words["config"] = str(folder)
    wanted = words.pop("output_loading_info", False)
    ignored = bool(words.pop("ignore_mismatched_sizes", False))
    if _on_disk(words.get("device_map")):
        raise OptionError(
            "device_map has parts on 'disk', which transformers cannot load from an .sfp file: use "
            "sfpformat.torch.dispatch_model"
        )
    path = model_path(folder)
    with in_model(path), safe_open(path) as file:
        model, info = call(
            None,
            *args,
            state_dict=file.slices(),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
            **words,
        )
    require_filled(path, type(model), info, strict=strict, unexpected=False, mismatched=not ignored)
    model.config.name_or_path = model.name_or_path = str(source)
    if words.get("generation_config") is None:
        restore_generation(model, folder)
    return (model, info) if wanted else model


def _on_disk(device_map: Any) -> bool:
    return device_map == "disk" or (isinstance(device_map, dict) and "disk" in device_map.values())
