"""Results as text tables: for each section, the columns with header and cell format."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .measure import Spread
from .results import Result

Cell = Callable[[Result], str]
_NOTHING = "–"


def table(section: str, results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the table of a section."""
    columns: dict[str, Cell] = {"contender": lambda result: result.contender.words}
    if any(result.contender.case for result in results):
        columns["case"] = lambda result: result.contender.case or ""
    columns["threads"] = lambda result: str(result.contender.threads)
    columns |= _CELLS[section]
    # No column for ZipNN if it is the best in all rows or did not run.
    best = {result.values.get("best_decode_peer") for result in results}
    if best == {"zipnn"} or not any("decode_vs_zipnn" in result.values for result in results):
        columns.pop("decode: zipnn", None)
    return list(columns), [[cell(result) for cell in columns.values()] for result in results]


def _measured(field: str, scale: float = 1.0) -> Cell:
    return lambda result: _spread_words(result.spread(field), scale)


def _plain(field: str, digits: int, unit: str = "", scale: float = 1.0) -> Cell:
    def cell(result: Result) -> str:
        value = result.number(field)
        return _NOTHING if value is None else f"{value * scale:.{digits}f}{unit}"

    return cell


def _against(work: str) -> Cell:
    """Returns a cell with the ratio to the best peer, and its name."""

    def cell(result: Result) -> str:
        value = result.number(f"{work}_vs_best")
        return _NOTHING if value is None else f"{value:.2f} {result.values[f'best_{work}_peer']}"

    return cell


def _spread_words(spread: Spread | None, scale: float) -> str:
    """Formats a spread as ``1374 (1290–1401)``, with about three significant digits."""
    if spread is None:
        return _NOTHING
    size = abs(spread.median * scale)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    median, low, high = (f"{v * scale:.{digits}f}" for v in (spread.median, spread.low, spread.high))
    return f"{median} ({low}–{high})"


_RATIOS: dict[str, Cell] = {
    "size: best peer": _against("size"),
    "encode: best peer": _against("encode"),
    "decode: best peer": _against("decode"),
    "decode: zipnn": _plain("decode_vs_zipnn", 2),
}
_CELLS: dict[str, dict[str, Cell]] = {
    "lossless": {
        "size": _plain("size_ratio", 4),
        "encode MB/s": _measured("encode_mb_s"),
        "decode MB/s": _measured("decode_mb_s"),
        "M weights/s": _plain("decode_mweights_s", 1),
        **_RATIOS,
    },
    "sparse": {
        "bits/weight": _plain("bits_per_weight", 3),
        "error dB": _plain("error_db", 2),
        "encode M weights/s": _measured("encode_mweights_s"),
        "decode M weights/s": _measured("decode_mweights_s"),
        **_RATIOS,
    },
    "load": {
        "size": _plain("size_ratio", 4),
        "ms": _measured("load_s", 1e3),
        "MB/s": _measured("load_mb_s"),
        "× safetensors": _plain("load_vs_safetensors", 2),
        "faster on disks below": _plain("break_even_disk_mb_s", 0, " MB/s"),
    },
    "memory": {
        "arrays MB": _plain("output_bytes", 1, scale=1e-6),
        "peak beyond arrays MB": _measured("peak_extra_bytes", 1e-6),
        "measured by": lambda result: str(result.values.get("peak_method", _NOTHING)),
    },
    "startup": {
        "ms": _measured("process_s", 1e3),
        "over numpy ms": _measured("over_numpy_s", 1e3),
    },
}
