"""Parses and checks tensor entries (chapters 7, 8, 10 to 13, 15.3)."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from typing import Any

from .numbers import BYTES, FACTORS, FLOATS, Entry, f32, need, number_of


def get(source: Entry, key: str, kind: type) -> Any:
    """Returns the value of a required key. Checks that it exists and has the right type."""
    need(key in source, "R-DIR-002")
    need(isinstance(source[key], kind), "R-DIR-003")
    return source[key]


def absent(source: Entry, *keys: str) -> None:
    """Checks that a map has none of the keys, because their conditions do not hold."""
    need(not any(key in source for key in keys), "R-DIR-007")


def word(source: Entry, key: str, words: tuple[str, ...], clause: str) -> str:
    """Returns the string of a key. Checks that it is one of the allowed words."""
    value: str = get(source, key, str)
    need(value in words, clause)
    return value


def positions(entry: Entry) -> int:
    """Returns N, the number of positions."""
    return math.prod(entry["shape"])


def matrix(entry: Entry) -> tuple[int, int]:
    """Returns the numbers of rows and columns (chapter 2)."""
    n = positions(entry)
    rows = entry["shape"][0] if len(entry["shape"]) >= 2 and n else 1
    return rows, n // rows


def streams(entry: Entry) -> list[str]:
    """Returns the streams of a tensor, in order."""
    if entry["coding"] == "raw":
        return []
    over = entry.get("importance", {}).get("over", "factors")
    return ["mask"] * ("mask" in entry) + ["fingerprints"] + ["importance"] * (over != "factors")


def vectors(entry: Entry) -> list[tuple[str, int, str]]:
    """Returns name, number of elements and dtype of each vector of a tensor (15.3)."""
    out = []
    n, (rows, columns) = positions(entry), matrix(entry)
    fingerprints, importance = entry["fingerprints"], entry.get("importance", {})
    if fingerprints["quantiser"] == "table":
        out.append(("fingerprint centroids", fingerprints["count"], "F32"))
    if "scale" in entry:
        scale = entry["scale"]
        size = scale.get("size", 1)
        count = {"tensor": 1, "row": rows, "column": columns, "group": -(-n // size)}[scale["per"]]
        out.append(("scale", count if n else 0, scale["dtype"]))
    if importance.get("quantiser") == "table" and importance["over"] != "factors":
        out.append(("importance centroids", importance["count"], "F32"))
    if importance.get("over") == "factors":
        out.append(("rows", rows if n else 0, importance["dtype"]))
        out.append(("columns", columns if n else 0, importance["dtype"]))
    return out


def check_entry(entry: Entry) -> None:
    """Checks everything that depends on a tensor entry alone (chapters 7, 8 and 10 to 13)."""
    need(get(entry, "name", str) != "", "R-TEN-002")
    dtype = word(entry, "dtype", tuple(BYTES), "R-TEN-003")
    coding = word(entry, "coding", ("raw", "fingerprint"), "R-TEN-004")
    shape = get(entry, "shape", list)
    need(all(isinstance(size, int) for size in shape), "R-DIR-003")
    need(math.prod(size for size in shape if size) <= 1 << 48, "R-TEN-005")
    segment, chunk = get(entry, "segment", int), get(entry, "chunk", int)
    need(segment % 32 == 0 and 32 <= segment <= 65536, "R-TEN-006")
    need(chunk >= 1 and segment * chunk <= 1 << 24, "R-TEN-007")
    records = get(entry, "chunks", bytes)
    segments = -(-positions(entry) // segment)
    need(len(records) == 8 * -(-segments // chunk), "R-TEN-008")
    if "vectors" in entry:
        need(len(get(entry, "vectors", bytes)) == 8, "R-TEN-012")
        records += entry["vectors"]
    lengths = [length for length, _ in struct.iter_unpack("<II", records)]
    need(all(length % 64 == 0 and length >= 64 for length in lengths), "R-LAY-002")
    if coding == "raw":
        absent(entry, "mask", "fingerprints", "scale", "importance", "vectors")
        return
    need(dtype in FLOATS, "R-TEN-010")
    if "mask" in entry:
        check_mask(get(entry, "mask", dict))
    check_fingerprints(get(entry, "fingerprints", dict), dtype)
    if "scale" in entry:
        if entry["fingerprints"]["quantiser"] == "exact":
            absent(entry, "scale")
        check_scale(get(entry, "scale", dict))
    if "importance" in entry:
        check_importance(get(entry, "importance", dict))
    if any(count for _, count, _ in vectors(entry)):
        need("vectors" in entry, "R-DIR-002")
    else:
        absent(entry, "vectors")


def lengths(table: Entry) -> list[list[int]]:
    """Returns the code lengths of the symbols in each code, parsed from fields of four bits."""
    symbols = len(table["extra"]) ** table["group"]
    return [[n for byte in code for n in (byte & 15, byte >> 4)][:symbols] for code in table["codes"]]


def top(table: Entry) -> int:
    """Returns one past the last level."""
    return int(table["base"] + sum(1 << extra for extra in table["extra"]))


def step_of(source: Entry) -> float:
    """Returns the step of a uniform quantiser."""
    return number_of(int.from_bytes(source["step"], "little"), "F32")


def check_table(source: Entry, bound: int) -> None:
    """Checks a code table whose levels must lie below a bound (chapter 8)."""
    get(source, "base", int)
    extra = get(source, "extra", bytes)
    codes, group = get(source, "codes", list), get(source, "group", int)
    need(all(isinstance(code, bytes) for code in codes), "R-DIR-003")
    need(group in (1, 2), "R-TAB-003")
    need(1 <= len(extra) <= 4096 if group == 1 else 2 <= len(extra) <= 64, "R-TAB-001")
    need(max(extra) <= 56, "R-TAB-002")
    window = get(source, "window", int) if "window" in source else None
    need(1 <= len(codes) <= 16 if len(extra) > 1 and window is None else not codes, "R-TAB-009")
    if window is not None:
        need(1 <= window <= 4, "R-TAB-011")
        need(group == 1 and max(2, (1 << window) - 1) <= len(extra) <= 256, "R-TAB-012")
    need(all(len(code) == -(-(len(extra) ** group) // 2) for code in codes), "R-TAB-004")
    need(len(extra) ** group % 2 == 0 or not any(code[-1] >> 4 for code in codes), "R-TAB-010")
    for code in lengths(source):
        need(max(code) <= 12, "R-TAB-005")
        need(2 <= sum(1 for length in code if length) <= 256, "R-TAB-006")
        need(sum(Fraction(1, 1 << length) for length in code if length) == 1, "R-TAB-007")
    need(top(source) <= bound, "R-TAB-008")


def check_mask(mask: Entry) -> None:
    """Checks a mask (chapter 10)."""
    kind = word(mask, "kind", ("runs", "octets"), "R-MSK-001")
    if kind == "runs":
        need(get(mask, "polarity", int) in (0, 1), "R-MSK-002")
    else:
        absent(mask, "polarity")
    check_table(mask, 65536 if kind == "runs" else 256)


def check_quantiser(source: Entry) -> str:
    """Checks the keys of a quantiser (chapter 11). Returns its name."""
    kind = word(source, "quantiser", ("exact", "uniform", "table"), "R-QNT-001")
    if kind == "exact":
        word(source, "dtype", tuple(BYTES), "R-TEN-003")
        need(get(source, "trim", int) in (0, 1), "R-QNT-008")
        absent(source, "step", "count")
    elif kind == "uniform":
        step = get(source, "step", bytes)
        need(len(step) == 4 and 0 < step_of(source) < math.inf, "R-QNT-003")
        absent(source, "dtype", "trim", "count")
    else:
        need(1 <= get(source, "count", int) <= 65536, "R-QNT-004")
        absent(source, "dtype", "trim", "step")
    return kind


def check_fingerprints(source: Entry, dtype: str) -> None:
    """Checks the fingerprints of a tensor of a dtype (chapter 11)."""
    kind = check_quantiser(source)
    bound = 1 << 32
    if kind == "exact":
        coded = source["dtype"]
        need(coded == dtype or (coded in FLOATS and dtype in FLOATS[coded].widens), "R-QNT-002")
        bound = 1 << FLOATS[dtype].bits if coded == dtype else 2 * FLOATS[coded].nonfinite
    if kind == "table":
        bound = 2 * source["count"]
    check_table(source, bound)
    if kind == "uniform":
        need(math.isfinite(f32(f32((top(source) - 1) // 2) * step_of(source))), "R-QNT-006")


def check_scale(scale: Entry) -> None:
    """Checks a scale (chapter 12)."""
    per = word(scale, "per", ("tensor", "row", "column", "group"), "R-SCL-001")
    if per == "group":
        need(get(scale, "size", int) >= 1, "R-SCL-002")
    else:
        absent(scale, "size")
    need(get(scale, "dtype", str) in FACTORS, "R-SCL-003")


def check_importance(source: Entry) -> None:
    """Checks an importance (chapter 13)."""
    over = word(source, "over", ("survivors", "all", "factors"), "R-IMP-001")
    word(source, "role", ("multiplier", "metadata"), "R-IMP-002")
    if over == "factors":
        need(get(source, "dtype", str) in FACTORS, "R-IMP-003")
        absent(source, "quantiser", "trim", "step", "count", "base", "extra", "codes", "group", "window")
        return
    kind = check_quantiser(source)
    bound = 1 << 31
    if kind == "exact":
        need(source["dtype"] in FACTORS, "R-IMP-003")
        bound = 2 * FLOATS[source["dtype"]].nonfinite
    if kind == "table":
        bound = source["count"]
    check_table(source, bound)
    if kind == "uniform":
        need(math.isfinite(f32(f32(top(source) - 1) * step_of(source))), "R-IMP-006")
