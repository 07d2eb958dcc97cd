"""Files with two faults of one stage: a reader may report either."""

from __future__ import annotations

from itertools import combinations

from sfp_conformance.forge import Forge

from .edits import bit_flip, of_map, put_bytes
from .gallery import ONE, PLAIN
from .suite import Edit, Suite, edited

ENTRY: dict[str, tuple[str, Edit]] = {
    "segment": ("TEN-006", lambda file: file.part("uniform").entry.update(segment=33)),
    "coding": ("TEN-004", lambda file: file.part("uniform").entry.update(coding="x-mine")),
    "dtype": ("TEN-003", lambda file: file.part("uniform").entry.update(dtype="F4")),
    "polarity": ("MSK-002", of_map("uniform", "mask", polarity=2)),
    "kind": ("MSK-001", of_map("uniform", "mask", kind="x-mine")),
    "group": ("TAB-003", of_map("uniform", "fingerprints", group=3)),
    "step": ("QNT-003", of_map("uniform", "fingerprints", step=bytes(4))),
    "per": ("SCL-001", of_map("uniform", "scale", per="x-mine")),
    "factors": ("SCL-003", of_map("uniform", "scale", dtype="F64")),
    "over": ("IMP-001", of_map("uniform", "importance", over="x-mine")),
    "role": ("IMP-002", of_map("uniform", "importance", role="x-mine")),
}
CHUNK: dict[str, tuple[str, Edit]] = {
    "reserved": ("CHK-002", bit_flip("uniform", 45)),
    "width": ("IDX-001", put_bytes("uniform", 4, b"\xff")),
    "tail": ("CHK-003", lambda file: _last(file)),
    "longer": ("CHK-001", lambda file: _longer(file)),
}


def _last(file: Forge) -> None:
    file.part("uniform").chunks[0][-1] = 1


def _longer(file: Forge) -> None:
    file.part("uniform").chunks[0] += bytes(64)


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    for faults, stage in ((ENTRY, "a tensor's entry"), (CHUNK, "a chunk")):
        for first, second in combinations(faults, 2):
            (clause, one), (other, two) = faults[first], faults[second]

            def edit(file: Forge, one: Edit = one, two: Edit = two) -> None:
                edited(file, one)
                edited(file, two)

            words = f"two faults of {stage}: {first} and {second}"
            slug = f"{clause}-{first}-and-{second}"
            suite.either(slug, words, ONE["uniform"], edit, f"R-{other}", tensor="uniform")
    _preamble(suite)


def _preamble(suite: Suite) -> None:
    faults: dict[str, tuple[str, dict[str, object]]] = {
        "major": ("PRE-004", {"major": 2}),
        "reserved": ("PRE-006", {"reserved": b"\1\0\0\0"}),
        "length": ("PRE-007", {"file_length": 10**6}),
        "sum": ("PRE-009", {"directory_length": 1}),
        "directory-checksum": ("PRE-010", {"directory_crc": 1}),
    }
    for first, second in combinations(faults, 2):
        (clause, one), (other, two) = faults[first], faults[second]

        def edit(file: Forge, one: dict[str, object] = one, two: dict[str, object] = two) -> None:
            file.preamble.update(one | two)

        words = f"two faults of the preamble: {first} and {second}"
        more = [f"R-{other}", *(["R-PRE-009"] if "length" in (first, second) else [])]
        suite.either(f"{clause}-{first}-and-{second}", words, PLAIN, edit, *more)
