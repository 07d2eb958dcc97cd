"""Section ``startup``: the time of whole processes that import the package or decode a small file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .child import run_python
from .input_files import Files
from .measure import Contender, Record, Runner, Spread
from .results import Result, Value
from .settings import Settings
from .subject import Subject

NAME = "startup"
BASELINE = "numpy"
_IMPORT, _DECODE = "import", "decode a small file"
_DECODING = "import sys; from sfpformat.numpy import load_file; load_file(sys.argv[1], engine=sys.argv[2])"


class StartupRunner(Runner):
    """Runs a Python process from start to end."""

    def __init__(self, contender: Contender, arguments: Callable[[], Sequence[str]]) -> None:
        super().__init__(contender)
        self._arguments = arguments

    def check(self) -> None:
        """Runs once, so that files are in the page cache and compiled code is cached."""
        run_python(self._arguments())

    def once(self) -> dict[str, float]:
        """Returns the seconds of the process."""
        return {"process_s": run_python(self._arguments())[0]}


def runners(subject: Subject, settings: Settings) -> list[Runner]:
    """Returns runners that import numpy, import this package, and decode a small file with every engine."""
    files = Files(subject.tensors, settings.folder)
    preset = settings.presets[0]
    out: list[Runner] = [
        StartupRunner(Contender(BASELINE, case=_IMPORT), lambda: ["-c", "import numpy"]),
        StartupRunner(Contender("sfp", case=_IMPORT), lambda: ["-c", "import sfpformat"]),
    ]
    for contender in settings.sfp_contenders(presets=(preset,), threads=(1,), case=_DECODE):
        out.append(_decoding(contender, files, preset))
    return out


def _decoding(contender: Contender, files: Files, preset: str) -> StartupRunner:
    engine = contender.engine or ""
    return StartupRunner(contender, lambda: ["-c", _DECODING, str(files.packed_heads(preset)), engine])


def results(records: Sequence[Record]) -> list[Result]:
    """Returns seconds, and the difference to importing only numpy."""
    baseline = next((r.samples["process_s"] for r in records if r.contender.name == BASELINE), None)
    out = []
    for record in records:
        seconds = record.samples["process_s"]
        values: dict[str, Value] = {"process_s": Spread.of(seconds)}
        if baseline is not None:
            pairs = zip(seconds, baseline, strict=True)
            values["over_numpy_s"] = Spread.of([ours - theirs for ours, theirs in pairs])
        out.append(Result(NAME, record.contender, values))
    return out
