"""Chooses the kind, polarity and classes of a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..coding.classes import Layout, constant_layout
from ..coding.mask import BITMAP
from ..coding.planes import AnyLevels, Counts
from ..engines import Engine
from ..io.threads import Workers
from ..options import Options
from .blocks import Blocks
from .codes import Choice, LevelBlocks, SymbolCounter, SymbolCounts, choose_codes, no_levels, one_class
from .number_tables import choose_numbers

_BITMAP = Layout(*BITMAP)
_POPCOUNT = np.array([value.bit_count() for value in range(256)], np.int64)


@dataclass(frozen=True)
class MaskChoice:
    """The coding of a mask.

    Attributes:
        kind: ``runs`` or ``octets``.
        polarity: 1 codes survivors, 0 codes pruned positions; 0 for ``octets``.
        choice: the table and codes of the stream.
    """

    kind: str
    polarity: int
    choice: Choice


def choose_mask(
    blocks: Blocks,
    levels_of: Callable[[str, int, slice, Counts], tuple[AnyLevels, Counts]],
    density: float,
    options: Options,
    engine: Engine,
    workers: Workers,
) -> MaskChoice:
    """Chooses the kind, polarity and table of a mask.

    Args:
        blocks: the tensor's chunks.
        levels_of: returns the levels of a chunk's mask (`CodedBlocks.mask_levels`).
        density: survivors per position.
        options: the caller's choices.
        engine: the engine that counts.
        workers: the threads that encode and count.
    """
    polarity = options.polarity if options.polarity is not None else int(density <= 0.5)
    kind = options.mask
    if kind not in ("runs", "octets"):
        kind = "octets" if 0.08 <= density <= 0.92 else "runs"
    if options.is_plain:
        kind = "octets"
    if kind == "octets":
        polarity = 0
    segments = -(-blocks.positions // blocks.segment)
    stream = LevelBlocks(
        segments,
        blocks,
        lambda block, counts: levels_of(kind, polarity, block, counts),
        workers=workers,
    )
    if kind == "runs":
        return MaskChoice("runs", polarity, choose_numbers(stream, 1 << 16, options, engine, signed=False))
    counter = SymbolCounter(segments)
    for rows in stream.map(lambda levels, counts: engine.count_classes(levels, counts, 0, 0, 256)):
        counter.add(0, rows)
    octets = counter.counts(0, 256)
    if not octets.total.any():
        return MaskChoice("octets", 0, no_levels(stream))
    if options.is_plain:
        return MaskChoice("octets", 0, one_class(stream, _BITMAP, int(octets.total.sum())))
    layout = constant_layout(octets.total, 0)
    first, stop = layout.base, layout.base + len(layout.extra)
    used = SymbolCounts(
        octets.total[first:stop],
        octets.sample[:, first:stop],
        segments,
        None if octets.rows is None else octets.rows[:, first:stop],
    )
    choice = None
    if len(layout.extra) > 1:
        choice = choose_codes(stream, used, layout, 1, options, engine, _POPCOUNT[first:stop])
    else:
        choice = one_class(stream, layout, int(octets.total.sum()))
    if choice is None:
        choice = one_class(stream, _BITMAP, int(octets.total.sum()))
    return MaskChoice("octets", 0, choice)
