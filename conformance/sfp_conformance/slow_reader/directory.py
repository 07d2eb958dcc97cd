"""Preamble, MessagePack and the directory's root (chapters 4 to 7, 17, 21)."""

from __future__ import annotations

import struct
import zlib
from itertools import pairwise
from typing import Any

from .delta import check_delta
from .entries import check_entry, get
from .keyed import check_keyed
from .numbers import Bad, need

MAGIC = bytes.fromhex("89 53 46 50 0D 0A 1A 0A")


class MessagePack:
    """Parses MessagePack (chapter 6)."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        need(self.at + size <= len(self.data), "R-MSG-007")
        self.at += size
        return self.data[self.at - size : self.at]

    def sized(self, width: int, least: int) -> int:
        """Reads a length or integer of ``width`` bytes; below ``least`` a shorter encoding exists."""
        number = int.from_bytes(self.take(width), "big")
        need(number >= least, "R-MSG-002")
        return number

    def value(self) -> Any:
        head = self.take(1)[0]
        if head < 0x80:
            return head
        if 0xCC <= head <= 0xCF:
            return self.sized(1 << (head - 0xCC), [128, 256, 1 << 16, 1 << 32][head - 0xCC])
        if 0xC4 <= head <= 0xC6:
            return self.take(self.sized(1 << (head - 0xC4), [0, 256, 1 << 16][head - 0xC4]))
        if 0xA0 <= head <= 0xBF or 0xD9 <= head <= 0xDB:
            size = head - 0xA0
            if head > 0xBF:
                size = self.sized(1 << (head - 0xD9), [32, 256, 65536][head - 0xD9])
            try:
                text = self.take(size).decode("utf-8")
            except UnicodeDecodeError:
                raise Bad("R-MSG-003") from None
            need("\0" not in text, "R-MSG-003")
            return text
        if 0x90 <= head <= 0x9F or head in (0xDC, 0xDD):
            size = head - 0x90 if head < 0xA0 else self.sized(2 << (head - 0xDC), [16, 65536][head - 0xDC])
            need(size <= len(self.data) - self.at, "R-MSG-007")
            return [self.value() for _ in range(size)]
        if 0x80 <= head <= 0x8F or head in (0xDE, 0xDF):
            size = head - 0x80 if head < 0x90 else self.sized(2 << (head - 0xDE), [16, 65536][head - 0xDE])
            need(2 * size <= len(self.data) - self.at, "R-MSG-007")
            return self.pairs(size)
        raise Bad("R-MSG-001")

    def pairs(self, size: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for _ in range(size):
            head = (self.data[self.at : self.at + 1] or b"\xa0")[0]
            need(0xA0 <= head <= 0xBF or 0xD9 <= head <= 0xDB, "R-MSG-001")
            key = self.value()
            need(key not in out, "R-MSG-005")
            need(not out or max(out, key=str.encode).encode() < key.encode(), "R-MSG-004")
            out[key] = self.value()
        return out


def read_directory(data: bytes) -> tuple[dict[str, Any], int]:
    """Checks preamble and MessagePack; returns the root and the directory's offset (chapters 4 to 7, 21)."""
    need(data[:8] == MAGIC[: len(data)], "R-PRE-001")
    need(len(data) >= 64, "R-PRE-002")
    _, major, _, zeros, at, size, length, crc, more, check = struct.unpack("<8sHH4sQQQI16sI", data[:64])
    need(check == zlib.crc32(data[:60]), "R-PRE-003")
    need(major == 1, "R-PRE-004")
    need(not any(zeros + more), "R-PRE-006")
    need(length <= len(data), "R-PRE-007")
    need(length >= len(data), "R-PRE-008")
    need(at + size == length, "R-PRE-009")
    need(at % 64 == 0 and at >= 64, "R-PRE-011")
    need(zlib.crc32(data[at:]) == crc, "R-PRE-010")
    reader = MessagePack(data[at:])
    root = reader.value()
    need(reader.at == size, "R-MSG-006")
    need(isinstance(root, dict), "R-DIR-001")
    return root, at


def check_root(root: dict[str, Any]) -> None:
    """Checks the root and all tensor entries (chapters 7, 17 and 21)."""
    if "features" in root:
        features = get(root, "features", list)
        need(all(isinstance(name, str) for name in features), "R-DIR-003")
        need(bool(features), "R-DIR-004")
        raw = [name.encode() for name in features]
        need(all(a < b for a, b in pairwise(raw)), "R-FEA-002")
        need(set(features) <= {"delta", "delta-parts", "keyed"}, "R-FEA-001")
        need(not {"delta", "keyed"} <= set(features), "R-KEY-013")
    if "metadata" in root:
        need(all(isinstance(value, str) for value in get(root, "metadata", dict).values()), "R-DIR-003")
        need(bool(root["metadata"]), "R-DIR-004")
    entries = get(root, "tensors", list)
    need(all(isinstance(entry, dict) for entry in entries), "R-DIR-003")
    for i, entry in enumerate(entries):
        check_entry(entry)
        need(all(entry["name"] != other["name"] for other in entries[:i]), "R-TEN-001")
    check_delta(root)
    check_keyed(root)
