"""The sections of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from . import load, lossless, memory, sparse, startup
from .measure import Record, Refusal, Runner, run_round_robin
from .results import Result, codec_results
from .settings import Settings
from .subject import Subject


@dataclass(frozen=True)
class Section:
    """A part of the benchmark that can be run alone.

    Attributes:
        about: one line that says what it measures.
        runners: creates the runners.
        results: computes results from records.
        most_rounds: the maximum number of rounds; None sets no limit.
    """

    about: str
    runners: Callable[[Subject, Settings], list[Runner]]
    results: Callable[[Sequence[Record]], list[Result]]
    most_rounds: int | None = None

    def rounds(self, settings: Settings) -> int:
        """Returns the number of rounds for some settings."""
        return min(settings.rounds, self.most_rounds or settings.rounds)

    def run(
        self, runners: Sequence[Runner], rounds: int, at: Callable[[str], None]
    ) -> tuple[list[Result], list[Refusal]]:
        """Runs the section; returns the results and the excluded contenders."""
        records, refusals = run_round_robin(runners, rounds, at)
        return self.results(records), refusals


SECTIONS: dict[str, Section] = {
    lossless.NAME: Section(
        "the unchanged model, in memory: size, encoding, decoding",
        lossless.runners,
        partial(codec_results, lossless.NAME),
    ),
    sparse.NAME: Section(
        "matrices pruned to 50 % and 90 %, 4 bits per level, one thread",
        sparse.runners,
        partial(codec_results, sparse.NAME),
    ),
    load.NAME: Section("loading a file in the page cache to arrays", load.runners, load.results),
    memory.NAME: Section(
        "peak memory of loading minus the arrays, in new processes",
        memory.runners,
        memory.results,
        memory.MOST_ROUNDS,
    ),
    startup.NAME: Section("processes that import, or decode a small file", startup.runners, startup.results),
}
