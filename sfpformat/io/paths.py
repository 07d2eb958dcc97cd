"""Resolves the path of a model: a file, an index of shards, or a folder with exactly one of these."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import OptionError
from ..names import listed

SUFFIX = ".sfp"
INDEX_SUFFIX = ".index.json"
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.sfp", re.DOTALL)


def is_index(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path has the suffix of an index of shards."""
    return os.fspath(path).endswith(INDEX_SUFFIX)


def model_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a model's file or index. For a folder, this is the only model in it.

    Raises:
        OptionError: the folder has no `.sfp` model, or several.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    found = models_in(path)
    if not found:
        raise OptionError(f"{path} has no {SUFFIX} file and no {SUFFIX}{INDEX_SUFFIX}")
    if len(found) > 1:
        raise OptionError(f"{path} has several models; name one of {listed(found)}")
    return path / found[0]


def models_in(folder: Path) -> list[str]:
    """Returns the names of the indices and the `.sfp` files in a folder, ascending.

    Omits the shards of these indices.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    indices = {name for name in names if name.endswith(SUFFIX + INDEX_SUFFIX)}
    files = {name for name in names if name.endswith(SUFFIX) and not _is_of(name, indices)}
    return [name for name in names if name in indices | files]


def _is_of(name: str, indices: set[str]) -> bool:
    """Returns whether a file has the name of a shard of one of the indices."""
    shard = _SHARD.fullmatch(name)
    return shard is not None and shard[1] + SUFFIX + INDEX_SUFFIX in indices
