"""Decodes chunks to levels: index, offsets of the planes, codewords, segments (chapters 8, 9, 15)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from .entries import lengths, positions, streams
from .numbers import Bits, Entry, align, need, zero


def codewords(lengths: list[int]) -> dict[str, int]:
    """Returns codeword, as a string with its first bit first -> symbol (R-COD-001)."""
    used = [symbol for symbol, length in enumerate(lengths) if length]
    out, word = {}, 0
    for n in range(1, 13):
        for symbol in used:
            if lengths[symbol] == n:
                out[format(word, f"0{n}b")] = symbol
                word += 1
        word *= 2
    return out


def used_extra(table: Entry) -> list[int]:
    """Returns the distinct values of `extra` over the classes that a code uses, ascending (15.2)."""
    k = len(table["extra"])
    if k == 1 or "window" in table:
        return sorted(set(table["extra"]))
    symbols = {s for code in lengths(table) for s, length in enumerate(code) if length}
    return sorted({table["extra"][s // k**j % k] for s in symbols for j in range(table["group"])})


def code_count(table: Entry) -> int:
    """Returns the number of codes, or of windows, of a stream (chapter 8)."""
    if "window" in table:
        return int(len(table["extra"]) - (1 << table["window"]) + 2)
    return len(table["codes"])


def escape_bits(table: Entry) -> int:
    """Returns E, the number of bits of the class of an escaped level (chapter 8)."""
    return next(bits for bits in range(9) if 1 << bits >= len(table["extra"]))


@dataclass
class Chunk:
    """A chunk's index and planes.

    Attributes:
        sizes: number of positions of each segment.
        minimum, width: quantity -> its minimum, and its width in bits; the quantities present, in order.
        values: quantity -> its value for each segment.
        planes: plane -> its bit offset in the chunk, and the number of bits of each segment.
    """

    sizes: list[int]
    minimum: dict[str, int] = field(default_factory=dict)
    width: dict[str, int] = field(default_factory=dict)
    values: dict[str, list[int]] = field(default_factory=dict)
    planes: dict[str, tuple[int, list[int]]] = field(default_factory=dict)


def segment_sizes(entry: Entry, k: int) -> list[int]:
    """Returns the number of positions of each segment of chunk k (15.1)."""
    n, s, c = positions(entry), entry["segment"], entry["chunk"]
    count = -(-n // s)
    return [min(s, n - i * s) for i in range(k * c, min((k + 1) * c, count))]


def quantities(entry: Entry) -> list[str]:
    """Returns the quantities that are present, in order (15.2)."""
    out = ["survivors"] * ("mask" in entry)
    for stream in streams(entry):
        table = entry[stream]
        out += [f"{stream} code"] * (code_count(table) > 1)
        out += [f"{stream} trim"] * (table.get("quantiser") == "exact" and table["trim"] == 1)
        out += [f"{stream} prefix"] * (len(table["extra"]) > 1)
        out += [f"{stream} residual"] * (len(used_extra(table)) > 1)
    return out


def level_counts(entry: Entry, stream: str, sizes: list[int], survivors: list[int]) -> list[int]:
    """Returns the number of levels of each segment of a stream."""
    if stream == "mask":
        if entry["mask"]["kind"] == "octets":
            return [-(-n // 8) for n in sizes]
        ones = entry["mask"]["polarity"] == 1
        return [k if ones else n - k for n, k in zip(sizes, survivors, strict=True)]
    everywhere = stream == "importance" and entry["importance"]["over"] == "all"
    return sizes if everywhere else survivors


def open_chunk(data: bytes, entry: Entry, k: int) -> Chunk:
    """Parses and checks header, index and offsets of the planes of chunk k (15.1, 15.2)."""
    chunk = Chunk(segment_sizes(entry, k))
    names = quantities(entry)
    pos = align(8 * len(names), 16)
    need(pos + 16 <= len(data), "R-IDX-003")
    for i, name in enumerate(names):
        minimum, width, reserved = struct.unpack_from("<IB3s", data, 8 * i)
        need(reserved == bytes(3), "R-CHK-002")
        need(width <= 32, "R-IDX-001")
        end = pos + -(-len(chunk.sizes) * width // 8)
        need(end + 16 <= len(data), "R-IDX-003")
        bits = Bits(data, 8 * pos, 8 * end)
        chunk.minimum[name], chunk.width[name] = minimum, width
        chunk.values[name] = [minimum + bits.field(width) for _ in chunk.sizes]
        zero(data, bits.at, 8 * end, "R-IDX-004")
        zero(data, 8 * end, 8 * align(end, 16), "R-CHK-003")
        pos = align(end, 16)
    zero(data, 64 * len(names), 8 * align(8 * len(names), 16), "R-CHK-003")
    survivors = chunk.values.get("survivors", chunk.sizes)
    need(all(k <= n for k, n in zip(survivors, chunk.sizes, strict=True)), "R-IDX-002")
    for stream in streams(entry):
        table, counts = entry[stream], level_counts(entry, stream, chunk.sizes, survivors)
        codes = chunk.values.get(f"{stream} code", [0])
        need(len(table["extra"]) == 1 or max(codes) < code_count(table), "R-IDX-005")
        trims = chunk.values.get(f"{stream} trim", [0] * len(counts))
        need(all(z == 0 or z < used_extra(table)[0] for z in trims), "R-IDX-006")
        constant = [n * (used_extra(table)[0] - z) for n, z in zip(counts, trims, strict=True)]
        for plane, implied in (("prefix", [0] * len(counts)), ("residual", constant)):
            bits_of = chunk.values.get(f"{stream} {plane}", implied)
            chunk.planes[f"{stream} {plane}"] = 8 * pos, bits_of
            end = 8 * pos + sum(bits_of)
            need(align(-(-end // 8), 16) + 16 <= len(data), "R-IDX-003")
            pos = align(-(-end // 8), 16)
    need(len(data) == align(pos + 16, 64), "R-CHK-001")
    for start, bits_of in chunk.planes.values():
        end = start + sum(bits_of)
        zero(data, end, 8 * align(-(-end // 8), 16), "R-PLN-004")
    zero(data, 8 * pos, 8 * len(data), "R-CHK-003")
    return chunk


def read_segment(
    table: Entry, words: dict[str, int], n: int, z: int, prefix: Bits, residual: Bits
) -> list[int]:
    """Decodes the levels of a segment: `read_segment` of chapter 9."""
    extra, k, g = table["extra"], len(table["extra"]), table["group"]
    first = [table["base"] + sum(1 << e for e in extra[:c]) for c in range(k)]
    levels: list[int] = []
    for i in range(0, n, g):
        s, bits = 0, ""
        while k > 1 and bits not in words:
            bits += str(prefix.bit())
        if k > 1:
            s = words[bits]
        for j in range(g):
            c = s // k**j % k
            if i + j < n:
                r = residual.field(extra[c] - z)
                levels.append(first[c] + r % 2 + (r // 2 << (z + 1)))
            else:
                need(c == 0, "R-PLN-002")
    return levels


def read_segment_with_window(
    table: Entry, window: int, n: int, z: int, prefix: Bits, residual: Bits
) -> list[int]:
    """Decodes the levels of a segment with a window: `read_classes` of chapter 9, then its residuals."""
    extra, width = table["extra"], table["window"]
    first = [table["base"] + sum(1 << e for e in extra[:c]) for c in range(len(extra))]
    planes = [[prefix.bit() for _ in range(n)] for _ in range(width)]
    levels: list[int] = []
    for i in range(n):
        symbol = sum(plane[i] << k for k, plane in enumerate(planes))
        c = window + symbol
        if symbol == (1 << width) - 1:
            c = prefix.field(escape_bits(table))
            need(c < len(extra), "R-PLN-005")
        r = residual.field(extra[c] - z)
        levels.append(first[c] + r % 2 + (r // 2 << (z + 1)))
    return levels


def stream_levels(data: bytes, entry: Entry, chunk: Chunk, stream: str) -> list[list[int]]:
    """Decodes the levels of each segment of a stream."""
    table = entry[stream]
    survivors = chunk.values.get("survivors", chunk.sizes)
    counts = level_counts(entry, stream, chunk.sizes, survivors)
    codes = chunk.values.get(f"{stream} code", [0] * len(counts))
    trims = chunk.values.get(f"{stream} trim", [0] * len(counts))
    words = [codewords(code) for code in lengths(table)] or [{}]
    out, planes = [], []
    for plane in ("prefix", "residual"):
        start, sizes = chunk.planes[f"{stream} {plane}"]
        starts = [start + sum(sizes[:i]) for i in range(len(sizes))]
        planes.append([Bits(data, at, at + size) for at, size in zip(starts, sizes, strict=True)])
    for n, code, z, prefix, residual in zip(counts, codes, trims, *planes, strict=True):
        if "window" in table:
            out.append(read_segment_with_window(table, code, n, z, prefix, residual))
        else:
            out.append(read_segment(table, words[code], n, z, prefix, residual))
        need(prefix.at == prefix.stop and residual.at == residual.stop, "R-PLN-003")
    return out
