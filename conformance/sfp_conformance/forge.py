"""Files taken apart, changed in one place, and put together with every length, place and checksum mended.

Also hand-made tensors: chunks laid down bit by bit from levels, as SPEC.md chapters 8 to 15 say and without
the package's encoder, for what its writer never writes.
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
    """MessagePack bytes that are put in as they are."""


class Pairs(list[tuple[object, object]]):
    """A map whose pairs keep their order, whatever their keys."""


def pack(value: Any) -> bytes:
    """A value in MessagePack, maps sorted as R-MSG-004 asks."""
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
    """A tensor: its entry without chunk records, and its chunks. Records that the entry has are kept."""

    entry: Entry
    chunks: list[bytearray]
    vectors: bytearray | None = None

    @property
    def data(self) -> bytes:
        """All its chunks."""
        return b"".join([self.vectors or b"", *self.chunks])

    def full_entry(self) -> Entry:
        """The entry with the records of the chunks as they are now."""
        out = {"chunks": b"".join(map(record, self.chunks)), **self.entry}
        return out if self.vectors is None else {"vectors": record(self.vectors), **out}

    def take(self, k: int = 0) -> Taken:
        """Chunk k, taken apart."""
        return Taken.of(bytes(self.chunks[k]), self.full_entry(), k)

    def put(self, taken: Taken, k: int = 0) -> None:
        """Chunk k, put together again."""
        self.chunks[k] = bytearray(taken.together())


def record(chunk: bytes | bytearray) -> bytes:
    """The chunk record of chapter 7."""
    return struct.pack("<II", len(chunk), zlib.crc32(chunk))


@dataclass
class Forge:
    """A file in pieces.

    Attributes:
        root: the directory's root without `tensors`; a `tensors` put there replaces those of the parts.
        parts: the tensors.
        preamble: fields of the preamble that get these values instead of the right ones.
        directory: the directory's bytes, or None for what root and parts give.
        tail: bytes after the directory.
    """

    root: dict[str, Any] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    preamble: dict[str, Any] = field(default_factory=dict)
    directory: bytes | None = None
    tail: bytes = b""

    @classmethod
    def of(cls, data: bytes) -> Forge:
        """Takes a valid file apart."""
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
        """The tensor of that name."""
        return next(part for part in self.parts if part.entry["name"] == name)

    def start_of(self, name: str) -> int:
        """File offset of a tensor's first chunk."""
        before = self.parts[: self.parts.index(self.part(name))]
        return 64 + sum(len(part.data) for part in before)

    def directory_bytes(self) -> bytes:
        """The directory."""
        if self.directory is not None:
            return self.directory
        return pack({"tensors": [part.full_entry() for part in self.parts], **self.root})

    def build(self) -> bytes:
        """The file."""
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
    """A chunk of a fingerprint tensor taken apart.

    Attributes:
        quantities: name -> value for each segment.
        planes: name -> the bits of each segment, a string of 0 and 1 in the order of the plane.
        headers: quantity -> minimum and width to be written instead of the least.
    """

    quantities: dict[str, list[int]]
    planes: dict[str, list[str]]
    headers: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, data: bytes, entry: Entry, k: int) -> Taken:
        """Takes chunk k of a tensor apart."""
        chunk = slow_reader.open_chunk(data, entry, k)
        planes: dict[str, list[str]] = {}
        for name, (at, sizes) in chunk.planes.items():
            bits = slow_reader.Bits(data, at, at + sum(sizes))
            planes[name] = ["".join(str(bits.bit()) for _ in range(size)) for size in sizes]
        return cls(chunk.values, planes)

    def recount(self) -> None:
        """Sets the quantities that count bits to what the planes have."""
        for name in self.quantities:
            if name in self.planes:
                self.quantities[name] = [len(bits) for bits in self.planes[name]]

    def together(self) -> bytes:
        """The chunk's bytes."""
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
    """A bit sequence, least significant bit first (R-CNV-002)."""
    return int(bits[::-1] or "0", 2).to_bytes((len(bits) + 7) // 8, "little")


def padded(part: bytes) -> bytes:
    """A part of a chunk and the zero bytes after it."""
    return part + bytes(align(len(part), 16) - len(part))


# ------------------------------------------------------------------------------------- tensors made by hand


def table(extra: list[int], *codes: list[int], base: int = 0, group: int = 1) -> dict[str, Any]:
    """The four keys of a code table; a code is the lengths of its symbols."""
    return {"base": base, "extra": bytes(extra), "codes": list(map(nibbles, codes)), "group": group}


def table_for(levels: list[int]) -> dict[str, Any]:
    """A code table for levels from the least to the greatest: classes of falling powers of two."""
    left = max(levels) - min(levels) + 1
    extra = [e for e in reversed(range(57)) for _ in range(left >> e if e == 56 else left >> e & 1)]
    return table(extra, *([flat_code(len(extra))] if len(extra) > 1 else []), base=min(levels))


def flat_code(symbols: int) -> list[int]:
    """The lengths of a complete code that differ by one at most."""
    width = (symbols - 1).bit_length()
    spare = (1 << width) - symbols
    return [width] * (symbols - spare) + [width - 1] * spare


def exact(dtype: str, trim: int = 0, **code_table: Any) -> dict[str, Any]:
    """The keys of an exact stream."""
    return {"quantiser": "exact", "dtype": dtype, "trim": trim, **code_table}


def nibbles(lengths: list[int]) -> bytes:
    """Code lengths as an entry of `codes`."""
    even = [*lengths, 0]
    return bytes(even[i] | even[i + 1] << 4 for i in range(0, len(lengths), 2))


def f32_bytes(x: float) -> bytes:
    """A binary32, as `step` has it."""
    return struct.pack("<f", x)


def first_levels(base: int, extra: Iterable[int]) -> list[int]:
    """The first level of each class, and one past the last level of all (chapter 8)."""
    return list(accumulate((1 << e for e in extra), initial=base))


def class_of(first: list[int], level: int) -> int:
    """The class of a level below the last of `first_levels`."""
    return bisect_right(first, level) - 1


def segment_bits(source: Entry, levels: list[int], code: int, trim: int) -> tuple[str, str]:
    """The bits of a segment in the prefix and the residual plane (chapter 9)."""
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
    words = {
        symbol: word for word, symbol in slow_reader.codewords(slow_reader.lengths(source)[code]).items()
    }
    classes += [0] * (len(classes) % group)
    symbols = [sum(classes[i + j] * k**j for j in range(group)) for i in range(0, len(classes), group)]
    return "".join(words[symbol] for symbol in symbols), residual


def mask_levels(mask: Entry, bits: list[int]) -> list[int]:
    """The levels of a segment's mask (chapter 10)."""
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
    """A fingerprint tensor laid down bit by bit.

    Args:
        entry: its directory entry without chunk records; name, coding, segment and chunk may be left out.
        levels: stream -> levels, in the order of positions; the mask's follow from ``mask``.
        mask: a bit for each position.
        codes, trims: stream -> the code and the trim of each segment, 0 where nothing is said.
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
    """A tensor with coding `raw`."""
    entry: Entry = {"name": name, "coding": "raw", "dtype": dtype, "shape": shape}
    entry |= {"segment": segment, "chunk": chunk}
    assert len(raw) == slow_reader.positions(entry) * slow_reader.BYTES[dtype]
    size = segment * chunk * slow_reader.BYTES[dtype]
    pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
    return Part(entry, [bytearray(piece + bytes(align(len(piece), 64) - len(piece))) for piece in pieces])


def hand_vector(patterns: list[int], dtype: str) -> bytes:
    """The elements of a vector, from their bit patterns."""
    return b"".join(pattern.to_bytes(slow_reader.BYTES[dtype], "little") for pattern in patterns)


def patterns(dtype: str, *numbers: float) -> list[int]:
    """Bit patterns of numbers."""
    return [slow_reader.pattern_of(x, dtype) for x in numbers]


def hand_file(*parts: Part, **root: Any) -> bytes:
    """A file of some tensors."""
    return Forge(root, list(parts)).build()
