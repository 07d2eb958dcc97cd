"""sfpformat: the `.sfp` file format for pruned neural networks. See SPEC.md and README.md."""

from __future__ import annotations

from .codec.budget import steps_for_budget
from .codec.options import PRESETS, ImportanceOptions, Options
from .errors import (
    ClosedFileError,
    EngineError,
    FileFault,
    InvalidFileError,
    LimitError,
    LossError,
    MismatchError,
    MissingTensorError,
    OptionError,
    SfpError,
    UnsupportedError,
)
from .limits import DEFAULT_LIMITS, Limits
from .reader import SfpFile, SfpSlice, TensorInfo
from .source import Readable
from .validate import Report, validate
from .writer import Writer

__version__ = "1.0.0.dev0"

__all__ = [
    "DEFAULT_LIMITS",
    "PRESETS",
    "ClosedFileError",
    "EngineError",
    "FileFault",
    "ImportanceOptions",
    "InvalidFileError",
    "LimitError",
    "Limits",
    "LossError",
    "MismatchError",
    "MissingTensorError",
    "OptionError",
    "Options",
    "Report",
    "SfpError",
    "SfpFile",
    "SfpSlice",
    "TensorInfo",
    "UnsupportedError",
    "Writer",
    "open",
    "steps_for_budget",
    "validate",
]


def open(
    readable: Readable,
    *,
    limits: Limits = DEFAULT_LIMITS,
    engine: str | None = None,
    threads: int | None = None,
) -> SfpFile:
    """Opens an `.sfp` file for reading; only preamble and directory are read.

    Args:
        readable: a path, bytes, an mmap, or any seekable binary object.
        limits: what a file may claim before it is refused.
        engine: ``"python"``, ``"numba"``, ``"cuda"``, or ``"auto"`` for the best there is; None takes the
            environment variable ``SFPFORMAT_ENGINE``.
        threads: how many may decode; None takes the number of cores.

    Raises:
        InvalidFileError: the file is damaged.
        UnsupportedError: it needs a version or feature that this reader does not know.
        LimitError: it goes beyond a limit.
        OSError: it cannot be read.
    """
    return SfpFile(readable, limits=limits, engine=engine, threads=threads)
