"""Mutations of valid files, driven by choices: structured changes of one field, or changes of raw bytes.

Rules: a structured change edits the parsed parts of a file (`forge`). Lengths, offsets and checksums are then
recomputed, so that the change reaches the check that should detect it. Wrong lengths, offsets and checksums
are separate changes. A chunk can be parsed down to quantities and planes, and is rebuilt after the change.
Each change returns a description of what it did.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from .choices import Choices
from .forge import Forge, Pairs, Part, Raw, pack, raw_part
from .slow_reader import BYTES, Bad, vectors
from .slow_reader.keyed import array_bytes, check_keyed_table

_MOST = 2**64 - 1
EXTREMES: tuple[int, ...] = (0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 4096, 4097, 65535)
EXTREMES += (65536, 65568, 2**24, 2**31, 2**32 - 64, 2**32 - 1, 2**32, 2**48, 2**48 + 1, 2**63)
EXTREMES += (2**64 - 64, _MOST)
_REGISTERED = "raw fingerprint exact uniform table runs octets tensor row column group survivors all factors"
WORDS = (*f"{_REGISTERED} multiplier metadata a x-a t0 F4".split(), *BYTES, "", "\0", "é" * 200)
_KEYS = (
    "x-a",
    "a",
    "mask",
    "scale",
    "importance",
    "vectors",
    "dtype",
    "trim",
    "count",
    "step",
    "size",
    "base",
)
_OTHERS: tuple[Any, ...] = (0, "a", b"\0", [], {}, None, True, -1, 1.5, [[[[0]]]])
_ROOT: tuple[tuple[str, Any], ...] = (("features", ["x-a"]), ("features", []), ("features", ["b", "a"]))
_ROOT += (("keyed", []), ("keyed", {}), ("metadata", {}))
_MOST_ARRAY = 1 << 16  # bytes of a bit array that is resized
# Preamble field -> size in bytes.
_PREAMBLE = {"magic": 8, "major": 2, "minor": 2, "reserved": 4, "directory_offset": 8, "directory_length": 8}
_PREAMBLE |= {"file_length": 8, "directory_crc": 4, "more_reserved": 16, "crc": 4}
_SPECIALS = (0x7F800000, 0x7FC00001, 0xFF800000, 0x80000000, 0x7F7FFFFF, 0x00000001, 0)


def damaged(file: Forge, choices: Choices) -> tuple[bytes, str]:
    """Returns the file after one or more changes, and their description. Modifies ``file``."""
    words = [choices.pick(_CHANGES)(file, choices)]
    for _ in range(choices.pick((0, 0, 1, 2))):
        words.append(choices.together(lambda own: own.pick(_LATER_CHANGES)(file, own)))
    data = file.build()
    if choices.seldom(12):
        data, more = _as_bytes(data, choices)
        words.append(more)
    return data, "; ".join(words)


# ------------------------------------------------------------------------------------------ the directory


def _change_entry(file: Forge, choices: Choices) -> str:
    """Changes a random field of a tensor's entry."""
    if not file.parts:
        return _change_root(file, choices)
    part = choices.pick(file.parts)
    return f"{_name(part)}: {_change_map(part.entry, choices)}"


def _change_root(file: Forge, choices: Choices) -> str:
    """Changes a key of the root other than `tensors`, or the number or order of the tensors."""
    what = choices.below(5)
    if what == 0:
        return _change_map(file.root, choices)
    if what == 1:
        key, value = deepcopy(choices.pick(_ROOT))
        file.root[key] = value
        return f"{key} is {value}"
    if what == 2 and file.parts:
        part = choices.pick(file.parts)
        file.parts.append(Part(dict(part.entry), [*part.chunks], part.vectors))
        return f"{_name(part)} occurs twice"
    if what == 3 and file.parts:
        return f"{_name(file.parts.pop(choices.below(len(file.parts))))} is missing"
    file.parts.reverse()
    return "the tensors in reverse order"


def _change_map(fields: dict[str, Any], choices: Choices) -> str:
    names = sorted(fields)
    inner = [name for name in names if isinstance(fields[name], dict)]
    if inner and choices.below(2):
        name = choices.pick(inner)
        return f"{name}.{_change_map(fields[name], choices)}"
    what = choices.below(8)
    if what == 7 or not names:
        key, value = choices.pick(_KEYS), deepcopy(choices.pick(_OTHERS))
        fields[key] = value
        return f"{key} is {value!r}"
    name = choices.pick(names)
    if what == 6:
        del fields[name]
        return f"{name} is missing"
    fields[name] = _changed(fields[name], choices)
    shown = repr(fields[name])
    return f"{name} is {shown if len(shown) < 60 else shown[:60] + ' ...'}"


