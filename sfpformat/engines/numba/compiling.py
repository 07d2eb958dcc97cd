"""Compiles kernels: without the GIL, with exact IEEE arithmetic, and cached on disk.

Numba caches compiled code beside its source, and checks only that one source file to decide whether the cache
is valid. But compiled code also contains the kernels that it calls, from other files, and constants of lower
layers. Therefore this module adds a digest of all these files to the version that Numba compares first: a
change of one file recompiles all kernels. (Numba compares the version before it unpickles the rest of an
index, which may refer to named tuples that the new sources do not have.)
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar, cast

import numpy as np
from numba import extending, njit
from numba.core import event

_PACKAGE = __name__.rpartition(".")[0]
_ANNOUNCED_AFTER = 1.0  # seconds
_log = logging.getLogger("sfpformat")

# An integer of a kernel: Numba types it, and gives Python callers an int.
Int: TypeAlias = int | np.integer[Any]

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def compiled_sources() -> list[Path]:
    """Returns the sources of this package, and those whose constants it compiles in."""
    own = Path(__file__).parent
    root = own.parent.parent
    packages = [
        path for folder in (own, root / "coding", root / "container") for path in folder.rglob("*.py")
    ]
    return sorted([*packages, own.parent / "translation.py"])


@cache
def _sources_digest() -> str:
    """Returns a digest of `compiled_sources`."""
    digest = hashlib.sha256()
    for path in compiled_sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()


def kernel(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Compiles a function on its first call with each combination of argument types.

    The function must not allocate, and may return arrays only in tuples. It is compiled without Numba's
    reference counting of arrays, which costs a call and a locked instruction each time an array is passed
    (measured: a quarter of the decoding time).
    """
    return _compiled(function, _nrt=False)


def inlined_kernel(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Compiles like `kernel`, but inlines the function: for frequent calls with many arguments."""
    return _compiled(function, _nrt=False, inline="always")


def allocating_kernel(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Compiles like `kernel`, but with reference counting, for a function that allocates arrays.

    The function must not call kernels that return arrays: these have no reference count, so releasing them
    would release memory that is still in use.
    """
    return _compiled(function)


def _compiled(function: Callable[_Parameters, _Result], **options: Any) -> Callable[_Parameters, _Result]:
    dispatcher: Any = njit(nogil=True, error_model="numpy", cache=True, **options)(function)
    cache_file: Any = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if hasattr(cache_file, "_version"):
        cache_file._version = (cache_file._version, _sources_digest())
    return cast(Callable[_Parameters, _Result], dispatcher)


def intrinsic(function: Callable[Concatenate[Any, _Parameters], Any]) -> Callable[_Parameters, Any]:
    """Registers a generator of code. Kernels call it without its first argument, the typing context."""
    return cast(Callable[_Parameters, Any], extending.intrinsic(function))


class _Announcer(event.Listener):
    """Logs once that kernels are being compiled, if that takes more than a second."""

    def __init__(self) -> None:
        self._depth = 0
        self._timer: threading.Timer | None = None
        self._announced = False

    def on_start(self, compilation: Any) -> None:
        if not _is_ours(compilation):
            return
        self._depth += 1
        if self._timer is None and not self._announced:
            self._timer = threading.Timer(_ANNOUNCED_AFTER, self._announce)
            self._timer.daemon = True
            self._timer.start()

    def on_end(self, compilation: Any) -> None:
        if not _is_ours(compilation):
            return
        self._depth -= 1
        if self._depth == 0 and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _announce(self) -> None:
        self._announced = True
        _log.warning(
            "compiling the numba engine for this machine; this takes some seconds, once, "
            "and is cached on disk"
        )


def _is_ours(compilation: Any) -> bool:
    dispatcher = compilation.data["dispatcher"]
    return str(dispatcher.py_func.__module__).startswith(_PACKAGE)


event.register("numba:compile", _Announcer())
