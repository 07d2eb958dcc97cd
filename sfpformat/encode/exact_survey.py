"""Surveys exact streams: how often each class of bit patterns occurs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import NamedTuple

import numpy as np

from ..coding.classes import FRACTION, Histogram, Layout, add_histograms, entropies
from ..coding.codetable import MAX_CLASSES
from ..coding.counts import Rows
from ..coding.exact_encoding import Patterns
from ..coding.planes import Counts
from ..coding.quantisers import patterns_to_levels
from ..dtypes import Dtype
from ..engines import DenseSurvey, Engine
from ..options import Options
from .codes import KEPT_BYTES, LevelBlocks, SymbolCounter, SymbolCounts, total_of

# The saving of mantissa bits is estimated on 1/_JUDGED_PART of each chunk, at least _JUDGED_LEVELS levels.
_JUDGED_PART, _JUDGED_LEVELS = 16, 4096
# Tensors with more classes than 2 to this power are surveyed chunk by chunk.
_MOST_SURVEYED_BITS = 10


class Candidate(NamedTuple):
    """A candidate for the width of the classes of an exact stream.

    Attributes:
        width: residual bits of the classes.
        bits: estimate of the bits per level.
        used: number of used classes.
        first, last: the first and the last used class.
    """

    width: int
    bits: float
    used: int
    first: int
    last: int

    @classmethod
    def of(cls, width: int, entropy: int, levels: int, used: int, first: int, last: int) -> Candidate:
        """Returns a candidate, given the entropy of all levels in bits times 2^16, and their number."""
        return cls(width, entropy / (levels << FRACTION) + width, used, first, last)

    def fits(self, bound: int) -> bool:
        """Returns whether a table can have the classes; see `Survey.fits`."""
        return _fit(self.width, self.first, self.last, bound)


class Survey(ABC):
    """Statistics of an exact stream.

    Attributes:
        width: residual bits of the counted classes.
        first, last: the first and the last used class; -1 if there are no levels.
        zeros: `planes.shared_zeros` and the number of levels, each of consecutive segments.
    """

    width: int
    first: int
    last: int
    zeros: list[tuple[Counts, Counts]]

    def fits(self, bound: int) -> bool:
        """Returns whether a table can have the classes: few enough, and none exceeds the bound."""
        return _fit(self.width, self.first, self.last, bound)

    def symbol_counts(self) -> tuple[SymbolCounts, Layout]:
        """Returns the counts of the classes from the first used to the last, and their layout."""
        classes = self.last - self.first + 1
        return self._counts(classes), Layout(self.first << self.width, bytes([self.width]) * classes)

    @abstractmethod
    def _counts(self, classes: int) -> SymbolCounts:
        """Returns the counts of ``classes`` classes from the first used one."""

    @abstractmethod
    def candidates(self) -> list[Candidate]:
        """Returns the candidate widths from the fine classes to the counted ones, the finest first."""


class ChunkedSurvey(Survey):
    """The statistics from one pass over the levels of any exact stream."""

    def __init__(
        self, blocks: LevelBlocks, bits: int, width: int, engine: Engine, fine: int | None = None
    ) -> None:
        """Makes the pass over the bit patterns.

        Args:
            blocks: the blocks of an exact stream.
            bits: bits of a level.
            width: residual bits of the classes to count in each segment.
            engine: the engine that counts.
            fine: residual bits of the fine classes to count in a part of the levels, or None.
        """
        self.width, self.first, self.last = width, -1, -1
        self._fine_width = width if fine is None else fine
        self.zeros: list[tuple[Counts, Counts]] = []
        self._counter = SymbolCounter(blocks.segments)
        self._fine = np.zeros(0, np.int64)
        work = partial(_survey_chunk, bits=bits, width=width, engine=engine, fine=fine)
        for chunk in blocks.map(work):
            self.zeros.append((chunk.zeros, chunk.counts))
            if chunk.first >= 0:
                self._see(chunk.first, chunk.last)
            if chunk.rows is not None:
                self._counter.add(max(chunk.first, 0), chunk.rows, chunk.totals)
            if chunk.fine is not None:
                self._fine = add_histograms(self._fine, chunk.fine)

    def _see(self, first: int, last: int) -> None:
        self.first = first if self.first < 0 else min(self.first, first)
        self.last = max(self.last, last)

    def _counts(self, classes: int) -> SymbolCounts:
        return self._counter.counts(self.first, classes)

    def candidates(self) -> list[Candidate]:
        if not len(self._fine):
            return []
        widths, fine = [self._fine], self._fine_width
        for _ in range(fine, self.width):
            widths.append(widths[-1][0::2] + widths[-1][1::2])
        levels, found = int(self._fine.sum()), []
        for i, bits in enumerate(entropies(widths)):
            used = np.flatnonzero(widths[i])
            found.append(Candidate.of(fine + i, bits, levels, len(used), *used[[0, -1]].tolist()))
        return found


class DenseClasses(Survey):
    """The statistics from `Engine.survey_dense`, for a tensor without a mask."""

    def __init__(self, survey: DenseSurvey, counts: Counts, width: int, fine: int) -> None:
        """Stores the statistics of a stream that has levels. Arguments: those of `Engine.survey_dense`."""
        used = np.flatnonzero(survey.totals)
        self.width, self.first, self.last = width, int(used[0]), int(used[-1])
        self.zeros = [(survey.zeros, counts)]
        self._survey, self._fine_width = survey, fine

    @property
    def lowest(self) -> int:
        """Number of levels in class 0, an upper bound on the number of zeros."""
        return int(self._survey.totals[0])

    def _counts(self, classes: int) -> SymbolCounts:
        own = slice(self.first, self.first + classes)
        return SymbolCounts.of(self._survey.totals[own], np.ascontiguousarray(self._survey.rows[:, own]))

    def candidates(self) -> list[Candidate]:
        return [
            Candidate.of(width, bits, self._survey.sampled, *statistics)
            for width, (bits, *statistics) in enumerate(self._survey.widths, self._fine_width)
        ]


def candidate_widths(dtype: Dtype, options: Options) -> tuple[int, int]:
    """Returns the least and the greatest candidate for the residual bits of a class."""
    whole = dtype.bits - dtype.exponent_bits  # the width if the class is the exponent
    if options.mantissa_bits is None:
        return max(whole - 3, 1), whole
    width = whole - min(max(options.mantissa_bits, 1 - dtype.exponent_bits), whole - 1)
    return width, width


def survey_dense(
    patterns: Patterns, counts: Counts, chunk: int, dtype: Dtype, options: Options, engine: Engine
) -> DenseClasses | None:
    """Surveys a stream whose levels are all positions of a tensor, for `choose_exact`. None if not possible.

    Args:
        patterns: the bit patterns of the tensor in its dtype, at least one.
        counts: number of positions of each segment.
        chunk: number of positions of each chunk.
        dtype, options, engine: same as for `choose_exact`.
    """
    fine, width = candidate_widths(dtype, options)
    if len(counts) << (dtype.bits - width + 2) > KEPT_BYTES or dtype.bits - width > _MOST_SURVEYED_BITS:
        return None
    found = engine.survey_dense(patterns, counts, chunk, width, fine, _JUDGED_PART, _JUDGED_LEVELS)
    return None if found is None else DenseClasses(found, counts, width, fine)


class _ChunkSurvey(NamedTuple):
    """Statistics of an exact stream's levels in a chunk.

    Attributes:
        counts: number of levels in each segment.
        zeros: see `planes.shared_zeros`.
        first, last: the first and the last used class; -1 if there are no levels.
        rows: counts of the classes from first to last in each segment; None if there are too many classes.
        totals: sum of ``rows`` over all segments.
        fine: counts of fine classes in a part of the levels, or None.
    """

    counts: Counts
    zeros: Counts
    first: int = -1
    last: int = -1
    rows: Rows | None = None
    totals: Histogram | None = None
    fine: Histogram | None = None


def _survey_chunk(
    patterns: Patterns, counts: Counts, bits: int, width: int, engine: Engine, fine: int | None
) -> _ChunkSurvey:
    """Surveys a chunk; see `ChunkedSurvey` for the arguments."""
    survey = _ChunkSurvey(counts, engine.exact_zeros(patterns, counts))
    if not len(patterns):
        return survey._replace(rows=np.zeros((len(counts), 0), np.int32))
    if fine is not None:
        part = patterns[: max(len(patterns) // _JUDGED_PART, _JUDGED_LEVELS)]
        seen = engine.count_exact(part, np.array([len(part)]), fine, 0, 1 << (bits - fine))
        survey = survey._replace(fine=seen[0].astype(np.int64))
    least, most = 0, 1 << (bits - width)
    if most > MAX_CLASSES[1]:
        levels = patterns_to_levels(patterns)
        least = int(levels.min()) >> width
        most = (int(levels.max()) >> width) - least + 1
    if most > MAX_CLASSES[1]:  # too many classes for a table
        return survey._replace(first=least, last=least + most - 1)
    rows = engine.count_exact(patterns, counts, width, least, most)
    totals = total_of(rows)
    used = np.flatnonzero(totals)
    first, stop = int(used[0]), int(used[-1]) + 1
    return survey._replace(
        first=least + first, last=least + stop - 1, rows=rows[:, first:stop], totals=totals[first:stop]
    )


def _fit(width: int, first: int, last: int, bound: int) -> bool:
    return (last + 1) << width <= bound and last - first < MAX_CLASSES[1]