def _changed(value: Any, choices: Choices) -> Any:
    if choices.seldom(12):
        return deepcopy(choices.pick(_OTHERS))
    if isinstance(value, int):
        near = (value + 1, max(value - 1, 0), value * 2, value ^ 1, value + 32)
        return min(choices.pick((*near, *EXTREMES)), _MOST)
    if isinstance(value, str):
        return choices.pick((*WORDS, value + "x"))
    if isinstance(value, bytes):
        return _changed_bytes(value, choices)
    if isinstance(value, list) and value:
        at = choices.below(len(value))
        inner: list[Any] = choices.pick(([_changed(value[at], choices)], [], [value[at]] * 2))
        return [*value[:at], *inner, *value[at + 1 :]]
    return choices.pick(({}, 1, "a", [0]))


def _changed_bytes(value: bytes, choices: Choices) -> bytes:
    what = choices.below(6)
    if what == 4:
        return value[:-1]
    if what == 5:
        return value + b"\0"
    if what == 3 and len(value) >= 2:
        i, j = choices.below(len(value)), choices.below(len(value))
        out = bytearray(value)
        out[i], out[j] = out[j], out[i]
        return bytes(out)
    return bytes(_struck(bytearray(value), choices)[0])


def _change_table(file: Forge, choices: Choices) -> str:
    """Changes a field of a keyed table. Half of the changes fit the size of the bit array to the new map."""
    tables = file.root.get("keyed")
    if not (isinstance(tables, list) and tables and all(isinstance(table, dict) for table in tables)):
        return _change_entry(file, choices)
    number = choices.below(len(tables))
    table = tables[number]
    words = f"keyed table {number}: {_change_map(table, choices)}"
    parts = [part for part in file.parts if part.entry.get("name") == table.get("bits")]
    if parts and choices.below(2):
        try:
            check_keyed_table(table)
            size = array_bytes(table)
        except Bad:
            return words
        if size <= _MOST_ARRAY:
            part = parts[0]
            data = b"".join(part.chunks)[:size].ljust(size, b"\0")
            cuts = (part.entry["segment"], part.entry["chunk"])
            part.chunks = raw_part("", "U8", [size], data, *cuts).chunks
            part.entry["shape"] = [size]
            words += f"; a bit array of {size} bytes"
    return words


def _change_encoding(file: Forge, choices: Choices) -> str:
    """Changes the encoding of the directory: non-canonical MessagePack, or invalid bytes."""
    good = file.directory_bytes()
    what = choices.below(6)
    if what == 0:
        out, words = _struck(bytearray(good), choices)
        file.directory = bytes(out)
        return f"the directory: {words}"
    if what == 1:
        file.directory = good[: choices.below(len(good) or 1)]
        return f"the directory truncated to {len(file.directory)} bytes"
    if what == 2:
        file.directory = good + choices.pick((b"\0", b"\xc1", good))
        return "bytes after the directory's value"
    if not file.parts:
        return _change_root(file, choices)
    part = choices.pick(file.parts)
    pairs = sorted(part.full_entry().items())
    words = _rewritten(pairs, choices, what)
    entries = [Pairs(pairs) if own is part else own.full_entry() for own in file.parts]
    file.directory = pack({"tensors": entries, **file.root})
    return f"{_name(part)}: {words}"


def _rewritten(pairs: list[Any], choices: Choices, what: int) -> str:
    """Changes one pair of a map so that the encoding breaks R-MSG-001 to -005; describes the change."""
    at = choices.below(len(pairs))
    key, value = pairs[at]
    if what == 3:
        pairs.append(pairs.pop(at))
        return f"{key} is last"
    if what == 4:
        pairs.insert(at, pairs[at])
        return f"{key} occurs twice"
    raw = pack(value)
    longer = Raw(_longer(raw) or b"\xc0")
    pairs[at] = (key, longer)
    return f"{key} is encoded as {longer[:9].hex()}"


