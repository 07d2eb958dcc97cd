"""Decodes and multiplies a tensor of a file on a device: for tests, fuzzing and measurements."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sfpformat.coding.bits import Bytes
from sfpformat.container.entry import TensorEntry
from sfpformat.decode.reader import SfpFile
from sfpformat.engines.cuda.device import Device, Memory
from sfpformat.engines.cuda.on_device import hold
from sfpformat.engines.cuda.pinned_loading import Queue
from sfpformat.engines.cuda.product import Product, make_product
from sfpformat.engines.cuda.recipe import make_recipe
from sfpformat.engines.cuda.resident import Placed
from sfpformat.engines.device_interface import Operands

NUMPY: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
# Maximum relative rounding error.
ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
# Bound on the error of a sum of products on tensor cores, relative to the sum of their magnitudes: tensor
# cores accumulate 16 products at a time, with 24 bits, and truncate some of them.
SUMMING = 2.0**-15


def put(device: Device, raw: bytes | Bytes) -> Memory:
    """Copies bytes to new device memory, and waits."""
    memory, staging = device.allocate(len(raw)), device.pin(len(raw))
    staging.bytes[:] = np.frombuffer(raw, np.uint8)
    device.copy(memory.address, staging.address, len(raw))
    device.mark().wait()
    return memory


def fetch(device: Device, memory: Memory, size: int) -> bytes:
    """Copies bytes from device memory, after all work in the queue."""
    staging = device.pin(size)
    device.copy(staging.address, memory.address, size)
    device.mark().wait()
    return staging.bytes.tobytes()


class OnDevice:
    """A tensor whose concatenated chunks are on a device.

    Attributes:
        entry: the tensor's entry.
        device: the queue of the device.
        kernel: the name of the kernel that decodes it.
        resident: the tensor on the device.
        out: device memory for its weights.
    """

    def __init__(
        self, file: SfpFile, entry: TensorEntry, device: Device, chunks: bytes | None = None
    ) -> None:
        """Copies the tensor's chunks, or ``chunks`` instead, to the device."""
        self.entry, self.device = entry, device
        self._vectors = file.decoder(entry).vectors
        recipe = make_recipe(entry, self._vectors)
        assert recipe is not None
        self.kernel, self._queue = recipe.kernel, Queue(device, lambda: device)
        if chunks is None:
            wanted = [(entry, k) for k in range(len(entry.chunks))]
            chunks = b"".join(chunk.tobytes() for chunk in file.read_chunks(wanted))
        self._chunks = put(device, chunks)
        self.resident = hold(self._queue, recipe, entry, self._chunks.address)
        self.out = device.allocate(entry.decoded_bytes)

    def overwrite(self, chunks: bytes | Bytes) -> None:
        """Overwrites the chunks on the device with others of the same size."""
        staging = self.device.pin(len(chunks))
        staging.bytes[:] = np.frombuffer(chunks, np.uint8)
        self.device.copy(self._chunks.address, staging.address, len(chunks))
        self.device.mark().wait()

    def decode(self) -> None:
        """Enqueues decoding to `out`."""
        self.resident.decode(self._queue, self.out.address)

    def weights(self) -> bytes | None:
        """Decodes and returns the weights; None if a segment is invalid."""
        good = self.resident.is_good(self._queue, self.out.address)
        return fetch(self.device, self.out, self.entry.decoded_bytes) if good else None

    def place(self, compute: str) -> Placed | None:
        """Prepares the tensor for products in a dtype; None if unsupported, or if the tensor is invalid."""
        product = make_product(self.entry, self._vectors, compute, compute)
        return None if product is None else self.place_for(product)

    def place_for(self, product: Product) -> Placed | None:
        """Prepares the tensor for a product; None if the tensor is invalid."""
        return self.resident.place(self._queue, product)


class Multiplication:
    """A product whose operands are on the device; it can be computed repeatedly."""

    def __init__(self, device: Device, placed: Placed, x: NDArray[Any], bias: NDArray[Any] | None) -> None:
        """Copies the operands to the device.

        Args:
            device: the queue of the device.
            placed: the prepared matrix.
            x: [batch, columns].
            bias: [rows], or None.
        """
        self._device, self._placed, self._dtype = device, placed, x.dtype
        self._queue = Queue(device, lambda: device)
        self._shape = len(x), placed.product.rows
        self._x, self._done = put(device, x.tobytes()), put(device, bytes(4 * placed.product.blocks))
        self._bias = None if bias is None else put(device, bias.tobytes())
        self._y = put(device, b"\xff" * (x.itemsize * len(x) * placed.product.rows))  # NaNs
        bias_at = 0 if self._bias is None else self._bias.address
        self._sums = device.allocate(placed.product.sums_bytes(len(x)))
        self._operands = Operands(
            self._x.address, bias_at, self._y.address, len(x), self._sums.address, self._done.address
        )

    def start(self) -> None:
        """Enqueues the product."""
        self._placed.multiply(self._queue, self._operands)

    def result(self) -> NDArray[Any]:
        """Computes the product, waits, and returns it: [batch, rows]."""
        self.start()
        raw = fetch(self._device, self._y, int(np.prod(self._shape)) * self._dtype.itemsize)
        return np.frombuffer(raw, self._dtype).reshape(self._shape)


def excess(found: NDArray[Any], x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None) -> float:
    """Returns the error of a product beyond rounding, relative to the sum of the products' magnitudes.

    Args:
        found: [batch, rows], the product in its dtype.
        x: [batch, columns].
        weight: [rows, columns], the decoded weights.
        bias: [rows], or None.
    """
    wide, matrix = x.astype(np.float64), weight.astype(np.float64)
    exact, size = wide @ matrix.T, np.abs(wide) @ np.abs(matrix).T
    if bias is not None:
        exact, size = exact + bias.astype(np.float64), size + np.abs(bias.astype(np.float64))
    name = next(name for name, dtype in NUMPY.items() if found.dtype == np.dtype(dtype))
    off = np.abs(found.astype(np.float64) - exact) - ROUNDING[name] * np.abs(exact)
    return float(np.nanmax(np.where(np.isnan(off), np.inf, off / np.maximum(size, 1e-300)), initial=0))
