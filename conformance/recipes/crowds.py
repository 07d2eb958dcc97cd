"""Files with many plain tensors, one of them faulty: a reader that checks entries in bulk must detect it.

Plain tensors are raw tensors, and lossless tensors coded in their own dtype without mask, scale and
importance, as in dense models.
"""

from __future__ import annotations

import struct
from typing import Any

from sfp_conformance.forge import Forge, Part, exact, hand_file, hand_part, nibbles, raw_part, table

from .edits import bit_flip, of_chunk, of_map
from .entries import entry_edit
from .gallery import parts
from .suite import Edit, Suite

TABLES = (table([16]), table([15, 15], [1, 1]), table([14, 14, 15], [2, 2, 1], [1, 2, 2]))
COUNT = 12
CROWD, MIXED = "y-LAY-001-crowd", "y-LAY-001-crowd-with-others"
RAW, TWO_CLASSES, THREE_CLASSES, ONE_CLASS = "p03", "p04", "p05", "p06"


def crowd() -> list[Part]:
    """Returns plain tensors. Every fourth is raw; the others use the code tables in turn."""
    out = []
    for number in range(COUNT):
        name = f"p{number:02d}"
        if number % 4 == 3:
            out.append(raw_part(name, "F16", [40], bytes(range(80)), chunk=2))
            continue
        own = TABLES[number % 3]
        levels = [(101 * i * i + 7 * number) % 2**15 for i in range(40)]
        entry: dict[str, Any] = {
            "name": name,
            "dtype": "F16",
            "shape": [4, 10],
            "fingerprints": exact("F16", **own),
        }
        out.append(
            hand_part(entry, {"fingerprints": levels}, codes={"fingerprints": [0, len(own["codes"]) - 1]})
        )
    return out


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    words = f"{COUNT} plain tensors"
    suite.valid("LAY-001-crowd", words, hand_file(*crowd()), "R-TEN-001", canonical=None)
    others = [parts()[name] for name in ("runs", "uniform", "table")]
    mixed = hand_file(*crowd()[:5], others[0], *crowd()[5:], *others[1:])
    suite.valid(
        "LAY-001-crowd-with-others", f"{words}, with other tensors between and after them", mixed, "R-TEN-001"
    )
    for slug, (tensor, words, edit) in _entry_faults().items():
        told = None if slug.startswith("DIR-003-crowd-name") else tensor
        told = {"TEN-001-crowd-twice": RAW, "TEN-002-crowd": ""}.get(slug, told)
        suite.invalid(slug, f"one of {COUNT} plain tensors: {words}", CROWD, edit, tensor=told)
    _other_faults(suite)


