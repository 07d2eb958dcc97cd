"""Checks which clauses and field limits the golden files cover.

python -m tests.support.conformance_gates            # for each clause, how many files accept and refuse it
python -m tests.support.conformance_gates --missing  # lists what is not covered; exit status 1 if anything is
"""

from __future__ import annotations

import struct
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from sfp_conformance import slow_reader

from .clauses import clauses_of_spec
from .conformance_cases import cases, data_of, manifest

# Clauses that no file can test, each with the reason.
UNTESTABLE: dict[str, str] = {
    "R-CNV-005": "a summary: each kind of padding and reserved bits has a clause of its own",
    "R-LAY-005": "answers do not show what a reader reads",
    "R-MSG-008": "answers do not show the order of allocation; hostile cases bound the memory",
    "R-STR-001": "every case tests it",
    "R-STR-002": "every refused case tests it",
    "R-STR-003": "every case has a time limit",
    "R-STR-004": "answers do not show what a reader runs",
    "R-STR-005": "about what a writer does when it fails",
    "R-STR-006": "every case for validators tests it",
    "R-LIM-003": "answers do not show the order of checks; hostile cases bound the memory",
    "R-SHD-001": "about sets of files",
    "R-SHD-002": "about sets of files",
    "R-SHD-003": "about the order of writing",
    "R-DLT-014": "answers do not show what a user asked for",
    "R-DLT-015": "about programs that change a base in place",
    "R-DLT-030": "about parts of tensors",
    "R-FEA-003": "only its author knows whether a name is private",
}

# Clauses that no file can violate: they define how bytes are interpreted.
UNBREAKABLE: dict[str, str] = {
    "R-CNV-001": "another order of bytes is another number",
    "R-CNV-002": "another order of bits is another sequence",
    "R-CNV-003": "another order of bits is another number",
    "R-CNV-004": "a wrong checksum breaks R-PRE-003, R-PRE-010 or R-LAY-004",
    "R-PRE-005": "a greater minor must be accepted",
    "R-LAY-001": "a chunk elsewhere breaks R-LAY-003 or R-LAY-004",
    "R-DIR-005": "unknown keys must be accepted",
    "R-DIR-006": "only its author knows the purpose of a key",
    "R-COD-001": "another assignment is another sequence of levels",
    "R-COD-002": "another order of bits is another sequence of levels",
    "R-PLN-001": "another order is another sequence of levels",
    "R-REC-001": "about results",
    "R-REC-002": "about results",
    "R-REC-003": "about results",
    "R-REC-004": "about results",
    "R-REC-005": "about results",
    "R-REC-006": "about results",
    "R-RAW-001": "about results",
    "R-DLT-013": "about results",
    "R-DLT-021": "about results",
    "R-KEY-014": "about results",
    "R-KEY-015": "about results",
    "R-KEY-016": "about results",
    "R-PRO-001": "the full profile has every feature, so the reference accepts the file",
    "R-LIM-001": "files beyond it break R-LIM-002",
} | {f"R-CAN-{i:03}": "a file that is not canonical must be accepted" for i in range(1, 12)}

# Outcomes of accepted and refused files.
ACCEPTED = ("accept",)
REFUSED = ("reject", "unsupported")


def counts() -> dict[str, Counter[str]]:
    """Clause -> how many cases accept and refuse a file; valid twins count as accepted."""
    out: dict[str, Counter[str]] = defaultdict(Counter)
    for case in cases("yfhn"):
        if case["expected"]["outcome"] in ACCEPTED:
            for clause in case["clauses"]:
                out[clause]["accepted"] += 1
            continue
        for error in case["expected"]["errors"]:
            out[error["clause"]]["refused"] += 1
            out[error["clause"]]["accepted"] += "twin" in case
    return out


def uncovered() -> list[str]:
    """Returns the clauses without a case."""
    found, out = counts(), []
    for clause in clauses_of_spec():
        if clause.id in UNTESTABLE:
            continue
        if not found[clause.id]["accepted"]:
            out.append(f"{clause.id}: no accepted case")
        if not found[clause.id]["refused"] and clause.id not in UNBREAKABLE:
            out.append(f"{clause.id}: no refused case")
    return out


# ------------------------------------------------------------------------------------------ borders of fields

