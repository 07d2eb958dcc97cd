"""NVRTC compiles the kernels without a driver; the driver module reports why CUDA is unavailable."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from kernels.tools import barriers, machine, shim
from sfpformat import EngineError
from sfpformat.engines import available, get_engine
from sfpformat.engines.cuda import driver, kernel_source, layout

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# Registers and shared memory of a multiprocessor; a block takes slightly more shared memory than it declares.
REGISTERS, SHARED_OF_ALL, SHARED_BESIDE = 65536, {"sm_90": 228 << 10, "sm_100": 228 << 10}, 1 << 10
SHARED = 48 << 10  # bytes per block without a request to the driver


def test_the_source_is_one_string_without_headers() -> None:
    text = kernel_source.source()
    assert "#include" not in text
    assert "#pragma once" not in text
    for name in (
        "base",
        "changes",
        "recipe",
        "index",
        "levels",
        "mask",
        "values",
        "decode",
        "parts",
        "dense",
        "ring",
        "short",
        "sparse",
        "windows",
        "tensor",
        "matrix",
        "operands",
        "product",
    ):
        parts = (kernel_source.folder() / f"{name}.cuh").read_text().split("#pragma once\n")[0]
        assert text.count(parts) == 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_without_spilled_registers(arch: str) -> None:
    code, usage, said = machine.compile_with_usage(arch)
    assert code.startswith(b"\x7fELF")
    assert set(usage) == set(kernel_source.kernels())
    assert "warning" not in said
    blocks = {
        name: int(count)
        for name, count in re.findall(
            r"^(?:KERNEL|MULTIPLY|COUNT|PLACE)\((\w+), (\d),", kernel_source.source(), re.MULTILINE
        )
    }
    if arch == "sm_100":
        blocks = {kernel: min(count, 7) for kernel, count in blocks.items()}
    for kernel, used in usage.items():
        assert used.spilled == 0, kernel
        assert used.registers * layout.THREADS * blocks.get(kernel, 4) <= REGISTERS, kernel
        assert used.shared <= SHARED, kernel
        if arch in SHARED_OF_ALL:
            assert (used.shared + SHARED_BESIDE) * blocks.get(kernel, 4) <= SHARED_OF_ALL[arch], kernel


def test_the_check_of_barriers_finds_them_and_what_it_copies() -> None:
    root = shim.SOURCE.parents[1]
    assert all((root / name).exists() for name in barriers._COPIED)
    found = list(barriers.barriers(shim.SOURCE))
    assert {"decode.cuh", "dense.cuh", "index.cuh", "windows.cuh"} <= {path.name for path, _, _ in found}
    assert all("__" in path.read_text()[a:b] or "wait" in path.read_text()[a:b] for path, a, b in found)


def test_compiled_kernels_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(driver, "source", lambda: 'extern "C" __global__ void short_source() {}')
    first = driver.compile_for("sm_90").code
    assert any(tmp_path.rglob("*"))
    assert driver.compile_for("sm_90").code == first


# ------------------------------------------------------------------------------------------- why it cannot be


def fake_core(devices: list[tuple[int, int]] | Exception) -> Any:
    """A `cuda.core` with devices of those compute capabilities, or one that raises."""

    class Device:
        @classmethod
        def get_all_devices(cls) -> Any:
            if isinstance(devices, Exception):
                raise devices
            return tuple(types.SimpleNamespace(compute_capability=own) for own in devices)

    return types.SimpleNamespace(Device=Device)


@pytest.fixture
def nothing_remembered() -> Iterator[None]:
    """Clears the cached result of the device check before and after the test."""
    for remembers in (driver._version_of_package, driver._why_no_device, driver._why_no_compiler):
        remembers.cache_clear()
    yield
    for remembers in (driver._version_of_package, driver._why_no_device, driver._why_no_compiler):
        remembers.cache_clear()


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (
            RuntimeError('"cuda" is an NVIDIA driver\n library'),
            'no CUDA driver or device: "cuda" is an NVIDIA driver',
        ),
        ([], "there is no CUDA device"),
        ([(6, 1)], "too old: compute capability 6.1, at least 7.5 is needed"),
        ([(6, 1), (9, 0)], None),
    ],
)
@pytest.mark.usefixtures("nothing_remembered")
def test_available_names_what_is_missing(
    devices: Any, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", fake_core(devices))
    monkeypatch.setattr(driver, "why_no_package", lambda: None)
    reason = available()["cuda"]
    assert (reason is None) if words is None else words in (reason or "")


@pytest.mark.usefixtures("nothing_remembered")
def test_a_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("libnvrtc.so was not found")

    monkeypatch.setitem(sys.modules, "cuda.core", fake_core([(9, 0)]))
    assert driver.why_not() is None
    driver._why_no_compiler.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", types.SimpleNamespace(nvrtcVersion=missing))
    assert "no NVRTC, which compiles the kernels: libnvrtc.so was not found" in (driver.why_not() or "")


@pytest.mark.parametrize(
    ("version", "words"), [("0.7.0", "0.7.0 is too old, 1.2 or later"), ("1.2.2", None), ("2.0rc1", None)]
)
@pytest.mark.usefixtures("nothing_remembered")
def test_an_old_package_is_reported(version: str, words: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    reason = driver.why_no_package()
    assert (reason is None) if words is None else words in (reason or "")


@pytest.mark.usefixtures("nothing_remembered")
def test_the_package_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def version(name: str) -> str:
        asked.append(name)
        return "1.2.2"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert [driver.why_no_package() for _ in range(3)] == [None] * 3
    assert asked == ["cuda-core"]


@pytest.mark.usefixtures("nothing_remembered")
def test_a_missing_package_is_reported_and_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert driver.why_no_package() == "cuda-core is not installed; pip install 'sfpformat[cuda]'"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EngineError, match=r"cuda-core is not installed; pip install 'sfpformat\[cuda\]'"):
        get_engine("cuda")


# --------------------------------------------------------------------------------------- the calls themselves


class Recorder:
    """Mock of an object of cuda.core: records calls, and returns itself or the given value."""

    def __init__(self, said: list[tuple[Any, ...]], name: str, gives: dict[str, Any]) -> None:
        self._said, self._name, self._gives = said, name, gives

    def __getattr__(self, name: str) -> Any:
        path = f"{self._name}.{name}"
        return self._gives[path] if path in self._gives else Recorder(self._said, path, self._gives)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self._said.append((self._name, *args, *options.items()))
        return Recorder(self._said, f"{self._name}()", self._gives)


def test_allocations_copies_and_launches_call_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = np.zeros(64, np.uint8)
    said: list[tuple[Any, ...]] = []

    def launched(*given: Any) -> tuple[int]:
        addresses = (ctypes.c_void_p * 2).from_address(given[9])
        values = [ctypes.c_uint64.from_address(address or 0).value for address in addresses]
        said.append(("launch", *given[:9], values, *given[10:]))
        return (0 if given[1] < 1 << 31 else 1,)

    def copied(*args: Any) -> tuple[int]:
        said.append(("copy", *args))
        return (0 if args[2] < 64 else 2,)

    gives: dict[str, Any] = {
        "core.Device().arch": "90",
        "core.Device().allocate().handle": 4096,
        "core.Device().create_stream().handle": 77,
        "core.LegacyPinnedMemoryResource().allocate().handle": pinned.ctypes.data,
        "sm_90.get_kernel().handle": 9,
        "driver.CUfunction": lambda handle: 100 * handle,
        "driver.cuLaunchKernel": launched,
        "driver.CUresult": types.SimpleNamespace(CUDA_SUCCESS=0),
        "driver.cuMemcpyAsync": copied,
    }
    monkeypatch.setitem(sys.modules, "cuda.core", Recorder(said, "core", gives))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", Recorder(said, "driver", gives))
    monkeypatch.setattr(driver, "compile_for", lambda arch: Recorder(said, arch, gives))
    monkeypatch.setattr(driver, "_programs", {})
    device = driver.CudaDevice(3, stream=55)
    assert ("core.Device", 3) in said
    assert ("core.Device().set_current",) in said
    stream = next(call[1] for call in said if call[0] == "core.Device().create_stream")
    assert stream.__cuda_stream__() == (0, 55)
    assert device.allocate(100).address == 4096
    host = device.pin(64)
    host.bytes[:] = 9
    assert pinned.tolist() == [9] * 64
    device.copy(1, 2, 3)
    device.copy(1, 2, 0)
    assert [call for call in said if call[0] == "copy"] == [("copy", 1, 2, 3, 77)]
    with pytest.raises(EngineError, match="a copy of 64 bytes failed"):
        device.copy(1, 2, 64)
    for given in ([1 << 40, 2], [7, 8]):
        device.launch("any_4", 5, given)
    assert [call for call in said if call[0] == "launch"] == [
        ("launch", 900, 5, 1, 1, 128, 1, 1, 0, 77, [1 << 40, 2], 0),
        ("launch", 900, 5, 1, 1, 128, 1, 1, 0, 77, [7, 8], 0),
    ]
    assert said.count(("sm_90.get_kernel", "any_4")) == 1
    with pytest.raises(EngineError, match="a launch of any_4 failed"):
        device.launch("any_4", 1 << 31, [1, 2])

    def out_of_memory(*_: object, **__: object) -> None:
        raise ValueError("CUDA_ERROR_OUT_OF_MEMORY:\n  no memory")  # the driver's class is not public

    for call, words in (("Device()", "on the device"), ("LegacyPinnedMemoryResource()", "of pinned memory")):
        with monkeypatch.context() as patch:
            patch.setitem(gives, f"core.{call}.allocate", out_of_memory)
            allocate = device.allocate if call == "Device()" else device.pin
            with pytest.raises(
                EngineError, match=f"100 bytes {words} failed: CUDA_ERROR_OUT_OF_MEMORY: no memory"
            ):
                allocate(100)
    device.mark().wait()
    assert said[-2:] == [
        ("core.Device().create_stream().record",),
        ("core.Device().create_stream().record().sync",),
    ]


def test_one_process_compiles_the_host_library_while_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_library(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        made = Path(command[-1])
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(made.with_suffix(".lock"), timeout=0).acquire()
        made.write_bytes(b"library")
        compiled.append(made)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", compile_library)
    assert shim.build(folder=tmp_path) == shim.build(folder=tmp_path)
    assert shim.build(folder=tmp_path).read_bytes() == b"library"
    assert len(compiled) == 1
