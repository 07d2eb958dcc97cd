"""The picture of ``sfp demo --learn``: perplexity against size, a curve for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .learned import COMPARED, Row
from .packing import EVALUATED_TOKENS

# In colours that are told apart by most eyes, with markers of their own.
_STYLES = {
    "magnitude": ("#888888", "s"),
    "wanda": ("#e09f3e", "^"),
    "sparsegpt-updated": ("#6a4c93", "D"),
    "fisher": ("#2a6f97", "v"),
    "learned": ("#d1495b", "o"),
}
_WIDTH, _HEIGHT, _DPI = 6.4, 5.2, 150  # inches a panel, dots an inch


def draw(found: Sequence[Row], dense: Mapping[str, float], path: Path) -> None:
    """Draws a panel for each kind of held-out text.

    Args:
        found: rows of all methods.
        dense: the perplexity of the model as it was, by kind of text.
        path: of the picture; its suffix says the kind.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(EVALUATED_TOKENS)
    # A figure without pyplot has no window and no global state.
    figure: Any = Figure(figsize=(_WIDTH * len(kinds), _HEIGHT), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(kinds), sharex=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        _draw_panel(axis, found, dense[kind], kind)
    axes[0].set_ylabel("perplexity a character (lower is better)")
    axes[0].legend(frameon=False)
    figure.savefig(path, format=path.suffix[1:].lower())


def _draw_panel(axis: Any, found: Sequence[Row], dense: float, kind: str) -> None:
    axis.axhline(dense, color="black", lw=1, ls="--")
    axis.annotate(
        "the model as it was", (1, dense), (-4, 4), ("axes fraction", "data"), "offset points", ha="right"
    )
    for method, words in COMPARED.items():
        rows = sorted((row for row in found if row.method == method), key=lambda row: row.asked)
        colour, marker = _STYLES[method]
        sizes = [row.result.bits_per_weight for row in rows]
        axis.plot(
            sizes, [row.result.as_json()[kind] for row in rows], marker=marker, color=colour, label=words
        )
    learned = [row for row in found if row.method == "learned"]
    for row in learned:
        value = getattr(row.result, kind)
        axis.annotate(
            f"{row.asked:.0%}", (row.result.bits_per_weight, value), (0, -14), textcoords="offset points"
        )
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(_plain_number)
    axis.yaxis.set_minor_formatter(_plain_number)
    axis.grid(True, which="both", alpha=0.25)
    axis.set_title(f"held-out {kind}")
    axis.set_xlabel("bits a weight, of the whole file")


def _plain_number(value: float, position: object) -> str:
    """Ticks without exponents."""
    return f"{value:g}"
