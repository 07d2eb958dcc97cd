"""Temporary folders for the files of a run, in memory if the system has /dev/shm."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_MEMORY = Path("/dev/shm")  # on a disk, overwriting a file can cost milliseconds


def scratch() -> tempfile.TemporaryDirectory[str]:
    """Returns an empty temporary folder, which is removed when its context ends."""
    usable = _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK)
    return tempfile.TemporaryDirectory(dir=_MEMORY if usable else None)
