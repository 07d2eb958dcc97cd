"""Chapter 15: chunks and their index."""

from __future__ import annotations

import struct

from sfp_conformance.forge import Forge, Taken

from .edits import bit_flip, of_chunk, opened, put_bytes
from .gallery import ONE
from .suite import Suite

EXAMPLE = "y-CNV-001-worked-example"
NAMES = ("runs", "octets", "uniform", "coded", "group")


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    for name in NAMES:
        _lengths(suite, name)
        _header(suite, name)
        _padding(suite, name)
    _values(suite)
    _widths(suite)


def _lengths(suite: Suite, name: str) -> None:
    for more in (64, 128, 4096):

        def longer(file: Forge, more: int = more) -> None:
            file.part(name).chunks[0] += bytes(more)

        words = f"a chunk with {more} zero bytes more than its parts need"
        suite.invalid(f"CHK-001-{name}-{more}", words, ONE[name], longer, tensor=name)

    def shorter(file: Forge) -> None:
        del file.part(name).chunks[0][-64:]

    words = "a chunk that lacks its last 64 bytes"
    suite.invalid(f"IDX-003-{name}-shorter", words, ONE[name], shorter, tensor=name)

    def stub(file: Forge) -> None:
        del file.part(name).chunks[0][64:]

    words = "a chunk of 64 bytes, in which header and index have no room"
    suite.invalid(f"IDX-003-{name}-64-bytes", words, ONE[name], stub, tensor=name)


def _header(suite: Suite, name: str) -> None:
    values = opened(suite.cases[ONE[name]].data, name).values
    for i, quantity in enumerate(values):
        for byte in (5, 6, 7):
            words = f"byte {byte} of the header of {quantity} is not zero"
            case = f"CHK-002-{name}-{quantity}-byte-{byte}"
            suite.invalid(case, words, ONE[name], bit_flip(name, 64 * i + 8 * byte + byte), tensor=name)
        for width in (33, 64, 255):
            words = f"{quantity} in {width} bits"
            case = f"IDX-001-{name}-{quantity}-{width}"
            suite.invalid(case, words, ONE[name], put_bytes(name, 8 * i + 4, bytes([width])), tensor=name)
        if quantity.endswith(("prefix", "residual")):
            for minimum in (2**20, 2**32 - 1):
                raw = struct.pack("<I", minimum)
                words = f"{quantity} bits of at least {minimum}"
                case = f"IDX-003-{name}-{quantity}-{minimum}"
                tags = ["hostile"] if minimum > 2**20 else []
                suite.invalid(case, words, ONE[name], put_bytes(name, 8 * i, raw), tensor=name, tags=tags)


def _padding(suite: Suite, name: str) -> None:
    data = suite.cases[ONE[name]].data
    chunk, length = opened(data, name), len(Forge.of(data).part(name).chunks[0])
    names = list(chunk.values)
    if len(names) % 2:
        for byte in (0, 7):
            words = f"byte {byte} after the header is not zero"
            case = f"CHK-003-{name}-header-{byte}"
            suite.invalid(case, words, ONE[name], bit_flip(name, 64 * len(names) + 8 * byte), tensor=name)
    pos = -(-8 * len(names) // 16) * 16
    for quantity in names:
        if not chunk.width[quantity]:
            continue
        bits = len(chunk.sizes) * chunk.width[quantity]
        end = pos + -(-bits // 8)
        if bits % 8:
            words = f"the bit after the last field of {quantity} is set"
            suite.invalid(
                f"IDX-004-{name}-{quantity}", words, ONE[name], bit_flip(name, 8 * pos + bits), tensor=name
            )
        words = f"a byte after the fields of {quantity} is not zero"
        for slug, byte in (("first", end), ("last", pos + 15)):
            suite.invalid(
                f"CHK-003-{name}-{quantity}-{slug}", words, ONE[name], bit_flip(name, 8 * byte), tensor=name
            )
        pos = -(-end // 16) * 16
    for slug, byte in (("first", length - 16), ("last", length - 1)):
        words = "a byte of the chunk's tail is not zero"
        suite.invalid(f"CHK-003-{name}-tail-{slug}", words, ONE[name], bit_flip(name, 8 * byte), tensor=name)


def _values(suite: Suite) -> None:
    for name in NAMES:
        for k in range(len(Forge.of(suite.cases[ONE[name]].data).part(name).chunks)):
            sizes = opened(suite.cases[ONE[name]].data, name, k).sizes
            for i in {0, len(sizes) - 1}:
                for more in (1, 1000, 2**31):

                    def survivors(taken: Taken, i: int = i, value: int = sizes[i] + more) -> None:
                        taken.quantities["survivors"][i] = value

                    words = f"{sizes[i] + more} survivors among {sizes[i]} positions"
                    case = f"IDX-002-{name}-chunk-{k}-segment-{i}-{more}"
                    suite.invalid(case, words, ONE[name], of_chunk(name, survivors, k), tensor=name)
    for stream in ("mask", "fingerprints"):
        for number in (2, 3, 255, 2**32 - 1):

            def code(taken: Taken, stream: str = stream, number: int = number) -> None:
                taken.quantities[f"{stream} code"][0] = number

            words = f"a segment in code {number} of two, in {stream}"
            case = f"IDX-005-{stream}-{number}"
            suite.invalid(case, words, ONE["coded"], of_chunk("coded", code), tensor="coded")
    for trim in (16, 17, 2**32 - 1):

        def trims(taken: Taken, trim: int = trim) -> None:
            taken.quantities["fingerprints trim"][0] = trim

        words = f"a trim of {trim} where residuals have 16 bits"
        base = "y-PLN-001-trim-8"
        suite.invalid(f"IDX-006-{trim}", words, base, of_chunk("one", trims), tensor="one")
    for trim in (8, 9):

        def least(taken: Taken, trim: int = trim) -> None:
            taken.quantities["fingerprints trim"][1] = trim

        words = f"a trim of {trim} where the narrowest class has 8 bits"
        base = "y-PLN-001-trims-of-classes-that-differ"
        suite.invalid(f"IDX-006-least-class-{trim}", words, base, of_chunk("one", least), tensor="one")


def _widths(suite: Suite) -> None:
    base = suite.cases[EXAMPLE].data
    for quantity in opened(base, "w").values:
        file = Forge.of(base)
        taken = file.part("w").take()
        own = taken.quantities[quantity]
        least = (max(own) - min(own)).bit_length()
        for width in (least + 1, 31, 32):
            taken.headers[quantity] = (min(own), width)
            file.part("w").put(taken)
            words = f"{quantity} in {width} bits, more than necessary"
            case = f"IDX-001-{quantity}-{width}-bits"
            suite.valid(case, words, file.build(), "R-CAN-003", canonical=("R-CAN-003",))
        minimum = next(m for m in range(min(own)) if (max(own) - m).bit_length() == max(own).bit_length())
        taken.headers[quantity] = (minimum, max(own).bit_length())
        file.part("w").put(taken)
        words = f"{quantity}: a minimum of {minimum} where {min(own)} is the least"
        suite.valid(f"CAN-002-{quantity}", words, file.build(), "R-CAN-001", canonical=("R-CAN-002",))
