"""Folders for the files of a run: in memory where the system has a place for that."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_MEMORY = Path("/dev/shm")  # on disks a file that is written over may cost milliseconds


def scratch() -> tempfile.TemporaryDirectory[str]:
    """An empty folder that is gone when its context ends."""
    usable = _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK)
    return tempfile.TemporaryDirectory(dir=_MEMORY if usable else None)
