"""Chapter 19: values at a limit, and above it."""

from __future__ import annotations

import struct
import zlib

from sfp_conformance.forge import Forge, exact, hand_file, raw_part, table

from .edits import one
from .gallery import ONE, PLAIN
from .suite import Edit, Suite


def nested(depth: int) -> object:
    """Returns nested arrays and maps of a given depth."""
    value: object = 0
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    _in_force(suite)
    _defaults(suite)
    _hostile(suite)


def _in_force(suite: Suite) -> None:
    data = suite.cases[PLAIN].data
    (length,) = struct.unpack_from("<Q", data, 24)
    for name, at in (
        ("directory_bytes", length),
        ("tensor_bytes", 80),
        ("name_bytes", 5),
        ("rank", 1),
        ("tensors", 1),
    ):
        for limit in sorted({at, at + 1, 2 * at}):
            words = f"a limit of {limit} on {name} of {at}"
            slug = f"LIM-001-{name}-{at}-of-{limit}"
            suite.valid(slug, words, data, "R-LIM-002", in_force={name: limit})

        for limit in sorted({at - 1, at // 2}):
            words = f"a limit of {limit} on {name} of {at}"
            case = f"LIM-002-{name}-{at}-of-{limit}"
            _over(
                suite,
                case,
                words,
                {name: limit},
                "plain" if name in ("tensor_bytes", "name_bytes", "rank") else None,
            )


def _over(suite: Suite, case: str, why: str, force: dict[str, int], tensor: str | None) -> None:
    """Adds a file that differs from its twin only in its metadata, and is refused because of a limit."""

    def edit(file: Forge) -> None:
        file.root["x-limit"] = case

    suite.invalid(
        case, why, PLAIN, edit, tensor=tensor, plainly=None, tags=["hostile", "limit"], in_force=force
    )


def _defaults(suite: Suite) -> None:
    for depth in (13, 14, 15):
        file = Forge.of(suite.cases[PLAIN].data)
        file.root["x-a"] = nested(depth)
        suite.valid(f"LIM-001-depth-{depth + 1}", f"a depth of {depth + 1}", file.build())
    for depth in (16, 17, 100, 150):

        def deep(file: Forge, depth: int = depth) -> None:
            file.root["x-a"] = nested(depth)

        _limit(suite, f"depth-{depth + 1}", f"a depth of {depth + 1}", deep)
    for length in (1023, 1024):
        data = hand_file(raw_part("n" * length, "U8", [1], b"a"))
        suite.valid(f"LIM-001-name-{length}", f"a name of {length} bytes", data)
    for length in (1025, 5000):

        def named(file: Forge, length: int = length) -> None:
            file.parts[0].entry["name"] = "n" * length

        _limit(suite, f"name-{length}", f"a name of {length} bytes", named, tensor="n" * length)
    for rank in (16, 31, 32):
        data = hand_file(raw_part("one", "U8", [1] * rank, b"a"))
        suite.valid(f"LIM-001-rank-{rank}", f"a tensor of rank {rank}", data)
    for rank in (33, 64, 1000):

        def ranked(file: Forge, rank: int = rank) -> None:
            file.parts[0].entry["shape"] = [1] * (rank - 1) + [40]

        _limit(suite, f"rank-{rank}", f"a tensor of rank {rank}", ranked, tensor="plain")


def _limit(suite: Suite, slug: str, why: str, edit: Edit, tensor: str | None = None) -> None:
    suite.invalid(f"LIM-002-{slug}", why, PLAIN, edit, tensor=tensor, plainly=None, tags=["hostile", "limit"])


def _hostile(suite: Suite) -> None:
    """Tensors that are mostly pruned: few bytes that need much memory."""
    for power, count in (("2-28-and-more", (1 << 28) + 4), ("2-32", 1 << 32), ("2-38", 1 << 38)):

        def swollen(file: Forge, count: int = count) -> None:
            positions = count // 4
            mask = {"kind": "runs", "polarity": 1, **table([0])}
            part = one(exact("F32", **table([0])), [], shape=[0], mask_map=mask)
            part.entry |= {"name": "huge", "shape": [positions], "segment": 65536, "chunk": 256}
            chunks = -(-positions // (1 << 24))
            part.chunks = [bytearray(64)] * chunks
            part.entry["chunks"] = struct.pack("<II", 64, zlib.crc32(bytes(64))) * chunks
            file.parts.append(part)

        words = f"a tensor of {count} bytes, all pruned, in chunks of 64 bytes"
        _limit(suite, f"bytes-{power}", words, swollen, tensor="huge")
    for name in ("raw", "runs", "uniform"):
        for shape in ([2**40], [2**24, 2**24], [1, 2**33]):

            def claimed(file: Forge, name: str = name, shape: list[int] = shape) -> None:
                file.part(name).entry["shape"] = shape

            words = f"`{name}` claims the shape {shape} with the chunks of a small tensor"
            slug = f"TEN-008-{name}-claims-{'-by-'.join(map(str, shape))}"
            suite.invalid(slug, words, ONE[name], claimed, tensor=name, tags=["hostile"])
