"""Runs the suite: asks the programs about every case, in random order and under neutral file names."""

from __future__ import annotations

import os
import random
import shutil
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from sfpformat import __version__

from .driver import Driver, DriverFailure
from .encoded import judge_written
from .judge import BAD, FAIL, PASS, SKIP, UNSUPPORTED, Verdict, judge_canonical, judge_contents
from .scratch import scratch
from .suite import Case, Suite, SuiteError

Json = dict[str, Any]
# Roles of programs. In a round trip the decoder reads the file that the encoder wrote.
ROUND_TRIP = "round trip"
ROLES = ("decoder", "validator", "encoder", ROUND_TRIP)


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        drivers: role -> the program.
        profile: the profile that the programs claim: ``core``, ``full``, or the name of one feature. None
            uses what each program says of itself, by default ``full``.
        levels: the levels to run, of 1 to 4.
        only: runs only cases whose id, or a clause id of theirs, contains this text. Empty for all.
        seed: the seed of the random order.
        known: case id -> why a failure is expected; None uses the programs' lists in the suite.
    """

    drivers: dict[str, Driver]
    profile: str | None = None
    levels: frozenset[int] = frozenset((1, 2, 3, 4))
    only: str = ""
    seed: int = 0
    known: dict[str, str] | None = None


@dataclass(frozen=True)
class Outcome:
    """A case, the role of the program, the verdict, the time in seconds, and why a failure is expected."""

    case: Case
    role: str
    verdict: Verdict
    seconds: float
    known: str | None = None

    @property
    def bad(self) -> bool:
        """Whether it makes the run fail: an unexpected failure, or an expected failure that did not occur."""
        return (self.verdict.outcome in BAD) != (self.known is not None)

    @property
    def words(self) -> str:
        """The reason why it failed or was not run."""
        is_too_good = self.bad and self.known is not None
        return (
            "passed, but is listed as an expected failure; remove it from the list"
            if is_too_good
            else self.verdict.words
        )


@dataclass(frozen=True)
class Results:
    """All outcomes of a run.

    Attributes:
        suite: the cases.
        programs: role -> the program's answer to ``hello``.
        outcomes: the outcomes, in suite order.
        seconds: duration of the run.
        processor: processor time of this process and of the programs, in seconds.
    """

    suite: Suite
    programs: dict[str, Json]
    outcomes: list[Outcome]
    seconds: float
    processor: float

    @property
    def passed(self) -> bool:
        """Whether nothing failed and at least one case passed: a run that skips all cases does not pass."""
        return not self.bad and any(o.verdict.outcome == PASS for o in self.outcomes)

    @property
    def bad(self) -> list[Outcome]:
        """The outcomes that make the run fail, worst first."""
        order = {word: i for i, word in enumerate(BAD)}
        return sorted(
            (o for o in self.outcomes if o.bad), key=lambda o: order.get(o.verdict.outcome, len(BAD))
        )


def known_failures(source: Json, today: date) -> dict[str, str]:
    """Parses a list of expected failures: ``[[known]]`` with `id`, `reason` and optionally ``until``, a date.

    Returns:
        case id -> reason.

    Raises:
        SuiteError: an entry lacks its id or its reason, or its date is past.
    """
    out = {}
    for entry in source.get("known", ()):
        if not isinstance(entry.get("id"), str) or not entry.get("reason"):
            raise SuiteError(f"expected failure without `id` or `reason`: {entry}")
        until = entry.get("until")
        if isinstance(until, date) and until < today:
            raise SuiteError(f"the entry for {entry['id']} expired on {until}: {entry['reason']}")
        out[entry["id"]] = str(entry["reason"])
    return out


def run(suite: Suite, settings: Settings, advance: Callable[[int], None]) -> Results:
    """Asks the programs about the cases, and closes the drivers.

    Args:
        advance: called with 1 after each question.

    Raises:
        SuiteError: a file of the suite is missing or changed, the settings select no case, or an expected
            failure names an unknown case.
    """
    start, used = time.monotonic(), _processor_time()
    questions = list(_questions(suite.cases, settings))
    if not questions:
        raise SuiteError("no case is selected; check --profile, --level and --only")
    order = list(range(len(questions)))
    random.Random(settings.seed).shuffle(order)
    found: dict[int, Outcome] = {}
    with scratch() as folder:
        try:
            programs = {role: driver.said for role, driver in settings.drivers.items()}
            known = _known(suite, settings, programs)
            for number in order:
                case, role = questions[number]
                found[number] = _asked(case, role, settings, programs, known, Path(folder))
                advance(1)
        finally:
            for driver in settings.drivers.values():
                driver.close()
    outcomes = [found[number] for number in range(len(questions))]
    return Results(suite, programs, outcomes, time.monotonic() - start, _processor_time() - used)


def _processor_time() -> float:
    """Returns the processor time of this process and of its ended child processes, in seconds.

    Windows does not report that of child processes.
    """
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system


def _questions(cases: Iterable[Case], settings: Settings) -> Iterator[tuple[Case, str]]:
    """Yields the selected cases, each with a role."""
    for case in cases:
        wanted = any(settings.only in name for name in (case.id, *case.clauses))
        for role in ROLES:
            asked = {"decoder", "encoder"} if role == ROUND_TRIP else {role}
            is_for = ("encoder" if role == ROUND_TRIP else role) in case.roles
            if wanted and is_for and asked <= set(settings.drivers) and case.level in settings.levels:
                yield case, role


def _known(suite: Suite, settings: Settings, programs: dict[str, Json]) -> dict[str, str]:
    """Returns the expected failures: of the settings, else of the programs' lists in the suite.

    Raises:
        SuiteError: a list names a case that does not exist.
    """
    known = settings.known
    if known is None:
        lists = {suite.folder / "known" / f"{said.get('name')}.toml" for said in programs.values()}
        known = {}
        for path in sorted(path for path in lists if path.is_file()):
            known |= known_failures(tomllib.loads(path.read_text("utf-8")), datetime.now(UTC).date())
    strangers = set(known) - {case.id for case in suite.cases}
    if strangers:
        raise SuiteError(f"expected failures of unknown cases: {', '.join(sorted(strangers))}")
    return known


@dataclass(frozen=True)
class _Question:
    """A case in one role.

    Attributes:
        profile: the profile that the program claims.
        refuses: whether the program itself says that its profile is ``core``. The setting `profile` only
            selects which cases it must pass.
        claims_canonical: whether the program says that it writes canonical files.
        folder: a temporary folder that contains only an empty folder `out`.
    """

    case: Case
    drivers: dict[str, Driver]
    profile: str
    refuses: bool
    claims_canonical: bool
    folder: Path

    @property
    def within(self) -> bool:
        """Whether the case lies within the profile that the program claims."""
        if self.profile == "core":
            return self.case.profile == "core"
        return self.profile == "full" or self.profile in self.case.features

    def ask(self, role: str, *words: object) -> Json:
        """Asks the program of a role, with the limits, the time and the memory of the case."""
        case = self.case
        return self.drivers[role].ask([*map(str, words)], case.limits, case.seconds, case.memory)

    def file(self) -> Path:
        """Writes the case's file under a neutral name, and returns its path."""
        path = self.folder / "file.sfp"
        path.write_bytes(self.case.data())
        return path


