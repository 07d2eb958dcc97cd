"""Opens a file or a model in shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from ..errors import OptionError
from ..io.paths import is_index, is_path, model_path
from ..io.source import Readable
from ..limits import DEFAULT_LIMITS, Limits
from ..names import quoted
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
    """Opens a file, or a model in shards. Same arguments and errors as `sfpformat.open`.

    Refuses a delta: its tensors are not those of a model (R-DLT-014).
    """
    if not is_path(readable):
        return _model(SfpFile(readable, limits=limits, engine=engine, threads=threads), "the file")
    path = model_path(cast(str, readable))
    if not is_index(path):
        return _model(SfpFile(path, limits=limits, engine=engine, threads=threads), str(path))
    from .shards import ShardedFile  # lazy: most models have one file

    shards = ShardedFile(path, limits=limits, engine=engine, threads=threads)
    try:
        for shard in shards.files.values():
            _model(shard, str(path))
    except BaseException:
        shards.close()
        raise
    return shards


def _model(file: SfpFile, what: str) -> SfpFile:
    """Returns the file of a model. Closes and refuses that of a delta."""
    if file.directory.delta is None:
        return file
    base = file.directory.delta.base
    file.close()
    named = "" if base is None else f" {quoted(base)}"
    raise OptionError(
        f"{quoted(what)} is a delta and needs its base{named}: sfpformat.open(delta, base=...), or "
        "'sfp apply' to make a file of the result"
    )
