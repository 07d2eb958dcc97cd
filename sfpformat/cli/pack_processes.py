"""Packs the shards of a checkpoint in several processes of this machine: ``sfp pack --jobs N``."""

from __future__ import annotations

import signal
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from ..io.threads import default_threads
from .console import Progress, progress
from .errors import CommandError
from .pack_files import Job, NegativeZeros
from .pack_shards import finish_shards, pack_one

_Packed = tuple[int, dict[str, NegativeZeros]]


def pack_in_processes(job: Job, stem: Path, jobs: int, shown: Progress) -> int:
    """Writes the shards of a checkpoint, several at a time, the largest first, and then the index.

    The bytes are those of `pack_shards.pack_shards`. The processes share the cores: each uses a part of them.

    Args:
        job: the job.
        stem: the common path of the shards, without the number.
        jobs: the greatest number of processes.
        shown: advances by the bytes of each shard that is finished.

    Returns:
        The number of tensors that earlier runs had written.

    Raises:
        CommandError, OptionError, OSError: a shard could not be written, or a process was killed. Finished
            shards are kept: the same command resumes.
    """
    files = list(job.model.files)
    sizes = [sum(job.model.specs[name].nbytes for name in job.model.names_in(file)) for file in files]
    jobs = min(jobs, len(files))
    own = replace(job, threads=max(default_threads() // jobs, 1), zeros={})
    order = sorted(range(len(files)), key=lambda i: -sizes[i])
    resumed = 0
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_begin) as pool:
        futures: dict[Future[_Packed], int] = {pool.submit(_pack, own, stem, i + 1): i for i in order}
        try:
            for future in as_completed(futures):
                tensors, zeros = future.result()
                resumed += tensors
                job.zeros.update(zeros)
                shown.advance(sizes[futures[future]])
        except BrokenProcessPool as error:
            raise CommandError(
                f"{stem.name}: a process was killed, perhaps because memory ran out; finished shards are "
                "kept: run the same command to resume"
            ) from error
        finally:
            for future in futures:
                future.cancel()
    if not finish_shards(job, stem):
        raise CommandError(f"{stem.name}: another process packs the same model; wait, and look at its result")
    return resumed


def _begin() -> None:
    """Leaves Ctrl-C to the parent, which waits for the shards that are being written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _pack(job: Job, stem: Path, number: int) -> _Packed:
    with progress(0, "", show=False) as silent:
        resumed = pack_one(job, stem, number, silent)
    return resumed, job.zeros
