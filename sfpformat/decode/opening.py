"""Opens a file or a model in shards."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..io.paths import is_index, model_path
from ..io.source import Readable
from ..limits import DEFAULT_LIMITS, Limits
from .reader import SfpFile

if TYPE_CHECKING:
    from .shards import ShardedFile


def open_any(
    readable: Readable,
    *,
    limits: Limits = DEFAULT_LIMITS,
    engine: str | None = None,
    threads: int | None = None,
) -> SfpFile | ShardedFile:
    """Opens a file, or a model in shards. Same arguments and errors as `sfpformat.open`."""
    if not isinstance(readable, (str, os.PathLike)):
        return SfpFile(readable, limits=limits, engine=engine, threads=threads)
    path = model_path(readable)
    if not is_index(path):
        return SfpFile(path, limits=limits, engine=engine, threads=threads)
    from .shards import ShardedFile  # lazy: most models have one file

    return ShardedFile(path, limits=limits, engine=engine, threads=threads)
