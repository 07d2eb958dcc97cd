"""Decodes whole tensors, masks and importances into the memory of a device.

Theory of operation: chunks are read in batches, each straight into the memory from which the device copies
it, and their checksums are compared there. The engine copies a batch to the device and decodes it while the
next batches are read. `decode` returns only after every segment is verified. If the engine refuses a tensor,
the CPU decodes it, which gives the tensor or raises the error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from ..coding.bits import Bytes
from ..container.entry import TensorEntry
from ..engines import DeviceEngine, DeviceQueue
from ..engines.device_interface import Content, DeviceRun, Pending
from ..errors import FileFault
from .reader import SfpFile, require_within_limits

# Bytes of chunks in one batch: large enough that launches and waits take a small part of the time.
BATCH_BYTES = 32 << 20


class Target(NamedTuple):
    """A tensor, and device memory for its weights, mask or importance.

    Attributes:
        file: the file that has the tensor.
        entry: its directory entry.
        recipe: the result of `recipe_of`.
        out: address of the memory, a multiple of 16.
        content: what is decoded; that of the recipe.
    """

    file: SfpFile
    entry: TensorEntry
    recipe: Any
    out: int
    content: Content = Content.WEIGHTS


# A batch: targets, and the numbers of chunks to decode into them.
_Batch = list[tuple[Target, int]]


def recipe_of(
    file: SfpFile, entry: TensorEntry, engine: DeviceEngine, content: Content = Content.WEIGHTS
) -> Any:
    """Reads and checks a tensor's vectors. Returns its recipe; None if the CPU has to decode it.

    Raises:
        LimitError: the tensor exceeds a limit.
        InvalidFileError: the vector chunk is damaged.
    """
    require_within_limits(file, entry)
    if entry.fingerprints is None or not entry.positions:
        return None
    return engine.make_recipe(entry, file.decoder(entry).vectors, content)


def decode(targets: Sequence[Target], queue: DeviceQueue, refused: Callable[[Target], None]) -> None:
    """Decodes tensors into their memory; returns when all are complete.

    If it raises an exception, no copy and no kernel is still running.

    Args:
        targets: at least one.
        queue: a queue of the device.
        refused: called for each tensor that the engine refuses; must decode the tensor on the CPU.

    Raises:
        InvalidFileError: the first error in the order of the tensors.
    """
    try:
        queue.prepare([target.recipe for target in targets])
        pending: deque[tuple[_Batch, Pending]] = deque()
        for batch in _batches(targets):
            if len(pending) == queue.depth:
                _settle(*pending.popleft(), refused)
            planned = queue.plan_runs(_runs(batch))
            try:
                _read(batch, planned.places)
            except FileFault:
                _settle_all(pending, refused)  # an error in an earlier batch is raised first
                raise
            pending.append((batch, planned.start()))
        _settle_all(pending, refused)
    except BaseException:
        queue.abandon()
        raise


def _settle_all(pending: deque[tuple[_Batch, Pending]], refused: Callable[[Target], None]) -> None:
    """Settles all batches, oldest first."""
    while pending:
        _settle(*pending.popleft(), refused)


def _settle(batch: _Batch, pending: Pending, refused: Callable[[Target], None]) -> None:
    """Waits for a batch; calls ``refused`` once for each tensor that has a refused chunk."""
    good = zip(batch, pending.good(), strict=True)
    for target in {id(target): target for (target, _), is_good in good if not is_good}.values():
        refused(target)


def _runs(batch: _Batch) -> list[DeviceRun]:
    """Returns the run of every chunk of a batch."""
    runs = []
    for target, k in batch:
        entry = target.entry
        length = int(entry.chunks["length"][k])
        first, stop = entry.segments_of_chunk(k)
        start, total = entry.positions_of_chunk(k)
        out = target.out + start * (target.content.value or entry.dtype.itemsize)
        runs.append(DeviceRun(target.recipe, length, total, start, 0, stop - first, out))
    return runs


def _batches(targets: Sequence[Target]) -> Iterator[_Batch]:
    """Yields the chunks of all tensors in order, in batches of at most `BATCH_BYTES` or one chunk."""
    batch: _Batch = []
    left = BATCH_BYTES
    for target in targets:
        for k, length in enumerate(target.entry.chunks["length"].tolist()):
            if batch and length > left:
                yield batch
                batch, left = [], BATCH_BYTES
            batch.append((target, k))
            left -= length
    if batch:
        yield batch


def _read(batch: _Batch, places: Sequence[Bytes]) -> None:
    """Reads the chunks of a batch and compares their checksums; chunks of one file are read in parallel."""
    at = 0
    for _, some in groupby(batch, lambda item: id(item[0].file)):
        own = list(some)
        wanted = [(target.entry, k) for target, k in own]
        own[0][0].file.read_chunks_into(wanted, places[at : at + len(own)])
        at += len(own)
