"""Decodes tensors on the CUDA device that will hold them: compressed chunks are copied to the device.

Theory of operation: chunks are read in batches, their checksums are compared, and they are copied to pinned
memory. While the device decodes one batch, a separate queue copies the next one to the device, and the CPU
reads the one after that. Nothing is returned before every segment is verified. If the kernels refuse a
tensor, the CPU decodes it, which gives the tensor or raises the error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch

from ..coding.bits import Bytes
from ..container.entry import TensorEntry
from ..decode.reader import SfpFile
from ..decode.shards import ShardedFile
from ..decode.tensor import TensorDecoder
from ..engines.cuda.batch import Running, Task, fill_chunks, plan_batch, run_batch
from ..engines.cuda.device import Device, HostMemory
from ..engines.cuda.driver import CudaDevice
from ..engines.cuda.loaded import Recipes
from ..engines.cuda.recipe import Recipe, make_recipe
from ..errors import FileFault, placed
from .tensors import tensor_of, torch_dtype

# Bytes of chunks in one batch: large enough that launches and waits cost little. Three batches are pinned:
# the one being read, the one being copied, the one being decoded.
BATCH_BYTES = 32 << 20
_SLOTS = 3
_MOST_COPYING = 8  # threads that copy to pinned memory; more do not raise the bandwidth


def stream_of(device: torch.device) -> tuple[int, int]:
    """Returns the index of a CUDA device, and the handle of torch's current stream on it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(index).cuda_stream


# Opens a queue. Arguments: the index of a device, and the handle of the stream that the queue uses, or None
# for a new stream.
open_queue: Callable[[int, int | None], Device] = CudaDevice
# Context manager that makes a CUDA device the thread's current one.
current: Callable[[torch.device], AbstractContextManager[object]] = torch.cuda.device
_thread = threading.local()


@dataclass
class _Tensor:
    """A tensor that is decoded on the device."""

    file: SfpFile
    entry: TensorEntry
    recipe: Recipe
    out: torch.Tensor


@dataclass
class _Slot:
    """Pinned memory and the batch that uses it."""

    staging: HostMemory | None = None
    running: Running | None = None
    owners: list[_Tensor] = field(default_factory=list)  # the tensor of each task


def read_tensors(
    file: SfpFile | ShardedFile, names: Sequence[str], device: torch.device
) -> dict[str, torch.Tensor]:
    """Decodes whole tensors on a CUDA device.

    Args:
        file: an open file.
        names: names of tensors whose dtypes torch supports.
        device: a CUDA device.

    Raises:
        MissingTensorError, InvalidFileError, LimitError.
    """
    made: dict[str, torch.Tensor] = {}
    tensors: list[_Tensor] = []
    for name in names:
        own = file.file_of(name)
        entry = own.entry(name)
        with placed(tensor=name):
            own.limits.require_tensor(entry.decoded_bytes, entry.stored_bytes, own.preamble.directory_offset)
        recipe = _recipe_of(own, entry)
        if recipe is None:
            made[name] = _by_processor(own, name, device)
        else:
            made[name] = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype.name), device=device)
            tensors.append(_Tensor(own, entry, recipe, made[name]))
    if tensors:
        with current(device):
            loader_of(device).load(tensors)
    return made


def _recipe_of(file: SfpFile, entry: TensorEntry) -> Recipe | None:
    """Reads and checks a tensor's vectors and returns its recipe; None if the kernels cannot decode it."""
    if entry.fingerprints is None or not entry.positions:
        return None
    decoder: TensorDecoder = file.decoder(entry)
    return make_recipe(entry, decoder.vectors)


def _by_processor(file: SfpFile, name: str, device: torch.device) -> torch.Tensor:
    return tensor_of(file.get_tensor(name)).to(device)


def loader_of(device: torch.device) -> Loader:
    """Returns the calling thread's loader for torch's current stream. Cached, because pinning is slow."""
    index, stream = stream_of(device)
    loaders: dict[tuple[int, int], Loader] = _thread.__dict__.setdefault("loaders", {})
    if (index, stream) not in loaders:
        loaders[index, stream] = Loader(open_queue(index, stream), lambda: open_queue(index, None))
    return loaders[index, stream]


