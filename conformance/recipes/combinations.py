"""All combinations of mask, quantiser, scale and importance."""

from __future__ import annotations

from itertools import product
from typing import Any

from sfp_conformance.forge import exact, f32_bytes, patterns, table

from .edits import one_file
from .gallery import spread
from .suite import Suite

ROWS, COLUMNS = 3, 22
MASKS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "octets": {"kind": "octets", **table([8])},
    "runs-of-1": {"kind": "runs", "polarity": 1, **table([3, 3], [1, 1])},
    "runs-of-0": {"kind": "runs", "polarity": 0, **table([0, 2, 4], [2, 1, 2])},
}
QUANTISERS: dict[str, dict[str, Any]] = {
    "exact": exact("F16", **table([15, 15], [1, 1])),
    "uniform": {"quantiser": "uniform", "step": f32_bytes(0.1), **table([0, 1, 2], [1, 2, 2])},
    "table": {"quantiser": "table", "count": 4, **table([1, 1, 2], [2, 2, 1], group=1)},
}
FORMS = ("none", *(f"{over}-{role}" for over, role in product(("survivors", "all", "factors"), ("m", "i"))))
ROLES = {"m": "multiplier", "i": "metadata"}


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    for mask, (name, fingerprints), form in product(MASKS, QUANTISERS.items(), FORMS):
        for scaled in (False,) if name == "exact" else (False, True):
            words = f"mask {mask}, {name}, {'a scale per row' if scaled else 'no scale'}, importance {form}"
            slug = f"REC-001-{mask}-{name}-{'scaled' if scaled else 'plain'}-{form}"
            suite.valid(slug, words, _file(mask, fingerprints, form, scaled))


def _file(mask: str, fingerprints: dict[str, Any], form: str, scaled: bool) -> bytes:
    count, vectors, more = ROWS * COLUMNS, dict[str, list[int]](), dict[str, Any]()
    bits = [int(p % 5 in (1, 2) or p % 7 == 3) for p in range(count)]
    if MASKS[mask] is not None:
        more = {"mask": bits, "mask_map": MASKS[mask]}
    kept = count if MASKS[mask] is None else sum(bits)
    tops = {"exact": 1 << 15, "uniform": 7, "table": 8}
    quantiser = fingerprints["quantiser"]
    if quantiser == "table":
        vectors["fingerprint centroids"] = patterns("F32", 0.0, 0.1, 0.25, 1.5)
    if scaled:
        more["scale"] = {"per": "row", "dtype": "BF16"}
        vectors["scale"] = patterns("BF16", 0.3, -2.0, 1.0)
    if form != "none":
        over, role = form.split("-")
        more["importance"] = {"over": over, "role": ROLES[role]}
        if over == "factors":
            more["importance"]["dtype"] = "F16"
            vectors["rows"] = patterns("F16", 1.0, 0.5, 0.1)
            vectors["columns"] = patterns("F16", *[(c % 5) / 4 for c in range(COLUMNS)])
        else:
            more["importance"] |= {"quantiser": "uniform", "step": f32_bytes(0.125), **table([4])}
            more["importance_levels"] = spread(count if over == "all" else kept, 16, 5)
    return one_file(
        fingerprints,
        spread(kept, tops[quantiser], 3),
        "F16",
        shape=[ROWS, COLUMNS],
        chunk=2,
        vectors=vectors,
        **more,
    )
