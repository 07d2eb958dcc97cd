"""Deltas (chapter 28): the map of the root, and the result of a delta and its base."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from typing import Any

from .entries import get
from .numbers import BYTES, Bad, Entry, need
from .parts import PARTS, Plain, check_structured, parts_of, whole
from .values import Tensor

# dtype -> bits of an element, bits of its exponent.
ELEMENTS = {"F64": (64, 11), "C128": (64, 11), "F32": (32, 8), "C64": (32, 8), "F16": (16, 5)}
ELEMENTS |= {"BF16": (16, 8), "F8_E4M3": (8, 4), "F8_E5M2": (8, 5)}
STORED = {8: "F8_E4M3", 16: "BF16", 32: "F32", 64: "F64"}
UNCHANGED, CHANGED, REPLACED, ADDED, REMOVED = range(5)


def element(dtype: str) -> tuple[int, int]:
    """Returns w and e, the bits of an element and of its exponent."""
    return ELEMENTS.get(dtype, (8 * BYTES[dtype], 0))


def elements(dtype: str, shape: list[int]) -> int:
    """Returns the number of elements; a complex number is two."""
    return math.prod(shape) * BYTES[dtype] * 8 // element(dtype)[0]


def check_delta(root: dict[str, Any]) -> None:
    """Checks the map `delta` against itself and the tensor entries (28.1)."""
    if "delta" not in root.get("features", []):
        need("delta" not in root, "R-DIR-007")
        return
    delta = get(root, "delta", dict)
    if "base" in delta:
        get(delta, "base", str)
    need(1 <= get(delta, "block", int) <= 1 << 24, "R-DLT-005")
    names, dtypes = get(delta, "names", list), get(delta, "dtypes", list)
    shapes, pools = get(delta, "shapes", list), get(delta, "pools", list)
    kinds, checksums = get(delta, "kinds", bytes), get(delta, "checksums", bytes)
    need(all(isinstance(text, str) for text in names + dtypes), "R-DIR-003")
    need(all(isinstance(shape, list) for shape in shapes), "R-DIR-003")
    need(len(dtypes) == len(shapes) == len(kinds) == len(names), "R-DLT-001")
    need(len(checksums) == 8 * len(names), "R-DLT-001")
    need(len(get(delta, "shared", bytes)) == len(names), "R-DLT-001")
    names = names_of(delta)
    for i, name in enumerate(names):
        need(name != "", "R-TEN-002")
        need(name not in names[:i], "R-DLT-002")
        need(dtypes[i] in BYTES, "R-TEN-003")
        need(all(isinstance(size, int) for size in shapes[i]), "R-DIR-003")
        need(math.prod(size or 1 for size in shapes[i]) <= 1 << 48, "R-TEN-005")
        need(kinds[i] <= REMOVED, "R-DLT-003")
        base, result = struct.unpack_from("<II", checksums, 8 * i)
        need(kinds[i] != ADDED or base == 0, "R-DLT-004")
        need(kinds[i] != REMOVED or result == 0, "R-DLT-004")
        need(kinds[i] != UNCHANGED or base == result, "R-DLT-004")
    check_structured(root, names)
    for pool in pools:
        need(isinstance(pool, dict), "R-DIR-003")
        for key in ("dtype", "counts", "gaps", "differences"):
            get(pool, key, str)
        need(get(pool, "tensors", int) > 0, "R-DLT-006")
    for dtype in {*dtypes, *(pool["dtype"] for pool in pools)}:
        total = sum(pool["tensors"] for pool in pools if pool["dtype"] == dtype)
        need(
            total == sum(k == CHANGED and d == dtype for k, d in zip(kinds, dtypes, strict=True)), "R-DLT-006"
        )
    _check_tensors(root, delta)


def _check_tensors(root: dict[str, Any], delta: dict[str, Any]) -> None:
    entries = {entry["name"]: entry for entry in root["tensors"]}
    used = []
    for pool, members in zip(delta["pools"], members_of(delta), strict=True):
        w, e = element(pool["dtype"])
        size = sum(elements(pool["dtype"], delta["shapes"][i]) for i in members)
        blocks = -(-size // delta["block"])
        for key, dtype in (("counts", "F32"), ("gaps", "F32"), ("differences", STORED[w])):
            used.append(pool[key])
            need(pool[key] in entries, "R-DLT-007")
            entry = entries[pool[key]]
            need(entry["dtype"] == dtype, "R-DLT-007")
            need(
                entry["shape"] == [blocks, 1 << e] if key == "counts" else len(entry["shape"]) == 1,
                "R-DLT-007",
            )
    for i, name in enumerate(names_of(delta)):
        if delta["kinds"][i] in (REPLACED, ADDED):
            used.append(name)
            need(name in entries, "R-DLT-008")
            need(entries[name]["dtype"] == delta["dtypes"][i], "R-DLT-008")
            need(entries[name]["shape"] == delta["shapes"][i], "R-DLT-008")
    need(sorted(used) == sorted(entries), "R-DLT-008")


def names_of(delta: dict[str, Any]) -> list[str]:
    """Returns the names, joined with the bytes that they share with the names before."""
    out, before = [], b""
    for rest, size in zip(delta["names"], delta["shared"], strict=True):
        need(size <= len(before), "R-DLT-016")
        before = before[:size] + rest.encode()
        try:
            out.append(before.decode())
        except UnicodeDecodeError:
            raise Bad("R-DLT-016") from None
    return out


def members_of(delta: dict[str, Any]) -> list[list[int]]:
    """Returns the indices of the tensors of each pool."""
    rest: dict[str, list[int]] = {}
    for i, dtype in enumerate(delta["dtypes"]):
        if delta["kinds"][i] == CHANGED:
            rest.setdefault(dtype, []).append(i)
    out = []
    for pool in delta["pools"]:
        own = rest[pool["dtype"]]
        out.append(own[: pool["tensors"]])
        rest[pool["dtype"]] = own[pool["tensors"] :]
    return out


def in_parts(
    root: dict[str, Any], entries: Mapping[str, Entry], base: Mapping[str, Tensor]
) -> dict[str, Plain]:
    """Returns the tensors of a base, with the parts of those that a delta lists as parts."""
    delta, out = root["delta"], {}
    structured = delta.get("structured", [0] * len(delta["names"]))
    split = {name for name, number in zip(names_of(delta), structured, strict=True) if number}
    for name, tensor in base.items():
        if name not in split:
            need(name not in out, "R-DLT-009")
            out[name] = Plain(tensor.dtype, list(tensor.shape), tensor.data)
            continue
        for part, plain in parts_of(entries[name], tensor).items():
            named = name + delta["separator"] + part if part else name
            need(named not in out and (not part or named not in base), "R-DLT-009")
            out[named] = plain
    return out


def result_of(
    root: dict[str, Any],
    stored: Mapping[str, Tensor],
    entries: Mapping[str, Entry],
    base: Mapping[str, Tensor],
) -> dict[str, tuple[Entry, Tensor]]:
    """Returns the tensors of the result (28.3, 28.4), each with a map whose keys say what it has.

    The keys are `mask` and `importance`.

    Args:
        root: the checked root of a delta.
        stored: the decoded tensors of its file.
        entries, base: the entries and the tensors of the base.

    Raises:
        Bad: the base is another one, or the delta breaks a clause.
    """
    delta, own = root["delta"], {entry["name"]: entry for entry in root["tensors"]}
    plain = {name: Plain(t.dtype, list(t.shape), t.data) for name, t in stored.items()}
    found = elements_of(root, plain, in_parts(root, entries, base))
    names = names_of(delta)
    structured = delta.get("structured", [0] * len(names))
    out: dict[str, tuple[Entry, Tensor]] = {}
    used = set()
    for i, name in enumerate(names):
        if structured[i] == 0:
            continue
        structure = delta["structures"][structured[i] - 1]
        listed = {part: name + delta["separator"] + part for part in PARTS}
        parts = {part: found[other] for part, other in listed.items() if other in found}
        used |= set(listed.values())
        map_ = {key: structure[key] for key in ("mask", "importance") if structure.get(key)}
        out[name] = map_, whole(structure, {"": found[name], **parts})
    for name, one in found.items():
        if name not in out and name not in used:
            tensor = Tensor(one.dtype, tuple(one.shape), one.data, [], [])
            out[name] = (own[name], stored[name]) if name in own else ({}, tensor)
    return {name: out[name] for name in found if name in out}


def elements_of(
    root: dict[str, Any], stored: Mapping[str, Plain], base: Mapping[str, Plain]
) -> dict[str, Plain]:
    """Returns the elements of the tensors and parts of the result (28.3).

    Args:
        root: the checked root of a delta.
        stored: the decoded tensors of its file.
        base: the tensors of the base, or their parts.

    Raises:
        Bad: the base is another one, or the delta breaks a clause.
    """
    delta = root["delta"]
    names, kinds = names_of(delta), delta["kinds"]
    for i, name in enumerate(names):
        need((name in base) == (kinds[i] != ADDED), "R-DLT-009")
        if kinds[i] != ADDED:
            need(
                zlib.crc32(base[name].data) == struct.unpack_from("<I", delta["checksums"], 8 * i)[0],
                "R-DLT-009",
            )
        if kinds[i] not in (ADDED, REPLACED):
            need(
                (base[name].dtype, base[name].shape) == (delta["dtypes"][i], delta["shapes"][i]), "R-DLT-009"
            )
    need(set(base) <= set(names), "R-DLT-009")
    changed = {}
    for pool, members in zip(delta["pools"], members_of(delta), strict=True):
        old = b"".join(base[names[i]].data for i in members)
        new = _changed(delta["block"], pool, stored, old)
        for i in members:
            size = len(base[names[i]].data)
            changed[names[i]], new = new[:size], new[size:]
    out = {}
    for i, name in enumerate(names):
        if kinds[i] == REMOVED:
            continue
        if kinds[i] in (REPLACED, ADDED):
            out[name] = stored[name]
        elif kinds[i] == CHANGED:
            out[name] = Plain(delta["dtypes"][i], delta["shapes"][i], changed[name])
        else:
            out[name] = base[name]
        need(
            zlib.crc32(out[name].data) == struct.unpack_from("<I", delta["checksums"], 8 * i + 4)[0],
            "R-DLT-012",
        )
    return out


def _changed(block: int, pool: dict[str, Any], stored: Mapping[str, Plain], old: bytes) -> bytes:
    """Returns the elements of a pool's tensors in the result."""
    w, e = element(pool["dtype"])
    size, half = w // 8, 1 << (w - 1)
    counts, gaps = numbers(stored[pool["counts"]]), numbers(stored[pool["gaps"]])
    levels = numbers(stored[pool["differences"]])
    need(sum(count // 2 for count in counts) == len(levels), "R-DLT-010")
    need(sum(count // 2 for count in counts if count % 2 == 0) == len(gaps), "R-DLT-010")
    new = bytearray(old)
    for first in range(0, len(old) // size, block):
        row = counts[first // block << e : (first // block + 1) << e]
        queues: list[tuple[list[int], list[int]]] = []
        for count in row:
            taken = count // 2
            own, levels = levels[:taken], levels[taken:]
            of_gaps = 0 if count % 2 else taken
            waits, gaps = gaps[:of_gaps], gaps[of_gaps:]
            queues.append((own, waits))
        for at in range(first, min(first + block, len(old) // size)):
            b = int.from_bytes(old[at * size : (at + 1) * size], "little")
            k = ((b - 1) % half) >> (w - 1 - e) if e else 0
            own, waits = queues[k]
            dense = row[k] % 2 == 1
            if dense:
                need(bool(own), "R-DLT-011")
            elif own and waits[0]:
                waits[0] -= 1
                continue
            elif own:
                waits.pop(0)
            else:
                continue
            level = own.pop(0)
            d = level // 2 if level % 2 == 0 else (1 << w) - (level + 1) // 2
            n = order((order(b, w, e) + d) % (1 << w), w, e)
            new[at * size : (at + 1) * size] = n.to_bytes(size, "little")
        need(not any(own for own, _ in queues), "R-DLT-011")
    return bytes(new)


def order(b: int, w: int, e: int) -> int:
    """Maps a pattern to a number that ascends with the value, and back."""
    return b if e == 0 or b < 1 << (w - 1) else b ^ ((1 << (w - 1)) - 1)


def numbers(tensor: Plain) -> list[int]:
    """Returns the numbers of the elements of a tensor: the patterns with the sign at the lowest bit."""
    size = BYTES[tensor.dtype]
    patterns = [
        int.from_bytes(tensor.data[at : at + size], "little") for at in range(0, len(tensor.data), size)
    ]
    return [(2 * b + (b >> (8 * size - 1))) % (1 << 8 * size) for b in patterns]
