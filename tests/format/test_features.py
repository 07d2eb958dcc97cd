"""SPEC.md chapters 21 and 22: features, and canonical form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge, Part, exact, f32_bytes, hand_file, hand_part, patterns, table

import sfpformat
from conformance.recipes.samples import everything, importance, weights
from sfpformat import ImportanceOptions, Options, Table, Uniform, UnsupportedError
from sfpformat.coding.codetable import code_lengths
from sfpformat.container.directory import Directory
from sfpformat.decode.validate import validate
from sfpformat.numpy import save

from ..support.clauses import clauses
from ..support.forge import accepted, refused


@clauses("R-FEA-001")
@pytest.mark.parametrize("names", [["later"], ["x-mine"], ["", "a"], ["a", "aa", "b", "é"]])
def test_a_file_with_a_feature_is_refused_and_the_feature_named(names: list[str]) -> None:
    def edit(file: Forge) -> None:
        file.root["features"] = names

    error = refused("R-FEA-001", edit, everything())
    assert isinstance(error, UnsupportedError)
    assert repr(names[0]) in error.detail


@clauses("R-FEA-002")
@pytest.mark.parametrize("names", [["b", "a"], ["a", "a"], ["aa", "a"], ["é", "z"]])
def test_features_out_of_order_or_twice_are_refused(names: list[str]) -> None:
    def edit(file: Forge) -> None:
        file.root["features"] = names

    refused("R-FEA-002", edit, everything())


@clauses("R-FEA-001", "R-FEA-002", "R-FEA-003")
def test_the_writer_lists_no_feature_and_a_directory_sorts_those_it_is_given() -> None:
    root, _ = slow_reader.read_directory(everything())
    assert "features" not in root
    listed = slow_reader.MessagePack(Directory({}, features=("b", "é", "a")).to_bytes()).value()
    assert listed["features"] == ["a", "b", "é"]


# ---------------------------------------------------------------------------------------------- canonical


def notes_of(data: bytes) -> set[str]:
    """The clauses in the validator's notes on an accepted file."""
    accepted(data)
    report = validate(data)
    assert report.canonical == (not report.notes)
    return {note[1:10] for note in report.notes}


CANONICAL: dict[str, Options] = {
    "lossless": Options(coding="fingerprint"),
    "runs": Options(coding="fingerprint", mask="runs", segment=64),
    "octets": Options(coding="fingerprint", mask="octets"),
    "many codes": Options(coding="fingerprint", codes=16, segment=32, chunk=128),
    "pairs": Options(Uniform(step=0.3), group=2),
    "short codes": Options(Uniform(step=0.3), code_limit=6),
    "table": Options(Table(centroids=8), importance=ImportanceOptions(over="all")),
    "scaled": Options(Uniform(bits=2.0, scale=64), importance=ImportanceOptions(quantiser="exact")),
    "raw": Options(coding="raw"),
}


@clauses("R-CAN-001", "R-CAN-002", "R-CAN-003", "R-CAN-004", "R-CAN-005", "R-CAN-006", "R-CAN-007")
@pytest.mark.parametrize("case", CANONICAL)
def test_the_writers_files_are_canonical(case: str) -> None:
    array = weights(60, 70)
    given = None if case == "raw" else {"a": importance(60, 70)}
    assert notes_of(save({"a": array}, options=CANONICAL[case], importances=given)) == set()


@clauses("R-CAN-002", "R-CAN-003")
def test_an_index_with_a_lesser_minimum_or_a_greater_width_is_accepted_and_noted() -> None:
    base = save({"a": weights(60, 70)}, options=Options(coding="fingerprint", segment=64))
    assert notes_of(base) == set()
    for changed, clause in (((-1, 0), "R-CAN-002"), ((0, 1), "R-CAN-003")):
        file = Forge.of(base)
        part = file.part("a")
        taken = part.take()
        values = taken.quantities["survivors"]
        least, span = min(values), max(values) - min(values)
        # A minimum that is lower by one must not need another bit, so that only one clause is broken.
        width = (span - changed[0]).bit_length()
        assert width == span.bit_length()
        taken.headers["survivors"] = (least + changed[0], width + changed[1])
        part.put(taken)
        assert notes_of(file.build()) == {clause}


