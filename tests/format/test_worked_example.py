"""SPEC.md chapter 26: the hex dumps are valid files, and the text describes them correctly."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from sfp_conformance import forge

import sfpformat
from sfpformat import numpy as sfp

SPEC = Path(__file__).parents[2] / "SPEC.md"

# Row -> column -> weight, of each example.
WEIGHTS = (
    {0: {1: 0.5, 4: -0.25, 9: 0.75, 30: 0.25}, 1: {0: -0.25, 2: 0.25, 17: -1.0, 18: 0.25, 31: 0.5}},
    {0: {2: 1.0, 3: -1.5, 8: 0.75, 13: 1.25, 30: -0.5}, 1: {0: 0.5, 7: -0.75, 16: 0.5, 31: 1.0}},
)
NAMES = ("w", "v")


def section(number: int) -> str:
    """The text of section 26.1 or 26.2."""
    text = SPEC.read_text(encoding="utf-8")
    return re.split(r"\n#{2,3} ", text.split(f"\n### 26.{number + 1} ", 1)[1], maxsplit=1)[0]


def printed_bytes(number: int) -> bytes:
    """The file of an example's hex dump."""
    dump = re.search(r"```hexdump\n(.*?)```", section(number), re.DOTALL)
    assert dump is not None
    rows = [line[6:53] for line in dump.group(1).splitlines()]
    return bytes.fromhex("".join(rows))


def example(number: int) -> np.ndarray:
    """The tensor of an example's table."""
    out = np.zeros((2, 32), np.float16)
    for row, columns in WEIGHTS[number].items():
        for column, weight in columns.items():
            out[row, column] = weight
    return out


@pytest.mark.parametrize("number", [0, 1])
def test_the_printed_file_holds_the_weights_of_the_table(number: int) -> None:
    cells = re.findall(r"(\d+): ([−\d.]+)", section(number).split("```")[0])
    printed = [(int(column), float(weight.replace("−", "-"))) for column, weight in cells]
    assert printed == [pair for columns in WEIGHTS[number].values() for pair in columns.items()]
    with sfpformat.open(printed_bytes(number)) as file:
        assert np.array_equal(file.get_tensor(NAMES[number]), example(number))
        assert np.array_equal(file.get_mask(NAMES[number]), example(number) != 0)


def test_the_index_of_the_first_example_matches_the_text() -> None:
    with sfpformat.open(printed_bytes(0)) as file:
        assert file.metadata() == {"note": "example"}
        index = file.read_head(file.entry("w"), 0)
    assert index.survivors.tolist() == [4, 5]
    assert index.bits["mask", "prefix"].tolist() == [5, 9]
    assert index.bits["mask", "residual"].tolist() == [10, 10]


def test_the_index_of_the_second_example_matches_the_text() -> None:
    with sfpformat.open(printed_bytes(1)) as file:
        index = file.read_head(file.entry("v"), 0)
    assert index.survivors.tolist() == [5, 4]
    assert index.codes["fingerprints"].tolist() == [0, 1]
    assert index.trims["fingerprints"].tolist() == [8, 9]
    assert index.bits["fingerprints", "prefix"].tolist() == [5, 2]
    assert index.bits["fingerprints", "residual"].tolist() == [15, 8]


@pytest.mark.parametrize("number", [0, 1])
def test_the_printed_file_is_canonical(number: int) -> None:
    assert sfpformat.validate(printed_bytes(number)).canonical


def test_the_writer_writes_the_first_example() -> None:
    options = sfpformat.Options(
        sfpformat.Uniform(step=0.25, rate_weight=0.0),
        coding="fingerprint",
        segment=32,
        mask="runs",
        group=1,
        codes=1,
    )
    assert sfp.save({"w": example(0)}, {"note": "example"}, options=options) == printed_bytes(0)


def test_the_second_example_can_be_built_from_its_text() -> None:
    patterns = example(1)[example(1) != 0].view(np.uint16).tolist()
    table = forge.table([11, 11], [2, 0, 2, 1], [1, 0, 1, 0], base=0x7000, group=2)
    entry = {
        "name": "v",
        "dtype": "F16",
        "shape": [2, 32],
        "chunk": 8192,
        "mask": {"kind": "octets", **forge.table([8])},
        "fingerprints": forge.exact("F16", 1, **table),
    }
    part = forge.hand_part(
        entry,
        {"fingerprints": [(b << 1 | b >> 15) & 0xFFFF for b in patterns]},
        mask=(example(1) != 0).reshape(-1).astype(int).tolist(),
        codes={"fingerprints": [0, 1]},
        trims={"fingerprints": [8, 9]},
    )
    assert forge.hand_file(part) == printed_bytes(1)


@pytest.mark.parametrize("number", [0, 1])
def test_the_bytes_quoted_in_the_text_are_at_the_stated_offsets(number: int) -> None:
    data = printed_bytes(number)
    quoted = re.findall(r"\| 0x([0-9a-f]+) \| `((?:[0-9a-f]{2} ?)+)` \|", section(number))
    assert len(quoted) >= 7
    for offset, digits in quoted:
        expected = bytes.fromhex(digits)
        assert data[int(offset, 16) : int(offset, 16) + len(expected)] == expected


@pytest.mark.parametrize("number", [0, 1])
def test_the_offsets_of_the_keys_are_right(number: int) -> None:
    data = printed_bytes(number)
    keys = re.findall(r"\| `(\w+)` \| 0x([0-9a-f]+) \|", section(number))
    assert len(keys) == 9
    for key, offset in keys:
        end = int(offset, 16)
        assert data[end - len(key) : end] == key.encode()


def test_the_levels_of_the_second_example_are_the_patterns_of_its_weights() -> None:
    row = r"\| (\d) \| (\d) \| (0x\w+)(?: \+ (0x\w+))? \| (0x\w+) \| ([−\d.]+) \|"
    found = re.findall(row, section(1))
    assert len(found) == 5
    for of_class, residual, first, more, pattern, weight in found:
        level = int(first, 16) + int(more or "0", 16)
        r = int(residual)
        assert level == 0x7000 + 0x800 * int(of_class) + r % 2 + (r // 2 << 9)
        b = int(pattern, 16)
        assert (b << 1 | b >> 15) & 0xFFFF == level
        assert np.array([b], np.uint16).view(np.float16)[0] == float(weight.replace("−", "-"))
