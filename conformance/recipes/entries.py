"""Chapter 7: tensor entries."""

from __future__ import annotations

import struct
from typing import Any

from sfp_conformance.forge import Forge, exact, hand_file, hand_part, patterns, raw_part, table

from .edits import of_map
from .gallery import ALL, ONE, parts
from .suite import Edit, Suite

WRONG_TYPES: dict[type, dict[str, object]] = {
    int: {"string": "1", "array": [1]},
    str: {"integer": 1, "binary": b"exact"},
    bytes: {"string": "exact", "integer": 1},
    list: {"map": {"a": 1}, "binary": b""},
    dict: {"array": [], "string": "exact"},
}
# Keys that a writer may leave out: the tensor then has no mask, scale or importance.
OPTIONAL = {("entry", "mask"), ("entry", "scale"), ("entry", "importance")}
MAPS = ("mask", "fingerprints", "scale", "importance")
STEP = struct.pack("<f", 0.5)
# Tensor and map -> keys that its table in SPEC.md lists, but whose condition does not hold, with values that
# would be valid elsewhere.
MISPLACED: dict[tuple[str, str], dict[str, object]] = {
    ("octets", "mask"): {"polarity": 1},
    ("octets", "fingerprints"): {"step": STEP, "count": 3},
    ("uniform", "fingerprints"): {"dtype": "F32", "trim": 0, "count": 3},
    ("table", "fingerprints"): {"dtype": "F16", "trim": 0, "step": STEP},
    ("empty", "scale"): {"size": 7},
    ("uniform", "scale"): {"size": 7},
    ("table", "scale"): {"size": 24},
    ("group", "importance"): {"step": STEP, "count": 3},
    ("uniform", "importance"): {"dtype": "F32", "trim": 0, "count": 3},
    ("coded", "importance"): {"dtype": "F32", "trim": 0, "step": STEP},
    ("table", "importance"): {"quantiser": "exact", "trim": 0, "step": STEP, "count": 3, **table([0])},
}


def entry_edit(tensor: str, /, **changes: object) -> Edit:
    """Returns an edit that changes keys of a tensor's entry."""
    return lambda file: file.part(tensor).entry.update(changes)


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    for name in ("raw", "runs", "uniform", "table", "group", "coded"):
        _keys_and_types(suite, name)
    _names(suite)
    _words(suite)
    _shapes(suite)
    _segments(suite)
    _records(suite)
    _vectors(suite)
    _misplaced(suite)


def _keys_and_types(suite: Suite, name: str) -> None:
    entry = Forge.of(suite.cases[ONE[name]].data).part(name).full_entry()
    for where, fields in [("entry", entry), *((key, entry[key]) for key in MAPS if key in entry)]:
        for key, value in fields.items():
            tensor = None if key == "name" else name
            if (where, key) not in OPTIONAL:
                words = f"no `{key}` in {where} of `{name}`"
                slug = f"DIR-002-{name}-{where}-{key}"
                suite.invalid(slug, words, ONE[name], _changed(where, key), tensor=tensor)
            for kind, wrong in WRONG_TYPES[type(value)].items():
                words = f"`{key}` in {where} of `{name}` is of the type {kind}"
                slug = f"DIR-003-{name}-{where}-{key}-{kind}"
                suite.invalid(slug, words, ONE[name], _changed(where, key, wrong), tensor=tensor)


def _changed(where: str, key: str, *value: object) -> Edit:
    """Returns an edit that changes or removes a key."""

    def edit(file: Forge) -> None:
        file.root["tensors"] = [part.full_entry() for part in file.parts]
        entry = file.root["tensors"][0]
        fields = entry if where == "entry" else entry[where]
        if value:
            fields[key] = value[0]
        else:
            del fields[key]

    return edit


def _names(suite: Suite) -> None:
    suite.invalid(
        "TEN-001-twice",
        "two tensors with the same name",
        ALL,
        entry_edit("octets", name="runs"),
        tensor="runs",
    )
    names = ["é", "e\u0301", "É", " ", "a/../b", "\x1b[31m", "a", "a" * 31, "a" * 32, "a" * 256, "\u00a0"]
    made = [raw_part(name, "U8", [3], bytes([i] * 3)) for i, name in enumerate(names)]
    suite.valid(
        "TEN-001-names-that-look-alike", "names that look alike but differ in their bytes", hand_file(*made)
    )
    empty = entry_edit("flags", name="")
    suite.invalid("TEN-002-empty", "a tensor without a name", ONE["flags"], empty, tensor="")
    one = hand_file(raw_part("a", "U8", [1], b"a"))
    suite.valid("TEN-002-one-byte", "a name of one byte", one, "R-TEN-001")