# Field -> values that accepted files must have, and per clause values that refused ones must have.
BORDERS: dict[str, tuple[set[int], dict[str, set[int]]]] = {
    "major": ({1}, {"R-PRE-004": {0, 2, 65535}}),
    "minor": ({0, 1, 65535}, {}),
    "segment": ({32, 65536}, {"R-TEN-006": {0, 31, 33, 65568, 2**64 - 32}}),
    "chunk": ({1, 2**19}, {"R-TEN-007": {0, 2**19 + 1, 2**64 - 1}}),
    "chunk positions": ({32, 2**24}, {"R-TEN-007": {2**24 + 32, 2**24 + 65536}}),
    "rank": ({0, 1, 8, 32}, {"R-LIM-002": {33}}),
    "name bytes": ({1, 1024}, {"R-TEN-002": {0}, "R-LIM-002": {1025}}),
    "positions, zeros left out": ({2**48}, {"R-TEN-005": {2**48 + 1}}),
    "group": ({1, 2}, {"R-TAB-003": {0, 3, 2**64 - 1}}),
    "classes, group 1": ({1, 2, 4096}, {"R-TAB-001": {0, 4097}}),
    "classes, group 2": ({2, 64}, {"R-TAB-001": {1, 65}}),
    "extra": ({0, 56}, {"R-TAB-002": {57, 255}}),
    "codes": ({0, 1, 2, 16}, {"R-TAB-009": {0, 1, 17}}),
    "window": ({1, 2, 3, 4}, {"R-TAB-011": {0, 5, 255, 2**64 - 1}}),
    "classes, symbols of 1 bits": ({2, 256}, {"R-TAB-012": {1}}),
    "classes, symbols of 2 bits": ({3, 256}, {"R-TAB-012": {2}}),
    "classes, symbols of 3 bits": ({7, 256}, {"R-TAB-012": {6, 257}}),
    "classes, symbols of 4 bits": ({15, 256}, {}),
    "code length": ({1, 12}, {"R-TAB-005": {13, 14, 15}}),
    "symbols used": ({2, 256}, {"R-TAB-006": {0, 1, 257}}),
    "polarity": ({0, 1}, {"R-MSK-002": {2, 2**64 - 1}}),
    "trim": ({0, 1}, {"R-QNT-008": {2, 2**64 - 1}}),
    "count": ({1, 65536}, {"R-QNT-004": {0, 65537, 2**64 - 1}}),
    "size": ({1, 2**40}, {"R-SCL-002": {0}}),
    "index width": ({0, 32}, {"R-IDX-001": {33, 255}}),
    "block": ({1, 2**24}, {"R-DLT-005": {0, 2**24 + 1, 2**64 - 1}}),
    "kind": ({0, 1, 2, 3, 4}, {"R-DLT-003": {5, 255}}),
    "mask of a structure": ({0, 1}, {"R-DLT-019": {2, 2**64 - 1}}),
    "outputs": ({1, 4096}, {"R-KEY-004": {0, 4097, 2**64 - 1}}),
    "seed": ({0, 2**32 - 1}, {"R-KEY-005": {2**32, 2**64 - 1}}),
    "segment of a keyed table": ({8}, {"R-KEY-006": {0, 4, 96, 2**25, 2**64 - 1}}),
    "starts": ({8}, {"R-KEY-006": {0, 32, 65, 2**32 + 64}}),
    "checks": ({0, 32}, {"R-KEY-010": {33}}),
}


def values_of(data: bytes) -> Iterator[tuple[str, int]]:
    """Yields the fields of `BORDERS` in a file, and their values, as far as the file can be read."""
    yield "major", struct.unpack_from("<H", data, 8)[0]
    yield "minor", struct.unpack_from("<H", data, 10)[0]
    at, size = struct.unpack_from("<QQ", data, 16)
    root = slow_reader.MessagePack(data[at : at + size]).value()
    if "delta" in root:
        yield "block", root["delta"]["block"]
        yield from (("kind", kind) for kind in root["delta"]["kinds"])
        maps = root["delta"].get("structures", [])
        structures = [map_ for map_ in maps if isinstance(map_, dict)] if isinstance(maps, list) else []
        yield from (("mask of a structure", map_["mask"]) for map_ in structures if "mask" in map_)
    for table in root.get("keyed", []):
        yield from ((key, table[key]) for key in ("outputs", "seed", "starts"))
        yield "segment of a keyed table", table["segment"]
        yield from (("checks", bits) for bits in table["checks"])
    pos = 64
    for entry in root["tensors"]:
        yield from _entry_values(entry)
        for length, _ in struct.iter_unpack("<II", entry.get("vectors", b"")):
            pos += length
        for length, _ in struct.iter_unpack("<II", entry["chunks"]):
            if entry["coding"] == "fingerprint" and _tables_are_known(entry):
                for i in range(len(slow_reader.quantities(entry))):
                    yield "index width", data[pos + 8 * i + 4]
            pos += length


