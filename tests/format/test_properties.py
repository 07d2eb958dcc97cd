"""Properties of every tensor and all options of writing it."""

from __future__ import annotations

import io
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sfp_conformance import slow_reader

import sfpformat
from conformance.recipes.samples import everything, weights
from sfpformat.decode.validate import validate
from sfpformat.numpy import load, load_file, save, save_file

from ..support.clauses import clauses
from ..support.strategies import Job, indices, jobs, lossless_jobs, shapes, written


@clauses("R-REC-001", "R-QNT-002", "R-PLN-001", "R-PLN-003", "R-RAW-001", "R-CNV-001")
@settings(max_examples=150)
@given(lossless_jobs())
def test_lossless_tensors_are_restored_bit_for_bit(job: Job) -> None:
    found = load(written(job))["tensor"]
    assert found.dtype == job.array.dtype
    assert found.shape == job.array.shape
    assert found.tobytes() == job.expected


@clauses(
    "R-CNV-001", "R-CNV-002", "R-CNV-003", "R-CNV-004", "R-CNV-005", "R-LAY-001", "R-LAY-003", "R-LAY-004"
)
@clauses("R-DIR-001", "R-DIR-002", "R-DIR-003", "R-TEN-008", "R-TEN-010", "R-TEN-012")
@clauses(
    "R-TAB-001", "R-TAB-002", "R-TAB-004", "R-TAB-006", "R-TAB-007", "R-TAB-008", "R-TAB-009", "R-COD-001"
)
@clauses("R-COD-002", "R-PLN-002", "R-PLN-003", "R-PLN-004", "R-MSK-004", "R-MSK-005", "R-MSK-006")
@clauses(
    "R-QNT-003", "R-QNT-005", "R-QNT-006", "R-QNT-007", "R-SCL-004", "R-SCL-006", "R-IMP-004", "R-IMP-005"
)
@clauses(
    "R-CHK-001", "R-CHK-002", "R-CHK-003", "R-IDX-001", "R-IDX-002", "R-IDX-003", "R-IDX-004", "R-IDX-005"
)
@clauses(
    "R-IDX-006", "R-VEC-001", "R-VEC-002", "R-RAW-002", "R-RAW-003", "R-RAW-004", "R-REC-001", "R-IMP-006"
)
@settings(max_examples=400)
@given(jobs())
def test_a_reader_written_from_the_document_alone_returns_the_same(job: Job) -> None:
    data = written(job)
    slow = slow_reader.read(data).tensors["tensor"]
    with sfpformat.open(data, threads=1) as file:
        array = file.get_tensor("tensor")
        mask = file.get_mask("tensor")
        importance = file.get_importance("tensor")
    assert array.tobytes() == slow.data
    assert array.shape == slow.shape
    assert mask.reshape(-1).tolist() == [bool(bit) for bit in slow.mask]
    if importance is None:
        assert set(slow.importance) <= {None}
    else:
        expected = [0.0 if number is None else number for number in slow.importance]
        assert importance.reshape(-1).tolist() == expected


@clauses(
    "R-CAN-001", "R-CAN-002", "R-CAN-003", "R-CAN-004", "R-CAN-005", "R-CAN-006", "R-CAN-007", "R-CAN-008"
)
@clauses("R-CAN-009", "R-STR-006")
@settings(max_examples=150)
@given(jobs())
def test_everything_that_is_written_is_valid_and_canonical(job: Job) -> None:
    report = validate(written(job))
    assert report.faults == []
    assert report.notes == []


@clauses("R-CAN-001")
@given(jobs())
def test_writing_twice_gives_the_same_bytes(job: Job) -> None:
    data = written(job)
    assert Job(job.array.copy(), job.options, job.mask, job.importance).data == data
    fortran = job.array.copy(order="F")
    assert Job(fortran, job.options, job.mask, job.importance).data == data


@clauses("R-REC-001", "R-STR-001")
@settings(max_examples=200)
@given(jobs(), st.data())
def test_slices_equal_those_of_the_whole_tensor(job: Job, data: st.DataObject) -> None:
    index = data.draw(indices(job.array.shape))
    with sfpformat.open(written(job)) as file:
        whole = file.get_tensor("tensor")
        found = file.get_slice("tensor")[index]
    expected = np.asarray(whole[index])
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