def _entry_faults() -> dict[str, tuple[str, str, Edit]]:
    """Returns slug -> tensor, defect, edit."""

    def source(tensor: str, **changes: object) -> Edit:
        return of_map(tensor, "fingerprints", **changes)

    two = {"codes": [nibbles([1, 1])]}
    return {
        "TEN-001-crowd-twice": ("p07", "a name that another tensor has", entry_edit("p07", name=RAW)),
        "TEN-002-crowd": ("p07", "no name", entry_edit("p07", name="")),
        "TEN-003-crowd": (RAW, "the dtype F4", entry_edit(RAW, dtype="F4")),
        "TEN-004-crowd": (RAW, "the coding zip", entry_edit(RAW, coding="zip")),
        "TEN-005-crowd": (RAW, "2^49 positions", entry_edit(RAW, shape=[2**24, 2**25])),
        "TEN-005-crowd-zero": (
            RAW,
            "a shape with the factors 0 and 2^64",
            entry_edit(RAW, shape=[0, 2**32, 2**32]),
        ),
        "TEN-006-crowd": (ONE_CLASS, "segments of 48", entry_edit(ONE_CLASS, segment=48)),
        "TEN-006-crowd-0": (RAW, "segments of 0", entry_edit(RAW, segment=0)),
        "TEN-006-crowd-2-64": (RAW, "segments of 2^64 - 32", entry_edit(RAW, segment=2**64 - 32)),
        "TEN-006-crowd-65568": (RAW, "segments of 65568", entry_edit(RAW, segment=65568)),
        "TEN-007-crowd": (RAW, "C is 0", entry_edit(RAW, chunk=0)),
        "TEN-007-crowd-too-large": (
            RAW,
            "chunks of 2^25 positions",
            entry_edit(RAW, segment=65536, chunk=512),
        ),
        "TEN-008-crowd": (RAW, "no chunk record", entry_edit(RAW, chunks=b"")),
        "LAY-002-crowd": (RAW, "a chunk of 65 bytes", entry_edit(RAW, chunks=struct.pack("<II", 65, 0))),
        "LAY-002-crowd-0": (RAW, "a chunk of no bytes", entry_edit(RAW, chunks=bytes(8))),
        "TEN-010-crowd": (ONE_CLASS, "fingerprints of I16", _both_dtypes("I16")),
        "DIR-007-crowd": (
            RAW,
            "a mask with coding raw",
            entry_edit(RAW, mask={"kind": "octets", **table([8])}),
        ),
        "DIR-003-crowd-name": (RAW, "a name that is a number", entry_edit(RAW, name=3)),
        "DIR-003-crowd-dtype": (RAW, "a dtype that is a number", entry_edit(RAW, dtype=3)),
        "DIR-003-crowd-shape": (RAW, "a shape that is a string", entry_edit(RAW, shape="40")),
        "DIR-003-crowd-size": (RAW, "a shape of strings", entry_edit(RAW, shape=["40"])),
        "DIR-003-crowd-segment": (RAW, "a segment that is a string", entry_edit(RAW, segment="32")),
        "DIR-003-crowd-chunks": (RAW, "chunks that are a string", entry_edit(RAW, chunks="x" * 8)),
        "DIR-003-crowd-extra": (ONE_CLASS, "`extra` that is an array", source(ONE_CLASS, extra=[16])),
        "DIR-003-crowd-code": (TWO_CLASSES, "a code that is a string", source(TWO_CLASSES, codes=["x"])),
        "TAB-001-crowd": (ONE_CLASS, "no class", source(ONE_CLASS, extra=b"")),
        "TAB-002-crowd": (ONE_CLASS, "57 residual bits", source(ONE_CLASS, extra=b"\x39")),
        "TAB-004-crowd": (TWO_CLASSES, "a code of two bytes", source(TWO_CLASSES, codes=[b"\x11\0"])),
        "TAB-005-crowd": (TWO_CLASSES, "a codeword of 13 bits", source(TWO_CLASSES, codes=[b"\xd1"])),
        "TAB-006-crowd": (TWO_CLASSES, "a code of one codeword", source(TWO_CLASSES, codes=[b"\x01"])),
        "TAB-007-crowd": (TWO_CLASSES, "a code that is not complete", source(TWO_CLASSES, codes=[b"\x21"])),
        "TAB-009-crowd": (TWO_CLASSES, "no code", source(TWO_CLASSES, codes=[])),
        "TAB-009-crowd-17": (TWO_CLASSES, "17 codes", source(TWO_CLASSES, codes=two["codes"] * 17)),
        "TAB-010-crowd": (THREE_CLASSES, "bits after a code", source(THREE_CLASSES, codes=[b"\x22\x11"] * 2)),
        "QNT-008-crowd": (ONE_CLASS, "trim 2", source(ONE_CLASS, trim=2)),
        "TAB-008-crowd": (ONE_CLASS, "levels beyond the dtype's", source(ONE_CLASS, base=1)),
    }


def _both_dtypes(dtype: str) -> Edit:
    """Returns an edit that changes the dtype of a tensor and of its fingerprints."""

    def edit(file: Forge) -> None:
        entry = file.part(ONE_CLASS).entry
        entry["dtype"] = entry["fingerprints"]["dtype"] = dtype

    return edit


def _other_faults(suite: Suite) -> None:
    """Adds faults in chunks, in tensors between plain ones, and above limits."""
    damage = "one of many plain tensors: a flipped bit in a chunk, with the old checksum"

    def struck(file: Forge) -> bytes:
        data = bytearray(file.build())
        data[file.start_of(THREE_CLASSES) + 70] ^= 1
        return bytes(data)

    suite.invalid("LAY-004-crowd", damage, CROWD, struck, tensor=THREE_CLASSES)
    words = "one of many plain tensors: a bit after the elements is set"
    suite.invalid("RAW-003-crowd", words, CROWD, bit_flip("p07", 8 * 80), tensor="p07")

    def cut(taken: Any) -> None:
        bits = taken.planes["fingerprints prefix"][0]
        taken.planes["fingerprints prefix"][0] = bits[:-1]
        taken.recount()

    words = "one of many plain tensors: a prefix plane that is too short"
    suite.invalid("PLN-003-crowd", words, CROWD, of_chunk(THREE_CLASSES, cut), tensor=THREE_CLASSES)
    change = of_map("uniform", "fingerprints", step=b"\0\0\0\x80")
    words = "a step of -0 beside many plain tensors"
    suite.invalid("QNT-003-crowd", words, MIXED, change, tensor="uniform")
    for limit, edit in (("name", {"name": "x" * 1025}), ("rank", {"shape": [1] * 33})):
        words = f"one of many plain tensors exceeds the limit of its {limit}"
        told = "x" * 1025 if limit == "name" else RAW
        suite.invalid(
            f"LIM-002-crowd-{limit}", words, CROWD, entry_edit(RAW, **edit), tensor=told, plainly=None
        )
