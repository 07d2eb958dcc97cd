"""Checkpoints of long runs: written atomically, and refused by runs with other settings, models or data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import MismatchError, OptionError, warn
from ..io.atomic import replacing
from .identity import Identity, differences
from .processes import Processes

# Entry of a job -> what differs if it differs.
_WORDS = {
    "plan": "other settings",
    "settings": "other settings",
    "options": "other options",
    "sparsities": "another sparsity",
    "shapes": "other tensors",
    "pattern": "another pattern",
    "start": "other initial importances",
}


def save(path: Path, job: Mapping[str, Any], identity: Identity, state: Mapping[str, Any]) -> None:
    """Writes a checkpoint.

    Args:
        path: the file; an existing one is replaced when the new one is complete.
        job: the settings and shapes that a later run must share to resume from the checkpoint.
        identity: checksums of the model and of the data, which a later run must share too.
        state: tensors and plain values by name.
    """
    with replacing(path) as file:
        torch.save({**state, "job": dict(job), "identity": dict(identity)}, file)


def _require_writable(path: Path) -> None:
    """Checks that a checkpoint can be written, before any work is done.

    Raises:
        OptionError: its folder does not exist, or the path is a folder.
    """
    if not path.parent.is_dir():
        raise OptionError(f"checkpoint is {path}: there is no folder {path.parent}; create it")
    if path.is_dir():
        raise OptionError(f"checkpoint is {path}, which is a folder; name a file in it")


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

    All processes create it and call each of its methods together.
    """

    def __init__(self, path: Path, processes: Processes, counter: str = "step") -> None:
        """Args:
        path: the file.
        processes: the processes of the run.
        counter: the name of the number in the state that says how far the run is.

        Raises:
            OptionError: the folder of the file does not exist on the process that writes it.
            ProcessError: that is so on another process.
        """
        self._path, self._processes, self._counter = path, processes, counter
        self._identity: Identity = {}
        processes.agreed(lambda: _require_writable(path) if self._writes() else None)

    def _writes(self) -> bool:
        """Returns whether this process writes a file."""
        return self._processes.rank == 0

    def belongs_to(self, identity: Callable[[], Identity]) -> None:
        """Adds checksums of the model or the data, which a run must share to resume from the checkpoint.

        Args:
            identity: computes the checksums.

        Raises:
            ProcessError: that failed on another process.
        """
        self._identity |= self._processes.agreed(identity)

    def started(self) -> str | None:
        """Returns the ``start`` of the job of the checkpoint; None if there is none."""
        return _step(self._path)[1]

    def load(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the state given to `save`, with its tensors on the CPU; None if there is no checkpoint.

        Raises:
            MismatchError, OSError: as in `checkpoints.load`.
            ProcessError: that is so on another process.
            OptionError: the processes have different files.
        """
        exists = self._path.exists()
        self._processes.require_same(
            exists, f"{self._path} exists only on some processes; use a folder that all processes share"
        )
        if not exists:
            return None
        state = self._processes.agreed(lambda: load(self._path, job, self._identity))
        self._processes.require_same(
            state[self._counter],
            f"{self._path} differs between processes; use a folder that all processes share",
        )
        return state

    def save(self, job: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Writes the checkpoint atomically."""
        if self._writes():
            save(self._path, job, self._identity, state)


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

    def _writes(self) -> bool:
        return True

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
        return self._processes.agreed(lambda: load(self._paths[place], job, self._identity))

    def save(self, job: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Writes this process's file atomically.

        Raises:
            OSError: it cannot be written.
            ProcessError: another process cannot write its file.
        """
        self._processes.agreed(lambda: save(self._paths[self._next], job, self._identity, state))
        self._next = 1 - self._next


def load(path: Path, job: Mapping[str, Any], identity: Identity) -> dict[str, Any]:
    """Returns the ``state`` given to `save`, with its tensors on the CPU.

    Warns: an earlier version wrote the file, without checksums of the model and of the data.

    Raises:
        MismatchError: the file is damaged, is not a checkpoint, or belongs to another job, model or data.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        try:
            state: Any = torch.load(file, weights_only=True, map_location="cpu")
        except MemoryError:
            raise
        except Exception as error:  # torch raises almost any class for a damaged file, also AssertionError
            raise MismatchError(
                f"{path} is damaged or not a checkpoint; remove it, or give another path"
            ) from error
    kept: dict[str, Any] = state if isinstance(state, dict) else {}
    found = kept.pop("job", None)
    if not isinstance(found, dict) or found.keys().isdisjoint(job):
        raise MismatchError(f"{path} is not a checkpoint of such a run; remove it, or give another path")
    names = dict.fromkeys([*job, *found])
    wrong = [
        _words(name, found.get(name), job.get(name)) for name in names if found.get(name) != job.get(name)
    ]
    written = kept.pop("identity", None)
    if written is not None:
        wrong += differences(written, identity)
    if wrong:
        raise MismatchError(
            f"{path} is a checkpoint of a run with {' and '.join(dict.fromkeys(wrong))}; "
            "remove it, or give another path"
        )
    if written is None:
        warn(
            f"{path} was written by an earlier version, and does not identify its model and its data: the "
            "run resumes from it; make sure that both are the same"
        )
    return kept


def _words(name: str, found: Any, wanted: Any) -> str:
    """Returns what differs between two jobs, with the names of settings that differ."""
    words = _WORDS.get(name, f"another {name}")
    if isinstance(found, dict) and isinstance(wanted, dict) and name != "shapes":
        names = [key for key in dict.fromkeys([*wanted, *found]) if found.get(key) != wanted.get(key)]
        words += f" ({', '.join(names)})"
    return words
