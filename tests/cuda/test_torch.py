"""Tensors decoded for torch on a device: kernels on the host, in a queue that runs when it is waited for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sfp_conformance.forge import Forge

from conformance.recipes.samples import everything, weights
from kernels.tools import shim
from sfpformat import EngineError, InvalidFileError, LimitError, Limits, Options
from sfpformat.decode import device_batches as decode_device
from sfpformat.decode.opening import open_any
from sfpformat.decode.shard_index import ShardIndex
from sfpformat.engines import decodes_on_device, get_device_engine
from sfpformat.engines.cuda import driver, pinned_loading
from sfpformat.engines.cuda.batch import Running
from sfpformat.engines.cuda.device import HostMemory
from sfpformat.io.positional import PositionalFile
from sfpformat.numpy import save
from sfpformat.torch import device_memory, files, load, load_model, safe_open, save_model
from sfpformat.torch.files import TorchFile

from ..support.programs import needs
from ..torch.test_files import assert_same

pytestmark = needs("g++")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[shim.HostDevice]]:
    """The devices that were opened. Batches are small, so that several are in flight."""
    opened: list[shim.HostDevice] = []

    def opening(number: int, stream: int | None) -> shim.HostDevice:
        opened.append(shim.HostDevice())
        return opened[-1]

    monkeypatch.setattr(driver, "why_not", lambda: None)
    monkeypatch.setattr(pinned_loading, "open_device", opening)
    monkeypatch.setattr(device_memory, "engine_of", lambda _: get_device_engine("cuda"))
    monkeypatch.setattr(device_memory, "stream_of", lambda _: (0, 0))
    monkeypatch.setattr(device_memory, "current", nullcontext)
    monkeypatch.setattr(device_memory, "_thread", threading.local())
    monkeypatch.setattr(decode_device, "BATCH_BYTES", 20_000)
    yield opened
    for own in opened:
        own.finish()


def on_device(data: Any, **options: Any) -> TorchFile:
    """Opens the file as for a CUDA device, with host memory."""
    file = TorchFile(open_any(data, **options), CPU)
    file.device = torch.device("cuda")
    file._on_device = True
    return file


def loaded(data: Any, **options: Any) -> dict[str, torch.Tensor]:
    with on_device(data, **options) as file:
        return device_memory.read_tensors(file.file, list(file), CPU)


def many(count: int = 9) -> dict[str, Any]:
    return {f"t{i}": weights(90 + i, 200, density=0.3 + 0.07 * i, seed=i) for i in range(count)}


def test_every_kind_of_tensor_is_loaded(devices: list[shim.HostDevice]) -> None:
    assert_same(loaded(everything()), load(everything()))
    assert {"any_4", "plain_4", "index_chunks"} <= set(devices[0].launched)


def test_alternating_batches_load_every_weight(devices: list[shim.HostDevice]) -> None:
    data = save(many(), options=Options(segment=96, chunk=96 * 40))
    assert_same(loaded(data), load(data))
    assert devices[0].launched.count("index_chunks") > 4
    assert devices[0].launched.count("fill_tables") == 1


def test_loading_to_a_cuda_device_uses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    data, asked = save(many(2)), []

    def read_tensors(file: Any, names: Any, where: Any) -> dict[str, torch.Tensor]:
        asked.append((names, where))
        return {}

    monkeypatch.setattr(files, "require_device", torch.device)  # as if the device were there
    monkeypatch.setattr(device_memory, "read_tensors", read_tensors)
    with safe_open(data, device="cuda:0") as file:
        file.get_tensors()
        file.get_tensors(["t1"])
    assert asked == [(["t0", "t1"], torch.device("cuda:0")), (["t1"], torch.device("cuda:0"))]


@pytest.mark.parametrize(
    ("engine", "there", "kernels"), [(None, True, True), (None, False, False), ("python", True, False)]
)
def test_auto_uses_an_available_engine_and_a_name_selects_that_engine(
    engine: str | None, there: bool, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "why_not", lambda: None if there else "no device")
    assert decodes_on_device("cuda", engine) is kernels
    assert not decodes_on_device("cpu", engine)


def test_an_unavailable_engine_that_is_named_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "require_device", torch.device)  # as if the device were there
    monkeypatch.setattr(driver, "why_not", lambda: "there is no CUDA device")
    with pytest.raises(EngineError, match="'cuda' is not available: there is no CUDA device"):
        safe_open(save(many(1)), device="cuda", engine="cuda")


def test_a_module_is_loaded_on_its_own_device(
    devices: list[shim.HostDevice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfpformat.torch.loading.is_decoded_on", lambda where, engine: where == CPU)
    source, target = torch.nn.Linear(70, 90), torch.nn.Linear(70, 90).double()  # another dtype: not in place
    save_model(source, tmp_path / "m")
    assert load_model(target, tmp_path / "m") == ([], [])
    assert torch.equal(target.weight, source.weight.double())
    assert devices[0].launched[0] == "fill_tables"


def test_models_in_shards_are_loaded(tmp_path: Path) -> None:
    tensors = many(4)
    (tmp_path / "1.sfp").write_bytes(save({name: tensors[name] for name in ("t0", "t1")}))
    (tmp_path / "2.sfp").write_bytes(save({name: tensors[name] for name in ("t2", "t3")}))
    index = ShardIndex({"t0": "1.sfp", "t1": "1.sfp", "t2": "2.sfp", "t3": "2.sfp"}, {})
    path = tmp_path / "m.sfp.index.json"
    path.write_bytes(index.to_bytes())
    assert_same(loaded(path), {name: torch.from_numpy(tensor) for name, tensor in tensors.items()})


def fault_of(data: bytes, load_it: Any) -> tuple[Any, ...]:
    with pytest.raises(InvalidFileError) as caught:
        load_it(data)
    error = caught.value
    return error.clause, error.tensor, error.offset, error.detail


@pytest.mark.parametrize("name", ["t0", "t4", "t8"])
def test_a_damaged_tensor_raises_the_error_of_the_reference(name: str) -> None:
    forge = Forge.of(save(many(), options=Options(segment=96, chunk=96 * 40)))
    taken = forge.part(name).take(1)
    plane = next(plane for plane, bits in taken.planes.items() if sum(map(len, bits)))
    taken.planes[plane][0] = taken.planes[plane][0][:-1]
    taken.recount()
    forge.part(name).put(taken, 1)
    data = forge.build()
    assert fault_of(data, loaded) == fault_of(data, lambda data: load(data, engine="python", threads=1))


def test_an_earlier_fault_is_raised_before_a_checksum_mismatch() -> None:
    forge = Forge.of(save(many(), options=Options(segment=96, chunk=96 * 40)))
    data = bytearray(forge.build())
    data[forge.start_of("t6") + 200] ^= 1
    assert fault_of(bytes(data), loaded)[:2] == ("R-LAY-004", "t6")
    taken = forge.part("t5").take(0)
    taken.quantities["survivors"][0] -= 1
    forge.part("t5").put(taken, 0)
    data = bytearray(forge.build())
    data[forge.start_of("t6") + 200] ^= 1
    assert fault_of(bytes(data), loaded)[1] == "t5"


def test_the_first_of_several_damaged_tensors_is_raised_and_the_next_file_loads() -> None:
    forge = Forge.of(save(many(), options=Options(segment=96, chunk=96 * 40)))
    for name in ("t2", "t5", "t8"):
        taken = forge.part(name).take(0)
        taken.quantities["survivors"][0] -= 1
        forge.part(name).put(taken, 0)
    assert fault_of(forge.build(), loaded)[1] == "t2"
    assert_same(loaded(everything()), load(everything()))


def test_memory_is_pinned_once_for_many_tensors(devices: list[shim.HostDevice]) -> None:
    with on_device(save(many())) as file:
        for name in file:
            device_memory.read_tensors(file.file, [name], CPU)
    assert len(devices) == 2  # one of them for copies


def test_chunks_are_read_straight_into_pinned_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.sfp"
    path.write_bytes(save(many(), options=Options(segment=96, chunk=96 * 40)))
    places: list[int] = []
    pinned: list[tuple[int, int]] = []
    read_into = PositionalFile.read_into

    def pin(device: shim.HostDevice, size: int) -> HostMemory:
        memory = device.allocate(size)
        pinned.append((memory.address, memory.address + size))
        return memory

    def recorded(file: PositionalFile, view: memoryview, offset: int) -> int:
        places.append(np.frombuffer(view, np.uint8).ctypes.data)
        return read_into(file, view, offset)

    with on_device(path) as file:
        monkeypatch.setattr(PositionalFile, "read_into", recorded)
        monkeypatch.setattr(shim.HostDevice, "pin", pin)
        found = device_memory.read_tensors(file.file, list(file), CPU)
        chunks = sum(len(file.file.entry(name).chunks) for name in file)
    assert_same(found, {name: torch.from_numpy(tensor) for name, tensor in many().items()})
    assert len(places) == chunks > 9
    assert all(any(start <= place < stop for start, stop in pinned) for place in places)


def test_limits_apply_on_a_device(devices: list[shim.HostDevice]) -> None:
    with pytest.raises(LimitError):
        loaded(save(many(1)), limits=Limits(tensor_bytes=1000))
    assert not devices


def test_a_valid_chunk_that_kernels_refuse_is_decoded_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(running: Running) -> list[bool]:
        running.mark.wait()
        return [False] * len(running.status)

    monkeypatch.setattr(Running, "good", refuse)
    expected = {name: torch.from_numpy(tensor) for name, tensor in many(3).items()}
    assert_same(loaded(save(many(3))), expected)
