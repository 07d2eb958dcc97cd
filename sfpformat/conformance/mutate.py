"""Damaged files from valid ones: changed in a few places, with all lengths and checksums mended or none.

Rules: nothing here reads a file by the package's reader; a file is taken apart by the few fields that bind it
together (SPEC.md chapters 4, 5, 7), so that whatever is changed reaches the checks behind the checksums.
"""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import msgpack

_PREAMBLE = struct.Struct("<8sHH4sQQQI16s")
_SIZE = 64
_EXTREMES = (
    0,
    1,
    31,
    32,
    33,
    63,
    64,
    65,
    127,
    255,
    256,
    65535,
    65536,
    2**31,
    2**32 - 1,
    2**32,
    2**63,
    2**64 - 1,
)
_WORDS = ("", "F16", "F32", "BF16", "raw", "uniform", "table", "exact", "runs", "octets", "row", "all", "w")


@dataclass
class Pieces:
    """A file taken apart: the directory's root, and for each tensor its chunks, the vector chunk first."""

    root: dict[str, Any]
    chunks: list[list[bytearray]]

    @classmethod
    def of(cls, data: bytes) -> Pieces:
        """Takes a valid file apart."""
        (at,) = struct.unpack_from("<Q", data, 16)
        root: dict[str, Any] = msgpack.unpackb(data[at:], strict_map_key=False)
        chunks, place = [], _SIZE
        for entry in root["tensors"]:
            mine = []
            for length, _ in struct.iter_unpack("<II", entry.get("vectors", b"") + entry["chunks"]):
                mine.append(bytearray(data[place : place + length]))
                place += length
            chunks.append(mine)
        return cls(root, chunks)

    def build(self) -> bytes:
        """The file, with lengths, places and checksums mended."""
        for entry, mine in zip(self.root["tensors"], self.chunks, strict=True):
            records = [struct.pack("<II", len(chunk), zlib.crc32(chunk)) for chunk in mine]
            own = int("vectors" in entry)
            if own:
                entry["vectors"] = b"".join(records[:1])
            entry["chunks"] = b"".join(records[own:])
        return whole(b"".join(b"".join(mine) for mine in self.chunks), msgpack.packb(_sorted(self.root)))


def whole(chunks: bytes, directory: bytes) -> bytes:
    """A file of these chunks and this directory, under a right preamble."""
    at, crc = _SIZE + len(chunks), zlib.crc32(directory)
    lengths = (at, len(directory), at + len(directory))
    fields = _PREAMBLE.pack(b"\x89SFP\r\n\x1a\n", 1, 0, bytes(4), *lengths, crc, bytes(16))
    return fields + struct.pack("<I", zlib.crc32(fields)) + chunks + directory


def _sorted(value: Any) -> Any:
    """Maps in the order that R-MSG-004 asks for."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value, key=lambda key: str(key).encode())}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A valid file, changed in one to three places."""
    if rng.randrange(4) == 0:
        return _unmended(data, rng)
    pieces = Pieces.of(data)
    for _ in range(rng.randrange(1, 4)):
        _change(pieces, rng)
    out = pieces.build()
    if (
        rng.randrange(8) == 0
    ):  # the directory's bytes, not its values: other ways to write them, and wrong ones
        (at,) = struct.unpack_from("<Q", out, 16)
        out = whole(out[_SIZE:at], bytes(_struck(bytearray(out[at:]), rng)))
    return out


def _unmended(data: bytes, rng: random.Random) -> bytes:
    what = rng.randrange(4)
    if what == 0:
        return data[: rng.randrange(len(data))]
    if what == 1:
        return data + rng.randbytes(rng.randrange(1, 80))
    if what == 2:  # the preamble, its own checksum mended
        head = _struck(bytearray(data[: _PREAMBLE.size]), rng)
        return bytes(head) + struct.pack("<I", zlib.crc32(head)) + data[_SIZE:]
    return bytes(_struck(bytearray(data), rng))


def _struck(data: bytearray, rng: random.Random) -> bytearray:
    """Bytes with a bit, a byte or a few bytes changed, more often near their start; the length stays."""
    if data:
        at = rng.randrange(len(data) if rng.randrange(2) else min(len(data), 128))
        what = rng.randrange(4)
        if what == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        else:
            few = min(rng.randrange(1, 9), len(data) - at)
            data[at : at + few] = bytes(few) if what == 2 else rng.randbytes(few)
    return data


def _change(pieces: Pieces, rng: random.Random) -> None:
    entries = pieces.root["tensors"]
    if not entries or rng.randrange(20) == 0:
        _change_map(pieces.root.setdefault("metadata", {}), rng)
        return
    k = rng.randrange(len(entries))
    mine, what = pieces.chunks[k], rng.randrange(12)
    if what < 5 or not mine:
        _change_map(entries[k], rng)
    elif what < 9:
        _struck(rng.choice(mine), rng)
    elif what == 9:
        rng.choice(mine).extend(bytes(rng.choice([1, 64])))
    elif what == 10:
        mine.append(bytearray(rng.choice(mine)))
    else:
        chunk = rng.choice(mine)
        del chunk[-rng.choice([1, 64]) :]


def _change_map(fields: dict[Any, Any], rng: random.Random) -> None:
    names = [name for name in fields if name not in ("chunks", "vectors")]
    what = rng.randrange(10)
    if what == 0 or not names:
        fields[rng.choice(["x-a", "base", "step", "zz"])] = rng.choice([0, "a", b"\0"])
        return
    name = rng.choice(names)
    if what == 1:
        del fields[name]
    elif isinstance(fields[name], dict):
        _change_map(fields[name], rng)
    else:
        fields[name] = _changed(fields[name], rng)


def _changed(value: Any, rng: random.Random) -> Any:
    if rng.randrange(12) == 0:
        return rng.choice([0, 1, "", b"", [], None, True, -1, 1.5])
    if isinstance(value, int):
        return min(rng.choice([*_EXTREMES, value + 1, max(value - 1, 0), value * 2, value ^ 1]), 2**64 - 1)
    if isinstance(value, str):
        return rng.choice([*_WORDS, value + "x"])
    if isinstance(value, bytes):
        kept = bytes(_struck(bytearray(value), rng))
        return rng.choice([kept, kept, kept[:-1], kept + b"\0"])
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        return [*value[:at], *rng.choice([[], [_changed(value[at], rng)], [value[at]] * 2]), *value[at + 1 :]]
    return value
