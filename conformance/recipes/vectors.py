"""Chapters 15.3 and 16: vector chunks and raw coding."""

from __future__ import annotations

from sfp_conformance.forge import Forge, hand_file, raw_part
from sfp_conformance.slow_reader import BYTES

from .edits import bit_flip, put_bytes, vector_places
from .gallery import ONE
from .suite import Edit, Suite


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    for name in ("uniform", "table", "group", "coded"):
        _vector_chunk(suite, name)
    _raw(suite)


def _vector_chunk(suite: Suite, name: str) -> None:
    def resized(more: int) -> Edit:
        def edit(file: Forge) -> None:
            chunk = file.part(name).vectors
            assert chunk is not None
            if more > 0:
                chunk += bytes(more)
            else:
                del chunk[more:]

        return edit

    data = suite.cases[ONE[name]].data
    length = len(Forge.of(data).part(name).vectors or b"")
    for more in (64, 640, *([-64] if length > 64 else [])):
        words = f"a vector chunk of {length + more} bytes for {length}"
        suite.invalid(f"VEC-001-{name}-{more:+}", words, ONE[name], resized(more), tensor=name)
    for vector, (at, count, dtype) in vector_places(data, name).items():
        end = at + count * BYTES[dtype]
        places = {end, -(-end // 16) * 16 - 1} if end % 16 else set()
        for byte in sorted(places):
            words = f"byte {byte} after {vector} is not zero"
            flip = bit_flip(name, 8 * byte, vectors=True)
            suite.invalid(f"VEC-002-{name}-{vector}-{byte}", words, ONE[name], flip, tensor=name)
    used = max(at + count * BYTES[dtype] for at, count, dtype in vector_places(data, name).values())
    if -(-used // 16) * 16 < length:
        flip = bit_flip(name, 8 * length - 1, vectors=True)
        suite.invalid(f"VEC-002-{name}-end", "the last byte is not zero", ONE[name], flip, tensor=name)


def _raw(suite: Suite) -> None:
    for dtype, size in BYTES.items():
        count = 13
        pattern = bytes((i * 37 + 11) % 256 for i in range(count * size))
        raw = bytes(b % 2 for b in pattern) if dtype == "BOOL" else pattern
        data = hand_file(raw_part("one", dtype, [count], raw))
        base = suite.valid(
            f"RAW-001-{dtype}", f"thirteen elements of {dtype}, raw", data, "R-RAW-002", "R-TEN-003"
        )

        def resized(file: Forge) -> None:
            file.part("one").chunks[0] += bytes(64)

        suite.invalid(f"RAW-002-{dtype}", "64 bytes more than needed", base, resized, tensor="one")
        spare = -(-count * size // 64) * 64 - count * size
        for slug, byte in (("first", count * size), ("last", count * size + spare - 1)):
            flip = bit_flip("one", 8 * byte)
            suite.invalid(f"RAW-003-{dtype}-{slug}", "a byte after the elements", base, flip, tensor="one")
    for value in (2, 128, 255):
        for at in (0, 12):
            change = put_bytes("one", at, bytes([value]))
            words = f"a BOOL that is {value}"
            suite.invalid(f"RAW-004-{value}-at-{at}", words, "y-RAW-001-bool", change, tensor="one")
    for count in (31, 32, 33, 63, 64, 65, 96):
        for chunk in (1, 2):
            data = hand_file(
                raw_part("one", "I32", [count], bytes(i % 251 for i in range(4 * count)), chunk=chunk)
            )
            words = f"{count} raw elements, {chunk} segments per chunk"
            suite.valid(f"RAW-001-{count}-by-{chunk}", words, data, "R-TEN-008")
