"""The writer: arguments that it refuses, its files after a failure, and resuming (SPEC.md R-STR-005)."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import ml_dtypes
import msgpack
import numpy as np
import pytest
from numpy.typing import NDArray

import sfpformat
from conformance.recipes.samples import importance, weights
from sfpformat import ImportanceOptions, OptionError, Options, SfpError, SfpWarning, Table, Uniform, Writer
from sfpformat.encode import sink
from sfpformat.encode.resume import ResumableSink
from sfpformat.numpy import load, save

from ..support.clauses import clauses
from ..support.forge import accepted

OLD = b"an older file"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A path with an older file."""
    path = tmp_path / "model.sfp"
    path.write_bytes(OLD)
    return path


def assert_untouched(target: Path) -> None:
    """Asserts that the old file is unchanged and the only one in its folder."""
    assert target.read_bytes() == OLD
    assert list(target.parent.iterdir()) == [target]


# -------------------------------------------------------------------------------------------- what it refuses

one = np.ones((4, 8), np.float32)
great = np.full((4, 8), 3e38, np.float32)
IMPOSSIBLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "no such dtype": (np.array(["a"]), {}),
    "objects": (np.array([None]), {}),
    "records": (np.zeros(3, [("a", "f4")]), {}),
    "a mask of another shape": (one, {"mask": np.ones((8, 4), bool)}),
    "a mask of another dtype": (one, {"mask": np.ones((4, 8), np.uint8)}),
    "a mask for integers": (np.ones(3, np.int32), {"mask": np.ones(3, bool)}),
    "an importance for integers": (np.ones(3, np.int32), {"importance": np.ones(3, np.float32)}),
    "a mask where there shall be none": (one, {"mask": one > 2, "options": Options(mask="none")}),
    "fingerprints of integers": (np.ones(3, np.int32), {"options": Options(coding="fingerprint")}),
    "an importance of another shape": (one, {"importance": np.ones(32, np.float32)}),
    "a negative importance": (one, {"importance": -one}),
    "an infinite importance": (one, {"importance": one * np.inf}),
    "an importance that is no number": (one, {"importance": one * np.nan}),
    "factors of another length": (one, {"importance": (np.ones(8), np.ones(4))}),
    "infinite factors": (one, {"importance": (np.full(4, np.inf), np.ones(8))}),
    "factors beyond float16": (
        one,
        {
            "importance": (np.full(4, 1e6), np.ones(8)),
            "options": Options(importance=ImportanceOptions(dtype="F16")),
        },
    ),
    "factors whose product is infinite": (one, {"importance": (np.full(4, 1e30), np.full(8, 1e30))}),
    "an exact importance beyond float16": (
        one,
        {
            "importance": np.full((4, 8), 1e6, np.float32),
            "options": Options(importance=ImportanceOptions(quantiser="exact", dtype="F16")),
        },
    ),
    "infinities quantised": (one * np.inf, {"options": Options(Uniform(step=1.0))}),
    "no numbers quantised": (one * np.nan, {"options": Options(Table(centroids=4))}),
    "a step beyond float32": (one, {"options": Options(Uniform(step=1e39))}),
    "a step that is 0 in float32": (one, {"options": Options(Uniform(step=1e-60))}),
    "a step far too small": (one, {"options": Options(Uniform(step=1e-30))}),
    "a step beyond float16": (
        np.full((4, 8), 65504, np.float16),
        {"options": Options(Uniform(step=1e5))},
    ),
    "a step in standard deviations beyond float16": (
        np.full((4, 8), 65504, np.float16),
        {"options": Options(Uniform(step=1.5, scale="row"))},
    ),
    "doubles below float32": (np.full((4, 8), 1e-60), {"options": Options(Uniform(bits=4))}),
    "weights beyond bfloat16 once multiplied": (
        great.astype(ml_dtypes.bfloat16),
        {
            "importance": (np.full(4, 2.0), np.ones(8)),
            "options": Options(importance=ImportanceOptions(role="multiplier")),
        },
    ),
    "factors that are 0 in float16": (
        one,
        {
            "importance": (np.full(4, 1e-9), np.full(8, 1e9)),
            "options": Options(importance=ImportanceOptions(dtype="F16")),
        },
    ),
    "an exact importance that is 0 in float16": (
        one,
        {
            "importance": np.full((4, 8), 1e-9, np.float32),
            "options": Options(importance=ImportanceOptions(quantiser="exact", dtype="F16")),
        },
    ),
    "importances that are 0 in float32": (one, {"importance": np.full((4, 8), 1e-60)}),
    "doubles beyond float32": (
        np.full((4, 8), 1e300),
        {"options": Options(Uniform(step=1.0))},
    ),
    "doubles beyond float32 by table": (
        np.full((4, 8), 1e300),
        {"options": Options(Table(centroids=2))},
    ),
}


