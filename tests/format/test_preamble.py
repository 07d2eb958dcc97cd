"""SPEC.md chapters 1 and 4: conventions and preamble."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from sfp_conformance.forge import Forge, bits_to_bytes

import sfpformat
from conformance.recipes.samples import everything, plain
from sfpformat.container.preamble import Preamble
from sfpformat.errors import CODE_OF_CLAUSE
from sfpformat.numpy import save

from ..support.clauses import clauses
from ..support.forge import accepted, refused, refused_bytes


@clauses("R-CNV-001", "R-PRE-001", "R-PRE-005")
def test_the_preamble_of_a_written_file_has_its_fields_at_the_offsets_of_the_table() -> None:
    data = save({"a": np.arange(3, dtype=np.uint8)})
    assert data[:8] == bytes.fromhex("89 53 46 50 0D 0A 1A 0A")
    assert data[8:16] == b"\1\0\0\0" + bytes(4)
    assert data[16:24] == (128).to_bytes(8, "little")
    assert data[24:32] == (len(data) - 128).to_bytes(8, "little")
    assert data[32:40] == len(data).to_bytes(8, "little")
    assert data[40:44] == zlib.crc32(data[128:]).to_bytes(4, "little")
    assert data[44:60] == bytes(16)
    assert data[60:64] == zlib.crc32(data[:60]).to_bytes(4, "little")


@clauses("R-CNV-002", "R-CNV-003")
def test_bits_fill_bytes_from_the_least_significant_up() -> None:
    # Two fields of 8 bits fill a byte each; a raw bitmap and 16-bit residuals are such fields.
    chunk = Forge.of(plain()).part("plain").take()
    assert bits_to_bytes(chunk.planes["mask residual"][0]) == b"\x55" * 4
    residuals = bits_to_bytes(chunk.planes["fingerprints residual"][0])
    assert struct.unpack("<16H", residuals) == tuple(2 * p + 0x7E00 for p in range(16))
    assert residuals in plain()


@clauses("R-CNV-004")
def test_the_checksum_is_the_one_with_the_check_value() -> None:
    register = 0xFFFFFFFF
    for byte in b"123456789":
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0xEDB88320 if register & 1 else 0)
    assert register ^ 0xFFFFFFFF == 0xCBF43926 == zlib.crc32(b"123456789")


@clauses("R-CNV-005")
def test_each_kind_of_padding_has_a_clause_of_its_own() -> None:
    reserved = {clause for clause, code in CODE_OF_CLAUSE.items() if code == "E_RESERVED"}
    assert reserved >= {"R-PRE-006", "R-PLN-004", "R-CHK-002", "R-CHK-003", "R-VEC-002", "R-RAW-003"}


@clauses("R-PRE-001")
@pytest.mark.parametrize("place", range(8))
def test_a_file_with_another_magic_is_refused(place: int) -> None:
    magic = bytearray(b"\x89SFP\r\n\x1a\n")
    magic[place] ^= 0x20

    def edit(file: Forge) -> None:
        file.preamble["magic"] = bytes(magic)

    assert refused("R-PRE-001", edit, plain()).offset == 0


@clauses("R-PRE-001", "R-PRE-002")
def test_a_short_file_is_truncated_if_it_begins_with_the_magic_and_has_a_wrong_magic_otherwise() -> None:
    for length in range(64):
        error = refused_bytes(plain()[:length], "R-PRE-002")
        assert error.offset == length
        if length:
            refused_bytes(b"x" + plain()[1:length], "R-PRE-001")


@clauses("R-PRE-003")
@pytest.mark.parametrize("field", ["major", "directory_offset", "file_length", "directory_crc", "crc"])
def test_a_preamble_whose_checksum_does_not_match_is_refused_before_its_fields_are_used(field: str) -> None:
    crc = struct.unpack_from("<I", plain(), 60)[0]

    def edit(file: Forge) -> None:
        file.preamble = {"crc": crc, field: 1 if field != "major" else 2}

    assert refused("R-PRE-003", edit, plain()).offset == 60


@clauses("R-PRE-004")
@pytest.mark.parametrize("major", [0, 2, 256, 65535])
def test_another_major_version_is_refused(major: int) -> None:
    def edit(file: Forge) -> None:
        file.preamble["major"] = major

    assert refused("R-PRE-004", edit, plain()).offset == 8


@clauses("R-PRE-005")
@pytest.mark.parametrize("minor", [1, 65535])
def test_a_greater_minor_version_is_accepted(minor: int) -> None:
    file = Forge.of(everything())
    file.preamble["minor"] = minor
    accepted(file.build())


@clauses("R-PRE-006")
@pytest.mark.parametrize(("field", "size", "offset"), [("reserved", 4, 12), ("more_reserved", 16, 44)])
def test_a_reserved_byte_that_is_not_zero_is_refused(field: str, size: int, offset: int) -> None:
    for place in range(size):

        def edit(file: Forge, place: int = place) -> None:
            file.preamble[field] = bytes(place) + b"\x80" + bytes(size - 1 - place)

        assert refused("R-PRE-006", edit, plain()).offset == offset


@clauses("R-PRE-007")
def test_a_file_shorter_than_its_file_length_is_refused_wherever_it_ends() -> None:
    for length in range(64, len(plain())):
        assert refused_bytes(plain()[:length], "R-PRE-007").offset == length


@clauses("R-PRE-007", "R-LIM-003")
def test_a_file_length_of_all_ones_is_refused_at_once() -> None:
    def edit(file: Forge) -> None:
        file.preamble |= {"file_length": 2**64 - 1, "directory_length": 2**64 - 65, "directory_offset": 64}

    refused("R-PRE-007", edit, plain())


@clauses("R-PRE-008")
@pytest.mark.parametrize("tail", [b"\0", b"PK\3\4", bytes(64)])
def test_bytes_after_the_end_are_refused(tail: bytes) -> None:
    def edit(file: Forge) -> None:
        file.tail = tail

    assert refused("R-PRE-008", edit, plain()).offset == len(plain())


@clauses("R-PRE-009")
@pytest.mark.parametrize("change", [-64, -1, 1, 64])
def test_a_directory_that_does_not_end_where_the_file_ends_is_refused(change: int) -> None:
    def edit(file: Forge) -> None:
        file.preamble["directory_length"] = len(file.directory_bytes()) + change

    assert refused("R-PRE-009", edit, plain()).offset == 16


@clauses("R-PRE-009")
def test_an_offset_and_a_length_whose_sum_exceeds_64_bits_are_refused() -> None:
    def edit(file: Forge) -> None:
        file.preamble |= {"directory_offset": 2**64 - 64, "directory_length": len(plain()) + 64}

    refused("R-PRE-009", edit, plain())


@clauses("R-PRE-010")
def test_a_directory_whose_checksum_does_not_match_is_refused_before_it_is_read() -> None:
    at = struct.unpack_from("<Q", plain(), 16)[0]
    data = plain()[:at] + b"\xc1" + plain()[at + 1 :]
    assert refused_bytes(data, "R-PRE-010").offset == at


@clauses("R-PRE-011")
@pytest.mark.parametrize("offset", [0, 1, 32, 63, 65, 96])
def test_a_directory_offset_that_is_no_multiple_of_64_or_under_64_is_refused(offset: int) -> None:
    def edit(file: Forge) -> None:
        file.preamble |= {"directory_offset": offset, "directory_length": len(plain()) - offset}

    assert refused("R-PRE-011", edit, plain()).offset == 16


@clauses("R-PRE-002", "R-PRE-007", "R-PRE-008", "R-PRE-009", "R-PRE-010", "R-PRE-011")
def test_every_field_of_a_written_preamble_is_read_back() -> None:
    stream = io.BytesIO()
    with sfpformat.Writer(stream, metadata={"k": "v"}) as writer:
        writer.add("a", np.ones((3, 5), np.float32))
    data = stream.getvalue()
    preamble = Preamble.from_bytes(data[:64], len(data))
    assert preamble.to_bytes() == data[:64]
    assert preamble.directory_offset % 64 == 0
    assert preamble.directory_offset + preamble.directory_length == preamble.file_length == len(data)
    assert zlib.crc32(data[preamble.directory_offset :]) == preamble.directory_crc


@clauses("R-PRE-002")
def test_a_file_without_tensors_is_accepted() -> None:
    data = save({})
    assert len(data) > 64
    assert accepted(data) == {}
