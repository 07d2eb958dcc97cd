"""Facts about the system that speeds depend on; nothing that identifies the user or host."""

from __future__ import annotations

import os
import platform

import numpy as np

from .. import __version__
from .peers import PEERS, version_of, why_not

_OTHERS = ("numba", "zlib-ng", "ml_dtypes")


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def facts() -> dict[str, object]:
    """Returns versions, architecture and number of cores."""
    return {
        "sfpformat": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": cores(),
        "packages": {name: version_of(name) for name in (*PEERS, *_OTHERS)},
    }


def not_installed() -> dict[str, str]:
    """Returns the peers that cannot run here: name -> reason."""
    return {name: reason for name in PEERS if (reason := why_not(name)) is not None}