@clauses("R-SCL-004", "R-SCL-006", "R-IMP-004", "R-IMP-005", "R-QNT-003", "R-QNT-006", "R-STR-005")
@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_unwritable_tensor_raises_and_the_writer_stays_usable(case: str) -> None:
    array, given = IMPOSSIBLE[case]
    out = io.BytesIO()
    with Writer(out) as writer:
        writer.add("before", one)
        with pytest.raises(OptionError):
            writer.add("impossible", array, **given)
        assert writer.done == ("before",)
        writer.add("impossible", one * 2)
    found = accepted(out.getvalue())
    assert found["impossible"].tobytes() == (one * 2).tobytes()
    assert list(found) == ["before", "impossible"]


GREAT: dict[str, tuple[Any, Options]] = {
    "a scale beyond float16": (one * 1e30, Options(Uniform(bits=4.0, scale="row"))),
    "a table scaled beyond float16": (one * 1e30, Options(Table(centroids=4, scale="column"))),
    "the greatest numbers scaled": (
        great * np.float32(1.1),
        Options(Uniform(bits=4.0, scale="row", scale_dtype="F32")),
    ),
    "the greatest numbers": (great * np.float32(1.1), Options(Uniform(error_db=-30))),
    "the greatest and small numbers": (
        np.where(np.eye(4, 8) > 0, great, one * np.float32(1e-30)),
        Options(Uniform(step=1e37, scale=4, scale_dtype="F32")),
    ),
    "one centroid": (great * np.float32(1.1), Options(Table(centroids=1))),
    "subnormal numbers": (one * np.float32(1e-44), Options(Uniform(bits=2.0, scale="row"))),
    "small halves": ((one * 6e-8).astype(np.float16), Options(Uniform(error_db=-20))),
    "small numbers by table": (one * np.float32(1e-44), Options(Table(centroids=3, scale=5))),
}


@clauses("R-SCL-004", "R-SCL-006", "R-QNT-006", "R-IMP-006")
@pytest.mark.parametrize("case", GREAT)
def test_extreme_numbers_give_a_valid_file_or_are_refused(case: str) -> None:
    array, options = GREAT[case]
    try:
        data = save({"a": array}, options=options)
    except OptionError:
        return
    found = accepted(data)["a"]
    assert found.shape == array.shape


@clauses("R-IMP-006")
@pytest.mark.parametrize("greatest", [1e-45, 1e-40, 1.0, 1.1, 1.7, 1e30, 3.0e38])
@pytest.mark.parametrize("bits", [1, 6, 16, 24])
@pytest.mark.parametrize("role", ["metadata", "multiplier"])
def test_importances_of_any_magnitude_give_a_valid_file(greatest: float, bits: int, role: str) -> None:
    given = np.linspace(0, 1, 32, dtype=np.float32).reshape(4, 8) * np.float32(greatest)
    how = ImportanceOptions(bits=bits, role=role, over="all")
    data = save({"a": one}, options=Options(coding="fingerprint", importance=how), importances={"a": given})
    accepted(data)
    with sfpformat.open(data) as file:
        found = file.get_importance("a")
    assert found is not None
    # Half a step, plus the rounding of binary32.
    allowed = max(greatest / (2**bits - 1) * 0.51, 1.5e-45) + greatest * 2.0**-23
    assert np.abs(found.astype(np.float64) - given).max() <= allowed


