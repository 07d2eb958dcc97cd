"""The plot of ``sfp demo``: perplexity against size, with a curve for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..io.atomic import replacing
from .variants import EVALUATED_TOKENS, Row

# Colours that most people can distinguish, and different markers. A plot has only one learned curve.
_LEARNED = ("#d1495b", "o")
_STYLES = {
    "magnitude": ("#888888", "s"),
    "wanda": ("#e09f3e", "^"),
    "sparsegpt-updated": ("#6a4c93", "D"),
    "fisher": ("#2a6f97", "v"),
    "learned": _LEARNED,
    "importance": _LEARNED,
}
_WIDTH, _HEIGHT, _DPI = 6.4, 5.2, 150  # of a panel, in inches; dots per inch
_MARGINS = 0.1  # of each side, for the labels


def draw(rows: Sequence[Row], labels: Mapping[str, str], dense: Mapping[str, float], path: Path) -> None:
    """Draws the plot and writes it to a file.

    Args:
        rows, labels, dense: as in `figure_of`.
        path: path of the plot; its suffix determines the format.

    Raises:
        OSError: the file cannot be written.
    """
    figure = figure_of(rows, labels, dense)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower())


def figure_of(rows: Sequence[Row], labels: Mapping[str, str], dense: Mapping[str, float]) -> Any:
    """Returns a matplotlib figure with a panel for each kind of held-out text.

    Args:
        rows: rows of all methods.
        labels: method -> its label in the plot. The points of the last method are labelled with sparsities.
        dense: the perplexity of the dense model, by kind of text.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(EVALUATED_TOKENS)
    # A figure without pyplot has no window and no global state.
    figure: Any = Figure(figsize=(_WIDTH * len(kinds), _HEIGHT), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(kinds), sharex=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        _draw_panel(axis, rows, labels, dense[kind], kind)
    axes[0].set_ylabel("perplexity per character (lower is better)")
    return figure


def _draw_panel(axis: Any, rows: Sequence[Row], labels: Mapping[str, str], dense: float, kind: str) -> None:
    axis.set_yscale("log")
    axis.margins(_MARGINS)
    for method, name in labels.items():
        curve = sorted((row for row in rows if row.method == method), key=lambda row: row.asked)
        points = [(row.result.bits_per_weight, float(getattr(row.result, kind))) for row in curve]
        colour, marker = _STYLES[method]
        axis.plot(*zip(*points, strict=True), marker=marker, color=colour, label=name)
    axis.axhline(dense, color="black", lw=1, ls="--", label=f"the dense model: {dense:.2f}")
    # The area below this line is free for labels.
    for row, (bits, value) in zip(curve, points, strict=True):
        axis.plot([bits, bits], [value, dense], color=colour, lw=1, ls=":")
        axis.annotate(
            f"{100 * row.asked:.4g} %",
            (bits, dense),
            (0, -4),
            textcoords="offset points",
            ha="center",
            va="top",
        )
    axis.legend(frameon=False, loc="upper right")
    axis.yaxis.set_major_formatter(_plain_number)
    axis.yaxis.set_minor_formatter(_plain_number)
    axis.grid(True, which="both", alpha=0.25)
    axis.set_title(f"held-out {kind}")
    axis.set_xlabel("bits per weight, of the whole file")


def _plain_number(value: float, position: object) -> str:
    """Formats ticks without exponents."""
    return f"{value:g}"