def _asked(
    case: Case, role: str, settings: Settings, programs: dict[str, Json], known: dict[str, str], folder: Path
) -> Outcome:
    """Asks the program of a role about a case. A driver failure becomes the verdict."""
    start = time.monotonic()
    shutil.rmtree(folder / "case", ignore_errors=True)
    (folder / "case" / "out").mkdir(parents=True)
    own = programs["decoder" if role == ROUND_TRIP else role]
    profile = settings.profile or str(own.get("profile", "full"))
    refuses, canonical = own.get("profile") == profile == "core", own.get("canonical") is True
    try:
        verdict = _ASK[role](_Question(case, settings.drivers, profile, refuses, canonical, folder / "case"))
    except DriverFailure as failure:
        verdict = Verdict(failure.kind, str(failure))
    return Outcome(case, role, verdict, time.monotonic() - start, known.get(case.id))


def _decode(question: _Question) -> Verdict:
    return _decoded(question, question.file())


def _decoded(question: _Question, path: Path) -> Verdict:
    """Lets the decoder read a file, and compares the result with the contents of the case."""
    out = question.folder / "out"

    def written(name: str) -> bytes | None:
        return (out / name).read_bytes() if (out / name).is_file() else None

    base, keys = question.case.base, question.case.keys
    if keys is not None:
        listed = question.folder / "keys.txt"
        listed.write_text("".join(f"{key.hex()}\n" for key in keys), "ascii")
        answer = question.ask("decoder", "look-up", path, listed, out)
    elif base is None:
        answer = question.ask("decoder", "decode", path, out)
    else:
        own = question.folder / "base.sfp"
        shutil.copyfile(base, own)
        answer = question.ask("decoder", "apply", path, own, out)
    may_ignore = frozenset(("importance",) if question.profile == "core" else ())
    return judge_contents(
        question.case,
        answer,
        written,
        within=question.within,
        refuses=question.refuses,
        may_ignore=may_ignore,
    )


def _validate(question: _Question) -> Verdict:
    answer = question.ask("validator", "validate", question.file())
    return judge_canonical(question.case, answer, within=question.within, refuses=question.refuses)


def _encode(question: _Question) -> Verdict:
    """Lets the encoder write a file for a job, and checks it with this package's reader."""
    return _written(question)[0]


def _written(question: _Question) -> tuple[Verdict, Path]:
    case, folder = question.case, question.folder
    job, arrays, target = folder / "job.json", folder / "job.bin", folder / "written.sfp"
    job.write_bytes(case.data())
    arrays.write_bytes(case.contents.arrays)
    answer = question.ask("encoder", "encode", job, arrays, target)
    if answer.get("skip"):
        return Verdict(SKIP, str(answer["skip"])), target
    if answer.get("unsupported"):
        return Verdict(UNSUPPORTED, str(answer.get("detail", ""))), target
    if not answer["ok"]:
        return Verdict(FAIL, f"the encoder failed: {answer.get('detail')}"), target
    return judge_written(case, target, claims_canonical=question.claims_canonical), target


def _round_trip(question: _Question) -> Verdict:
    """Lets the encoder write a file for a job, and the decoder read it."""
    verdict, target = _written(question)
    return _decoded(question, target) if verdict.outcome == PASS else verdict


_ASK: dict[str, Callable[[_Question], Verdict]] = {
    "decoder": _decode,
    "validator": _validate,
    "encoder": _encode,
    ROUND_TRIP: _round_trip,
}


def as_json(results: Results) -> Json:
    """Returns the results as JSON values."""
    return {
        "runner": __version__,
        "programs": results.programs,
        "seconds": round(results.seconds, 3),
        "processor_seconds": round(results.processor, 3),
        "passed": results.passed,
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
