"""Parses files into editable parts, and rebuilds them with correct lengths, offsets and checksums.

Also builds tensors bit by bit from levels, after SPEC.md chapters 8 to 15. It does not use the package's
encoder, so it can produce files that the package's writer never writes.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import msgpack

from . import slow_reader
from .slow_reader import align

Entry = dict[str, Any]


class Raw(bytes):
    """Encoded MessagePack bytes, which `pack` inserts unchanged."""


class Pairs(list[tuple[object, object]]):
    """A map as a list of pairs: `pack` keeps their order and allows duplicate keys."""


def pack(value: Any) -> bytes:
    """Encodes a value in MessagePack. Sorts maps as R-MSG-004 requires, except `Pairs`."""
    packer = msgpack.Packer(use_bin_type=True)
    if isinstance(value, Raw):
        return bytes(value)
    if isinstance(value, dict):
        pairs: list[tuple[Any, object]] = sorted(value.items(), key=lambda pair: str(pair[0]).encode())
        return pack(Pairs(pairs))
    inner = b""
    packed: bytes
    if isinstance(value, Pairs):
        packed, inner = packer.pack_map_header(len(value)), b"".join(pack(k) + pack(v) for k, v in value)
    elif isinstance(value, (list, tuple)):
        packed, inner = packer.pack_array_header(len(value)), b"".join(map(pack, value))
    else:
        packed = packer.pack(value)
    return packed + inner


# ------------------------------------------------------------------------------------------- whole files


@dataclass
class Part:
    """A tensor: its entry without chunk records, and its chunks.

    If the entry has chunk records, they override the computed ones.
    """

    entry: Entry
    chunks: list[bytearray]
    vectors: bytearray | None = None

    @property
    def data(self) -> bytes:
        """The vector chunk and all chunks, concatenated."""
        return b"".join([self.vectors or b"", *self.chunks])

    def full_entry(self) -> Entry:
        """Returns the entry with the records of the current chunks."""
        out = {"chunks": b"".join(map(record, self.chunks)), **self.entry}
        return out if self.vectors is None else {"vectors": record(self.vectors), **out}

    def take(self, k: int = 0) -> Taken:
        """Parses chunk k."""
        return Taken.of(bytes(self.chunks[k]), self.full_entry(), k)

    def put(self, taken: Taken, k: int = 0) -> None:
        """Replaces chunk k by the encoded ``taken``."""
        self.chunks[k] = bytearray(taken.together())


def record(chunk: bytes | bytearray) -> bytes:
    """Returns the chunk record of chapter 7: length and CRC-32."""
    return struct.pack("<II", len(chunk), zlib.crc32(chunk))


@dataclass
class Forge:
    """A file in editable parts.

    Attributes:
        root: the directory's root without `tensors`; a `tensors` key in it overrides `parts`.
        parts: the tensors.
        preamble: values that override the correct fields of the preamble.
        directory: the directory's bytes; None encodes root and parts.
        tail: bytes after the directory.
    """

    root: dict[str, Any] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    preamble: dict[str, Any] = field(default_factory=dict)
    directory: bytes | None = None
    tail: bytes = b""

    @classmethod
    def of(cls, data: bytes) -> Forge:
        """Parses a valid file."""
        (at,) = struct.unpack_from("<Q", data, 16)
        root = msgpack.unpackb(data[at:])
        out, pos = cls(root), 64
        for entry in root.pop("tensors"):
            lengths = [n for n, _ in struct.iter_unpack("<II", entry.pop("chunks"))]
            vectors = None
            if "vectors" in entry:
                (length, _) = struct.unpack("<II", entry.pop("vectors"))
                vectors = bytearray(data[pos : pos + length])
                pos += length
            chunks = []
            for length in lengths:
                chunks.append(bytearray(data[pos : pos + length]))
                pos += length
            out.parts.append(Part(entry, chunks, vectors))
        return out

    def part(self, name: str) -> Part:
        """Returns the tensor of that name."""
        return next(part for part in self.parts if part.entry["name"] == name)

    def start_of(self, name: str) -> int:
        """Returns the file offset of a tensor's first chunk (of its vector chunk, if it has one)."""
        before = self.parts[: self.parts.index(self.part(name))]
        return 64 + sum(len(part.data) for part in before)

    def directory_bytes(self) -> bytes:
        """Returns the encoded directory."""
        if self.directory is not None:
            return self.directory
        return pack({"tensors": [part.full_entry() for part in self.parts], **self.root})

    def build(self) -> bytes:
        """Returns the bytes of the file."""
        chunks = b"".join(part.data for part in self.parts)
        directory = self.directory_bytes()
        values = {
            "magic": b"\x89SFP\r\n\x1a\n",
            "major": 1,
            "minor": 0,
            "reserved": bytes(4),
            "directory_offset": 64 + len(chunks),
            "directory_length": len(directory),
            "file_length": 64 + len(chunks) + len(directory),
            "directory_crc": zlib.crc32(directory),
            "more_reserved": bytes(16),
        }
        unknown = set(self.preamble) - {*values, "crc"}
        assert not unknown, unknown
        wanted = {name: self.preamble.get(name, value) for name, value in values.items()}
        fields = struct.pack("<8sHH4sQQQI16s", *wanted.values())
        crc = self.preamble.get("crc", zlib.crc32(fields))
        return fields + struct.pack("<I", crc) + chunks + directory + self.tail


