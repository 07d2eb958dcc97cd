"""Section ``load``: loading a file to arrays, compared with safetensors; files are in the page cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..numpy import load_file
from . import device_runners
from .codecs import require_same_bits
from .input_files import Files
from .measure import Contender, Record, Runner, Spread, break_even, seconds_of
from .peers import imported
from .results import Result, Value, speed_ratio
from .settings import Settings
from .subject import Array, Subject

NAME = "load"
Load = Callable[[Path], Mapping[str, Any]]


def safetensors_load_file(path: Path) -> Mapping[str, Array]:
    """Loads all arrays; safetensors copies each from the mapped file, so that its bytes are in memory."""
    loaded: Mapping[str, Array] = imported("safetensors.numpy").load_file(path)
    return loaded


def safetensors_get_tensor(path: Path) -> Mapping[str, Array]:
    """Loads all arrays one by one; safetensors copies these too."""
    with imported("safetensors").safe_open(path, framework="np") as file:
        names = file.keys()  # the file itself is not a mapping
        return {name: file.get_tensor(name) for name in names}


WAYS: dict[str, Load] = {"load_file": safetensors_load_file, "safe_open": safetensors_get_tensor}


class LoadRunner(Runner):
    """Loads a file. `check` loads it once, which puts it into the page cache."""

    def __init__(
        self,
        contender: Contender,
        files: Files,
        path: Callable[[], Path],
        load: Load,
        arrays_of: Callable[[Mapping[str, Any]], Mapping[str, Array]] = lambda arrays: arrays,
    ) -> None:
        """Args:
        arrays_of: converts the loaded tensors to arrays.
        """
        super().__init__(contender)
        self._files, self._path, self._load, self._arrays_of = files, path, load, arrays_of

    def check(self) -> None:
        """Loads once and compares every bit."""
        require_same_bits(self._files.tensors, self._arrays_of(self._load(self._path())))

    def facts(self) -> dict[str, float]:
        """Returns the sizes of the tensors and of the file."""
        raw = sum(array.nbytes for array in self._files.tensors.values())
        return {"raw_bytes": raw, "size_bytes": self._path().stat().st_size}

    def once(self) -> dict[str, float]:
        """Returns the seconds of loading."""
        path = self._path()
        return {"load_s": seconds_of(lambda: lambda: self._load(path))}


def runners(subject: Subject, settings: Settings) -> list[Runner]:
    """Returns runners of this package for every engine, preset and number of threads, and of safetensors."""
    files = Files(subject.tensors, settings.folder)
    if settings.device is not None:
        return _on_device(files, settings, settings.device)
    out: list[Runner] = [_sfp_runners(contender, files) for contender in settings.sfp_contenders()]
    for name in settings.peers(NAME):
        for way, load in WAYS.items():
            out.append(LoadRunner(Contender(name, case=way), files, files.raw, load))
    return out


def _on_device(files: Files, settings: Settings, name: str) -> list[Runner]:
    """Returns runners of this package and of safetensors that load tensors to a device."""
    arrays = device_runners.arrays_of
    out: list[Runner] = []
    for contender in settings.sfp_contenders():
        path = partial(files.packed, contender.preset or "default")
        load = partial(device_runners.load, name=name, threads=contender.threads)
        out.append(LoadRunner(contender, files, path, load, arrays))
    for peer in settings.peers(NAME):
        load = partial(device_runners.safetensors_load_file, name=name)
        out.append(LoadRunner(Contender(peer, case="load_file"), files, files.raw, load, arrays))
    return out


def _sfp_runners(contender: Contender, files: Files) -> LoadRunner:
    def load(path: Path) -> Mapping[str, Array]:
        return load_file(path, engine=contender.engine, threads=contender.threads)

    return LoadRunner(contender, files, lambda: files.packed(contender.preset or "default"), load)


def results(records: Sequence[Record]) -> list[Result]:
    """Returns speeds, and for this package the disk speed above which safetensors is faster."""
    ways = [record for record in records if not record.contender.is_sfp]
    fastest = min(ways, key=lambda record: Spread.of(record.samples["load_s"]).median, default=None)
    return [_result(record, fastest) for record in records]


def _result(record: Record, fastest: Record | None) -> Result:
    raw, size, seconds = record.facts["raw_bytes"], record.facts["size_bytes"], record.samples["load_s"]
    values: dict[str, Value] = {
        "raw_bytes": int(raw),
        "size_bytes": int(size),
        "size_ratio": size / raw,
        "load_s": Spread.of(seconds),
        "load_mb_s": Spread.of([raw / s / 1e6 for s in seconds]),
    }
    if fastest is not None:
        values["load_vs_safetensors"] = speed_ratio(record, fastest, "load_s")
        if record.contender.is_sfp:
            theirs = Spread.of(fastest.samples["load_s"]).median
            speed = break_even(fastest.facts["size_bytes"], theirs, size, Spread.of(seconds).median)
            values["break_even_disk_mb_s"] = None if speed is None else speed / 1e6
    return Result(NAME, record.contender, values)
