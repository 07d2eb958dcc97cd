"""The valid files from which most other cases are derived: each kind of tensor alone, and all in one file."""

from __future__ import annotations

import re
from typing import Any

from sfp_conformance.forge import (
    Forge,
    Part,
    exact,
    f32_bytes,
    hand_file,
    hand_part,
    patterns,
    raw_part,
    table,
    table_for,
)
from sfp_conformance.slow_reader import BYTES

from conformance.clauses import SPEC

from .samples import coded, plain
from .suite import Suite

RUNS = table([0, 1, 2, 3, 4], [2, 2, 2, 3, 3])  # levels 0 to 30
MASK = [int(p % 5 in (1, 2) or p % 7 == 3) for p in range(96)]
SURVIVORS = sum(MASK)


def spread(count: int, top: int, seed: int = 1) -> list[int]:
    """Returns deterministic numbers below ``top``; small ones are more frequent."""
    out, state = [], seed
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        first, second = state >> 33, state >> 13 & 0xFFFFF
        out.append(first % top * (second % 1000) // 1000)
    return out


def fingerprints(dtype: str) -> list[int]:
    """Returns levels of an exact stream: small numbers of both signs."""
    numbers = [(3 * m % 17 - 8) / 8 or 1.0 for m in range(SURVIVORS)]
    bits = 8 * BYTES[dtype]
    return [p << 1 & ((1 << bits) - 1) | p >> (bits - 1) for p in patterns(dtype, *numbers)]


def _runs() -> Part:
    levels = fingerprints("F32")
    entry = {"name": "runs", "dtype": "F32", "shape": [4, 24], "chunk": 2}
    entry["mask"] = {"kind": "runs", "polarity": 1, **RUNS}
    return hand_part(
        entry | {"fingerprints": exact("F32", **table_for(levels))}, {"fingerprints": levels}, mask=MASK
    )


def _octets() -> Part:
    levels = fingerprints("BF16")
    octets = table([3, 4, 5, 6, 7, 3], [3, 2, 2, 3, 3, 3])
    entry = {"name": "octets", "dtype": "BF16", "shape": [4, 24], "chunk": 2}
    entry["mask"] = {"kind": "octets", **octets}
    return hand_part(
        entry | {"fingerprints": exact("BF16", **table_for(levels))}, {"fingerprints": levels}, mask=MASK
    )


def _uniform() -> Part:
    pairs = [2, 3, 4, 4, 3, 4, 4, 5, 4, 4, 6, 7, 4, 8, 9, 9]
    entry: dict[str, Any] = {"name": "uniform", "dtype": "F32", "shape": [4, 24], "chunk": 2}
    entry["mask"] = {"kind": "runs", "polarity": 0, **RUNS}
    own = table([0, 1, 2, 3], pairs, base=2, group=2)
    entry["fingerprints"] = {"quantiser": "uniform", "step": f32_bytes(0.25), **own}
    entry["scale"] = {"per": "row", "dtype": "F16"}
    entry["importance"] = {"over": "survivors", "role": "multiplier", "quantiser": "uniform"}
    entry["importance"] |= {"step": f32_bytes(0.125), **table([2, 3, 4], [1, 2, 2])}
    levels = {
        "fingerprints": [2 + v for v in spread(SURVIVORS, 15)],
        "importance": spread(SURVIVORS, 28, 5),
    }
    factors = {"scale": patterns("F16", 1.0, -0.5, 0.1, 3.0)}
    return hand_part(entry, levels, mask=MASK, vectors=factors)


def _table() -> Part:
    entry: dict[str, Any] = {"name": "table", "dtype": "F16", "shape": [4, 24], "chunk": 2}
    entry["mask"] = {"kind": "octets", **table([8])}
    own = table([2, 1, 2], [1, 2, 2])
    entry["fingerprints"] = {"quantiser": "table", "count": 5, **own}
    entry["scale"] = {"per": "column", "dtype": "F16"}
    entry["importance"] = {"over": "factors", "role": "multiplier", "dtype": "F32"}
    vectors = {
        "fingerprint centroids": patterns("F32", 0.0, 0.1, 0.25, 0.7, 1.5),
        "scale": patterns("F16", *[(c % 7 - 3) / 4 or 2.0 for c in range(24)]),
        "rows": patterns("F32", 1.0, 0.5, 0.1, 2.0),
        "columns": patterns("F32", *[(c + 1) / 8 for c in range(24)]),
    }
    return hand_part(entry, {"fingerprints": spread(SURVIVORS, 10, 3)}, mask=MASK, vectors=vectors)


def _group() -> Part:
    marks = [2 * p for p in patterns("BF16", *[(p % 11 + 1) / 4 for p in range(96)])]
    entry: dict[str, Any] = {"name": "group", "dtype": "F32", "shape": [4, 24], "chunk": 2}
    entry["mask"] = {"kind": "runs", "polarity": 1, **RUNS}
    own = table([0, 1, 2, 3], [1, 2, 3, 3], base=2)
    entry["fingerprints"] = {"quantiser": "uniform", "step": f32_bytes(0.3), **own}
    entry["scale"] = {"per": "group", "size": 7, "dtype": "BF16"}
    entry["importance"] = {"over": "all", "role": "metadata", **exact("BF16", **table_for(marks))}
    levels = {"fingerprints": [2 + v for v in spread(SURVIVORS, 15, 9)], "importance": marks}
    factors = {"scale": patterns("BF16", *[(g % 5 + 1) / 3 for g in range(14)])}
    return hand_part(entry, levels, mask=MASK, vectors=factors)


def _empty() -> Part:
    entry: dict[str, Any] = {"name": "empty", "dtype": "F32", "shape": [0, 3]}
    entry["fingerprints"] = {"quantiser": "uniform", "step": f32_bytes(0.5), **table([0])}
    entry["scale"] = {"per": "row", "dtype": "F32"}
    return hand_part(entry, {})


def parts() -> dict[str, Part]:
    """Returns a new tensor of each kind."""
    numbers = b"".join((n % 65536).to_bytes(2, "little") for n in range(-7, 33))
    made = [
        raw_part("raw", "I16", [5, 8], numbers),
        raw_part("flags", "BOOL", [9], bytes(int(p % 3 == 0) for p in range(9))),
        _empty(),
        raw_part("scalar", "F64", [], patterns("F64", -2.5)[0].to_bytes(8, "little")),
        _runs(),
        _octets(),
        _uniform(),
        _table(),
        _group(),
        coded(),
    ]
    return {part.entry["name"]: part for part in made}


def worked_example() -> bytes:
    """Returns the first file of SPEC.md chapter 26, from its hex dump."""
    dump = SPEC.read_text().split("```hexdump\n")[1].split("```")[0]
    lines = [re.sub("[^0-9a-f]", "", line[6:54]) for line in dump.splitlines()]
    return bytes.fromhex("".join(lines))


# Ids of these files, for the recipes that break them.
ALL = "y-LAY-001-all-kinds"
PLAIN = "y-CNV-003-raw-bitmap-and-whole-fields"
ONE = {name: f"y-DIR-002-{name}" for name in ("raw", "flags", "empty", "scalar", "runs", "octets")}
ONE |= {name: f"y-DIR-002-{name}" for name in ("uniform", "table", "group", "coded")}

KINDS = {
    "raw": "I16, coding raw, two chunks",
    "flags": "BOOL, coding raw",
    "empty": "an empty tensor with a scale of no factors",
    "scalar": "a tensor of rank 0, coding raw",
    "runs": "quantiser exact, a mask of runs of polarity 1",
    "octets": "quantiser exact, a mask of octets, BF16",
    "uniform": "quantiser uniform in pairs, runs of polarity 0, a scale per row, importance as multiplier",
    "table": "quantiser table, a scale per column, importance by factors",
    "group": "a scale per group, importance over all positions as metadata",
    "coded": "two codes per stream, pairs, importance by table",
}


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    example = worked_example()
    suite.valid(
        "CNV-001-worked-example", "the worked example of chapter 26", example, "R-PRE-001", "R-CNV-004"
    )
    suite.valid("LAY-001-no-tensors", "a file without tensors: preamble and directory", hand_file())
    made = parts()
    rows = {"metadata": {"format": "np"}}
    clauses = ("R-PLN-001", "R-CNV-002", "R-COD-001", "R-REC-001")
    suite.valid("LAY-001-all-kinds", "a tensor of each kind", hand_file(*made.values(), **rows), *clauses)
    suite.valid(
        "LAY-001-reversed",
        "the same tensors in reverse order",
        hand_file(*list(made.values())[::-1], **rows),
    )
    for name, part in made.items():
        suite.valid(f"DIR-002-{name}", KINDS[name], hand_file(part))
    suite.valid(
        "CNV-003-raw-bitmap-and-whole-fields",
        "one class per stream: one mask bit per position, 16 bits per survivor",
        plain(),
        "R-CNV-002",
        "R-PLN-001",
    )
    assert Forge.of(plain()).build() == plain()
