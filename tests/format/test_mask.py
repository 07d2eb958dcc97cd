"""SPEC.md chapter 10: masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge, Part, exact, hand_file, hand_part, mask_levels, table

from conformance.recipes.samples import everything, plain
from sfpformat.coding.mask import decode_mask, encode_mask

from ..support.clauses import clauses
from ..support.forge import accepted, refused


def masked(kind: str, bits: list[int], polarity: int = 1, segment: int = 32, **source: object) -> Part:
    """A tensor of ones with this mask."""
    one = table([0], base=2 * 0x3F800000)
    mask = {"kind": kind, **(source or table([8] if kind == "octets" else [6]))}
    if kind == "runs":
        mask["polarity"] = polarity
    entry = {"dtype": "F32", "shape": [len(bits)], "segment": segment, "chunk": 64}
    entry |= {"mask": mask, "fingerprints": exact("F32", **one)}
    return hand_part(entry, {"fingerprints": [2 * 0x3F800000] * sum(bits)}, mask=bits)


@clauses("R-MSK-004", "R-MSK-005", "R-MSK-006", "R-REC-005")
@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=100),
    st.sampled_from(["runs", "octets"]),
    st.sampled_from([0, 1]),
)
def test_masks_are_restored_bit_for_bit(bits: list[int], kind: str, polarity: int) -> None:
    found = accepted(hand_file(masked(kind, bits, polarity)))["hand"]
    assert found.tobytes() == np.array(bits, np.float32).tobytes()
    positions = np.array([min(32, len(bits) - i) for i in range(0, len(bits), 32)])
    segments = [bits[i : i + 32] for i in range(0, len(bits), 32)]
    survivors = np.array([sum(segment) for segment in segments])
    mask = np.array(bits, bool)
    levels, counts = encode_mask(kind, polarity, mask, positions)
    own = {"kind": kind, "polarity": polarity}
    assert levels.tolist() == [level for segment in segments for level in mask_levels(own, segment)]
    assert np.array_equal(decode_mask(kind, polarity, levels, counts, positions, survivors), mask)


@clauses("R-MSK-001")
@pytest.mark.parametrize("kind", ["", "Runs", "bitmap", "x-mine"])
def test_a_mask_kind_that_is_not_registered_is_refused(kind: str) -> None:
    def edit(file: Forge) -> None:
        file.part("runs").entry["mask"]["kind"] = kind

    refused("R-MSK-001", edit, everything(), tensor="runs")


@clauses("R-MSK-002")
@pytest.mark.parametrize("polarity", [2, 255, 2**64 - 1])
def test_a_polarity_of_anything_but_0_or_1_is_refused(polarity: int) -> None:
    def edit(file: Forge) -> None:
        file.part("runs").entry["mask"]["polarity"] = polarity

    refused("R-MSK-002", edit, everything(), tensor="runs")


@clauses("R-DIR-007")
@pytest.mark.parametrize("polarity", [0, 1, "1"])
def test_octets_with_a_polarity_are_refused(polarity: object) -> None:
    def edit(file: Forge) -> None:
        file.part("octets").entry["mask"]["polarity"] = polarity

    refused("R-DIR-007", edit, everything(), tensor="octets")


@clauses("R-MSK-004")
@pytest.mark.parametrize("polarity", [0, 1])
@pytest.mark.parametrize("run", [2, 31, 63])
def test_a_run_that_leaves_its_segment_is_refused(polarity: int, run: int) -> None:
    # The last minority position of the first segment is its last but one. A longer run ends outside of the
    # segment, but inside of the tensor.
    bits = [1 - polarity] * 64
    bits[30] = bits[40] = polarity

    def edit(file: Forge) -> None:
        part = file.part("hand")
        taken = part.take()
        taken.planes["mask residual"][0] = format(30 + run if run < 33 else 63, "06b")[::-1]
        part.put(taken)

    refused("R-MSK-004", edit, hand_file(masked("runs", bits, polarity)), tensor="hand")


@clauses("R-MSK-004")
def test_a_run_of_the_greatest_level_after_another_is_refused() -> None:
    bits = [0] * 65536
    bits[0] = bits[65535] = 1
    source = table([15, 15], [1, 1])

    def edit(file: Forge) -> None:
        part = file.part("hand")
        taken = part.take()
        taken.planes["mask residual"][0] = "0" * 15 + "1" * 15
        part.put(taken)

    good = hand_file(masked("runs", bits, segment=65536, **source))
    refused("R-MSK-004", edit, good, tensor="hand")


@clauses("R-MSK-005")
def test_a_mask_with_another_number_of_survivors_than_the_index_is_refused() -> None:
    def edit(file: Forge) -> None:
        part = file.part("plain")
        taken = part.take()
        bits = taken.planes["mask residual"][1]
        taken.planes["mask residual"][1] = bits[:1] + "1" + bits[2:]
        part.put(taken)

    refused("R-MSK-005", edit, plain(), tensor="plain")


@clauses("R-MSK-005")
def test_survivors_of_one_segment_cannot_be_counted_to_another() -> None:
    def edit(file: Forge) -> None:
        part = file.part("plain")
        taken = part.take()
        taken.quantities["survivors"] = [15, 5]
        part.put(taken)

    refused("R-MSK-005", edit, plain(), tensor="plain")


@clauses("R-MSK-006")
@pytest.mark.parametrize("count", [1, 7, 33, 39])
def test_bits_of_the_last_octet_past_the_last_position_are_refused(count: int) -> None:
    for bit in range(count % 8, 8):

        def edit(file: Forge, bit: int = bit) -> None:
            part = file.part("hand")
            taken = part.take()
            octets = taken.planes["mask residual"][-1]
            at = len(octets) - 8 + bit
            taken.planes["mask residual"][-1] = octets[:at] + "1" + octets[at + 1 :]
            part.put(taken)

        refused("R-MSK-006", edit, hand_file(masked("octets", [1] * count)), tensor="hand")


@clauses("R-MSK-002", "R-MSK-004")
def test_a_segment_without_minority_has_no_level() -> None:
    for polarity in (0, 1):
        part = masked("runs", [1 - polarity] * 40, polarity)
        assert part.take().planes["mask residual"] == ["", ""]
        accepted(hand_file(part))


@clauses("R-MSK-001")
def test_the_slow_reader_and_the_document_agree_on_an_example() -> None:
    mask = {"kind": "runs", "polarity": 0}
    assert mask_levels(mask, [1, 1, 0, 0, 1, 0, 1]) == [2, 0, 1]
    assert slow_reader.mask_bits(mask, [2, 0, 1], 7, 4) == [1, 1, 0, 0, 1, 0, 1]
