"""Section ``memory``: the rise of memory while a file is loaded, in a fresh process each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .child import VMHWM, fingerprint, loading_memory
from .input_files import Files
from .measure import Contender, Record, Runner, Spread, WrongBitsError
from .results import Result
from .settings import Settings
from .subject import Subject

NAME = "memory"
# Peaks hardly differ between rounds, and each round starts a process.
MOST_ROUNDS = 3


class MemoryRunner(Runner):
    """Loads a file in a fresh process, after a small file as warm-up."""

    def __init__(
        self, contender: Contender, files: Files, path: Callable[[], Path], small: Callable[[], Path]
    ) -> None:
        super().__init__(contender)
        self._files, self._path, self._small = files, path, small
        self._answer: dict[str, Any] = {}

    def _ask(self) -> dict[str, Any]:
        request = {
            "path": str(self._path()),
            "heads": str(self._small()),
            "engine": self.contender.engine,
            "threads": self.contender.threads,
        }
        return loading_memory(request)

    def check(self) -> None:
        """Loads once and compares a checksum of all bits."""
        self._answer = self._ask()
        if self._answer["fingerprint"] != fingerprint(self._files.tensors):
            raise WrongBitsError("the loaded tensors differ from the saved ones")

    def facts(self) -> dict[str, float]:
        """Returns the bytes of the arrays, and whether the peak could be reset."""
        return {"output_bytes": self._answer["output_bytes"], "reset": self._answer["method"] == VMHWM}

    def once(self) -> dict[str, float]:
        """Returns the peak bytes minus the bytes before loading."""
        return {"growth": self._ask()["growth"]}


def runners(subject: Subject, settings: Settings) -> list[Runner]:
    """Returns runners of this package, with the first preset, and of safetensors."""
    files = Files(subject.tensors, settings.folder)
    preset = settings.presets[0]
    out: list[Runner] = [
        MemoryRunner(contender, files, lambda: files.packed(preset), lambda: files.packed_heads(preset))
        for contender in settings.sfp_contenders(presets=(preset,))
    ]
    # safetensors is a peer of the section `load`.
    out += [
        MemoryRunner(Contender(name), files, files.raw, files.raw_heads) for name in settings.peers("load")
    ]
    return out


def results(records: Sequence[Record]) -> list[Result]:
    """Returns the peaks without the arrays themselves."""
    return [
        Result(
            NAME,
            record.contender,
            {
                "output_bytes": int(record.facts["output_bytes"]),
                "peak_extra_bytes": Spread.of(
                    [growth - record.facts["output_bytes"] for growth in record.samples["growth"]]
                ),
                "peak_method": VMHWM if record.facts["reset"] else "ru_maxrss",
            },
        )
        for record in records
    ]
