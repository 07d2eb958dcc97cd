"""A driver for this package's own reader, writer and validator."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfpformat import __version__
from sfpformat.decode.reader import SfpFile
from sfpformat.decode.validate import validate
from sfpformat.deltas.result import DeltaFile
from sfpformat.dtypes import DTYPES
from sfpformat.encode.writer import Writer
from sfpformat.engines import get_engine, require_name
from sfpformat.errors import EngineError, FileFault, OptionError
from sfpformat.keyed.table import KeyedTable
from sfpformat.limits import DEFAULT_LIMITS, Limits
from sfpformat.numpy import save
from sfpformat.options import Exact, ImportanceOptions, Lossless, Options, Quantiser, Table, Uniform

from .judge import SUFFIXES
from .scratch import scratch
from .suite import Case, Contents, shape_of

Json = dict[str, Any]


@dataclass(frozen=True)
class OwnDriver:
    """Answers questions with this package.

    Attributes:
        engine: the engine's name, as for `sfpformat.open`; None selects one automatically.
        limits: default limits; a question can override them.
    """

    engine: str | None
    limits: Limits = DEFAULT_LIMITS

    def answer(self, words: Sequence[str]) -> Json:
        """Answers a question. If the engine is unavailable, every answer except to `hello` is a skip.

        Args:
            words: any number of ``LIMIT=NUMBER``, which hold for this question only, then the question.

        Raises:
            OptionError: a limit or the question is unknown, or there is no question.
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
            "apply": own.apply,
            "look-up": own.look_up,
            "encode": own.encode,
        }
        if question not in commands:
            raise OptionError(
                f"unknown question {question!r}; the questions are hello, {', '.join(commands)}"
            )
        return commands[question](*rest)

    def hello(self) -> Json:
        """Returns the driver's name, version and capabilities."""
        return {
            "ok": True,
            "name": f"sfpformat-{self.engine or 'auto'}",
            "version": __version__,
            "profile": "full",
            "canonical": True,
            "limits": True,
        }

    def validate(self, path: str) -> Json:
        """Answers whether a file is valid and canonical, or with its first fault."""
        report = validate(path, limits=self.limits, engine=self.engine)
        return {"ok": True, "canonical": report.canonical} if report.ok else _refusal(report.faults[0])

    def decode(self, path: str, folder: str) -> Json:
        """Answers with the contents of a file. Writes its arrays into a folder."""
        try:
            with SfpFile(path, limits=self.limits, engine=self.engine, threads=1) as file:
                tensors = [self._decoded(file, name, Path(folder, str(i))) for i, name in enumerate(file)]
                return {"ok": True, "metadata": file.metadata(), "tensors": tensors}
        except FileFault as error:
            return _refusal(error)

    def apply(self, path: str, base: str, folder: str) -> Json:
        """Answers with the result of a delta and its base. Writes its arrays into a folder."""
        try:
            with DeltaFile(path, base, limits=self.limits, engine=self.engine, threads=1) as file:
                file.check_base()
                tensors = []
                for number, (name, spec) in enumerate(file.specs.items()):
                    parts = file.parts(name)
                    arrays = {"values": file.get_tensor(name).tobytes()}
                    if parts is not None and parts.structure.masked:
                        arrays["mask"] = file.get_mask(name).tobytes()
                    importance = file.get_importance(name)
                    if importance is not None:
                        arrays["importance"] = importance.tobytes()
                    for what, data in arrays.items():
                        Path(folder, f"{number}{SUFFIXES[what]}").write_bytes(data)
                    tensors.append({"name": name, "dtype": spec.dtype.name, "shape": list(spec.shape)})
                return {"ok": True, "metadata": file.metadata(), "tensors": tensors}
        except FileFault as error:
            return _refusal(error)

    def look_up(self, path: str, keys: str, folder: str) -> Json:
        """Answers with the weights of keys in all keyed tables of a file. Writes the arrays into a folder."""
        listed = [bytes.fromhex(line) for line in Path(keys).read_text("ascii").splitlines()]
        try:
            with SfpFile(path, limits=self.limits, engine=self.engine, threads=1) as file:
                names, metadata = [table.name for table in file.directory.keyed], file.metadata()
            tensors: list[Json] = []
            for name in names:
                table = KeyedTable.open(path, name, limits=self.limits, engine=self.engine)
                for what, array in answers_of(table, listed).items():
                    Path(folder, f"{len(tensors)}{SUFFIXES['values']}").write_bytes(array.tobytes())
                    dtype = "BOOL" if array.dtype == np.bool_ else "F32"
                    tensors.append({"name": what, "dtype": dtype, "shape": list(array.shape)})
            return {"ok": True, "metadata": metadata, "tensors": tensors}
        except FileFault as error:
            return _refusal(error)

    def _decoded(self, file: SfpFile, name: str, stem: Path) -> Json:
        for what, data in arrays_of(file, name).items():
            stem.with_name(stem.name + SUFFIXES[what]).write_bytes(data)
        return described(file, name)

    def encode(self, job: str, arrays: str, path: str) -> Json:
        """Writes the file that a job asks for. Answers unsupported if the package refuses an option."""
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
    """Loads an engine with a small encode and decode, so that this time does not count for a case.

    Returns why the engine is unavailable, or an empty string.
    """
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
    """Runs some jobs, so that a compiling engine compiles all functions that they need.

    The engine caches them on disk. A first compilation takes longer than the time limit of a case.
    """
    driver = OwnDriver(engine)
    with scratch() as folder:
        arrays, written = Path(folder, "arrays.bin"), Path(folder, "written.sfp")
        for job in jobs:
            arrays.write_bytes(job.contents.arrays)
            if driver.answer(["encode", str(job.path), str(arrays), str(written)])["ok"]:
                driver.answer(["decode", str(written), folder])


