"""Decodes selected positions of a tensor: a contiguous range, or scattered positions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..container.entry import TensorEntry
from .execution import Decoding, Into
from .jobs import Job, fill_gaps, jobs_of_range, joined
from .selection import Selection


def decode_selection(
    decoding: Decoding, entry: TensorEntry, selection: Selection, dtype: np.dtype[Any], into: Into
) -> NDArray[Any]:
    """Implements `SfpFile.decode` for a tensor whose size the caller has checked.

    Args:
        decoding: decodes the chunks of the file.
        entry, selection, dtype, into: same as for `SfpFile.decode`.

    Raises:
        InvalidFileError: the file is damaged.
    """
    out = np.empty(selection.size, dtype)
    if selection.size and selection.contiguous:
        low = int(selection.starts[0]) + selection.run.start
        _decode_range(decoding, entry, out, low, into)
    elif selection.size:
        _decode_scattered(decoding, entry, selection, out, into)
    return out.reshape(selection.shape)


def _decode_range(decoding: Decoding, entry: TensorEntry, out: NDArray[Any], low: int, into: Into) -> None:
    """Decodes a contiguous range of positions, from ``low``, into ``out``.

    A segment that is only partly in the range is decoded into a buffer, and its part is copied.
    """
    high, segment = low + len(out), entry.segment
    whole_low, whole_high = -(-low // segment) * segment, high // segment * segment
    if high == entry.positions:
        whole_high = high
    jobs: list[Job] = []
    ends: list[tuple[int, NDArray[Any]]] = []
    for start in sorted({low // segment, (high - 1) // segment}):
        first, stop = start * segment, min((start + 1) * segment, entry.positions)
        if first < low or stop > high:
            ends.append((first, np.empty(stop - first, out.dtype)))
            jobs += jobs_of_range(entry, ends[-1][1], first, stop)
    if whole_low < whole_high:
        jobs += jobs_of_range(entry, out[whole_low - low : whole_high - low], whole_low, whole_high)
    decoding.do(joined(jobs), into)
    for first, values in ends:
        clipped = values[max(low - first, 0) : high - first]
        out[max(first - low, 0) : max(first - low, 0) + len(clipped)] = clipped


def _decode_scattered(
    decoding: Decoding, entry: TensorEntry, selection: Selection, out: NDArray[Any], into: Into
) -> None:
    """Decodes all needed segments into a buffer, then gathers the selected positions from it."""
    segments = fill_gaps(selection.segments(entry.segment))
    place = np.zeros(int(segments[-1]) + 1, np.int64)
    place[segments] = np.arange(len(segments)) * entry.segment
    buffer = np.zeros(len(segments) * entry.segment, out.dtype)
    breaks = np.flatnonzero(np.diff(segments) > 1)
    jobs: list[Job] = []
    for first, last in zip(
        segments[np.r_[0, breaks + 1]].tolist(),
        segments[np.r_[breaks, len(segments) - 1]].tolist(),
        strict=True,
    ):
        low, high = first * entry.segment, min((last + 1) * entry.segment, entry.positions)
        at = int(place[first])
        jobs += jobs_of_range(entry, buffer[at : at + high - low], low, high)
    decoding.do(joined(jobs), into)
    for at, positions in selection.blocks():
        segment, inside = np.divmod(positions, entry.segment)
        out[at : at + len(positions)] = buffer[place[segment] + inside]
