"""Deltas that a device applies: kernels on the host, compared with the CPU, and all or nothing."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sfpformat
from conformance.recipes.deltas import base_of, delta, sample
from kernels.tools import shim
from kernels.tools.changes import KINDS, Comparison, random_block
from sfpformat import BaseMismatchError, OptionError, PartlyChangedError
from sfpformat.coding.changes import coded_ranks
from sfpformat.deltas import on_device
from sfpformat.deltas.reading import Delta
from sfpformat.encode.sink import MemorySink
from sfpformat.engines import DeviceBlock, DevicePart, get_device_engine
from sfpformat.engines.cuda import changes, pinned_loading
from sfpformat.errors import FileFault
from sfpformat.io.checksum import crc32
from sfpformat.numpy import load
from sfpformat.torch import apply_delta, device_deltas, device_memory, write_delta
from sfpformat.torch.tensors import array_of, tensor_of

from ..format.test_delta_shards import pair as shards_pair
from ..format.test_delta_shards import split
from ..format.test_deltas import Arrays, _put, arrays, edited, same, stepped, written
from ..support.clauses import clauses
from ..support.conformance_cases import FOLDER, data_of, manifest
from ..support.programs import needs
from ..torch.test_deltas import pair
from ..torch.test_deltas import same as same_weights

pytestmark = needs("g++")

Tensors = dict[str, torch.Tensor]


class Devices:
    """Simulated devices, which measure their memory. They fail at a launch if a test says so.

    Attributes:
        opened: the devices that were opened.
        launched: the names of all kernels that were launched.
        used, peak: bytes of device memory, and the most at any time.
        fails: whether a launch of a kernel fails, given its name and how often it was launched before.
    """

    def __init__(self) -> None:
        self.opened: list[Measured] = []
        self.launched: list[str] = []
        self.used = self.peak = 0
        self.fails: Callable[[str, int], bool] = lambda kernel, number: False

    def open(self, number: int, stream: int | None) -> Measured:
        self.opened.append(Measured(self))
        return self.opened[-1]


class Measured(shim.HostDevice):
    """A device of `Devices`."""

    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self._devices = devices

    def allocate(self, size: int) -> shim.HostMemory:
        memory = super().allocate(size)
        self._count(size)
        # Memory that is freed in the order of the queue can be allocated again in this order.
        weakref.finalize(memory, self._count, -size).atexit = False
        return memory

    def pin(self, size: int) -> shim.HostMemory:
        return super().allocate(size)

    def _count(self, size: int) -> None:
        self._devices.used += size
        self._devices.peak = max(self._devices.peak, self._devices.used)

    def launch(self, kernel: str, blocks: int, arguments: Any) -> None:
        if self._devices.fails(kernel, self._devices.launched.count(kernel)):
            raise RuntimeError(f"a launch of {kernel} failed")
        self._devices.launched.append(kernel)
        super().launch(kernel, blocks, arguments)


@pytest.fixture(autouse=True, scope="module")
def devices() -> Iterator[Devices]:
    """Devices in place of the CPU, so that kernels change tensors in CPU memory."""
    made = Devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinned_loading, "open_device", made.open)
        patch.setattr(device_memory, "engine_of", lambda _: get_device_engine("cuda"))
        patch.setattr(device_memory, "stream_of", lambda _: (0, 0))
        patch.setattr(device_memory, "current", nullcontext)
        patch.setattr(device_memory, "_thread", threading.local())
        patch.setattr(device_deltas, "is_decoded_on", lambda device, engine: device.type == "cpu")
        yield made
        for own in made.opened:
            own.finish()


@pytest.fixture(autouse=True)
def nothing_launched(devices: Devices) -> None:
    """Forgets the launches of earlier tests."""
    devices.opened.clear()
    devices.launched.clear()
    devices.used = devices.peak = 0
    devices.fails = lambda kernel, number: False


def tensors(source: Arrays) -> Tensors:
    """Copies of arrays as tensors."""
    return {name: tensor_of(array.copy()) for name, array in source.items()}


def as_arrays(source: Tensors) -> Arrays:
    """Tensors as arrays, which share their memory if they are contiguous."""
    return {name: array_of(tensor, name) for name, tensor in source.items()}


# --------------------------------------------------------------------------------------------- the kernels


@pytest.mark.parametrize("backwards", [False, True])
def test_every_kernel_finds_and_makes_the_changes_of_the_reference(backwards: bool) -> None:
    device, rng = shim.HostDevice(backwards=backwards), np.random.default_rng(backwards)
    comparison, refused = Comparison(device), 0
    for kind in KINDS * 2:
        for damaged in (False, True):
            blocks = [random_block(kind, rng, damaged) for _ in range(3)]
            fitting = comparison.compare(blocks, kind)
            assert damaged or fitting == 3
            refused += 3 - fitting
    assert refused > 10
    made = {f"{kernel}_{item}" for kernel in ("count_keys", "place_changes") for item in (1, 2, 4, 8)}
    assert set(device.launched) == made | {"sum_keys", "flip_elements"}


@settings(max_examples=40)
@given(st.integers(1, 40_000), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**32 - 1))
def test_checksums_are_those_of_zlib(elements: int, item: int, seed: int) -> None:
    device, rng = shim.HostDevice(), np.random.default_rng(seed)
    data = [rng.bytes(elements * item), rng.bytes(item)]
    memory = [device.allocate(len(one)) for one in data]
    for own, one in zip(memory, data, strict=True):
        own.bytes[:] = np.frombuffer(one, np.uint8)
    parts = [DevicePart(own.address, len(own.bytes) // item) for own in memory]
    assert changes.Changes(device).checksums(parts, item) == [crc32(one) for one in data]


def test_long_tensors_are_divided_for_their_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MOST_ELEMENTS", 1 << 13)
    monkeypatch.setattr(changes, "_MOST_TILES", 3)
    device, data = shim.HostDevice(), np.random.default_rng(0).bytes(70_001)
    memory = device.allocate(len(data))
    memory.bytes[:] = np.frombuffer(data, np.uint8)
    part = DevicePart(memory.address, len(data))
    assert changes.Changes(device).checksums([part, part], 1) == [crc32(data)] * 2
    assert device.launched.count("count_keys_1") > 4


def test_ranks_are_the_sums_of_gaps_and_too_great_ones_are_bounded() -> None:
    counts = np.array([0, 2 * 3, 2 * 2 + 1, 2 * 3, 1], np.int64)
    gaps = np.array([4, 0, 2, (1 << 32) - 1, (1 << 32) - 1, 7], np.uint32)
    out = np.empty(8, np.uint32)
    coded_ranks(counts, gaps, out)
    assert out.tolist() == [4, 5, 8, 0, 1, (1 << 32) - 2, (1 << 32) - 2, (1 << 32) - 2]


# --------------------------------------------------------------------------------------------- whole models


def compare_with_the_cpu(base: Arrays, data: Any) -> tuple[Any, ...] | None:
    """Asserts that device and CPU give the same tensors, or the same fault, which is returned."""
    outcomes = []
    for on in ("device", "CPU"):
        target: Any = (
            tensors(base) if on == "device" else {name: array.copy() for name, array in base.items()}
        )
        fault = None
        try:
            (apply_delta if on == "device" else sfpformat.apply_delta)(target, data)
        except FileFault as error:
            fault = type(error), error.clause, error.tensor, error.offset, error.detail
        outcomes.append((as_arrays(target) if on == "device" else target, fault))
    (found, fault), (expected, expected_fault) = outcomes
    assert fault == expected_fault
    same(found, base if fault is not None else expected)
    return fault


@clauses("R-DLT-013")
@pytest.mark.parametrize("block", [100, 1 << 22])
@pytest.mark.parametrize("share", [0.01, 0.9])
def test_a_device_makes_the_result_of_every_dtype(devices: Devices, block: int, share: float) -> None:
    rng, base = np.random.default_rng(5), arrays()
    base |= {
        "f8": rng.normal(size=300).astype(ml_dtypes.float8_e4m3fn),
        "f8b": rng.normal(size=300).astype(ml_dtypes.float8_e5m2),
        "bytes": rng.integers(0, 256, 300, np.uint8),
        "complex": (rng.normal(size=60) + 1j).astype(np.complex64),
        "double": rng.normal(size=5000) * np.exp2(rng.integers(-900, 900, 5000)),
        "half": rng.normal(size=200).astype(np.float16),
    }
    new = {**stepped(base, share=share), "added": np.arange(5.0)}
    del new["count"]
    data = written(base, new, block=block)
    target = tensors(base)
    before = dict(target)
    apply_delta(target, data)
    same(as_arrays(target), new)
    assert all(target[name] is before[name] for name in new if name in before)
    made = {f"place_changes_{item}" for item in (1, 2, 4, 8)}
    assert made | {"count_keys_2", "sum_keys", "flip_elements"} <= set(devices.launched)
    with pytest.raises(BaseMismatchError):
        apply_delta(target, data)
    same(as_arrays(target), new)


@clauses("R-DLT-009", "R-DLT-013")
def test_golden_deltas_give_the_tensors_or_the_fault_of_the_cpu(devices: Devices) -> None:
    found = [case for case in manifest()["cases"] if case.get("base") is not None]
    found = [case for case in found if "delta-parts" not in case["features"]]
    faults = set()
    for case in found:
        base = load((FOLDER / case["base"]).read_bytes(), engine="python")
        fault = compare_with_the_cpu(base, data_of(case))
        faults.add(None if fault is None else fault[0])
    assert len(found) > 10
    assert {None, BaseMismatchError} < faults
    assert "flip_elements" in devices.launched


DTYPES = [np.dtype(name) for name in ("f8", "f4", "f2", "?", "i1", "u2", "i4", "i8", "c8")]
DTYPES += [np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_pair_gives_the_result_or_the_same_fault(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    base: Arrays = {}
    for number in range(data.draw(st.integers(1, 4))):
        dtype, size = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 400))
        raw = np.frombuffer(rng.bytes(size * dtype.itemsize), np.uint8)
        base[f"t{number}"] = (raw & 1 if dtype == np.bool_ else raw).view(dtype)
    new = stepped(base, 1, data.draw(st.sampled_from([0.0, 0.02, 0.5, 1.0])))
    file = written(base, new, block=data.draw(st.sampled_from([33, 128, 1 << 22])))
    assert compare_with_the_cpu(base, file) is None
    again = compare_with_the_cpu(new, file)
    assert (again is None) == all(base[name].tobytes() == new[name].tobytes() for name in base)


@clauses("R-SHD-001")
def test_a_delta_in_shards_gives_the_result_or_the_fault_of_the_cpu(devices: Devices, tmp_path: Path) -> None:
    base, new = shards_pair()
    index = split(tmp_path, base, new)
    assert compare_with_the_cpu(base, index) is None
    assert "flip_elements" in devices.launched
    wrong = {**base, "w.1": base["w.1"] * 2}
    fault = compare_with_the_cpu(wrong, index)
    assert fault is not None
    assert fault[2] == "w.1"


def test_a_module_with_tied_weights_becomes_the_result(devices: Devices, tmp_path: Path) -> None:
    base, new = pair()
    place = base.embed.weight.data_ptr()
    write_delta(tmp_path / "d.sfp", base, new)
    apply_delta(base, tmp_path / "d.sfp")
    assert same_weights(base, new)
    assert base.embed.weight.data_ptr() == place
    assert "flip_elements" in devices.launched


def test_shared_memory_is_changed_once_and_a_transposed_tensor_in_its_order(devices: Devices) -> None:
    weight = arrays()["w.0"]
    base = {"a": weight, "b": weight, "c": weight.T.copy()}
    new = {"a": stepped({"w": weight})["w"], "c": stepped({"w": base["c"]})["w"]}
    new["b"] = new["a"]
    shared, turned = tensor_of(weight.copy()), tensor_of(weight.copy()).T
    target = {"a": shared, "b": shared, "c": turned}
    apply_delta(target, written(base, new, block=100))
    same(as_arrays(target), new)
    assert target["c"] is turned
    assert not turned.is_contiguous()
    assert "flip_elements" in devices.launched


def test_a_tensor_with_lazy_conjugation_is_changed() -> None:
    number = np.array([1 + 2j, 3 - 4j], np.complex64)
    target = {"a": torch.from_numpy(number.conj().copy()).conj()}
    assert target["a"].is_conj()
    apply_delta(target, written({"a": number}, {"a": number * 2}))
    assert target["a"].tolist() == [2 + 4j, 6 - 8j]


def test_unchanged_booleans_are_compared_by_their_truth() -> None:
    base = {"f": np.array([True, False, True, True]), "w": np.ones(3, np.float32)}
    target = {"f": torch.tensor([7, 0, 255, 1], dtype=torch.uint8).view(torch.bool), "w": torch.ones(3)}
    apply_delta(target, written(base, {**base, "w": np.full(3, 2, np.float32)}))
    assert target["w"].tolist() == [2, 2, 2]


def test_replaced_tensors_are_written_in_place_if_they_keep_dtype_and_shape() -> None:
    base: Arrays = {
        "w": np.ones((2, 3), np.float32),
        "v": np.ones(3, np.float32),
        "x": np.ones(9, np.float32),
    }
    new: Arrays = {"w": base["w"] * 5, "v": np.ones(4, np.float16), "x": base["x"] * np.float32(1.001)}
    out = MemorySink()
    with sfpformat.DeltaWriter(out) as writer:
        for name, array in new.items():
            writer.add(name, base[name], array, other={} if name == "w" else None)
    target = tensors(base)
    kept = target["w"]
    apply_delta(target, out.data)
    same(as_arrays(target), new)
    assert target["w"] is kept


# ------------------------------------------------------------------------------------------- all or nothing


@clauses("R-DLT-009", "R-DLT-015")
@pytest.mark.parametrize("name", ["w.0", "w.1", "count", "kept"])
def test_a_wrong_base_is_refused_before_anything_changes(devices: Devices, name: str) -> None:
    base = arrays()
    data = written(base, stepped(base), block=300)
    wrong = {key: array.copy() for key, array in base.items()}
    wrong[name].reshape(-1)[3] += 1
    fault = compare_with_the_cpu(wrong, data)
    assert fault is not None
    assert fault[:3] == (BaseMismatchError, "R-DLT-009", name)
    assert "flip_elements" not in devices.launched


@clauses("R-DLT-011", "R-DLT-012", "R-DLT-015")
def test_a_damaged_delta_is_refused_with_the_fault_of_the_cpu(devices: Devices) -> None:
    pairs = sample()
    base, good = load(base_of(pairs)), delta(pairs)

    def gaps(file: Any) -> None:
        file.part("gaps 0").entry["fingerprints"]["base"] += 1000

    sums = _put("checksums", lambda old: old[:4] + bytes(4) + old[8:])
    for edit, clause in ((gaps, "R-DLT-011"), (sums, "R-DLT-012")):
        fault = compare_with_the_cpu(base, edited(good, edit))
        assert fault is not None
        assert fault[1] == clause
    assert "flip_elements" not in devices.launched
    assert compare_with_the_cpu(base, good) is None


@clauses("R-DLT-015")
@pytest.mark.parametrize("room", [0, 1 << 20])
@pytest.mark.parametrize("kernel", ["count_keys_2", "place_changes_2", "flip_elements"])
def test_a_device_that_fails_leaves_the_base(
    devices: Devices, monkeypatch: pytest.MonkeyPatch, kernel: str, room: int
) -> None:
    monkeypatch.setattr(on_device, "_KEPT_BYTES", room)
    monkeypatch.setattr(on_device, "_MOST_BLOCKS", 1)
    base = arrays()
    new = stepped(base)
    data = written(base, new, block=200)
    failed: list[int] = []

    def fails(name: str, number: int) -> bool:
        if name == kernel and number == 4 and not failed:
            failed.append(number)
            return True
        return False

    devices.fails = fails
    target = tensors(base)
    with pytest.raises(RuntimeError, match=f"a launch of {kernel} failed"):
        apply_delta(target, data)
    same(as_arrays(target), base)
    # Nothing waits that could use memory after it is freed.
    assert all(isinstance(work, partial) for own in devices.opened for work in own._queue)
    # Four changes were made, and made again.
    assert devices.launched.count("flip_elements") == (8 if kernel == "flip_elements" else 0)
    apply_delta(target, data)
    same(as_arrays(target), new)


@clauses("R-DLT-015")
def test_an_error_of_a_copy_restores_changed_and_copied_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {name: arrays(seed)["w.0"] for seed, name in enumerate("abc")}
    data = written(base, stepped(base))
    target = {"a": tensor_of(base["a"].copy())}
    target |= {name: tensor_of(base[name].T.copy()).T for name in "bc"}
    copy, copied = torch.Tensor.copy_, []

    def failing(self: torch.Tensor, *rest: Any) -> torch.Tensor:
        copied.append(self)
        if len(copied) == 2:
            raise RuntimeError("the copy failed")
        return copy(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", failing)
        with pytest.raises(RuntimeError, match="the copy failed"):
            apply_delta(target, data)
    assert len(copied) == 4
    same(as_arrays(target), base)


@clauses("R-DLT-015")
def test_a_temporary_file_that_cannot_be_read_leaves_the_base_or_names_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(on_device, "_KEPT_BYTES", 0)
    monkeypatch.setattr(on_device, "_MOST_BLOCKS", 1)
    base = arrays()
    data = written(base, stepped(base), block=200)
    flip = on_device.DeviceChange._flip
    calls: list[int] = []
    bad: set[int] = {5}  # calls that fail

    def failing(self: Any, queue: Any, kept: Any) -> None:
        calls.append(kept.offset)
        if len(calls) - 1 in bad:
            raise OSError("the temporary file is too short")
        flip(self, queue, kept)

    monkeypatch.setattr(on_device.DeviceChange, "_flip", failing)
    target = tensors(base)
    with pytest.raises(OSError, match="too short"):
        apply_delta(target, data)
    assert calls == [*calls[:6], *calls[4::-1]]
    same(as_arrays(target), base)
    calls.clear()
    bad.add(10)  # the first change is not restored
    with pytest.raises(PartlyChangedError, match=r"a part of 'w\.0', which cannot be restored") as raised:
        apply_delta(target, data)
    assert raised.value.tensors == ("w.0",)
    assert isinstance(raised.value.__context__, OSError)
    same({**as_arrays(target), "w.0": base["w.0"]}, base)
    assert as_arrays(target)["w.0"].tobytes() != base["w.0"].tobytes()


def test_a_temporary_file_that_is_too_short_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "_KEPT_BYTES", 0)
    base = arrays()
    data = written(base, stepped(base))
    apply = on_device.DeviceChange.apply

    def shortened(self: Any, queue: Any) -> None:
        self._file.truncate(100)
        apply(self, queue)

    monkeypatch.setattr(on_device.DeviceChange, "apply", shortened)
    target = tensors(base)
    with pytest.raises(OSError, match="the temporary file is too short"):
        apply_delta(target, data)
    same(as_arrays(target), base)


# --------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("share", [0.005, 0.1, 1.0])
def test_a_device_needs_at_most_64_mb_for_blocks_of_the_default_size(share: float) -> None:
    queue, kind = changes.Changes(shim.HostDevice()), KINDS[3]  # BF16
    counts = np.zeros(256, np.int64)
    counts[:] = 2 * int((1 << 22) * share / 256)
    levels = np.zeros(int((counts >> 1).sum()), np.uint16)
    block = DeviceBlock([DevicePart(1 << 20, 1 << 22)], counts, levels.astype(np.uint32), levels)
    one, room = queue.bytes_of(block, kind), on_device._WORKING_BYTES // on_device._RUNNING
    running = one if one > room else room * on_device._RUNNING
    assert running + on_device._KEPT_BYTES < 64 << 20
    assert (one > room) == (share == 1.0)


@pytest.mark.parametrize("room", [0, 100_000, 1 << 20])
def test_memory_of_the_device_stays_within_the_bounds(
    devices: Devices, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    rng = np.random.default_rng(0)
    base = {f"w{i}": rng.normal(size=40_000).astype(ml_dtypes.bfloat16) for i in range(4)}
    new = stepped(base, share=0.3)
    data = written(base, new, block=8_000)
    monkeypatch.setattr(on_device, "_WORKING_BYTES", 200_000)
    monkeypatch.setattr(on_device, "_KEPT_BYTES", room)
    target = tensors(base)
    apply_delta(target, data)
    same(as_arrays(target), new)
    all_changes = 6 * 0.3 * 4 * 40_000  # bytes
    most = 200_000 + min(room, 1.1 * all_changes) + 10_000
    assert 0.5 * most < devices.peak < most


# --------------------------------------------------------------------------------------- where it is applied


def ones(**more: torch.Tensor) -> Tensors:
    return {"a": torch.ones(4), "b": torch.ones(4), **more}


def doubled(state: Tensors, dtype: Any = np.float32) -> bytes:
    """A delta from ones to twos."""
    base = {name: np.ones(tensor.shape, dtype) for name, tensor in state.items()}
    return written(base, {name: array * 2 for name, array in base.items()})


WHOLE = torch.ones(6)


@pytest.mark.parametrize(
    ("state", "on"),
    [
        (ones(), True),
        (ones(c=torch.ones(4, device="meta")), False),
        (ones(c=torch.ones(2, 2).to_sparse()), False),
        ({"a": WHOLE[:4], "b": WHOLE[2:]}, False),
        ({"a": WHOLE, "b": WHOLE}, True),
        ({"a": WHOLE[:3], "b": WHOLE[3:]}, True),
    ],
)
def test_a_device_applies_a_delta_if_it_has_all_tensors_that_change(state: Tensors, on: bool) -> None:
    with Delta(doubled(state)) as opened:
        assert device_deltas.device_for(state, opened) == (torch.device("cpu") if on else None)


def test_the_cpu_applies_deltas_of_many_tensors_and_for_other_engines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = ones()
    monkeypatch.setattr(device_deltas, "is_decoded_on", lambda device, engine: engine is None)
    with Delta(doubled(state), engine="python") as opened:
        assert device_deltas.device_for(state, opened) is None
    with Delta(doubled(state)) as opened:
        assert device_deltas.device_for(state, opened) is not None
        monkeypatch.setattr(device_deltas, "_MOST_TENSORS", 1)
        assert device_deltas.device_for(state, opened) is None


def test_tensors_that_overlap_are_refused(devices: Devices) -> None:
    whole = torch.ones(6)
    target = {"a": whole[:4], "b": whole[2:]}
    with pytest.raises(OptionError, match="share memory"):
        apply_delta(target, doubled(target))
    assert whole.tolist() == [1] * 6
    assert not devices.launched


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_a_dtype_that_the_format_lacks_is_refused() -> None:
    state = {"a": torch.ones(4), "b": torch.ones(4, dtype=torch.complex32)}
    with pytest.raises(OptionError, match=r"'b': the format does not support the dtype torch\.complex32"):
        apply_delta(state, doubled(ones()))
