"""Decodes many runs of segments, of any chunks and tensors, as one batch.

A batch is one copy to the device, a few launches, and one copy of the status words back.

Contents of the copy in, in this order: the chunks unchanged, the jobs, the warps of each kernel, and a zero
status word per job. A batch needs additional device memory for the index and the error words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...coding.bits import Bytes
from ..interface import Run
from . import layout
from .device import Device, HostMemory, Mark, Memory
from .loaded import Recipes
from .recipe import Recipe

_CHUNK_UNIT = 64


class OnDevice(NamedTuple):
    """A chunk that is already on the device: its address there, a multiple of 16, and its size in bytes."""

    address: int
    length: int


class Coming(NamedTuple):
    """A chunk that the caller reads into its place in the copied memory: its size in bytes."""

    length: int


class Task(NamedTuple):
    """A run of neighbouring segments of a chunk.

    Attributes:
        recipe: the tensor's recipe.
        at: address of the recipe on the device.
        data: all bytes of the chunk, whose checksum has been verified, or where it is.
        total: number of positions of the chunk.
        start: position in the tensor of the chunk's first position.
        first, stop: the first segment and one past the last, numbered within the chunk.
        out: device address for the run's weights, a multiple of 4.
    """

    recipe: Recipe
    at: int
    data: Bytes | OnDevice | Coming
    total: int
    start: int
    first: int
    stop: int
    out: int


def task_of(run: Run[Any], recipes: Recipes, out: int) -> Task:
    """Returns a run as a task that writes to a device address; its recipe must be among the loaded ones."""
    at = recipes.address(run.recipe)
    return Task(run.recipe, at, run.data, run.total, run.start, run.first, run.stop, out)


@dataclass(frozen=True)
class Plan:
    """The memory layout of a batch.

    Attributes:
        chunks: offset in the copied memory, and bytes, of each distinct chunk that is in memory.
        places: offset in the copied memory, and size, of each chunk that the caller reads.
        jobs: `layout.JOB`, one per task; ``data`` is an offset until `run_batch`, unless the chunk is already
            on the device; ``index`` and ``errors`` are offsets in words.
        parts: kernel -> `layout.PART`, `layout.WARPS` per block.
        jobs_at, status_at: offsets of the jobs and of the status words; the parts are between them.
        size: size in bytes of the copied memory.
        index_words, error_words: size in words of the index and of the error words on the device.
    """

    chunks: list[tuple[int, Bytes]]
    places: list[tuple[int, int]]
    jobs: NDArray[np.void]
    parts: dict[str, NDArray[np.void]]
    jobs_at: int
    status_at: int
    size: int
    index_words: int
    error_words: int


def plan_batch(tasks: Sequence[Task]) -> Plan:
    """Computes the layout of a batch. Does not access a device."""
    chunks: list[tuple[int, Bytes]] = []
    coming: list[tuple[int, int]] = []
    places: dict[int, int] = {}  # address of a chunk -> its offset
    jobs = np.zeros(len(tasks), layout.JOB)
    size = index_words = error_words = 0
    for job, task in zip(jobs, tasks, strict=True):
        if isinstance(task.data, OnDevice):
            job["data"], job["length"] = task.data
        elif isinstance(task.data, Coming):
            job["data"], job["length"] = size, task.data.length
            coming.append((size, task.data.length))
            size += _rounded(task.data.length)
        else:
            key = task.data.__array_interface__["data"][0]
            if key not in places:
                places[key] = size
                chunks.append((size, task.data))
                size += _rounded(len(task.data))
            job["data"], job["length"] = places[key], len(task.data)
        segments = -(-task.total // task.recipe.segment)
        job["out"], job["start"], job["recipe"] = task.out, task.start, task.at
        job["index"], job["errors"] = index_words, error_words
        job["total"], job["first"], job["stop"] = task.total, task.first, task.stop
        index_words += (1 + layout.ROWS_A_STREAM * task.recipe.streams) * (segments + 1)
        error_words += task.stop - task.first
    parts = _parts(tasks)
    jobs_at, size = size, size + jobs.nbytes
    size += sum(some.nbytes for some in parts.values())
    return Plan(chunks, coming, jobs, parts, jobs_at, size, size + 4 * len(tasks), index_words, error_words)


def _rounded(length: int) -> int:
    return -(-length // _CHUNK_UNIT) * _CHUNK_UNIT


def _parts(tasks: Sequence[Task]) -> dict[str, NDArray[np.void]]:
    """Returns the warps of each kernel.

    If the warps of a block share tables, each tensor begins a new block.
    """
    lists: dict[str, list[NDArray[np.void]]] = {}
    counts: dict[str, int] = {}
    last: dict[str, int] = {}  # kernel -> address of the recipe of its last warp
    for number, task in enumerate(tasks):
        kernel = task.recipe.kernel
        warps = -(-(task.stop - task.first) // task.recipe.warp_segments)
        own = np.zeros(warps, layout.PART)
        own["job"], own["group"] = number, np.arange(warps)
        count = counts.get(kernel, 0)
        if task.recipe.shares_tables and last.get(kernel, task.at) != task.at:
            lists[kernel].append(_idle(-count % layout.WARPS))
            count += -count % layout.WARPS
        lists.setdefault(kernel, []).append(own)
        counts[kernel], last[kernel] = count + warps, task.at
    return {
        kernel: np.concatenate([*some, _idle(-counts[kernel] % layout.WARPS)])
        for kernel, some in lists.items()
    }


def _idle(count: int) -> NDArray[np.void]:
    """Returns idle warps, which fill a block."""
    return np.full(count, np.array((layout.IDLE, 0), layout.PART))


@dataclass
class Running:
    """A running batch.

    Attributes:
        mark: the end of the batch in the queue.
        status: the status words, in pinned memory; valid after `mark`.
        errors: the error words of all segments, on the device.
        kept: memory that must not be freed before `mark`.
    """

    mark: Mark
    status: NDArray[np.uint32]
    errors: Memory
    kept: list[Memory]

    def good(self) -> list[bool]:
        """Waits for the batch. Returns for each task whether its weights were decoded."""
        self.mark.wait()
        self.kept = []
        return [not word for word in self.status.tolist()]


def run_batch(device: Device, plan: Plan, staging: HostMemory, copying: Device | None = None) -> Running:
    """Starts a batch.

    Args:
        device: the queue that decodes.
        plan: its ``jobs`` are updated with the device addresses.
        staging: pinned memory of at least ``plan.size`` bytes, with the chunks in place; must not be modified
            before the batch ends.
        copying: a separate queue for copies to the device, so that they overlap with earlier decoding.
    """
    source = copying or device
    own = source.allocate(plan.size)
    plan.jobs["data"] += np.uint64(own.address)
    at, starts = plan.jobs_at, {}
    at = _put(staging, at, plan.jobs)
    for kernel, parts in plan.parts.items():
        starts[kernel], at = own.address + at, _put(staging, at, parts)
    status = staging.bytes[plan.status_at : plan.size].view(np.uint32)
    status[:] = 0
    source.copy(own.address, staging.address, plan.size)
    if copying is not None:
        device.wait_for(copying.mark())
    index, errors = device.allocate(4 * plan.index_words), device.allocate(4 * plan.error_words)
    places = Places(own.address + plan.jobs_at, index.address, own.address + plan.status_at, errors.address)
    launch(device, places, len(plan.jobs), {k: (starts[k], len(p)) for k, p in plan.parts.items()})
    device.copy(staging.address + plan.status_at, own.address + plan.status_at, status.nbytes)
    return Running(device.mark(), status, errors, [own, index])


@dataclass(frozen=True)
class Places:
    """Device addresses of the jobs, the index, the status words (initially zero), and the error words."""

    jobs: int
    index: int
    status: int
    errors: int


def launch(
    device: Device, places: Places, jobs: int, parts: Mapping[str, tuple[int, int]], out: int = 0
) -> None:
    """Launches all kernels that the jobs need.

    Args:
        places: the addresses of the batch.
        jobs: the number of jobs.
        parts: kernel -> address and number of its warps.
        out: base that is added to the output addresses of the jobs.
    """
    device.launch("index_chunks", jobs, [places.jobs, places.index, places.status])
    for kernel, (at, count) in parts.items():
        arguments = [places.jobs, at, places.index, places.status, places.errors, out]
        device.launch(kernel, count // layout.WARPS, arguments)


def fill_chunks(plan: Plan, staging: HostMemory) -> None:
    """Copies the chunks that are in memory to their places."""
    for at, data in plan.chunks:
        staging.bytes[at : at + len(data)] = data


def _put(staging: HostMemory, at: int, values: NDArray[np.void]) -> int:
    """Writes records at an offset. Returns the offset of their end."""
    staging.bytes[at : at + values.nbytes] = values.view(np.uint8).reshape(-1)
    return at + values.nbytes
