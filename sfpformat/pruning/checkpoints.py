"""Checkpoints of long runs: written atomically, and refused by runs with other settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import MismatchError
from ..io.atomic import replacing
from .processes import Processes


def save(path: Path, job: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint.

    Args:
        path: the file; an existing one is replaced when the new one is complete.
        job: the settings and shapes that a later run must share to resume from the checkpoint.
        state: tensors and plain values by name.
    """
    with replacing(path) as file:
        torch.save({**state, "job": dict(job)}, file)


def _step(path: Path) -> tuple[int, str | None]:
    """Returns the step of a checkpoint, and the ``start`` of its job. The tensors are not read.

    Returns:
        −1 and None if there is no such file, or it is damaged.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        return int(state["step"]), str(state["job"]["start"])
    except MemoryError:
        raise
    except Exception:  # as in `load`, which reports the problem
        return -1, None


class Checkpoint:
    """The checkpoint of a run whose processes have the same state: the first one writes a file, all read it.

    Each method is called by all processes together.
    """

    def __init__(self, path: Path, processes: Processes) -> None:
        self._path, self._processes = path, processes

    def started(self) -> str | None:
        """Returns the ``start`` of the job of the checkpoint; None if there is none."""
        return _step(self._path)[1]

    def load(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the state given to `save`, with its tensors on the CPU; None if there is no checkpoint.

        Raises:
            MismatchError, OSError: as in `checkpoints.load`.
            OptionError: the processes have different files.
        """
        exists = self._path.exists()
        self._processes.require_same(
            exists, f"{self._path} exists only on some processes; use a folder that all processes share"
        )
        if not exists:
            return None
        state = load(self._path, job)
        self._processes.require_same(
            state["step"], f"{self._path} differs between processes; use a folder that all processes share"
        )
        return state

    def save(self, job: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Writes the checkpoint atomically."""
        if self._processes.rank == 0:
            save(self._path, job, state)


class ShardedCheckpoint(Checkpoint):
    """The checkpoint of a run whose processes have different states: each writes files of its own.

    A process has two files, which it writes in turn. So if the processes end while some of them write, all
    still have the files of an earlier step.
    """

    def __init__(self, path: Path, processes: Processes) -> None:
        super().__init__(path, processes)
        own = f"{processes.rank}-{processes.world}"
        self._paths = [path.with_name(f"{path.name}.{letter}.{own}") for letter in "ab"]
        self._next = 0

    def _found(self) -> tuple[int | None, str | None]:
        """Returns which of the two files to load, and the ``start`` of its job."""
        mine = [_step(path) for path in self._paths]
        rows = self._processes.exchanged(lambda: [float(step) for step, _ in mine], 2)
        steps = [rows[0][i] if len({row[i] for row in rows}) == 1 else -1 for i in range(2)]
        best = max(range(2), key=lambda i: steps[i])
        if steps[best] >= 0:
            return best, mine[best][1]
        there = self._processes.exchanged(lambda: [any(path.exists() for path in self._paths)], 1)
        if any(row[0] for row in there):
            raise MismatchError(
                f"the files {self._path}.* of the processes are incomplete or of different steps; remove "
                "them, or give another path"
            )
        return None, None

    def started(self) -> str | None:
        """Returns the ``start`` of the job of the checkpoint; None if there is none."""
        return self._found()[1]

    def load(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns this process's state given to `save`, with its tensors on the CPU; None if there is none.

        Raises:
            MismatchError: a file is missing, damaged, of another step than those of the other processes, or
                belongs to another job.
            ProcessError: that is so on another process.
        """
        place, _ = self._found()
        if place is None:
            return None
        self._next = 1 - place
        return self._processes.agreed(lambda: load(self._paths[place], job))

    def save(self, job: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Writes this process's file atomically.

        Raises:
            OSError: it cannot be written.
            ProcessError: another process cannot write its file.
        """
        self._processes.agreed(lambda: save(self._paths[self._next], job, state))
        self._next = 1 - self._next


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
