"""Chapters 11 and 13: quantisers of fingerprints and importance."""

from __future__ import annotations

import struct
from typing import Any

from sfp_conformance.forge import Forge, exact, f32_bytes, patterns, table, table_for

from .edits import of_map, one_file, put_bytes, vector_places
from .gallery import ONE
from .suite import Suite

GREATEST = 0x7F7FFFFF
STEPS = {
    "zero": bytes(4),
    "minus-zero": b"\0\0\0\x80",
    "negative": struct.pack("<f", -0.25),
    "infinite": b"\0\0\x80\x7f",
    "quiet-nan": b"\0\0\xc0\x7f",
    "signalling-nan": b"\1\0\x80\x7f",
    "three-bytes": b"\0\0\x80",
    "five-bytes": b"\0\0\x80\x3e\0",
    "no-bytes": b"",
    "eight-bytes": struct.pack("<d", 0.25),
}
NOT_FINITE = {"infinite": 0x7F800000, "nan": 0x7FC00000, "minus-infinite": 0xFF800000}


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    _words(suite)
    _steps(suite)
    _counts(suite)
    _centroids(suite)
    _importance(suite)


def _words(suite: Suite) -> None:
    for name, where in (("uniform", "fingerprints"), ("group", "importance")):
        for slug, word in (
            ("empty", ""),
            ("trellis", "trellis"),
            ("private", "x-mine"),
            ("capital", "Exact"),
        ):
            change = of_map(name, where, quantiser=word)
            words = f"the quantiser {word!r} in {where}"
            case = f"QNT-001-{slug}-{where}"
            suite.invalid(case, words, ONE[name], change, tensor=name, tags=["future"])
    for dtype, coded in (
        ("F32", "F16"),
        ("F32", "BF16"),
        ("F64", "F32"),
        ("F16", "F8_E5M2"),
        ("BF16", "F8_E4M3"),
    ):
        narrow = suite.valid(
            f"QNT-002-{coded}-in-{dtype}",
            f"{dtype} coded as {coded}",
            one_file(exact(coded, **table([4])), [0, 1, 2, 15, 9], dtype),
            "R-REC-006",
        )
        for other in ("F64", "F8_E4M3", "F8_E5M2", "F16", "BF16", "U8", "BOOL"):
            if other != dtype and not _widens(other, dtype):
                change = of_map("one", "fingerprints", dtype=other)
                words = f"{dtype} coded as {other}"
                suite.invalid(f"QNT-002-{other}-for-{coded}-in-{dtype}", words, narrow, change, tensor="one")
        change = of_map("one", "fingerprints", dtype="F4")
        suite.invalid(
            f"TEN-003-F4-for-{coded}-in-{dtype}", "the coded dtype F4", narrow, change, tensor="one"
        )
    for name, where in (("runs", "fingerprints"), ("group", "importance")):
        for trim in (2, 255, 2**64 - 1):
            change = of_map(name, where, trim=trim)
            suite.invalid(f"QNT-008-{trim}-{where}", f"`trim` is {trim}", ONE[name], change, tensor=name)


def _widens(narrow: str, wide: str) -> bool:
    return (narrow.startswith("F8") and wide != narrow and not wide.startswith("F8")) or (
        wide in ("F32", "F64") and narrow in ("F16", "BF16")
    )


