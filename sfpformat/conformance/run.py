"""A run of the suite: every case put to the programs, in an order and under names that tell nothing."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import FileFault
from ..reader import SfpFile
from .driver import Driver, DriverFailure
from .judge import BAD, FAIL, PASS, UNSUPPORTED, Verdict, judge_canonical, judge_contents
from .suite import Case, Suite, SuiteError, shape_of

Json = dict[str, Any]
ROLES = ("decoder", "validator", "encoder")


@dataclass(frozen=True)
class Settings:
    """What is asked of whom.

    Attributes:
        drivers: role -> the program.
        profile: what the programs claim to have: ``core``, ``full``, or one feature's name.
        levels: which of 1 to 4.
        only: a part of ids, or of clauses' ids, or nothing for all.
        seed: of the order.
        known: id -> why a failure is expected.
    """

    drivers: dict[str, Driver]
    profile: str = "full"
    levels: frozenset[int] = frozenset((1, 2, 3, 4))
    only: str = ""
    seed: int = 0
    known: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """A case, the role in which a program met it, what came of it, and after how many seconds."""

    case: Case
    role: str
    verdict: Verdict
    seconds: float
    known: str | None = None

    @property
    def bad(self) -> bool:
        """Whether it makes the run fail: a failure that is not known, or a known one that is none now."""
        return (self.verdict.outcome in BAD) != (self.known is not None)


@dataclass(frozen=True)
class Results:
    """All outcomes of a run.

    Attributes:
        suite: the cases.
        programs: role -> what the program said of itself.
        outcomes: in the order of the suite.
        seconds: the whole run.
    """

    suite: Suite
    programs: dict[str, Json]
    outcomes: list[Outcome]
    seconds: float

    @property
    def bad(self) -> list[Outcome]:
        """Those that make the run fail, worst first."""
        order = {word: i for i, word in enumerate(BAD)}
        return sorted(
            (o for o in self.outcomes if o.bad), key=lambda o: order.get(o.verdict.outcome, len(BAD))
        )


def known_failures(source: Json, today: date) -> dict[str, str]:
    """The expected failures of a list: ``[[known]]`` with id, reason and, if wanted, ``until``, a date.

    Raises:
        SuiteError: one lacks its id or reason, or its date is past.
    """
    out = {}
    for entry in source.get("known", ()):
        if not isinstance(entry.get("id"), str) or not entry.get("reason"):
            raise SuiteError(f"an expected failure needs id and reason: {entry}")
        until = entry.get("until")
        if isinstance(until, date) and until < today:
            raise SuiteError(
                f"the failure of {entry['id']} was expected until {until} only: {entry['reason']}"
            )
        out[entry["id"]] = str(entry["reason"])
    return out


def run(suite: Suite, settings: Settings, advance: Callable[[int], None]) -> Results:
    """Puts the cases to the programs.

    Args:
        advance: called with 1 after each.

    Raises:
        SuiteError: a file of the suite is not there, or no case is left to ask.
    """
    start = time.monotonic()
    questions = list(_questions(suite.cases, settings))
    if not questions:
        raise SuiteError("no case is left to ask: see --profile, --level and --only")
    strangers = set(settings.known) - {case.id for case in suite.cases}
    if strangers:
        raise SuiteError(f"expected failures of no case: {', '.join(sorted(strangers))}")
    order = list(range(len(questions)))
    random.Random(settings.seed).shuffle(order)
    found: dict[int, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            programs = {role: _hello(driver) for role, driver in settings.drivers.items()}
            for number in order:
                found[number] = _asked(*questions[number], settings, Path(folder))
                advance(1)
        finally:
            for driver in settings.drivers.values():
                driver.close()
    outcomes = [found[number] for number in range(len(questions))]
    return Results(suite, programs, outcomes, time.monotonic() - start)


def _questions(cases: Iterable[Case], settings: Settings) -> Iterator[tuple[Case, str]]:
    """The cases that are asked, each with a role."""
    for case in cases:
        wanted = settings.only in case.id or settings.only in case.clauses
        for role in ROLES:
            if wanted and role in settings.drivers and role in case.roles and case.level in settings.levels:
                yield case, role


def _hello(driver: Driver) -> Json:
    """What a program says of itself; nothing where it does not know the question."""
    try:
        answer = driver.ask(["hello"])
    except DriverFailure:
        return {}
    return answer if answer["ok"] else {}


def _asked(case: Case, role: str, settings: Settings, folder: Path) -> Outcome:
    """Puts a case to the program of a role."""
    start = time.monotonic()
    shutil.rmtree(folder / "case", ignore_errors=True)
    (folder / "case" / "out").mkdir(parents=True)
    try:
        verdict = _ASK[role](case, settings.drivers[role], folder / "case")
    except DriverFailure as failure:
        verdict = Verdict(failure.kind, str(failure))
    if verdict.outcome != UNSUPPORTED and not _within(case, settings.profile) and verdict.outcome in BAD:
        verdict = Verdict(UNSUPPORTED, f"outside the profile: {verdict.words}")
    elif verdict.outcome == UNSUPPORTED and role != "encoder" and _within(case, settings.profile):
        verdict = Verdict(FAIL, f"not supported, though the profile {settings.profile} has it")
    return Outcome(case, role, verdict, time.monotonic() - start, settings.known.get(case.id))


def _within(case: Case, profile: str) -> bool:
    """Whether a program of that profile must do right by the case."""
    if profile == "full":
        return True
    return case.profile == "core" if profile == "core" else profile in case.features


def _decode(case: Case, driver: Driver, folder: Path) -> Verdict:
    (folder / "file.sfp").write_bytes(case.data())
    out = folder / "out"

    def written(name: str) -> bytes | None:
        return (out / name).read_bytes() if (out / name).is_file() else None

    answer = driver.ask(["decode", str(folder / "file.sfp"), str(out)], case.limits)
    return judge_contents(case, answer, written)


def _validate(case: Case, driver: Driver, folder: Path) -> Verdict:
    (folder / "file.sfp").write_bytes(case.data())
    return judge_canonical(case, driver.ask(["validate", str(folder / "file.sfp")], case.limits))


def _encode(case: Case, driver: Driver, folder: Path) -> Verdict:
    """The file that a program writes for a job, read by this package."""
    job, arrays, target = folder / "job.json", folder / "job.bin", folder / "out" / "file.sfp"
    job.write_bytes(case.data())
    arrays.write_bytes(case.contents.arrays)
    answer = driver.ask(["encode", str(job), str(arrays), str(target)], case.limits)
    if answer.get("unsupported"):
        return Verdict(UNSUPPORTED, str(answer.get("detail", "")))
    if not answer["ok"]:
        return Verdict(FAIL, f"not encoded: {answer.get('detail')}")
    try:
        with SfpFile(target, engine="python", threads=1) as file:
            return _reread(case, file)
    except (OSError, FileFault) as error:
        return Verdict(FAIL, f"what was written cannot be read: {error}")


def _reread(case: Case, file: SfpFile) -> Verdict:
    tensors = case.contents.tensors
    if list(file) != [tensor["name"] for tensor in tensors]:
        return Verdict(FAIL, "what was written has other tensors, or in another order")
    if file.metadata() != case.contents.description["metadata"]:
        return Verdict(FAIL, "what was written has other metadata")
    for tensor in tensors:
        name, info = tensor["name"], file.info(tensor["name"])
        if (info.dtype, list(info.shape)) != (tensor["dtype"], shape_of(tensor)):
            return Verdict(FAIL, f"tensor {name!r}: written as {info.dtype} {list(info.shape)}")
        if file.get_tensor(name).tobytes() != case.contents.array(tensor):
            return Verdict(FAIL, f"tensor {name!r}: what was written has other values")
    return Verdict(PASS)


_ASK: dict[str, Callable[[Case, Driver, Path], Verdict]] = {
    "decoder": _decode,
    "validator": _validate,
    "encoder": _encode,
}


def as_json(results: Results) -> Json:
    """The results for a program that reads them."""
    return {
        "runner": __version__,
        "programs": results.programs,
        "seconds": round(results.seconds, 3),
        "passed": not results.bad,
        "outcomes": [
            {
                "id": o.case.id,
                "role": o.role,
                "outcome": o.verdict.outcome,
                "words": o.verdict.words,
                "notes": list(o.verdict.notes),
                "clauses": list(o.case.clauses),
                "seconds": round(o.seconds, 6),
                **({} if o.known is None else {"expected_failure": o.known}),
            }
            for o in results.outcomes
        ],
    }
