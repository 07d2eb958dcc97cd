"""Safetensors files: compatible with the reference implementation, and safe against hostile files."""

from __future__ import annotations

import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from sfpformat.dtypes import DTYPES, Dtype, of_numpy
from sfpformat.errors import MissingTensorError, SfpError, SfpWarning
from sfpformat.io.atomic import replacing
from sfpformat.io.safetensors import (
    SafetensorsError,
    SafetensorsFile,
    TensorSpec,
    header_bytes,
    in_aligned_order,
    parse_header,
    strict_json,
    write_tensors,
)

Arrays = dict[str, np.ndarray[Any, Any]]


def registered(dtype: np.dtype[Any]) -> Dtype:
    """Returns the registered dtype of a numpy dtype that has one."""
    found = of_numpy(dtype)
    assert found is not None
    return found


def write(path: Path, tensors: Arrays, metadata: dict[str, str] | None = None) -> None:
    """Writes arrays with our writer."""
    specs = in_aligned_order([TensorSpec(n, registered(a.dtype), a.shape) for n, a in tensors.items()])
    with replacing(path) as file:
        write_tensors(file, specs, metadata or {}, iter([tensors[spec.name] for spec in specs]))


def read(path: Path) -> Arrays:
    """Reads all arrays with our reader."""
    with SafetensorsFile(path) as file:
        return {name: file.read(name) for name in file.header.tensors}


def assert_same(a: Arrays, b: Arrays) -> None:
    """Names, dtypes, shapes and bits."""
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


SAMPLE: Arrays = {
    "bytes": np.arange(7, dtype=np.uint8),
    "f32": np.arange(12, dtype=np.float32).reshape(3, 4),
    "f64": np.array([np.nan, -0.0, np.inf]),
    "f16": np.ones((2, 1), np.float16),
    "bool": np.array([True, False, True]),
    "empty": np.zeros((0, 5), np.float32),
    "scalar": np.array(-3, np.int64),
    "größe": np.ones(1, np.int16),
}


def test_the_reference_implementation_reads_our_files(tmp_path: Path) -> None:
    write(tmp_path / "m", SAMPLE, {"format": "np", "ö": '"\n'})
    assert_same(safetensors.numpy.load_file(tmp_path / "m"), SAMPLE)
    with safetensors.safe_open(tmp_path / "m", "np") as file:
        assert file.metadata() == {"format": "np", "ö": '"\n'}


def test_files_of_the_reference_implementation_are_read(tmp_path: Path) -> None:
    safetensors.numpy.save_file(SAMPLE, tmp_path / "m", {"format": "np"})
    assert_same(read(tmp_path / "m"), SAMPLE)
    with SafetensorsFile(tmp_path / "m") as file:
        assert file.header.metadata == {"format": "np"}


def test_reading_and_writing_restores_the_bytes(tmp_path: Path) -> None:
    safetensors.numpy.save_file(SAMPLE, tmp_path / "a", {"format": "np"})
    write(tmp_path / "b", read(tmp_path / "a"), {"format": "np"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "C128"])
def test_every_dtype_is_restored(tmp_path: Path, name: str) -> None:
    data = np.arange(6 * DTYPES[name].itemsize, dtype=np.uint8) % (2 if name == "BOOL" else 251)
    array = data.view(DTYPES[name].numpy).reshape(2, 3)
    write(tmp_path / "m", {"t": array})
    assert_same(read(tmp_path / "m"), {"t": array})


def test_c128_is_refused_by_the_writer() -> None:
    with pytest.raises(SafetensorsError, match="no dtype C128"):
        header_bytes([TensorSpec("t", DTYPES["C128"], (1,))], {})


def test_read_tensors_are_writable(tmp_path: Path) -> None:
    write(tmp_path / "m", {"t": np.ones(3, np.float32)})
    array = read(tmp_path / "m")["t"]
    array[0] = 2
    assert array[0] == 2


