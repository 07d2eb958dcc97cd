"""SPEC.md chapter 5: the places of the chunks."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge, record

import sfpformat
from conformance.recipes.samples import coded, everything
from sfpformat.errors import FileFault

from ..support.clauses import clauses
from ..support.forge import accepted, refused


@clauses("R-LAY-001")
def test_chunks_are_one_after_another_in_the_order_of_the_directory_with_vectors_first() -> None:
    data, pos = everything(), 64
    root, at = slow_reader.read_directory(data)
    with sfpformat.open(data) as file:
        for entry in root["tensors"]:
            ours = file.entry(entry["name"])
            own = entry.get("vectors", b"") + entry["chunks"]
            for k, (length, crc) in enumerate(struct.iter_unpack("<II", own), -("vectors" in entry)):
                assert file.chunk_offset(ours, k) == pos
                assert zlib.crc32(data[pos : pos + length]) == crc
                pos += length
    assert pos == at


@clauses("R-LAY-001")
def test_tensors_are_found_in_any_order_of_the_directory() -> None:
    file = Forge.of(everything())
    expected = accepted(file.build())
    file.parts.reverse()
    found = accepted(file.build())
    assert list(found) == list(reversed(expected))
    assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())


@clauses("R-LAY-002")
@pytest.mark.parametrize("key", ["chunks", "vectors"])
@pytest.mark.parametrize("length", [0, 1, 63, 65, 96, 2**32 - 1])
def test_a_chunk_length_that_is_no_multiple_of_64_or_0_is_refused(key: str, length: int) -> None:
    def edit(file: Forge) -> None:
        part = file.part("uniform")
        whole = bytearray(part.full_entry()[key])
        whole[:4] = length.to_bytes(4, "little")
        part.entry[key] = bytes(whole)

    refused("R-LAY-002", edit, everything(), tensor="uniform")


@clauses("R-LAY-003")
@pytest.mark.parametrize("change", [-64, 64, 2**32 - 4096])
def test_chunks_that_do_not_end_where_the_directory_begins_are_refused(change: int) -> None:
    def edit(file: Forge) -> None:
        part = file.part("coded")
        last = part.chunks[-1]
        kept = b"".join(map(record, part.chunks[:-1]))
        part.entry["chunks"] = kept + struct.pack("<II", len(last) + change, zlib.crc32(last))

    refused("R-LAY-003", edit, everything())


@clauses("R-LAY-003")
def test_a_hole_between_the_last_chunk_and_the_directory_is_refused() -> None:
    def edit(file: Forge) -> None:
        part = file.part("coded")
        part.entry["chunks"] = part.full_entry()["chunks"]
        part.chunks.append(bytearray(64))

    refused("R-LAY-003", edit, everything())


@clauses("R-LAY-003")
def test_two_tensors_cannot_share_a_chunk() -> None:
    def edit(file: Forge) -> None:
        twin = coded("twin")
        twin.entry |= {"chunks": twin.full_entry()["chunks"], "vectors": twin.full_entry()["vectors"]}
        twin.chunks, twin.vectors = [], None
        file.parts.append(twin)

    refused("R-LAY-003", edit, everything())


@clauses("R-LAY-004")
@pytest.mark.parametrize("place", ["first", "last", "vectors"])
def test_a_chunk_whose_checksum_does_not_match_is_refused_even_if_only_padding_differs(place: str) -> None:
    def edit(file: Forge) -> None:
        part = file.part("coded")
        entry = part.full_entry()
        part.entry |= {"chunks": entry["chunks"], "vectors": entry["vectors"]}
        assert part.vectors is not None
        chunk = part.vectors if place == "vectors" else part.chunks[-1]
        chunk[0 if place == "first" else -1] ^= 1

    refused("R-LAY-004", edit, everything(), tensor="coded")


@clauses("R-LAY-004")
def test_a_damaged_chunk_hides_no_other_tensor_and_no_slice_of_another_chunk() -> None:
    file = Forge.of(everything())
    part = file.part("runs")
    good = accepted(everything())
    part.entry["chunks"] = part.full_entry()["chunks"]
    part.chunks[1][0] ^= 1
    with sfpformat.open(file.build()) as opened:
        for name in opened:
            if name != "runs":
                assert opened.get_tensor(name).tobytes() == good[name].tobytes()
        # The first chunk has the positions 0 to 63.
        assert opened.get_slice("runs")[:2].tobytes() == good["runs"][:2].tobytes()
        with pytest.raises(FileFault, match="R-LAY-004"):
            opened.get_slice("runs")[2:3]


class _Watched(io.BytesIO):
    """A binary object that raises on a read outside of it."""

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        assert self.tell() >= 0
        assert self.tell() + size <= len(self.getbuffer())
        return super().read(size)


@clauses("R-LAY-005")
@pytest.mark.parametrize("length", [128, 4096, 2**32 - 64])
def test_no_length_causes_a_read_outside_the_file(length: int) -> None:
    file = Forge.of(everything())
    with sfpformat.open(_Watched(everything())) as opened:
        for name in opened:
            opened.get_tensor(name)
    part = file.part("coded")
    part.entry["vectors"] = struct.pack("<II", length, 0)
    with pytest.raises(FileFault):
        sfpformat.open(_Watched(file.build()))


@clauses("R-LAY-001", "R-LAY-002")
def test_an_empty_tensor_stores_no_bytes() -> None:
    with sfpformat.open(everything()) as file:
        assert file.info("empty").stored_bytes == 0
        assert file.get_tensor("empty").shape == (0, 3)
        assert file.get_tensor("empty").dtype == np.float32
