"""Masks and importances decoded by kernels on the host: the bits and the faults of the reference."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.recipes.samples import everything, plain, weights
from kernels.tools import inputs, shim
from sfpformat import ImportanceOptions, LimitError, Limits, MissingTensorError, Options
from sfpformat.decode import device_batches
from sfpformat.decode.opening import open_any
from sfpformat.decode.shard_index import ShardIndex
from sfpformat.engines import get_device_engine
from sfpformat.engines.cuda import driver, pinned_loading
from sfpformat.engines.cuda.batch import Running
from sfpformat.errors import FileFault, SfpError
from sfpformat.numpy import save
from sfpformat.torch import device_memory, safe_open
from sfpformat.torch.files import TorchFile

from ..support.conformance_cases import cases, data_of
from ..support.mutations import with_changed_chunks, with_changes, with_random_planes
from ..support.programs import needs
from ..support.strategies import Job, jobs, written

pytestmark = needs("g++")

CPU = torch.device("cpu")


class Kernels:
    """The simulated devices: which kernels they launched, and which runs the kernels refused."""

    def __init__(self) -> None:
        self.devices: list[shim.HostDevice] = []
        self.refused = 0

    @property
    def launched(self) -> set[str]:
        return {name for device in self.devices for name in device.launched}


@pytest.fixture(scope="module", params=["forwards", "backwards"], autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Kernels that run on the host, the threads of a block in either order, in batches of a few chunks."""
    found = Kernels()
    good = Running.good

    def opening(number: int, stream: int | None) -> shim.HostDevice:
        found.devices.append(shim.HostDevice(backwards=request.param == "backwards"))
        return found.devices[-1]

    def counted(running: Running) -> list[bool]:
        said = good(running)
        found.refused += said.count(False)
        return said

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "why_not", lambda: None)
        patch.setattr(pinned_loading, "open_device", opening)
        patch.setattr(device_memory, "engine_of", lambda _: get_device_engine("cuda"))
        patch.setattr(device_memory, "stream_of", lambda _: (0, 0))
        patch.setattr(device_memory, "current", nullcontext)
        patch.setattr(device_memory, "_thread", threading.local())
        patch.setattr(device_batches, "BATCH_BYTES", 20_000)
        patch.setattr(Running, "good", counted)
        yield found
        for device in found.devices:
            device.finish()


def on_device(data: Any, **options: Any) -> TorchFile:
    """Opens the file as for a CUDA device, with host memory."""
    file = TorchFile(open_any(data, **options), CPU)
    file._on_device = True
    return file


def bits_of(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes())


def contents(file: TorchFile) -> Any:
    """Returns masks and importances of all tensors, or for each the fields of the fault."""
    out: list[Any] = []
    for name in file:
        for read in (file.get_mask, file.get_importance):
            try:
                out.append(bits_of(read(name)))
            except FileFault as fault:
                out.append((fault.code, fault.clause, fault.tensor, fault.offset, fault.detail))
    return out


def same_by_both(data: Any) -> Any:
    """Returns what device and reference find; they must agree."""
    try:
        file = on_device(data)
    except SfpError:  # an error of the directory, before any content
        return None
    with file, safe_open(data, engine="python", threads=1) as reference:
        found = contents(file)
        assert found == contents(reference)
    return found


def accepted(data: Any, kernels: Kernels) -> None:
    """Requires that the kernels decode all contents."""
    before = kernels.refused
    assert all(item is None or len(item) == 3 for item in same_by_both(data))
    assert kernels.refused == before


def test_hand_made_files_have_the_contents_of_the_reference(kernels: Kernels) -> None:
    for data in (plain(), everything()):
        accepted(data, kernels)
    assert {"masks", "importances"} <= kernels.launched


@settings(max_examples=150)
@given(jobs())
def test_masks_and_importances_have_the_bits_of_the_reference(kernels: Kernels, job: Job) -> None:
    accepted(written(job), kernels)


def test_every_kind_of_file_has_the_contents_of_the_reference(kernels: Kernels) -> None:
    for _, data in inputs.files(every=3):
        accepted(data, kernels)


