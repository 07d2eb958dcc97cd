"""Decodes tensors, masks and importances on their device, in memory allocated on torch's current stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from ..container.entry import TensorEntry
from ..decode.device_batches import Target, decode, recipe_of
from ..decode.reader import SfpFile, require_within_limits
from ..decode.shards import ShardedFile
from ..engines import DeviceEngine, DeviceQueue, get_device_engine
from ..engines.device_interface import Content
from .tensors import tensor_of, torch_dtype


def stream_of(device: torch.device) -> tuple[int, int]:
    """Returns the index of a CUDA device, and the handle of torch's current stream on it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(index).cuda_stream


def engine_of(device: torch.device) -> DeviceEngine:
    """Returns the engine that decodes on a device."""
    return get_device_engine(device.type)


# Context manager that makes a CUDA device the thread's current one.
current: Callable[[torch.device], AbstractContextManager[object]] = torch.cuda.device
_thread = threading.local()


@dataclass
class _Stream:
    """A thread's queue and counters for one of torch's streams; cached, because creating them is slow."""

    queue: DeviceQueue
    counters: torch.Tensor | None = None
    count: int = 0
    address: int = 0


def read_tensors(
    file: SfpFile | ShardedFile, names: Sequence[str], device: torch.device
) -> dict[str, torch.Tensor]:
    """Decodes whole tensors on the device that will hold them.

    Args:
        file: an open file.
        names: names of tensors whose dtypes torch supports.
        device: a device that has an engine (`is_decoded_on`).

    Raises:
        MissingTensorError, InvalidFileError, LimitError.
    """
    engine = engine_of(device)
    made: dict[str, torch.Tensor] = {}
    targets: list[Target] = []
    for name in dict.fromkeys(names):
        own = file.file_of(name)
        entry = own.entry(name)
        recipe = recipe_of(own, entry, engine)
        if recipe is None:
            made[name] = _decoded_by_cpu(own, name, device)
        else:
            made[name] = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype.name), device=device)
            targets.append(Target(own, entry, recipe, made[name].data_ptr()))

    def refused(target: Target) -> None:
        name = target.entry.name
        made[name].copy_(_decoded_by_cpu(target.file, name, device))

    if targets:
        with current(device):
            decode(targets, queue_of(device), refused)
    return made


def read_mask(file: SfpFile | ShardedFile, name: str, device: torch.device) -> torch.Tensor:
    """Decodes the mask of a tensor on a device that has an engine: bool, of the tensor's shape.

    Raises:
        MissingTensorError, InvalidFileError, LimitError.
    """
    own = file.file_of(name)
    entry = own.entry(name)
    if entry.mask is None:
        require_within_limits(own, entry)
        return torch.ones(entry.shape, dtype=torch.bool, device=device)
    made = _read_content(own, entry, device, Content.MASK)
    return tensor_of(own.get_mask(name)).to(device) if made is None else made


def read_importance(file: SfpFile | ShardedFile, name: str, device: torch.device) -> torch.Tensor | None:
    """Decodes the importance on a device that has an engine: float32, of the tensor's shape, or None.

    Raises:
        MissingTensorError, InvalidFileError, LimitError.
    """
    own = file.file_of(name)
    entry = own.entry(name)
    if entry.importance is None:
        return None
    made = _read_content(own, entry, device, Content.IMPORTANCE)
    if made is not None:
        return made
    importance = own.get_importance(name)
    assert importance is not None
    return tensor_of(importance).to(device)


def _read_content(
    file: SfpFile, entry: TensorEntry, device: torch.device, content: Content
) -> torch.Tensor | None:
    """Decodes mask or importance on the device; None if the CPU has to decode it, or raise the error."""
    recipe = recipe_of(file, entry, engine_of(device), content)
    if recipe is None:
        return None
    dtype = torch.bool if content is Content.MASK else torch.float32
    made = torch.empty(entry.shape, dtype=dtype, device=device)
    refused: list[Target] = []
    with current(device):
        target = Target(file, entry, recipe, made.data_ptr(), content)
        decode([target], queue_of(device), refused.append)
    return None if refused else made


def _decoded_by_cpu(file: SfpFile, name: str, device: torch.device) -> torch.Tensor:
    return tensor_of(file.get_tensor(name)).to(device)


def queue_of(device: torch.device) -> DeviceQueue:
    """Returns the calling thread's queue for torch's current stream."""
    return _stream(device).queue


def queue_and_counters_of(device: torch.device, count: int) -> tuple[DeviceQueue, int]:
    """Returns the calling thread's queue for torch's current stream, and the address of counters for it.

    The counters are ``count`` 32-bit words that are zero. Kernels must reset them to zero.
    """
    stream = _stream(device)
    if stream.count < count:
        stream.counters = torch.zeros(count, dtype=torch.int32, device=device)
        stream.count, stream.address = count, stream.counters.data_ptr()
    return stream.queue, stream.address


def _stream(device: torch.device) -> _Stream:
    index, handle = stream_of(device)
    streams: dict[tuple[str, int, int], _Stream] = _thread.__dict__.setdefault("streams", {})
    key = device.type, index, handle
    if key not in streams:
        streams[key] = _Stream(engine_of(device).open_queue(index, handle))
    return streams[key]
