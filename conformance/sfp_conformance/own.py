"""This package's own reader, writer and validator as a driver."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from sfpformat import __version__
from sfpformat.decode.reader import SfpFile
from sfpformat.decode.validate import validate
from sfpformat.dtypes import DTYPES
from sfpformat.encode.writer import Writer
from sfpformat.engines import get_engine, require_name
from sfpformat.errors import EngineError, FileFault, OptionError
from sfpformat.limits import DEFAULT_LIMITS, Limits
from sfpformat.numpy import save
from sfpformat.options import ImportanceOptions, Options

from .judge import SUFFIXES
from .scratch import scratch
from .suite import Case, Contents, shape_of

Json = dict[str, Any]


@dataclass(frozen=True)
class OwnDriver:
    """Answers questions with this package.

    Attributes:
        engine: as in `sfpformat.open`.
        limits: in force where a question brings none.
    """

    engine: str | None
    limits: Limits = DEFAULT_LIMITS

    def answer(self, words: Sequence[str]) -> Json:
        """The answer to a question; an engine that cannot be used here leaves all out.

        Args:
            words: ``LIMIT=NUMBER`` as often as wanted, which hold for this question, then those of it.
        """
        limits, (question, *rest) = limits_of(words, self.limits)
        missing = _loaded(self.engine)
        if question == "hello":
            return self.hello()
        if missing:
            return {"ok": False, "skip": missing}
        own = replace(self, limits=limits)
        commands: dict[str, Callable[..., Json]] = {
            "validate": own.validate,
            "decode": own.decode,
            "encode": own.encode,
        }
        return commands[question](*rest)

    def hello(self) -> Json:
        """Who answers."""
        return {
            "ok": True,
            "name": f"sfpformat-{self.engine or 'auto'}",
            "version": __version__,
            "profile": "full",
            "canonical": True,
            "limits": True,
        }

    def validate(self, path: str) -> Json:
        """Whether a file is valid, and canonical."""
        report = validate(path, limits=self.limits, engine=self.engine)
        return {"ok": True, "canonical": report.canonical} if report.ok else _refusal(report.faults[0])

    def decode(self, path: str, folder: str) -> Json:
        """What a file holds, arrays as files in a folder."""
        try:
            with SfpFile(path, limits=self.limits, engine=self.engine, threads=1) as file:
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
            with Writer(path, metadata=wanted.description["metadata"], engine=self.engine) as writer:
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


@cache
def _loaded(engine: str | None) -> str:
    """Has an engine load what it needs, which is not what a case takes; says why it cannot, or nothing."""
    try:
        require_name(engine)
        if engine is not None:
            get_engine(engine)
            plain = {str(i): np.arange(40, dtype=np.float16) for i in range(9)}
            with SfpFile(save(plain, engine=engine, threads=1), engine=engine, threads=1) as file:
                file.get_tensors()
    except EngineError as error:
        return str(error)
    return ""


def compile_once(engine: str, jobs: Iterable[Case]) -> None:
    """Does some jobs, so that an engine that compiles has compiled for this machine what they need.

    It keeps that on disk. Which takes longer than a case gives, on a machine where it was never done.
    """
    driver = OwnDriver(engine)
    with scratch() as folder:
        arrays, written = Path(folder, "arrays.bin"), Path(folder, "written.sfp")
        for job in jobs:
            arrays.write_bytes(job.contents.arrays)
            if driver.answer(["encode", str(job.path), str(arrays), str(written)])["ok"]:
                driver.answer(["decode", str(written), folder])


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
    limits, question = limits_of(words, DEFAULT_LIMITS)
    driver = OwnDriver(engine, limits)
    if question != ["serve"]:
        answer = driver.answer(question)
        print(json.dumps(answer))
        return 0 if answer["ok"] else 3 if answer.get("unsupported") else 1
    for line in lines:
        print(json.dumps(driver.answer(line.rstrip("\n").split("\t"))), flush=True)
    return 0


def limits_of(words: Sequence[str], limits: Limits) -> tuple[Limits, list[str]]:
    """Limits changed by the words ``LIMIT=NUMBER`` that stand first, and the words after them.

    Raises:
        OptionError: there is no such limit, or nothing after them.
    """
    given = [word.partition("=") for word in takewhile(lambda word: "=" in word, words)]
    unknown = {name for name, _, _ in given} - set(Limits.__dataclass_fields__)
    if unknown:
        raise OptionError(f"not limits: {', '.join(sorted(unknown))}")
    if len(given) == len(words):
        raise OptionError("no question")
    return replace(limits, **{name: int(number) for name, _, number in given}), list(words[len(given) :])
