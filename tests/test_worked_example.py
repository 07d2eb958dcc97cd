"""SPEC.md chapter 26: the bytes printed there are a file, and what the text says of them is so."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

import sfpformat
from sfpformat import numpy as sfp

SPEC = Path(__file__).parent.parent / "SPEC.md"

WEIGHTS = {
    0: {1: 0.5, 4: -0.25, 9: 0.75, 30: 0.25},
    1: {0: -0.25, 2: 0.25, 17: -1.0, 18: 0.25, 31: 0.5},
}


def printed_bytes() -> bytes:
    """The file of the hex dump."""
    dump = re.search(r"```hexdump\n(.*?)```", SPEC.read_text(encoding="utf-8"), re.DOTALL)
    assert dump is not None
    rows = [line[6:53] for line in dump.group(1).splitlines()]
    return bytes.fromhex("".join(rows))


def example() -> np.ndarray:
    """The tensor of the chapter's table."""
    out = np.zeros((2, 32), np.float16)
    for row, columns in WEIGHTS.items():
        for column, weight in columns.items():
            out[row, column] = weight
    return out


def test_the_printed_file_holds_the_printed_weights() -> None:
    with sfpformat.open(printed_bytes()) as file:
        assert file.metadata() == {"note": "example"}
        assert np.array_equal(file.get_tensor("w"), example())
        assert np.array_equal(file.get_mask("w"), example() != 0)
        index = file.read_head(file.entry("w"), 0)
    assert index.survivors.tolist() == [4, 5]
    assert index.bits["mask", "prefix"].tolist() == [5, 9]
    assert index.bits["mask", "residual"].tolist() == [10, 10]


def test_the_printed_file_is_canonical() -> None:
    assert sfpformat.validate(printed_bytes()).canonical


def test_the_writer_writes_the_printed_file() -> None:
    options = sfpformat.Options(
        coding="fingerprint",
        quantiser="uniform",
        step=0.25,
        rate_weight=0.0,
        segment=32,
        mask="runs",
        group=1,
        codes=1,
    )
    assert sfp.save({"w": example()}, {"note": "example"}, options=options) == printed_bytes()


def test_the_bytes_quoted_in_the_text_are_where_it_says() -> None:
    text = SPEC.read_text(encoding="utf-8").split("## 26 Worked example")[1].split("## 27")[0]
    data = printed_bytes()
    quoted = re.findall(r"\| 0x([0-9a-f]+) \| `((?:[0-9a-f]{2} ?)+)` \|", text)
    assert len(quoted) >= 7
    for offset, digits in quoted:
        expected = bytes.fromhex(digits)
        assert data[int(offset, 16) : int(offset, 16) + len(expected)] == expected


def test_the_offsets_of_the_keys_are_right() -> None:
    text = SPEC.read_text(encoding="utf-8").split("## 26 Worked example")[1]
    data = printed_bytes()
    keys = re.findall(r"\| `(\w+)` \| 0x([0-9a-f]+) \|", text)
    assert len(keys) == 9
    for key, offset in keys:
        end = int(offset, 16)
        assert data[end - len(key) : end] == key.encode()
