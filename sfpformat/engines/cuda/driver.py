"""The device behind ``cuda.core``: the only module that talks to CUDA."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ...coding.bits import Bytes, as_bytes
from . import layout
from .device import Mark
from .source import source

_HOW_TO_INSTALL = "{}; pip install 'sfpformat[cuda]'"
OLDEST_PACKAGE = (1, 2)  # of cuda-core: before, the namespace and some names were others
OLDEST_DEVICE = (7, 5)  # compute capability: older ones NVRTC 13 does not compile for
STANDARD = "c++17"  # of the kernels' source
_LEGACY = 1  # a handle that names the default stream, which torch calls 0


def why_not() -> str | None:
    """Why CUDA cannot be used here, or None. Asks the driver once, and starts nothing on a device."""
    return why_no_package() or _why_no_device() or _why_no_compiler()


def why_no_package() -> str | None:
    """Why the package that is needed is not there, or None."""
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
    """That of cuda-core. Looked up once where it is there: that takes most of a millisecond."""
    return importlib.metadata.version("cuda-core")


@cache
def _why_no_device() -> str | None:
    try:
        core = importlib.import_module("cuda.core")
        devices = core.Device.get_all_devices()
    except Exception as error:  # ImportError, no driver, no device: each has a class of its own
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
    except Exception as error:  # the library is not there, or cannot be loaded
        return _HOW_TO_INSTALL.format(f"no NVRTC, which compiles the kernels: {' '.join(str(error).split())}")
    return None


def compile_for(arch: str) -> Any:
    """The kernels for an architecture, an `ObjectCode`; from a cache on disk where they were compiled before.

    Needs no driver.

    Args:
        arch: such as ``"sm_90"``.
    """
    core, utils = importlib.import_module("cuda.core"), importlib.import_module("cuda.core.utils")
    program = core.Program(source(), "c++", core.ProgramOptions(arch=arch, std=STANDARD))
    try:
        with utils.FileStreamProgramCache() as kept:
            return program.compile("cubin", cache=kept)
    except OSError:  # no home, no room: compiled for this process alone
        return program.compile("cubin")


@dataclass(frozen=True)
class _Memory:
    address: int
    owner: Any  # frees it, in the order of its stream, when it is let go of


@dataclass(frozen=True)
class _HostMemory:
    address: int
    bytes: Bytes
    owner: Any


@dataclass(frozen=True)
class _Mark:
    event: Any

    def wait(self) -> None:
        self.event.sync()


def pointers_to(values: ctypes.Array[ctypes.c_uint64]) -> ctypes.Array[ctypes.c_void_p]:
    """The addresses of some values, as launches want them."""
    at, size = ctypes.addressof(values), ctypes.sizeof(ctypes.c_uint64)
    return (ctypes.c_void_p * len(values))(*[at + i * size for i in range(len(values))])


class _Kernel:
    """A kernel, and memory for what it is given: the driver reads that before a launch comes back.

    Attributes:
        function: the driver's.
        values: of its arguments. A kernel takes as many bytes of each as its argument has, the lower ones.
        addresses: where the addresses of the values are.
    """

    def __init__(self, function: Any, arguments: int) -> None:
        self.function = function
        self.values = (ctypes.c_uint64 * arguments)()
        self._pointers = pointers_to(self.values)
        self.addresses = ctypes.addressof(self._pointers)


@dataclass(frozen=True)
class _Stream:
    """What cuda.core takes for a stream of somebody else's."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class CudaDevice:
    """A stream of a CUDA device. For one thread: each has a context of its own."""

    def __init__(self, number: int = 0, stream: int | None = None) -> None:
        """Makes the device current for the calling thread.

        Args:
            number: of the device.
            stream: the handle of a stream of somebody else's, such as torch's; None makes a new one.
        """
        self._core = importlib.import_module("cuda.core")
        self._driver = importlib.import_module("cuda.bindings.driver")
        self._device = self._core.Device(number)
        self._device.set_current()
        self._stream = self._device.create_stream(None if stream is None else _Stream(stream or _LEGACY))
        self._handle = self._stream.handle
        self._good = self._driver.CUresult.CUDA_SUCCESS
        self._kernels: dict[str, _Kernel] = {}
        self._pinned = self._core.LegacyPinnedMemoryResource()
        self._program = program_of(number, f"sm_{self._device.arch}")

    def allocate(self, size: int) -> _Memory:
        """See `Device`."""
        buffer = self._device.allocate(max(size, 1), stream=self._stream)
        return _Memory(int(buffer.handle), buffer)

    def pin(self, size: int) -> _HostMemory:
        """See `Device`."""
        buffer = self._pinned.allocate(max(size, 1))
        memory = (ctypes.c_ubyte * max(size, 1)).from_address(int(buffer.handle))
        return _HostMemory(int(buffer.handle), as_bytes(memoryview(memory).cast("B")), buffer)

    def copy(self, to: int, source: int, size: int) -> None:
        """See `Device`."""
        if size:
            (error,) = self._driver.cuMemcpyAsync(to, source, size, self._handle)
            if error != self._good:
                raise RuntimeError(f"a copy of {size} bytes failed: {error!r}")

    def launch(self, kernel: str, blocks: int, arguments: Sequence[int]) -> None:
        """See `Device`."""
        own = self._kernels.get(kernel)
        if own is None:
            handle = self._program.get_kernel(kernel).handle
            own = self._kernels[kernel] = _Kernel(self._driver.CUfunction(int(handle)), len(arguments))
        own.values[:] = [*arguments]
        # Not `cuda.core.launch`, which makes anew for every launch what stays the same.
        (error,) = self._driver.cuLaunchKernel(
            own.function, blocks, 1, 1, layout.THREADS, 1, 1, 0, self._handle, own.addresses, 0
        )
        if error != self._good:
            raise RuntimeError(f"a launch of {kernel} failed: {error!r}")

    def mark(self) -> _Mark:
        """See `Device`."""
        return _Mark(self._stream.record())

    def wait_for(self, mark: Mark) -> None:
        """See `Device`."""
        assert isinstance(mark, _Mark)
        self._stream.wait(mark.event)


_programs: dict[int, Any] = {}
_compiling = threading.Lock()


def program_of(number: int, arch: str) -> Any:
    """The kernels for a device, compiled once a process."""
    with _compiling:
        if number not in _programs:
            _programs[number] = compile_for(arch)
        return _programs[number]