def options_of(tensor: Json) -> Options:
    """Returns the options of a tensor of a job, whose choices have the names of chapter 22."""
    given = dict(tensor.get("choices", {}))
    given["quantiser"] = _quantiser_of(given)
    if "chunk" in given:
        given["chunk"] *= given["segment"]  # `Options.chunk` counts positions, the job counts segments
    if "importance" in tensor:
        kept = {key: tensor["importance"][key] for key in ("role", "over")}
        given["importance"] = ImportanceOptions(quantiser="exact", dtype="F32", **kept)
    return Options(**given)


def _quantiser_of(choices: Json) -> Quantiser:
    """Removes the quantiser and its parameters from the choices of a job, and returns it."""
    kind = choices.pop("quantiser", Lossless.NAME)
    if kind == Uniform.NAME:
        step = float(np.array(int(choices.pop("step"), 16), "<u4").view("<f4"))
        return Uniform(step=step, rate_weight=0)  # rate weight 0 always chooses the nearest level
    if kind == Table.NAME:
        return Table(centroids=choices.pop("count"))
    for plain in (Lossless, Exact):
        if kind == plain.NAME:
            return plain()
    raise OptionError(f"a job's quantiser is {kind!r}, must be lossless, exact, uniform or table")


def answers_of(table: KeyedTable, keys: list[bytes]) -> dict[str, NDArray[Any]]:
    """Returns what a decoder writes for the keys of a keyed table."""
    found = table.find(keys)
    out: dict[str, NDArray[Any]] = {table.name: found.weights, f"{table.name}.known": found.known}
    if found.importance is not None:
        out[f"{table.name}.importance"] = found.importance
    return out


def described(file: SfpFile, name: str) -> Json:
    """Returns a decoder's description of a tensor."""
    entry = file.entry(name)
    return {"name": name, "dtype": entry.dtype.name, "shape": list(entry.shape)}


def arrays_of(file: SfpFile, name: str) -> dict[str, bytes]:
    """Returns the arrays that a decoder writes: `values`, and `mask` and `importance` if there are any."""
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
    """Answers one question or, for the word ``serve``, one question per line until the end of input.

    Args:
        engine: the engine's name, as for `sfpformat.open`.
        words: any number of ``LIMIT=NUMBER``, then the question.
        lines: the questions after ``serve``, words separated by tabs.

    Returns:
        The exit status: 0 accepted, 1 refused, 3 unsupported; 0 after ``serve``.
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
    """Applies the leading words ``LIMIT=NUMBER`` to limits. Returns the limits and the remaining words.

    Raises:
        OptionError: a limit is unknown, or no word remains.
    """
    given = [word.partition("=") for word in takewhile(lambda word: "=" in word, words)]
    unknown = {name for name, _, _ in given} - set(Limits.__dataclass_fields__)
    if unknown:
        raise OptionError(f"unknown limits: {', '.join(sorted(unknown))}")
    if len(given) == len(words):
        raise OptionError("no question: give one after the limits, or 'serve'")
    return replace(limits, **{name: int(number) for name, _, number in given}), list(words[len(given) :])
