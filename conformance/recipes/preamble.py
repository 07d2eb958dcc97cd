"""Chapters 1, 4 and 5: preamble and layout."""

from __future__ import annotations

import struct
import zlib
from typing import Any

from sfp_conformance.forge import Forge, hand_file, record

from .gallery import ALL, ONE, PLAIN, parts
from .samples import coded
from .suite import Edit, Suite


def field(**changes: Any) -> Edit:
    """Returns an edit of preamble fields. Repairs the preamble's checksum unless the edit sets it."""
    return lambda file: file.preamble.update(changes)


def cut(length: int) -> Edit:
    """Returns an edit that keeps the first ``length`` bytes; a negative length removes bytes at the end."""
    return lambda file: file.build()[:length]


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    _magic_and_length(suite)
    _versions(suite)
    _places(suite)
    _checksums(suite)
    _layout(suite)


def _magic_and_length(suite: Suite) -> None:
    magic = b"\x89SFP\r\n\x1a\n"
    for at in range(8):
        wrong = bytes([*magic[:at], magic[at] ^ 0x20, *magic[at + 1 :]])
        suite.invalid(f"PRE-001-byte-{at}", f"byte {at} of the magic is another", PLAIN, field(magic=wrong))
    changed = {
        "text-mode": (b"\x89SFP\n\x1a\n\0", "line endings were converted"),
        "zip": (b"PK\3\4\x14\0\0\0", "the start of a ZIP file"),
        "zeros": (bytes(8), "zeros"),
        "safetensors": (struct.pack("<Q", 200), "the start of a safetensors file"),
    }
    for slug, (other, words) in changed.items():
        suite.invalid(f"PRE-001-{slug}", f"instead of the magic: {words}", PLAIN, field(magic=other))
    suite.invalid(
        "PRE-001-short-and-wrong", "one byte that is not the first byte of the magic", PLAIN, lambda _: b"x"
    )
    for length in (0, 1, 7, 8, 12, 63):
        words = f"the first {length} bytes of a file"
        suite.invalid(f"PRE-002-first-{length}-bytes", words, PLAIN, cut(length))
    for slug, length in (("preamble-alone", 64), ("to-the-directory", 192), ("one-byte-less", -1)):
        suite.invalid(f"PRE-007-{slug}", f"a file that was cut: {slug}", PLAIN, cut(length))
    huge = field(file_length=2**64 - 1, directory_length=2**64 - 65, directory_offset=64)
    suite.invalid("PRE-007-all-ones", "a file length of 2^64 - 1", PLAIN, huge, tags=["hostile"])
    for slug, tail in (("zero", b"\0"), ("zip", b"PK\5\6" + bytes(18)), ("chunk", bytes(64))):

        def with_tail(file: Forge, tail: bytes = tail) -> None:
            file.tail = tail

        words = f"{len(tail)} bytes after the directory"
        suite.invalid(f"PRE-008-{slug}", words, PLAIN, with_tail)
    suite.invalid("PRE-008-twice", "two concatenated files", PLAIN, lambda file: file.build() * 2)


def _versions(suite: Suite) -> None:
    for major in (0, 2, 256, 65535):
        suite.invalid(f"PRE-004-major-{major}", f"major {major}", PLAIN, field(major=major), tags=["future"])
    for minor in (1, 255, 65535):
        file = Forge.of(suite.cases[PLAIN].data)
        file.preamble["minor"] = minor
        suite.valid(f"PRE-005-minor-{minor}", f"minor {minor}", file.build(), "R-PRE-004", kind="f")
    for name, size, at in (("reserved", 4, 12), ("more_reserved", 16, 44)):
        for byte in range(size):
            for bit in {0, 7, byte % 8}:
                zeros = bytearray(size)
                zeros[byte] = 1 << bit
                slug = f"byte-{at + byte}-bit-{bit}"
                suite.invalid(
                    f"PRE-006-{slug}", "a reserved bit is set", PLAIN, field(**{name: bytes(zeros)})
                )


def _places(suite: Suite) -> None:
    size = len(Forge.of(suite.cases[PLAIN].data).directory_bytes())
    length = len(suite.cases[PLAIN].data)
    for change in (-64, -1, 1, 64, 2**32):
        words = f"directory length {change:+} bytes"
        suite.invalid(f"PRE-009-length{change:+}", words, PLAIN, field(directory_length=size + change))
    for change in (-64, 64):
        words = f"directory offset {change:+} bytes"
        suite.invalid(
            f"PRE-009-offset{change:+}", words, PLAIN, field(directory_offset=length - size + change)
        )
    wrap = field(directory_offset=2**64 - 64, directory_length=length + 64)
    suite.invalid("PRE-009-sum-wraps", "offset and length add up modulo 2^64", PLAIN, wrap, tags=["hostile"])

    def moved(at: int) -> Edit:
        def edit(file: Forge) -> bytes:
            directory = file.directory_bytes()
            file.preamble = {"directory_offset": at, "directory_length": len(directory) + 192 - at}
            own = file.build()
            crc = zlib.crc32(own[at:])
            file.preamble["directory_crc"] = crc
            return file.build()

        return edit

    for at in (0, 63, 100, 191):
        words = f"a directory offset of {at}, with the checksum of those bytes"
        suite.invalid(f"PRE-011-at-{at}", words, PLAIN, moved(at))


