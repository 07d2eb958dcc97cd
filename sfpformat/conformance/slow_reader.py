"""A second reader, written from SPEC.md alone: plain loops over plain integers, one bit at a time.

It imports nothing of the package, so that an error in the package and the same error here would have to be
made twice. It checks everything that SPEC.md has a reader check, except the limits of chapter 19. Numbers are
Python floats, which are binary64; patterns are integers.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

Entry = dict[str, Any]


class Bad(Exception):
    """The file breaks the clause that is this error's argument."""


def need(holds: bool, clause: str) -> None:
    """Raises `Bad` unless something holds."""
    if not holds:
        raise Bad(clause)


def align(x: int, k: int) -> int:
    """Chapter 1."""
    return (x + k - 1) // k * k


# ----------------------------------------------------------------------------------------- numbers (25.1, 14)


@dataclass(frozen=True)
class Float:
    """A float type: bits of exponent and mantissa, first pattern that is not finite, what it widens to."""

    exponent: int
    mantissa: int
    nonfinite: int
    widens: tuple[str, ...] = ()

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa


FLOATS = {
    "F64": Float(11, 52, 0x7FF0000000000000),
    "F32": Float(8, 23, 0x7F800000, ("F64",)),
    "F16": Float(5, 10, 0x7C00, ("F32", "F64")),
    "BF16": Float(8, 7, 0x7F80, ("F32", "F64")),
    "F8_E4M3": Float(4, 3, 0x7F, ("F16", "BF16", "F32", "F64")),
    "F8_E5M2": Float(5, 2, 0x7C, ("F16", "BF16", "F32", "F64")),
}
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1, "U8": 1, "I8": 1}
BYTES |= {"U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8, "C64": 8, "C128": 16}
BYTES |= {"F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}
FACTORS = ("F32", "F16", "BF16")


def number_of(pattern: int, dtype: str) -> float:
    """The number that a bit pattern stands for."""
    kind = FLOATS[dtype]
    sign = -1.0 if pattern >> (kind.bits - 1) else 1.0
    magnitude = pattern & ((1 << (kind.bits - 1)) - 1)
    if magnitude >= kind.nonfinite:
        infinite = magnitude == kind.nonfinite and dtype != "F8_E4M3"
        return sign * math.inf if infinite else math.nan
    bias = (1 << (kind.exponent - 1)) - 1
    exponent, mantissa = magnitude >> kind.mantissa, magnitude & ((1 << kind.mantissa) - 1)
    if exponent:
        mantissa += 1 << kind.mantissa
    return sign * math.ldexp(mantissa, max(exponent, 1) - bias - kind.mantissa)


def pattern_of(x: float, dtype: str) -> int:
    """The pattern of a number rounded to nearest, ties to even; not for NaNs."""
    kind = FLOATS[dtype]
    sign = 1 << (kind.bits - 1) if math.copysign(1, x) < 0 else 0
    if math.isinf(x):
        return sign | kind.nonfinite
    if x == 0:
        return sign
    least = 2 - (1 << (kind.exponent - 1))  # exponent of the least normal number
    exponent = max(math.frexp(x)[1] - 1, least)
    units = round(Fraction(abs(x)) / Fraction(2) ** (exponent - kind.mantissa))  # ties to even
    return sign | min(((exponent - least) << kind.mantissa) + units, kind.nonfinite)


def f32(x: float) -> float:
    """A number rounded to binary32."""
    return number_of(pattern_of(x, "F32"), "F32")


# ------------------------------------------------------------------------------------------- directory (6, 7)


class MessagePack:
    """Chapter 6."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        need(self.at + size <= len(self.data), "R-MSG-007")
        self.at += size
        return self.data[self.at - size : self.at]

    def sized(self, width: int, least: int) -> int:
        """A length or integer of some bytes that a shorter encoding could not hold."""
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


def get(source: Entry, key: str, kind: type) -> Any:
    """The value of a key that must be there, of the type that it must have."""
    need(key in source, "R-DIR-002")
    need(isinstance(source[key], kind), "R-DIR-003")
    return source[key]


def word(source: Entry, key: str, words: tuple[str, ...], clause: str) -> str:
    """A string that must be one of some words."""
    value: str = get(source, key, str)
    need(value in words, clause)
    return value


def positions(entry: Entry) -> int:
    """N."""
    return math.prod(entry["shape"])


def matrix(entry: Entry) -> tuple[int, int]:
    """Rows and columns (chapter 2)."""
    n = positions(entry)
    rows = entry["shape"][0] if len(entry["shape"]) >= 2 and n else 1
    return rows, n // rows


def streams(entry: Entry) -> list[str]:
    """The streams that a tensor has, in order."""
    if entry["coding"] == "raw":
        return []
    over = entry.get("importance", {}).get("over", "factors")
    return ["mask"] * ("mask" in entry) + ["fingerprints"] + ["importance"] * (over != "factors")


def vectors(entry: Entry) -> list[tuple[str, int, str]]:
    """Name, elements and dtype of the tensor's vectors (15.3)."""
    out = []
    n, (rows, columns) = positions(entry), matrix(entry)
    fingerprints, importance = entry["fingerprints"], entry.get("importance", {})
    if fingerprints["quantiser"] == "table":
        out.append(("fingerprint centroids", fingerprints["count"], "F32"))
    if "scale" in entry:
        scale = entry["scale"]
        size = scale.get("size", 1)
        count = {"tensor": 1, "row": rows, "column": columns, "group": -(-n // size)}[scale["per"]]
        out.append(("scale", count if n else 0, scale["dtype"]))
    if importance.get("quantiser") == "table" and importance["over"] != "factors":
        out.append(("importance centroids", importance["count"], "F32"))
    if importance.get("over") == "factors":
        out.append(("rows", rows if n else 0, importance["dtype"]))
        out.append(("columns", columns if n else 0, importance["dtype"]))
    return out


def check_entry(entry: Entry) -> None:
    """Chapters 7, 8 and 10 to 13: what a tensor entry alone can get wrong."""
    need(get(entry, "name", str) != "", "R-TEN-002")
    dtype = word(entry, "dtype", tuple(BYTES), "R-TEN-003")
    coding = word(entry, "coding", ("raw", "fingerprint"), "R-TEN-004")
    shape = get(entry, "shape", list)
    need(all(isinstance(size, int) for size in shape), "R-DIR-003")
    need(math.prod(size for size in shape if size) <= 1 << 48, "R-TEN-005")
    segment, chunk = get(entry, "segment", int), get(entry, "chunk", int)
    need(segment % 32 == 0 and 32 <= segment <= 65536, "R-TEN-006")
    need(chunk >= 1 and segment * chunk <= 1 << 24, "R-TEN-007")
    records = get(entry, "chunks", bytes)
    segments = -(-positions(entry) // segment)
    need(len(records) == 8 * -(-segments // chunk), "R-TEN-008")
    if "vectors" in entry:
        need(len(get(entry, "vectors", bytes)) == 8, "R-TEN-012")
        records += entry["vectors"]
    lengths = [length for length, _ in struct.iter_unpack("<II", records)]
    need(all(length % 64 == 0 and length >= 64 for length in lengths), "R-LAY-002")
    if coding == "raw":
        forbidden = ("mask", "fingerprints", "scale", "importance", "vectors")
        need(not any(key in entry for key in forbidden), "R-TEN-011")
        return
    need(dtype in FLOATS, "R-TEN-010")
    if "mask" in entry:
        check_mask(get(entry, "mask", dict))
    check_fingerprints(get(entry, "fingerprints", dict), dtype)
    if "scale" in entry:
        check_scale(get(entry, "scale", dict), entry["fingerprints"]["quantiser"])
    if "importance" in entry:
        check_importance(get(entry, "importance", dict))
    need(("vectors" in entry) == any(count for _, count, _ in vectors(entry)), "R-TEN-009")


def check_table(source: Entry, bound: int) -> None:
    """Chapter 8."""
    get(source, "base", int)
    extra = get(source, "extra", bytes)
    codes, group = get(source, "codes", list), get(source, "group", int)
    need(all(isinstance(code, bytes) for code in codes), "R-DIR-003")
    need(group in (1, 2), "R-TAB-003")
    need(1 <= len(extra) <= 4096 if group == 1 else 2 <= len(extra) <= 64, "R-TAB-001")
    need(max(extra) <= 56, "R-TAB-002")
    need(1 <= len(codes) <= 16 if len(extra) > 1 else not codes, "R-TAB-009")
    need(all(len(code) == -(-(len(extra) ** group) // 2) for code in codes), "R-TAB-004")
    need(len(extra) ** group % 2 == 0 or not any(code[-1] >> 4 for code in codes), "R-TAB-010")
    for code in lengths(source):
        need(max(code) <= 12, "R-TAB-005")
        need(2 <= sum(1 for length in code if length) <= 256, "R-TAB-006")
        need(sum(Fraction(1, 1 << length) for length in code if length) == 1, "R-TAB-007")
    need(top(source) <= bound, "R-TAB-008")


def lengths(table: Entry) -> list[list[int]]:
    """The code lengths of the symbols in each code, from fields of four bits."""
    symbols = len(table["extra"]) ** table["group"]
    return [[n for byte in code for n in (byte & 15, byte >> 4)][:symbols] for code in table["codes"]]


def top(table: Entry) -> int:
    """One past the last level."""
    return int(table["base"] + sum(1 << extra for extra in table["extra"]))


def check_mask(mask: Entry) -> None:
    """Chapter 10."""
    kind = word(mask, "kind", ("runs", "octets"), "R-MSK-001")
    if kind == "runs":
        need(get(mask, "polarity", int) in (0, 1), "R-MSK-002")
    need(kind == "runs" or "polarity" not in mask, "R-MSK-003")
    check_table(mask, 65536 if kind == "runs" else 256)


def check_quantiser(source: Entry) -> str:
    """Chapter 11: the quantiser's name, its key checked."""
    kind = word(source, "quantiser", ("exact", "uniform", "table"), "R-QNT-001")
    if kind == "exact":
        word(source, "dtype", tuple(BYTES), "R-TEN-003")
        need(get(source, "trim", int) in (0, 1), "R-QNT-008")
    elif kind == "uniform":
        step = get(source, "step", bytes)
        need(len(step) == 4 and 0 < step_of(source) < math.inf, "R-QNT-003")
    else:
        need(1 <= get(source, "count", int) <= 65536, "R-QNT-004")
    return kind


def step_of(source: Entry) -> float:
    """The step of a uniform quantiser."""
    return number_of(int.from_bytes(source["step"], "little"), "F32")


def check_fingerprints(source: Entry, dtype: str) -> None:
    """Chapter 11."""
    kind = check_quantiser(source)
    bound = 1 << 32
    if kind == "exact":
        coded = source["dtype"]
        need(coded == dtype or (coded in FLOATS and dtype in FLOATS[coded].widens), "R-QNT-002")
        bound = 1 << FLOATS[dtype].bits if coded == dtype else 2 * FLOATS[coded].nonfinite
    if kind == "table":
        bound = 2 * source["count"]
    check_table(source, bound)
    if kind == "uniform":
        need(math.isfinite(f32(f32((top(source) - 1) // 2) * step_of(source))), "R-QNT-006")


def check_scale(scale: Entry, quantiser: str) -> None:
    """Chapter 12."""
    per = word(scale, "per", ("tensor", "row", "column", "group"), "R-SCL-001")
    need(("size" in scale) == (per == "group"), "R-SCL-002")
    need(per != "group" or get(scale, "size", int) >= 1, "R-SCL-002")
    need(get(scale, "dtype", str) in FACTORS, "R-SCL-003")
    need(quantiser != "exact", "R-SCL-005")


def check_importance(source: Entry) -> None:
    """Chapter 13."""
    over = word(source, "over", ("survivors", "all", "factors"), "R-IMP-001")
    word(source, "role", ("multiplier", "metadata"), "R-IMP-002")
    if over == "factors":
        need(get(source, "dtype", str) in FACTORS, "R-IMP-003")
        return
    kind = check_quantiser(source)
    bound = 1 << 31
    if kind == "exact":
        need(source["dtype"] in FACTORS, "R-IMP-003")
        bound = 2 * FLOATS[source["dtype"]].nonfinite
    if kind == "table":
        bound = source["count"]
    check_table(source, bound)
    if kind == "uniform":
        need(math.isfinite(f32(f32(top(source) - 1) * step_of(source))), "R-IMP-006")


# --------------------------------------------------------------------------------------------- chunks (15, 9)


class Bits:
    """A bit sequence (R-CNV-002, R-CNV-003) of which no more may be read than there is."""

    def __init__(self, data: bytes, start: int, stop: int) -> None:
        self.data, self.at, self.stop = data, start, stop

    def bit(self) -> int:
        need(self.at < self.stop, "R-PLN-003")
        self.at += 1
        return self.data[(self.at - 1) // 8] >> (self.at - 1) % 8 & 1

    def field(self, width: int) -> int:
        return sum(self.bit() << i for i in range(width))


def zero(data: bytes, start: int, stop: int, clause: str) -> None:
    """Checks that the bits from start to stop are zero."""
    need(not any(data[bit // 8] >> bit % 8 & 1 for bit in range(start, stop)), clause)


def codewords(lengths: list[int]) -> dict[str, int]:
    """Codeword, first bit first -> symbol (R-COD-001)."""
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
    """The different `extra` of the classes that are used (15.2)."""
    k = len(table["extra"])
    if k == 1:
        return [table["extra"][0]]
    symbols = {s for code in lengths(table) for s, length in enumerate(code) if length}
    return sorted({table["extra"][s // k**j % k] for s in symbols for j in range(table["group"])})


@dataclass
class Chunk:
    """A chunk's index and planes.

    Attributes:
        sizes: positions of each segment.
        minimum, width: of each quantity present, by its name, in order.
        values: quantity -> its value for each segment.
        planes: plane -> its bit offset in the chunk, and how many bits each segment has in it.
    """

    sizes: list[int]
    minimum: dict[str, int] = field(default_factory=dict)
    width: dict[str, int] = field(default_factory=dict)
    values: dict[str, list[int]] = field(default_factory=dict)
    planes: dict[str, tuple[int, list[int]]] = field(default_factory=dict)


def segment_sizes(entry: Entry, k: int) -> list[int]:
    """Positions of the segments of chunk k (15.1)."""
    n, s, c = positions(entry), entry["segment"], entry["chunk"]
    count = -(-n // s)
    return [min(s, n - i * s) for i in range(k * c, min((k + 1) * c, count))]


def quantities(entry: Entry) -> list[str]:
    """The quantities that are present (15.2)."""
    out = ["survivors"] * ("mask" in entry)
    for stream in streams(entry):
        table = entry[stream]
        out += [f"{stream} code"] * (len(table["codes"]) > 1)
        out += [f"{stream} trim"] * (table.get("quantiser") == "exact" and table["trim"] == 1)
        out += [f"{stream} prefix"] * (len(table["extra"]) > 1)
        out += [f"{stream} residual"] * (len(used_extra(table)) > 1)
    return out


def level_counts(entry: Entry, stream: str, sizes: list[int], survivors: list[int]) -> list[int]:
    """Levels of each segment of a stream."""
    if stream == "mask":
        if entry["mask"]["kind"] == "octets":
            return [-(-n // 8) for n in sizes]
        ones = entry["mask"]["polarity"] == 1
        return [k if ones else n - k for n, k in zip(sizes, survivors, strict=True)]
    everywhere = stream == "importance" and entry["importance"]["over"] == "all"
    return sizes if everywhere else survivors


def open_chunk(data: bytes, entry: Entry, k: int) -> Chunk:
    """Header, index and places of the planes of chunk k (15.1, 15.2)."""
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
        need(len(table["extra"]) == 1 or max(codes) < len(table["codes"]), "R-IDX-005")
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
    """The levels of a segment: `read_segment` of chapter 9."""
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


def stream_levels(data: bytes, entry: Entry, chunk: Chunk, stream: str) -> list[list[int]]:
    """The levels of each segment of a stream."""
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
        out.append(read_segment(table, words[code], n, z, prefix, residual))
        need(prefix.at == prefix.stop and residual.at == residual.stop, "R-PLN-003")
    return out


def mask_bits(mask: Entry, levels: list[int], n: int, survivors: int) -> list[int]:
    """The mask bits of a segment (chapter 10)."""
    if mask["kind"] == "octets":
        bits = [level >> j & 1 for level in levels for j in range(8)]
        need(not any(bits[n:]), "R-MSK-006")
    else:
        bits, p = [1 - mask["polarity"]] * n, -1
        for level in levels:
            p += 1 + level
            need(p < n, "R-MSK-004")
            bits[p] = mask["polarity"]
    need(sum(bits[:n]) == survivors, "R-MSK-005")
    return bits[:n]


# ---------------------------------------------------------------------------------------------------- tensors


@dataclass
class Tensor:
    """A decoded tensor: its elements as bytes, and for each position mask bit and importance (None: none)."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    mask: list[int]
    importance: list[float | None]


def read_vectors(entry: Entry, data: bytes) -> dict[str, list[float]]:
    """The vector chunk (15.3), its values checked."""
    out, pos = {}, 0
    for name, count, dtype in vectors(entry):
        size = BYTES[dtype]
        need(pos + count * size <= len(data), "R-VEC-001")
        raw = [int.from_bytes(data[pos + i * size :][:size], "little") for i in range(count)]
        out[name] = [number_of(pattern, dtype) for pattern in raw]
        end = pos + count * size
        zero(data, 8 * end, 8 * min(align(end, 16), len(data)), "R-VEC-002")
        pos = align(end, 16)
    need(len(data) == align(pos, 64), "R-VEC-001")
    zero(data, 8 * pos, 8 * len(data), "R-VEC-002")
    check_vectors(entry, out)
    return out


def check_vectors(entry: Entry, found: dict[str, list[float]]) -> None:
    """The values of the vectors."""
    for name in ("fingerprint centroids", "importance centroids"):
        centroids = found.get(name, [])
        need(all(math.isfinite(x) and math.copysign(1, x) > 0 for x in centroids), "R-QNT-005")
        need(all(a < b for a, b in pairwise(centroids)), "R-QNT-007")
    if found.get("scale"):
        need(all(map(math.isfinite, found["scale"])), "R-SCL-004")
        fingerprints = entry["fingerprints"]
        if fingerprints["quantiser"] == "uniform":
            greatest = f32(f32((top(fingerprints) - 1) // 2) * step_of(fingerprints))
        else:
            greatest = found["fingerprint centroids"][-1]
        need(math.isfinite(f32(greatest * max(map(abs, found["scale"])))), "R-SCL-006")
    if found.get("rows"):
        need(all(map(math.isfinite, found["rows"] + found["columns"])), "R-IMP-004")
        product = max(map(abs, found["rows"])) * max(map(abs, found["columns"]))
        need(math.isfinite(f32(product)), "R-IMP-005")


def exact_pattern(level: int, dtype: str) -> int:
    """The sign back from the lowest bit to the highest (chapter 11)."""
    return (level >> 1) | ((level % 2) << (FLOATS[dtype].bits - 1))


def importance_of(source: Entry, level: int, found: dict[str, list[float]]) -> float:
    """The importance that a level stands for (chapter 13)."""
    if source["quantiser"] == "uniform":
        return f32(f32(level) * step_of(source))
    if source["quantiser"] == "table":
        return found["importance centroids"][level]
    return number_of(exact_pattern(level, source["dtype"]), source["dtype"])


def scale_of(entry: Entry, p: int, found: dict[str, list[float]]) -> float:
    """The scale factor of a position (chapter 12)."""
    scale, (_, columns) = entry["scale"], matrix(entry)
    place = {"tensor": 0, "row": p // columns, "column": p % columns, "group": p // scale.get("size", 1)}
    return found["scale"][int(place[scale["per"]])]


def reconstruct(entry: Entry, p: int, v: int, importance: float | None, found: dict[str, list[float]]) -> int:
    """The pattern of a survivor: `value(p)` of chapter 14."""
    source, dtype = entry["fingerprints"], entry["dtype"]
    multiplier = None
    if "importance" in entry and entry["importance"]["role"] == "multiplier":
        multiplier = importance
    if source["quantiser"] == "exact":
        pattern, coded = exact_pattern(v, source["dtype"]), source["dtype"]
        x = number_of(pattern, coded)
        if coded != dtype:
            pattern = pattern_of(x, dtype)
        if multiplier is None or not math.isfinite(x):
            return pattern
        return pattern_of(x * multiplier if dtype == "F64" else f32(x * multiplier), dtype)
    m, s = v // 2, v % 2
    if source["quantiser"] == "uniform":
        x = f32(f32(m) * step_of(source))
    else:
        x = found["fingerprint centroids"][m]
    x = -x if s else x
    if "scale" in entry:
        x = f32(x * scale_of(entry, p, found))
    if multiplier is not None:
        x = f32(x * multiplier)
    return pattern_of(x, dtype)


def read_fingerprints(entry: Entry, chunks: list[bytes], found: dict[str, list[float]]) -> Tensor:
    """A tensor with coding `fingerprint`."""
    patterns: list[int] = []
    mask: list[int] = []
    importances: list[float | None] = []
    _, columns = matrix(entry)
    for k, data in enumerate(chunks):
        chunk = open_chunk(data, entry, k)
        levels = {stream: stream_levels(data, entry, chunk, stream) for stream in streams(entry)}
        for i, n in enumerate(chunk.sizes):
            bits = [1] * n
            if "mask" in entry:
                bits = mask_bits(entry["mask"], levels["mask"][i], n, chunk.values["survivors"][i])
            fingerprints = iter(levels["fingerprints"][i])
            marks = iter(levels["importance"][i]) if "importance" in levels else iter(())
            for bit in bits:
                p = len(patterns)
                importance = None
                if "importance" in entry:
                    over = entry["importance"]["over"]
                    if over == "factors":
                        importance = f32(found["rows"][p // columns] * found["columns"][p % columns])
                    elif over == "all" or bit:
                        importance = importance_of(entry["importance"], next(marks), found)
                mask.append(bit)
                importances.append(importance)
                patterns.append(reconstruct(entry, p, next(fingerprints), importance, found) if bit else 0)
    size = BYTES[entry["dtype"]]
    raw = b"".join(pattern.to_bytes(size, "little") for pattern in patterns)
    return Tensor(entry["dtype"], tuple(entry["shape"]), raw, mask, importances)


def read_raw(entry: Entry, chunks: list[bytes]) -> Tensor:
    """A tensor with coding `raw` (chapter 16)."""
    out = b""
    for k, data in enumerate(chunks):
        size = sum(segment_sizes(entry, k)) * BYTES[entry["dtype"]]
        need(len(data) == align(size, 64), "R-RAW-002")
        need(not any(data[size:]), "R-RAW-003")
        need(entry["dtype"] != "BOOL" or max(data[:size]) <= 1, "R-RAW-004")
        out += data[:size]
    n = positions(entry)
    return Tensor(entry["dtype"], tuple(entry["shape"]), out, [1] * n, [None] * n)


@dataclass
class File:
    """A file, all of it."""

    root: dict[str, Any]
    tensors: dict[str, Tensor]


MAGIC = bytes.fromhex("89 53 46 50 0D 0A 1A 0A")


def read_directory(data: bytes) -> tuple[dict[str, Any], int]:
    """The root and the directory's offset, both checked (chapters 4 to 7, 21)."""
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
    """Chapters 7, 17 and 21."""
    if "features" in root:
        features = get(root, "features", list)
        need(all(isinstance(name, str) for name in features), "R-DIR-003")
        need(bool(features), "R-DIR-004")
        raw = [name.encode() for name in features]
        need(all(a < b for a, b in pairwise(raw)), "R-FEA-002")
        raise Bad("R-FEA-001")  # version 1.0 defines no feature
    need("keyed" not in root, "R-KEY-001")
    if "metadata" in root:
        need(all(isinstance(value, str) for value in get(root, "metadata", dict).values()), "R-DIR-003")
        need(bool(root["metadata"]), "R-DIR-004")
    entries = get(root, "tensors", list)
    need(all(isinstance(entry, dict) for entry in entries), "R-DIR-003")
    for i, entry in enumerate(entries):
        check_entry(entry)
        need(all(entry["name"] != other["name"] for other in entries[:i]), "R-TEN-001")


def read(data: bytes) -> File:
    """Reads everything in the bytes of a file.

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
