"""Implements `device.Device` with ``cuda.core``. The only module that calls CUDA."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from ...coding.bits import Bytes, as_bytes
from ...errors import EngineError
from . import layout
from .device import Mark
from .kernel_source import source

_HOW_TO_INSTALL = "{}; pip install 'sfpformat[cuda]'"
OLDEST_PACKAGE = (1, 2)  # version of cuda-core: earlier versions have another namespace and other names
OLDEST_DEVICE = (7, 5)  # compute capability: NVRTC 13 does not compile for older ones
STANDARD = "c++17"  # C++ standard of the kernels' source
_LEGACY = 1  # handle of the default stream, which torch calls 0


def why_not() -> str | None:
    """Returns why CUDA is unavailable, or None. Queries the driver once, and runs nothing on a device."""
    return why_no_package() or _why_no_device() or _why_no_compiler()


def why_no_package() -> str | None:
    """Returns why the package cuda-core is unavailable, or None."""
    if importlib.util.find_spec("cuda") is None:
        return _HOW_TO_INSTALL.format("cuda-core is not installed")
    try:
        found = _version_of_package()
    except importlib.metadata.PackageNotFoundError:
        return _HOW_TO_INSTALL.format("cuda-core is not installed")
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < OLDEST_PACKAGE:
        needed = ".".join(map(str, OLDEST_PACKAGE))
        return _HOW_TO_INSTALL.format(f"cuda-core {found} is too old, {needed} or later is needed")
    return None


@cache
def _version_of_package() -> str:
    """Returns the version of cuda-core. Cached, because the look-up takes most of a millisecond."""
    return importlib.metadata.version("cuda-core")


@cache
def _why_no_device() -> str | None:
    try:
        core = importlib.import_module("cuda.core")
        devices = core.Device.get_all_devices()
    except Exception as error:  # no package, no driver, no device: each raises another class
        return f"no CUDA driver or device: {' '.join(str(error).split())}"
    if not devices:
        return "there is no CUDA device"
    best = max(tuple(device.compute_capability) for device in devices)
    if best < OLDEST_DEVICE:
        major, minor = OLDEST_DEVICE
        found = ".".join(map(str, best))
        return f"the device is too old: compute capability {found}, at least {major}.{minor} is needed"
    return None


@cache
def _why_no_compiler() -> str | None:
    try:
        importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    except Exception as error:  # the library is missing or cannot be loaded
        return _HOW_TO_INSTALL.format(f"no NVRTC, which compiles the kernels: {' '.join(str(error).split())}")
    return None


def compile_for(arch: str) -> Any:
    """Compiles the kernels for an architecture to an `ObjectCode`. Uses a cache on disk. Needs no driver.

    Args:
        arch: the architecture, such as ``"sm_90"``.
    """
    core, utils = importlib.import_module("cuda.core"), importlib.import_module("cuda.core.utils")
    program = core.Program(source(), "c++", core.ProgramOptions(arch=arch, std=STANDARD))
    try:
        with utils.FileStreamProgramCache() as kept:
            return program.compile("cubin", cache=kept)
    except OSError:  # no home folder or no space: no cache
        return program.compile("cubin")


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Raises EngineError for an exception of cuda-core, whose classes are not public."""
    try:
        yield
    except Exception as error:
        raise EngineError(f"{what} failed: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class _Memory:
    address: int
    owner: Any  # frees the memory in stream order, with its last reference


@dataclass(frozen=True)
class _HostMemory:
    address: int
    bytes: Bytes
    owner: Any


@dataclass(frozen=True)
class _Mark:
    event: Any

    def wait(self) -> None:
        with _reported("work on the device"):
            self.event.sync()


def pointers_to(values: ctypes.Array[ctypes.c_uint64]) -> ctypes.Array[ctypes.c_void_p]:
    """Returns the addresses of values, in the form that a launch requires."""
    at, size = ctypes.addressof(values), ctypes.sizeof(ctypes.c_uint64)
    return (ctypes.c_void_p * len(values))(*[at + i * size for i in range(len(values))])


class _Kernel:
    """A kernel, and memory for its arguments, which the driver reads before a launch returns.

    Attributes:
        function: the driver's handle.
        values: the arguments. A kernel reads only the low bytes of each, as many as the parameter has.
        addresses: address of the array of pointers to the values.
    """

    def __init__(self, function: Any, arguments: int) -> None:
        self.function = function
        self.values = (ctypes.c_uint64 * arguments)()
        self._pointers = pointers_to(self.values)
        self.addresses = ctypes.addressof(self._pointers)


@dataclass(frozen=True)
class _Stream:
    """A foreign stream, in the protocol of cuda.core."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class CudaDevice:
    """A stream of a CUDA device. Not thread-safe: the device is made current for one thread only."""

    def __init__(self, number: int = 0, stream: int | None = None) -> None:
        """Makes the device current for the calling thread.

        Args:
            number: the number of the device.
            stream: the handle of a foreign stream, such as torch's; None creates a new stream.

        Raises:
            EngineError: a call of CUDA failed, as in all functions of this class.
        """
        self._core = importlib.import_module("cuda.core")
        self._driver = importlib.import_module("cuda.bindings.driver")
        with _reported(f"the start of CUDA device {number}"):
            self._device = self._core.Device(number)
            self._device.set_current()
            foreign = None if stream is None else _Stream(stream or _LEGACY)
            self._stream = self._device.create_stream(foreign)
        self._handle = self._stream.handle
        self._good = self._driver.CUresult.CUDA_SUCCESS
        self._kernels: dict[str, _Kernel] = {}
        self._pinned = self._core.LegacyPinnedMemoryResource()
        self._program = program_of(number, f"sm_{self._device.arch}")

    def allocate(self, size: int) -> _Memory:
        """Implements `Device`."""
        with _reported(f"an allocation of {size} bytes on the device"):
            buffer = self._device.allocate(max(size, 1), stream=self._stream)
        return _Memory(int(buffer.handle), buffer)

    def pin(self, size: int) -> _HostMemory:
        """Implements `Device`."""
        with _reported(f"an allocation of {size} bytes of pinned memory"):
            buffer = self._pinned.allocate(max(size, 1))
        memory = (ctypes.c_ubyte * max(size, 1)).from_address(int(buffer.handle))
        return _HostMemory(int(buffer.handle), as_bytes(memoryview(memory).cast("B")), buffer)

    def copy(self, to: int, source: int, size: int) -> None:
        """Implements `Device`."""
        if size:
            (error,) = self._driver.cuMemcpyAsync(to, source, size, self._handle)
            if error != self._good:
                raise EngineError(f"a copy of {size} bytes failed: {error!r}")

    def launch(self, kernel: str, blocks: int, arguments: Sequence[int]) -> None:
        """Implements `Device`."""
        own = self._kernels.get(kernel)
        if own is None:
            handle = self._program.get_kernel(kernel).handle
            own = self._kernels[kernel] = _Kernel(self._driver.CUfunction(int(handle)), len(arguments))
        own.values[:] = [*arguments]
        # Not `cuda.core.launch`, which rebuilds constant objects for every launch.
        (error,) = self._driver.cuLaunchKernel(
            own.function, blocks, 1, 1, layout.THREADS, 1, 1, 0, self._handle, own.addresses, 0
        )
        if error != self._good:
            raise EngineError(f"a launch of {kernel} failed: {error!r}")

    def mark(self) -> _Mark:
        """Implements `Device`."""
        with _reported("work on the device"):
            return _Mark(self._stream.record())

    def wait_for(self, mark: Mark) -> None:
        """Implements `Device`."""
        assert isinstance(mark, _Mark)
        with _reported("work on the device"):
            self._stream.wait(mark.event)


_programs: dict[int, Any] = {}
_compiling = threading.Lock()


def program_of(number: int, arch: str) -> Any:
    """Returns the kernels for a device, compiled once per process."""
    with _compiling:
        if number not in _programs:
            _programs[number] = compile_for(arch)
        return _programs[number]
