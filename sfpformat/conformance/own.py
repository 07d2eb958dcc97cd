"""This package's own reader, writer and validator as a driver."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..codec.options import ImportanceOptions, Options
from ..dtypes import DTYPES
from ..engines import get_engine, require_name
from ..errors import EngineError, FileFault, OptionError
from ..limits import DEFAULT_LIMITS, Limits
from ..numpy import save
from ..reader import SfpFile
from ..validate import validate
from ..writer import Writer
from .judge import SUFFIXES
from .suite import Contents, shape_of

Json = dict[str, Any]


class OwnDriver:
    """Answers questions with this package."""

    def __init__(self, engine: str | None, limits: dict[str, int]) -> None:
        self._engine, self._limits = engine, replace(DEFAULT_LIMITS, **limits)
        try:
            require_name(engine)
            if engine is not None:
                _warmed(engine)
            self._missing = ""
        except EngineError as error:
            self._missing = str(error)
        self._commands: dict[str, Callable[..., Json]] = {
            "hello": self.hello,
            "validate": self.validate,
            "decode": self.decode,
            "encode": self.encode,
        }

    def answer(self, words: list[str]) -> Json:
        """The answer to a question; an engine that cannot be used here leaves all out."""
        if self._missing and words[0] != "hello":
            return {"ok": False, "skip": self._missing}
        return self._commands[words[0]](*words[1:])

    def hello(self) -> Json:
        """Who answers."""
        name = f"sfpformat-{self._engine or 'auto'}"
        return {"ok": True, "name": name, "version": __version__, "profile": "full", "canonical": True}

    def validate(self, path: str) -> Json:
        """Whether a file is valid, and canonical."""
        report = validate(path, limits=self._limits, engine=self._engine)
        return {"ok": True, "canonical": report.canonical} if report.ok else _refusal(report.faults[0])

    def decode(self, path: str, folder: str) -> Json:
        """What a file holds, arrays as files in a folder."""
        try:
            with SfpFile(path, limits=self._limits, engine=self._engine, threads=1) as file:
                tensors = [self._decoded(file, name, Path(folder, str(i))) for i, name in enumerate(file)]
                return {"ok": True, "metadata": file.metadata(), "tensors": tensors}
        except FileFault as error:
            return _refusal(error)

    def _decoded(self, file: SfpFile, name: str, stem: Path) -> Json:
        for what, data in arrays_of(file, name).items():
            stem.with_name(stem.name + SUFFIXES[what]).write_bytes(data)
        return described(file, name)

    def encode(self, job: str, arrays: str, path: str) -> Json:
        """Writes the file that a job asks for."""
        wanted = Contents(json.loads(Path(job).read_text("utf-8")), Path(arrays).read_bytes())
        try:
            with Writer(path, metadata=wanted.description["metadata"], engine=self._engine) as writer:
                for tensor in wanted.tensors:
                    values = np.frombuffer(wanted.array(tensor), DTYPES[tensor["dtype"]].numpy)
                    importance = None
                    if "importance" in tensor:
                        importance = np.frombuffer(wanted.array(tensor["importance"]), "<f4")
                        importance = importance.reshape(shape_of(tensor))
                    options = options_of(tensor)
                    writer.add(
                        tensor["name"], values.reshape(shape_of(tensor)), options, importance=importance
                    )
        except OptionError as error:
            return {"ok": False, "unsupported": True, "detail": str(error)}
        return {"ok": True}


def _warmed(engine: str) -> None:
    """Has an engine load what it needs, which is not what a case takes."""
    get_engine(engine)
    plain = {str(i): np.arange(40, dtype=np.float16) for i in range(9)}
    with SfpFile(save(plain, engine=engine, threads=1), engine=engine, threads=1) as file:
        file.get_tensors()


def options_of(tensor: Json) -> Options:
    """The options of a tensor of a job, whose choices are named as in chapter 22."""
    given = dict(tensor.get("choices", {}))
    if "chunk" in given:
        given["chunk"] *= given["segment"]  # here a chunk is measured in positions
    if "step" in given:
        given["step"] = float(np.array(int(given["step"], 16), "<u4").view("<f4"))
    if "count" in given:
        given["centroids"] = given.pop("count")
    if "importance" in tensor:
        kept = {key: tensor["importance"][key] for key in ("role", "over")}
        given["importance"] = ImportanceOptions(quantiser="exact", dtype="F32", **kept)
    return Options(rate_weight=0, **given)  # every weight has an exact code: the nearest


def described(file: SfpFile, name: str) -> Json:
    """What a decoder says of a tensor."""
    entry = file.entry(name)
    return {"name": name, "dtype": entry.dtype.name, "shape": list(entry.shape)}


def arrays_of(file: SfpFile, name: str) -> dict[str, bytes]:
    """What a decoder writes of a tensor: `values`, and where they are `mask` and `importance`."""
    out = {"values": file.get_tensor(name).tobytes()}
    if file.entry(name).mask is not None:
        out["mask"] = file.get_mask(name).tobytes()
    importance = file.get_importance(name)
    if importance is not None:
        out["importance"] = importance.tobytes()
    return out


def _refusal(error: FileFault) -> Json:
    return {
        "ok": False,
        "error": error.code,
        "clause": error.clause,
        "tensor": error.tensor,
        "offset": error.offset,
        "detail": error.detail,
    }


def serve(engine: str | None, words: list[str], lines: Iterable[str]) -> int:
    """Answers one question (exit status 0, 1 or 3) or, with the word ``serve``, one a line until the end.

    Args:
        engine: as in `sfpformat.open`.
        words: ``LIMIT=NUMBER`` as often as wanted, then the question.
        lines: the questions after ``serve``, words apart by tabs.
    """
    limits = {}
    while words and "=" in words[0]:
        name, _, number = words.pop(0).partition("=")
        limits[name] = int(number)
    unknown = set(limits) - set(Limits.__dataclass_fields__)
    if unknown or not words:
        raise OptionError(f"not limits: {', '.join(unknown)}" if unknown else "no question")
    driver = OwnDriver(engine, limits)
    if words != ["serve"]:
        answer = driver.answer(words)
        print(json.dumps(answer))
        return 0 if answer["ok"] else 3 if answer.get("unsupported") else 1
    for line in lines:
        print(json.dumps(driver.answer(line.rstrip("\n").split("\t"))))
        sys.stdout.flush()
    return 0
