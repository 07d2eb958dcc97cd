"""Runs a function in the processes of a gloo group: for the commands of `tests.support` that tests start."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist


def run_group(world: int, folder: Path, work: Callable[[int], object]) -> None:
    """Calls a function in forked processes, which have joined a group. Fails if one of them does.

    Args:
        world: number of processes.
        folder: the folder for the file by which they find each other.
        work: the function; its argument is the number of the process.
    """
    children = []
    for rank in range(world):
        process = os.fork()
        if not process:
            code = 1
            try:
                stores: Any = dist  # torch's own types leave the stores out
                store = stores.FileStore(str(folder / f"store-{world}"), world)
                seconds = timedelta(seconds=60)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=seconds)
                work(rank)
                dist.destroy_process_group()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in children]
    assert not any(codes), codes
