"""Chapter 12: scales."""

from __future__ import annotations

from typing import Any

from sfp_conformance.forge import f32_bytes, patterns, table
from sfp_conformance.slow_reader import BYTES, FLOATS, matrix, pattern_of

from .edits import of_map, one_file, put_bytes, vector_places
from .gallery import ONE
from .suite import Suite

SHAPES = {"5": [5], "1-6": [1, 6], "6-1": [6, 1], "3-4": [3, 4], "2-3-4": [2, 3, 4], "scalar": []}


def scaled(shape: list[int], per: str, dtype: str, size: int = 0, **more: Any) -> bytes:
    """Returns a file with a uniform tensor and factors of both signs."""
    count = 1
    for length in shape:
        count *= length
    rows, columns = matrix({"shape": shape})
    factors = {"tensor": 1, "row": rows, "column": columns, "group": -(-count // size) if size else 0}[per]
    source = {"quantiser": "uniform", "step": f32_bytes(0.3), **table([4])}
    scale = {"per": per, "dtype": dtype, **({"size": size} if per == "group" else {})}
    own = patterns(dtype, *[(-1) ** i * (i % 9 + 1) / 3 for i in range(factors)])
    levels = [(7 * i + 1) % 16 for i in range(count)]
    return one_file(source, levels, shape=shape, scale=scale, vectors={"scale": own}, **more)


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    for dtype in ("F32", "F16", "BF16"):
        for per in ("tensor", "row", "column"):
            for slug, shape in SHAPES.items():
                words = f"a factor per {per} of {dtype}, shape {shape}"
                suite.valid(f"SCL-001-{per}-{dtype}-{slug}", words, scaled(shape, per, dtype), "R-SCL-003")
    for size in (1, 2, 7, 23, 24, 25, 2**40):
        words = f"a factor for every {size} positions"
        suite.valid(f"SCL-002-group-{size}", words, scaled([2, 3, 4], "group", "F16", size), "R-SCL-001")
    _words(suite)
    _factors(suite)


def _words(suite: Suite) -> None:
    for slug, word in (("empty", ""), ("block", "block"), ("capital", "Row"), ("private", "x-mine")):
        change = of_map("uniform", "scale", per=word)
        words = f"a scale per {word!r}"
        suite.invalid(f"SCL-001-{slug}", words, ONE["uniform"], change, tensor="uniform", tags=["future"])
    for name in ("uniform", "table"):
        for dtype in ("F64", "F8_E4M3", "I16", "", "x-mine"):
            change = of_map(name, "scale", dtype=dtype)
            words = f"factors of the dtype {dtype!r}"
            suite.invalid(f"SCL-003-{name}-{dtype or 'empty'}", words, ONE[name], change, tensor=name)
    suite.invalid(
        "SCL-002-zero",
        "a group size of 0",
        ONE["group"],
        of_map("group", "scale", size=0),
        tensor="group",
    )


def _factors(suite: Suite) -> None:
    for dtype in ("F32", "F16", "BF16"):
        base = f"y-SCL-001-row-{dtype.lower()}-3-4"
        size, first = BYTES[dtype], FLOATS[dtype].nonfinite
        sign = 1 << 8 * size - 1
        bad = {"infinite": first, "minus-infinite": first | sign, "nan": first + 1, "minus-nan": 2 * sign - 1}
        for slug, pattern in bad.items():
            for i in (0, 2):
                change = put_bytes("one", i * size, pattern.to_bytes(size, "little"), vectors=True)
                words = f"factor {i} of {dtype} is {slug.replace('-', ' ')}"
                suite.invalid(f"SCL-004-{dtype}-{slug}-{i}", words, base, change, tensor="one")
        if dtype != "F16":
            for number in (3e38, -3e38):
                raw = pattern_of(number, dtype).to_bytes(size, "little")
                change = put_bytes("one", size, raw, vectors=True)
                words = f"a factor of {number:g}, a greatest magnitude of 2.1"
                case = f"SCL-006-{dtype}-{'plus' if number > 0 else 'minus'}"
                suite.invalid(case, words, base, change, tensor="one")
    at = vector_places(suite.cases[ONE["table"]].data, "table")["scale"][0]
    change = put_bytes("table", at - 16, (0x7F000000).to_bytes(4, "little"), vectors=True)
    words = "the last centroid times a factor overflows"
    suite.invalid("SCL-006-table", words, ONE["table"], change, tensor="table")
