"""Chapter 17: keyed tables, their maps and look-ups."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from sfp_conformance.forge import Forge, Part, f32_bytes, raw_part, table
from sfp_conformance.forge_keyed import Row, bit_array, row_bits, solved_rows
from sfp_conformance.slow_reader.keyed import array_bytes

from .gallery import PLAIN
from .suite import Edit, Suite

Map = dict[str, Any]

HALF = f32_bytes(0.5)
# Levels 0 to 9 of single magnitudes, then classes of 4 and 64 levels.
LEVELS = table([0] * 10 + [2, 6], [0, 0, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4])
WHOLE = {"quantiser": "uniform", "step": HALF, **LEVELS}
CHECKS = bytes([0, 0, 3, 3, 4, 4, 5, 5, 6, 6, 9, 32])
GAPS = table([0, 0, 0, 1, 0], [2, 2, 2, 3, 3])  # gaps 0, 1, 2, 3 to 4, 5


def keyed_map(name: str, outputs: int, **keys: Any) -> Map:
    """Returns the map of a table, without importance."""
    gaps = {"gaps": GAPS} if outputs > 1 else {}
    out = {"name": name, "bits": f"{name}.bits", "keys": 0, "outputs": outputs, "seed": 0, "segment": 64}
    return {**out, "starts": 128, **gaps, "levels": WHOLE, "checks": CHECKS, **keys}


def solved(source: Map, rows: dict[bytes, tuple[Row, int]]) -> tuple[Map, Part]:
    """Returns the map with its seed and number of keys, and the bit array with the rows of keys."""
    size = array_bytes(source)
    bits = {key: row_bits(source, row, importance) for key, (row, importance) in rows.items()}
    free = int.from_bytes(bytes(37 * i % 251 for i in range(size)), "little")
    found = solved_rows(source, bits, free)
    assert found is not None, "no seed solves the equations"
    return {**source, "seed": found[0], "keys": len(rows)}, bit_array(source, found[1])


def keyed_file(*tables: tuple[Map, Part], metadata: dict[str, str] | None = None) -> bytes:
    """Returns a file with keyed tables."""
    root: Map = {"features": ["keyed"], "keyed": [source for source, _ in tables]}
    return Forge(root | ({"metadata": metadata} if metadata else {}), [part for _, part in tables]).build()


ONE_ROWS: dict[bytes, tuple[Row, int]] = {
    b"": ({0: 2}, 0),
    b"a": ({0: 3}, 0),
    b"good": ({0: 6}, 0),
    b"bad": ({0: 9}, 0),
    "na\u00efve".encode(): ({0: 12}, 0),
    "nai\u0308ve".encode(): ({0: 5}, 0),
    b"exactly 16 bytes": ({0: 77}, 0),
    b"fifteen bytes..": ({0: 4}, 0),
    b"more than sixteen bytes, but less than 48": ({0: 8}, 0),
    b"\0": ({0: 7}, 0),
}
SEVERAL_ROWS: dict[bytes, tuple[Row, int]] = {
    b"none": ({}, 1),
    b"first": ({0: 4}, 2),
    b"last": ({4: 5}, 7),
    b"all": (dict(enumerate((2, 3, 4, 5, 6))), 9),
    b"some": ({1: 14, 3: 76}, 3),
    b"ends": ({0: 9, 4: 8}, 0),
}
STRANGERS = [b"nobody", b"\xff\xfe", b"x" * 100, b"Good", b"a\0", *(f"word {i}".encode() for i in range(40))]


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    one = solved(keyed_map("one", 1), ONE_ROWS)
    importance = {"step": f32_bytes(0.25), **table([0, 1, 3], [1, 2, 2])}
    several = solved(keyed_map("several", 5, importance=importance, starts=256), SEVERAL_ROWS)
    centroids = struct.pack("<4f", 0.0, 0.25, 1.5, 3e38)
    by_table = {"quantiser": "table", "count": 4, "centroids": centroids, **table([1, 2], [1, 1], base=2)}
    tabled = solved(
        keyed_map("tabled", 1, levels=by_table, checks=b"\x08\x20", segment=8, starts=256),
        {b"quarter": ({0: 2}, 0), b"most": ({0: 7}, 0), b"minus": ({0: 5}, 0)},
    )
    blank = solved(
        keyed_map("blank", 1, levels={**WHOLE, **table([0], base=8)}, checks=b"\0", segment=8, starts=8), {}
    )
    good = suite.valid(
        "KEY-002-tables",
        "three keyed tables",
        keyed_file(one, several, tabled, metadata={"kind": "words"}),
        *(f"R-KEY-{n:03d}" for n in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)),
        *("R-DIR-002", "R-FEA-001", "R-TEN-002", "R-QNT-003", "R-QNT-006", "R-IMP-006"),
    )
    data = suite.cases[good].data
    keys = [*ONE_ROWS, *SEVERAL_ROWS, b"quarter", b"most", b"minus", *STRANGERS]
    suite.looked_up(
        "KEY-015-tables", "keys of three tables, and others", data, keys, "R-KEY-014", "R-KEY-016"
    )
    suite.looked_up("KEY-015-no-keys", "no keys", data, [])
    suite.looked_up("KEY-015-blank", "a table in which every key is known", keyed_file(blank), [b"", b"a"])
    model = raw_part("weight", "F32", [2], struct.pack("<2f", 1, -2))
    source, bits = one
    suite.valid(
        "PRO-001-keyed",
        "a tensor and a keyed table, which readers of the profile core refuse",
        Forge({"features": ["keyed"], "keyed": [source]}, [model, bits]).build(),
    )
    _limits(suite)
    _keys_of_maps(suite, good)
    _values(suite, good)
    _arrays(suite, good)


def _limits(suite: Suite) -> None:
    """Adds tables whose fields have their least and greatest values."""
    key: dict[bytes, tuple[Row, int]] = {b"key": ({0: 3}, 0)}
    limits: dict[str, Map] = {
        "most-outputs": {"outputs": 4096, "gaps": table([12]), "levels": {**WHOLE, **table([0], base=3)}}
        | {"checks": b"\x01", "segment": 1 << 13},
        "most-classes": {"levels": {**WHOLE, **table([0] * 4096, [1, 1] + [0] * 4094, base=3)}}
        | {"checks": bytes([1, *([32] * 4095)])},
        "greatest-seed": {"seed": (1 << 32) - 1},
        "equal": {"segment": 128, "starts": 128},
    }
    for slug, values in limits.items():
        source = {**keyed_map("limit", 1), **values}
        source["starts"] = max(source["starts"], source["segment"])
        made = solved(source, {} if slug == "most-outputs" else key)
        suite.looked_up(
            f"KEY-004-{slug}", f"a table: {slug}", keyed_file(made), [b"key", b"other"], "R-KEY-006"
        )


def _table_edit(change: Callable[[Map], object], number: int = 0) -> Edit:
    def edit(file: Forge) -> None:
        change(file.root["keyed"][number])

    return edit


def _set(key: str, value: object, number: int = 0) -> Edit:
    return _table_edit(lambda source: source.update({key: value}), number)


def _inner(where: str, key: str, value: object, number: int = 0) -> Edit:
    return _table_edit(lambda source: source[where].update({key: value}), number)


def _without(key: str, number: int, where: str | None = None) -> Edit:
    """Returns an edit that removes a key of a table, or of one of its maps."""
    return _table_edit(lambda source: (source if where is None else source[where]).pop(key), number)


def _updated(where: str, new: Map) -> Edit:
    """Returns an edit that replaces keys of a map of the second table."""
    return _table_edit(lambda source: source[where].update(new), 1)


def _keys_of_maps(suite: Suite, good: str) -> None:
    """Adds files in which a key is missing, misplaced, or of a wrong type."""
    names = ("name", "bits", "keys", "outputs", "seed", "segment", "starts", "levels", "checks")
    for key in (*names, "gaps"):
        words = f"a keyed table without `{key}`"
        drop = _without(key, 1)
        suite.invalid(f"DIR-002-keyed-{key}", words, good, drop)
        wrong: object = 1 if key in ("name", "bits", "checks", "levels", "gaps") else b"1"
        suite.invalid(f"DIR-003-keyed-{key}", f"`{key}` of the wrong type", good, _set(key, wrong, 1))
    suite.invalid(
        "DIR-003-keyed-importance", "`importance` of the wrong type", good, _set("importance", [], 1)
    )
    suite.invalid("DIR-003-keyed", "a value that is a map", good, lambda file: file.root.update(keyed={}))
    suite.invalid(
        "DIR-003-keyed-element", "a table that is a string", good, lambda f: f.root["keyed"].append("a")
    )
    for where, key in (
        ("levels", "step"),
        ("levels", "quantiser"),
        ("importance", "step"),
        ("gaps", "extra"),
    ):
        drop = _without(key, 1, where)
        suite.invalid(f"DIR-002-keyed-{where}-{key}", f"`{where}` without `{key}`", good, drop)
        suite.invalid(
            f"DIR-003-keyed-{where}-{key}", f"`{key}` of the wrong type", good, _inner(where, key, 1, 1)
        )
    for key in ("count", "centroids"):
        drop = _without(key, 2, "levels")
        suite.invalid(f"DIR-002-keyed-levels-{key}", f"`table` without `{key}`", good, drop)
        suite.invalid(f"DIR-007-keyed-{key}", f"`{key}` with `uniform`", good, _inner("levels", key, b"", 0))
        suite.invalid(
            f"DIR-003-keyed-{key}", f"`{key}` of the wrong type", good, _inner("levels", key, "a", 2)
        )
    suite.invalid("DIR-007-keyed-step", "`step` with `table`", good, _inner("levels", "step", HALF, 2))
    suite.invalid("DIR-007-keyed-gaps", "`gaps` with one output", good, _set("gaps", GAPS))
    suite.invalid(
        "DIR-007-keyed", "the key without the feature", good, lambda file: file.root.pop("features") and None
    )
    suite.invalid(
        "DIR-007-keyed-of-a-model", "the key in a model", PLAIN, lambda file: file.root.update(keyed=[])
    )
    suite.invalid(
        "DIR-002-keyed", "the feature without the key", good, lambda file: file.root.pop("keyed") and None
    )

    def unknown(file: Forge) -> None:
        for source in file.root["keyed"]:
            for fields in (source, *(value for value in source.values() if isinstance(value, dict))):
                fields.update({"x-mine": [1], "x-later": {}})

    file = Forge.of(suite.cases[good].data)
    unknown(file)
    suite.valid("DIR-005-in-keyed-tables", "unknown keys in the maps of keyed tables", file.build())


def _values(suite: Suite, good: str) -> None:
    """Adds files in which a value of a map is out of range."""
    suite.invalid("KEY-002-no-tables", "no table", good, lambda file: file.root.update(keyed=[]))
    suite.invalid("KEY-003-twice", "two tables of one name", good, _set("name", "one", 1))
    suite.invalid("TEN-002-keyed", "a table without a name", good, _set("name", ""))
    for value in (0, 4097, 2**64 - 1):
        suite.invalid(f"KEY-004-{value}", f"{value} outputs", good, _set("outputs", value, 1))
    for value in (2**32, 2**64 - 1):
        suite.invalid(f"KEY-005-{value}", f"a seed of {value}", good, _set("seed", value))
    for value in (0, 4, 96, 2**25, 2**64 - 1):
        suite.invalid(f"KEY-006-segment-{value}", f"a segment of {value}", good, _set("segment", value))
    for value in (0, 32, 65, 2**32 + 64):
        suite.invalid(f"KEY-006-starts-{value}", f"{value} starts", good, _set("starts", value))
    pairs = table([0, 0], [1, 2, 3, 3], group=2)
    for where in ("gaps", "levels", "importance"):
        several = table([0, 0], [1, 1], [1, 1])
        suite.invalid(f"KEY-007-{where}-pairs", "pairs of levels", good, _updated(where, pairs))
        codes = _updated(where, several)
        suite.invalid(f"KEY-007-{where}-codes", "two codes", good, codes)
        windows = {**table([0, 0, 0]), "window": 1}
        edit = _updated(where, windows)
        suite.invalid(f"KEY-007-{where}-windows", "windows", good, edit)
    for word in ("exact", "trellis", "x-mine"):
        edit = _inner("levels", "quantiser", word)
        suite.invalid(f"KEY-008-{word}", f"the quantiser {word!r}", good, edit, tags=["future"])
    for slug, numbers in {
        "three": (0.0, 0.25, 1.5),
        "five": (0.0, 0.25, 1.5, 2.0, 3.0),
        "equal": (0.0, 0.25, 0.25, 2.0),
        "descending": (0.0, 1.5, 0.25, 2.0),
        "infinite": (0.0, 0.25, 1.5, float("inf")),
        "negative": (-1.0, 0.25, 1.5, 2.0),
        "minus-zero": (-0.0, 0.25, 1.5, 2.0),
        "nan": (0.0, 0.25, 1.5, float("nan")),
    }.items():
        data = struct.pack(f"<{len(numbers)}f", *numbers)
        suite.invalid(f"KEY-009-{slug}", f"centroids: {slug}", good, _inner("levels", "centroids", data, 2))
    odd = _inner("levels", "centroids", struct.pack("<4f", 0, 1, 2, 3) + b"\0", 2)
    suite.invalid("KEY-009-odd", "centroids of 17 bytes", good, odd)
    for slug, checks in {
        "few": CHECKS[1:],
        "many": CHECKS + b"\0",
        "none": b"",
        "33": b"\x21" + CHECKS[1:],
    }.items():
        suite.invalid(f"KEY-010-{slug}", f"checks: {slug}", good, _set("checks", checks))
    for slug, step in {"zero": bytes(4), "infinite": f32_bytes(float("inf")), "short": b"\0\0\x80"}.items():
        for where in ("levels", "importance"):
            edit = _inner(where, "step", step, 1)
            suite.invalid(f"QNT-003-keyed-{where}-{slug}", f"a step: {slug}", good, edit)
    suite.invalid(
        "QNT-006-keyed", "a step that is too great", good, _inner("levels", "step", f32_bytes(3e38))
    )
    great = _inner("importance", "step", f32_bytes(3e38), 1)
    suite.invalid("IMP-006-keyed", "a step of the importance that is too great", good, great)
    suite.invalid("QNT-004-keyed", "no centroids", good, _inner("levels", "count", 0, 2))
    for where, number, base in (
        ("gaps", 1, 1),
        ("levels", 0, 2**32),
        ("levels", 2, 4),
        ("importance", 1, 2**31),
    ):
        edit = _inner(where, "base", base, number)
        suite.invalid(f"TAB-008-keyed-{where}-{number}", "levels above their bound", good, edit)


def _arrays(suite: Suite, good: str) -> None:
    """Adds files whose bit array is missing or another one."""
    suite.invalid("KEY-011-missing", "a bit array that does not exist", good, _set("bits", "other"))
    suite.invalid("KEY-012-shared", "two tables with one bit array", good, _set("bits", "one.bits", 1))

    def replaced(change: Callable[[Map, bytes], Part]) -> Edit:
        def edit(file: Forge) -> None:
            part = file.part("one.bits")
            data = b"".join(part.chunks)[: part.entry["shape"][0]]
            file.parts[file.parts.index(part)] = change(part.entry, data)

        return edit

    for slug, change in {
        "longer": lambda entry, data: raw_part("one.bits", "U8", [len(data) + 1], data + b"\0", 32, 2),
        "shorter": lambda entry, data: raw_part("one.bits", "U8", [len(data) - 1], data[:-1], 32, 2),
        "signed": lambda entry, data: raw_part("one.bits", "I8", [len(data)], data, 32, 2),
        "shape": lambda entry, data: raw_part("one.bits", "U8", [len(data) // 8, 8], data, 32, 2),
        "gaps": lambda entry, data: raw_part("one.bits", "U8", [len(data)], data, 32, 1),
    }.items():
        suite.invalid(f"KEY-011-{slug}", f"a bit array: {slug}", good, replaced(change), tensor="one.bits")
    both = {"features": ["delta", "keyed"]}
    suite.invalid("KEY-013-delta", "both features", good, lambda file: file.root.update(both))
