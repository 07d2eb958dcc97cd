"""Keyed tables (chapter 17): the array `keyed` of the root, and look-ups."""

from __future__ import annotations

import math
import struct
from itertools import pairwise
from typing import Any

from .entries import absent, check_table, get, lengths, step_of, top, word
from .numbers import Entry, f32, need, number_of
from .planes import codewords
from .values import Tensor

WORD = 1 << 64


def check_keyed(root: dict[str, Any]) -> None:
    """Checks the array `keyed` against itself and the tensor entries (17.1)."""
    if "keyed" not in root.get("features", []):
        need("keyed" not in root, "R-DIR-007")
        return
    tables = get(root, "keyed", list)
    need(bool(tables), "R-KEY-002")
    need(all(isinstance(table, dict) for table in tables), "R-DIR-003")
    entries = {entry["name"]: entry for entry in root["tensors"]}
    for i, table in enumerate(tables):
        check_keyed_table(table)
        need(all(table["name"] != other["name"] for other in tables[:i]), "R-KEY-003")
        need(all(table["bits"] != other["bits"] for other in tables[:i]), "R-KEY-012")
        need(table["bits"] in entries, "R-KEY-011")
        entry = entries[table["bits"]]
        need((entry["dtype"], entry["coding"]) == ("U8", "raw"), "R-KEY-011")
        need(entry["shape"] == [array_bytes(table)], "R-KEY-011")
        need(entry["segment"] * entry["chunk"] % 64 == 0, "R-KEY-011")


def check_keyed_table(table: Entry) -> None:
    """Checks a map of `keyed` against itself."""
    need(get(table, "name", str) != "", "R-TEN-002")
    get(table, "bits", str)
    get(table, "keys", int)
    need(get(table, "seed", int) < 1 << 32, "R-KEY-005")
    segment, starts = get(table, "segment", int), get(table, "starts", int)
    need(segment in [1 << n for n in range(3, 25)], "R-KEY-006")
    need(starts % segment == 0 and segment <= starts <= 1 << 32, "R-KEY-006")
    outputs = get(table, "outputs", int)
    need(1 <= outputs <= 4096, "R-KEY-004")
    if outputs > 1:
        _check_code(get(table, "gaps", dict), outputs + 1)
    else:
        absent(table, "gaps")
    _check_levels(get(table, "levels", dict))
    checks = get(table, "checks", bytes)
    need(len(checks) == len(table["levels"]["extra"]) and max(checks) <= 32, "R-KEY-010")
    if "importance" in table:
        importance = get(table, "importance", dict)
        need(len(get(importance, "step", bytes)) == 4, "R-QNT-003")
        need(0 < step_of(importance) < math.inf, "R-QNT-003")
        _check_code(importance, 1 << 31)
        need(math.isfinite(f32(f32(top(importance) - 1) * step_of(importance))), "R-IMP-006")


