"""Reconstructs mask bits, importances and weights from levels and vectors (chapters 10 to 16)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

from .entries import matrix, positions, step_of, streams, top, vectors
from .numbers import BYTES, FLOATS, Entry, align, f32, need, number_of, pattern_of, zero
from .planes import open_chunk, segment_sizes, stream_levels


def mask_bits(mask: Entry, levels: list[int], n: int, survivors: int) -> list[int]:
    """Returns the mask bits of a segment (chapter 10)."""
    if mask["kind"] == "octets":
        bits = [level >> j & 1 for level in levels for j in range(8)]
        need(not any(bits[n:]), "R-MSK-006")
    else:
        bits, p = [1 - mask["polarity"]] * n, -1
        for level in levels:
            p += 1 + level
            need(p < n, "R-MSK-004")
            bits[p] = mask["polarity"]
    need(sum(bits[:n]) == survivors, "R-MSK-005")
    return bits[:n]


@dataclass
class Tensor:
    """A decoded tensor.

    Attributes:
        dtype, shape: dtype and shape.
        data: the elements as bytes.
        mask, importance: per position a mask bit and an importance (None if absent).
        levels, marks: per position the levels of fingerprints and importance (None if absent).
        vectors: vector name -> values.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    mask: list[int]
    importance: list[float | None]
    levels: list[int | None] = field(default_factory=list)
    marks: list[int | None] = field(default_factory=list)
    vectors: dict[str, list[float]] = field(default_factory=dict)


def read_vectors(entry: Entry, data: bytes) -> dict[str, list[float]]:
    """Parses and checks the vector chunk (15.3). Returns vector name -> values."""
    out, pos = {}, 0
    for name, count, dtype in vectors(entry):
        size = BYTES[dtype]
        need(pos + count * size <= len(data), "R-VEC-001")
        raw = [int.from_bytes(data[pos + i * size :][:size], "little") for i in range(count)]
        out[name] = [number_of(pattern, dtype) for pattern in raw]
        end = pos + count * size
        zero(data, 8 * end, 8 * min(align(end, 16), len(data)), "R-VEC-002")
        pos = align(end, 16)
    need(len(data) == align(pos, 64), "R-VEC-001")
    zero(data, 8 * pos, 8 * len(data), "R-VEC-002")
    check_vectors(entry, out)
    return out