def streamed(source: dict[str, Any], levels: list[int], **entry: Any) -> Part:
    """An F32 tensor whose fingerprints have this code table."""
    codes = entry.pop("segment_codes", None)
    fields = {"dtype": "F32", "shape": [len(levels)], "chunk": 64, "fingerprints": exact("F32", **source)}
    return hand_part({**fields, **entry}, {"fingerprints": levels}, codes=codes and {"fingerprints": codes})


LEVELS = [0, 1, 0, 2, 0, 1, 3, 0]


@clauses("R-CAN-004")
def test_a_symbol_that_no_segment_uses_is_noted() -> None:
    assert notes_of(hand_file(streamed(table([0, 0, 0, 0], [1, 2, 3, 3]), LEVELS))) == set()
    wasted = table([0, 0, 0, 0, 0], [1, 2, 4, 4, 3])
    assert notes_of(hand_file(streamed(wasted, [*LEVELS[:6], 4, 0, 2]))) == {"R-CAN-004"}


@clauses("R-CAN-005")
@pytest.mark.parametrize("lengths", [[2, 2, 2, 2], [2, 1, 3, 3]])
def test_code_lengths_that_are_not_those_of_the_algorithm_are_noted(lengths: list[int]) -> None:
    assert notes_of(hand_file(streamed(table([0, 0, 0, 0], lengths), LEVELS))) == (
        set() if lengths == [2, 2, 2, 2] else {"R-CAN-005"}
    )


@clauses("R-CAN-005")
def test_lengths_are_canonical_for_the_limit_12_or_their_own_maximum() -> None:
    counts = np.array([21, 13, 8, 5, 3, 2, 1, 1])
    levels = [level for level, count in enumerate(counts) for _ in range(count)]
    for limit in (3, 4, 5, 12):
        lengths = list(code_lengths(counts, limit))
        assert notes_of(hand_file(streamed(table([0] * 8, lengths), levels))) == set()


@clauses("R-CAN-006")
def test_a_first_or_last_class_that_is_not_used_is_noted() -> None:
    first = table([0, 0, 0], [0, 1, 1])
    last = table([0, 0, 0], [1, 1, 0])
    assert notes_of(hand_file(streamed(first, [1, 2, 1]))) == {"R-CAN-006"}
    assert notes_of(hand_file(streamed(last, [0, 1, 1]))) == {"R-CAN-006"}


@clauses("R-CAN-006")
@pytest.mark.parametrize("source", [table([0], base=1), table([1]), table([0, 0], [1, 1])])
def test_a_table_for_a_stream_without_levels_is_noted_unless_it_is_the_empty_one(
    source: dict[str, Any],
) -> None:
    assert notes_of(hand_file(streamed(table([0]), []))) == set()
    assert notes_of(hand_file(streamed(source, []))) == {"R-CAN-006"}


@clauses("R-CAN-006")
def test_with_pairs_the_padding_uses_class_0() -> None:
    # Three levels, all of class 1; the fourth class is padding, 0.
    pairs = table([1, 1], [0, 1, 0, 1], group=2)
    assert notes_of(hand_file(streamed(pairs, [2, 3, 2]))) == set()


@clauses("R-CAN-008")
def test_codes_that_are_not_in_the_order_of_their_first_use_are_noted() -> None:
    levels = [0, 1, 1, 0] * 8 + [2, 1, 1, 0] * 8
    near, far = [1, 1, 0], [2, 1, 2]
    right = streamed(table([0, 0, 0], near, far), levels, segment_codes=[0, 1])
    wrong = streamed(table([0, 0, 0], far, near), levels, segment_codes=[1, 0])
    assert notes_of(hand_file(right)) == set()
    assert notes_of(hand_file(wrong)) == {"R-CAN-008"}


