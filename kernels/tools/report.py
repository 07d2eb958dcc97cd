"""Formats the results of `kernels.tools.check` as a page, and compares them with the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Targets: minimum shares of the memory-bound rate; minimum speed relative to the best peer and to dense
# products.
FLOORS = {"BF16, preset gpu": 0.5, "BF16, 50 % pruned, 4 bits, preset gpu": 0.35}
BESIDE_PEERS, BESIDE_DENSE = 1.5, 1.5

Parts = Sequence[Mapping[str, Any]]


def tables(facts: Mapping[str, Any], parts: Parts) -> str:
    """Returns the page in Markdown."""
    lines = [
        f"# {facts['device']}",
        "",
        f"{facts['date']}, `{facts['command']}`; "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version),
        "",
    ]
    rate = _result(parts, "copy rate")
    if rate is not None:
        lines += [f"Copying within the device: {rate / 1e12:.2f} TB/s, read and written.", ""]
    for table in (_decoding(parts), _products(parts), _aims(parts), _others(parts)):
        lines += [*table, ""] if table else []
    return "\n".join(lines)


def _result(parts: Parts, name: str) -> Any:
    return next((part.get("result") for part in parts if part["name"] == name), None)


def _named(parts: Parts, kind: str) -> dict[str, Any]:
    """Returns the results of the parts whose name begins with ``kind``, by the rest of the name."""
    return {
        p["name"][len(kind) :]: p["result"] for p in parts if p["name"].startswith(kind) and "result" in p
    }


def _decoding(parts: Parts) -> list[str]:
    found, others = _named(parts, "decoding: "), _named(parts, "peer: ")
    if not found:
        return []
    lines = [
        "| matrix | kernel | bits a weight | ms | floor, ms | share | G weights/s | GB/s made |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, own in found.items():
        lines.append(
            f"| {name} | `{own['kernel']}` | {own['bits_a_weight']:.2f} | {own['ms']:.3f} | "
            f"{own['floor_ms']:.3f} | {own['share_of_floor']:.0%} | {own['weights_a_second'] / 1e9:.0f} | "
            f"{own['output_bytes_a_second'] / 1e9:.0f} |"
        )
    for name, peer in others.items():
        made = peer["made"] / peer["ms"] * 1e3
        lines.append(f"| {name} | | | {peer['ms']:.3f} | | | | {made / 1e9:.0f} |")
    return lines


def _products(parts: Parts) -> list[str]:
    found = _result(parts, "products")
    if not found:
        return []
    lines = [
        "| rows of x | bits a weight | ms | dense, ms | times as fast | share of the floor |",
        "|---|---|---|---|---|---|",
    ]
    for own in found:
        lines.append(
            f"| {own['batch']} | {own['bits_a_weight']:.2f} | {own['ms']:.4f} | {own['dense_ms']:.4f} | "
            f"{own['times_as_fast']:.2f} | {own['share_of_floor']:.0%} |"
        )
    return lines


def _aims(parts: Parts) -> list[str]:
    """Returns the table of targets, and whether each is reached."""
    decoding, others, products = (
        _named(parts, "decoding: "),
        _named(parts, "peer: "),
        _result(parts, "products"),
    )
    rows: list[tuple[str, float, float | None]] = []
    for name, least in FLOORS.items():
        rows.append((f"{name}: share of the floor", least, decoding.get(name, {}).get("share_of_floor")))
    best = max((peer["made"] / peer["ms"] * 1e3 for peer in others.values()), default=None)
    own = decoding.get("BF16, preset gpu", {}).get("output_bytes_a_second")
    ratio = own / best if own is not None and best is not None else None
    rows.append(("BF16: bytes made a second, over the best of the others", BESIDE_PEERS, ratio))
    slowest = min((each["times_as_fast"] for each in products), default=None) if products else None
    rows.append(("product, 4 bits, 50 % pruned: times as fast as the dense one", BESIDE_DENSE, slowest))
    lines = ["| | at least | found | |", "|---|---|---|---|"]
    for name, least, found in rows:
        reached = "not measured" if found is None else "reached" if found >= least else "NOT REACHED"
        lines.append(f"| {name} | {least:.2f} | {'' if found is None else f'{found:.2f}'} | {reached} |")
    return lines


def _others(parts: Parts) -> list[str]:
    """Returns lines with the results of the other parts, and all failures."""
    shown = ("decoding: ", "peer: ", "products", "copy rate")
    lines = []
    for part in parts:
        if "result" not in part:
            word = "not there" if "missing" in part else "FAILED"
            lines.append(f"* {part['name']}: {word}: {part.get('missing') or part.get('failure')}")
        elif not part["name"].startswith(shown) or part["name"] == "products as in double precision":
            lines.append(f"* {part['name']}: {_as_text(part['result'])}")
    return lines


def _as_text(result: Any) -> str:
    if isinstance(result, Mapping):
        return ", ".join(f"{key} {_as_text(value)}" for key, value in result.items())
    if isinstance(result, list):
        return "; ".join(map(_as_text, result))
    return f"{result:.4g}" if isinstance(result, float) else str(result)
