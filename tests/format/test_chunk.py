"""SPEC.md chapter 15: parts of a chunk, segment index, vector chunk."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge

import sfpformat
from conformance.recipes.samples import everything, plain, weights
from sfpformat.numpy import save

from ..support.clauses import clauses
from ..support.forge import accepted, fault_of, refused, refused_bytes


def header_at(name: str, quantity: str) -> int:
    """The offset of a quantity's header in a chunk."""
    entry = Forge.of(everything()).part(name).full_entry()
    return 8 * slow_reader.quantities(entry).index(quantity)


def chunk_of(name: str) -> slow_reader.Chunk:
    """The first chunk of a tensor of `everything`."""
    part = Forge.of(everything()).part(name)
    return slow_reader.open_chunk(bytes(part.chunks[0]), part.full_entry(), 0)


@clauses("R-CHK-001", "R-CHK-003", "R-IDX-001", "R-IDX-003")
@pytest.mark.parametrize("name", ["runs", "octets", "uniform", "table", "group", "coded"])
def test_chunks_of_the_writer_equal_their_parts_laid_out_as_in_the_document(name: str) -> None:
    part = Forge.of(everything()).part(name)
    for k, chunk in enumerate(part.chunks):
        assert part.take(k).together() == chunk


@clauses("R-CHK-001", "R-LAY-002")
@pytest.mark.parametrize("more", [64, 128, 2**16])
def test_a_chunk_longer_than_its_parts_is_refused(more: int) -> None:
    def edit(file: Forge) -> None:
        file.part("coded").chunks[1] += bytes(more)

    refused("R-CHK-001", edit, everything(), tensor="coded")


@clauses("R-IDX-003")
def test_a_chunk_shorter_than_its_parts_is_refused() -> None:
    def edit(file: Forge) -> None:
        del file.part("coded").chunks[0][-64:]

    refused("R-IDX-003", edit, everything(), tensor="coded")


@clauses("R-IDX-003")
def test_a_chunk_too_short_for_its_header_is_refused() -> None:
    # Ten quantities take 80 bytes.
    def edit(file: Forge) -> None:
        part = file.part("coded")
        assert len(part.take().quantities) >= 8
        del part.chunks[0][64:]

    refused("R-IDX-003", edit, everything(), tensor="coded")


@clauses("R-CHK-002")
@pytest.mark.parametrize("byte", [5, 6, 7])
def test_a_reserved_byte_of_a_header_is_refused(byte: int) -> None:
    at = header_at("coded", "fingerprints prefix") + byte

    def edit(file: Forge) -> None:
        file.part("coded").chunks[0][at] = 0x80

    refused("R-CHK-002", edit, everything(), tensor="coded")


