"""sfpformat: the `.sfp` file format for pruned neural networks. See SPEC.md and README.md."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO, overload

from .decode.opening import open_any
from .decode.reader import SfpFile
from .decode.slices import SfpSlice
from .decode.tensor_info import TensorInfo
from .decode.validate import Report, validate
from .errors import (
    BaseMismatchError,
    ClosedFileError,
    EngineError,
    FileFault,
    InvalidFileError,
    LimitError,
    LossError,
    MismatchError,
    MissingTensorError,
    OptionError,
    PartlyChangedError,
    ProcessError,
    RemoteError,
    SfpError,
    SfpWarning,
    UnknownPresetError,
    UnsupportedError,
)
from .io.paths import AnyPath
from .io.source import Buffer, Readable
from .limits import DEFAULT_LIMITS, Limits
from .options import PRESETS, Exact, ImportanceOptions, Lossless, Options, Table, Uniform

if TYPE_CHECKING:
    from .decode.shards import ShardedFile
    from .deltas.applying import apply_delta
    from .deltas.comparing import write_delta
    from .deltas.indices import write_delta_index
    from .deltas.reading import Delta
    from .deltas.result import DeltaFile
    from .deltas.tensors import Source
    from .deltas.writing import DeltaWriter
    from .encode.budget import steps_for_budget
    from .encode.packed_shard import PackedShard
    from .encode.writer import Writer
    from .keyed.table import KeyedTable

    # The command implements these two; no module imports a higher one, so that they are declared here.
    def pack_shard(
        src: str | os.PathLike[str],
        dst: str | os.PathLike[str],
        options: str | Sequence[str] = (),
        *,
        number: int,
        threads: int | None = None,
    ) -> PackedShard: ...

    def shard_count(src: str | os.PathLike[str]) -> int: ...


__version__ = "1.0.0.dev0"

# Lazy, so that readers do not import the encoder, a third of all modules.
_MODULE_OF = {
    "Delta": ".deltas.reading",
    "DeltaFile": ".deltas.result",
    "DeltaWriter": ".deltas.writing",
    "KeyedTable": ".keyed.table",
    "ShardedFile": ".decode.shards",
    "Writer": ".encode.writer",
    "PackedShard": ".encode.packed_shard",
    "apply_delta": ".deltas.applying",
    "pack_shard": ".cli.packing",
    "shard_count": ".cli.packing",
    "steps_for_budget": ".encode.budget",
    "write_delta": ".deltas.comparing",
    "write_delta_index": ".deltas.indices",
}

# Without `open`: ``from sfpformat import *`` must not hide the built-in one.
__all__ = [
    "DEFAULT_LIMITS",
    "PRESETS",
    "BaseMismatchError",
    "ClosedFileError",
    "Delta",
    "DeltaFile",
    "DeltaWriter",
    "EngineError",
    "Exact",
    "FileFault",
    "ImportanceOptions",
    "InvalidFileError",
    "KeyedTable",
    "LimitError",
    "Limits",
    "LossError",
    "Lossless",
    "MismatchError",
    "MissingTensorError",
    "OptionError",
    "Options",
    "PackedShard",
    "PartlyChangedError",
    "ProcessError",
    "RemoteError",
    "Report",
    "SfpError",
    "SfpFile",
    "SfpSlice",
    "SfpWarning",
    "ShardedFile",
    "Table",
    "TensorInfo",
    "Uniform",
    "UnknownPresetError",
    "UnsupportedError",
    "Writer",
    "apply_delta",
    "pack_shard",
    "shard_count",
    "steps_for_budget",
    "validate",
    "write_delta",
    "write_delta_index",
]


@overload
def open(
    readable: Readable,
    *,
    base: Source,
    limits: Limits = ...,
    engine: str | None = ...,
    threads: int | None = ...,
) -> DeltaFile: ...


@overload
def open(
    readable: Buffer | BinaryIO,
    *,
    limits: Limits = ...,
    engine: str | None = ...,
    threads: int | None = ...,
) -> SfpFile: ...


@overload
def open(
    readable: AnyPath,
    *,
    limits: Limits = ...,
    engine: str | None = ...,
    threads: int | None = ...,
) -> SfpFile | ShardedFile: ...


def open(
    readable: Readable,
    *,
    base: Source | None = None,
    limits: Limits = DEFAULT_LIMITS,
    engine: str | None = None,
    threads: int | None = None,
) -> SfpFile | ShardedFile | DeltaFile:
    """Opens an `.sfp` file, or a model in shards, for reading. Reads only preamble and directory.

    ``with sfpformat.open("model.sfp") as file: array = file.get_tensor("w")``

    Args:
        readable: the path or URL of a file, of the ``.sfp.index.json`` of a model in shards, or of a folder
            that has exactly one of these; or bytes, an mmap, any seekable binary object, or what
            ``fsspec.open`` returns. URLs, such as ``"https://…"``, ``"s3://…"`` or ``"hf://org/repo@rev/file"``,
            need the extra ``remote`` or ``hub``; only the needed ranges are fetched, concurrently.
        base: opens a delta with its base, and gives the tensors of the result. The base is as for
            `write_delta`, or the result of another delta. None opens a model.
        limits: limits of the reader, which refuses a file that exceeds one.
        engine: ``"python"``, ``"numba"``, ``"cuda"``, or ``"auto"`` for the best available. None uses the
            environment variable ``SFPFORMAT_ENGINE``, or ``"auto"`` without it.
        threads: the greatest number of decoding threads; None uses the available cores.

    Raises:
        InvalidFileError: the file is damaged.
        UnsupportedError: the file needs a version or feature that this reader does not support.
        LimitError: the file exceeds a limit.
        BaseMismatchError: the delta was made from another base.
        OptionError: the folder has no model or several, the stream is not readable or not seekable, a delta
            has no base, or a model has one.
        EngineError: the engine is unknown or not available.
        SafetensorsError: the index is not valid JSON of the expected form, or is one of safetensors files.
        RemoteError: a server fails, ignores ranges, or the file has changed since it was opened.
        OSError: the file cannot be read.
    """
    if base is not None:
        from .deltas.result import DeltaFile  # lazy: most readers have no deltas

        return DeltaFile(readable, base, limits=limits, engine=engine, threads=threads)
    return open_any(readable, limits=limits, engine=engine, threads=threads)


def __getattr__(name: str) -> object:
    """Imports the module that defines a lazy name, and returns its value.

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
