"""The slow reader, written from SPEC.md alone: plain loops over plain integers, one bit at a time.

It imports nothing from the package, so that both share no error. It checks everything that SPEC.md requires a
reader to check, except the limits of chapter 19. Numbers are Python floats, which are binary64; patterns are
integers.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any

from .directory import MessagePack, check_root, read_directory
from .entries import lengths, matrix, positions, step_of, streams, top, vectors
from .numbers import BYTES, FACTORS, FLOATS, Bad, Bits, align, f32, need, number_of, pattern_of
from .planes import (
    Chunk,
    code_count,
    codewords,
    escape_bits,
    level_counts,
    open_chunk,
    quantities,
    segment_sizes,
    used_extra,
)
from .values import Tensor, mask_bits, read_fingerprints, read_raw, read_vectors

__all__ = [
    "BYTES",
    "FACTORS",
    "FLOATS",
    "Bad",
    "Bits",
    "Chunk",
    "File",
    "MessagePack",
    "Tensor",
    "align",
    "code_count",
    "codewords",
    "escape_bits",
    "f32",
    "lengths",
    "level_counts",
    "mask_bits",
    "matrix",
    "number_of",
    "open_chunk",
    "pattern_of",
    "positions",
    "quantities",
    "read",
    "read_directory",
    "read_vectors",
    "segment_sizes",
    "step_of",
    "streams",
    "top",
    "used_extra",
    "vectors",
]


@dataclass
class File:
    """A decoded file: the root of its directory, and its tensors by name."""

    root: dict[str, Any]
    tensors: dict[str, Tensor]


def read(data: bytes) -> File:
    """Decodes the bytes of a whole file.

    Raises:
        Bad: the file breaks a clause.
    """
    root, directory_at = read_directory(data)
    check_root(root)
    pieces, pos = [], 64
    for entry in root["tensors"]:
        own = []
        for length, crc in struct.iter_unpack("<II", entry.get("vectors", b"") + entry["chunks"]):
            own.append((data[pos : min(pos + length, directory_at)], crc))
            pos += length
        pieces.append(own)
    need(pos == directory_at, "R-LAY-003")
    tensors = {}
    for entry, own in zip(root["tensors"], pieces, strict=True):
        for piece, crc in own:
            need(zlib.crc32(piece) == crc, "R-LAY-004")
        chunks = [piece for piece, _ in own]
        if entry["coding"] == "raw":
            tensors[entry["name"]] = read_raw(entry, chunks)
            continue
        found = read_vectors(entry, chunks.pop(0)) if "vectors" in entry else {}
        tensors[entry["name"]] = read_fingerprints(entry, chunks, found)
    return File(root, tensors)
