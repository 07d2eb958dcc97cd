"""Damaged, truncated and hostile files."""

from __future__ import annotations

import io
import random
import subprocess
import sys
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge, Pairs, Raw, pack

import sfpformat
from conformance.recipes.samples import coded, everything, plain
from sfpformat import FileFault, LimitError, Limits, OptionError
from sfpformat.decode.validate import validate

from ..support.clauses import ROOT, clauses
from ..support.forge import accepted, read_all
from ..support.mutations import (
    mutate_chunk,
    mutated,
    random_bits,
    with_changed_chunks,
    with_changes,
)
from ..support.strategies import jobs, written

SMALL = Limits(
    directory_bytes=1 << 16,
    depth=16,
    name_bytes=256,
    tensors=64,
    rank=8,
    tensor_bytes=1 << 22,
    expansion=1 << 12,
)


def judged(data: bytes) -> FileFault | None:
    """Returns the reader's fault for hostile bytes, or None if it accepts them; any other exception is a bug.

    Asserts that the validator and the slow reader agree.
    """
    try:
        tensors = read_all(data, SMALL)
    except FileFault as error:
        offset, limit = error.offset, isinstance(error, LimitError)
        report = validate(data, limits=SMALL)
        assert not report.ok
        assert offset is not None
        assert 0 <= offset <= len(data)
        if not limit:
            with pytest.raises(slow_reader.Bad):
                slow_reader.read(data)
        return error
    assert validate(data, limits=SMALL).ok
    slow = slow_reader.read(data)
    assert {name: array.tobytes() for name, array in tensors.items()} == {
        name: tensor.data for name, tensor in slow.tensors.items()
    }
    return None


def fault_of_opening(data: bytes, name: str) -> FileFault:
    """The fault of a request for one tensor."""
    try:
        with sfpformat.open(data, threads=1) as file:
            file.get_tensor(name)
    except FileFault as error:
        return error
    raise AssertionError("the file was accepted")


# ------------------------------------------------------------------------------------ flipped, cut, shifted


@clauses("R-PRE-003", "R-PRE-010", "R-LAY-004", "R-STR-001")
def test_every_flipped_bit_is_refused() -> None:
    whole = Forge.of(everything())
    whole.parts = [whole.part(name) for name in ("flags", "runs", "uniform", "coded")]
    good = whole.build()
    data = bytearray(good)
    with sfpformat.open(good) as file:
        owners = [
            (file.chunk_offset(file.entry(name), -1), name) for name in file if file.entry(name).stored_bytes
        ]
        end = file.preamble.directory_offset
    for at in range(len(good)):
        owner = max(((start, name) for start, name in owners if start <= at), default=(0, ""))[1]
        for bit in range(8):
            data[at] ^= 1 << bit
            error = fault_of_opening(bytes(data), owner)
            data[at] ^= 1 << bit
            expected = ("R-LAY-004", owner) if 64 <= at < end else (error.clause, None)
            assert (error.clause, error.tensor) == expected
    assert data == good


@clauses("R-PRE-007", "R-STR-001")
def test_every_shorter_file_is_refused() -> None:
    good = everything()
    for length in range(len(good)):
        with pytest.raises(FileFault) as caught:
            sfpformat.open(good[:length])
        assert caught.value.code == "E_TRUNCATED"


@clauses("R-PRE-008")
def test_every_longer_file_is_refused() -> None:
    for more in (b"\0", everything(), bytes(10_000)):
        with pytest.raises(FileFault, match="E_TRAILING"):
            sfpformat.open(everything() + more)


@clauses("R-LAY-004")
@given(st.integers(0, 2**32), st.integers(1, 64))
def test_swapped_and_shifted_bytes_are_refused(seed: int, size: int) -> None:
    good = everything()
    rng = random.Random(seed)
    a, b = rng.randrange(len(good) - size), rng.randrange(len(good) - size)
    data = bytearray(good)
    data[a : a + size], data[b : b + size] = good[b : b + size], good[a : a + size]
    if data != good and bytes(data) != good:
        assert judged(bytes(data)) is not None
    moved = good[:a] + good[a + size :] + bytes(size)
    if moved != good:
        assert judged(moved) is not None


# -------------------------------------------------------------------------------- mutations, checksums mended


@clauses("R-STR-001", "R-STR-003", "R-STR-006", "R-LAY-005")
@settings(max_examples=400)
@given(st.integers(0, 2**64 - 1), st.integers(1, 3))
def test_all_readers_give_the_same_verdict_on_changed_files_with_repaired_checksums(
    seed: int, changes: int
) -> None:
    judged(with_changes(everything(), seed, changes))