# ------------------------------------------------------------------------------------------------ chunks


@dataclass
class Taken:
    """A parsed chunk of a fingerprint tensor.

    Attributes:
        quantities: name -> value for each segment.
        planes: name -> the bits of each segment, a string of 0 and 1 in plane order.
        headers: quantity -> minimum and width that replace the smallest possible ones.
    """

    quantities: dict[str, list[int]]
    planes: dict[str, list[str]]
    headers: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, data: bytes, entry: Entry, k: int) -> Taken:
        """Parses chunk k of a tensor."""
        chunk = slow_reader.open_chunk(data, entry, k)
        planes: dict[str, list[str]] = {}
        for name, (at, sizes) in chunk.planes.items():
            bits = slow_reader.Bits(data, at, at + sum(sizes))
            planes[name] = ["".join(str(bits.bit()) for _ in range(size)) for size in sizes]
        return cls(chunk.values, planes)

    def recount(self) -> None:
        """Sets the quantities that count bits to the lengths of the planes."""
        for name in self.quantities:
            if name in self.planes:
                self.quantities[name] = [len(bits) for bits in self.planes[name]]

    def together(self) -> bytes:
        """Encodes the chunk."""
        header, parts = b"", []
        for name, values in self.quantities.items():
            least = min(values)
            minimum, width = self.headers.get(name, (least, (max(values) - least).bit_length()))
            header += struct.pack("<IBxxx", minimum, width)
            fields = "".join(format(v - minimum, f"0{width}b")[::-1] for v in values) if width else ""
            parts.append(bits_to_bytes(fields))
        out = padded(header)
        for part in [*parts, *(bits_to_bytes("".join(bits)) for bits in self.planes.values())]:
            out += padded(part)
        return out + bytes(align(len(out) + 16, 64) - len(out))