@clauses("R-TEN-001", "R-TEN-002", "R-MSG-003")
@pytest.mark.parametrize("name", ["", "a\0b", "\ud800", "x" * 1025, "taken"])
def test_names_that_the_format_cannot_hold_are_refused(name: str) -> None:
    out = io.BytesIO()
    with Writer(out) as writer:
        writer.add("taken", one)
        with pytest.raises(OptionError):
            writer.add(name, one)
    assert list(accepted(out.getvalue())) == ["taken"]


@clauses("R-DIR-005")
def test_extra_keys_of_an_entry_are_restored() -> None:
    keys = {"x-a": {"b": [1, "c", b"d", (1 << 64) - 1]}, "x-": ""}
    out = io.BytesIO()
    with Writer(out) as writer:
        writer.add("raw", np.ones(3, np.int8), other=keys)
        writer.add("coded", np.ones((64, 64), np.float32), other=keys)
        writer.add("none", np.ones(3, np.int8), other={})
    with sfpformat.open(out.getvalue()) as file:
        assert [file.info(name).unknown for name in file] == [keys, keys, {}]
        assert np.array_equal(file.get_tensor("coded"), np.ones((64, 64)))
    assert sfpformat.validate(out.getvalue()).ok


DEEP: dict[str, Any] = {}
for _ in range(16):
    DEEP = {"": DEEP}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"mask": 1}, "the key 'mask' does not begin with 'x-'"),
        ({1: 1}, "the key 1 does not begin with 'x-'"),
        ({"x-a": -1}, "cannot be written"),
        ({"x-a": 1 << 64}, "cannot be written"),
        ({"x-a": 1.5}, "cannot be written"),
        ({"x-a": None}, "cannot be written"),
        ({"x-a": True}, "cannot be written"),
        ({"x-a": {1: 2}}, "cannot be written"),
        ({"x-a": "\0"}, "cannot be written"),
        ({"x-a": "\ud800"}, "cannot be written"),
        ({"x-a": object()}, "cannot be written"),
        ({"x-a": DEEP}, "cannot be written"),
        ([], "must be a mapping"),
    ],
)
def test_extra_keys_that_readers_refuse_are_refused(keys: Any, told: str) -> None:
    with Writer(io.BytesIO()) as writer, pytest.raises(OptionError, match=told):
        writer.add("w", one, other=keys)


@clauses("R-MSG-003")
@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, {"a": "b\0"}, {"\0": "b"}, {"a": "\udc00"}])
def test_metadata_that_the_format_cannot_hold_are_refused_before_a_file_is_created(
    metadata: Any, tmp_path: Path
) -> None:
    with pytest.raises(OptionError):
        Writer(tmp_path / "a.sfp", metadata=metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Options(coding="zip"),
        lambda: Options(mask="x"),
        lambda: Options(group=3),
        lambda: Options(codes=0),
        lambda: Options(codes=17),
        lambda: Options(code_limit=0),
        lambda: Options(code_limit=13),
        lambda: Options(segment=33),
        lambda: Options(segment=65568),
        lambda: Options(chunk=0),
        lambda: Options(polarity=2),
        lambda: Options(Uniform(step=1.0), coding="raw"),
        lambda: Uniform(),
        lambda: Uniform(step=1.0, bits=2.0),
        lambda: Uniform(step=0.0),
        lambda: Uniform(step=float("inf")),
        lambda: Uniform(step=float("nan")),
        lambda: Uniform(bits=2.0, scale="block"),
        lambda: Uniform(bits=2.0, scale=0),
        lambda: Uniform(bits=2.0, scale="row", scale_dtype="F64"),
        lambda: Uniform(bits=2.0, scale_dtype="F16"),
        lambda: Uniform(bits=2.0, weighted="half"),
        lambda: Uniform(bits=2.0, rate_weight=-1.0),
        lambda: Table(),
        lambda: Table(4, bits=3),
        lambda: Table(0),
        lambda: Table(65537),
        lambda: Table(bits=17),
    ],
)
def test_invalid_options_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(OptionError):
        wrong()


