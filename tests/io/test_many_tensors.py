"""Loading many tensors: small raw ones are allocated together and do not overlap."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sfp_conformance.forge import Forge

import sfpformat
from sfpformat import Options
from sfpformat.decode.array_memory import SHARING, arrays_of
from sfpformat.dtypes import DTYPES
from sfpformat.errors import FileFault, LimitError, MissingTensorError
from sfpformat.limits import Limits
from sfpformat.numpy import load, load_file, save

from ..support.clauses import clauses

ENGINES = ["python", "numba"]
HUGE_PAGE = 2 << 20
Array = NDArray[Any]


def many(count: int = 60) -> dict[str, Array]:
    """Tensors of all dtypes, from 0 elements to more than a small tensor has."""
    rng = np.random.default_rng(0)
    shapes = [(), (1,), (3,), (0,), (2, 5), (4, 4, 4), (16,), (128, 130), (0, 7), (33, 3)]
    out: dict[str, Array] = {}
    for i in range(count):
        dtype = list(DTYPES.values())[i % len(DTYPES)]
        shape = shapes[i % len(shapes)]
        raw = rng.integers(
            0, 2 if dtype.name == "BOOL" else 256, int(np.prod(shape)) * dtype.itemsize, np.uint8
        )
        out[f"t{i}"] = np.frombuffer(raw.tobytes(), dtype.numpy).reshape(shape)
    return out


def memory_of(array: Array) -> int:
    """The number of bytes that an array keeps in memory."""
    root: Any = array
    while getattr(root, "base", None) is not None:
        root = root.base
    return len(root) if isinstance(root, bytearray) else int(root.nbytes)


@clauses("R-RAW-001")
@pytest.mark.parametrize("engine", ENGINES)
def test_many_raw_tensors_of_all_dtypes_are_restored(engine: str, tmp_path: Path) -> None:
    tensors = many()
    data = save(tensors, options=Options(coding="raw"), engine=engine)
    (tmp_path / "m.sfp").write_bytes(data)
    for source in (data, tmp_path / "m.sfp", io.BytesIO(data)):
        with sfpformat.open(source, engine=engine) as file:
            found = file.get_tensors()
        assert list(found) == list(tensors)
        for name, array in tensors.items():
            assert found[name].dtype == array.dtype
            assert found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes()
            assert found[name].flags.writeable
            assert found[name].flags.c_contiguous


@pytest.mark.parametrize("engine", ENGINES)
def test_results_are_in_the_order_of_the_requested_names(engine: str) -> None:
    tensors = many()
    names = [*list(tensors)[::-3], "t1", "t1"]
    with sfpformat.open(save(tensors, options=Options(coding="raw")), engine=engine) as file:
        found = file.get_tensors(names)
        with pytest.raises(MissingTensorError, match="t0x"):
            file.get_tensors([*names, "t0x"])
    assert list(found) == list(dict.fromkeys(names))
    assert all(found[name].tobytes() == tensors[name].tobytes() for name in names)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("coding", ["raw", "auto"])
def test_a_tensor_that_is_kept_keeps_at_most_eight_times_its_bytes_alive(engine: str, coding: str) -> None:
    sizes = [1, 100, 4000, 4096, SHARING // 4 - 1, SHARING // 4, 40_000, 90_000, 300_000, 20_000, 1_200_000]
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.standard_normal(size).astype(np.float32) for i, size in enumerate(sizes * 2)}
    found = load(save(tensors, options=Options(coding=coding), engine=engine), engine=engine)
    for name, array in found.items():
        assert array.tobytes() == tensors[name].tobytes()
        own = array.nbytes if array.nbytes < SHARING else 8 * array.nbytes + 64
        if 8 * array.nbytes >= HUGE_PAGE:
            own += HUGE_PAGE  # of address space, not touched
        assert memory_of(array) <= own


def test_medium_arrays_share_a_buffer_and_do_not_overlap() -> None:
    sizes = [SHARING, SHARING + 100, SHARING * 9, SHARING, 5 << 20, SHARING * 3, SHARING * 2] * 4
    arrays = list(arrays_of([((size,), np.dtype(np.uint8), size) for size in sizes]))
    for i, array in enumerate(arrays):
        array[:] = i
    assert all((array == i).all() for i, array in enumerate(arrays))
    assert [len(array) for array in arrays] == sizes
    assert all(array.ctypes.data % 64 == 0 for array in arrays)
    assert memory_of(arrays[0]) > SHARING + 64


@clauses("R-LAY-004", "R-RAW-002", "R-RAW-003", "R-RAW-004", "R-STR-002")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("clause", "name"),
    [("R-RAW-003", "t22"), ("R-RAW-002", "t25"), ("R-RAW-004", "flags"), ("R-LAY-004", "t31")],
)
def test_a_fault_in_one_of_many_tensors_names_clause_and_tensor(engine: str, clause: str, name: str) -> None:
    tensors = {f"t{i}": np.arange(i + 1, dtype=np.int16) for i in range(40)} | {"flags": np.ones(9, bool)}
    data = save(tensors)

    def damage(file: Forge) -> None:
        chunk = file.part(name).chunks[0]
        if clause == "R-RAW-003":
            chunk[63] = 1
        if clause == "R-RAW-002":
            chunk += bytes(64)
        if clause == "R-RAW-004":
            chunk[3] = 2

    file = Forge.of(data)
    damage(file)
    broken = bytearray(file.build())
    if clause == "R-LAY-004":
        with sfpformat.open(data) as good:
            broken[good.chunk_offset(good.entry(name), 0)] ^= 1
    with pytest.raises(FileFault) as raised:
        load(bytes(broken), engine=engine)
    assert (raised.value.clause, raised.value.tensor) == (clause, name)
    with sfpformat.open(bytes(broken), engine=engine) as opened:  # the others can still be read
        rest = opened.get_tensors([other for other in tensors if other != name])
        with pytest.raises(FileFault) as again:
            opened.read_into({other: np.empty_like(array) for other, array in tensors.items()})
    assert (again.value.clause, again.value.tensor, again.value.offset) == (clause, name, raised.value.offset)
    assert all(array.tobytes() == tensors[other].tobytes() for other, array in rest.items())


@clauses("R-LIM-002")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_low_limit_applies_to_small_tensors_too(engine: str) -> None:
    data = save({f"t{i}": np.zeros(10 + i, np.uint8) for i in range(20)})
    with pytest.raises(LimitError, match="t19"):
        load(data, limits=Limits(tensor_bytes=28), engine=engine)
    assert len(load(data, limits=Limits(tensor_bytes=29), engine=engine)) == 20


@pytest.mark.parametrize("engine", ENGINES)
def test_many_raw_tensors_are_read_into_arrays_of_the_caller(engine: str) -> None:
    tensors = many()
    out = {name: np.empty_like(array) for name, array in tensors.items()}
    with sfpformat.open(save(tensors, options=Options(coding="raw")), engine=engine) as file:
        file.read_into(out)
    assert all(out[name].tobytes() == array.tobytes() for name, array in tensors.items())


def test_small_and_large_tensors_are_read_at_their_offsets(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors: dict[str, Array] = {}
    for i in range(30):
        tensors[f"norm{i}"] = rng.standard_normal(64 + i).astype(np.float32)
        tensors[f"weight{i}"] = rng.standard_normal((40, 60 + i)).astype(np.float32)
    path = tmp_path / "m.sfp"
    path.write_bytes(save(tensors))
    for engine in ENGINES:
        found = load_file(path, engine=engine)
        assert list(found) == list(tensors)
        assert all(found[name].tobytes() == array.tobytes() for name, array in tensors.items())
