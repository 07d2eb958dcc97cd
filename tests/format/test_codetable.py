"""SPEC.md chapter 8: classes, code lengths, codewords."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sfp_conformance import slow_reader
from sfp_conformance.forge import (
    Forge,
    exact,
    f32_bytes,
    hand_file,
    hand_part,
    nibbles,
    patterns,
    table,
)

from conformance.recipes.samples import everything
from sfpformat import InvalidFileError
from sfpformat.coding.codetable import CodeTable, PrefixCode, code_lengths, pack_lengths, unpack_lengths

from ..support.clauses import clauses
from ..support.forge import accepted, refused, refused_bytes


def with_table(source: dict[str, Any], *, dtype: str = "F64") -> bytes:
    """A file with an empty tensor that has this code table for its fingerprints."""
    return hand_file(hand_part({"dtype": dtype, "shape": [0], "fingerprints": exact(dtype, **source)}, {}))


def edit_table(**changes: Any) -> Any:
    """An edit that changes keys of a code table."""

    def edit(file: Forge) -> None:
        file.part("hand").entry["fingerprints"] |= changes

    return edit


ONE = with_table(table([3]))
TWO = with_table(table([3, 3], [1, 1]))
PAIRS = with_table(table([3, 3], [2, 2, 2, 2], group=2))


def chain(most: int) -> list[int]:
    """The lengths 1, 2, 3, …, ``most``, ``most`` of a complete code."""
    return [*range(1, most + 1), most]


@clauses("R-TAB-001")
def test_a_table_of_no_class_or_too_many_is_refused() -> None:
    refused("R-TAB-001", edit_table(extra=b""), ONE, tensor="hand")
    lengths = [1, 1] + [0] * 4095
    refused("R-TAB-001", edit_table(extra=bytes(4097), codes=[nibbles(lengths)]), TWO, tensor="hand")
    refused("R-TAB-001", edit_table(extra=b"\0", codes=[]), PAIRS, tensor="hand")
    lengths = [1, 1] + [0] * (65 * 65 - 2)
    refused("R-TAB-001", edit_table(extra=bytes(65), codes=[nibbles(lengths)]), PAIRS, tensor="hand")


@clauses("R-TAB-001")
def test_the_greatest_tables_are_accepted() -> None:
    accepted(with_table(table([0] * 4096, [1, 1] + [0] * 4094)))
    accepted(with_table(table([0] * 64, [1, 1] + [0] * 4094, group=2)))
    accepted(with_table(table([0])))


@clauses("R-TAB-002")
@pytest.mark.parametrize("extra", [57, 64, 255])
def test_a_class_of_more_than_56_residual_bits_is_refused(extra: int) -> None:
    refused("R-TAB-002", edit_table(extra=bytes([extra])), ONE, tensor="hand")
    accepted(with_table(table([56])))


@clauses("R-TAB-003")
@pytest.mark.parametrize("group", [0, 3, 255, 2**64 - 1])
def test_a_group_of_anything_but_1_or_2_is_refused(group: int) -> None:
    refused("R-TAB-003", edit_table(group=group), TWO, tensor="hand")


@clauses("R-TAB-004")
@pytest.mark.parametrize("size", [0, 2, 100])
def test_code_lengths_of_another_number_are_refused(size: int) -> None:
    refused(
        "R-TAB-004",
        edit_table(codes=[(b"\x11" + bytes(99))[:size]]),
        TWO,
        tensor="hand",
    )


@clauses("R-TAB-004")
def test_pairs_have_a_code_length_for_each_two_classes() -> None:
    refused("R-TAB-004", edit_table(codes=[nibbles([1, 1])]), PAIRS, tensor="hand")
    three = with_table(table([3, 3, 3], [1, 2, 2] + [0] * 6, group=2))
    refused("R-TAB-004", edit_table(codes=[nibbles([1, 2, 2])]), three, tensor="hand")


@clauses("R-TAB-010")
@pytest.mark.parametrize("bits", [1, 8, 15])
def test_four_bits_past_the_last_length_that_are_not_zero_are_refused(bits: int) -> None:
    three = with_table(table([3, 3, 3], [1, 2, 2]))
    refused("R-TAB-010", edit_table(codes=[bytes([0x21, 0x02 | bits << 4])]), three, tensor="hand")


@clauses("R-TAB-005")
@pytest.mark.parametrize("most", [13, 14, 15])
def test_a_code_of_more_than_12_bits_is_refused(most: int) -> None:
    lengths = chain(most)
    base = with_table(table([0] * len(lengths), chain(12) + [0] * (most - 12)))
    refused("R-TAB-005", edit_table(codes=[nibbles(lengths)]), base, tensor="hand")


@clauses("R-TAB-006")
def test_a_code_of_one_symbol_or_of_more_than_256_is_refused() -> None:
    for lengths in ([1, 0], [0, 1], [0, 0]):
        refused("R-TAB-006", edit_table(codes=[nibbles(lengths)]), TWO, tensor="hand")
    base = with_table(table([0] * 257, [8] * 256 + [0]))
    refused("R-TAB-006", edit_table(codes=[nibbles([8] * 255 + [9, 9])]), base, tensor="hand")


@clauses("R-TAB-007")
@pytest.mark.parametrize(
    "lengths", [[1, 2], [2, 2], [1, 12], [12, 12], [0, 1, 1, 12], [1, 1, 1], [1, 2, 2, 12]]
)
def test_a_code_that_is_not_complete_is_refused(lengths: list[int]) -> None:
    base = with_table(table([0] * len(lengths), [1, 1] + [0] * (len(lengths) - 2)))
    refused("R-TAB-007", edit_table(codes=[nibbles(lengths)]), base, tensor="hand")


@clauses("R-TAB-009")
def test_no_code_or_more_than_16_are_refused() -> None:
    refused("R-TAB-009", edit_table(codes=[]), TWO, tensor="hand")
    refused("R-TAB-009", edit_table(codes=[nibbles([1, 1])] * 17), TWO, tensor="hand")
    accepted(with_table(table([3, 3], *[[1, 1]] * 16)))


@clauses("R-TAB-009")
def test_a_code_for_one_class_is_refused() -> None:
    refused("R-TAB-009", edit_table(codes=[nibbles([1])]), ONE, tensor="hand")


BOUNDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "mask, runs": ("mask", {"kind": "runs", "polarity": 1}, 65536),
    "mask, octets": ("mask", {"kind": "octets"}, 256),
    "fingerprints, exact F64": ("fingerprints", exact("F64"), 2**64),
    "fingerprints, exact F32 in F64": ("fingerprints", exact("F32"), 2 * 0x7F800000),
    "fingerprints, exact F16 in F64": ("fingerprints", exact("F16"), 2 * 0x7C00),
    "fingerprints, exact BF16 in F64": ("fingerprints", exact("BF16"), 2 * 0x7F80),
    "fingerprints, exact F8_E4M3 in F64": ("fingerprints", exact("F8_E4M3"), 2 * 0x7F),
    "fingerprints, exact F8_E5M2 in F64": ("fingerprints", exact("F8_E5M2"), 2 * 0x7C),
    "fingerprints, uniform": ("fingerprints", {"quantiser": "uniform", "step": f32_bytes(1)}, 2**32),
    "fingerprints, table": ("fingerprints", {"quantiser": "table", "count": 3}, 6),
    "importance, exact F32": ("importance", exact("F32"), 2 * 0x7F800000),
    "importance, exact F16": ("importance", exact("F16"), 2 * 0x7C00),
    "importance, exact BF16": ("importance", exact("BF16"), 2 * 0x7F80),
    "importance, uniform": ("importance", {"quantiser": "uniform", "step": f32_bytes(1)}, 2**31),
    "importance, table": ("importance", {"quantiser": "table", "count": 3}, 3),
}


@clauses("R-TAB-008")
@pytest.mark.parametrize("stream", BOUNDS)
def test_a_table_up_to_its_bound_is_accepted_and_one_level_more_is_refused(stream: str) -> None:
    key, fields, bound = BOUNDS[stream]
    entry = {"dtype": "F64", "shape": [0], "fingerprints": exact("F64", **table([0]))}
    if key == "importance":
        fields = {"over": "all", "role": "metadata", **fields}
    centroids = patterns("F32", 1.0, 2.0, 3.0)
    part = hand_part(
        {**entry, key: {**fields, **table([0], base=bound - 1)}},
        {},
        vectors={"fingerprint centroids": centroids, "importance centroids": centroids},
        mask=[] if key == "mask" else None,
    )

    def edit(file: Forge) -> None:
        file.part("hand").entry[key]["base"] = bound

    def widen(file: Forge) -> None:
        file.part("hand").entry[key]["extra"] = b"\1"

    if bound < 2**64:
        refused("R-TAB-008", edit, hand_file(part), tensor="hand")
    refused("R-TAB-008", widen, hand_file(part), tensor="hand")


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
@clauses("R-TAB-008")
def test_an_exact_stream_in_the_tensors_own_dtype_can_code_every_pattern(dtype: str) -> None:
    bound = 1 << slow_reader.FLOATS[dtype].bits
    base = with_table(table([0], base=bound - 1), dtype=dtype)
    refused("R-TAB-008", edit_table(extra=b"\1"), base, tensor="hand")


@clauses("R-COD-001")
def test_the_codewords_of_a_worked_example() -> None:
    code = PrefixCode(bytes([2, 0, 1, 3, 3]))
    assert dict(zip(code.symbols.tolist(), code.codewords, strict=True)) == {
        2: "0",
        0: "10",
        3: "110",
        4: "111",
    }


@st.composite
def complete_codes(draw: st.DrawFn) -> list[int]:
    """The lengths of a complete code, generated by splitting leaves, with unused symbols in between."""
    lengths = [1, 1]
    for _ in range(draw(st.integers(0, 60))):
        splittable = [i for i, length in enumerate(lengths) if length < 12]
        chosen = draw(st.sampled_from(splittable))
        lengths[chosen] += 1
        lengths.append(lengths[chosen])
    lengths += [0] * draw(st.integers(0, 9))
    return draw(st.permutations(lengths))


@clauses("R-COD-001", "R-TAB-004", "R-TAB-005", "R-TAB-007")
@given(complete_codes())
def test_codewords_equal_those_of_the_algorithm_and_are_prefix_free(lengths: list[int]) -> None:
    code = PrefixCode(bytes(lengths))
    words = dict(zip(code.codewords, code.symbols.tolist(), strict=True))
    assert words == slow_reader.codewords(lengths)
    ordered = sorted(words)
    assert not any(b.startswith(a) for a, b in pairwise(ordered))
    assert unpack_lengths(pack_lengths(bytes(lengths)), len(lengths)) == bytes(lengths)
    assert pack_lengths(bytes(lengths)) == nibbles(lengths)


@clauses("R-TAB-005", "R-TAB-006", "R-TAB-007")
@given(complete_codes(), st.data())
def test_a_code_is_accepted_when_its_shares_make_one_and_only_then(lengths: list[int], data: Any) -> None:
    place = data.draw(st.integers(0, len(lengths) - 1))
    lengths[place] = data.draw(st.integers(0, 15) | st.just(lengths[place]))
    used = [length for length in lengths if length]
    complete = max(lengths) <= 12 and len(used) >= 2 and sum(Fraction(1, 2**n) for n in used) == 1
    if complete:
        assert PrefixCode(bytes(lengths)).length == bytes(lengths)
    else:
        with pytest.raises(InvalidFileError):
            PrefixCode(bytes(lengths))


@clauses("R-TAB-004", "R-TAB-010")
@given(st.binary(min_size=1, max_size=40), st.booleans())
def test_lengths_are_the_halves_of_the_bytes(packed: bytes, odd: bool) -> None:
    halves = [half for byte in packed for half in (byte & 15, byte >> 4)]
    if odd and halves[-1]:
        with pytest.raises(InvalidFileError, match="R-TAB-010"):
            unpack_lengths(packed, len(halves) - 1)
    else:
        lengths = unpack_lengths(packed, len(halves) - odd)
        assert list(lengths) == halves[: len(halves) - odd]
        assert pack_lengths(lengths) == packed


@clauses("R-COD-002", "R-TAB-010")
def test_a_codeword_is_written_most_significant_bit_first() -> None:
    source = table([0, 0, 0, 0], [1, 2, 3, 3])
    entry = {"dtype": "F32", "shape": [4], "fingerprints": exact("F32", **source)}
    part = hand_part(entry, {"fingerprints": [0, 1, 2, 3]})
    # The codewords 0, 10, 110, 111 one after another, from the least significant bit of the first byte up.
    # The index precedes them: one quantity with 8 bytes of header and no fields.
    assert part.chunks[0][16:18] == bytes([0b11011010, 0b0000000_1])
    assert accepted(hand_file(part))["hand"].view(np.uint32).tolist() == [0, 1 << 31, 1, 1 | 1 << 31]


@clauses("R-TAB-001", "R-TAB-002", "R-TAB-003", "R-TAB-009", "R-TAB-010")
@given(st.lists(st.integers(0, 20), min_size=2, max_size=40), st.integers(0, 1000))
def test_every_level_is_in_the_class_that_contains_it(extra: list[int], base: int) -> None:
    code = (PrefixCode(bytes([1, 1] + [0] * (len(extra) - 2))),)
    own = CodeTable(base, bytes(extra), code)
    first = [base + sum(1 << e for e in extra[:c]) for c in range(len(extra))]
    assert own.first.tolist() == first
    assert own.top == first[-1] + (1 << extra[-1])
    edges = [level for c, at in enumerate(first) for level in (at, at + (1 << extra[c]) - 1)]
    assert own.class_of(np.array(edges, np.uint64)).tolist() == [c for c in range(len(extra)) for _ in "ab"]


@given(st.lists(st.sampled_from([0, 3, 7]), min_size=2, max_size=9), st.sampled_from([1, 2]), st.data())
def test_the_residual_bits_of_used_classes(extra: list[int], group: int, data: Any) -> None:
    symbols = len(extra) ** group
    pairs = st.lists(st.integers(0, symbols - 1), min_size=2, max_size=2, unique=True)
    used = data.draw(st.lists(pairs, min_size=1, max_size=3))
    codes = tuple(PrefixCode(bytes(int(s in pair) for s in range(symbols))) for pair in used)
    own = CodeTable(5, bytes(extra), codes, group)
    classes = {s // len(extra) ** j % len(extra) for pair in used for s in pair for j in range(group)}
    widths = {extra[c] for c in classes}
    assert own.least_extra == min(widths)
    assert own.constant_extra == (min(widths) if len(widths) == 1 else None)
    assert own.constant_width == (extra[0] if len(set(extra)) == 1 else None)


@clauses("R-TAB-006", "R-TAB-007", "R-CAN-005")
@given(st.lists(st.integers(0, 5000), min_size=2, max_size=60), st.integers(1, 12))
def test_code_lengths_are_complete_within_the_limit_and_no_code_is_shorter(
    counts: list[int], limit: int
) -> None:
    used = [count for count in counts if count]
    if not 2 <= len(used) <= 1 << limit:
        return
    lengths = code_lengths(np.array(counts), limit)
    PrefixCode(lengths)
    assert max(lengths) <= limit
    assert [length > 0 for length in lengths] == [count > 0 for count in counts]
    assert list(lengths) == plain_code_lengths(counts, limit)
    if limit == 12:
        assert sum(map(int.__mul__, counts, lengths)) == huffman_bits(used) or max(lengths) == 12


def plain_code_lengths(counts: list[int], limit: int) -> list[int]:
    """`code_lengths` as in chapter 22: lists of weights, each with its symbols."""
    items = sorted((count, s) for s, count in enumerate(counts) if count)
    single = [(count, [s]) for count, s in items]
    merged = list(single)
    for _ in range(limit - 1):
        pairs = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(merged[0::2], merged[1::2], strict=False)]
        # Sorting is stable, so items precede pairs of equal weight.
        merged = sorted(single + pairs, key=lambda element: element[0])
    inside = [s for _, symbols in merged[: 2 * len(items) - 2] for s in symbols]
    return [inside.count(s) for s in range(len(counts))]


def huffman_bits(counts: list[int]) -> int:
    """The number of bits of a Huffman code for these counts."""
    heap, total = sorted(counts), 0
    while len(heap) > 1:
        joined = heap[0] + heap[1]
        total += joined
        heap = sorted([joined, *heap[2:]])
    return total


@clauses("R-TAB-008")
def test_a_table_of_the_sample_may_not_reach_beyond_its_centroids() -> None:
    def edit(file: Forge) -> None:
        entry = file.part("table").entry["fingerprints"]
        entry["base"] += 1

    whole = Forge.of(everything()).part("table").entry["fingerprints"]
    assert slow_reader.top(whole) == 2 * whole["count"]
    refused("R-TAB-008", edit, everything(), tensor="table")


@clauses("R-TAB-004")
def test_a_table_cannot_be_made_with_a_code_for_other_symbols() -> None:
    with pytest.raises(InvalidFileError, match="R-TAB-004"):
        CodeTable(0, b"\0\0\0", (PrefixCode(b"\1\1"),))


@clauses("R-TAB-004")
def test_code_lengths_of_no_symbol_are_refused() -> None:
    file = Forge.of(TWO)
    file.part("hand").entry["fingerprints"]["codes"] = [b""]
    refused_bytes(file.build(), "R-TAB-004", tensor="hand")