def _check_levels(levels: Entry) -> None:
    if get(levels, "quantiser", str) == "uniform":
        step = get(levels, "step", bytes)
        need(len(step) == 4 and 0 < step_of(levels) < math.inf, "R-QNT-003")
        absent(levels, "count", "centroids")
        _check_code(levels, 1 << 32)
        need(math.isfinite(f32(f32((top(levels) - 1) // 2) * step_of(levels))), "R-QNT-006")
        return
    word(levels, "quantiser", ("table",), "R-KEY-008")
    absent(levels, "step")
    count = get(levels, "count", int)
    need(1 <= count <= 65536, "R-QNT-004")
    _check_code(levels, 2 * count)
    data = get(levels, "centroids", bytes)
    need(len(data) == 4 * count, "R-KEY-009")
    centroids = centroids_of(levels)
    need(all(math.isfinite(x) and math.copysign(1, x) == 1 for x in centroids), "R-KEY-009")
    need(all(a < b for a, b in pairwise(centroids)), "R-KEY-009")


def _check_code(source: Entry, bound: int) -> None:
    """Checks a code table whose levels are below a bound, with at most one code."""
    check_table(source, 1 << 80)
    need(source["group"] == 1 and len(source["codes"]) <= 1 and "window" not in source, "R-KEY-007")
    check_table(source, bound)


def centroids_of(levels: Entry) -> list[float]:
    """Returns the centroids of the weights."""
    return [number_of(pattern, "F32") for (pattern,) in struct.iter_unpack("<I", levels["centroids"])]


def most_bits(table: Entry) -> int:
    """Returns R, the greatest number of bits of a row."""
    found = {}
    for key in ("gaps", "levels", "importance"):
        source = table.get(key, {"extra": b"\0", "codes": [], "group": 1})
        sizes = (lengths(source) or [[0]])[0]
        found[key] = max(size + extra for size, extra in zip(sizes, source["extra"], strict=True))
    return int(
        table["outputs"] * (found["gaps"] + found["levels"]) + found["importance"] + max(table["checks"])
    )


def array_bytes(table: Entry) -> int:
    """Returns the number of bytes of the bit array."""
    bits: int = table["starts"] + 3 * table["segment"] + most_bits(table)
    return 8 * -(-bits // 64) + 8


def hash_of(key: bytes, seed: int) -> tuple[int, int]:
    """Returns the two numbers of the hash (17.2)."""
    a = b = seed
    for at in range(0, len(key), 16):
        whole = at + 16 <= len(key)
        x, y = struct.unpack("<QQ", key[at : at + 16].ljust(16, b"\0"))
        a ^= _rotl(x * 0x87C37B91114253D5, 31) * 0x4CF5AD432745937F % WORD
        if whole:
            a = ((_rotl(a, 27) + b) * 5 + 0x52DCE729) % WORD
        b ^= _rotl(y * 0x4CF5AD432745937F, 33) * 0x87C37B91114253D5 % WORD
        if whole:
            b = ((_rotl(b, 31) + a) * 5 + 0x38495AB5) % WORD
    a, b = a ^ len(key), b ^ len(key)
    a = (a + b) % WORD
    b = (b + a) % WORD
    a, b = _mix(a), _mix(b)
    a = (a + b) % WORD
    return a, (b + a) % WORD


def _rotl(x: int, n: int) -> int:
    x %= WORD
    return (x << n | x >> (64 - n)) % WORD


def _mix(x: int) -> int:
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD % WORD
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 % WORD
    return x ^ x >> 33


def positions_of(table: Entry, key: bytes) -> list[int]:
    """Returns the four positions of a key's row (17.2)."""
    a, b = hash_of(key, table["seed"])
    w = [a % (1 << 32), a >> 32, b % (1 << 32), b >> 32]
    first: int = w[0] * table["starts"] >> 32
    z = table["segment"]
    return [first, *((first + k * z) ^ (w[k] % z) for k in (1, 2, 3))]


class Row:
    """The bits of a key's row, read from the first on."""

    def __init__(self, table: Entry, data: bytes, key: bytes) -> None:
        self.data, self.at = data, positions_of(table, key)

    def bit(self) -> int:
        found = 0
        for k, at in enumerate(self.at):
            found ^= self.data[at // 8] >> at % 8 & 1
            self.at[k] += 1
        return found

    def next(self, source: Entry) -> tuple[int, int]:
        """Reads a level. Returns its class and the level."""
        c = 0
        if source["codes"]:
            words, bits = codewords(lengths(source)[0]), ""
            while bits not in words:
                bits += str(self.bit())
            c = words[bits]
        residual = sum(self.bit() << i for i in range(source["extra"][c]))
        return c, source["base"] + sum(1 << e for e in source["extra"][:c]) + residual


def look_up(table: Entry, data: bytes, key: bytes) -> tuple[list[float], bool, float]:
    """Looks a key up (17.3). Returns its weights, whether it is known, and its importance.

    Args:
        table: a checked map of `keyed`.
        data: the bytes of its bit array.
        key: the key.
    """
    row, levels, outputs = Row(table, data, key), table["levels"], table["outputs"]
    weights, greatest, o, importance = [0.0] * outputs, None, 0, 0.0
    while o < outputs:
        if outputs > 1:
            o += row.next(table["gaps"])[1]
        if o < outputs:
            c, level = row.next(levels)
            if levels["quantiser"] == "uniform":
                x = f32(f32(level // 2) * step_of(levels))
            else:
                x = centroids_of(levels)[level // 2]
            weights[o] = -x if level % 2 else x
            greatest = c if greatest is None else max(greatest, c)
            o += 1
    if "importance" in table:
        importance = f32(f32(row.next(table["importance"])[1]) * step_of(table["importance"]))
    if greatest is not None and not any(row.bit() for _ in range(table["checks"][greatest])):
        return weights, True, importance
    return [0.0] * outputs, False, 0.0


def look_ups(root: dict[str, Any], tensors: dict[str, Tensor], keys: list[bytes]) -> dict[str, Tensor]:
    """Looks keys up in all tables. Returns tensors `NAME`, `NAME.known` and `NAME.importance`."""
    out = {}
    for table in root["keyed"]:
        found = [look_up(table, tensors[table["bits"]].data, key) for key in keys]
        name, n = table["name"], len(keys)
        weights = b"".join(struct.pack("<f", x) for row, _, _ in found for x in row)
        out[name] = Tensor("F32", (n, table["outputs"]), weights, [], [])
        known = bytes(known for _, known, _ in found)
        out[f"{name}.known"] = Tensor("BOOL", (n,), known, [], [])
        if "importance" in table:
            numbers = b"".join(struct.pack("<f", x) for _, _, x in found)
            out[f"{name}.importance"] = Tensor("F32", (n,), numbers, [], [])
    return out
