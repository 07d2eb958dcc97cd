"""Checkpoints of long runs: written atomically, and refused by runs with other settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import MismatchError
from ..io.atomic import replacing


def save(path: Path, job: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint.

    Args:
        path: the file; an existing one is replaced when the new one is complete.
        job: the settings and shapes that a later run must share to resume from the checkpoint.
        state: tensors and plain values by name.
    """
    with replacing(path) as file:
        torch.save({**state, "job": dict(job)}, file)


def started(path: Path) -> str | None:
    """Returns the ``start`` of the job of a checkpoint; None if there is no such file or it is damaged.

    The tensors are not read.
    """
    try:
        job = torch.load(path, weights_only=True, map_location="cpu", mmap=True)["job"]
        return str(job["start"])
    except MemoryError:
        raise
    except Exception:  # as in `load`, which reports the problem
        return None


def load(path: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ``state`` given to `save`, with its tensors on the CPU.

    Raises:
        MismatchError: the file is damaged, is not a checkpoint, or belongs to another job.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        try:
            state = torch.load(file, weights_only=True, map_location="cpu")
        except MemoryError:
            raise
        except Exception as error:  # torch raises almost any class for a damaged file, also AssertionError
            raise MismatchError(
                f"{path} is damaged or not a checkpoint; remove it, or give another path"
            ) from error
    if not isinstance(state, dict) or state.pop("job", None) != dict(job):
        raise MismatchError(
            f"{path} is a checkpoint of a run with other settings or tensors; remove it, or give another path"
        )
    return state