def _words(suite: Suite) -> None:
    dtypes = ("", "f32", "F4", "F6_E2M3", "F6_E3M2", "F128", "BF16 ", "FLOAT32", "x-mine")
    for i, dtype in enumerate(dtypes):
        edit = entry_edit("raw", dtype=dtype)
        suite.invalid(f"TEN-003-{i}", f"the dtype {dtype!r}", ONE["raw"], edit, tensor="raw")
    for i, coding in enumerate(("", "RAW", "zip", "x-mine")):
        edit = entry_edit("raw", coding=coding)
        suite.invalid(f"TEN-004-{i}", f"the coding {coding!r}", ONE["raw"], edit, tensor="raw")
    for dtype in ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "C64", "C128"):
        edit = entry_edit("runs", dtype=dtype)
        words = f"fingerprints of the dtype {dtype}"
        suite.invalid(f"TEN-010-{dtype}", words, ONE["runs"], edit, tensor="runs")
    for dtype in ("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        edit = entry_edit("runs", dtype=dtype)
        words = f"fingerprints of the dtype {dtype}"
        suite.invalid(f"TEN-010-{dtype.replace('_', '-')}", words, ONE["runs"], edit, tensor="runs")


def _shapes(suite: Suite) -> None:
    shapes: dict[str, list[int]] = {
        "2-48-and-1": [2**48 + 1],
        "three-factors": [2**24, 2**24, 2],
        "zero-first": [0, 2**48 + 1],
        "zero-between": [2**25, 0, 2**24],
        "2-64-less-1": [2**64 - 1],
        "zero-and-2-64-less-1": [0, 2**64 - 1],
        "product-wraps": [2**32, 2**32],
        "product-wraps-to-1": [2**63 + 1, 2**63 + 1],
        "rank-32": [2**64 - 1] * 32,
    }
    for slug, shape in shapes.items():
        edit = entry_edit("empty", shape=shape)
        words = f"the shape {shape if len(shape) < 9 else slug}"
        suite.invalid(f"TEN-005-{slug}", words, ONE["empty"], edit, tensor="empty", tags=["hostile"])
    empties = {"0": [0], "0-0": [0, 0], "2-48-0": [2**48, 0], "0-2-24-2-24": [0, 2**24, 2**24]}
    for slug, shape in {**empties, "1-0-1-1-5": [1, 0, 1, 1, 5], "rank-32": [0] * 32}.items():
        for name in ("raw", "empty"):
            part = parts()[name]
            part.entry["shape"], part.chunks = shape, []
            suite.valid(f"TEN-005-{name}-{slug}", f"an empty tensor of shape {shape}", hand_file(part))
    for slug, value in (("string", ["4", 24]), ("array", [4, [24]]), ("binary", [b"\4", 24])):
        edit = entry_edit("runs", shape=value)
        suite.invalid(
            f"DIR-003-shape-of-{slug}", "a shape of the wrong type", ONE["runs"], edit, tensor="runs"
        )

    def code(file: Forge) -> None:
        codes = file.part("runs").entry["mask"]["codes"]
        codes[0] = "x" * len(codes[0])

    suite.invalid("DIR-003-code-string", "a code that is a string", ONE["runs"], code, tensor="runs")


def _segments(suite: Suite) -> None:
    for segment in (0, 1, 31, 33, 48, 65535, 65568, 2**32, 2**32 + 32, 2**64 - 32):
        edit = entry_edit("runs", segment=segment)
        suite.invalid(f"TEN-006-{segment}", f"segments of {segment}", ONE["runs"], edit, tensor="runs")
    for segment, chunk in ((32, 0), (32, 2**19 + 1), (65536, 257), (32, 2**59), (32, 2**64 - 1)):
        edit = entry_edit("runs", segment=segment, chunk=chunk)
        words = f"chunks of {chunk} segments of {segment}"
        suite.invalid(f"TEN-007-{segment}-{chunk}", words, ONE["runs"], edit, tensor="runs")
    for segment, chunk in ((32, 1), (64, 1), (32, 2**19), (65536, 256), (65536, 1), (96, 174762)):
        part = parts()["flags"]
        part.entry |= {"segment": segment, "chunk": chunk}
        words = f"chunks of {chunk} segments of {segment}"
        suite.valid(f"TEN-007-{segment}-{chunk}", words, hand_file(part), "R-TEN-006")


def _records(suite: Suite) -> None:
    def edit(change: str) -> Edit:
        def change_records(file: Forge) -> None:
            part = file.part("runs")
            records = part.full_entry()["chunks"]
            part.entry["chunks"] = {
                "one-less": records[:-8],
                "one-more": records + records[-8:],
                "half-a-record": records[:-4],
                "none": b"",
            }.get(change, records)
            if change == "empty-tensor":
                part.entry["shape"] = [0, 24]

        return change_records

    for change in ("one-less", "one-more", "half-a-record", "none", "empty-tensor"):
        words = f"chunk records: {change.replace('-', ' ')}"
        suite.invalid(f"TEN-008-{change}", words, ONE["runs"], edit(change), tensor="runs")
    huge = entry_edit("empty", shape=[2**48])
    words = "2^48 positions and no chunk"
    suite.invalid("TEN-008-2-48", words, ONE["empty"], huge, tensor="empty", tags=["hostile"])


def _vectors(suite: Suite) -> None:
    def put(name: str, vectors: bytearray | None) -> Edit:
        return lambda file: setattr(file.part(name), "vectors", vectors)

    words = "vectors, but neither `vectors` nor a vector chunk"
    suite.invalid("DIR-002-no-vector-chunk", words, ONE["coded"], put("coded", None), tensor="coded")
    for name in ("runs", "empty"):
        words = "`vectors` and a vector chunk, but no vectors"
        suite.invalid(
            f"DIR-007-{name}-entry-vectors", words, ONE[name], put(name, bytearray(64)), tensor=name
        )
    source = {"quantiser": "table", "count": 3, **table([0])}
    entry: dict[str, Any] = {"dtype": "F32", "shape": [0, 2], "fingerprints": source}
    centroids = patterns("F32", 1.0, 2.0, 3.0)
    part = hand_part(entry, {}, vectors={"fingerprint centroids": centroids})
    suite.valid("DIR-007-empty-with-centroids", "an empty tensor that has centroids", hand_file(part))
    for size in (0, 7, 9, 16):

        def cut(file: Forge, size: int = size) -> None:
            part = file.part("coded")
            part.entry["vectors"] = (part.full_entry()["vectors"] * 2)[:size]

        words = f"`vectors` of {size} bytes"
        suite.invalid(f"TEN-012-{size}-bytes", words, ONE["coded"], cut, tensor="coded")


def _misplaced(suite: Suite) -> None:
    """Adds files with keys whose conditions do not hold."""
    for (name, where), keys in MISPLACED.items():
        for key, value in keys.items():
            words = f"`{key}` in {where} of `{name}`, where its condition does not hold"
            change = of_map(name, where, **{key: value})
            suite.invalid(f"DIR-007-{name}-{where}-{key}", words, ONE[name], change, tensor=name)
    for name, where, key in (
        ("octets", "mask", "polarity"),
        ("table", "fingerprints", "step"),
        ("table", "scale", "size"),
    ):
        for slug, value in (("integer", 0), ("string", "a"), ("map", {})):
            words = f"a misplaced `{key}` whose value is of the type {slug}"
            change = of_map(name, where, **{key: value})
            suite.invalid(f"DIR-007-{name}-{where}-{key}-{slug}", words, ONE[name], change, tensor=name)
    for per in ("tensor", "row", "column"):

        def edit(file: Forge, per: str = per) -> None:
            part = file.part("runs")
            part.entry["scale"] = {"per": per, "dtype": "F32"}
            part.vectors = bytearray(b"\0\0\x80\x3f" * 32)

        words = f"a scale per {per} with quantiser exact"
        suite.invalid(f"DIR-007-runs-entry-scale-{per}", words, ONE["runs"], edit, tensor="runs")
    _raw(suite)


def _raw(suite: Suite) -> None:
    streams = parts()["uniform"].entry
    for key in MAPS:
        edit = entry_edit("raw", **{key: streams[key]})
        suite.invalid(f"DIR-007-raw-entry-{key}", f"`{key}` with coding raw", ONE["raw"], edit, tensor="raw")

    def vectors(file: Forge) -> None:
        file.part("raw").vectors = bytearray(64)

    suite.invalid("DIR-007-raw-entry-vectors", "`vectors` with coding raw", ONE["raw"], vectors, tensor="raw")
    wrong = exact("F32", **table([0]))
    for slug, value in (("integer", 1), ("empty-map", {}), ("exact", wrong)):
        words = f"`fingerprints` with coding raw: {slug.replace('-', ' ')}"
        edit = entry_edit("raw", fingerprints=value)
        suite.invalid(f"DIR-007-raw-entry-fingerprints-{slug}", words, ONE["raw"], edit, tensor="raw")