def _steps(suite: Suite) -> None:
    for name, where in (("uniform", "fingerprints"), ("uniform", "importance")):
        for slug, step in STEPS.items():
            change = of_map(name, where, step=step)
            words = f"a step that is {slug.replace('-', ' ')}, in {where}"
            suite.invalid(f"QNT-003-{slug}-{where}", words, ONE[name], change, tensor=name)
    for slug, pattern in (
        ("least", 1),
        ("least-normal", 0x800000),
        ("greatest", GREATEST),
        ("third", 0x3EAAAAAB),
    ):
        source = {"quantiser": "uniform", "step": pattern.to_bytes(4, "little"), **table([2])}
        data = one_file(source, [0, 1, 2, 3], "F32")
        base = suite.valid(f"QNT-003-{slug}", f"the step of the pattern {pattern:#x}", data, "R-QNT-006")
        for top in (4, 1 << 30):
            if pattern == GREATEST:
                change = of_map("one", "fingerprints", base=top)
                words = f"the greatest step times {(top + 3) // 2}"
                suite.invalid(f"QNT-006-greatest-{top}", words, base, change, tensor="one")
    near = struct.pack("<f", 2.0**96)
    source = {"quantiser": "uniform", "step": near, **table_for([0, 2**32 - 1])}
    words = "the greatest magnitude number rounds up to 2^31, and its product with the step is still finite"
    data = one_file(source, [0, 5, 2**32 - 1], "F32")
    base = suite.valid("QNT-006-rounds-up", words, data)
    change = of_map("one", "fingerprints", step=struct.pack("<f", 2.0**97))
    suite.invalid(
        "QNT-006-rounds-to-infinity",
        "the product is 2^128 only because a factor is rounded",
        base,
        change,
        tensor="one",
    )


def _table_of(count: int, levels: list[int], centroids: list[int]) -> bytes:
    source = {"quantiser": "table", "count": count, **table_for([0, 2 * count - 1])}
    return one_file(source, levels, "F32", vectors={"fingerprint centroids": centroids})


def _counts(suite: Suite) -> None:
    for count in (1, 2, 15, 16, 17, 255, 4096, 65536):
        centroids = [0x3F000000 + 8 * i for i in range(count)]
        data = _table_of(count, [0, 1, 2 * count - 1, count], centroids)
        suite.valid(f"QNT-004-{count}-centroids", f"{count} centroids", data, "R-VEC-001")
    for count in (0, 65537, 2**32, 2**64 - 1):
        for name, where in (("table", "fingerprints"), ("coded", "importance")):
            change = of_map(name, where, count=count)
            suite.invalid(
                f"QNT-004-{count}-{where}", f"{count} centroids in {where}", ONE[name], change, tensor=name
            )


def _centroids(suite: Suite) -> None:
    ends = [0, 1, 0x7FFFFF, 0x800000, GREATEST]
    suite.valid(
        "QNT-005-ends", "centroids 0, least, subnormal, normal, greatest", _table_of(5, list(range(10)), ends)
    )
    empty = suite.valid(
        "QNT-005-empty",
        "a tensor without elements, with one centroid",
        one_file(
            {"quantiser": "table", "count": 1, **table([0])},
            [],
            "F32",
            vectors={"fingerprint centroids": [0]},
        ),
    )
    change = put_bytes("one", 0, NOT_FINITE["infinite"].to_bytes(4, "little"), vectors=True)
    words = "an infinite centroid of a tensor without elements"
    suite.invalid("QNT-005-empty-infinite", words, empty, change, tensor="one")
    bad = {**NOT_FINITE, "negative": 0xBE000000, "minus-zero": 0x80000000}
    for name, vector in (("table", "fingerprint centroids"), ("coded", "importance centroids")):
        at, count, _ = vector_places(suite.cases[ONE[name]].data, name)[vector]
        for slug, pattern in bad.items():
            for i in sorted({0, count - 1}):
                change = put_bytes(name, at + 4 * i, pattern.to_bytes(4, "little"), vectors=True)
                words = f"{vector}: number {i} is {slug.replace('-', ' ')}"
                suite.invalid(f"QNT-005-{name}-{slug}-{i}", words, ONE[name], change, tensor=name)
        raw = bytes(Forge.of(suite.cases[ONE[name]].data).part(name).vectors or b"")
        for i in range(1, count):
            before = raw[at + 4 * i - 4 : at + 4 * i]
            own = raw[at + 4 * i : at + 4 * i + 4]
            change = put_bytes(name, at + 4 * i, before, vectors=True)
            words = f"{vector}: {i - 1} and {i} are equal"
            suite.invalid(f"QNT-007-{name}-equal-{i}", words, ONE[name], change, tensor=name)
            change = put_bytes(name, at + 4 * i - 4, own + before, vectors=True)
            words = f"{vector}: {i - 1} and {i} are swapped"
            suite.invalid(f"QNT-007-{name}-swapped-{i}", words, ONE[name], change, tensor=name)