def test_golden_files_with_masks_or_importances_have_the_contents_or_the_fault_of_the_reference() -> None:
    wanted = [case for case in cases("yn") if {"mask", "importance"} & set(case["features"])]
    assert len(wanted) > 300
    outcomes = [same_by_both(data_of(case)) for case in wanted]
    assert any(item and len(item) == 5 for found in outcomes if found for item in found), (
        "no file had a fault"
    )


@settings(max_examples=150)
@given(st.integers(0, 2**64 - 1))
def test_damaged_chunks_have_the_contents_or_the_fault_of_the_reference(seed: int) -> None:
    same_by_both(with_changed_chunks([plain(), everything()], seed))


@settings(max_examples=100)
@given(jobs(), st.integers(0, 2**64 - 1), st.booleans())
def test_damaged_files_have_the_contents_or_the_fault_of_the_reference(
    job: Job, seed: int, planes: bool
) -> None:
    same_by_both(with_random_planes(written(job), seed) if planes else with_changes(written(job), seed))


def test_importances_that_do_not_multiply_are_decoded(kernels: Kernels) -> None:
    rng = np.random.default_rng(4)
    array = weights(70, 200, density=0.4, seed=1)
    for over in ("survivors", "all"):
        kept = ImportanceOptions(role="metadata", over=over, quantiser="exact", dtype="BF16")
        importance = rng.random(array.shape, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
        data = save({"w": array}, options=Options(importance=kept), importances={"w": importance})
        accepted(data, kernels)
        with on_device(data) as file:
            found = file.get_importance("w")
        assert found is not None
        expected = importance if over == "all" else np.where(array != 0, importance, 0)
        assert np.array_equal(found.numpy(), expected)


def test_a_tensor_without_a_mask_has_only_survivors_and_no_importance() -> None:
    array = np.arange(1, 601, dtype=np.float32).reshape(20, 30)
    with on_device(save({"w": array, "n": np.arange(5), "e": np.zeros((0, 3), np.float32)})) as file:
        for name, shape in (("w", (20, 30)), ("n", (5,)), ("e", (0, 3))):
            assert torch.equal(file.get_mask(name), torch.ones(shape, dtype=torch.bool))
            assert file.get_importance(name) is None
        with pytest.raises(MissingTensorError):
            file.get_mask("absent")
        with pytest.raises(MissingTensorError):
            file.get_importance("absent")


def test_contents_that_kernels_refuse_are_decoded_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(running: Running) -> list[bool]:
        running.mark.wait()
        return [False] * len(running.status)

    monkeypatch.setattr(Running, "good", refuse)
    same_by_both(everything())


def test_limits_apply_to_contents(kernels: Kernels) -> None:
    array = weights(90, 200, density=0.4, seed=1)
    before = len(kernels.devices)
    with on_device(save({"w": array, "d": array + 9}), limits=Limits(tensor_bytes=1000)) as file:
        for name in ("w", "d"):
            with pytest.raises(LimitError):
                file.get_mask(name)
    assert len(kernels.devices) == before


def test_shards_have_the_contents_of_their_files(tmp_path: Path) -> None:
    arrays = {f"t{i}": weights(30, 200, density=0.3 + 0.1 * i, seed=i) for i in range(2)}
    for name, array in arrays.items():
        (tmp_path / f"{name}.sfp").write_bytes(save({name: array}))
    path = tmp_path / "m.sfp.index.json"
    path.write_bytes(ShardIndex({name: f"{name}.sfp" for name in arrays}, {}).to_bytes())
    with on_device(path) as file:
        for name, array in arrays.items():
            assert np.array_equal(file.get_mask(name).numpy(), array != 0)


def test_a_file_for_a_cuda_device_reads_contents_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr("sfpformat.torch.files.require_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr("sfpformat.torch.files.is_decoded_on", lambda *_: True)
    for read in ("read_mask", "read_importance"):
        monkeypatch.setattr(
            device_memory, read, lambda file, name, device, read=read: asked.append((read, device.type))
        )
    with safe_open(everything(), device="cuda") as file:
        file.get_mask("uniform")
        file.get_importance("uniform")
    assert asked == [("read_mask", "cuda"), ("read_importance", "cuda")]
