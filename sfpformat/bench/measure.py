"""Rounds of contenders that take turns, and what is made of their times."""

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

# What takes less is repeated within a round, so that the clock and the first cache misses do not weigh.
_SHORTEST_SECONDS = 0.05
_MOST_REPEATS = 50


class WrongBitsError(SfpError):
    """A contender did not give back what it was given."""


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing: the median, and the quartiles below and above it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """That of some values, at least one."""
        low, median, high = np.percentile(np.asarray(values, np.float64), (25, 50, 75))
        return cls(float(median), float(low), float(high))

    def to_json(self) -> dict[str, float]:
        """For a machine."""
        return {"median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Contender:
    """Who runs.

    Attributes:
        name: ``sfp``, or the peer's.
        threads: how many it may use.
        engine, preset: of ``sfp`` only.
        case: what it is run on or how, where a section has several.
    """

    name: str
    threads: int = 1
    engine: str | None = None
    preset: str | None = None
    case: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is this package."""
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
        """Does the work once, not timed: warms up, and compares what comes out with what went in.

        Raises:
            WrongBitsError: they differ.
        """

    @abstractmethod
    def once(self) -> dict[str, float]:
        """Does the work once: measure -> value (seconds, or bytes)."""

    def facts(self) -> dict[str, float]:
        """What does not change from round to round; known after `check`."""
        return {}


@dataclass(frozen=True)
class Record:
    """What one contender did.

    Attributes:
        samples: measure -> its values, one a round; those of one round stand at the same place for all.
    """

    contender: Contender
    facts: dict[str, float]
    samples: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """A contender that was left out, and why."""

    contender: Contender
    reason: str


def turned(items: Sequence[T], by: int) -> list[T]:
    """The items in the same order, beginning with another."""
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]


def race(
    runners: Sequence[Runner], rounds: int, at: Callable[[str], None] = lambda words: None
) -> tuple[list[Record], list[Refusal]]:
    """Lets every runner run once a round, each round beginning with the next one.

    Args:
        rounds: how many.
        at: called before each step with what is run; there are ``len(runners) * (rounds + 1)``, less the
            rounds of those that are refused.

    Returns:
        What they did, in the order of the runners, and who was left out.
    """
    records: list[Record] = []
    refusals: list[Refusal] = []
    accepted: list[tuple[Runner, Record]] = []
    for runner in runners:
        at(f"check {runner.contender.words}")
        try:
            runner.check()
        except Exception as error:  # a peer may fail in any way; the others still run
            refusals.append(Refusal(runner.contender, f"{type(error).__name__}: {error}"))
            continue
        record = Record(runner.contender, runner.facts())
        records.append(record)
        accepted.append((runner, record))
    for number in range(rounds):
        for runner, record in turned(accepted, number):
            at(f"{runner.contender.words}, round {number + 1}")
            for measure, value in runner.once().items():
                record.samples.setdefault(measure, []).append(value)
    return records, refusals


def seconds_of(prepare: Callable[[], Callable[[], object]]) -> float:
    """How long some work takes, on average where it is so short that it is repeated.

    Results are let go within the time: who is quick in making them must also give the memory back.

    Args:
        prepare: called anew before each repetition, not timed; gives the work.
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
    """The disk speed, in bytes a second, under which the packed file is there sooner than the raw one.

    Both times are with the file in the page cache: reading from a disk of speed d adds bytes / d. None where
    the packed file is as quick without that, or not smaller.
    """
    if packed_seconds <= raw_seconds or packed_bytes >= raw_bytes:
        return None
    return (raw_bytes - packed_bytes) / (packed_seconds - raw_seconds)
