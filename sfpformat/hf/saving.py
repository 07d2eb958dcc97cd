"""`save_pretrained`: writes a model of transformers into a folder, with its weights in an `.sfp` file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch

from ..decode.shard_index import ShardIndex, index_name
from ..errors import OptionError
from ..io.paths import SUFFIX, dense_weights_in
from ..limits import DEFAULT_LIMITS, Limits
from ..names import listed, quoted
from ..options import Options
from ..torch import save_file
from ..torch.groups import is_distributed
from ..torch.loading import groups_of
from ..torch.saving import ImportanceTensor, Numbers

_DENSE = ".safetensors"
_STEM = "model"
# More than any model has, so that transformers writes one file.
_ONE_FILE = 1 << 60
T = TypeVar("T")


def save_pretrained(
    model: Any,
    folder: str | os.PathLike[str],
    *processors: Any,
    options: Options | Mapping[str, Options] | None = None,
    masks: Mapping[str, Numbers] | None = None,
    importances: Mapping[str, ImportanceTensor] | None = None,
    max_shard_size: int | str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    engine: str | None = None,
) -> None:
    """Writes a model, its configurations, and its tokenizer or other processors into a folder.

    transformers first writes dense weights into a temporary folder, so that names and ties are those of its
    own files. The temporary folder lies in the folder, or beside it if it is new. The other files in the
    folder change only after everything is written.

    Example: ``save_pretrained(model, "small/", tokenizer, options=options_for_weights(model, ...))``.

    Args:
        model: a model of transformers. Layers that stay compressed are decoded and encoded again.
        folder: the folder; it is created if it does not exist. An `.sfp` model in it is replaced.
        processors: tokenizers, image processors and so on; anything with ``save_pretrained``.
        options, masks, importances: as in `sfpformat.torch.save_file`; any name of a tied tensor is valid.
        max_shard_size: bytes of dense weights per shard, or such as ``"5GB"``; None writes one file.
        limits, threads, engine: as in `sfpformat.torch.save_file`.

    Raises:
        OptionError: the model has adapters of peft; its weights are spread over processes; the folder has
            weights of another format, which loaders would take instead; a processor has no
            ``save_pretrained``; ``max_shard_size`` is less than 1; a name in an argument is unknown; or
            as in `sfpformat.torch.save_file`.
        OSError: a file cannot be written.
    """
    if not hasattr(model, "save_pretrained"):
        raise OptionError(f"{type(model).__name__} is no model of transformers: it has no save_pretrained")
    if type(model).__module__.startswith("peft.") or getattr(model, "_hf_peft_config_loaded", False):
        raise OptionError("the model has adapters: merge them first, or save them with its save_pretrained")
    spread = [name for name, weight in model.named_parameters() if is_distributed(weight)]
    if spread:
        raise OptionError(
            f"processes hold only parts of {listed(spread)}: write the model with "
            "sfpformat.torch.distributed_checkpoint.SfpStorageWriter, or gather its weights first"
        )
    if isinstance(max_shard_size, int) and max_shard_size < 1:
        raise OptionError(
            f"max_shard_size is {max_shard_size}, must be at least 1 byte; None writes one file"
        )
    for one in processors:
        if not hasattr(one, "save_pretrained"):
            raise OptionError(f"{one!r} is no tokenizer or other processor: it has no save_pretrained")
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise OptionError(f"{target} is a file, not a folder")
    others = dense_weights_in(target)
    if others:
        raise OptionError(
            f"{target} has weights of another format, which loaders would take: {listed(others)}; remove them"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # An existing folder may be all that the user may write into, or a file system of its own.
    room = target if target.exists() else target.parent
    most = _ONE_FILE if max_shard_size is None else max_shard_size
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=room) as temporary:
        new = Path(temporary)
        for writer in (*processors, model):  # the model last: its configuration is the folder's
            words = {"max_shard_size": most} if writer is model else {}
            writer.save_pretrained(new, **words)
        named = {"options": options, "masks": masks, "importances": importances}
        given = {what: value for what, value in named.items() if value is not None}
        _pack(model, new, given, limits=limits, threads=threads, engine=engine)
        _move(new, target)


def _pack(model: Any, folder: Path, given: Mapping[str, Any], **settings: Any) -> None:
    """Replaces the dense weights of a folder by `.sfp` files, and their index."""
    dense = sorted(folder.glob(f"{_STEM}*{_DENSE}"))
    names = {path: _names_in(path) for path in dense}
    files = {name: path.with_suffix(SUFFIX).name for path in dense for name in names[path]}
    named = {what: _renamed(what, value, model, files) for what, value in given.items()}
    total = 0
    for path in dense:
        tensors = safetensors.torch.load_file(path)
        total += sum(tensor.nbytes for tensor in tensors.values())
        own: dict[str, Any] = {
            what: {name: value[name] for name in tensors if name in value}
            if isinstance(value, Mapping)
            else value
            for what, value in named.items()
        }
        save_file(tensors, path.with_suffix(SUFFIX), _metadata_of(path), **own, **settings)
        path.unlink()
    (folder / f"{_STEM}{_DENSE}.index.json").unlink(missing_ok=True)
    if len(dense) > 1:
        index = ShardIndex(files, {"total_size": total})
        (folder / index_name(_STEM)).write_bytes(index.to_bytes())


def _names_in(path: Path) -> list[str]:
    with safetensors.safe_open(path, framework="pt") as file:
        return list(file.keys())


def _metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _renamed(
    what: str, value: Options | Mapping[str, T], model: Any, files: Mapping[str, str]
) -> Options | dict[str, T]:
    """Returns an argument by the names in the files, given by any name of a tied tensor.

    Raises:
        OptionError: a name is unknown, or two names of one tensor have different values.
    """
    if isinstance(value, Options):
        return value
    state = {name: part for name, part in model.state_dict().items() if isinstance(part, torch.Tensor)}
    kept = {
        name: next((one for one in group if one in files), name)
        for group in groups_of(state)
        for name in group
    }
    out: dict[str, T] = {}
    for name, one in value.items():
        found = name if name in files else kept.get(name, name)
        if found not in files:
            words = f"{what}: {quoted(name)} is no tensor of the files"
            if name in kept:
                words += "; transformers writes this model under other names"
            raise OptionError(words)
        if found in out and out[found] is not one:
            raise OptionError(f"{what}: {quoted(name)} and another name of the same tensor differ")
        out[found] = one
    return out


def _move(new: Path, target: Path) -> None:
    """Moves all files of a new folder into the target, and removes the shards of an earlier model."""
    target.mkdir(exist_ok=True)
    written = {path.relative_to(new) for path in new.rglob("*") if path.is_file()}
    stale = {path.relative_to(target) for path in target.glob(f"{_STEM}*{SUFFIX}*")} - written
    # The configuration and the index last: with them, the folder is a model.
    last = {Path("config.json"), Path(index_name(_STEM))}
    for path in sorted(written, key=lambda path: (path in last, path)):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / path, target / path)
    for path in stale:
        (target / path).unlink()
