"""The interface of engines for the memory of a device: their functions, and the types of the arguments."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import Bytes
from ..coding.changes import ElementKind
from ..coding.exact_encoding import Patterns
from ..coding.quantisers import F32
from ..container.entry import TensorEntry

# A run of segments of a resident tensor: chunk, first segment in it, one past the last, output offset in
# bytes.
ResidentRun = tuple[int, int, int, int]


class Content(Enum):
    """What a device decodes of a tensor, with the bytes of an element; None: those of the tensor's dtype."""

    WEIGHTS = None
    MASK = 1  # bool
    IMPORTANCE = 4  # float32, 0 at pruned positions that have none


class Pending(Protocol):
    """A batch of runs that a device decodes."""

    def good(self) -> list[bool]:
        """Waits. Returns for each run whether the memory holds its weights; see `Engine.decode_runs`."""


class DeviceRun(NamedTuple):
    """A run of neighbouring segments of a chunk that is not in memory yet.

    Attributes:
        recipe: the tensor's recipe, from `DeviceEngine.make_recipe`.
        length: bytes of the chunk, at least 64.
        total, start, first, stop: as of `Run`.
        out: the address of the run's elements on the device, a multiple of 4.
    """

    recipe: Any
    length: int
    total: int
    start: int
    first: int
    stop: int
    out: int


class DeviceBatch(Protocol):
    """Runs whose chunks the caller reads into memory from which the device copies.

    Attributes:
        places: memory for the chunk of each run, of its length.
    """

    @property
    def places(self) -> Sequence[Bytes]: ...

    def start(self) -> Pending:
        """Copies the chunks to the device, and begins to decode them.

        The places must hold chunks whose checksums have been compared, and must not change any more. The
        caller may release the memory of the elements after `Pending.good`.
        """


class DeviceQueue(Protocol):
    """A stream of a device, for decoding into its memory. Not thread-safe.

    Attributes:
        depth: the greatest number of batches that may be pending.
    """

    @property
    def depth(self) -> int: ...

    def prepare(self, recipes: Sequence[Any]) -> None:
        """Copies recipes to the device, all in one copy; must precede their runs."""

    def plan_runs(self, runs: Sequence[DeviceRun]) -> DeviceBatch:
        """Returns a batch of runs, whose recipes must be prepared.

        Fewer than `depth` batches may be pending. A batch that is not started ends with the next call.
        """

    def abandon(self) -> None:
        """Waits until no copy and no kernel is running; pending batches are lost. For use after an error."""


class Operands(NamedTuple):
    """Device addresses of the operands and of the result of a product, in its dtype.

    Attributes:
        x: [batch, columns], at a multiple of 16.
        bias: [rows], or 0 for no bias.
        y: [batch, rows], the result.
        batch: number of rows of x, at least 1.
        sums: scratch memory of `Product.sums_bytes`; contents undefined before and after the product. 0 if
            the product needs none.
        done: a 32-bit word for each of `Product.blocks`; zero before and after the product.
    """

    x: int
    bias: int
    y: int
    batch: int
    sums: int
    done: int


class Product(Protocol):
    """The data that kernels need for products with a matrix, for one dtype of the activations.

    Attributes:
        rows, columns: of the matrix.
        blocks: number of counters that the kernels need.
    """

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...

    @property
    def blocks(self) -> int: ...

    def sums_bytes(self, batch: int) -> int:
        """Returns the bytes of scratch memory for ``batch`` rows of x."""


class ResidentMatrix(Protocol):
    """A matrix on a device that is prepared for multiplication."""

    @property
    def product(self) -> Product: ...

    def multiply(self, queue: Any, operands: Operands) -> None:
        """Enqueues y = x @ matrix.T + bias."""


class ResidentTensor(Protocol):
    """A tensor whose chunks stay on a device. ``queue`` is a `DeviceQueue` of that device."""

    def decode(self, queue: Any, out: int) -> None:
        """Enqueues decoding of all weights to an address, a multiple of 16."""

    def is_good(self, queue: Any, out: int) -> bool:
        """Decodes and waits. Returns whether every segment is valid; if not, the weights are undefined."""

    def decode_runs(self, queue: Any, runs: Sequence[ResidentRun], out: int) -> bool:
        """Decodes runs of segments and waits. Returns whether all are valid."""

    def place(self, queue: Any, product: Any) -> ResidentMatrix | None:
        """Prepares the tensor for a `Product`, and waits. None if a segment is invalid."""


