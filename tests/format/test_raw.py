"""SPEC.md chapter 16: raw coding."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sfp_conformance.forge import Forge

import sfpformat
from conformance.recipes.samples import everything
from sfpformat import Options
from sfpformat.dtypes import DTYPES
from sfpformat.numpy import load, save

from ..support.clauses import clauses
from ..support.forge import accepted, refused


@clauses("R-RAW-001", "R-RAW-002", "R-RAW-003", "R-RAW-004", "R-CNV-001")
@given(st.sampled_from(sorted(DTYPES)), st.integers(0, 200), st.randoms(use_true_random=False))
def test_the_bytes_of_elements_are_unchanged_in_their_chunks(dtype: str, count: int, random: Random) -> None:
    size = DTYPES[dtype].itemsize
    raw = random.randbytes(count * size)
    if dtype == "BOOL":
        raw = bytes(byte & 1 for byte in raw)
    array = np.frombuffer(raw, DTYPES[dtype].numpy)
    data = save({"a": array}, options=Options(coding="raw", segment=32, chunk=64))
    part = Forge.of(data).part("a")
    for k, chunk in enumerate(part.chunks):
        own = raw[k * 64 * size : (k + 1) * 64 * size]
        assert chunk == own + bytes(-len(own) % 64)
    found = accepted(data)["a"]
    assert found.tobytes() == raw
    assert found.dtype == array.dtype


@clauses("R-CNV-001", "R-RAW-001")
@pytest.mark.parametrize("code", [">f4", ">f8", ">i2", ">u8", ">c8", ">c16", ">f2"])
def test_big_endian_arrays_are_written_little_endian(code: str) -> None:
    array = np.arange(5).astype(code)
    found = load(save({"a": array}))["a"]
    assert found.dtype.newbyteorder(">") == array.dtype
    assert np.array_equal(found, array)


@clauses("R-RAW-001")
def test_a_complex_number_is_its_real_part_and_its_imaginary_part() -> None:
    data = save({"a": np.array([1 + 2j], np.complex64)})
    assert Forge.of(data).part("a").chunks[0][:8] == np.array([1, 2], "<f4").tobytes()


@clauses("R-RAW-002")
@pytest.mark.parametrize(("name", "change"), [("raw", 64), ("flags", 64), ("flags", 2**20), ("scalar", 64)])
def test_a_raw_chunk_of_another_length_is_refused(name: str, change: int) -> None:
    def edit(file: Forge) -> None:
        file.part(name).chunks[0] += bytes(change)

    refused("R-RAW-002", edit, everything(), tensor=name)


@clauses("R-RAW-002")
def test_a_raw_chunk_that_is_too_short_is_refused() -> None:
    data = save({"a": np.ones(100, np.float64)}, options=Options(coding="raw"))

    def edit(file: Forge) -> None:
        del file.part("a").chunks[0][-64:]

    refused("R-RAW-002", edit, data, tensor="a")


@clauses("R-RAW-003")
@pytest.mark.parametrize("place", [9, 10, 63])
def test_a_byte_that_is_not_zero_after_the_last_element_is_refused(place: int) -> None:
    def edit(file: Forge) -> None:
        file.part("flags").chunks[0][place] = 1

    error = refused("R-RAW-003", edit, everything(), tensor="flags")
    assert error.offset == Forge.of(everything()).start_of("flags") + place


@clauses("R-RAW-004")
@pytest.mark.parametrize("value", [2, 3, 128, 255])
def test_a_bool_that_is_neither_0_nor_1_is_refused(value: int) -> None:
    def edit(file: Forge) -> None:
        file.part("flags").chunks[0][4] = value

    error = refused("R-RAW-004", edit, everything(), tensor="flags")
    assert error.offset == Forge.of(everything()).start_of("flags") + 4


@clauses("R-RAW-004")
def test_the_writer_writes_1_for_every_true_bool() -> None:
    array = np.frombuffer(b"\0\1\2\xff", np.bool_)
    assert accepted(save({"a": array}))["a"].tobytes() == b"\0\1\1\1"


@clauses("R-RAW-001")
def test_returned_arrays_are_writable_and_not_shared() -> None:
    data = bytearray(everything())
    with sfpformat.open(data) as file:
        first = file.get_tensor("raw")
        first[:] = 0
        assert file.get_tensor("raw").any()
