"""How kernels are compiled: without the GIL, IEEE arithmetic step by step, and kept on disk.

Numba keeps compiled code beside its source, and looks at that one source file when it decides whether what
it has is still good. A kernel contains the kernels that it calls, of other files, and constants of the layers
below; so all files of these packages are made part of the version that Numba compares first, and whoever
updates one of them gets all of them compiled anew. (It is compared before the rest of an index is unpickled,
which may name records that the new sources do not have.)
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event

_PACKAGE = __name__.rpartition(".")[0]
_ANNOUNCED_AFTER = 1.0  # seconds
_log = logging.getLogger("sfpformat")


@cache
def _sources_digest() -> str:
    """A digest of all source files of this package, and of those whose constants its kernels contain."""
    own = Path(__file__).parent
    root = own.parent.parent
    digest = hashlib.sha256()
    for folder in (own, root / "coding", root / "container"):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def kernel(function: Callable[..., Any]) -> Any:
    """The function compiled when it is first called with arguments of some types; it allocates nothing, and
    returns arrays in tuples only.

    What allocates nothing needs nobody to count who uses an array, which is done with a call and a locked
    instruction each time one is handed on (measured: a quarter of the time of decoding).
    """
    return _compiled(function, _nrt=False)


def inlined_kernel(function: Callable[..., Any]) -> Any:
    """As `kernel`, put in where another calls it: for what is called often with arguments that are many."""
    return _compiled(function, _nrt=False, inline="always")


def allocating_kernel(function: Callable[..., Any]) -> Any:
    """As `kernel`, for a function that makes arrays. It must not call kernels that return some: what they
    return was not counted, and would be let go of once too often."""
    return _compiled(function)


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    dispatcher = njit(nogil=True, error_model="numpy", cache=True, **options)(function)
    cache_file = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if hasattr(cache_file, "_version"):
        cache_file._version = (cache_file._version, _sources_digest())
    return dispatcher


class _Announcer(event.Listener):
    """Says once that kernels are being compiled, when that takes more than a second."""

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
        _log.warning("compiling the numba engine for this machine: some seconds, once; it is kept on disk")


def _is_ours(compilation: Any) -> bool:
    dispatcher = compilation.data["dispatcher"]
    return str(dispatcher.py_func.__module__).startswith(_PACKAGE)


event.register("numba:compile", _Announcer())