class DevicePart(NamedTuple):
    """Consecutive elements of a tensor in the memory of a device.

    Attributes:
        address: the address of the first element, a multiple of the bytes per element.
        elements: the number of elements, at least 1.
        is_changed: whether `DeviceChanges.flip` changes them. Of tensors that share memory, one is changed.
        is_bool: whether the checksum is that of 1 for each byte that is not 0.
    """

    address: int
    elements: int
    is_changed: bool = True
    is_bool: bool = False


class DeviceBlock(NamedTuple):
    """A block of a pool (SPEC.md chapter 28) in the memory of a device.

    Attributes:
        parts: its parts, in the order of elements.
        counts: see `coding.changes.open_buckets`, int64 [keys]. None if nothing changes.
        gaps, levels: the block's gaps and levels.
    """

    parts: Sequence[DevicePart]
    counts: NDArray[np.int64] | None
    gaps: NDArray[np.uint32]
    levels: Patterns


class Misfit(Enum):
    """Why the changes of a block do not fit the elements (R-DLT-011)."""

    FEWER = "a dense bucket has fewer levels than elements"
    LEFT = "a bucket has levels left after its last element"


class CheckedBlock(NamedTuple):
    """The checks of a block.

    Attributes:
        bases, results: CRC-32 of each part before and after the changes; undefined after, with a misfit.
        misfit: why the changes do not fit, or None.
    """

    bases: list[int]
    results: list[int]
    misfit: Misfit | None


class PlacedChanges(Protocol):
    """Changes of elements, of which places and bits are known. They are in the memory of a device.

    Attributes:
        nbytes: bytes of memory.
    """

    @property
    def nbytes(self) -> int: ...


class PendingBlocks(Protocol):
    """Blocks that a device checks."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory on the device."""

    def wait(self) -> tuple[list[CheckedBlock], PlacedChanges | None]:
        """Waits. Returns the checks of each block, and their changes; None if nothing changes."""


class DeviceChanges(Protocol):
    """Applies the changes of a delta to elements in the memory of a device. Not thread-safe.

    The functions join the queue of the stream, and only those whose documentation says so wait for it.
    """

    def checksums(self, parts: Sequence[DevicePart], item: int) -> list[int]:
        """Waits. Returns the CRC-32 of each part. ``item``: bytes per element."""

    def start(self, blocks: Sequence[DeviceBlock], kind: ElementKind) -> PendingBlocks:
        """Begins to compute checksums of blocks, and to find their changes. Changes nothing."""

    def bytes_of(self, block: DeviceBlock, kind: ElementKind) -> int:
        """Returns the bytes of memory on the device that `start` needs for a block."""

    def flip(self, changes: PlacedChanges) -> None:
        """Makes changes that were not made, or restores the elements if they were."""

    def fetch(self, changes: PlacedChanges) -> Bytes:
        """Waits. Returns changes as bytes, for `put` in the same process."""

    def put(self, data: Bytes) -> PlacedChanges:
        """Copies bytes from `fetch` to the device, and waits."""

    def finish(self) -> None:
        """Waits for everything in the queue."""


class DeviceEngine(Protocol):
    """The functions of an engine that decodes into the memory of a device."""

    def open_changes(self, number: int, stream: int) -> DeviceChanges:
        """Opens a queue for changes of elements, for the calling thread; same arguments as `open_queue`."""

    def open_queue(self, number: int, stream: int) -> DeviceQueue:
        """Opens a queue for the calling thread.

        Args:
            number: the number of the device.
            stream: the handle of the stream that decodes; other work on it sees the weights.
        """

    def make_recipe(
        self, entry: TensorEntry, vectors: dict[str, F32], content: Content = Content.WEIGHTS
    ) -> Any:
        """Returns the data that a queue needs to decode a tensor; None if the CPU has to decode it.

        Args:
            entry: the tensor's entry; it must have the content.
            vectors: the checked vectors of its vector chunk.
            content: what is decoded.
        """

    def hold(self, queue: Any, recipe: Any, entry: TensorEntry, at: int) -> ResidentTensor:
        """Returns a tensor whose chunks stay on the device.

        Args:
            queue: a `DeviceQueue` of the device.
            recipe: the tensor's recipe.
            entry: the tensor's entry; the tensor must not be empty.
            at: address of its first chunk, a multiple of 16; the memory must outlive the result, unchanged.
        """

    def make_product(
        self, entry: TensorEntry, vectors: dict[str, F32], dtype: str, compute: str, capability: Sequence[int]
    ) -> Product | None:
        """Returns the data for products with a matrix; None if no kernel supports them.

        Args:
            entry: the tensor's entry.
            vectors: the checked vectors of its vector chunk.
            dtype: the dtype that decoded weights are converted to, by its name in the format.
            compute: the dtype of x, which the converted weights are then converted to.
            capability: compute capability of the device: the major and the minor version.
        """
