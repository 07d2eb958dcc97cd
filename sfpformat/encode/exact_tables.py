"""Chooses the classes of exact streams from one pass over their levels, which are bit patterns."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from ..coding.bits import MAX_FIELD_BITS
from ..coding.classes import FRACTION, Histogram, Layout, add_histograms, entropies
from ..coding.codetable import MAX_CLASSES, MAX_SYMBOLS
from ..coding.counts import Rows
from ..coding.exact_encoding import Patterns
from ..coding.magnitudes import magnitude_bits
from ..coding.planes import Counts, trims_of
from ..coding.quantisers import patterns_to_levels
from ..dtypes import Dtype
from ..engines import DenseSurvey, Engine
from ..errors import OptionError
from ..options import Options
from .codes import (
    KEPT_BYTES,
    Choice,
    LevelBlocks,
    SymbolCounter,
    SymbolCounts,
    choose_codes,
    no_levels,
    one_class,
    total_of,
)
from .windows import choose_windows
from .zeros import cheaper_with_zeros

# Each mantissa bit in the class of an exact stream must save this part of the size, because residuals of
# whole bytes decode faster.
_MANTISSA_GAIN = 0.0075
# The saving is estimated on 1/_JUDGED_PART of each chunk, at least _JUDGED_LEVELS levels.
_JUDGED_PART, _JUDGED_LEVELS = 16, 4096
# An exact stream has at most one code per _LEVELS_A_CODE levels, and at most _EXACT_CODES codes. More codes
# save 0.02 %, and building a reader's table of one code takes as long as decoding 20,000 levels.
_LEVELS_A_CODE, _EXACT_CODES = 1 << 17, 4
# Tensors with more classes than 2 to this power are surveyed chunk by chunk.
_MOST_SURVEYED_BITS = 10
# Number of patterns per step of the lower bound on bits.
_BOUND_BLOCK = 1 << 16
# Approximate cost of trims in the segment index, in bits per segment.
_TRIM_BITS = 5


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
    """Surveys a chunk; see `_ExactSurvey` for the arguments."""
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


class _ExactSurvey:
    """Statistics of an exact stream from one pass over its levels.

    Attributes:
        width: residual bits of the counted classes.
        first, last: the first and the last used class; -1 if there are no levels.
        zeros: for each chunk `planes.shared_zeros`, and the number of levels in each segment.
    """

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

    def fits(self, bound: int) -> bool:
        """Returns whether a table can have the classes: few enough, and none exceeds the bound."""
        return (self.last + 1) << self.width <= bound and self.last - self.first < MAX_CLASSES[1]

    def symbol_counts(self) -> tuple[SymbolCounts, Layout]:
        """Returns the counts of the classes from the first used to the last, and their layout."""
        classes = self.last - self.first + 1
        layout = Layout(self.first << self.width, bytes([self.width]) * classes)
        return self._counter.counts(self.first, classes), layout

    def candidates(self) -> list[_Candidate]:
        """Returns the candidate widths from the fine classes to the counted ones, the finest first."""
        if not len(self._fine):
            return []
        widths, fine = [self._fine], self._fine_width
        for _ in range(fine, self.width):
            widths.append(widths[-1][0::2] + widths[-1][1::2])
        levels, found = int(self._fine.sum()), []
        for i, bits in enumerate(entropies(widths)):
            used = np.flatnonzero(widths[i])
            found.append(
                _Candidate(fine + i, _bits_each(bits, levels, fine + i), len(used), *used[[0, -1]].tolist())
            )
        return found


class _Survey(Protocol):
    """What `choose_exact` needs of a survey; see `_ExactSurvey`."""

    width: int
    first: int
    last: int
    zeros: list[tuple[Counts, Counts]]

    def fits(self, bound: int) -> bool: ...

    def symbol_counts(self) -> tuple[SymbolCounts, Layout]: ...

    def candidates(self) -> list[_Candidate]: ...


class DenseClasses:
    """The same statistics from `Engine.survey_dense`, for a tensor without a mask."""

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

    def fits(self, bound: int) -> bool:
        """See `_ExactSurvey.fits`."""
        return (self.last + 1) << self.width <= bound and self.last - self.first < MAX_CLASSES[1]

    def symbol_counts(self) -> tuple[SymbolCounts, Layout]:
        """See `_ExactSurvey.symbol_counts`."""
        own = slice(self.first, self.last + 1)
        rows = np.ascontiguousarray(self._survey.rows[:, own])
        layout = Layout(self.first << self.width, bytes([self.width]) * rows.shape[1])
        return SymbolCounts.of(self._survey.totals[own], rows), layout

    def candidates(self) -> list[_Candidate]:
        """See `_ExactSurvey.candidates`."""
        return [
            _Candidate(width, _bits_each(bits, self._survey.sampled, width), *statistics)
            for width, (bits, *statistics) in enumerate(self._survey.widths, self._fine_width)
        ]


class _Candidate(NamedTuple):
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


def _bits_each(entropy: int, levels: int, width: int) -> float:
    """Returns the bits per level: the entropy of all levels, in bits times 2^16, and residuals."""
    return entropy / (levels << FRACTION) + width


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
    fine, width = _widths(dtype, options)
    if len(counts) << (dtype.bits - width + 2) > KEPT_BYTES or dtype.bits - width > _MOST_SURVEYED_BITS:
        return None
    found = engine.survey_dense(patterns, counts, chunk, width, fine, _JUDGED_PART, _JUDGED_LEVELS)
    return None if found is None else DenseClasses(found, counts, width, fine)


def choose_exact(
    blocks: LevelBlocks,
    dtype: Dtype,
    bound: int,
    options: Options,
    engine: Engine,
    dense: DenseClasses | None = None,
) -> Choice:
    """Chooses the table of an exact stream: the width of its classes, and with it their mantissa bits.

    No class may exceed the stream's ``bound``, even in unused levels (R-TAB-008).

    Args:
        blocks: the stream.
        dtype: the dtype of its patterns.
        bound: no class of the table may reach this level.
        options: the caller's choices.
        engine: the engine that counts.
        dense: the result of `survey_dense`, which saves the first pass over the levels; or None.

    Raises:
        OptionError: no layout is possible with the code lengths of the options.
    """
    fine, width = _widths(dtype, options)
    survey: _Survey = dense or _ExactSurvey(blocks, dtype.bits, width, engine, fine if fine < width else None)
    if survey.last < 0:
        return no_levels(blocks)
    best = _judged_width(survey, width, bound, options)
    widest = min(dtype.bits, MAX_FIELD_BITS)
    for candidate in (*range(best, widest + 1), *range(best - 1, 0, -1)):
        if candidate != survey.width:
            survey = _ExactSurvey(blocks, dtype.bits, candidate, engine)
        if not survey.fits(bound):
            continue
        counts, layout = survey.symbol_counts()
        choice: Choice | None = None
        if len(layout.extra) == 1:
            choice = one_class(blocks, layout, int(counts.total.sum()))
        elif options.window is not None:
            choice = choose_windows(blocks, counts, layout, options.window, engine)
        if choice is None:
            choice = choose_codes(blocks, counts, layout, 1, options, engine, most=_exact_codes(counts))
        if choice is not None:
            saved = -_TRIM_BITS * blocks.segments
            if options.trim:
                saved += sum(int(trims_of(zeros, candidate) @ counts) for zeros, counts in survey.zeros)
            if saved > 0:
                choice = replace(choice, bits=choice.bits - saved, trim=True)
            if survey.first > 0 or choice.table.window is not None:
                return choice  # the class that contains the zeros is not used, or only escaped
            widths, first = range(candidate, min(fine, candidate) - 1, -1), int(counts.total[0])
            return cheaper_with_zeros(
                choice, blocks, widths, bound, options, engine, _exact_codes(counts), first
            )
    raise OptionError(f"{dtype.name} needs codes of more than {options.code_limit} bits; increase code_limit")


def _exact_codes(counts: SymbolCounts) -> int:
    """Returns the greatest number of codes of an exact stream."""
    return max(min(_EXACT_CODES, int(counts.total.sum()) // _LEVELS_A_CODE), 1)


def _widths(dtype: Dtype, options: Options) -> tuple[int, int]:
    """Returns the least and the greatest candidate for the residual bits of a class."""
    whole = dtype.bits - dtype.exponent_bits  # the width if the class is the exponent
    if options.mantissa_bits is None:
        return max(whole - 3, 1), whole
    width = whole - min(max(options.mantissa_bits, 1 - dtype.exponent_bits), whole - 1)
    return width, width


def takes_more_bits(patterns: Patterns, dtype: Dtype, bits: int, options: Options, engine: Engine) -> bool:
    """Returns whether `choose_exact` certainly takes more than ``bits`` bits for all patterns except +0.

    A lower bound: the residuals of non-zero weights have at least the least candidate width, less trims.
    Residuals of -0 may have no bits.
    """
    if options.code_limit < 8:  # code lengths may then not suffice for classes of that width
        return False
    fine, _ = _widths(dtype, options)
    least, low = 0, magnitude_bits(patterns.dtype)
    for start in range(0, len(patterns), _BOUND_BLOCK):
        block = patterns[start : start + _BOUND_BLOCK]
        # Every segment consists of parts of 32 positions, and their trims are at least as great.
        counts = np.full(-(-len(block) // 32), 32, np.int64)
        counts[-1] -= 32 * len(counts) - len(block)
        trims = trims_of(engine.exact_zeros(block, counts), fine) if options.trim else 0
        least += int((engine.survivors(block & low != 0, counts) * (fine - trims)).sum())
        if least > bits:
            return True
    return False


def _judged_width(survey: _Survey, width: int, bound: int, options: Options) -> int:
    """Returns the best of the survey's candidates for the width; ``width`` if there are none.

    A narrower class is better only if each additional mantissa bit saves `_MANTISSA_GAIN` of the size.
    """
    best: _Candidate | None = None
    for candidate in reversed(survey.candidates()):
        few = candidate.used <= min(MAX_SYMBOLS, 1 << options.code_limit)
        fits = (candidate.last + 1) << candidate.width <= bound
        if not (few and fits and candidate.last - candidate.first < MAX_CLASSES[1]):
            continue
        if best is None or candidate.bits * (1 + _MANTISSA_GAIN * (best.width - candidate.width)) < best.bits:
            best = candidate
    return width if best is None else best.width
