"""This package's own reader, writer and validator as a driver: the protocol's plainest example."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..codec.options import Options
from ..dtypes import DTYPES
from ..errors import FileFault, OptionError
from ..limits import DEFAULT_LIMITS, Limits
from ..reader import SfpFile
from ..validate import validate
from ..writer import Writer
from .suite import Contents, shape_of

Json = dict[str, Any]


class OwnDriver:
    """Answers questions with this package."""

    def __init__(self, engine: str | None, limits: dict[str, int]) -> None:
        self._engine, self._limits = engine, replace(DEFAULT_LIMITS, **limits)
        self._commands: dict[str, Callable[..., Json]] = {
            "hello": self.hello,
            "validate": self.validate,
            "decode": self.decode,
            "encode": self.encode,
        }

    def answer(self, words: list[str]) -> Json:
        """The answer to a question."""
        return self._commands[words[0]](*words[1:])

    def hello(self) -> Json:
        """Who answers."""
        roles = ["decoder", "validator", "encoder"]
        return {"ok": True, "name": "sfpformat", "version": __version__, "profile": "full", "roles": roles}

    def validate(self, path: str) -> Json:
        """Whether a file is valid, and canonical."""
        report = validate(path, limits=self._limits)
        return {"ok": True, "canonical": report.canonical} if report.ok else _refusal(report.faults[0])

    def decode(self, path: str, folder: str) -> Json:
        """What a file holds, arrays as files in a folder."""
        try:
            with SfpFile(path, limits=self._limits, engine=self._engine, threads=1) as file:
                tensors = [self._decoded(file, name, Path(folder, str(i))) for i, name in enumerate(file)]
        except FileFault as error:
            return _refusal(error)
        return {"ok": True, "tensors": tensors}

    def _decoded(self, file: SfpFile, name: str, stem: Path) -> Json:
        values, entry = file.get_tensor(name), file.entry(name)
        stem.with_name(stem.name + ".bin").write_bytes(values.tobytes())
        if entry.mask is not None:
            stem.with_name(stem.name + ".mask.bin").write_bytes(file.get_mask(name).tobytes())
        importance = file.get_importance(name)
        if importance is not None:
            stem.with_name(stem.name + ".importance.bin").write_bytes(importance.tobytes())
        return {"name": name, "dtype": entry.dtype.name, "shape": list(entry.shape)}

    def encode(self, job: str, arrays: str, path: str) -> Json:
        """Writes the file that a job asks for; its choices are `Options` by name."""
        wanted = Contents(json.loads(Path(job).read_text("utf-8")), Path(arrays).read_bytes())
        try:
            with Writer(path, metadata=wanted.description["metadata"], engine=self._engine) as writer:
                for tensor in wanted.tensors:
                    values = np.frombuffer(wanted.array(tensor), DTYPES[tensor["dtype"]].numpy)
                    options = Options(**tensor.get("choices", {}))
                    writer.add(tensor["name"], values.reshape(shape_of(tensor)), options)
        except OptionError as error:
            return {"ok": False, "unsupported": True, "detail": str(error)}
        return {"ok": True}


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
