"""The plot of the section ``lossless``: size against decoding speed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..io.atomic import replacing
from .labels import Box, place
from .results import Result

SUFFIXES = (".png", ".svg")
HOW_TO_INSTALL = "matplotlib is not installed; pip install 'sfpformat[plot]'"

# This package by engine, in colours that most people can distinguish; peers in grey, with different markers.
_OURS = {"numba": "#d1495b", "python": "#2a6f97"}
_OTHER_OURS, _PEERS = "#6a4c93", "#555555"
_MARKERS = ("s", "D", "^", "v", "P")
_LABEL_POINTS = 9.0
# Points with a smaller distance, in gaps between point and label, get lines to their labels.
_CROWDED = 4.0
_WIDTH_A_PANEL, _HEIGHT, _DPI = 7.2, 6.2, 150


def why_not() -> str | None:
    """Returns why no plot can be drawn here, or None."""
    return None if importlib.util.find_spec("matplotlib") else HOW_TO_INSTALL


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """Draws the results of the section ``lossless``, a panel for each number of threads.

    Args:
        results: results; other sections are ignored.
        title: title of the plot.
        path: path of the plot; its suffix determines the format.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels([result for result in results if result.section == "lossless"])
    # A figure without pyplot has no window and no global state.
    figure: Any = Figure(figsize=(_WIDTH_A_PANEL * len(panels), _HEIGHT), dpi=_DPI, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (threads, rows) in zip(axes, panels.items(), strict=True):
        _draw_points(axis, rows)
        axis.set_title(f"{threads} thread{'s' if threads > 1 else ''}", fontsize=11)
        axis.set_xlabel("size / raw size  (← smaller is better)")
    axes[0].set_ylabel("decoding, MB of raw bytes per second  (faster is better →)")
    _widen(axes[0])
    canvas.draw()
    for axis, rows in zip(axes, panels.values(), strict=True):
        _draw_labels(axis, rows, canvas.get_renderer())
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower())


def _panels(results: Sequence[Result]) -> dict[int, list[Result]]:
    """Groups results by number of threads; peers that only support one thread are in all groups."""
    panels: dict[int, list[Result]] = {}
    for threads in sorted({result.contender.threads for result in results if result.contender.is_sfp}):
        several = {result.contender.name for result in results if result.contender.threads == threads}
        panels[threads] = [
            result
            for result in results
            if result.contender.threads == threads
            or (result.contender.threads == 1 and result.contender.name not in several)
        ]
    return panels


def _place_of(result: Result) -> tuple[float, float]:
    return result.number("size_ratio") or 0.0, result.number("decode_mb_s") or 0.0


def _draw_points(axis: Any, rows: Sequence[Result]) -> None:
    peers = [row.contender.name for row in rows if not row.contender.is_sfp]
    for row in rows:
        x, y = _place_of(row)
        spread = row.spread("decode_mb_s")
        errors = [[y - spread.low], [spread.high - y]] if spread else None
        engine = row.contender.engine
        colour = _colour_of(row)
        marker = "o" if engine is not None else _MARKERS[peers.index(row.contender.name) % len(_MARKERS)]
        axis.errorbar(x, y, yerr=errors, fmt=marker, color=colour, markersize=8, elinewidth=1, alpha=0.9)
    axis.set_yscale("log")
    axis.grid(True, which="major", alpha=0.35)
    axis.grid(True, which="minor", alpha=0.12)
    axis.yaxis.set_major_formatter(_plain_number)
    axis.yaxis.set_minor_formatter(_plain_number)
    axis.tick_params(axis="y", which="both", labelsize=8)


def _plain_number(value: float, position: object) -> str:
    """Formats ticks at 1, 2 and 5 times a power of ten without exponents; others are empty."""
    return f"{value:g}" if f"{value:e}"[0] in "125" and f"{value:e}"[2:8] == "000000" else ""


def _widen(axis: Any) -> None:
    """Widens the axis limits to make room for labels."""
    left, right = axis.get_xlim()
    low, high = axis.get_ylim()
    margin = max(right - left, 0.01) * 0.22
    axis.set_xlim(left - margin, right + margin)
    factor = (high / low) ** 0.12 * 1.1
    axis.set_ylim(low / factor, high * factor)


def _draw_labels(axis: Any, rows: Sequence[Result], renderer: Any) -> None:
    """Writes each name next to its point, with a line to it if the label could be ambiguous."""
    pixels = [tuple(map(float, axis.transData.transform(_place_of(row)))) for row in rows]
    texts = [
        axis.text(0, 0, _label_of(row), fontsize=_LABEL_POINTS, color=_colour_of(row), linespacing=1.0)
        for row in rows
    ]
    extents = [text.get_window_extent(renderer) for text in texts]
    sizes = [(extent.width, extent.height) for extent in extents]
    bounds = Box(*axis.get_window_extent(renderer).extents).grown(-4)
    gap = _LABEL_POINTS * _DPI / 72 * 0.75
    boxes = place([(x, y) for x, y in pixels], sizes, bounds, gap)
    to_data = axis.transData.inverted()
    for row, text, box in zip(rows, texts, boxes, strict=True):
        text.set_position(to_data.transform((box.left, box.low)))
        text.set_verticalalignment("bottom")
        point = tuple(map(float, axis.transData.transform(_place_of(row))))
        others = [other for other in pixels if other != point]
        crowded = any(math.dist(point, other) < _CROWDED * gap for other in others)
        if crowded or box.distance((point[0], point[1])) > 1.5 * gap:
            start, end = _place_of(row), to_data.transform(box.nearest((point[0], point[1])))
            axis.plot([start[0], end[0]], [start[1], end[1]], color=_colour_of(row), lw=0.8, alpha=0.8)


def _colour_of(row: Result) -> str:
    engine = row.contender.engine
    return _PEERS if engine is None else _OURS.get(engine, _OTHER_OURS)


def _label_of(row: Result) -> str:
    size, speed = _place_of(row)
    rounded = f"{speed:.0f}" if speed >= 10 else f"{speed:.1f}"
    return f"{row.contender.words}\n{size:.3f}, {rounded} MB/s"
