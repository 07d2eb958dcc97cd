"""Streams that a file is written to or read from: the kinds that are refused, and the bytes of the others."""

from __future__ import annotations

import gzip
import io
import mmap
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

import sfpformat
from conformance.recipes.samples import weights
from sfpformat import ClosedFileError, InvalidFileError, OptionError, Writer
from sfpformat.io.source import open_source
from sfpformat.numpy import load, save

from ..support.clauses import clauses

OLD = b"an older file " * 400
TENSORS = {"a": np.ones((4, 8), np.float32), "w": weights(40, 60)}
EXPECTED = save(TENSORS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A path with an older file."""
    old = tmp_path / "m.sfp"
    old.write_bytes(OLD)
    return old


def write(stream: Any) -> None:
    """Writes the tensors."""
    with Writer(stream) as writer:
        for name, array in TENSORS.items():
            writer.add(name, array)


def opened_to_append(path: Path) -> BinaryIO:
    """A stream in append mode that does not report it."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND), "wb")


@pytest.mark.parametrize("kind", ["path", "bytes", "stream"])
def test_bytes_are_read_into_memory_of_the_caller(kind: str, tmp_path: Path) -> None:
    (path := tmp_path / "m.sfp").write_bytes(EXPECTED)
    readable: Any = {"path": path, "bytes": EXPECTED, "stream": io.BytesIO(EXPECTED)}[kind]
    source = open_source(readable)
    out = bytearray(200)
    source.read_into(memoryview(out)[3:103], 64)
    assert out == bytes(3) + EXPECTED[64:164] + bytes(97)
    with pytest.raises(InvalidFileError, match="only 10 of 20 bytes"):
        source.read_into(memoryview(out)[:20], len(EXPECTED) - 10)
    source.close()
    with pytest.raises(ClosedFileError):
        source.read_into(memoryview(out), 0)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "ab": (lambda path: path.open("ab"), "append"),
    "a+b": (lambda path: path.open("a+b"), "append"),
    "ab, unbuffered": (lambda path: path.open("ab", buffering=0), "append"),
    "a flag of the descriptor": (opened_to_append, "append"),
    "text": (lambda path: path.open("r+"), "binary stream"),
    "text in memory": (lambda path: io.StringIO(), "binary stream"),
    "text over bytes": (lambda path: io.TextIOWrapper(io.BytesIO()), "binary stream"),
    "read only": (lambda path: path.open("rb"), "reading only"),
    "compressed": (lambda path: gzip.GzipFile(path.with_name("x.gz")), "reading only"),
}


@clauses("R-STR-005")
@pytest.mark.parametrize("case", REFUSED)
def test_a_stream_without_random_access_is_refused_and_stays_unchanged(path: Path, case: str) -> None:
    make, told = REFUSED[case]
    path.with_name("x.gz").write_bytes(b"")
    with make(path) as stream, pytest.raises(OptionError, match=told):
        Writer(stream)
    assert path.read_bytes() == OLD


def test_a_pipe_and_a_socket_are_refused() -> None:
    ends = os.pipe()
    with (
        os.fdopen(ends[1], "wb") as pipe,
        os.fdopen(ends[0], "rb"),
        pytest.raises(OptionError, match="cannot seek"),
    ):
        Writer(pipe)
    one, other = socket.socketpair()
    with one, other, one.makefile("wb") as stream, pytest.raises(OptionError, match="cannot seek"):
        Writer(stream)


def test_objects_that_are_no_stream_and_closed_streams_are_refused(path: Path) -> None:
    closed = io.BytesIO()
    closed.close()
    things: list[Any] = [closed, None, 7, [], object(), mmap.mmap(-1, 4096)]
    for thing in things:
        with pytest.raises(OptionError, match=r"closed|cannot write to a"):
            Writer(thing)


class _Appending(io.BytesIO):
    """A stream of another library that appends and does not report it."""

    def write(self, data: Any) -> int:
        self.seek(0, os.SEEK_END)
        return super().write(data)


@pytest.mark.parametrize("before", [b"", OLD])
def test_a_stream_in_append_mode_is_refused(before: bytes) -> None:
    with pytest.raises(OptionError, match="does not write at its position"):
        write(_Appending(before))


@pytest.mark.parametrize("mode", ["wb", "r+b", "w+b"])
@pytest.mark.parametrize("buffering", [0, -1])
def test_a_file_opened_for_writing_is_overwritten_completely(path: Path, mode: str, buffering: int) -> None:
    with path.open(mode, buffering=buffering) as stream:
        write(stream)
        assert stream.tell() == len(EXPECTED)
    assert path.read_bytes() == EXPECTED


@pytest.mark.parametrize(
    "make", [tempfile.TemporaryFile, tempfile.NamedTemporaryFile, tempfile.SpooledTemporaryFile]
)
def test_temporary_files_are_written_and_read(make: Callable[[], Any]) -> None:
    with make() as stream:
        write(stream)
        assert load_from(stream) == EXPECTED


def load_from(stream: Any) -> bytes:
    """Loads the tensors of a stream and saves them again."""
    with sfpformat.open(stream) as file:
        return save(file.get_tensors())


@pytest.mark.parametrize("position", [0, 77, 10_000])
def test_a_stream_is_read_from_its_start_at_any_position(position: int) -> None:
    stream = io.BytesIO(OLD)
    stream.seek(position)
    write(stream)
    assert stream.getvalue() == EXPECTED
    stream.seek(position)
    assert load_from(stream) == EXPECTED


class _Slow(io.FileIO):
    """An unbuffered file that accepts at most 100 bytes per write, like some devices."""

    def write(self, data: Any) -> int:
        return super().write(bytes(data)[:100]) or 0


class _Silent(io.BytesIO):
    """A stream of another library, which does not return the number of written bytes."""

    def write(self, data: Any) -> Any:
        super().write(data)


def test_a_stream_with_short_writes_receives_all_bytes(path: Path) -> None:
    with _Slow(path, "w+") as stream:
        write(stream)
    assert path.read_bytes() == EXPECTED
    silent = _Silent()
    write(silent)
    assert silent.getvalue() == EXPECTED


class _Full(_Slow):
    """A device that accepts no more bytes."""

    def write(self, data: Any) -> int:
        return 0


def test_a_stream_that_accepts_no_bytes_raises(path: Path) -> None:
    with _Full(path, "w+") as stream, pytest.raises(OSError, match="reported 0 written bytes of 64"):
        write(stream)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path.open("r"), "opened with mode 'rb'"),
        (lambda path: path.open("ab"), "writing only"),
        (lambda path: 7, "cannot read a int"),
        (lambda path: None, "cannot read a NoneType"),
    ],
)
def test_inputs_without_random_access_are_refused(path: Path, make: Callable[[Path], Any], told: str) -> None:
    stream = make(path)
    with pytest.raises(OptionError, match=told):
        sfpformat.open(stream)
    if hasattr(stream, "close"):
        stream.close()
        with pytest.raises(OptionError):
            sfpformat.open(stream)


def test_a_pipe_is_refused_by_readers() -> None:
    ends = os.pipe()
    with (
        os.fdopen(ends[1], "wb"),
        os.fdopen(ends[0], "rb") as pipe,
        pytest.raises(OptionError, match="cannot seek"),
    ):
        sfpformat.open(pipe)


def test_bytes_like_objects_are_read() -> None:
    octets: Any = np.frombuffer(EXPECTED, np.uint8)
    for data in (EXPECTED, bytearray(EXPECTED), memoryview(EXPECTED), octets):
        assert load(data)["a"].tobytes() == TENSORS["a"].tobytes()
