"""`from_pretrained`: makes a model of transformers from a folder with an `.sfp` file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from ..errors import FileFault, MismatchError, OptionError, warn
from ..io.paths import FilePath, model_path
from ..io.safetensors import SafetensorsError
from ..limits import DEFAULT_LIMITS, Limits
from ..names import MOST_LISTED, joined, listed, quoted
from ..torch import TorchFile, compress_model, parameters_on_meta, safe_open
from .folders import Source, class_of, config_of, model_folder

_GENERATION = "generation_config.json"
# Arguments of transformers that the folder, or this module, determines.
_OF_THE_FOLDER = (
    "config",
    "gguf_file",
    "ignore_mismatched_sizes",
    "output_loading_info",
    "state_dict",
    "use_safetensors",
    "variant",
)
# Arguments that would have no effect, and what to do instead.
_INSTEAD = {
    "torch_dtype": "pass dtype",
    "subfolder": "pass the path of the folder itself",
    "token": "log in by 'hf auth login', or set the variable HF_TOKEN",
    "cache_dir": "set the variable HF_HUB_CACHE",
    "local_files_only": "set the variable HF_HUB_OFFLINE=1",
    "force_download": "remove the repository from the cache first",
    "proxies": "set the variable HTTPS_PROXY",
}


def from_pretrained(
    source: Source,
    *,
    cls: Any = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    stay_compressed: bool = False,
    strict: bool = True,
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    engine: str | None = None,
    **settings: Any,
) -> Any:
    """Returns the model of a folder, in evaluation mode.

    transformers decodes one tensor after another, when it needs it, and reads only its slices if the model is
    distributed.

    Examples::

        model = from_pretrained("small/")
        model = from_pretrained("organisation/small", revision="v1", device_map="auto")
        model = from_pretrained("small/", cls=transformers.AutoModelForSequenceClassification)

    Args:
        source: path of a folder, the id of a repository on the hub, which is fetched into its cache, or the
            URL of a folder, such as ``"s3://bucket/small"`` or ``"hf://organisation/small@v1"``, from which
            the weights are read by ranges. Behind HTTP, the weights are ``model.sfp`` or its index.
        cls: a class of a model, or an ``AutoModel…`` class. None takes the class of the configuration.
        revision: branch, tag or commit of the repository.
        dtype: the dtype of the model; ``"auto"`` takes that of the configuration, else that of the file.
        device_map: as in transformers, except ``"disk"``.
        stay_compressed: whether linear layers and embeddings keep their encoded bytes, as by
            `sfpformat.torch.compress_model`.
        strict: whether weights of the model that the file lacks, and weights of the file that the model
            lacks, raise. False initialises the former randomly, ignores the latter, and warns of both.
        limits, threads, engine: as in `sfpformat.open`.
        settings: further arguments of transformers' ``from_pretrained``, such as ``attn_implementation``.

    Warns:
        SfpWarning: weights are missing or unexpected, if not ``strict``.

    Raises:
        OptionError: there is no such folder, or it has no configuration or no `.sfp` model; or an argument
            cannot be used.
        MismatchError: the file does not fit the model.
        InvalidFileError, UnsupportedError, LimitError: the file is damaged or refused.
        RemoteError, OSError: the file cannot be read.
        Exception: an exception of huggingface_hub: the repository cannot be fetched.
    """
    for name in _OF_THE_FOLDER:
        if name in settings:
            raise OptionError(f"from_pretrained has no argument {name!r}: the folder determines it")
    for name, instead in _INSTEAD.items():
        if name in settings:
            raise OptionError(f"from_pretrained has no argument {name!r}; {instead}")
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) and dtype != "auto":
        raise OptionError(f"torch has no dtype {dtype!r}; pass one, its name, or 'auto'")
    if stay_compressed and (device_map is not None or not strict or settings):
        raise OptionError(
            "stay_compressed=True has no 'device_map', 'strict' or settings of transformers; move the "
            "model with .to(device)"
        )
    with model_folder(source, revision) as (folder, weights):
        config = config_of(folder)
        kind = class_of(config, cls)
        path = model_path(weights)
        if stay_compressed:
            model = _compressed(kind, config, path, dtype, limits, threads, engine)
        else:
            model = _dense(kind, config, path, dtype, device_map, strict, limits, threads, engine, settings)
        model.config.name_or_path = model.name_or_path = str(source)
        restore_generation(model, folder)
    return model.eval()


def _dense(
    kind: Any,
    config: Any,
    path: FilePath,
    dtype: str | torch.dtype,
    device_map: Any,
    strict: bool,
    limits: Limits,
    threads: int | None,
    engine: str | None,
    settings: dict[str, Any],
) -> Any:
    """Returns a model whose weights transformers loads from the slices of the file."""
    with (
        in_model(path),
        safe_open(path, limits=limits, threads=threads, engine=engine) as file,
        file.prefetch(_in_loading_order(file)),
    ):
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=file.slices(),
            dtype=dtype,
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below; transformers itself raises a RuntimeError
            **settings,
        )
    require_filled(path, kind, info, strict=strict)
    return model


@contextmanager
def in_model(path: FilePath) -> Iterator[None]:
    """Context manager that adds the path of a model to an error about its contents."""
    try:
        yield
    except FileFault as error:
        error.detail = f"in {quoted(str(path))}: {error.detail}"
        raise
    except (MismatchError, SafetensorsError) as error:
        error.args = (f"{path}: {error}",)
        raise


def require_filled(
    path: FilePath, kind: Any, info: Any, *, strict: bool, unexpected: bool = True, mismatched: bool = True
) -> None:
    """Raises if a loaded model has weights that the file has not filled.

    Args:
        path: path of the file or index, for messages.
        kind: its class.
        info: what transformers reports with ``output_loading_info=True``.
        strict: whether missing and unexpected weights raise. False warns of them.
        unexpected: whether weights of the file that the model lacks count.
        mismatched: whether weights whose shapes differ count.

    Warns:
        SfpWarning: weights are missing or unexpected, if not ``strict``.

    Raises:
        MismatchError: shapes differ, or weights are missing or unexpected.
    """
    shapes = [
        f"{quoted(name)} is {list(found)} in the file, {list(needed)} in the model"
        for name, found, needed in sorted(info["mismatched_keys"])
    ]
    if shapes and mismatched:
        some = joined(shapes[:MOST_LISTED], len(shapes) - MOST_LISTED)
        raise MismatchError(f"{path}: the shapes do not fit {kind.__name__}: {some}")
    missing = sorted(info["missing_keys"])
    others = sorted(info["unexpected_keys"]) if unexpected else []
    words = [
        f"{what}: {listed(names)}"
        for what, names in (("missing in the file", missing), ("unexpected in the file", others))
        if names
    ]
    if words and strict:
        raise MismatchError(
            f"{path}: the file does not fit {kind.__name__}: {'; '.join(words)}. If this is intended, for "
            "instance for a new head, pass strict=False",
            missing,
            others,
        )
    if words:
        more = ". Missing weights are random" if missing else ""
        warn(f"{path}: {kind.__name__}: {'; '.join(words)}{more}")


def restore_generation(model: Any, folder: Path) -> None:
    """Gives a model the generation configuration of its folder, if both have one."""
    if model.can_generate() and (folder / _GENERATION).is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)


def _compressed(
    kind: Any,
    config: Any,
    path: FilePath,
    dtype: str | torch.dtype,
    limits: Limits,
    threads: int | None,
    engine: str | None,
) -> Any:
    """Returns a model whose linear layers and embeddings keep the encoded bytes of the file."""
    if dtype == "auto":
        with in_model(path):
            dtype = config.dtype or _dtype_of(path, limits)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype))
    try:
        with parameters_on_meta():
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    with in_model(path):
        compress_model(model, path, limits=limits, threads=threads, engine=engine)
    return model


def _in_loading_order(file: TorchFile) -> list[str]:
    """Returns the names of a remote file in the order in which transformers loads them; else none."""
    if not file.file.is_remote:
        return []
    try:
        from transformers.core_model_loading import dot_natural_key  # not in all versions
    except ImportError:
        return file.keys()
    names: list[str] = sorted(file.keys(), key=dot_natural_key)
    return names


def _dtype_of(path: FilePath, limits: Limits) -> torch.dtype:
    """Returns the dtype of the first tensor of floats of a model."""
    with safe_open(path, limits=limits) as file:
        dtypes = (part.dtype for part in file.slices().values() if part.is_floating_point())
        return next(dtypes, torch.get_default_dtype())
