"""SPEC.md chapters 8 and 9: windows, symbols of a fixed width, and escaped levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge, Taken, exact, hand_file, hand_part, window_bits, windowed

from sfpformat import validate
from sfpformat.coding.codetable import CodeTable
from sfpformat.coding.planes import encode_levels
from sfpformat.coding.windows import best_windows, levels_outside

from ..support.clauses import clauses
from ..support.forge import accepted, refused


def file_of(levels: list[int], window: int = 3, classes: int = 20, **more: Any) -> bytes:
    """Returns a file with a tensor `hand` of F16 in windows; classes of 2^4 levels."""
    entry = {
        "dtype": "F16",
        "shape": [len(levels)],
        "chunk": 4,
        "fingerprints": exact("F16", **windowed([4] * classes, window)),
    }
    return hand_file(hand_part(entry, {"fingerprints": levels}, **more))


LEVELS = [i * 37 % 320 for i in range(70)]


@clauses("R-PLN-001", "R-PLN-003", "R-TAB-012")
@given(st.data(), st.integers(1, 4), st.lists(st.integers(0, 40), max_size=5))
def test_the_writer_encodes_windows_bit_by_bit_as_the_document_says(
    data: Any, window: int, counts: list[int]
) -> None:
    classes = data.draw(st.integers(max((1 << window) - 1, 2), 256))
    extra = data.draw(st.lists(st.integers(0, 5), min_size=classes, max_size=classes))
    table = CodeTable(3, bytes(extra), window=window)
    source = {**windowed(extra, window, base=3), "quantiser": "uniform"}
    windows = [data.draw(st.integers(0, table.code_count - 1)) for _ in counts]
    numbers = data.draw(st.lists(st.integers(0, classes - 1), min_size=sum(counts), max_size=sum(counts)))
    levels = table.first[numbers] if numbers else np.zeros(0, np.uint64)
    zeros = np.zeros(len(counts), np.int64)
    planes = encode_levels(levels, np.array(counts, np.int64), np.array(windows, np.int64), zeros, table)
    left, bits = list(numbers), []
    for count, number in zip(counts, windows, strict=True):
        bits.append(window_bits(source, left[:count], number))
        del left[:count]
    assert planes.prefix_bits.tolist() == [len(own) for own in bits]
    joined = "".join(bits)
    read = slow_reader.Bits(planes.prefix.tobytes(), 0, 8 * len(planes.prefix))
    assert "".join(str(read.bit()) for _ in joined) == joined


@clauses("R-TAB-011")
@pytest.mark.parametrize("window", [0, 5, 2**64 - 1])
def test_symbols_of_less_than_1_or_more_than_4_bits_are_refused(window: int) -> None:
    def edit(file: Forge) -> None:
        file.part("hand").entry["fingerprints"]["window"] = window

    refused("R-TAB-011", edit, file_of(LEVELS), tensor="hand")


@clauses("R-TAB-012")
@pytest.mark.parametrize("classes", [1, 6, 257])
def test_windows_need_enough_classes_and_at_most_256(classes: int) -> None:
    def edit(file: Forge) -> None:
        file.part("hand").entry["fingerprints"]["extra"] = bytes(classes)

    refused("R-TAB-012", edit, file_of(LEVELS), tensor="hand")


@clauses("R-TAB-012")
def test_windows_with_two_levels_per_symbol_are_refused() -> None:
    def edit(file: Forge) -> None:
        file.part("hand").entry["fingerprints"]["group"] = 2

    refused("R-TAB-012", edit, file_of(LEVELS), tensor="hand")


@clauses("R-TAB-009")
def test_a_prefix_code_beside_windows_is_refused() -> None:
    def edit(file: Forge) -> None:
        file.part("hand").entry["fingerprints"]["codes"] = [b"\x11" * 10]

    refused("R-TAB-009", edit, file_of(LEVELS), tensor="hand")


@clauses("R-IDX-005")
@pytest.mark.parametrize("window", [14, 2**31])
def test_a_window_that_does_not_exist_is_refused(window: int) -> None:
    def edit(file: Forge) -> None:
        taken = file.part("hand").take()
        taken.quantities["fingerprints code"][1] = window
        file.part("hand").put(taken)

    accepted(file_of(LEVELS, codes={"fingerprints": [0, 13, 5]}))
    refused("R-IDX-005", edit, file_of(LEVELS), tensor="hand")


@clauses("R-PLN-005")
@pytest.mark.parametrize("number", [20, 31])
def test_an_escaped_level_of_a_class_that_does_not_exist_is_refused(number: int) -> None:
    def edit(file: Forge) -> None:
        taken = file.part("hand").take()
        bits = taken.planes["fingerprints prefix"][0]
        taken.planes["fingerprints prefix"][0] = bits[:-5] + format(number, "05b")[::-1]
        file.part("hand").put(taken)

    refused("R-PLN-005", edit, file_of(LEVELS), tensor="hand")


@clauses("R-PLN-003")
@pytest.mark.parametrize("how", ["one bit more", "one bit less", "symbols cut", "one more escaped"])
@pytest.mark.parametrize("segment", [0, 2])
def test_a_segment_whose_escaped_levels_do_not_fit_its_bits_is_refused(how: str, segment: int) -> None:
    def edit(file: Forge) -> None:
        taken: Taken = file.part("hand").take()
        bits, count = taken.planes["fingerprints prefix"][segment], (32, 32, 6)[segment]
        inside = next(i for i in range(count) if "0" in bits[i : 3 * count : count])
        places = {inside, inside + count, inside + 2 * count}
        taken.planes["fingerprints prefix"][segment] = {
            "one bit more": bits + "0",
            "one bit less": bits[:-1],
            "symbols cut": bits[: 3 * count - 9],
            "one more escaped": "".join("1" if i in places else bit for i, bit in enumerate(bits)),
        }[how]
        taken.recount()
        file.part("hand").put(taken)

    refused("R-PLN-003", edit, file_of(LEVELS, codes={"fingerprints": [0, 3, 7]}), tensor="hand")


def notes(data: bytes, tmp_path: Any) -> list[str]:
    """Returns the clauses of canonical form that a valid file breaks."""
    path = tmp_path / "file.sfp"
    path.write_bytes(data)
    report = validate(path)
    assert not report.faults
    return [note[1:10] for note in report.notes]


@clauses("R-CAN-010")
def test_the_canonical_window_contains_most_levels_and_is_the_first_of_equals(tmp_path: Any) -> None:
    levels = [16 * c for c in (0, 1, 1, 2, 9, 10, 11, 15, 19)]
    assert notes(file_of(levels, 2, codes={"fingerprints": [0]}), tmp_path) == []
    assert notes(file_of(levels, 2, codes={"fingerprints": [9]}), tmp_path) == ["R-CAN-010"]
    assert notes(file_of(levels[:3] + levels[4:], 2, codes={"fingerprints": [9]}), tmp_path) == ["R-CAN-010"]
    rows = np.array([[4, 0, 1, 3], [0, 0, 0, 0], [0, 1, 5, 5]])
    windows, outside = best_windows(rows, 1)
    assert windows.tolist() == [0, 0, 2]
    assert outside.tolist() == [4, 0, 6]
    assert levels_outside(rows, 2).tolist() == [[3, 4], [0, 0], [5, 0]]


@clauses("R-CAN-011")
def test_a_level_inside_its_window_that_is_escaped_is_not_canonical(tmp_path: Any) -> None:
    file = Forge.of(file_of([16 * c for c in (0, 1, 2, 3, 4, 5, 19)]))
    taken = file.part("hand").take()
    source = file.part("hand").entry["fingerprints"]
    taken.planes["fingerprints prefix"] = [window_bits(source, [0, 1, 2, 3, 4, 5, 19], 0, escaped=(2,))]
    taken.recount()
    file.part("hand").put(taken)
    assert notes(file.build(), tmp_path) == ["R-CAN-011"]
