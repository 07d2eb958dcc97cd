"""SPEC.md chapter 9: planes, and the trims of their residuals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge, Part, bits_to_bytes, exact, hand_file, hand_part, table

from conformance.recipes.samples import coded, everything, plain
from sfpformat.coding import planes
from sfpformat.coding.bits import read_bits, read_fields, write_bits, write_fields

from ..support.clauses import clauses
from ..support.forge import accepted, refused

SLACK = b"\xff" * 16

fields = st.integers(0, 56).flatmap(
    lambda width: st.tuples(st.just(width), st.lists(st.integers(0, (1 << width) - 1), max_size=50))
)


@clauses("R-CNV-002", "R-CNV-003", "R-PLN-001")
@given(fields, st.integers(0, 20))
def test_fields_of_one_width_are_the_bits_of_each_least_significant_first(
    values: tuple[int, list[int]], start: int
) -> None:
    width, numbers = values
    bits = "".join(format(number, f"0{width}b")[::-1] for number in numbers) if width else ""
    array = np.array(numbers, np.uint64)
    assert write_fields(array, width).tobytes() == bits_to_bytes(bits)
    data = np.frombuffer(bits_to_bytes("1" * start + bits) + SLACK, np.uint8)
    assert read_fields(data, start, width, len(numbers)).tolist() == numbers


@clauses("R-CNV-002", "R-CNV-003", "R-PLN-001")
@given(
    st.lists(fields.map(lambda pair: (pair[0], pair[1][0] if pair[1] else 0)), max_size=60), st.integers(0, 9)
)
def test_fields_of_many_widths_follow_each_other_without_padding(
    pairs: list[tuple[int, int]], start: int
) -> None:
    bits = "".join(format(number, f"0{width}b")[::-1] if width else "" for width, number in pairs)
    widths = np.array([width for width, _ in pairs], np.int64)
    numbers = np.array([number for _, number in pairs], np.uint64)
    written, ends = write_bits(numbers, widths)
    assert written.tobytes() == bits_to_bytes(bits)
    assert ends.tolist() == np.cumsum(widths).tolist()
    data = np.frombuffer(bits_to_bytes("1" * start + bits) + SLACK, np.uint8)
    read, ends = read_bits(data, start, widths)
    assert read.tolist() == numbers.tolist()
    assert ends.tolist() == np.cumsum(widths).tolist()


@clauses("R-PLN-001")
def test_levels_are_in_the_order_of_positions_segment_by_segment() -> None:
    taken = Forge.of(plain()).part("plain").take()
    joined = "".join(taken.planes["fingerprints residual"])
    assert [int(joined[i : i + 16][::-1], 2) for i in range(0, 320, 16)] == [
        2 * p + 0x7E00 for p in range(20)
    ]


def pairs_part(levels: list[int]) -> Part:
    """A tensor of one segment with three classes of one level each, coded in pairs."""
    lengths = [2, 3, 3, 3, 3, 4, 4, 4, 4]
    source = exact("F32", **table([0, 0, 0], lengths, group=2))
    entry = {"dtype": "F32", "shape": [len(levels)], "fingerprints": source}
    return hand_part(entry, {"fingerprints": levels})


@clauses("R-PLN-002")
@pytest.mark.parametrize("count", [1, 3, 31])
def test_a_second_class_past_the_last_level_of_a_segment_is_refused(count: int) -> None:
    levels = [i % 3 for i in range(count)]
    words = {s: word for word, s in slow_reader.codewords([2, 3, 3, 3, 3, 4, 4, 4, 4]).items()}

    def edit(file: Forge) -> None:
        part = file.part("hand")
        taken = part.take()
        prefix = taken.planes["fingerprints prefix"][0]
        last = words[levels[-1]]
        assert prefix.endswith(last)
        taken.planes["fingerprints prefix"] = [prefix[: len(prefix) - len(last)] + words[levels[-1] + 3]]
        taken.recount()
        part.put(taken)

    refused("R-PLN-002", edit, hand_file(pairs_part(levels)), tensor="hand")


@clauses("R-PLN-002")
def test_every_segment_starts_with_a_new_symbol() -> None:
    taken = coded().take()
    survivors = taken.quantities["survivors"]
    assert [n % 2 for n in survivors] == [1, 1]
    accepted(hand_file(coded()))


@clauses("R-PLN-003")
@pytest.mark.parametrize("by", [-2, -1, 1, 2])
@pytest.mark.parametrize(
    ("name", "plane"),
    [
        ("runs", "mask prefix"),
        ("runs", "mask residual"),
        ("runs", "fingerprints prefix"),
        ("octets", "mask prefix"),
        ("group", "fingerprints residual"),
        ("group", "importance prefix"),
        ("coded", "fingerprints prefix"),
        ("coded", "fingerprints residual"),
        ("coded", "importance prefix"),
    ],
)
def test_a_segment_whose_end_differs_from_the_index_is_refused(name: str, plane: str, by: int) -> None:
    def edit(file: Forge) -> None:
        part = file.part(name)
        taken = part.take()
        taken.quantities[plane][0] += by
        taken.quantities[plane][1] -= by
        part.put(taken)

    refused("R-PLN-003", edit, everything(), tensor=name)


@clauses("R-PLN-003")
@pytest.mark.parametrize("change", ["a symbol more", "a symbol less", "half a symbol", "a residual more"])
def test_a_plane_with_more_or_fewer_levels_than_the_segment_is_refused(change: str) -> None:
    def edit(file: Forge) -> None:
        part = file.part("coded")
        taken = part.take(1)
        prefix, residual = taken.planes["importance prefix"], taken.planes["fingerprints residual"]
        if change == "a symbol more":
            prefix[0] += "0"
        elif change == "a symbol less":
            prefix[0] = prefix[0][1:] if prefix[0][0] == "0" else prefix[0][2:]
        elif change == "half a symbol":
            prefix[0] += "1"
        else:
            residual[0] += "0"
        taken.recount()
        part.put(taken, 1)

    refused("R-PLN-003", edit, everything(), tensor="coded")


@clauses("R-PLN-004")
@pytest.mark.parametrize(
    "plane", ["mask prefix", "mask residual", "fingerprints prefix", "importance prefix"]
)
def test_a_bit_after_the_end_of_a_plane_is_refused(plane: str) -> None:
    part = Forge.of(everything()).part("coded")
    chunk = slow_reader.open_chunk(bytes(part.chunks[0]), part.full_entry(), 0)
    start, bits = chunk.planes[plane]
    end = start + sum(bits)
    stop = 8 * slow_reader.align((end + 7) // 8, 16)
    assert end < stop
    for bit in {end, stop - 1, (end + 7) // 8 * 8}:

        def edit(file: Forge, bit: int = bit) -> None:
            file.part("coded").chunks[0][bit // 8] |= 1 << bit % 8

        error = refused("R-PLN-004", edit, everything(), tensor="coded")
        assert error.offset == Forge.of(everything()).start_of("coded") + len(part.vectors or b"") + bit // 8


# -------------------------------------------------------------------------------------------------- trims


def trimmed_part(trims: list[int], *, extra: int = 16) -> Part:
    """A BF16 tensor of whole segments, whose residuals omit the bits of their segment's trim."""
    levels = [(i * 37 % 128) << (z + 1) & 0xFFFF | i & 1 for z in trims for i in range(32)]
    if extra < 16:
        levels = [level & ((1 << extra) - 1) for level in levels]
    source = exact("BF16", 1, **table([extra]))
    entry = {"dtype": "BF16", "shape": [len(levels)], "chunk": 8, "fingerprints": source}
    return hand_part(entry, {"fingerprints": levels}, trims={"fingerprints": trims})