@clauses("R-STR-001", "R-STR-003", "R-PLN-003", "R-MSK-004")
@settings(max_examples=400)
@given(st.integers(0, 2**64 - 1))
def test_all_readers_give_the_same_verdict_on_changed_chunks_with_repaired_checksums(seed: int) -> None:
    judged(with_changed_chunks([plain(), everything()], seed))


@clauses("R-STR-001", "R-STR-003", "R-PLN-003")
@settings(max_examples=300)
@given(st.integers(0, 2**64 - 1))
def test_random_planes_are_decoded_or_refused(seed: int) -> None:
    # Header and index do not change; some planes get random bits, so that symbols, runs and ends are random.
    rng = random.Random(seed)
    file = Forge.of(everything())
    part = file.part(rng.choice(["runs", "octets", "uniform", "table", "group", "coded"]))
    taken = part.take()
    for name in rng.sample(sorted(taken.planes), rng.randrange(1, 3)):
        taken.planes[name] = [random_bits(len(bits), rng) for bits in taken.planes[name]]
    part.put(taken)
    judged(file.build())


@clauses("R-STR-003")
@settings(max_examples=100)
@given(jobs(), st.integers(0, 2**64 - 1))
def test_all_readers_give_the_same_verdict_on_changes_of_any_written_file(job: Any, seed: int) -> None:
    judged(with_changes(written(job), seed))


@clauses("R-STR-001", "R-STR-003", "R-MSG-007")
@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    assert judged(data) is not None
    assert judged(plain()[:64] + data) is not None
    assert judged(Forge(directory=data).build()) is not None or data


@clauses("R-MSG-001", "R-MSG-005", "R-LIM-002")
@pytest.mark.parametrize(
    "directory",
    [
        pack({"tensors": [Pairs([("name", "a"), ("name", "a")])]}),
        pack(Pairs([("tensors", []), ("tensors", [])])),
        b"\x81\xa7tensors" + b"\x91" * 60_000,
        b"\x81" * 60_000,
        b"\x81\xa1a" * 20_000 + b"\x80",
        b"\xdf\xff\xff\xff\xff" + b"\xa1a\x01" * 1000,
        b"\xdd\xff\xff\xff\xff" * 1000,
        pack({"tensors": [Raw(b"\xdd\x00\x00\xff\xff" + b"\x80" * 65535)]}),
    ],
    ids=range(8),
)
def test_malicious_directories_are_refused(directory: bytes) -> None:
    assert judged(Forge(directory=directory).build()) is not None


# --------------------------------------------------------------------------------------------- time, memory


@clauses("R-LIM-003", "R-IDX-003", "R-MSG-008", "R-STR-003")
@pytest.mark.parametrize("seed", range(20))
def test_memory_and_time_are_small_for_any_claim_of_a_small_file(seed: int) -> None:
    rng = random.Random(seed)
    file = Forge.of(everything())
    for part in file.parts:
        for key in ("shape", "segment", "chunk"):
            if rng.randrange(3) == 0:
                part.entry[key] = mutated(part.entry[key], rng)
        for chunk in part.chunks:
            mutate_chunk(chunk, rng)
    data = file.build()
    started = time.monotonic()
    tracemalloc.start()
    validate(data, limits=SMALL)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    assert time.monotonic() - started < 10


_CHILD = """
import resource, sys
import sfpformat
from sfpformat import validate
data = sys.stdin.buffer.read()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), used + (256 << 20)))
report = validate(data, engine="python")
print(report.faults[0].clause if report.faults else "accepted")
"""