# -------------------------------------------------------------------------------------- what it leaves behind


def break_off(writer: Writer, tensors: int, error: type[BaseException]) -> None:
    """Writes some tensors, and fails before the file is finished."""
    with writer:
        for i in range(tensors):
            writer.add(str(i), one)
        raise error


@clauses("R-STR-005")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("tensors", [0, 1, 3])
def test_an_exception_keeps_the_old_file_and_no_partial_file(
    target: Path, error: type[BaseException], tensors: int
) -> None:
    with pytest.raises(error):
        break_off(Writer(target), tensors, error)
    assert_untouched(target)


@clauses("R-STR-005")
def test_the_old_file_stays_until_the_new_one_is_complete(target: Path) -> None:
    with Writer(target) as writer:
        writer.add("a", weights(50, 60))
        assert target.read_bytes() == OLD
    assert load(target.read_bytes())["a"].tobytes() == weights(50, 60).tobytes()
    assert list(target.parent.iterdir()) == [target]


@pytest.fixture(params=["append", "fsync", "seek"])
def full_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full at one of several calls."""

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if request.param == "append":
        monkeypatch.setattr(sink.FileSink, "append", fails)
        monkeypatch.setattr(ResumableSink, "append", fails)
    elif request.param == "fsync":
        monkeypatch.setattr(os, "fsync", fails)
    else:
        monkeypatch.setattr(sink.FileSink, "commit", fails)
        monkeypatch.setattr(ResumableSink, "commit", fails)
    return


@clauses("R-STR-005")
@pytest.mark.parametrize("key", [None, "job"])
@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_keeps_the_old_file_and_no_partial_file(target: Path, key: str | None) -> None:
    with pytest.raises(OSError, match="No space"), Writer(target, resume_key=key) as writer:
        writer.add("a", one)
    assert_untouched(target)


@clauses("R-STR-005")
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_device_raises_os_error() -> None:
    with pytest.raises(OSError, match="No space"), open("/dev/full", "wb", buffering=0) as stream:
        stream.write(b"x")


@clauses("R-STR-005")
@pytest.mark.parametrize("key", [None, "job"])
def test_a_missing_folder_raises_os_error(tmp_path: Path, key: str | None) -> None:
    with pytest.raises(FileNotFoundError):
        Writer(tmp_path / "none" / "a.sfp", resume_key=key)


@clauses("R-STR-005")
@pytest.mark.parametrize("key", [None, "job"])
def test_a_target_that_is_no_regular_file_is_refused(tmp_path: Path, key: str | None) -> None:
    (tmp_path / "a.sfp").mkdir()
    with pytest.raises(OptionError, match="not a regular file"):
        Writer(tmp_path / "a.sfp", resume_key=key)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.sfp"]


def test_a_new_file_has_default_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        for key in (None, "job"):
            with Writer(tmp_path / "a.sfp", resume_key=key):
                pass
            assert stat.S_IMODE((tmp_path / "a.sfp").stat().st_mode) == 0o640
            (tmp_path / "a.sfp").unlink()
    finally:
        os.umask(old)


def test_a_link_to_the_target_is_kept(target: Path) -> None:
    link = target.with_name("link.sfp")
    link.symlink_to(target)
    with Writer(link) as writer:
        writer.add("a", one)
    assert link.is_symlink()
    assert list(accepted(target.read_bytes())) == ["a"]


def test_two_writers_of_one_target_use_different_temporary_files(target: Path) -> None:
    with Writer(target) as first, Writer(target) as second:
        first.add("a", one)
        second.add("b", one)
    assert list(accepted(target.read_bytes())) == ["a"]
    assert list(target.parent.iterdir()) == [target]


def test_closing_and_aborting_twice_is_harmless(target: Path) -> None:
    writer = Writer(target)
    writer.add("a", one)
    writer.close()
    writer.close()
    writer.abort()
    assert list(accepted(target.read_bytes())) == ["a"]
    other = Writer(target)
    other.abort()
    other.abort()
    other.close()
    assert list(accepted(target.read_bytes())) == ["a"]
    assert list(target.parent.iterdir()) == [target]


def test_a_stream_is_written_from_its_start_and_truncated() -> None:
    stream = io.BytesIO(b"\xff" * 100_000)
    stream.seek(77)
    with Writer(stream) as writer:
        writer.add("a", one)
    assert stream.getvalue() == save({"a": one})


def test_a_half_written_stream_is_not_a_valid_file() -> None:
    stream = io.BytesIO()
    with pytest.raises(RuntimeError):
        break_off(Writer(stream), 1, RuntimeError)
    with pytest.raises(sfpformat.InvalidFileError, match="E_MAGIC"):
        sfpformat.open(stream)


# --------------------------------------------------------------------------------------------- how it goes on

TENSORS: dict[str, np.ndarray] = {f"t{i}": weights(20, 30 + i, seed=i) for i in range(5)}
TENSORS["half"] = weights(10, 10).astype(ml_dtypes.bfloat16)
HOW = Options(Uniform(step=0.1, scale="row"), importance=ImportanceOptions(over="all"))


def write(target: Path, key: str = "job", stop_before: str | None = None) -> tuple[str, ...]:
    """Writes all missing tensors, unless interrupted. Returns those that were already written."""
    with Writer(target, metadata={"k": "v"}, resume_key=key) as writer:
        there = writer.done
        for name, array in TENSORS.items():
            if name == stop_before:
                raise KeyboardInterrupt
            if name not in there:
                writer.add(name, array, HOW, importance=importance(*array.shape))
    return there


def interrupt(target: Path, stop_before: str, key: str = "job") -> None:
    """A job that is interrupted."""
    with pytest.raises(KeyboardInterrupt):
        write(target, key, stop_before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that the job writes without an interruption."""
    path = tmp_path_factory.mktemp("whole") / "model.sfp"
    write(path)
    accepted(path.read_bytes())
    return path.read_bytes()


