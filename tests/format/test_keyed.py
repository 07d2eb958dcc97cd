"""The maps of keyed tables, the hash, and the positions of rows (SPEC.md chapter 17)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sfp_conformance.forge import Forge

import sfpformat
from sfpformat.coding.keyed.hashing import positions_of
from sfpformat.engines import get_engine
from sfpformat.keyed.keys import packed

from ..support.clauses import SPEC, clauses
from ..support.conformance_cases import cases, data_of
from ..support.forge import refused

GOOD = next(data_of(case) for case in cases("y") if case["id"] == "y-KEY-002-tables")


def edit(change: Callable[[dict[str, Any]], object], number: int = 0) -> Callable[[Forge], None]:
    def changed(file: Forge) -> None:
        change(file.root["keyed"][number])

    return changed


@clauses("R-KEY-002", "R-KEY-003", "R-KEY-004", "R-KEY-005", "R-KEY-006", "R-KEY-007")
@clauses("R-KEY-008", "R-KEY-009", "R-KEY-010", "R-KEY-011", "R-KEY-012", "R-KEY-013")
@pytest.mark.parametrize(
    ("clause", "change"),
    [
        ("R-KEY-002", lambda file: file.root.update(keyed=[])),
        ("R-KEY-003", edit(lambda table: table.update(name="one"), 1)),
        ("R-KEY-004", edit(lambda table: table.update(outputs=0))),
        ("R-KEY-005", edit(lambda table: table.update(seed=1 << 32))),
        ("R-KEY-006", edit(lambda table: table.update(segment=65))),
        ("R-KEY-007", edit(lambda table: table["gaps"].update(codes=table["gaps"]["codes"] * 2), 1)),
        ("R-KEY-008", edit(lambda table: table["levels"].update(quantiser="exact"))),
        ("R-KEY-009", edit(lambda table: table["levels"].update(centroids=bytes(16)), 2)),
        ("R-KEY-010", edit(lambda table: table.update(checks=table["checks"][:-1] + b"\x21"))),
        ("R-KEY-011", edit(lambda table: table.update(bits="other"))),
        ("R-KEY-012", edit(lambda table: table.update(bits="one.bits"), 1)),
        ("R-KEY-013", lambda file: file.root.update(features=["delta", "keyed"])),
    ],
)
def test_a_map_that_breaks_a_clause_is_refused_by_it(clause: str, change: Callable[[Forge], None]) -> None:
    refused(clause, change, GOOD)


def test_the_tensors_of_a_file_with_keyed_tables_can_be_read_like_others() -> None:
    with sfpformat.open(GOOD) as file:
        assert [table.name for table in file.directory.keyed] == ["one", "several", "tabled"]
        assert file.get_tensor("one.bits").nbytes == file.directory.keyed[0].array_bytes


def test_a_directory_with_keyed_tables_is_written_as_it_was_read() -> None:
    with sfpformat.open(GOOD) as file:
        assert file.directory.to_bytes() == GOOD[file.preamble.directory_offset :]


@clauses("R-KEY-014", "R-KEY-015")
@pytest.mark.parametrize("engine", ["python", "numba"])
def test_the_hash_gives_the_vectors_of_the_document(engine: str) -> None:
    chapter = SPEC.read_text("utf-8").split("### 17.2 Hash")[1].split("### 17.3")[0]
    rows = re.findall(r"^\| (no bytes|`.*`) \| (\d+) \| ([0-9a-f]{16}), ([0-9a-f]{16}) \|$", chapter, re.M)
    assert len(rows) == 4
    for name, seed, *halves in rows:
        key = "" if name == "no bytes" else name.strip("`")
        [words] = get_engine(engine).hash_keys(packed(key), int(seed)).tolist()
        assert [f"{high:08x}{low:08x}" for low, high in (words[:2], words[2:])] == halves


def test_engines_hash_keys_of_all_lengths_alike_and_do_not_read_beyond_them() -> None:
    rng = np.random.default_rng(5)
    keys = [rng.bytes(size) for size in (*range(50), 1000, 4096)]
    for seed in (0, 1, 2**32 - 1):
        found = [get_engine(name).hash_keys(packed(keys), seed) for name in ("python", "numba")]
        assert np.array_equal(found[0], found[1])
        alone = [get_engine("numba").hash_keys(packed(key), seed)[0] for key in keys]
        assert np.array_equal(found[0], alone)


def test_the_four_positions_are_in_four_neighbouring_segments() -> None:
    words = np.random.default_rng(1).integers(0, 1 << 32, (500, 4), dtype=np.uint32)
    positions = positions_of(words, 1 << 32, 1 << 24)
    assert (np.diff(positions >> 24, axis=1) == 1).all()
    assert positions[:, 0].max() < 1 << 32