def _checksums(suite: Suite) -> None:
    data = suite.cases[PLAIN].data
    (crc,) = struct.unpack_from("<I", data, 60)
    changes = {"major": 2, "minor": 1, "reserved": b"\1\0\0\0", "directory_offset": 64, "file_length": 1}
    for name, value in {**changes, "directory_crc": 0}.items():
        words = f"{name.replace('_', ' ')} changed, the preamble's checksum not"
        suite.invalid(f"PRE-003-{name.replace('_', '-')}", words, PLAIN, field(**{name: value, "crc": crc}))
    suite.invalid("PRE-003-zero", "a preamble checksum of 0", PLAIN, field(crc=0))
    for slug, wrong in (
        ("not-inverted", crc ^ 0xFFFFFFFF),
        ("big-endian", int.from_bytes(crc.to_bytes(4, "big"), "little")),
        ("adler", zlib.adler32(data[:60])),
    ):
        suite.invalid(f"PRE-003-{slug}", f"the preamble's checksum, {slug}", PLAIN, field(crc=wrong))
    (own,) = struct.unpack_from("<I", data, 40)
    for slug, wrong in (("zero", 0), ("one-bit", own ^ 1), ("not-inverted", own ^ 0xFFFFFFFF)):
        words = f"the directory's checksum, {slug}"
        suite.invalid(f"PRE-010-{slug}", words, PLAIN, field(directory_crc=wrong))

    def flipped(at: int) -> Edit:
        def edit(file: Forge) -> bytes:
            out = bytearray(file.build())
            out[at] ^= 0x10
            return bytes(out)

        return edit

    for slug, at in (
        ("first-byte", 192),
        ("last-byte", -1),
        ("a-record", data.index(b"chunks\xc4\x08") + 12),
    ):
        suite.invalid(f"PRE-010-{slug}", "a byte of the directory flipped", PLAIN, flipped(at))


def _layout(suite: Suite) -> None:
    for key in ("chunks", "vectors"):
        for length in (0, 1, 63, 65, 96, 2**32 - 1):

            def edit(file: Forge, key: str = key, length: int = length) -> None:
                part = file.part("uniform")
                whole = bytearray(part.full_entry()[key])
                whole[:4] = length.to_bytes(4, "little")
                part.entry[key] = bytes(whole)

            words = f"a chunk length of {length} in {key}"
            suite.invalid(f"LAY-002-{key}-{length}", words, ONE["uniform"], edit, tensor="uniform")
    _ends(suite)
    for where in ("first", "last", "vectors", "padding"):

        def damage(file: Forge, where: str = where) -> None:
            part = file.part("coded")
            entry = part.full_entry()
            part.entry |= {"chunks": entry["chunks"], "vectors": entry["vectors"]}
            chunk = part.vectors if where == "vectors" else part.chunks[where != "first"]
            assert chunk is not None
            chunk[-1 if where == "padding" else 0] ^= 1

        words = f"a byte flipped in a chunk: {where}"
        suite.invalid(f"LAY-004-{where}", words, ONE["coded"], damage, tensor="coded")
        suite.invalid(f"LAY-004-{where}-of-many", words, ALL, damage, tensor="coded")

    def swapped(file: Forge) -> None:
        part = file.part("runs")
        part.entry["chunks"] = part.full_entry()["chunks"]
        part.chunks[0][:64], part.chunks[0][64:128] = part.chunks[0][64:128], part.chunks[0][:64]

    suite.invalid("LAY-004-swapped", "two pieces of a chunk swapped", ONE["runs"], swapped, tensor="runs")


def _ends(suite: Suite) -> None:
    for change in (-64, 64, 2**32 - 4096):

        def edit(file: Forge, change: int = change) -> None:
            part = file.part("coded")
            last = part.chunks[-1]
            kept = b"".join(map(record, part.chunks[:-1]))
            part.entry["chunks"] = kept + struct.pack("<II", len(last) + change, zlib.crc32(last))

        words = f"the last chunk's length {change:+}"
        suite.invalid(f"LAY-003-last{change:+}", words, ONE["coded"], edit)

    def hole(file: Forge) -> None:
        part = file.part("coded")
        part.entry["chunks"] = part.full_entry()["chunks"]
        part.chunks.append(bytearray(64))

    suite.invalid("LAY-003-hole", "64 bytes between the last chunk and the directory", ONE["coded"], hole)

    def shared(file: Forge) -> None:
        twin = coded("twin")
        twin.entry |= {"chunks": twin.full_entry()["chunks"], "vectors": twin.full_entry()["vectors"]}
        twin.chunks, twin.vectors = [], None
        file.parts.append(twin)

    suite.invalid("LAY-003-shared", "a second tensor with the chunks of the first", ONE["coded"], shared)

    def far(file: Forge) -> None:
        file.part("coded").entry["vectors"] = struct.pack("<II", 2**32 - 64, 0)

    suite.invalid(
        "LAY-003-past-the-end", "a record with a chunk length of 4 GiB", ONE["coded"], far, tags=["hostile"]
    )
    two = hand_file(parts()["raw"], coded("one"), coded("two"))
    suite.valid("LAY-001-vectors-first", "vector chunks before the chunks of their tensors", two, "R-LAY-003")
