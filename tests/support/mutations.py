"""Random changes of files whose checksums are then computed again, for tests that compare readers."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from typing import Any

from sfp_conformance.forge import Forge, Part

EXTREMES = [0, 1, 2, 31, 32, 33, 63, 64, 127, 128, 255, 256, 4095, 4096, 65535, 65536, 2**31 - 1, 2**31]
EXTREMES += [2**32 - 64, 2**32 - 1, 2**32, 2**48, 2**48 + 1, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 1]
WORDS = ["", "raw", "fingerprint", "exact", "uniform", "table", "runs", "octets", "row", "column", "group"]
WORDS += ["F32", "F16", "BF16", "F64", "BOOL", "U8", "F8_E4M3", "survivors", "all", "factors", "multiplier"]
WORDS += ["metadata", "tensor", "x-a", "\0", "é" * 200]


def mutated(value: Any, rng: random.Random) -> Any:
    """Returns a value of the directory, changed."""
    if isinstance(value, int):
        return min(rng.choice([*EXTREMES, value + 1, max(value - 1, 0), value * 2, value ^ 1]), 2**64 - 1)
    if isinstance(value, str):
        return rng.choice(WORDS)
    if isinstance(value, bytes):
        raw = bytearray(value)
        what = rng.randrange(5)
        if raw and what < 2:
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        elif what == 2:
            raw += bytes([rng.randrange(256)])
        elif raw and what == 3:
            del raw[rng.randrange(len(raw))]
        else:
            raw = bytearray(rng.randbytes(rng.randrange(20)))
        return bytes(raw)
    if isinstance(value, list):
        out = list(value)
        what = rng.randrange(3)
        if out and what == 0:
            out.pop(rng.randrange(len(out)))
        elif out and what == 1:
            i = rng.randrange(len(out))
            out[i] = mutated(out[i], rng)
        else:
            out.append(rng.choice([rng.choice(EXTREMES), *out[:1]]))
        return out
    return value


def mutate_map(fields: dict[str, Any], rng: random.Random) -> None:
    """Changes one entry of a map, at any depth."""
    if not fields:
        fields["x-a"] = 1
        return
    key = rng.choice(sorted(fields))
    what = rng.randrange(12)
    if isinstance(fields[key], dict) and what < 9:
        mutate_map(fields[key], rng)
    elif what < 9:
        fields[key] = mutated(fields[key], rng)
    elif what == 9:
        del fields[key]
    elif what == 10:
        fields[rng.choice(["x-a", "mask", "scale", "vectors", "dtype", "count", "step", "size"])] = (
            rng.choice([1, "exact", b"\0\0\0\0", [], {}, fields[key]])
        )
    else:
        fields[key] = rng.choice([1, "a", b"a", [], {}, [[[[]]]]])


def mutate_chunk(chunk: bytearray, rng: random.Random) -> None:
    """Changes bytes of a chunk at one place, more often in its header and index."""
    what = rng.randrange(6)
    at = rng.randrange(len(chunk) if what % 2 else min(len(chunk), 128))
    if what < 2:
        chunk[at] ^= 1 << rng.randrange(8)
    elif what < 4:
        chunk[at] = rng.choice([0, 1, 32, 33, 127, 128, 255])
    elif what == 4:
        chunk[at : at + 4] = rng.randbytes(4)[: len(chunk) - at]
    else:
        chunk[at : at + 4] = struct.pack("<I", rng.choice(EXTREMES) & 0xFFFFFFFF)[: len(chunk) - at]


def mutate(file: Forge, rng: random.Random) -> None:
    """Makes one change in a file, anywhere."""
    what = rng.randrange(20)
    part = rng.choice(file.parts)
    if what < 8:
        mutate_map(part.entry, rng)
    elif what < 15 and part.chunks:
        mutate_chunk(rng.choice([*part.chunks, *([part.vectors] if part.vectors else [])]), rng)
    elif what == 15 and part.chunks:
        part.chunks.append(bytearray(rng.choice(part.chunks)))
    elif what == 16 and part.chunks:
        part.chunks[rng.randrange(len(part.chunks))] += bytes(64)
    elif what == 17:
        file.parts.append(Part(part.entry, part.chunks, part.vectors))
    elif what == 18 and part.chunks:
        chunk = rng.randrange(len(part.chunks))
        part.chunks[chunk] = bytearray(rng.randbytes(len(part.chunks[chunk])))
    else:
        part.vectors = rng.choice([None, bytearray(64), part.vectors])


def random_bits(count: int, rng: random.Random) -> str:
    """Returns ``count`` random digits 0 and 1."""
    return "".join(rng.choice("01") for _ in range(count))


def with_changes(data: bytes, seed: int, changes: int = 1) -> bytes:
    """Returns a file with some changes anywhere."""
    rng = random.Random(seed)
    file = Forge.of(data)
    for _ in range(changes):
        mutate(file, rng)
    return file.build()


def with_changed_chunks(files: Sequence[bytes], seed: int) -> bytes:
    """Returns one of the files, with one to three changes in the chunks of one tensor."""
    rng = random.Random(seed)
    file = Forge.of(rng.choice(files))
    part = rng.choice([part for part in file.parts if part.chunks])
    for _ in range(rng.randrange(1, 4)):
        mutate_chunk(rng.choice(part.chunks), rng)
    return file.build()


def with_random_planes(data: bytes, seed: int) -> bytes:
    """Returns a file whose first tensor has random bits in most of its planes; raw tensors do not change."""
    rng = random.Random(seed)
    file = Forge.of(data)
    part = file.parts[0]
    if not part.chunks or part.entry["coding"] == "raw":
        return data
    taken = part.take()
    for name in sorted(taken.planes):
        if rng.random() < 0.7:
            taken.planes[name] = [random_bits(len(bits), rng) for bits in taken.planes[name]]
    part.put(taken)
    return file.build()