@clauses("R-CHK-003")
@pytest.mark.parametrize(
    "where", ["after the header", "after a quantity", "last byte", "first byte of the tail"]
)
def test_a_byte_that_is_not_zero_between_the_parts_is_refused(where: str) -> None:
    name = "group" if where == "after the header" else "coded"
    chunk = chunk_of(name)
    count = len(chunk.minimum)
    end = 8 * count
    if where != "after the header":
        end = slow_reader.align(end, 16) + 1  # the first quantity's two fields take one byte
    if where in ("last byte", "first byte of the tail"):
        start, bits = list(chunk.planes.values())[-1]
        end = slow_reader.align((start + sum(bits) + 7) // 8, 16)

    def edit(file: Forge) -> None:
        data = file.part(name).chunks[0]
        at = -1 if where == "last byte" else end
        assert data[at] == 0
        data[at] = 1

    if where == "after the header":
        assert count % 2 == 1
    refused("R-CHK-003", edit, everything(), tensor=name)


@clauses("R-IDX-001")
@pytest.mark.parametrize("width", [33, 64, 255])
def test_index_fields_of_more_than_32_bits_are_refused(width: int) -> None:
    def edit(file: Forge) -> None:
        part = file.part("coded")
        taken = part.take()
        taken.headers["fingerprints prefix"] = (0, width)
        part.put(taken)

    refused("R-IDX-001", edit, everything(), tensor="coded")


@clauses("R-IDX-001", "R-CAN-003")
@pytest.mark.parametrize("width", [6, 31, 32])
def test_index_fields_of_up_to_32_bits_are_accepted(width: int) -> None:
    file = Forge.of(everything())
    part = file.part("coded")
    taken = part.take()
    taken.headers["fingerprints prefix"] = (0, width)
    part.put(taken)
    accepted(file.build())


@clauses("R-IDX-002")
@pytest.mark.parametrize("segment", [0, 1])
@pytest.mark.parametrize("more", [1, 2**31])
def test_more_survivors_than_positions_are_refused(segment: int, more: int) -> None:
    def edit(file: Forge) -> None:
        part = file.part("plain")
        taken = part.take()
        taken.quantities["survivors"][segment] = [32, 8][segment] + more
        part.put(taken)

    refused("R-IDX-002", edit, plain(), tensor="plain")


@clauses("R-IDX-005")
@pytest.mark.parametrize("stream", ["mask", "fingerprints"])
@pytest.mark.parametrize("number", [2, 3, 2**32 - 1])
def test_a_code_number_beyond_the_codes_is_refused(stream: str, number: int) -> None:
    def edit(file: Forge) -> None:
        part = file.part("coded")
        taken = part.take()
        taken.quantities[f"{stream} code"][1] = number
        part.put(taken)

    refused("R-IDX-005", edit, everything(), tensor="coded")


@clauses("R-IDX-003")
@pytest.mark.parametrize(
    ("name", "quantity"),
    [
        ("coded", "mask prefix"),
        ("coded", "mask residual"),
        ("coded", "fingerprints prefix"),
        ("coded", "fingerprints residual"),
        ("coded", "importance prefix"),
    ],
)
@pytest.mark.parametrize("bits", [2**12, 2**32 - 1, 2**33 - 2])
def test_planes_that_do_not_fit_into_the_chunk_are_refused_before_memory_is_allocated(
    name: str, quantity: str, bits: int
) -> None:
    def edit(file: Forge) -> None:
        part = file.part(name)
        taken = part.take()
        taken.quantities[quantity] = [bits, bits]
        taken.headers[quantity] = (min(bits, 2**32 - 1), 32)
        part.put(taken)

    refused("R-IDX-003", edit, everything(), tensor=name)
    file = Forge.of(everything())
    edit(file)
    data = file.build()
    tracemalloc.start()
    fault_of(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@clauses("R-IDX-003")
def test_an_index_that_does_not_fit_into_the_chunk_is_refused() -> None:
    # 2^19 segments of 32 positions with fields of 32 bits would take 2 MiB.
    data = save(
        {"a": weights(2**14)}, options=sfpformat.Options(coding="fingerprint", segment=32, chunk=2**14)
    )

    def edit(file: Forge) -> None:
        chunk = file.part("a").chunks[0]
        struct.pack_into("<IB", chunk, 0, 0, 32)
        del chunk[1024:]

    refused("R-IDX-003", edit, data, tensor="a")


@clauses("R-IDX-004")
@pytest.mark.parametrize("bit", [2, 7])
def test_a_bit_after_the_last_field_of_a_quantity_is_refused(bit: int) -> None:
    chunk = chunk_of("coded")
    width = chunk.width["survivors"] * len(chunk.sizes)
    assert width < 8
    at = slow_reader.align(8 * len(chunk.minimum), 16)

    def edit(file: Forge) -> None:
        file.part("coded").chunks[0][at] |= 1 << max(bit, width)

    refused("R-IDX-004", edit, everything(), tensor="coded")


@clauses("R-IDX-004")
def test_with_width_0_the_number_of_survivors_is_the_minimum() -> None:
    taken = Forge.of(everything()).part("coded").take(1)
    assert len(taken.quantities["survivors"]) == 1
    part = Forge.of(everything()).part("coded")
    minimum, width = struct.unpack_from("<IB", part.chunks[1], 0)
    assert (minimum, width) == (taken.quantities["survivors"][0], 0)


# -------------------------------------------------------------------------------------------- vector chunk


@clauses("R-VEC-001")
@pytest.mark.parametrize("name", ["uniform", "table", "group", "coded"])
@pytest.mark.parametrize("change", [-64, 64])
def test_a_vector_chunk_of_another_length_is_refused(name: str, change: int) -> None:
    def edit(file: Forge) -> None:
        part = file.part(name)
        assert part.vectors is not None
        if change > 0:
            part.vectors += bytes(change)
        elif len(part.vectors) > 64:
            del part.vectors[change:]
        else:
            part.entry["scale"] = {"per": "group", "size": 1, "dtype": "F32"}

    refused("R-VEC-001", edit, everything(), tensor=name)


@clauses("R-VEC-002")
@pytest.mark.parametrize("place", ["between", "last"])
def test_a_byte_that_is_not_zero_after_a_vector_is_refused(place: str) -> None:
    def edit(file: Forge) -> None:
        vectors = file.part("coded").vectors
        assert vectors is not None
        # One scale factor of 4 bytes, then from byte 16 three centroids.
        at = 15 if place == "between" else len(vectors) - 1
        assert vectors[at] == 0
        vectors[at] = 0x40

    error = refused("R-VEC-002", edit, everything(), tensor="coded")
    assert error.offset is not None
    assert (error.offset - Forge.of(everything()).start_of("coded")) in (15, 63)


@clauses("R-VEC-001", "R-VEC-002")
def test_vectors_lie_in_the_order_of_the_table() -> None:
    part = Forge.of(everything()).part("table")
    names = [name for name, _, _ in slow_reader.vectors(part.entry)]
    assert names == ["fingerprint centroids", "scale", "rows", "columns"]
    found = slow_reader.read_vectors(part.full_entry(), bytes(part.vectors or b""))
    assert [len(found[name]) for name in names] == [5, 24, 4, 24]


@clauses("R-VEC-001")
def test_a_fault_in_the_vectors_is_reported_for_every_request_of_the_tensor() -> None:
    file = Forge.of(everything())
    part = file.part("coded")
    assert part.vectors is not None
    part.vectors += bytes(64)
    data = file.build()
    refused_bytes(data, "R-VEC-001", tensor="coded")
    for ask in ("get_tensor", "get_mask", "get_importance", "get_survivors"):
        with sfpformat.open(data) as opened, pytest.raises(sfpformat.InvalidFileError, match="R-VEC-001"):
            getattr(opened, ask)("coded")