@given(shapes, st.data())
def test_indices_out_of_range_are_errors_and_slices_never(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    array = np.zeros(shape, np.uint8)
    with sfpformat.open(save({"a": array})) as file:
        part = file.get_slice("a")
        assert part.get_shape() == list(shape)
        assert part.get_dtype() == "U8"
        for axis, size in enumerate(shape):
            for number in (size, -size - 1):
                with pytest.raises(IndexError):
                    part[(slice(None),) * axis + (number,)]
            over = (slice(None),) * axis + (slice(-size - 9, size + 9),)
            assert part[over].shape == shape
        wrongs: tuple[Any, ...] = ((0,) * (len(shape) + 1), (..., ...), "a", 1.5, None, True, [0])
        for wrong in wrongs:
            with pytest.raises(IndexError):
                part[wrong]


@clauses("R-REC-005", "R-MSK-005")
@given(jobs())
def test_survivors_mask_and_importance_agree_with_the_tensor(job: Job) -> None:
    with sfpformat.open(written(job)) as file:
        array, mask = file.get_tensor("tensor"), file.get_mask("tensor")
        positions, values = file.get_survivors("tensor")
        importance, info = file.get_importance("tensor"), file.info("tensor")
    assert mask.shape == array.shape
    assert mask.dtype == np.bool_
    assert positions.tolist() == np.flatnonzero(mask).tolist()
    assert values.tobytes() == array.reshape(-1)[mask.reshape(-1)].tobytes()
    assert not np.frombuffer(array[~mask].tobytes(), np.uint8).any()
    assert (importance is None) == (info.importance is None)
    if importance is not None:
        assert importance.shape == array.shape
        assert importance.dtype == np.float32
        if info.importance == "survivors":
            assert not importance[~mask].any()
    if job.mask is not None and info.mask is not None:
        assert np.array_equal(mask, job.mask)


@clauses("R-REC-001")
@given(jobs(), st.integers(2, 5))
def test_the_number_of_threads_does_not_change_the_result(job: Job, threads: int) -> None:
    data = written(job)
    results = []
    for count in (1, threads):
        with sfpformat.open(data, threads=count) as file:
            importance = file.get_importance("tensor")
            positions, values = file.get_survivors("tensor")
            found: list[Any] = [file.get_tensor("tensor"), file.get_mask("tensor"), positions, values]
            found.append(np.zeros(0) if importance is None else importance)
        results.append([array.tobytes() for array in found])
    assert results[0] == results[1]


@clauses("R-LAY-005")
def test_a_file_reads_the_same_from_every_source() -> None:
    expected = {name: array.tobytes() for name, array in load(everything()).items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.sfp")
        path.write_bytes(everything())
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            sources: list[Any] = [
                str(path),
                path,
                everything(),
                bytearray(everything()),
                memoryview(everything()),
                np.frombuffer(everything(), np.uint8),
                mapped,
                stream,
                io.BytesIO(everything()),
            ]
            for source in sources:
                with sfpformat.open(source) as file:
                    assert {name: file.get_tensor(name).tobytes() for name in file} == expected
                assert not stream.closed
            del source, sources, file
        assert {name: array.tobytes() for name, array in load_file(path).items()} == expected


def test_a_stream_is_read_from_its_start_whatever_its_position() -> None:
    stream = io.BytesIO(everything())
    stream.seek(100)
    with sfpformat.open(stream) as file:
        assert file.get_tensor("flags").any()


def test_returned_arrays_are_not_shared_between_calls() -> None:
    for name, array in load(everything()).items():
        assert array.flags.writeable, name
        base = array.base
        assert array.flags.owndata or (base is not None and base.flags.owndata), name


@given(
    st.lists(jobs(), min_size=0, max_size=4),
    st.dictionaries(st.text("ab é", max_size=5), st.text("xyz\n", max_size=9)),
)
def test_files_of_several_tensors_keep_them_apart(given_jobs: list[Job], metadata: dict[str, str]) -> None:
    arrays = {f"t{i}": job.array for i, job in enumerate(given_jobs)}
    options = {f"t{i}": job.options for i, job in enumerate(given_jobs)}
    importances = {f"t{i}": job.importance for i, job in enumerate(given_jobs) if job.importance is not None}
    masks = {f"t{i}": job.mask for i, job in enumerate(given_jobs) if job.mask is not None}
    for job in given_jobs:
        written(job)
    data = save(arrays, metadata, options=options, masks=masks, importances=importances)
    with sfpformat.open(data) as file:
        assert file.metadata() == metadata
        assert file.keys() == list(arrays) == list(file)
        assert len(file) == len(arrays)
        for name, job in zip(arrays, given_jobs, strict=True):
            assert name in file
            assert file.get_tensor(name).tobytes() == load(job.data)["tensor"].tobytes()
            assert file.info(name).stored_bytes == sfpformat.open(job.data).info("tensor").stored_bytes


def test_a_path_is_written_and_read() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.sfp")
        save_file({"a": weights(30, 40)}, path, {"k": "v"})
        assert Path(path).read_bytes() == save({"a": weights(30, 40)}, {"k": "v"})
        assert load_file(path)["a"].tobytes() == weights(30, 40).tobytes()