def _longer(raw: bytes) -> bytes | None:
    """Returns a value in the next longer encoding of MessagePack, or None if there is none."""
    head = raw[0]
    if head < 0x80:
        return b"\xcc" + raw
    if head < 0x90:
        return bytes((0xDE, 0, head & 15)) + raw[1:]
    if head < 0xA0:
        return bytes((0xDC, 0, head & 15)) + raw[1:]
    if head < 0xC0:
        return bytes((0xD9, head & 31)) + raw[1:]
    wider = {
        0xC4: (0xC5, 1),
        0xCC: (0xCD, 1),
        0xCD: (0xCE, 2),
        0xCE: (0xCF, 4),
        0xD9: (0xDA, 1),
        0xC5: (0xC6, 2),
    }
    if head not in wider:
        return None
    new, zeros = wider[head]
    return bytes((new, *bytes(zeros))) + raw[1:]


# ----------------------------------------------------------------------------------------------- the chunks


def _strike_chunk(file: Forge, choices: Choices) -> str:
    """Changes bytes at a random place of a chunk."""
    part = _with_chunks(file, choices)
    if part is None:
        return _change_root(file, choices)
    k = choices.below(len(part.chunks))
    part.chunks[k], words = _struck(part.chunks[k], choices)
    return f"{_name(part)}, chunk {k}: {words}"


def _relay_chunk(file: Forge, choices: Choices) -> str:
    """Changes a quantity or a plane of a chunk of a valid file, and rebuilds the chunk."""
    part = _with_chunks(file, choices)
    if part is None:
        return _change_root(file, choices)
    if part.entry["coding"] == "raw":
        return _strike_chunk(file, choices)
    k = choices.below(len(part.chunks))
    taken = part.take(k)
    planes = [name for name, bits in taken.planes.items() if any(bits)]
    if planes and choices.below(2):
        name = choices.pick(planes)
        i = choices.pick([i for i, bits in enumerate(taken.planes[name]) if bits])
        bits = taken.planes[name][i]
        at = choices.below(len(bits))
        flipped = "1" if bits[at] == "0" else "0"
        taken.planes[name][i] = bits[:at] + choices.pick((flipped, "", bits[at] + flipped)) + bits[at + 1 :]
        if choices.below(2):
            taken.recount()
        words = f"{name} of segment {i} changed at bit {at}"
    elif taken.quantities:
        name = choices.pick(sorted(taken.quantities))
        values = taken.quantities[name]
        i = choices.below(len(values))
        values[i] = min(choices.pick((values[i] + 1, max(values[i] - 1, 0), *EXTREMES)), 2**32 - 1)
        words = f"{name} of segment {i} is {values[i]}"
        if choices.seldom(4):
            least = min(values)
            width = (max(values) - least).bit_length()
            taken.headers[name] = max(least - choices.below(2), 0), width + choices.below(2)
    else:
        return _strike_chunk(file, choices)
    part.put(taken, k)
    return f"{_name(part)}, chunk {k}: {words}"


def _resize_chunk(file: Forge, choices: Choices) -> str:
    """Lengthens, shortens, moves, duplicates or removes a chunk."""
    part = _with_chunks(file, choices)
    if part is None:
        return _change_root(file, choices)
    k, what = choices.below(len(part.chunks)), choices.below(5)
    chunk = part.chunks[k]
    if what == 0:
        chunk += bytes(choices.pick((64, 1)))
    elif what == 1:
        del chunk[-choices.pick((64, 1)) :]
    elif what == 2:
        part.chunks.insert(k, bytearray(chunk))
    elif what == 3:
        del part.chunks[k]
    else:
        part.chunks.append(part.chunks.pop(k))
    return f"{_name(part)}, chunk {k}: {('longer', 'shorter', 'twice', 'missing', 'last')[what]}"