@clauses("R-IDX-006", "R-REC-001")
@pytest.mark.parametrize("trims", [[0], [1], [7, 0, 3], [8, 8], [15], [15, 0]])
def test_trimmed_bits_decode_as_zeros_above_the_lowest_bit(trims: list[int]) -> None:
    part = trimmed_part(trims)
    found = accepted(hand_file(part))["hand"].view(np.uint16)
    levels = [(i * 37 % 128) << (z + 1) & 0xFFFF | i & 1 for z in trims for i in range(32)]
    assert found.tolist() == [level >> 1 | (level & 1) << 15 for level in levels]
    assert [len(bits) for bits in part.take().planes["fingerprints residual"]] == [
        32 * (16 - z) for z in trims
    ]


@clauses("R-IDX-006")
@pytest.mark.parametrize("trim", [16, 17, 64, 2**32 - 1])
def test_a_trim_that_leaves_no_bit_is_refused(trim: int) -> None:
    def edit(file: Forge) -> None:
        part = file.part("hand")
        taken = part.take()
        taken.quantities["fingerprints trim"][1] = trim
        part.put(taken)

    refused("R-IDX-006", edit, hand_file(trimmed_part([1, 15])), tensor="hand")


@clauses("R-IDX-006")
def test_a_trim_as_great_as_the_least_class_in_use_is_refused() -> None:
    source = exact("F32", 1, **table([2, 5, 0], [1, 1, 0]))
    entry = {"dtype": "F32", "shape": [4], "fingerprints": source}
    good = hand_part(entry, {"fingerprints": [0, 1, 4, 5]}, trims={"fingerprints": [1]})

    def edit(file: Forge) -> None:
        part = file.part("hand")
        taken = part.take()
        taken.quantities["fingerprints trim"] = [2]
        part.put(taken)

    refused("R-IDX-006", edit, hand_file(good), tensor="hand")


@clauses("R-QNT-008")
@pytest.mark.parametrize("stream", ["fingerprints", "importance"])
@pytest.mark.parametrize("trim", [2, 255, 2**64 - 1])
def test_a_trim_key_of_anything_but_0_or_1_is_refused(stream: str, trim: int) -> None:
    name = "runs" if stream == "fingerprints" else "group"

    def edit(file: Forge) -> None:
        file.part(name).entry[stream]["trim"] = trim

    refused("R-QNT-008", edit, everything(), tensor=name)


@clauses("R-PLN-001")
@given(st.lists(st.integers(0, 2**40), max_size=40), st.integers(0, 30))
def test_omitted_bits_are_restored(numbers: list[int], trim: int) -> None:
    whole = np.array([(n >> 1 << (trim + 1) | n & 1) % (1 << 56) for n in numbers], np.uint64)
    trims = np.full(len(whole), trim)
    assert np.array_equal(planes.with_trimmed_bits(planes.without_trimmed_bits(whole, trims), trims), whole)
