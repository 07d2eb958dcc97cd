"""Builds deltas and their bases from the elements of tensors."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sfp_conformance.forge import Entry, Forge, Part, exact, hand_part, raw_part, table, table_for
from sfp_conformance.slow_reader import BYTES
from sfp_conformance.slow_reader.delta import (
    ADDED,
    CHANGED,
    REMOVED,
    REPLACED,
    STORED,
    UNCHANGED,
    element,
    order,
)

from ..encode import elements
from ..suite import Edit

Dense = Callable[[int, int], bool]  # number of levels and of elements of a bucket -> whether it is dense


@dataclass
class Pair:
    """A tensor in the base and in the result: bytes, or None if it does not exist."""

    name: str
    dtype: str
    shape: list[int]
    base: bytes | None
    new: bytes | None
    kind: int | None = None

    @property
    def told(self) -> int:
        """The kind: the given one, or what the bytes say."""
        if self.kind is not None:
            return self.kind
        if self.base is None or self.new is None:
            return ADDED if self.base is None else REMOVED
        return UNCHANGED if self.base == self.new else CHANGED


def few(levels: int, size: int) -> bool:
    """Makes a bucket dense if more than half of its elements change."""
    return 2 * levels > size


def coded(
    block: int, dtype: str, old: bytes, new: bytes, dense: Dense
) -> tuple[list[int], list[int], list[int]]:
    """Codes the elements of a pool (28.2). Returns counts, gaps and levels."""
    w, e = element(dtype)
    size = w // 8
    counts: list[int] = []
    gaps: list[int] = []
    levels: list[int] = []
    for first in range(0, len(old) // size, block):
        buckets: list[list[int]] = [[] for _ in range(1 << e)]
        for at in range(first, min(first + block, len(old) // size)):
            b, n = (int.from_bytes(data[at * size :][:size], "little") for data in (old, new))
            d = (order(n, w, e) - order(b, w, e)) % (1 << w)
            key = ((b - 1) % (1 << (w - 1))) >> (w - 1 - e) if e else 0
            buckets[key].append(2 * d % (1 << w) if d < 1 << (w - 1) else 2 * ((1 << w) - d) - 1)
        for bucket in buckets:
            places = [i for i, level in enumerate(bucket) if level]
            whole = bool(bucket) and dense(len(places), len(bucket))
            counts.append(2 * len(bucket) + 1 if whole else 2 * len(places))
            levels += bucket if whole else [bucket[i] for i in places]
            gaps += (
                [] if whole else [i - before - 1 for before, i in zip([-1, *places], places, strict=False)]
            )
    return counts, gaps, levels


def numbers_part(name: str, dtype: str, shape: list[int], numbers: list[int]) -> Part:
    """Encodes a tensor of numbers."""
    if not numbers or (dtype == "F64" and max(numbers) - min(numbers) >= 1 << 56):
        size = BYTES[dtype]
        patterns = [n >> 1 | (n & 1) << (8 * size - 1) for n in numbers]
        raw = b"".join(pattern.to_bytes(size, "little") for pattern in patterns)
        return raw_part(name, dtype, shape, raw, chunk=64)
    one_class = max(numbers) == min(numbers)
    own = table([0], base=numbers[0]) if one_class else table_for(numbers)
    entry: Entry = {
        "name": name,
        "dtype": dtype,
        "shape": shape,
        "chunk": 64,
        "fingerprints": exact(dtype, **own),
    }
    return hand_part(entry, {"fingerprints": numbers})


def shared(names: list[str]) -> list[int]:
    """Returns the number of bytes that each name shares with the one before, in whole characters."""
    out = []
    for before, name in zip(["", *names], names, strict=False):
        size = 0
        while size < min(len(before), len(name), 255) and before[size] == name[size]:
            size += 1
        while len(name[:size].encode()) > 255:
            size -= 1
        out.append(len(name[:size].encode()))
    return out


def delta(
    pairs: list[Pair],
    *,
    block: int = 32,
    dense: Dense = few,
    pools: list[tuple[str, int]] | None = None,
    base: str | None = None,
    metadata: dict[str, str] | None = None,
) -> bytes:
    """Builds a delta from tensors.

    Args:
        pools: dtype and number of tensors of each pool; None makes one pool for each dtype.
    """
    changed = [pair for pair in pairs if pair.told == CHANGED]
    if pools is None:
        dtypes = list(dict.fromkeys(pair.dtype for pair in changed))
        pools = [(dtype, sum(pair.dtype == dtype for pair in changed)) for dtype in dtypes]
    rest = {dtype: [pair for pair in changed if pair.dtype == dtype] for dtype, _ in pools}
    parts: list[Part] = []
    maps: list[dict[str, Any]] = []
    for number, (dtype, count) in enumerate(pools):
        members, rest[dtype] = rest[dtype][:count], rest[dtype][count:]
        old, new = (
            b"".join(own) for own in zip(*((p.base or b"", p.new or b"") for p in members), strict=True)
        )
        counts, gaps, levels = coded(block, dtype, old, new, dense)
        names = {key: f"{key} {number}" for key in ("counts", "gaps", "differences")}
        w, e = element(dtype)
        parts.append(numbers_part(names["counts"], "F32", [len(counts) >> e, 1 << e], counts))
        parts.append(numbers_part(names["gaps"], "F32", [len(gaps)], gaps))
        parts.append(numbers_part(names["differences"], STORED[w], [len(levels)], levels))
        maps.append({"dtype": dtype, "tensors": count, **names})
    for pair in pairs:
        if pair.told in (REPLACED, ADDED):
            parts.append(raw_part(pair.name, pair.dtype, pair.shape, pair.new or b"", chunk=64))
    names_ = [pair.name for pair in pairs]
    sizes = shared(names_)
    root: dict[str, Any] = {
        "features": ["delta"],
        "delta": {
            "block": block,
            "names": [name.encode()[size:].decode() for name, size in zip(names_, sizes, strict=True)],
            "shared": bytes(sizes),
            "dtypes": [pair.dtype for pair in pairs],
            "shapes": [pair.shape for pair in pairs],
            "kinds": bytes(pair.told for pair in pairs),
            "checksums": b"".join(
                struct.pack(
                    "<II", *(zlib.crc32(data) if data is not None else 0 for data in (pair.base, pair.new))
                )
                for pair in pairs
            ),
            "pools": maps,
            **({} if base is None else {"base": base}),
        },
        **({} if metadata is None else {"metadata": metadata}),
    }
    return Forge(root, parts).build()


def base_of(pairs: list[Pair]) -> bytes:
    """Returns the file of the base."""
    parts = [raw_part(p.name, p.dtype, p.shape, p.base, chunk=64) for p in pairs if p.base is not None]
    return Forge({}, parts).build()


def stepped(dtype: str, raw: bytes, every: int, seed: int = 3) -> bytes:
    """Returns elements of which about one in ``every`` differs from ``raw``, mostly by a few units."""
    w, _ = element(dtype)
    size, state, out = w // 8, seed, b""
    for at in range(0, len(raw), size):
        pattern = int.from_bytes(raw[at : at + size], "little")
        state = (state * 1103515245 + 12345) % 2**31
        if (state >> 8) % every == 0:
            step = 1 + (state >> 16) % (300 if state % 11 == 0 else 4)
            pattern = (
                pattern ^ 1 if dtype == "BOOL" else (pattern + (step if state & 64 else -step)) % (1 << w)
            )
        out += pattern.to_bytes(size, "little")
    return out


def sample() -> list[Pair]:
    """Returns tensors of every kind, in several dtypes."""
    weights = elements("BF16", 100)
    return [
        Pair("layers.0.weight", "BF16", [5, 20], weights, stepped("BF16", weights, 3)),
        Pair("layers.0.bias", "F32", [7], elements("F32", 7), stepped("F32", elements("F32", 7), 2)),
        Pair("layers.1.weight", "BF16", [30], weights[:60], stepped("BF16", weights[:60], 1, 5)),
        Pair("gone", "F16", [2], bytes(4), None),
        Pair("same", "I32", [2, 3], bytes(range(24)), bytes(range(24))),
        Pair("new", "U8", [3], None, b"abc"),
        Pair("other", "I16", [4], elements("I16", 4), bytes(range(8)), REPLACED),
    ]


def map_of(file: Forge) -> dict[str, Any]:
    """Returns the map `delta` of a file."""
    found: dict[str, Any] = file.root["delta"]
    return found


def edit_of(key: str, change: Callable[[Any], Any]) -> Edit:
    """Returns an edit that replaces the value of a key of the map `delta` by a function of it."""

    def edit(file: Forge) -> None:
        map_of(file)[key] = change(map_of(file)[key])

    return edit


def without_checksum(data: bytes, number: int) -> bytes:
    """Returns a delta in which the checksum of the result's tensor is 0."""
    file = Forge.of(data)
    checksums = map_of(file)["checksums"]
    map_of(file)["checksums"] = checksums[: 8 * number + 4] + bytes(4) + checksums[8 * number + 8 :]
    return file.build()