def clause_in_little_memory(data: bytes) -> str:
    """The clause by which a reader with the default limits and 256 MiB of memory refuses a file."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], input=data, capture_output=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


@clauses("R-LIM-003", "R-IDX-003", "R-STR-003", "R-MSG-008")
def test_great_claims_are_refused_within_little_memory() -> None:
    assert clause_in_little_memory(everything()) == "accepted"
    great = Forge.of(everything())
    great.part("runs").entry["shape"] = [2**48]
    assert clause_in_little_memory(great.build()) == "R-TEN-008"
    many = Forge.of(everything())
    part = many.part("scalar")
    part.entry |= {"shape": [2**36], "segment": 65536, "chunk": 256}
    part.chunks = part.chunks * 4096
    assert clause_in_little_memory(many.build()) in ("R-LIM-002", "R-RAW-002")
    claims = Forge.of(everything())
    claims.root["x-a"] = Raw(b"\xdd\xff\xff\xff\xff")
    assert clause_in_little_memory(claims.build()) == "R-MSG-007"
    plane = Forge.of(everything())
    taken = plane.part("coded").take()
    taken.quantities["fingerprints residual"] = [2**32, 2**32]
    taken.headers["fingerprints residual"] = (2**32 - 1, 32)
    plane.part("coded").put(taken)
    assert clause_in_little_memory(plane.build()) == "R-IDX-003"


# ------------------------------------------------------------------------------------------------- sources


class _Liar(io.BytesIO):
    """An object that reports a greater length than it has, returns small pieces, or returns too much."""

    def __init__(
        self, data: bytes, *, claims: int = 0, piece: int = 1 << 30, spoils: int | None = None
    ) -> None:
        super().__init__(data)
        self.claims, self.piece, self.spoils = claims, piece, spoils

    def seek(self, offset: int, whence: int = 0) -> int:
        return super().seek(offset, whence) + (self.claims if whence == 2 else 0)

    def read(self, size: int | None = -1) -> bytes:
        at = self.tell()
        data = super().read(min(size if size is not None else 0, self.piece))
        if self.spoils is not None and at >= self.spoils:
            return b""
        return data


@clauses("R-STR-001", "R-PRE-007")
@pytest.mark.parametrize("piece", [1, 7, 100])
def test_an_object_that_returns_small_pieces_is_read_completely(piece: int) -> None:
    good = accepted(everything())
    with sfpformat.open(_Liar(everything(), piece=piece)) as file:
        for name in ("runs", "flags", "coded"):
            assert file.get_tensor(name).tobytes() == good[name].tobytes()


@clauses("R-PRE-007", "R-STR-001")
def test_an_object_that_ends_before_its_length_is_truncated() -> None:
    with pytest.raises(FileFault) as caught:
        sfpformat.open(_Liar(everything()[:-10], claims=10))
    assert caught.value.code == "E_TRUNCATED"
    assert caught.value.offset == len(everything()) - 10


@clauses("R-PRE-007", "R-STR-001")
def test_a_chunk_that_the_source_no_longer_returns_is_truncated_at_its_offset() -> None:
    stream = _Liar(everything())
    with sfpformat.open(stream, threads=1) as file:
        start = file.chunk_offset(file.entry("group"), -1)
        stream.spoils = 0
        with pytest.raises(FileFault) as caught:
            file.get_tensor("group")
    assert caught.value.code == "E_TRUNCATED"
    assert caught.value.tensor == "group"
    assert caught.value.offset == start


@clauses("R-STR-001")
def test_a_file_that_shrinks_while_it_is_open_is_truncated(tmp_path: Any) -> None:
    path = tmp_path / "a.sfp"
    path.write_bytes(everything())
    with sfpformat.open(path, threads=1) as file:
        with path.open("r+b") as stream:
            stream.truncate(100)
        with pytest.raises(FileFault, match="E_TRUNCATED"):
            file.get_tensor("group")


@clauses("R-STR-001")
def test_a_file_that_is_overwritten_while_it_is_open_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "a.sfp"
    path.write_bytes(everything())
    with sfpformat.open(path, threads=1) as file:
        with path.open("r+b") as stream:
            stream.seek(file.chunk_offset(file.entry("group"), -1))
            stream.write(b"\xff" * 64)
        with pytest.raises(FileFault, match="R-LAY-004"):
            file.get_tensor("group")


def test_a_closed_file_raises_its_own_error(tmp_path: Any) -> None:
    path = tmp_path / "a.sfp"
    path.write_bytes(everything())
    for source in (path, everything(), io.BytesIO(everything())):
        file = sfpformat.open(source)
        file.close()
        file.close()
        with pytest.raises(sfpformat.ClosedFileError):
            file.get_tensor("runs")


def test_a_missing_file_and_a_folder_without_one_are_refused(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError):
        sfpformat.open(tmp_path / "none.sfp")
    with pytest.raises(OptionError, match=r"has no \.sfp file"):
        sfpformat.open(tmp_path)


def test_a_missing_tensor_is_a_key_error() -> None:
    with sfpformat.open(everything()) as file:
        assert "none" not in file
        for ask in (file.get_tensor, file.get_slice, file.get_mask, file.get_importance, file.get_survivors):
            with pytest.raises(KeyError, match="none"):
                ask("none")


@clauses("R-STR-003")
def test_every_single_bit_change_in_an_index_gives_a_fault_or_the_same_verdict_of_all_readers() -> None:
    head = 8 * len(coded().take().quantities) + 64
    for at in range(head):
        for bit in range(8):
            file = Forge()
            file.parts.append(coded())
            file.parts[0].chunks[0][at] ^= 1 << bit
            judged(file.build())
