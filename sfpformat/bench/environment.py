"""Facts that speeds depend on; nothing about who measures."""

from __future__ import annotations

import os
import platform

import numpy as np

from .. import __version__
from .peers import PEERS, version_of, why_not

_OTHERS = ("numba", "zlib-ng", "ml_dtypes")


def cores() -> int:
    """How many this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def facts() -> dict[str, object]:
    """Versions, architecture and number of cores."""
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
    """Peer -> why it cannot run here."""
    return {name: reason for name in PEERS if (reason := why_not(name)) is not None}