def test_tensors_are_aligned_to_their_element_size() -> None:
    widths = [DTYPES[name] for name in ("U8", "F64", "BF16", "F32", "I8")]
    specs = in_aligned_order([TensorSpec(d.name, d, (3,)) for d in widths])
    assert [spec.name for spec in specs] == ["F64", "F32", "BF16", "U8", "I8"]


_names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
_dtypes = st.sampled_from([np.float32, np.int8, np.uint16, ml_dtypes.bfloat16, np.float64])
_shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(st.dictionaries(_names, st.tuples(_dtypes, _shapes), max_size=5), st.dictionaries(_names, _names))
def test_headers_are_restored(tensors: dict[str, tuple[Any, Any]], metadata: dict[str, str]) -> None:
    specs = [
        TensorSpec(name, registered(np.dtype(dtype)), shape)
        for name, (dtype, shape) in tensors.items()
        if name != "__metadata__"
    ]
    data = header_bytes(specs, metadata)
    assert len(data) % 8 == 0
    assert struct.unpack_from("<Q", data)[0] == len(data) - 8
    header = parse_header(data[8:], sum(spec.nbytes for spec in specs))
    assert header.tensors == {spec.name: spec for spec in specs}
    assert header.metadata == metadata


# ------------------------------------------------------------------------------------------ hostile files


def entry(start: int, stop: int, dtype: object = "U8", shape: list[Any] | None = None) -> dict[str, Any]:
    """A header entry for a vector of bytes."""
    return {
        "dtype": dtype,
        "shape": [stop - start] if shape is None else shape,
        "data_offsets": [start, stop],
    }


ATTACKS: list[tuple[str, object, str]] = [
    ("overlap", {"a": entry(0, 4), "b": entry(2, 8)}, "overlaps"),
    ("same place", {"a": entry(0, 8), "b": entry(0, 8)}, "overlaps"),
    ("hole", {"a": entry(0, 2), "b": entry(4, 8)}, "gap"),
    ("hole at the start", {"a": entry(2, 8)}, "gap"),
    ("beyond the end", {"a": entry(0, 9)}, "cut off"),
    ("bytes left over", {"a": entry(0, 7)}, "bytes after"),
    ("backwards", {"a": {"dtype": "U8", "shape": [0], "data_offsets": [8, 0]}}, "cover -8 bytes"),
    ("negative", {"a": {"dtype": "U8", "shape": [8], "data_offsets": [-8, 0]}}, "data_offsets must be"),
    ("negative size", {"a": entry(0, 8, shape=[-8])}, "shape must be"),
    ("shape too small", {"a": entry(0, 8, shape=[7])}, "cover 8 bytes"),
    ("shape overflows", {"a": entry(0, 8, shape=[1 << 62, 1 << 62])}, "too large"),
    ("zero hides an overflow", {"a": entry(0, 0, shape=[0, 1 << 62, 1 << 62])}, "too large"),
    ("not whole", {"a": entry(0, 8, shape=[8.0])}, "shape must be"),
    ("a truth for a number", {"a": entry(0, 1, shape=[True])}, "shape must be"),
    ("three offsets", {"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8, 8]}}, "data_offsets must"),
    ("unknown dtype", {"a": entry(0, 8, "F99")}, "unknown"),
    ("dtype of ours only", {"a": entry(0, 8, "C128")}, "unknown"),
    ("half a byte left", {"a": entry(0, 8, "F4", [15])}, "F4 .15. does not fill whole bytes"),
    ("six bits left", {"a": entry(0, 8, "F6_E2M3", [9])}, "F6_E2M3 .9. does not fill whole bytes"),
    ("sixteen in seven", {"a": entry(0, 7, "F4", [16])}, "cover 7 bytes, but its shape and dtype take 8"),
    ("dtype is a number", {"a": entry(0, 8, dtype=7)}, "unknown"),
    ("no shape", {"a": {"dtype": "U8", "data_offsets": [0, 8]}}, "must give"),
    ("not a map", {"a": [0, 8]}, "must give"),
    ("a list", [], "not a JSON object"),
    ("metadata not strings", {"__metadata__": {"a": 1}, "a": entry(0, 8)}, "strings to strings"),
    ("metadata a list", {"__metadata__": [], "a": entry(0, 8)}, "strings to strings"),
]


@pytest.mark.parametrize(("fields", "words"), [case[1:] for case in ATTACKS], ids=[c[0] for c in ATTACKS])
def test_hostile_headers_are_refused(fields: object, words: str) -> None:
    with pytest.raises(SafetensorsError, match=words):
        parse_header(json.dumps(fields).encode(), 8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a":1,"a":2}', "'a' occurs twice"),
        (b'{"a":{"b":1,"b":1}}', "'b' occurs twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "Infinity"),
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"{}{}", "not valid JSON"),
        (b'{"\xff":1}', "not UTF-8"),
        (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deep"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "not a JSON object"),
    ],
)
def test_invalid_json_is_refused(text: bytes, words: str) -> None:
    with pytest.raises(SafetensorsError, match=words):
        strict_json(text, "the text")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "only 0 bytes"),
        (b"1234567", "only 7 bytes"),
        (struct.pack("<Q", 1 << 63) + b"{}", "more than 100 MB"),
        (struct.pack("<Q", 100_000_001) + b"{}", "more than 100 MB"),
        (struct.pack("<Q", 3) + b"{}", "cut off"),
        (struct.pack("<Q", 0), "not valid JSON"),
        (struct.pack("<Q", 2) + b"{}x", "bytes after"),
    ],
)
def test_files_with_wrong_lengths_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(SafetensorsError, match=words):
        SafetensorsFile(tmp_path / "m")


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m", {"a": np.arange(5, dtype=np.float32)})
    data = (tmp_path / "m").read_bytes()
    for length in range(len(data)):
        (tmp_path / "m").write_bytes(data[:length])
        with pytest.raises(SafetensorsError):
            SafetensorsFile(tmp_path / "m")