def _importance(suite: Suite) -> None:
    weights = [4, 3, 9, 12, 5]
    plain: dict[str, Any] = {"quantiser": "uniform", "step": f32_bytes(0.5), **table([4])}
    for role in ("multiplier", "metadata"):
        for over in ("survivors", "all"):
            for dtype in ("F32", "F16", "BF16"):
                marks = [2 * p for p in patterns(dtype, 1.0, 0.5, 0.25, 0.0, 3.0)]
                given = {"over": over, "role": role, **exact(dtype, **table_for([0, *marks]))}
                data = one_file(plain, weights, importance=given, importance_levels=marks)
                words = f"importance {over} as {role}, exact in {dtype}"
                suite.valid(f"IMP-003-{role}-{over}-{dtype}", words, data, "R-IMP-001", "R-IMP-002")
    for name, key, clause in (
        ("group", "over", "001"),
        ("group", "role", "002"),
        ("table", "over", "001"),
        ("table", "role", "002"),
    ):
        for slug, word in (("empty", ""), ("private", "x-mine"), ("capital", "All")):
            change = of_map(name, "importance", **{key: word})
            words = f"the importance of `{name}` has {key} {word!r}"
            suite.invalid(
                f"IMP-{clause}-{name}-{slug}", words, ONE[name], change, tensor=name, tags=["future"]
            )
    for name in ("group", "table"):
        for dtype in ("F64", "F8_E4M3", "F8_E5M2", "U16"):
            change = of_map(name, "importance", dtype=dtype)
            suite.invalid(
                f"IMP-003-{name}-{dtype}", f"an importance in {dtype}", ONE[name], change, tensor=name
            )
    at = vector_places(suite.cases[ONE["table"]].data, "table")
    for vector in ("rows", "columns"):
        for slug, pattern in NOT_FINITE.items():
            change = put_bytes("table", at[vector][0], pattern.to_bytes(4, "little"), vectors=True)
            words = f"a factor in {vector} that is {slug.replace('-', ' ')}"
            suite.invalid(f"IMP-004-{vector}-{slug}", words, ONE["table"], change, tensor="table")
        for sign in (0, 1):
            huge = (GREATEST | sign << 31).to_bytes(4, "little")
            change = put_bytes("table", at[vector][0], huge, vectors=True)
            words = f"a factor in {vector} whose product with another one overflows, sign bit {sign}"
            suite.invalid(f"IMP-005-{vector}-{sign}", words, ONE["table"], change, tensor="table")
    for slug, number in (("greatest", 3.4028234663852886e38), ("2-126", 2.0**126)):
        change = of_map("uniform", "importance", step=struct.pack("<f", number))
        words = f"an importance step of {number} and levels up to 27"
        suite.invalid(f"IMP-006-{slug}", words, ONE["uniform"], change, tensor="uniform")
    given = {
        "over": "all",
        "role": "metadata",
        "quantiser": "uniform",
        "step": f32_bytes(2.0**96),
        **table([31]),
    }
    data = one_file(plain, weights, importance=given, importance_levels=[0, 1, 2**31 - 1, 2**24 + 1, 3])
    base = suite.valid("IMP-006-rounds-up", "the greatest level rounds up to 2^31", data, "R-TAB-008")
    change = of_map("one", "importance", step=f32_bytes(2.0**97))
    suite.invalid(
        "IMP-006-rounds-to-infinity",
        "the product is 2^128 only because a factor is rounded",
        base,
        change,
        tensor="one",
    )
    change = of_map("one", "importance", base=1)
    suite.invalid("TAB-008-importance-uniform", "importance levels up to 2^31", base, change, tensor="one")
    change = of_map("coded", "importance", base=1)
    suite.invalid(
        "TAB-008-importance-table",
        "an importance level without a centroid",
        ONE["coded"],
        change,
        tensor="coded",
    )
