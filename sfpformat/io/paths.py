"""Resolves the path or URL of a model: a file, an index of shards, or a folder with exactly one of these."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from ..errors import OptionError
from ..names import listed
from .remote.location import Location, OpenFile, location_of

SUFFIX = ".sfp"
INDEX_SUFFIX = ".index.json"
# The path of a file on this machine, or the location of a file behind a URL.
FilePath = Path | Location
# What names a file: a path, a URL as a string, or what ``fsspec.open`` returns.
AnyPath = str | os.PathLike[str] | Location | OpenFile
# Names of dense weights that transformers loads: one file, shards and their index, variants.
DENSE = ("model*.safetensors*", "pytorch_model*.bin*")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.sfp", re.DOTALL)


def is_path(value: object) -> bool:
    """Returns whether a value names a file, by a path or a URL."""
    return isinstance(value, (str, os.PathLike)) or location_of(value) is not None


def file_path(path: AnyPath) -> FilePath:
    """Returns a path, or the location for a URL.

    Raises:
        OptionError: a package that reads the URL is not installed.
    """
    location = location_of(path)
    return Path(cast(str, path)) if location is None else location


def file_size(path: FilePath) -> int:
    """Returns the length of a file in bytes.

    Raises:
        OSError: the file cannot be read. `RemoteError` is one, too.
    """
    if isinstance(path, Path):
        return path.stat().st_size
    from .remote.source import RemoteSource  # lazy: most files are local

    source = RemoteSource(path)
    source.close()
    return source.length


def is_index(path: str | os.PathLike[str] | Location) -> bool:
    """Returns whether a path has the suffix of an index of shards."""
    return (path.name if isinstance(path, Location) else os.fspath(path)).endswith(INDEX_SUFFIX)


def model_path(path: AnyPath) -> FilePath:
    """Returns the path of a model's file or index. For a folder, this is the only model in it.

    The name of a remote folder has neither of the suffixes ``.sfp`` and ``.index.json``.

    Raises:
        OptionError: the folder has no `.sfp` model, or several; or a package that reads the URL is not
            installed.
        RemoteError, OSError: a remote folder cannot be listed.
    """
    found = file_path(path)
    if isinstance(found, Location):
        return model_location(found)
    return local_model(found)


def local_model(path: Path) -> Path:
    """Returns the path of a model's file or index, as `model_path`, on this machine."""
    return path / _only_model(models_in(path), path) if path.is_dir() else path


def _only_model(names: list[str], folder: object) -> str:
    if not names:
        raise OptionError(f"{folder} has no {SUFFIX} file and no {SUFFIX}{INDEX_SUFFIX}")
    if len(names) > 1:
        raise OptionError(f"{folder} has several models; name one of {listed(names)}")
    return names[0]


def model_location(location: Location) -> Location:
    """Returns the location of a model's file or index, as `model_path`, behind a URL."""
    if location.suffix == SUFFIX or is_index(location) or not location.is_folder():
        return location
    return location.inside(_only_model(_models_of(location.names()), location))


def models_in(folder: Path) -> list[str]:
    """Returns the names of the indices and the `.sfp` files in a folder, ascending.

    Omits the shards of these indices.
    """
    return _models_of(path.name for path in folder.iterdir() if path.is_file())


def dense_weights_in(folder: Path) -> list[str]:
    """Returns the names of the dense weights in a folder that transformers would load, ascending."""
    return sorted(path.name for pattern in DENSE for path in folder.glob(pattern))


def _models_of(files: Iterable[str]) -> list[str]:
    names = sorted(files)
    indices = {name for name in names if name.endswith(SUFFIX + INDEX_SUFFIX)}
    files = {name for name in names if name.endswith(SUFFIX) and not _is_of(name, indices)}
    return [name for name in names if name in indices | files]


def _is_of(name: str, indices: set[str]) -> bool:
    """Returns whether a file has the name of a shard of one of the indices."""
    shard = _SHARD.fullmatch(name)
    return shard is not None and shard[1] + SUFFIX + INDEX_SUFFIX in indices
