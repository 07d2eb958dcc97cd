"""Tensors in parts (28.4): structures, the parts of a base, and the tensors that parts make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .entries import (
    absent,
    check_fingerprints,
    check_importance,
    check_scale,
    get,
    matrix,
    vectors,
    word,
)
from .numbers import BYTES, FACTORS, FLOATS, Bad, Entry, f32, need, number_of, pattern_of
from .values import Tensor, check_vectors, exact_pattern, importance_of, reconstruct

PARTS = ("mask", "importance", "vectors")
QUANTISERS = ("exact", "uniform", "table")


@dataclass
class Plain:
    """A tensor of a base or a result: dtype, shape, and its elements, little-endian."""

    dtype: str
    shape: list[int]
    data: bytes

    @classmethod
    def of(cls, dtype: str, shape: list[int], patterns: list[int]) -> Plain:
        """Returns a tensor with these bit patterns."""
        return cls(dtype, shape, b"".join(p.to_bytes(BYTES[dtype], "little") for p in patterns))

    def patterns(self) -> list[int]:
        """Returns the bit patterns of the elements."""
        size = BYTES[self.dtype]
        return [int.from_bytes(self.data[at : at + size], "little") for at in range(0, len(self.data), size)]


def check_structure(structure: Entry) -> None:
    """Checks the map of a structure (28.4)."""
    need(word(structure, "dtype", tuple(BYTES), "R-TEN-003") in FLOATS, "R-TEN-010")
    need(get(structure, "mask", int) in (0, 1), "R-DLT-019")
    kind = _check_quantiser(structure)
    if "scale" in structure:
        if kind == "exact":
            absent(structure, "scale")
        check_scale(get(structure, "scale", dict))
    if "importance" not in structure:
        return
    importance = get(structure, "importance", dict)
    over = word(importance, "over", ("survivors", "all", "factors"), "R-IMP-001")
    word(importance, "role", ("multiplier", "metadata"), "R-IMP-002")
    if over == "factors":
        absent(importance, "quantiser", "count")
    elif _check_quantiser(importance) != "exact":
        absent(importance, "dtype")
        return
    else:
        word(importance, "dtype", tuple(BYTES), "R-TEN-003")
    need(get(importance, "dtype", str) in FACTORS, "R-IMP-003")


def _check_quantiser(source: Entry) -> str:
    kind = word(source, "quantiser", QUANTISERS, "R-QNT-001")
    if kind == "table":
        need(1 <= get(source, "count", int) <= 65536, "R-QNT-004")
    else:
        absent(source, "count")
    return kind


def entry_of(structure: Entry, shape: list[int], steps: list[bytes], greatest: list[int]) -> Entry:
    """Returns a tensor entry for a structure, with tables of one level, the greatest."""

    def stream(source: Entry, own: dict[str, Any], level: int) -> Entry:
        kind = source["quantiser"]
        keys = {"exact": own, "table": {"count": source.get("count")}}
        step = {} if kind in keys else {"step": steps.pop(0)}
        return {"quantiser": kind, **keys.get(kind, step)} | {
            "base": level,
            "extra": b"\0",
            "codes": [],
            "group": 1,
        }

    dtype = structure["dtype"]
    out: Entry = {"dtype": dtype, "shape": shape, "coding": "fingerprint"}
    out["fingerprints"] = stream(structure, {"dtype": dtype, "trim": 0}, greatest[0])
    if "scale" in structure:
        out["scale"] = structure["scale"]
    if "importance" in structure:
        source = structure["importance"]
        own = {key: source[key] for key in ("over", "role")}
        if source["over"] == "factors":
            out["importance"] = own | {"dtype": source["dtype"]}
        else:
            coded = {"dtype": source.get("dtype"), "trim": 0}
            out["importance"] = own | stream(source, coded, greatest[1])
    return out


def sizes_of(structure: Entry, shape: list[int]) -> tuple[int, int]:
    """Returns the number of steps, and the number of all elements of the part `vectors`."""
    importance = structure.get("importance", {})
    steps = [structure["quantiser"], importance.get("quantiser")].count("uniform")
    entry = entry_of(structure, shape, [b"\0\0\x80\x3f"] * 2, [0, 0])
    return steps, steps + sum(size for _, size, _ in vectors(entry))


def weights_dtype(structure: Entry) -> str:
    """Returns the dtype of the part `weights`."""
    return str(structure["dtype"]) if structure["quantiser"] == "exact" else "F32"


def stored_dtype(structure: Entry) -> str | None:
    """Returns the dtype of the part `importance`; None without this part."""
    if structure.get("importance", {"over": "factors"})["over"] == "factors":
        return None
    return str(structure["importance"].get("dtype", "F32"))


def needed_parts(structure: Entry, shape: list[int]) -> dict[str, tuple[str, list[int]]]:
    """Returns part -> dtype and shape, besides `weights`; `mask` may be absent."""
    out = {}
    if structure["mask"] and structure["quantiser"] == "exact":
        out["mask"] = "BOOL", shape
    stored = stored_dtype(structure)
    if stored is not None:
        out["importance"] = stored, shape
    _, count = sizes_of(structure, shape)
    return out | ({"vectors": ("F32", [count])} if count else {})


def check_structured(root: dict[str, Any], names: list[str]) -> None:
    """Checks the structures of a delta, and the parts in its lists (28.4)."""
    delta = root["delta"]
    keys = ("separator", "structures", "structured")
    if "delta-parts" not in root["features"]:
        absent(delta, *keys)
        return
    separator, structured = get(delta, "separator", str), get(delta, "structured", list)
    structures = get(delta, "structures", list)
    need(all(isinstance(item, dict) for item in structures), "R-DIR-003")
    need(all(isinstance(item, int) for item in structured), "R-DIR-003")
    for structure in structures:
        check_structure(structure)
    need(len(structured) == len(names), "R-DLT-017")
    need(all(number <= len(structures) for number in structured), "R-DLT-017")
    listed = {name: i for i, name in enumerate(names) if delta["kinds"][i] != 4}
    for i, number in enumerate(structured):
        if number == 0:
            continue
        structure, shape = structures[number - 1], delta["shapes"][i]
        need(delta["kinds"][i] in (0, 1), "R-DLT-018")
        need(delta["dtypes"][i] == weights_dtype(structure), "R-DLT-018")
        needed = needed_parts(structure, shape)
        for part in PARTS:
            at = listed.get(names[i] + separator + part)
            if at is None:
                need(part == "mask" or part not in needed, "R-DLT-018")
                continue
            need(structured[at] == 0, "R-DLT-018")
            need((delta["dtypes"][at], delta["shapes"][at]) == needed.get(part), "R-DLT-018")


def parts_of(entry: Entry, tensor: Tensor) -> dict[str, Plain]:
    """Returns the parts of a tensor of a base: part -> tensor; "" is `weights`."""
    shape = list(entry["shape"])
    if entry["coding"] == "raw":
        return {"": Plain(tensor.dtype, shape, tensor.data)}
    source, importance = entry["fingerprints"], entry.get("importance", {"over": "factors"})
    out: dict[str, Plain] = {}
    exact = source["quantiser"] == "exact"
    patterns = [
        0 if level is None else _exact(level, source["dtype"], tensor.dtype) if exact else _signed(level)
        for level in tensor.levels
    ]
    out[""] = Plain.of(tensor.dtype if exact else "F32", shape, patterns)
    zeros = any(bit and not pattern for bit, pattern in zip(tensor.mask, patterns, strict=True))
    if "mask" in entry and zeros:
        out["mask"] = Plain.of("BOOL", shape, tensor.mask)
    if importance["over"] != "factors":
        own = importance["quantiser"] == "exact"
        dtype = importance["dtype"] if own else "F32"
        marks = [
            0 if mark is None else exact_pattern(mark, dtype) if own else _signed(2 * mark)
            for mark in tensor.marks
        ]
        out["importance"] = Plain.of(dtype, shape, marks)
    numbers = [int.from_bytes(own["step"], "little") for own in (source, importance) if "step" in own]
    for name, _, _ in vectors(entry):
        numbers += [pattern_of(x, "F32") for x in tensor.vectors.get(name, [])]
    if numbers:
        out["vectors"] = Plain.of("F32", [len(numbers)], numbers)
    return out


def _exact(level: int, coded: str, dtype: str) -> int:
    pattern = exact_pattern(level, coded)
    return pattern if coded == dtype else pattern_of(number_of(pattern, coded), dtype)


def _signed(level: int) -> int:
    need(level // 2 + 1 < 1 << 31, "R-DLT-009")  # greater numbers have no pattern
    return (level % 2 << 31) + level // 2 + 1


def whole(structure: Entry, parts: Mapping[str, Plain]) -> Tensor:
    """Returns the tensor that parts make. `parts` are as `parts_of` returns them.

    Raises:
        Bad: R-DLT-020, a tensor of the structure cannot have these parts.
    """
    try:
        return _whole(structure, parts)
    except Bad:
        raise Bad("R-DLT-020") from None


def _whole(structure: Entry, parts: Mapping[str, Plain]) -> Tensor:
    clause = "R-DLT-020"
    shape, patterns = parts[""].shape, parts[""].patterns()
    mask = [1] * len(patterns)
    if structure["mask"]:
        mask = parts["mask"].patterns() if "mask" in parts else [int(p != 0) for p in patterns]
    exact, dtype = structure["quantiser"] == "exact", structure["dtype"]
    need(all(bit or not p for bit, p in zip(mask, patterns, strict=True)), clause)
    zeros = any(bit and not p for bit, p in zip(mask, patterns, strict=True))
    need("mask" not in parts or zeros, clause)
    need(exact or all(p % 2**31 for bit, p in zip(mask, patterns, strict=True) if bit), clause)
    levels: list[int | None] = [
        _level(p, exact, dtype) if bit else None for bit, p in zip(mask, patterns, strict=True)
    ]
    marks: list[int | None] = [None] * len(patterns)
    stored = stored_dtype(structure)
    if stored is not None:
        own = structure["importance"]
        numbers = own["quantiser"] != "exact"
        for i, p in enumerate(parts["importance"].patterns()):
            if own["over"] == "survivors" and not mask[i]:
                need(p == 0, clause)
                continue
            need(not numbers or 0 < p < 1 << 31, clause)
            marks[i] = p - 1 if numbers else _level(p, True, stored)
    entry, found = _entry(structure, shape, parts, levels, marks)
    _, columns = matrix(entry)
    importances: list[float | None] = []
    out = []
    for p, (level, mark) in enumerate(zip(levels, marks, strict=True)):
        importance = None
        if "importance" in entry and entry["importance"]["over"] == "factors":
            importance = f32(found["rows"][p // columns] * found["columns"][p % columns])
        elif mark is not None:
            importance = importance_of(entry["importance"], mark, found)
        importances.append(importance)
        out.append(0 if level is None else reconstruct(entry, p, level, importance, found))
    data = Plain.of(dtype, shape, out).data
    return Tensor(dtype, tuple(shape), data, mask, importances, levels, marks, found)


def _level(pattern: int, exact: bool, dtype: str) -> int:
    """Returns the level of a pattern of a part."""
    if exact:
        bits = FLOATS[dtype].bits
        return (2 * pattern + (pattern >> (bits - 1))) % (1 << bits)
    return 2 * (pattern % 2**31 - 1) + (pattern >> 31)


def _entry(
    structure: Entry,
    shape: list[int],
    parts: Mapping[str, Plain],
    levels: list[int | None],
    marks: list[int | None],
) -> tuple[Entry, dict[str, list[float]]]:
    """Returns an entry for the tensor and its vectors, after all checks that an entry with these needs."""
    numbers = parts["vectors"].patterns() if "vectors" in parts else []
    count, _ = sizes_of(structure, shape)
    steps = [number.to_bytes(4, "little") for number in numbers[:count]]
    greatest = [max((n for n in own if n is not None), default=0) for own in (levels, marks)]
    entry = entry_of(structure, shape, steps, greatest)
    check_fingerprints(entry["fingerprints"], entry["dtype"])
    if "importance" in entry:
        check_importance(entry["importance"])
    found, at = {}, count
    for name, size, dtype in vectors(entry):
        own = [number_of(number, "F32") for number in numbers[at : at + size]]
        for number, x in zip(numbers[at : at + size], own, strict=True):
            need(math.isfinite(x), "R-DLT-020")
            need(pattern_of(number_of(pattern_of(x, dtype), dtype), "F32") == number, "R-DLT-020")
        found[name] = own
        at += size
    check_vectors(entry, found)
    return entry, found