def _change_vectors(file: Forge, choices: Choices) -> str:
    """Changes an element, the bytes or the length of a vector chunk of a valid file."""
    parts = [part for part in file.parts if part.vectors]
    if not parts:
        return _strike_chunk(file, choices)
    part = choices.pick(parts)
    assert part.vectors is not None
    what = choices.below(4)
    if what == 3:
        part.vectors = choices.pick((part.vectors + bytes(64), part.vectors[:-64], bytearray(64)))
        return f"{_name(part)}: vectors of {len(part.vectors)} bytes"
    if what == 2:
        part.vectors, words = _struck(part.vectors, choices)
        return f"{_name(part)}, vectors: {words}"
    name, count, dtype = next(vector for vector in vectors(part.entry) if vector[1])
    size, at = BYTES[dtype], choices.below(min(count, len(part.vectors) // 4))
    pattern = choices.pick(_SPECIALS) >> 8 * (4 - size)
    part.vectors[at * size : (at + 1) * size] = pattern.to_bytes(size, "little")
    return f"{_name(part)}: element {at} of {name} is {pattern:#x}"


def _change_record(file: Forge, choices: Choices) -> str:
    """Changes a chunk record of a valid file so that it does not match its chunk."""
    part = _with_chunks(file, choices)
    if part is None:
        return _change_root(file, choices)
    key = choices.pick(("chunks", "vectors")) if part.vectors else "chunks"
    part.entry[key] = _changed_bytes(part.full_entry()[key], choices)
    return f"{_name(part)}: the records of {key} are {part.entry[key][:16].hex()}"


# ------------------------------------------------------------------------------------------- the whole file


def _change_preamble(file: Forge, choices: Choices) -> str:
    """Changes a field of the preamble. Recomputes the preamble's checksum unless it is that field."""
    name = choices.pick(tuple(_PREAMBLE))
    data = file.build()
    at = list(_PREAMBLE).index(name)
    start = sum(list(_PREAMBLE.values())[:at])
    size = _PREAMBLE[name]
    number = int.from_bytes(data[start : start + size], "little")
    near = (number + 1, max(number - 1, 0), number + 64, number ^ 1 << choices.below(8 * size))
    changed = choices.pick((*near, *EXTREMES)) % (1 << 8 * size)
    file.preamble[name] = (
        changed.to_bytes(size, "little") if name in ("magic", "reserved", "more_reserved") else changed
    )
    return f"{name} is {changed:#x}"


def _as_bytes(data: bytes, choices: Choices) -> tuple[bytes, str]:
    """Truncates, extends or corrupts the file. Recomputes no checksum except, in one case, the preamble's."""
    what = choices.below(4)
    if what == 0:
        cut = choices.below(len(data))
        return data[:cut], f"the file truncated to {cut} bytes"
    if what == 1:
        return data + bytes(choices.pick((1, 64))), "bytes after the end"
    out, words = _struck(bytearray(data), choices)
    if what == 2:
        out[60:64] = zlib.crc32(out[:60]).to_bytes(4, "little")
        words += ", the preamble's checksum repaired"
    return bytes(out), f"the file: {words}"


def _struck(data: bytearray, choices: Choices) -> tuple[bytearray, str]:
    """Returns the data with a bit, a byte or up to 8 bytes changed, and a description of the change.

    Half of the changes start in the first 96 bytes.
    """
    if not data:
        return data, "empty"
    out = bytearray(data)
    at = choices.below(choices.pick((len(out), min(len(out), 96))))
    what = choices.below(4)
    if what == 0:
        bit = choices.below(8)
        out[at] ^= 1 << bit
        return out, f"bit {bit} of byte {at} flipped"
    if what == 1:
        out[at] = choices.pick((0, 1, 32, 33, 127, 128, 255, choices.below(256)))
        return out, f"byte {at} is {out[at]:#04x}"
    few = min(choices.below(8) + 1, len(out) - at)
    noise = choices.noise()
    out[at : at + few] = bytes(few) if what == 2 else bytes(noise.below(256) for _ in range(few))
    return out, f"bytes from {at} are {out[at : at + few].hex()}"


def _with_chunks(file: Forge, choices: Choices) -> Part | None:
    """Picks a tensor that has chunks; None if there is none."""
    parts = [part for part in file.parts if part.chunks]
    return choices.pick(parts) if parts else None


def _name(part: Part) -> str:
    name = part.entry.get("name")
    return name if isinstance(name, str) and len(name) < 40 else "a tensor"


_CHANGES: tuple[Callable[[Forge, Choices], str], ...] = (
    _change_entry,
    _change_entry,
    _change_entry,
    _change_table,
    _strike_chunk,
    _strike_chunk,
    _relay_chunk,
    _relay_chunk,
    _resize_chunk,
    _change_vectors,
    _change_record,
    _change_encoding,
    _change_preamble,
    _change_root,
)
# These changes parse the entry, so they need a file that is still valid.
_FIRST_ONLY = (_change_table, _relay_chunk, _change_vectors, _change_record)
_LATER_CHANGES = tuple(change for change in _CHANGES if change not in _FIRST_ONLY)