def check_vectors(entry: Entry, found: dict[str, list[float]]) -> None:
    """Checks the values of the vectors."""
    for name in ("fingerprint centroids", "importance centroids"):
        centroids = found.get(name, [])
        need(all(math.isfinite(x) and math.copysign(1, x) > 0 for x in centroids), "R-QNT-005")
        need(all(a < b for a, b in pairwise(centroids)), "R-QNT-007")
    if found.get("scale"):
        need(all(map(math.isfinite, found["scale"])), "R-SCL-004")
        fingerprints = entry["fingerprints"]
        if fingerprints["quantiser"] == "uniform":
            greatest = f32(f32((top(fingerprints) - 1) // 2) * step_of(fingerprints))
        else:
            greatest = found["fingerprint centroids"][-1]
        need(math.isfinite(f32(greatest * max(map(abs, found["scale"])))), "R-SCL-006")
    if found.get("rows"):
        need(all(map(math.isfinite, found["rows"] + found["columns"])), "R-IMP-004")
        product = max(map(abs, found["rows"])) * max(map(abs, found["columns"]))
        need(math.isfinite(f32(product)), "R-IMP-005")


def exact_pattern(level: int, dtype: str) -> int:
    """Returns the pattern of a level: moves the sign from the lowest bit to the highest (chapter 11)."""
    return (level >> 1) | ((level % 2) << (FLOATS[dtype].bits - 1))


def importance_of(source: Entry, level: int, found: dict[str, list[float]]) -> float:
    """Returns the importance that a level represents (chapter 13)."""
    if source["quantiser"] == "uniform":
        return f32(f32(level) * step_of(source))
    if source["quantiser"] == "table":
        return found["importance centroids"][level]
    return number_of(exact_pattern(level, source["dtype"]), source["dtype"])


def scale_of(entry: Entry, p: int, found: dict[str, list[float]]) -> float:
    """Returns the scale factor of a position (chapter 12)."""
    scale, (_, columns) = entry["scale"], matrix(entry)
    place = {"tensor": 0, "row": p // columns, "column": p % columns, "group": p // scale.get("size", 1)}
    return found["scale"][int(place[scale["per"]])]


def reconstruct(entry: Entry, p: int, v: int, importance: float | None, found: dict[str, list[float]]) -> int:
    """Returns the pattern of a survivor: `value(p)` of chapter 14."""
    source, dtype = entry["fingerprints"], entry["dtype"]
    multiplier = None
    if "importance" in entry and entry["importance"]["role"] == "multiplier":
        multiplier = importance
    if source["quantiser"] == "exact":
        pattern, coded = exact_pattern(v, source["dtype"]), source["dtype"]
        x = number_of(pattern, coded)
        if coded != dtype:
            pattern = pattern_of(x, dtype)
        if multiplier is None or not math.isfinite(x):
            return pattern
        return pattern_of(x * multiplier if dtype == "F64" else f32(x * multiplier), dtype)
    m, s = v // 2, v % 2
    if source["quantiser"] == "uniform":
        x = f32(f32(m) * step_of(source))
    else:
        x = found["fingerprint centroids"][m]
    x = -x if s else x
    if "scale" in entry:
        x = f32(x * scale_of(entry, p, found))
    if multiplier is not None:
        x = f32(x * multiplier)
    return pattern_of(x, dtype)


def read_fingerprints(entry: Entry, chunks: list[bytes], found: dict[str, list[float]]) -> Tensor:
    """Decodes a tensor with coding `fingerprint`."""
    patterns: list[int] = []
    mask: list[int] = []
    importances: list[float | None] = []
    all_levels: list[int | None] = []
    all_marks: list[int | None] = []
    _, columns = matrix(entry)
    for k, data in enumerate(chunks):
        chunk = open_chunk(data, entry, k)
        levels = {stream: stream_levels(data, entry, chunk, stream) for stream in streams(entry)}
        for i, n in enumerate(chunk.sizes):
            bits = [1] * n
            if "mask" in entry:
                bits = mask_bits(entry["mask"], levels["mask"][i], n, chunk.values["survivors"][i])
            fingerprints = iter(levels["fingerprints"][i])
            marks = iter(levels["importance"][i]) if "importance" in levels else iter(())
            for bit in bits:
                p = len(patterns)
                importance = mark = None
                if "importance" in entry:
                    over = entry["importance"]["over"]
                    if over == "factors":
                        importance = f32(found["rows"][p // columns] * found["columns"][p % columns])
                    elif over == "all" or bit:
                        mark = next(marks)
                        importance = importance_of(entry["importance"], mark, found)
                level = next(fingerprints) if bit else None
                mask.append(bit)
                importances.append(importance)
                all_levels.append(level)
                all_marks.append(mark)
                patterns.append(0 if level is None else reconstruct(entry, p, level, importance, found))
    size = BYTES[entry["dtype"]]
    raw = b"".join(pattern.to_bytes(size, "little") for pattern in patterns)
    shape = tuple(entry["shape"])
    return Tensor(entry["dtype"], shape, raw, mask, importances, all_levels, all_marks, found)


def read_raw(entry: Entry, chunks: list[bytes]) -> Tensor:
    """Decodes a tensor with coding `raw` (chapter 16)."""
    out = b""
    for k, data in enumerate(chunks):
        size = sum(segment_sizes(entry, k)) * BYTES[entry["dtype"]]
        need(len(data) == align(size, 64), "R-RAW-002")
        need(not any(data[size:]), "R-RAW-003")
        need(entry["dtype"] != "BOOL" or max(data[:size]) <= 1, "R-RAW-004")
        out += data[:size]
    n = positions(entry)
    return Tensor(entry["dtype"], tuple(entry["shape"]), out, [1] * n, [None] * n)
