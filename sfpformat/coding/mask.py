"""Masks (SPEC.md chapter 10): converts mask bits to levels and back, for the segments of a chunk."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import fault
from .bits import segment_sums
from .planes import AnyLevels, Counts, Levels

Mask = NDArray[np.bool_]

KINDS = ("runs", "octets")

# `base` and `extra` of a table whose one class has all 256 octets: chunks contain the mask's bits unchanged.
BITMAP = (0, b"\x08")


def level_counts(kind: str, polarity: int, positions: Counts, survivors: Counts) -> Counts:
    """Returns the number of mask levels in each segment, from its numbers of positions and survivors."""
    if kind == "octets":
        return -(-positions // 8)
    return survivors if polarity else positions - survivors


def mask_to_runs(mask: Mask, positions: Counts, polarity: int) -> tuple[Levels, Counts]:
    """Returns the runs of whole segments, and the number of runs in each segment.

    Args:
        mask: bits of all segments, shape [sum of positions].
        positions: number of positions in each segment.
        polarity: the value of the bits at which runs end (the minority).
    """
    minority = np.flatnonzero(mask == bool(polarity))
    ends = np.cumsum(positions)
    counts = np.diff(np.searchsorted(minority, ends), prepend=0)
    before = np.empty(len(minority), np.int64)  # the previous minority position, or the segment's start - 1
    before[1:] = minority[:-1]
    starts = np.cumsum(counts) - counts
    has_some = counts > 0
    before[starts[has_some]] = (ends - positions)[has_some] - 1
    return (minority - before - 1).astype(np.uint64), counts.astype(np.int64)


def runs_to_mask(levels: Levels, counts: Counts, positions: Counts, polarity: int) -> Mask:
    """Returns the mask bits of whole segments; the inverse of `mask_to_runs`.

    Raises:
        InvalidFileError: E_RANGE by R-MSK-004.
    """
    # The bounds on a table's top (65,536) and on the positions of a chunk keep these sums below 2^41.
    reached = np.cumsum(levels.astype(np.int64) + 1)
    ends, starts = np.cumsum(counts), np.cumsum(counts) - counts
    before = np.where(starts > 0, reached[starts - 1], 0) if len(levels) else np.zeros_like(starts)
    inside = reached - np.repeat(before, counts) - 1
    has_some = counts > 0
    beyond = np.flatnonzero(inside[ends[has_some] - 1] >= positions[has_some])
    if len(beyond):
        raise fault("R-MSK-004", "a run of the mask ends outside its segment")
    mask = np.full(int(positions.sum()), not polarity)
    mask[inside + np.repeat(np.cumsum(positions) - positions, counts)] = bool(polarity)
    return mask


def mask_to_octets(mask: Mask) -> AnyLevels:
    """Returns the octets of whole segments. The sizes of all segments but the last are multiples of 8."""
    return np.packbits(mask, bitorder="little")


def octets_to_mask(levels: Levels, positions: Counts) -> Mask:
    """Returns the mask bits of whole segments; the inverse of `mask_to_octets`.

    Raises:
        InvalidFileError: E_RESERVED by R-MSK-006.
    """
    total = int(positions.sum())
    bits = np.unpackbits(levels.astype(np.uint8), bitorder="little")
    if bits[total:].any():
        raise fault("R-MSK-006", "the last octet of the mask has bits set after the last position")
    return bits[:total].view(np.bool_)


def decode_mask(
    kind: str, polarity: int, levels: Levels, counts: Counts, positions: Counts, survivors: Counts
) -> Mask:
    """Returns the mask bits of whole segments, after a check of their numbers of survivors.

    Raises:
        InvalidFileError: by R-MSK-004, R-MSK-005 or R-MSK-006.
    """
    if kind == "octets":
        mask = octets_to_mask(levels, positions)
    else:
        mask = runs_to_mask(levels, counts, positions, polarity)
    found = segment_sums(mask, positions)
    wrong = np.flatnonzero(found != survivors)
    if len(wrong):
        s = int(wrong[0])
        raise fault(
            "R-MSK-005",
            f"a segment's mask has {int(found[s])} survivors, its index entry has {int(survivors[s])}",
        )
    return mask


def survivors(mask: Mask, positions: Counts) -> Counts:
    """Returns the number of survivors in each of several whole segments."""
    return segment_sums(mask, positions)


def chosen(values: NDArray[Any], mask: Mask) -> NDArray[Any]:
    """Returns the values of the survivors, in order."""
    return np.asarray(values[mask])


def encode_mask(kind: str, polarity: int, mask: Mask, positions: Counts) -> tuple[AnyLevels, Counts]:
    """Returns the mask levels of whole segments, and the number of levels in each."""
    if kind == "octets":
        return mask_to_octets(mask), -(-positions // 8)
    return mask_to_runs(mask, positions, polarity)