def test_a_file_without_tensors_is_read(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(struct.pack("<Q", 2) + b"{}")
    assert read(tmp_path / "m") == {}


def test_a_bool_byte_other_than_0_and_1_reads_as_true_with_a_warning(tmp_path: Path) -> None:
    write(tmp_path / "m", {"t": np.array([True, False, True, False])})
    data = bytearray((tmp_path / "m").read_bytes())
    data[-4:] = bytes([255, 0, 1, 2])
    (tmp_path / "m").write_bytes(data)
    words = "'t': 2 BOOL values are neither 0 nor 1; they are read as 1"
    with SafetensorsFile(tmp_path / "m") as file, pytest.warns(SfpWarning, match=words):
        found = file.read("t")
    assert found.view(np.uint8).tolist() == [1, 0, 1, 1]
    with safetensors.safe_open(tmp_path / "m", "pt") as theirs:
        assert theirs.get_tensor("t").bool().tolist() == found.tolist()


def test_null_metadata_are_read_as_none(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": None, "a": entry(0, 8)}).encode()
    assert parse_header(header, 8).metadata == {}
    (tmp_path / "m").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with safetensors.safe_open(tmp_path / "m", "np") as theirs:
        assert theirs.metadata() is None


@pytest.mark.parametrize(
    ("dtype", "shape", "as_bytes"),
    [
        ("F4", [3, 32], (3, 16)),
        ("F4", [32, 3], (48,)),
        ("F4", [2, 0, 7], (0,)),
        ("F4", [0, 4], (0, 2)),
        ("F6_E2M3", [2, 64], (2, 48)),
        ("F6_E3M2", [64, 2], (96,)),
    ],
)
def test_elements_smaller_than_a_byte_are_kept_as_bytes_and_restored(
    dtype: str, shape: list[int], as_bytes: tuple[int, ...], tmp_path: Path
) -> None:
    data = np.arange(np.prod(as_bytes), dtype=np.uint8)
    header = json.dumps({"t": entry(0, data.size, dtype, shape)}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + data.tobytes())
    with safetensors.safe_open(tmp_path / "a", "pt") as theirs:
        assert theirs.get_slice("t").get_dtype() == dtype
    with SafetensorsFile(tmp_path / "a") as file, replacing(tmp_path / "b") as new:
        spec = file.header.tensors["t"]
        assert (spec.dtype.name, spec.shape, spec.words) == ("U8", as_bytes, f"{dtype} {shape}")
        array = file.read("t")
        assert (array.shape, array.tobytes()) == (as_bytes, data.tobytes())
        write_tensors(new, [spec], {}, iter([array]))
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_long_names_are_shortened_in_messages() -> None:
    with pytest.raises(SafetensorsError) as caught:
        parse_header(json.dumps({"layer." * 10_000 + "weight": entry(0, 8, "F99")}).encode(), 8)
    assert len(str(caught.value)) < 250
    assert "layer.weight' (60,006 characters): the dtype 'F99' is unknown" in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m", {"t": np.ones(1000, np.float32)})
    with SafetensorsFile(tmp_path / "m") as file:
        os.truncate(tmp_path / "m", 200)
        with pytest.raises(SafetensorsError, match="became shorter"):
            file.read("t")


def test_a_missing_tensor_or_file_raises(tmp_path: Path) -> None:
    write(tmp_path / "m", {})
    with SafetensorsFile(tmp_path / "m") as file, pytest.raises(MissingTensorError, match="'t'"):
        file.read("t")
    with pytest.raises(FileNotFoundError):
        SafetensorsFile(tmp_path / "n")
    assert issubclass(SafetensorsError, SfpError)


# ------------------------------------------------------------------------------------------------ writing

ONE = TensorSpec("t", DTYPES["F32"], (3,))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ([], "not F32"),
        ([np.zeros(4, np.float32)], "not F32"),
        ([np.zeros(3, np.float64)], "not F32"),
        ([np.zeros(3, np.float32)] * 2, "more tensors"),
    ],
)
def test_arrays_that_differ_from_the_header_are_refused(arrays: list[Any], words: str) -> None:
    with pytest.raises(SafetensorsError, match=words):
        write_tensors(io.BytesIO(), [ONE], {}, iter(arrays))


