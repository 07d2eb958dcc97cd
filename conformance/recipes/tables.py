"""Chapter 8: code tables."""

from __future__ import annotations

from typing import Any

from sfp_conformance.forge import exact, f32_bytes, flat_code, nibbles, patterns, table, table_for

from .edits import masked, of_map, one_file
from .gallery import ONE
from .suite import Suite

BITS = [int(p % 3 == 0 or p % 7 == 1) for p in range(70)]
LONGEST = [*range(1, 12), 12, 12]
SHAPES = {
    "two": [1, 1],
    "three": [1, 2, 2],
    "three-last-short": [2, 2, 1],
    "unary": [1, 2, 3, 4, 5, 5],
    "longest": LONGEST,
    "longest-reversed": LONGEST[::-1],
    "holes": [0, 2, 0, 2, 2, 0, 0, 2, 0],
    "first-and-last": [1, 0, 0, 0, 0, 0, 1],
    "flat-16": [4] * 16,
    "flat-32": [5] * 32,
    "flat-33": flat_code(33),
}


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    _class_numbers(suite)
    _codes(suite)
    _several(suite)
    _bounds(suite)


def _runs(code_table: dict[str, Any], **more: Any) -> bytes:
    return masked(BITS, {"kind": "runs", "polarity": 1, **code_table}, **more)


def _levels(count: int, usable: list[int]) -> list[int]:
    return [usable[(5 * i * i + i) % len(usable)] for i in range(count)]


def _class_numbers(suite: Suite) -> None:
    wide = suite.valid(
        "TAB-001-4096-classes", "4,096 classes, 32 of them used", _runs(_many(4096)), "R-TAB-006"
    )
    change = of_map("one", "mask", extra=bytes(4097), codes=_many(4097)["codes"])
    suite.invalid("TAB-001-4097-classes", "4,097 classes", wide, change, tensor="one")
    code = nibbles(flat_code(4) + [0] * (64 * 64 - 4))
    pairs = exact("F16", **table([0] * 4 + [1] * 60, group=2) | {"codes": [code]})
    # Symbols 0 to 3 are a level of class 0 to 3 followed by one of class 0.
    paired = one_file(pairs, [i % 4 if i % 2 == 0 else 0 for i in range(40)], "F16")
    wide = suite.valid("TAB-001-64-classes-in-pairs", "64 classes, two levels per symbol", paired)
    more = {"extra": bytes(65), "codes": [nibbles([1, 1] + [0] * (65 * 65 - 2))]}
    suite.invalid(
        "TAB-001-65-classes-in-pairs",
        "65 classes, group 2",
        wide,
        of_map("one", "fingerprints", **more),
        tensor="one",
    )
    alone = {"extra": b"\2", "codes": [], "group": 2}
    change = of_map("uniform", "fingerprints", **alone)
    suite.invalid("TAB-001-one-in-pairs", "one class, group 2", ONE["uniform"], change, tensor="uniform")
    for name, stream in (("runs", "mask"), ("runs", "fingerprints"), ("group", "importance")):
        change = of_map(name, stream, extra=b"", codes=[])
        suite.invalid(f"TAB-001-none-{stream}", f"no class in {stream}", ONE[name], change, tensor=name)
        for group in (0, 3, 255, 2**64 - 1):
            change = of_map(name, stream, group=group)
            slug = f"TAB-003-{group}-{stream}"
            suite.invalid(slug, f"{group} levels per symbol in {stream}", ONE[name], change, tensor=name)
    for extra in (*range(0, 57, 4), 1, 9, 17, 31, 33, 55):
        levels = [(i * 0x9E3779B97F4A7C15) % 2**extra for i in range(9)]
        data = one_file(exact("F64", **table([extra])), levels, "F64")
        suite.valid(f"TAB-002-extra-{extra}", f"one class of {extra} residual bits", data, "R-CNV-003")
    for extra in (57, 64, 255):
        change = of_map("one", "fingerprints", extra=bytes([extra]))
        suite.invalid(
            f"TAB-002-{extra}", f"{extra} residual bits", "y-TAB-002-extra-56", change, tensor="one"
        )


def _many(classes: int) -> dict[str, Any]:
    return table([0] * classes, [5] * 32 + [0] * (classes - 32))