def _tables_are_known(entry: dict[str, Any]) -> bool:
    """Returns whether symbols and windows of each stream can be counted.

    K^g and 2^w are unbounded for an invalid g or w.
    """
    streams = (
        entry[name] for name in ("mask", "fingerprints", "importance") if "group" in entry.get(name, {})
    )
    return all(stream["group"] in (1, 2) and stream.get("window", 1) in range(1, 5) for stream in streams)


def _entry_values(entry: dict[str, Any]) -> Iterator[tuple[str, int]]:
    yield "segment", entry["segment"]
    yield "chunk", entry["chunk"]
    yield "chunk positions", entry["segment"] * entry["chunk"]
    yield "rank", len(entry["shape"])
    yield "name bytes", len(entry["name"].encode())
    product = 1
    for length in entry["shape"]:
        product *= length or 1
    yield "positions, zeros left out", product
    for where in ("mask", "fingerprints", "scale", "importance"):
        for key in ("group", "window", "polarity", "trim", "count", "size"):
            if key in entry.get(where, {}):
                yield key, entry[where][key]
        if "extra" in entry.get(where, {}):
            yield from _table_values(entry[where])


def _table_values(table: dict[str, Any]) -> Iterator[tuple[str, int]]:
    if "window" in table:
        yield f"classes, symbols of {table['window']} bits", len(table["extra"])
    elif table["group"] in (1, 2):
        yield f"classes, group {table['group']}", len(table["extra"])
    yield "codes", len(table["codes"])
    yield from (("extra", extra) for extra in set(table["extra"]))
    for code in table["codes"]:
        fields = [byte >> shift & 15 for byte in code for shift in (0, 4)]
        yield from (("code length", length) for length in set(fields) if length)
        yield "symbols used", sum(1 for length in fields if length)


def borders_seen() -> tuple[dict[str, set[int]], dict[tuple[str, str], set[int]]]:
    """Field -> values in accepted files; (clause, field) -> values in files refused by that clause."""
    accepted: dict[str, set[int]] = defaultdict(set)
    refused: dict[tuple[str, str], set[int]] = defaultdict(set)
    wanted = {clause for _, past in BORDERS.values() for clause in past}
    for case in cases("yfhn"):
        if case["expected"]["outcome"] in ACCEPTED:
            for name, value in values_of(data_of(case)):
                accepted[name].add(value)
        elif wanted & set(case["clauses"]):
            try:
                for name, value in values_of(data_of(case)):
                    refused[case["clauses"][0], name].add(value)
            except (KeyError, TypeError, IndexError, struct.error, slow_reader.Bad):
                continue  # the fields before the damage are enough
    return accepted, refused


def borders_missing() -> list[str]:
    """Returns the limit values of fields that no case has."""
    accepted, refused = borders_seen()
    out = []
    for name, (inside, past) in BORDERS.items():
        out += [f"{name} = {value}: not accepted anywhere" for value in sorted(inside - accepted[name])]
        for clause, values in past.items():
            gone = values - refused[clause, name]
            out += [f"{name} = {value}: not refused by {clause} anywhere" for value in sorted(gone)]
    return out


def main(words: list[str]) -> int:
    """Runs the command."""
    gaps = uncovered() + borders_missing()
    if "--missing" in words:
        print("\n".join(gaps))
        return 1 if gaps else 0
    found = counts()
    for clause in clauses_of_spec():
        reason = UNTESTABLE.get(clause.id) or UNBREAKABLE.get(clause.id, "")
        print(clause.id, found[clause.id]["accepted"], found[clause.id]["refused"], reason)
    print(Counter(case["class"] for case in manifest()["cases"]))
    return 1 if gaps else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
