"""Compiles the kernels with the host's compiler, and runs them on a simulated device, without a GPU.

Needs g++. The source is byte for byte the same as for a GPU; `host.h` replaces CUDA.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from sfpformat.coding.bits import Bytes
from sfpformat.engines.cuda import layout
from sfpformat.engines.cuda.device import Device, Mark
from sfpformat.engines.cuda.driver import pointers_to

HOST = Path(__file__).parent / "host"
SOURCE = Path(__file__).parents[1] / "source"
# -ffp-contract=off: the compiler must not fuse separate multiplications and additions.
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off"]
FLAGS += ["-fno-strict-aliasing", "-fPIC", "-shared"]
PLAIN = ["-O2"]
CHECKED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
CHECKED += ["-Wno-clobbered"]
# Environment that a process needs to load a library compiled with `CHECKED`.
CHECKED_ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=1"}
_ALIGNMENT = 256  # of allocations, same as CUDA
_GUARD = 64  # guard bytes before and after each allocation, to detect stray writes
_PATTERN = 0xA5
_INTACT = bytes([_PATTERN]) * _GUARD
_one_at_a_time = threading.Lock()  # the library has one set of fibers


def sources() -> list[Path]:
    """Returns the source files of the library."""
    return sorted(path for folder in (HOST, SOURCE) for path in folder.iterdir())


def build(options: Sequence[str] = PLAIN, folder: Path | None = None) -> Path:
    """Compiles the library, unless it is cached. Returns its path.

    Raises:
        RuntimeError: g++ is missing, or compilation fails.
    """
    text = b"".join(path.read_bytes() for path in sources())
    key = hashlib.sha256(text + repr([FLAGS, options]).encode()).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else "user"  # Windows has a temporary folder for each user
    place = folder or Path(tempfile.gettempdir()) / f"sfpformat-kernels-{user}"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    library = place / f"{key}.so"
    # Test processes that start together need the same library: one compiles it, the others wait.
    with FileLock(place / f"{key}.lock"):
        if not library.exists():
            _compile(options, library)
    return library


def _compile(options: Sequence[str], library: Path) -> None:
    """Compiles the library; the file is complete as soon as it exists."""
    made = library.with_suffix(".tmp")
    command = ["g++", *FLAGS, *options, f"-I{SOURCE}", str(HOST / "host.cpp"), "-o", str(made)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError("g++ is needed to compile the kernels for the host") from None
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    made.rename(library)


@cache
def load(path: Path) -> Any:
    """Loads the library and declares the types of its functions."""
    library: Any = ctypes.CDLL(str(path))
    library.launch.argtypes = [
        ctypes.c_char_p,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_void_p),
    ]
    library.round_number.argtypes = [ctypes.c_float, ctypes.c_uint]
    library.round_number.restype = ctypes.c_uint
    library.widen_pattern.argtypes = [ctypes.c_uint, ctypes.c_uint]
    library.widen_pattern.restype = ctypes.c_float
    return library


@cache
def _process() -> Any:
    """Returns the libraries loaded with the process, among them the address sanitiser."""
    return ctypes.CDLL(None)


@dataclass(frozen=True)
class HostMemory:
    """An allocation."""

    address: int
    bytes: Bytes


class _Block:
    """Memory between guards. The address sanitiser poisons the guards, or `require_guards` checks them."""

    def __init__(self, size: int, poison: bool) -> None:
        raw = np.full(size + 2 * _GUARD + _ALIGNMENT, _PATTERN, np.uint8)
        start = -(raw.ctypes.data + _GUARD) % _ALIGNMENT + _GUARD
        self.memory = HostMemory(raw.ctypes.data + start, raw[start : start + size])
        self._guards = raw[start - _GUARD : start], raw[start + size : start + size + _GUARD]
        self._poisoned = poison
        if poison:
            self._call_asan("__asan_poison_memory_region")

    def _call_asan(self, function: str) -> None:
        """Calls a function of the sanitiser for each guard."""
        for guard in self._guards:
            call = getattr(_process(), function)  # ctypes caches attributes, unlike items
            call(ctypes.c_void_p(guard.ctypes.data), ctypes.c_size_t(len(guard)))

    def close(self) -> None:
        """Unpoisons the guards and checks them a last time."""
        if self._poisoned:
            self._call_asan("__asan_unpoison_memory_region")
        self.require_guards()

    def require_guards(self) -> None:
        """Raises AssertionError if the guards were overwritten."""
        before, after = self._guards
        assert before.tobytes() == _INTACT, "written before the memory"
        assert after.tobytes() == _INTACT, "written after the memory"


class HostDevice:
    """A simulated device. It runs its queue only when the host waits, so that a missing wait shows.

    Attributes:
        launched: the names of the kernels, in launch order.
    """

    def __init__(
        self,
        library: Path | None = None,
        *,
        backwards: bool = False,
        poison: bool = False,
        at_once: bool = False,
    ) -> None:
        """Loads the library, by default that of `build`.

        Args:
            library: the path of the library.
            backwards: whether the last thread of a block runs first, and asynchronous copies of a kernel run
                only when it waits for them.
            poison: whether the address sanitiser is loaded and poisons the guards.
            at_once: whether work runs immediately, for users whose other work does not join the queue.
        """
        self._at_once = at_once
        self._poison = poison
        self._library = load(library or build())
        self._backwards = backwards
        self._queue: list[Callable[[], object]] = []
        self._blocks: dict[int, _Block] = {}
        self.launched: list[str] = []

    def allocate(self, size: int) -> HostMemory:
        """Implements `Device`."""
        block = _Block(size, self._poison)
        given = HostMemory(block.memory.address, block.memory.bytes)
        self._blocks[given.address] = block
        # Freeing memory joins the queue too.
        weakref.finalize(given, self._queue.append, partial(self._free, given.address)).atexit = False
        return given

    def _free(self, address: int) -> None:
        self._blocks.pop(address).close()

    pin = allocate

    def copy(self, to: int, source: int, size: int) -> None:
        """Implements `Device`."""
        self._enqueue(lambda: ctypes.memmove(to, source, size))

    def launch(self, kernel: str, blocks: int, arguments: Sequence[int]) -> None:
        """Implements `Device`."""
        held = (ctypes.c_uint64 * len(arguments))(*arguments)  # a kernel reads the low bytes
        self.launched.append(kernel)
        self._enqueue(lambda: self._run(kernel, blocks, held))

    def _enqueue(self, work: Callable[[], object]) -> None:
        self._queue.append(work)
        if self._at_once:
            self.finish()

    def _run(self, kernel: str, blocks: int, held: ctypes.Array[ctypes.c_uint64]) -> None:
        pointers = pointers_to(held)
        with _one_at_a_time:
            code = self._library.launch(kernel.encode(), blocks, layout.THREADS, self._backwards, pointers)
        if code:
            raise RuntimeError(
                f"{kernel}: {'no such kernel' if code == 1 else 'a barrier that not all reach'}"
            )

    def mark(self) -> HostMark:
        """Implements `Device`."""
        return HostMark(self)

    def wait_for(self, mark: Mark) -> None:
        """Implements `Device`."""
        self._enqueue(mark.wait)

    def finish(self) -> None:
        """Runs all queued work, and checks the guards."""
        while self._queue:
            self._queue.pop(0)()
        for block in () if self._poison else self._blocks.values():  # the sanitiser detects it earlier
            block.require_guards()


class HostMark:
    """The end of a `HostDevice`'s queue."""

    def __init__(self, device: HostDevice) -> None:
        self._device = device

    def wait(self) -> None:
        """Implements `Mark`."""
        self._device.finish()


def device_of(**options: Any) -> Callable[[int, int | None], Device]:
    """Returns a replacement for `sfpformat.engines.cuda.pinned_loading.open_device`."""
    return lambda number, stream: HostDevice(**options)