def _codes(suite: Suite) -> None:
    for slug, lengths in SHAPES.items():
        usable = [s for s, length in enumerate(lengths) if length]
        data = one_file(exact("F16", **table([0] * len(lengths), lengths)), _levels(50, usable), "F16")
        suite.valid(f"TAB-007-{slug}", f"the code {lengths}", data, "R-COD-001", "R-COD-002", "R-TAB-005")
    for symbols in (2, 255, 256):
        source = exact("F16", **table([0] * symbols, flat_code(symbols)))
        data = one_file(source, _levels(99, list(range(symbols))), "F16")
        suite.valid(f"TAB-006-{symbols}-symbols", f"a code of {symbols} symbols", data)
    wrong = {
        "006-one": [1, 0, 0],
        "006-none": [0, 0, 0],
        "007-incomplete": [2, 2, 2],
        "007-just-incomplete": [1, 3, 3],
        "007-overfull": [1, 1, 1],
        "007-just-overfull": [1, 2, 1],
    }
    for slug, lengths in wrong.items():
        change = of_map("one", "fingerprints", codes=[nibbles(lengths)])
        suite.invalid(f"TAB-{slug}", f"the code {lengths}", "y-TAB-007-three", change, tensor="one")
    long_one = [*LONGEST[:-1], 0]
    change = of_map("one", "fingerprints", codes=[nibbles(long_one)])
    words = "the longest code without one of its codewords"
    suite.invalid("TAB-007-one-missing", words, "y-TAB-007-longest", change, tensor="one")
    more = table([0] * 257, flat_code(257))
    change = of_map("one", "fingerprints", **more)
    suite.invalid(
        "TAB-006-257-symbols", "a code of 257 symbols", "y-TAB-006-256-symbols", change, tensor="one"
    )
    for longest in (13, 14, 15):
        lengths = [*range(1, longest), longest, longest]
        change = of_map("one", "fingerprints", **table([0] * len(lengths), lengths))
        words = f"a complete code with a codeword of {longest} bits"
        suite.invalid(f"TAB-005-{longest}", words, "y-TAB-007-longest", change, tensor="one")
    for slug, codes in (("short", b"\x21"), ("long", b"\x21\2\0"), ("empty", b"")):
        change = of_map("one", "fingerprints", codes=[codes])
        words = f"an entry of `codes` of {len(codes)} bytes for three symbols"
        suite.invalid(f"TAB-004-{slug}", words, "y-TAB-007-three", change, tensor="one")
    for nibble in (1, 2, 8, 15):
        change = of_map("one", "fingerprints", codes=[bytes([0x21, 0x02 | nibble << 4])])
        words = f"{nibble} in the bits after the last code length"
        suite.invalid(f"TAB-010-{nibble}", words, "y-TAB-007-three", change, tensor="one")


def _several(suite: Suite) -> None:
    for count in (2, 3, 8, 15, 16):
        codes = [[1, 2, 2] if i % 2 else [2, 2, 1] for i in range(count)]
        levels = [(i * i + i // 32) % 3 for i in range(32 * 17)]
        numbers = [i % count for i in range(17)]
        data = one_file(
            exact("F16", **table([0, 0, 0], *codes)), levels, "F16", codes={"fingerprints": numbers}, chunk=9
        )
        suite.valid(f"TAB-009-{count}-codes", f"{count} codes in one stream", data, "R-IDX-005")
    change = of_map("one", "fingerprints", codes=[nibbles([1, 2, 2])] * 17)
    suite.invalid("TAB-009-17-codes", "17 codes", "y-TAB-009-16-codes", change, tensor="one")
    change = of_map("one", "fingerprints", codes=[])
    suite.invalid("TAB-009-no-code", "three classes and no code", "y-TAB-007-three", change, tensor="one")
    change = of_map("one", "fingerprints", codes=[b"\1"])
    suite.invalid("TAB-009-one-class", "a code for one class", "y-TAB-002-extra-4", change, tensor="one")


def _bounds(suite: Suite) -> None:
    small = {"quantiser": "uniform", "step": f32_bytes(2.0**-40)}
    counted = {"quantiser": "table", "count": 5}
    centroids = patterns("F32", 0.0, 1.0, 2.0, 3.5, 4.0)
    cases: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "uniform": ("F32", {**small, **table([32])}, {}),
        "table": (
            "F32",
            {**counted, **table_for(list(range(10)))},
            {"vectors": {"fingerprint centroids": centroids}},
        ),
        "f64": ("F64", exact("F64", **table([56] * 256, flat_code(256))), {}),
    }
    for dtype, bits in (("F32", 32), ("F16", 16), ("BF16", 16), ("F8_E4M3", 8), ("F8_E5M2", 8)):
        cases[dtype] = dtype, exact(dtype, **table([bits])), {}
    for wide, narrow, end in (("F32", "BF16", 0xFF00), ("F64", "F32", 0xFF000000), ("F16", "F8_E4M3", 0xFE)):
        cases[f"{narrow}-in-{wide}"] = wide, exact(narrow, **table_for([0, end - 1])), {}
    for slug, (dtype, source, more) in cases.items():
        top = source["base"] + sum(1 << e for e in source["extra"])
        data = one_file(source, [0, top - 1, 1, top // 2, top - 2], dtype, **more)
        base = suite.valid(f"TAB-008-{slug}-at-the-bound", f"levels up to {top - 1}: {slug}", data)
        for change in (1, 2**64 - 1):
            edit = of_map("one", "fingerprints", base=change)
            words = f"a `top` above the bound: {slug}, base {change}"
            tags = ["hostile"] if change > 1 else []
            suite.invalid(f"TAB-008-{slug}-base-{change}", words, base, edit, tensor="one", tags=tags)
    for kind, bits in (("runs", 16), ("octets", 8)):
        polarity = {"polarity": 1} if kind == "runs" else {}
        data = masked(BITS, {"kind": kind, **polarity, **table([bits])})
        base = suite.valid(f"TAB-008-{kind}-at-the-bound", f"a mask of {bits} bits per level", data)
        edit = of_map("one", "mask", base=1)
        suite.invalid(f"TAB-008-{kind}-base-1", "a `top` above the bound", base, edit, tensor="one")