def parts_of(target: Path) -> tuple[Path, Path]:
    """The partial file and its journal."""
    partial = target.with_name(target.name + ".partial")
    return partial, partial.with_name(partial.name + ".journal")


@clauses("R-STR-005")
@pytest.mark.parametrize("stop", ["t0", "t1", "t4", "half"])
def test_an_interrupted_job_resumes_to_the_same_bytes(target: Path, whole: bytes, stop: str) -> None:
    interrupt(target, stop)
    assert target.read_bytes() == OLD
    assert all(path.exists() for path in parts_of(target))
    expected = tuple(TENSORS)[: list(TENSORS).index(stop)]
    assert write(target) == expected
    assert target.read_bytes() == whole
    assert list(target.parent.iterdir()) == [target]


@clauses("R-STR-005")
def test_a_job_can_be_interrupted_again_and_again(target: Path, whole: bytes) -> None:
    for stop in ("t1", "t1", "t2", "t4"):
        interrupt(target, stop)
    assert write(target) == ("t0", "t1", "t2", "t3")
    assert target.read_bytes() == whole


@clauses("R-STR-005")
def test_another_resume_key_starts_anew(target: Path, whole: bytes) -> None:
    interrupt(target, "t3", key="another")
    with pytest.warns(SfpWarning, match="with other options or inputs left, is discarded"):
        assert write(target) == ()
    assert target.read_bytes() == whole