def bits_to_bytes(bits: str) -> bytes:
    """Packs a bit sequence into bytes, least significant bit first (R-CNV-002)."""
    return int(bits[::-1] or "0", 2).to_bytes((len(bits) + 7) // 8, "little")


def padded(part: bytes) -> bytes:
    """Pads a part of a chunk with zero bytes to a multiple of 16."""
    return part + bytes(align(len(part), 16) - len(part))


# ------------------------------------------------------------------------------------- tensors made by hand


def table(extra: list[int], *codes: list[int], base: int = 0, group: int = 1) -> dict[str, Any]:
    """Returns the four keys of a code table. Each of ``codes`` lists the code lengths of the symbols."""
    return {"base": base, "extra": bytes(extra), "codes": list(map(nibbles, codes)), "group": group}


def windowed(extra: list[int], window: int, base: int = 0) -> dict[str, Any]:
    """Returns the keys of a code table with windows."""
    return {**table(extra, base=base), "window": window}


def table_for(levels: list[int]) -> dict[str, Any]:
    """Returns a code table that covers the range of the levels with classes of decreasing powers of two."""
    left = max(levels) - min(levels) + 1
    extra = [e for e in reversed(range(57)) for _ in range(left >> e if e == 56 else left >> e & 1)]
    return table(extra, *([flat_code(len(extra))] if len(extra) > 1 else []), base=min(levels))


def flat_code(symbols: int) -> list[int]:
    """Returns the lengths of a complete code; they differ by at most one."""
    width = (symbols - 1).bit_length()
    spare = (1 << width) - symbols
    return [width] * (symbols - spare) + [width - 1] * spare


def exact(dtype: str, trim: int = 0, **code_table: Any) -> dict[str, Any]:
    """Returns the keys of an exact stream."""
    return {"quantiser": "exact", "dtype": dtype, "trim": trim, **code_table}


def nibbles(lengths: list[int]) -> bytes:
    """Encodes code lengths as an entry of `codes`: two per byte, low four bits first."""
    even = [*lengths, 0]
    return bytes(even[i] | even[i + 1] << 4 for i in range(0, len(lengths), 2))


def f32_bytes(x: float) -> bytes:
    """Encodes a binary32 as `step` does: little-endian."""
    return struct.pack("<f", x)


def first_levels(base: int, extra: Iterable[int]) -> list[int]:
    """Returns the first level of each class, then one past the last level (chapter 8)."""
    return list(accumulate((1 << e for e in extra), initial=base))


def class_of(first: list[int], level: int) -> int:
    """Returns the class of a level; the level must be below the last of `first_levels`."""
    return bisect_right(first, level) - 1


def segment_bits(source: Entry, levels: list[int], code: int, trim: int) -> tuple[str, str]:
    """Encodes a segment: its bits in the prefix plane and in the residual plane (chapter 9)."""
    extra, k, group = source["extra"], len(source["extra"]), source["group"]
    first = first_levels(source["base"], extra)
    classes = [class_of(first, level) for level in levels]
    residual = ""
    for level, c in zip(levels, classes, strict=True):
        bits = format(level - first[c], f"0{extra[c]}b")[::-1] if extra[c] else ""
        assert "1" not in bits[1 : 1 + trim], f"level {level} has no trim of {trim}"
        residual += bits[:1] + bits[1 + trim :]
    if k == 1:
        return "", residual
    if "window" in source:
        return window_bits(source, classes, code), residual
    words = {
        symbol: word for word, symbol in slow_reader.codewords(slow_reader.lengths(source)[code]).items()
    }
    classes += [0] * (len(classes) % group)
    symbols = [sum(classes[i + j] * k**j for j in range(group)) for i in range(0, len(classes), group)]
    return "".join(words[symbol] for symbol in symbols), residual


def window_bits(source: Entry, classes: list[int], window: int, escaped: Iterable[int] = ()) -> str:
    """Encodes the classes of a segment with a window (chapter 9).

    Args:
        source: the map of the stream.
        classes: the class of each level.
        window: the first class of the window.
        escaped: indices of levels to escape although their classes are in the window.
    """
    last, bits = (1 << source["window"]) - 1, slow_reader.escape_bits(source)
    outside = {i for i, c in enumerate(classes) if not window <= c < window + last} | set(escaped)
    symbols = [last if i in outside else c - window for i, c in enumerate(classes)]
    planes = ["".join(str(symbol >> k & 1) for symbol in symbols) for k in range(source["window"])]
    return "".join(planes) + "".join(format(classes[i], f"0{bits}b")[::-1] for i in sorted(outside))


def mask_levels(mask: Entry, bits: list[int]) -> list[int]:
    """Returns the levels that encode a segment's mask (chapter 10)."""
    if mask["kind"] == "octets":
        whole = bits + [0] * (-len(bits) % 8)
        return [sum(whole[i + j] << j for j in range(8)) for i in range(0, len(whole), 8)]
    places = [p for p, bit in enumerate(bits) if bit == mask["polarity"]]
    return [p - before - 1 for before, p in zip([-1, *places], places, strict=False)]


def hand_part(
    entry: Entry,
    levels: dict[str, list[int]],
    *,
    mask: list[int] | None = None,
    codes: dict[str, list[int]] | None = None,
    trims: dict[str, list[int]] | None = None,
    vectors: dict[str, list[int]] | None = None,
) -> Part:
    """Encodes a fingerprint tensor bit by bit.

    Args:
        entry: its directory entry without chunk records. Defaults: name `hand`, coding `fingerprint`,
            segment 32, chunk 1.
        levels: stream -> levels, in position order; the mask's levels follow from ``mask``.
        mask: a bit for each position; None for a tensor without a mask.
        codes, trims: stream -> the code and the trim of each segment; 0 for a stream that is not listed.
        vectors: name -> bit patterns.
    """
    entry = {"name": "hand", "coding": "fingerprint", "segment": 32, "chunk": 1, **entry}
    left = {stream: list(values) for stream, values in levels.items()}
    n, first, chunks = slow_reader.positions(entry), 0, []
    segments = -(-n // entry["segment"])
    for k in range(-(-segments // entry["chunk"])):
        taken = Taken({name: [] for name in slow_reader.quantities(entry)}, {})
        for stream in slow_reader.streams(entry):
            taken.planes |= {f"{stream} prefix": [], f"{stream} residual": []}
        for i, size in enumerate(slow_reader.segment_sizes(entry, k), k * entry["chunk"]):
            bits = [1] * size if mask is None else mask[first : first + size]
            first += size
            for stream in slow_reader.streams(entry):
                [count] = slow_reader.level_counts(entry, stream, [size], [sum(bits)])
                own = mask_levels(entry["mask"], bits) if stream == "mask" else left[stream][:count]
                assert len(own) == count, f"{stream}: {count} levels wanted"
                if stream != "mask":
                    del left[stream][:count]
                code = (codes or {}).get(stream, [0] * segments)[i]
                trim = (trims or {}).get(stream, [0] * segments)[i]
                prefix, residual = segment_bits(entry[stream], own, code, trim)
                taken.planes[f"{stream} prefix"].append(prefix)
                taken.planes[f"{stream} residual"].append(residual)
                for what, value in (("code", code), ("trim", trim)):
                    if f"{stream} {what}" in taken.quantities:
                        taken.quantities[f"{stream} {what}"].append(value)
            if mask is not None:
                taken.quantities["survivors"].append(sum(bits))
        taken.recount()
        chunks.append(bytearray(taken.together()))
    assert not any(left.values()), "more levels than survivors"
    wanted = slow_reader.vectors(entry)
    raw = [hand_vector((vectors or {})[name], dtype) for name, size, dtype in wanted if size]
    if not raw:
        return Part(entry, chunks)
    joined = b"".join(map(padded, raw))
    return Part(entry, chunks, bytearray(joined + bytes(align(len(joined), 64) - len(joined))))


def raw_part(name: str, dtype: str, shape: list[int], raw: bytes, segment: int = 32, chunk: int = 1) -> Part:
    """Encodes a tensor with coding `raw`."""
    entry: Entry = {"name": name, "coding": "raw", "dtype": dtype, "shape": shape}
    entry |= {"segment": segment, "chunk": chunk}
    assert len(raw) == slow_reader.positions(entry) * slow_reader.BYTES[dtype]
    size = segment * chunk * slow_reader.BYTES[dtype]
    pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
    return Part(entry, [bytearray(piece + bytes(align(len(piece), 64) - len(piece))) for piece in pieces])


def hand_vector(patterns: list[int], dtype: str) -> bytes:
    """Encodes the elements of a vector from their bit patterns."""
    return b"".join(pattern.to_bytes(slow_reader.BYTES[dtype], "little") for pattern in patterns)


def patterns(dtype: str, *numbers: float) -> list[int]:
    """Returns the bit patterns of numbers."""
    return [slow_reader.pattern_of(x, dtype) for x in numbers]


def hand_file(*parts: Part, **root: Any) -> bytes:
    """Builds a file from tensors and keys of the root."""
    return Forge(root, list(parts)).build()
