"""Joins the processes that ``torchrun`` or another launcher started.

A launcher sets the environment variables ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``, and
``LOCAL_RANK`` for the number of a process on its machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from ..errors import OptionError, ProcessError

TIMEOUT = timedelta(minutes=30)  # without an answer from another process


@contextmanager
def launched(kind: str = "cpu") -> Iterator[tuple[Any, torch.device]]:
    """Context with the process group of the launcher's processes, and this process's device.

    Args:
        kind: ``cpu``, where processes exchange tensors by gloo, or ``cuda``, where they do so by NCCL.

    Yields:
        The group, or None if no launcher started several processes; and the device. With ``cuda`` the device
        is the one with the number of the process on its machine.

    Raises:
        OptionError: a variable is missing or wrong, or there are fewer devices than processes.
        ProcessError: the other processes cannot be reached.
    """
    world, local = _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0)
    if kind == "cuda":
        count = torch.cuda.device_count()
        if local >= count:
            if not count:
                raise OptionError("device cuda: torch finds no CUDA device on this machine; use cpu")
            raise OptionError(
                f"device cuda: process {local} of this machine has no CUDA device of its own, because there "
                f"{'is' if count == 1 else 'are'} {count}; start fewer processes"
            )
        torch.cuda.set_device(local)
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if world < 2:
        yield None, device
        return
    import torch.distributed as dist

    distributed: Any = dist  # some builds of torch have no groups, so its functions are not always there
    if not distributed.is_available():
        raise OptionError("this build of torch has no torch.distributed: start one process alone")
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=TIMEOUT)
    except ValueError as error:  # a variable is missing or wrong
        raise OptionError(f"WORLD_SIZE is {world}, but {error}; start the processes with torchrun") from error
    except RuntimeError as error:
        raise ProcessError(f"the {world} processes did not meet: {str(error).splitlines()[0]}") from error
    try:
        yield distributed.group.WORLD, device
    except BaseException:
        if kind == "cpu":  # closes the connections, so that the other processes stop waiting
            distributed.destroy_process_group()
        raise  # NCCL would wait for the others here; the end of the process closes its connections
    distributed.destroy_process_group()


def _number(name: str, missing: int) -> int:
    words = os.environ.get(name, str(missing))
    if not words.isdecimal():
        raise OptionError(f"the environment variable {name} is {words!r}, must be a whole number")
    return int(words)