def test_a_duplicate_name_is_refused() -> None:
    for name in ("t", "__metadata__"):
        with pytest.raises(SafetensorsError, match="twice"):
            header_bytes([ONE, TensorSpec(name, *ONE[1:])], {})


def test_a_failed_write_keeps_the_old_file_and_no_partial_file(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"old")
    with pytest.raises(SafetensorsError), replacing(tmp_path / "m") as file:
        write_tensors(file, [ONE], {}, iter([]))
    assert (tmp_path / "m").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m"]


def test_a_written_file_has_default_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write(tmp_path / "m", {})
    finally:
        os.umask(mask)
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("F32", [0, 1 << 62]), ("F32", [1 << 61, 0]), ("F4", [0, 1 << 63 - 1, 4]), ("C64", [1 << 60, 0, 1])],
)
def test_an_empty_tensor_of_a_shape_that_no_array_has_is_refused(dtype: str, shape: list[int]) -> None:
    header = json.dumps({"h": {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}}).encode()
    with pytest.raises(SafetensorsError, match=r"tensor 'h': a shape of \[.*\] is too large"):
        parse_header(header, 0)


def test_empty_tensors_of_the_greatest_shapes_are_read(tmp_path: Path) -> None:
    fields = {"h": {"dtype": "F32", "shape": [0, (1 << 61) - 1], "data_offsets": [0, 0]}}
    header = json.dumps(fields).encode()
    (tmp_path / "m").write_bytes(struct.pack("<Q", len(header)) + header)
    with SafetensorsFile(tmp_path / "m") as file:
        assert file.read("h").shape == (0, (1 << 61) - 1)