@clauses("R-STR-005")
def test_a_failed_job_leaves_nothing_to_resume(target: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        break_off(Writer(target, resume_key="job"), 1, ZeroDivisionError)
    assert_untouched(target)


def killed_in_the_middle_of_a_tensor(target: Path) -> None:
    """Kills a writer while it writes its third tensor."""
    interrupt(target, "t2")
    partial, _ = parts_of(target)
    partial.write_bytes(partial.read_bytes() + b"half a chunk" * 9)


def flip(path: Path, at: int) -> None:
    """Flips a bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "nothing": lambda partial, journal: None,
    "first tensor": lambda partial, journal: flip(partial, 70),
    "last tensor": lambda partial, journal: flip(partial, -1),
    "partial cut": lambda partial, journal: os.truncate(partial, partial.stat().st_size - 1),
    "partial cut in the preamble": lambda partial, journal: os.truncate(partial, 10),
    "partial empty": lambda partial, journal: os.truncate(partial, 0),
    "partial gone": lambda partial, journal: partial.unlink(),
    "journal empty": lambda partial, journal: os.truncate(journal, 0),
    "journal gone": lambda partial, journal: journal.unlink(),
    "journal of nonsense": lambda partial, journal: journal.write_bytes(bytes(range(256))),
    "journal of another kind": lambda partial, journal: journal.write_bytes(msgpack.packb(["job"]) * 3),
    "journal with a number": lambda partial, journal: journal.write_bytes(msgpack.packb("job") + b"\x01"),
    "journal with a map of bytes": lambda partial, journal: journal.write_bytes(
        msgpack.packb("job") + b"\x81\xc4\x01a\x01"
    ),
    "journal with an extension": lambda partial, journal: journal.write_bytes(
        msgpack.packb("job") + b"\xd4\x05\x01"
    ),
    "journal with a deep value": lambda partial, journal: journal.write_bytes(
        msgpack.packb("job") + b"\x91" * 2000 + b"\x90"
    ),
    "journal with an entry twice": lambda partial, journal: journal.write_bytes(
        journal.read_bytes() + journal.read_bytes()[4:]
    ),
}


@pytest.mark.filterwarnings("ignore:.*is discarded:sfpformat.errors.SfpWarning")  # a journal without the key
@clauses("R-STR-005", "R-STR-001")
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_partial_data_is_written_again(target: Path, whole: bytes, case: str) -> None:
    killed_in_the_middle_of_a_tensor(target)
    DAMAGE[case](*parts_of(target))
    there = write(target)
    assert there == tuple(TENSORS)[: len(there)]
    assert target.read_bytes() == whole
    assert list(target.parent.iterdir()) == [target]


@clauses("R-STR-005")
def test_a_truncated_journal_loses_at_most_its_last_tensor(target: Path, whole: bytes) -> None:
    interrupt(target, "t3")
    partial, journal = parts_of(target)
    kept, notes = partial.read_bytes(), journal.read_bytes()
    found = set()
    for length in range(0, len(notes), 7):
        partial.write_bytes(kept)
        journal.write_bytes(notes[:length])
        with Writer(target, resume_key="job") as writer:
            found.add(len(writer.done))
            writer.abort(keep=False)
    assert found == {0, 1, 2}


@pytest.mark.filterwarnings("ignore:.*is discarded:sfpformat.errors.SfpWarning")  # if the key has the bit
@clauses("R-STR-005")
def test_a_journal_with_a_flipped_bit_does_not_fail_the_job(target: Path) -> None:
    interrupt(target, "t2")
    partial, journal = parts_of(target)
    kept, notes = partial.read_bytes(), journal.read_bytes()
    for at in range(0, len(notes), 5):
        partial.write_bytes(kept)
        journal.write_bytes(notes[:at] + bytes([notes[at] ^ 1 << at % 8]) + notes[at + 1 :])
        with Writer(target, resume_key="job") as writer:
            assert len(writer.done) <= 2
            writer.abort()


@clauses("R-STR-005")
def test_a_second_resumable_writer_of_a_target_is_refused(target: Path, whole: bytes) -> None:
    with Writer(target, metadata={"k": "v"}, resume_key="job") as first:
        for name, array in TENSORS.items():
            with pytest.raises(SfpError, match="another process"):
                Writer(target, resume_key="job")
            first.add(name, array, HOW, importance=importance(*array.shape))
    assert target.read_bytes() == whole
    assert list(target.parent.iterdir()) == [target]


@clauses("R-STR-005")
def test_a_writer_that_starts_while_another_finishes_keeps_its_file(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Writer(target, resume_key="job")
    first.add("a", one)
    lock = filelock.lock_descriptor

    def lock_late(file: int, *, blocking: bool) -> bool:
        monkeypatch.setattr(filelock, "lock_descriptor", lock)
        first.close()  # between the second writer's opening of the partial file and its lock
        return lock(file, blocking=blocking)

    monkeypatch.setattr(filelock, "lock_descriptor", lock_late)
    second = Writer(target, resume_key="job")
    assert list(accepted(target.read_bytes())) == ["a"]
    second.add("b", one)
    second.close()
    assert list(accepted(target.read_bytes())) == ["b"]
    assert list(target.parent.iterdir()) == [target]


def test_resuming_a_stream_is_refused() -> None:
    with pytest.raises(OptionError):
        Writer(io.BytesIO(), resume_key="job")


# -------------------------------------------------------------------------- a caller that goes on regardless


@clauses("R-STR-005", "R-LAY-003")
@pytest.mark.parametrize("key", [None, "job"])
@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_a_partially_written_tensor_aborts_the_file(
    target: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, chunk: int
) -> None:
    writer = Writer(target, resume_key=key)
    writer.add("whole", one)
    kind = type(writer._file.sink)
    append, left = kind.append, [chunk]

    def fails_once(self: Any, data: bytes) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, data)

    monkeypatch.setattr(kind, "append", fails_once)
    with pytest.raises(OSError, match="No space"):
        writer.add("part", weights(20, 30), Options(Table(centroids=4), segment=32, chunk=64))
    with pytest.raises(SfpError):
        writer.add("another", one)
    with pytest.raises(SfpError):
        writer.close()
    assert_untouched(target)


def test_adding_to_a_closed_writer_raises() -> None:
    stream = io.BytesIO()
    writer = Writer(stream)
    writer.add("a", one)
    writer.close()
    data = stream.getvalue()
    with pytest.raises(sfpformat.ClosedFileError):
        writer.add("b", one)
    assert stream.getvalue() == data


def test_the_bytes_do_not_depend_on_the_thread_count() -> None:
    rng = np.random.default_rng(5)
    tensors: dict[str, NDArray[Any]] = {
        "w": rng.standard_normal((300, 500), np.float32),
        "i": np.arange(5000),
    }
    options = sfpformat.Options(chunk=1 << 13)
    assert save(tensors, options=options, threads=1) == save(tensors, options=options, threads=5)


@pytest.mark.parametrize("limit", range(1, 8))
def test_short_codes_make_coarse_classes(limit: int) -> None:
    array = np.random.default_rng(6).standard_normal(3000).astype(np.float32)
    options = sfpformat.Options(coding="fingerprint", code_limit=limit)
    data = save({"w": array}, options=options)
    assert load(data)["w"].tobytes() == array.tobytes()
    with sfpformat.open(data) as file:
        tables = file.entry("w").streams().values()
        assert all(max(code.length) <= limit for table in tables for code in table.codes)


def test_tensors_of_another_file_are_copied_without_recoding() -> None:
    options = sfpformat.Options(sfpformat.Uniform(bits=4.0, scale="row"), chunk=4096)
    rng = np.random.default_rng(0)
    tensors: dict[str, NDArray[Any]] = {
        "a": rng.standard_normal((40, 300)),
        "b": np.arange(5),
        "c": np.zeros((0, 3), np.float32),
    }
    first, again = io.BytesIO(), io.BytesIO()
    with Writer(first) as writer:
        for name, array in tensors.items():
            writer.add(name, array, options if name == "a" else None)
    with sfpformat.open(first) as file, Writer(again) as writer:
        for name in file:
            entry = file.entry(name)
            vectors = None if entry.vectors is None else file.read_checked(entry, -1)
            chunks = (file.read_checked(entry, k) for k in range(len(entry.chunks)))
            writer.add_encoded(entry, vectors, chunks)
        with pytest.raises(OptionError, match="'a' was already written"):
            writer.add_encoded(file.entry("a"), None, [])
    assert again.getvalue() == first.getvalue()