@clauses("R-CAN-007")
@pytest.mark.parametrize("unused", [0, 1, 2])
def test_a_centroid_that_no_level_uses_is_noted(unused: int) -> None:
    source = {"quantiser": "table", "count": 3, **table([1, 1, 1], [2, 2, 1])}
    entry = {"dtype": "F32", "shape": [8], "fingerprints": source}
    centroids = {"fingerprint centroids": patterns("F32", 1.0, 2.0, 3.0)}
    levels = [0, 1, 2, 3, 4, 5, 4, 5]
    assert notes_of(hand_file(hand_part(entry, {"fingerprints": levels}, vectors=centroids))) == set()
    fewer = [level for level in levels if level // 2 != unused]
    part = hand_part({**entry, "shape": [len(fewer)]}, {"fingerprints": fewer}, vectors=centroids)
    assert "R-CAN-007" in notes_of(hand_file(part))


@clauses("R-CAN-009")
@pytest.mark.parametrize(
    ("trims", "noted"), [([3, 2], False), ([3, 1], True), ([0, 0], True), ([2, 2], True)]
)
def test_a_trim_that_is_not_the_greatest_is_noted(trims: list[int], noted: bool) -> None:
    # Bits 1 to 3 of every level of the first segment are zero, bits 1 and 2 of the second.
    levels = [(i % 7) << 4 | i & 1 for i in range(32)] + [(i % 7) << 3 | i & 1 for i in range(32)]
    source = exact("F32", 1, **table([16]))
    entry = {"dtype": "F32", "shape": [64], "chunk": 2, "fingerprints": source}
    part = hand_part(entry, {"fingerprints": levels}, trims={"fingerprints": trims})
    assert notes_of(hand_file(part)) == ({"R-CAN-009"} if noted else set())


@clauses("R-CAN-009")
def test_a_trim_key_of_1_without_any_trim_is_noted() -> None:
    source = exact("F32", 1, **table([16]))
    entry = {"dtype": "F32", "shape": [32], "fingerprints": source}
    levels = list(range(32))
    assert notes_of(hand_file(hand_part(entry, {"fingerprints": levels}))) == {"R-CAN-009"}
    entry["fingerprints"] = exact("F32", 0, **table([16]))
    assert notes_of(hand_file(hand_part(entry, {"fingerprints": levels}))) == set()


@clauses("R-CAN-009")
def test_the_trim_of_a_segment_without_levels_is_0() -> None:
    mask = {"kind": "runs", "polarity": 1, **table([5])}
    source = exact("F32", 1, **table([16]))
    entry = {"dtype": "F32", "shape": [64], "chunk": 2, "mask": mask, "fingerprints": source}
    for trims, noted in (([3, 0], False), ([3, 3], True)):
        part = hand_part(
            entry,
            {"fingerprints": [0x10, 0x21]},
            mask=[1, 1] + [0] * 62,
            trims={"fingerprints": trims},
        )
        assert notes_of(hand_file(part)) == ({"R-CAN-009"} if noted else set())


@clauses("R-CAN-001")
def test_a_file_with_a_fault_is_reported_as_not_canonical() -> None:
    file = Forge.of(everything())
    file.part("flags").chunks[0][-1] = 1
    report = validate(file.build())
    assert not report.ok
    assert not report.canonical


@clauses("R-CAN-001")
def test_the_same_choices_give_the_same_bytes() -> None:
    made = save({"a": weights(40, 50)}, options=Options(Uniform(step=0.1)))
    again = save({"a": weights(40, 50)}, options=Options(Uniform(step=0.1)))
    assert made == again
    with sfpformat.open(made) as file:
        step = Forge.of(made).part("a").entry["fingerprints"]["step"]
        assert step == f32_bytes(0.1)
        assert save({"a": file.get_tensor("a")}, options=Options(Uniform(step=0.1))) == made
