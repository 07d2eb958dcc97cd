"""Chapter 22: canonical files, and files that break one clause of canonical form."""

from __future__ import annotations

from typing import Any

from sfp_conformance.forge import exact, f32_bytes, patterns, table

from .edits import one_file
from .suite import Suite

ZERO = exact("F16", **table([0]))


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    for slug, (why, data) in _canonical().items():
        suite.valid(f"CAN-001-{slug}", why, data, "R-CAN-005", canonical=True)
    for clause, slug, why, data in _not_canonical():
        suite.valid(f"CAN-{clause}-{slug}", why, data, "R-CAN-001", canonical=(f"R-CAN-{clause}",))


def _coded(lengths: list[int], levels: list[int], **more: Any) -> bytes:
    return one_file(exact("F16", **table([0] * len(lengths), lengths)), levels, "F16", **more)


def _canonical() -> dict[str, tuple[str, bytes]]:
    centroids = {"vectors": {"fingerprint centroids": patterns("F32", 0.0, 1.0)}}
    counted = {"quantiser": "table", "count": 2, **table([2])}
    two = exact("F16", **table([0, 0, 0], [1, 2, 2], [2, 2, 1]))
    halves = [0] * 20 + [1, 2] * 6 + [2] * 20 + [0, 1] * 6
    return {
        "one-class": ("one class of two bits", one_file(exact("F16", **table([2])), [0, 3, 1, 2], "F16")),
        "two-symbols": ("two symbols of one bit", _coded([1, 1], [0, 1, 1, 1])),
        "three-symbols": ("a code that fits its counts", _coded([1, 2, 2], [0, 0, 0, 1, 2])),
        "ties": ("equal counts, whose lengths follow the order of the symbols", _coded([2, 2, 1], [0, 1, 2])),
        "limited": ("a code with the limit of 2 bits", _coded([2] * 4, [0] * 9 + [1, 2, 3])),
        "no-levels": ("an empty tensor", one_file(ZERO, [], "F16", shape=[0])),
        "two-codes": ("two codes, both used", one_file(two, halves, "F16", codes={"fingerprints": [0, 1]})),
        "table": ("a table with no unused centroid", one_file(counted, [0, 3, 1], "F32", **centroids)),
        "trim-of-nothing": (
            "trims, and a chunk without levels",
            one_file(
                exact("F16", trim=1, **table([6])),
                [0b100001, 0],
                "F16",
                mask=[0] * 32 + [1, 1] + [0] * 30,
                mask_map={"kind": "octets", **table([8])},
                chunk=1,
                trims={"fingerprints": [0, 4]},
            ),
        ),
        "trim": (
            "the greatest trims",
            one_file(exact("F16", trim=1, **table([6])), [0b100001, 0], "F16", trims={"fingerprints": [4]}),
        ),
    }


def _not_canonical() -> list[tuple[str, str, str, bytes]]:
    centroids = {"vectors": {"fingerprint centroids": patterns("F32", 0.0, 1.0, 2.0)}}
    counted = {"quantiser": "table", "count": 3, **table([1, 0, 1], [1, 2, 2])}
    reverse = exact("F16", **table([0, 0, 0], [2, 2, 1], [1, 2, 2]))
    halves = [0] * 20 + [1, 2] * 6 + [2] * 20 + [0, 1] * 6
    step = {"quantiser": "uniform", "step": f32_bytes(0.5)}
    trimmed = exact("F16", trim=1, **table([6]))
    return [
        ("004", "symbol-unused", "a code has a symbol that never occurs", _coded([2, 2, 2, 2], [0, 1, 1, 3])),
        (
            "005",
            "other-lengths",
            "the rarest symbol has the shortest codeword",
            _coded([2, 2, 1], [0, 0, 0, 1, 2]),
        ),
        (
            "005",
            "flat",
            "a flat code although a skewed code within the same limit is shorter",
            _coded([2, 2, 2, 3, 3], [0] * 9 + [1, 2, 3, 4]),
        ),
        (
            "006",
            "base-and-extra",
            "a stream without levels has an extra of 1",
            one_file({**step, **table([1])}, [], shape=[0]),
        ),
        (
            "006",
            "base",
            "a stream without levels has a base of 1",
            one_file({**step, **table([0], base=1)}, [], shape=[0]),
        ),
        (
            "007",
            "centroid-unused",
            "no level uses the last centroid",
            one_file(counted, [0, 1, 2, 3, 0], "F32", **centroids),
        ),
        (
            "008",
            "reversed",
            "the second code is used first",
            one_file(reverse, halves, "F16", codes={"fingerprints": [1, 0]}),
        ),
        (
            "009",
            "less-trim",
            "a trim less than the greatest",
            one_file(trimmed, [0b100001, 0], "F16", trims={"fingerprints": [3]}),
        ),
        ("009", "no-trim", "`trim` is 1 but every trim is 0", one_file(trimmed, [0b100011, 63], "F16")),
    ]
