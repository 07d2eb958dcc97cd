"""Processes that hold parts of the base apply a delta to them. Threads stand for the processes."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sfpformat
from sfpformat import BaseMismatchError, InvalidFileError, MismatchError, OptionError, ProcessError
from sfpformat.deltas.reading import PoolChanges
from sfpformat.deltas.slices import Slice, apply_to_slices
from sfpformat.dtypes import DTYPES
from sfpformat.encode.sink import MemorySink

from ..support.clauses import clauses
from .test_deltas import Arrays, arrays, copies, edited, same, stepped, written

Boxes = dict[str, list[tuple[slice, ...]]]  # name -> the part of each process


def cut(size: int, parts: int) -> list[slice]:
    """Slices as torch.chunk makes them; the last ones can be empty."""
    chunk = -(-size // parts)
    return [slice(min(i * chunk, size), min((i + 1) * chunk, size)) for i in range(parts)]


def boxes(base: Arrays, world: int) -> Boxes:
    """Parts by rows, by columns, in a grid, and whole tensors on all processes, in turn."""
    out: Boxes = {}
    for number, (name, array) in enumerate(base.items()):
        whole = tuple(slice(0, size) for size in array.shape)
        if array.ndim == 0 or number % 4 == 3:
            out[name] = [whole] * world
        elif array.ndim == 1 or number % 4 == 0 or (number % 4 == 2 and world % 2):
            out[name] = [(part, *whole[1:]) for part in cut(array.shape[0], world)]
        elif number % 4 == 1:
            out[name] = [(whole[0], part, *whole[2:]) for part in cut(array.shape[1], world)]
        else:
            rows, columns = cut(array.shape[0], 2), cut(array.shape[1], world // 2)
            out[name] = [(rows[i % 2], columns[i // 2], *whole[2:]) for i in range(world)]
    return out


def parts_of(base: Arrays, held: Boxes, world: int) -> list[dict[str, Slice]]:
    """What each process holds."""
    return [
        {
            name: Slice(array[held[name][rank]].copy(), array.shape, tuple(s.start for s in held[name][rank]))
            for name, array in base.items()
        }
        for rank in range(world)
    ]


def applied(parts: list[dict[str, Slice]], deltas: list[bytes]) -> list[Exception | None]:
    """Applies a delta in a thread for each process. Returns the error of each."""
    world = len(parts)
    barrier = threading.Barrier(world, timeout=60)
    payloads: list[Any] = [None] * world
    errors: list[Exception | None] = [None] * world

    def process(rank: int) -> None:
        def exchange(payload: object) -> list[Any]:
            payloads[rank] = payload
            barrier.wait()
            found = list(payloads)
            barrier.wait()
            return found

        try:
            with sfpformat.Delta(deltas[rank], engine="python") as delta:
                apply_to_slices(parts[rank], delta, exchange, rank)
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def bytes_of(parts: list[dict[str, Slice]]) -> list[dict[str, bytes]]:
    """The bytes of all parts."""
    return [{name: part.array.tobytes() for name, part in each.items()} for each in parts]


@clauses("R-DLT-013", "R-DLT-015")
@pytest.mark.parametrize(("world", "block"), [(1, 333), (2, 13), (3, 100), (4, 77), (4, 1 << 22)])
def test_each_process_changes_its_part_to_that_of_the_result(world: int, block: int) -> None:
    rng = np.random.default_rng(2)
    base = arrays()
    for dtype in ("C64", "F64", "I8", "F8_E4M3"):
        for i in range(4):  # one of each kind of part
            base[f"{dtype}.{i}"] = rng.normal(size=(9, 5)).astype(DTYPES[dtype].numpy)
    new = stepped(base, share=0.3)
    new["I8.2"] = stepped(base, share=1.0)["I8.2"]
    out = MemorySink()
    with sfpformat.DeltaWriter(out, block=block) as writer:
        for name, array in base.items():
            writer.add(name, array, new[name], other={} if name in ("bias", "C64.1") else None)
    held = boxes(base, world)
    parts = parts_of(base, held, world)
    assert applied(parts, [out.data] * world) == [None] * world
    for rank, each in enumerate(parts):
        same({n: part.array for n, part in each.items()}, {n: new[n][held[n][rank]] for n in new})


def refused(
    kind: type[Exception],
    words: str,
    change: Callable[[list[dict[str, Slice]]], object],
    data: bytes | None = None,
) -> None:
    """Asserts that all processes refuse a delta after a change of what they hold, and change nothing."""
    base, world = arrays(), 2
    parts = parts_of(base, boxes(base, world), world)
    change(parts)
    before = bytes_of(parts)
    errors = applied(parts, [written(base, stepped(base), block=100) if data is None else data] * world)
    assert any(isinstance(error, kind) and words in str(error) for error in errors), errors
    assert all(isinstance(error, (kind, ProcessError)) for error in errors), errors
    assert bytes_of(parts) == before


def _replace(rank: int, name: str, **values: Any) -> Callable[[list[dict[str, Slice]]], None]:
    def change(parts: list[dict[str, Slice]]) -> None:
        old = parts[rank][name]
        parts[rank][name] = Slice(
            values.get("array", old.array), values.get("shape", old.shape), values.get("start", old.start)
        )

    return change


def _flip(rank: int, name: str) -> Callable[[list[dict[str, Slice]]], None]:
    def change(parts: list[dict[str, Slice]]) -> None:
        parts[rank][name].array.view(np.uint8)[..., 0] ^= 1

    return change


@clauses("R-DLT-009", "R-DLT-015")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_wrong_part_is_refused_by_all_processes(rank: int) -> None:
    for name in ("w.0", "count", "kept"):
        refused(BaseMismatchError, f"tensor '{name}'", _flip(rank, name))


def test_parts_that_are_not_those_of_a_model_are_refused_by_all_processes() -> None:
    refused(OptionError, "'w.0': the processes hold 1,170", _replace(1, "w.0", array=arrays()["w.0"][20:39]))
    refused(OptionError, "parts of processes overlap", _replace(1, "w.0", start=(10, 0)))
    refused(MismatchError, "is not inside [40, 30]", _replace(1, "w.0", start=(21, 0)))
    refused(OptionError, "differ in the names", _replace(1, "w.0", shape=(41, 30)))
    refused(OptionError, "differ in the names", lambda parts: parts[1].pop("kept"))
    refused(BaseMismatchError, "no such tensor", lambda parts: [each.pop("kept") for each in parts])
    fixed = arrays()["w.0"][20:]
    fixed.flags.writeable = False
    refused(MismatchError, "in C order, writable", _replace(1, "w.0", array=fixed))


def test_a_delta_that_changes_the_structure_is_refused_by_all_processes() -> None:
    base = arrays()
    for new in ({**base, "added": np.ones(3)}, {**base, "kept": np.ones(3)}):
        refused(OptionError, "adds, removes or reshapes", lambda parts: None, written(base, new))


@clauses("R-DLT-010", "R-DLT-011", "R-DLT-012")
def test_a_damaged_delta_is_refused_by_all_processes() -> None:
    base = arrays()
    data = written(base, stepped(base), block=100)

    def gaps(file: Any) -> None:
        file.part("BF16.0.gaps").entry["fingerprints"]["base"] += 1000

    refused(InvalidFileError, "do not fit", lambda parts: None, edited(data, gaps))

    def sums(file: Any) -> None:
        old = file.root["delta"]["checksums"]
        file.root["delta"]["checksums"] = old[:4] + bytes(4) + old[8:]

    refused(InvalidFileError, "the result has the checksum", lambda parts: None, edited(data, sums))


def test_different_deltas_are_refused_by_all_processes() -> None:
    base = arrays()
    parts = parts_of(base, boxes(base, 2), 2)
    before = bytes_of(parts)
    errors = applied(parts, [written(base, stepped(base, seed)) for seed in (1, 2)])
    assert all(isinstance(error, OptionError) for error in errors)
    assert bytes_of(parts) == before


def test_a_process_that_fails_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    base = copies(arrays())
    parts = parts_of(base, boxes(base, 2), 2)
    before = bytes_of(parts)
    data = written(base, stepped(base), block=100)
    coded = PoolChanges.coded
    first: list[int] = []

    def failing(self: Any, block: int) -> Any:
        if block == 3 and not first:
            first.append(threading.get_ident())
            raise OSError("the disk fails")
        return coded(self, block)

    monkeypatch.setattr(PoolChanges, "coded", failing)
    errors = applied(parts, [data] * 2)
    assert sorted(type(error).__name__ for error in errors) == ["OSError", "ProcessError"]
    assert any(
        "OSError: the disk fails" in str(error) and "nothing was changed" in str(error) for error in errors
    )
    assert bytes_of(parts) == before


def test_the_exchange_is_a_small_part_of_the_elements() -> None:
    rng = np.random.default_rng(0)
    base: Arrays = {"w": rng.normal(size=(512, 2048)).astype(np.float32)}
    new: NDArray[Any] = base["w"].copy()
    new[:, ::50] *= np.float32(1.0001)
    sent = 0

    def exchange(payload: object) -> list[Any]:
        nonlocal sent
        sent += len(pickle.dumps(payload))
        return [payload]

    with sfpformat.Delta(written(base, {"w": new})) as delta:
        apply_to_slices({"w": Slice(base["w"], (512, 2048), (0, 0))}, delta, exchange, 0)
    assert np.array_equal(base["w"], new)
    assert 0 < sent < base["w"].nbytes / 1000
