"""Round-robin measurements of contenders, and their statistics."""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from ..errors import SfpError

T = TypeVar("T")

# Shorter work is repeated within a round, so that clock resolution and cache misses have little effect.
_SHORTEST_SECONDS = 0.05
_MOST_REPEATS = 50


class WrongBitsError(SfpError):
    """A contender did not reproduce its input."""


@dataclass(frozen=True)
class Spread:
    """Median, lower quartile and upper quartile of several measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Computes the spread of at least one value."""
        low, median, high = np.percentile(np.asarray(values, np.float64), (25, 50, 75))
        return cls(float(median), float(low), float(high))

    def to_json(self) -> dict[str, float]:
        """Returns the fields as a JSON object."""
        return {"median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Contender:
    """A configuration that is measured.

    Attributes:
        name: ``sfp``, or the peer's name.
        threads: the maximum number of threads.
        engine, preset: engine and preset of ``sfp``; None for peers.
        case: the data or method, if a section has several.
    """

    name: str
    threads: int = 1
    engine: str | None = None
    preset: str | None = None
    case: str | None = None

    @property
    def is_sfp(self) -> bool:
        """Whether the contender is this package, with an engine."""
        return self.engine is not None

    @property
    def words(self) -> str:
        """Name, engine and preset."""
        return " ".join(word for word in (self.name, self.engine, self.preset) if word)


class Runner(ABC):
    """One contender's way to do the work of a section."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender

    @abstractmethod
    def check(self) -> None:
        """Does the work once without timing: warms up, and compares output with input.

        Raises:
            WrongBitsError: output and input differ.
        """

    @abstractmethod
    def once(self) -> dict[str, float]:
        """Does the work once and returns its measurements: measure -> value (seconds or bytes)."""

    def facts(self) -> dict[str, float]:
        """Returns facts that are the same in all rounds; available after `check`."""
        return {}


@dataclass(frozen=True)
class Record:
    """The measurements of one contender.

    Attributes:
        contender: the contender.
        facts: the facts of its runner.
        samples: measure -> values, one for each round, in the order of the rounds.
    """

    contender: Contender
    facts: dict[str, float]
    samples: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """An excluded contender and the reason."""

    contender: Contender
    reason: str


def rotated(items: Sequence[T], by: int) -> list[T]:
    """Returns the items rotated to the left by ``by`` places."""
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]


def run_round_robin(
    runners: Sequence[Runner], rounds: int, at: Callable[[str], None] = lambda words: None
) -> tuple[list[Record], list[Refusal]]:
    """Runs all runners round-robin; each round starts with the next runner.

    Args:
        runners: the runners; each is checked first.
        rounds: number of rounds.
        at: called before each step with its description. There are ``len(runners) * (rounds + 1)`` steps,
            minus the rounds of excluded runners.

    Returns:
        The records, in the order of the runners, and the excluded contenders.
    """
    records: list[Record] = []
    refusals: list[Refusal] = []
    accepted: list[tuple[Runner, Record]] = []
    for runner in runners:
        at(f"check {runner.contender.words}")
        try:
            runner.check()
        except Exception as error:  # a peer can raise anything; the others still run
            refusals.append(Refusal(runner.contender, f"{type(error).__name__}: {error}"))
            continue
        record = Record(runner.contender, runner.facts())
        records.append(record)
        accepted.append((runner, record))
    for number in range(rounds):
        for runner, record in rotated(accepted, number):
            at(f"{runner.contender.words}, round {number + 1}")
            for measure, value in runner.once().items():
                record.samples.setdefault(measure, []).append(value)
    return records, refusals


def seconds_of(prepare: Callable[[], Callable[[], object]]) -> float:
    """Returns the seconds that work takes; the mean if it is short and repeated.

    The time includes the release of the result, because freeing memory is part of the cost.

    Args:
        prepare: called before each repetition, not timed; returns the work.
    """
    collecting = gc.isenabled()
    gc.disable()
    passed, repeats = 0.0, 0
    try:
        while passed < _SHORTEST_SECONDS and repeats < _MOST_REPEATS:
            work = prepare()
            start = time.perf_counter()
            work()
            passed += time.perf_counter() - start
            repeats += 1
    finally:
        if collecting:
            gc.enable()
    return passed / repeats


def break_even(
    raw_bytes: float, raw_seconds: float, packed_bytes: float, packed_seconds: float
) -> float | None:
    """Returns the disk speed, in bytes per second, below which the packed file loads faster than the raw one.

    Both times are measured with the file in the page cache; reading from a disk of speed d adds bytes / d.
    None if the packed file is faster at any disk speed, or not smaller.
    """
    if packed_seconds <= raw_seconds or packed_bytes >= raw_bytes:
        return None
    return (raw_bytes - packed_bytes) / (packed_seconds - raw_seconds)