class Loader:
    """Decodes tensors with a queue on torch's stream, a queue for copies, and a ring of pinned buffers.

    Attributes:
        queue: the queue on torch's stream.
        recipes: the recipes that are loaded on the device.
    """

    def __init__(self, queue: Device, open_copying: Callable[[], Device]) -> None:
        self.queue = queue
        self.recipes = Recipes(queue)
        self._open_copying = open_copying
        self._slots = [_Slot() for _ in range(_SLOTS)]
        self._counters = torch.zeros(0, dtype=torch.int32)

    @cached_property
    def _copying(self) -> Device:
        return self._open_copying()

    def counters(self, count: int, device: torch.device) -> int:
        """Returns the address of `count` 32-bit words that are zero; kernels leave them zero."""
        if len(self._counters) < count:
            self._counters = torch.zeros(count, dtype=torch.int32, device=device)
        return self._counters.data_ptr()

    def load(self, tensors: Sequence[_Tensor]) -> None:
        """Decodes the tensors into their memory; returns when all are complete.

        After an exception, no copy and no kernel is still running.
        """
        try:
            self._load(tensors)
        except BaseException:
            self._copying.mark().wait()
            self.queue.mark().wait()
            self._slots = [_Slot() for _ in range(_SLOTS)]
            raise

    def _load(self, tensors: Sequence[_Tensor]) -> None:
        self.recipes.load([tensor.recipe for tensor in tensors])
        turn = 0
        for batch in _batches(tensors):
            slot = self._slots[turn % _SLOTS]
            self._settle(slot)
            try:
                data = _read(batch)
            except FileFault:
                self._settle_all(turn)  # an error in an earlier batch is raised first
                raise
            self._start(slot, batch, data)
            turn += 1
        self._settle_all(turn)

    def _settle_all(self, turn: int) -> None:
        """Settles all slots, oldest first."""
        for i in range(_SLOTS):
            self._settle(self._slots[(turn + i) % _SLOTS])

    def _start(self, slot: _Slot, batch: list[tuple[_Tensor, int]], data: list[Bytes]) -> None:
        """Copies the chunks of a batch to the device and starts to decode them."""
        tasks = []
        for (tensor, k), chunk in zip(batch, data, strict=True):
            entry = tensor.entry
            first, stop = entry.segments_of_chunk(k)
            start, total = entry.positions_of_chunk(k)
            at, out = (
                self.recipes.address(tensor.recipe),
                tensor.out.data_ptr() + start * entry.dtype.itemsize,
            )
            tasks.append(Task(tensor.recipe, at, chunk, total, start, 0, stop - first, out))
        plan = plan_batch(tasks)
        if slot.staging is None or len(slot.staging.bytes) < plan.size:
            slot.staging = self.queue.pin(plan.size + plan.size // 4)  # room for a slightly larger next batch
        fill_chunks(plan, slot.staging, min(torch.get_num_threads(), _MOST_COPYING))
        slot.running, slot.owners = (
            run_batch(self.queue, plan, slot.staging, self._copying),
            [tensor for tensor, _ in batch],
        )

    def _settle(self, slot: _Slot) -> None:
        """Waits for a slot's batch; the CPU decodes tensors that have a refused segment."""
        running, slot.running = slot.running, None
        if running is None:
            return
        good = running.good()
        for tensor in {id(o): o for o, fine in zip(slot.owners, good, strict=True) if not fine}.values():
            tensor.out.copy_(_by_processor(tensor.file, tensor.entry.name, tensor.out.device))


def _batches(tensors: Sequence[_Tensor]) -> Iterator[list[tuple[_Tensor, int]]]:
    """Yields the chunks of all tensors in order, in batches of at most `BATCH_BYTES` or one chunk."""
    batch: list[tuple[_Tensor, int]] = []
    left = BATCH_BYTES
    for tensor in tensors:
        for k, length in enumerate(tensor.entry.chunks["length"].tolist()):
            if batch and length > left:
                yield batch
                batch, left = [], BATCH_BYTES
            batch.append((tensor, k))
            left -= length
    if batch:
        yield batch


def _read(batch: list[tuple[_Tensor, int]]) -> list[Bytes]:
    """Reads the chunks of a batch and compares their checksums; chunks of one file are read in parallel."""
    data: list[Bytes] = []
    for _, some in groupby(batch, lambda item: id(item[0].file)):
        own = list(some)
        data += own[0][0].file.read_chunks([(tensor.entry, k) for tensor, k in own])
    return data
