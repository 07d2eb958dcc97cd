"""Chooses the classes and codes of exact streams, whose levels are bit patterns, from a survey of them."""

from __future__ import annotations

from dataclasses import replace

from ..coding.bits import MAX_FIELD_BITS
from ..coding.codetable import MAX_SYMBOLS
from ..coding.exact_encoding import Patterns
from ..coding.magnitudes import magnitude_bits
from ..coding.planes import trims_of
from ..dtypes import Dtype
from ..engines import Engine
from ..errors import OptionError
from ..options import Options
from .blocks import segment_counts
from .codes import (
    Choice,
    LevelBlocks,
    SymbolCounts,
    choose_codes,
    no_levels,
    one_class,
)
from .exact_survey import Candidate, ChunkedSurvey, DenseClasses, Survey, candidate_widths
from .windows import choose_windows
from .zeros import cheaper_with_zeros

# Each mantissa bit in the class of an exact stream must save this part of the size, because residuals of
# whole bytes decode faster.
_MANTISSA_GAIN = 0.0075
# An exact stream has at most one code per _LEVELS_A_CODE levels, and at most _EXACT_CODES codes. More codes
# save 0.02 %, and building a reader's table of one code takes as long as decoding 20,000 levels.
_LEVELS_A_CODE, _EXACT_CODES = 1 << 17, 4
# Number of patterns per step of the lower bound on bits.
_BOUND_BLOCK = 1 << 16
# Approximate cost of trims in the segment index, in bits per segment.
_TRIM_BITS = 5


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
    fine, width = candidate_widths(dtype, options)
    survey: Survey = dense or ChunkedSurvey(blocks, dtype.bits, width, engine, fine if fine < width else None)
    if survey.last < 0:
        return no_levels(blocks)
    best = _judged_width(survey, width, bound, options)
    widest = min(dtype.bits, MAX_FIELD_BITS)
    for candidate in (*range(best, widest + 1), *range(best - 1, 0, -1)):
        if candidate != survey.width:
            survey = ChunkedSurvey(blocks, dtype.bits, candidate, engine)
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


def takes_more_bits(patterns: Patterns, dtype: Dtype, bits: int, options: Options, engine: Engine) -> bool:
    """Returns whether `choose_exact` certainly takes more than ``bits`` bits for all patterns except +0.

    A lower bound: the residuals of non-zero weights have at least the least candidate width, less trims.
    Residuals of -0 may have no bits.
    """
    if options.code_limit < 8:  # code lengths may then not suffice for classes of that width
        return False
    fine, _ = candidate_widths(dtype, options)
    least, low = 0, magnitude_bits(patterns.dtype)
    for start in range(0, len(patterns), _BOUND_BLOCK):
        block = patterns[start : start + _BOUND_BLOCK]
        # Every segment consists of parts of 32 positions, and their trims are at least as great.
        counts = segment_counts(len(block), 32)
        trims = trims_of(engine.exact_zeros(block, counts), fine) if options.trim else 0
        least += int((engine.survivors(block & low != 0, counts) * (fine - trims)).sum())
        if least > bits:
            return True
    return False


def _judged_width(survey: Survey, width: int, bound: int, options: Options) -> int:
    """Returns the best of the survey's candidates for the width; ``width`` if there are none.

    A narrower class is better only if each additional mantissa bit saves `_MANTISSA_GAIN` of the size.
    """
    best: Candidate | None = None
    for candidate in reversed(survey.candidates()):
        if candidate.used > min(MAX_SYMBOLS, 1 << options.code_limit) or not candidate.fits(bound):
            continue
        if best is None or candidate.bits * (1 + _MANTISSA_GAIN * (best.width - candidate.width)) < best.bits:
            best = candidate
    return width if best is None else best.width
