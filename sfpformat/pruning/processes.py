"""The processes of one run under ``torch.distributed``, and exact exchanges between them.

Rules: sums are made in the order of the processes, so that all processes get the same bits, and the same bits
as one process that adds the same parts one after the other. A failure of one process is an error on all:
at the next exchange if the process can still report it, at once if its connection breaks, and otherwise
after the time limit of the group (``timeout`` of ``init_process_group``).

With one process no function needs ``torch.distributed``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError, ProcessError

T = TypeVar("T")

# Elements. The shares of a tensor begin at multiples of this, so that vector instructions process the same
# blocks of elements for every number of processes.
_ALIGNED = 64


class Processes:
    """The processes of a run.

    Attributes:
        world: the number of processes.
        rank: the number of this process, from 0.
    """

    def __init__(self, group: Any = None, device: torch.device | str = "cpu") -> None:
        """Args:
        group: a process group of ``torch.distributed``; None means this process alone.
        device: the device of gathered tensors during an exchange; the group must support it.

        Raises:
            OptionError: there are no process groups, or this process is not in the group.
        """
        self._group, self._device = group, torch.device(device)
        self.world, self.rank = 1, 0
        if group is None:
            return
        distributed = _distributed()
        if not distributed.is_available() or not distributed.is_initialized():
            raise OptionError("group: call torch.distributed.init_process_group first")
        self.world, self.rank = distributed.get_world_size(group), distributed.get_rank(group)
        if self.rank < 0:
            raise OptionError("this process is not a member of group")

    def exchanged(self, numbers: Callable[[], Sequence[float]], count: int) -> list[list[float]]:
        """Calls a function on each process, and returns the results of all, in the order of the processes.

        Args:
            numbers: returns numbers. Its exceptions are raised here, after the other processes got notice.
            count: how many numbers it returns, the same on all processes.

        Raises:
            ProcessError: the function failed on another process, or that process is gone.
        """
        if self.world == 1:
            return [list(numbers())]
        sent = torch.zeros(1 + count, dtype=torch.float64)
        try:
            found = list(numbers())
        except BaseException:
            with suppress(ProcessError):
                self._gathered(sent)
            raise
        sent[0] = 1
        sent[1:] = torch.tensor(found, dtype=torch.float64)
        received = self._gathered(sent).tolist()
        failed = [rank for rank, row in enumerate(received) if not row[0]]
        if failed:
            raise ProcessError(f"process {failed[0]} of {self.world} failed; see the error on that process")
        return [row[1:] for row in received]

    def agreed(self, work: Callable[[], T]) -> T:
        """Calls a function on each process, and returns its result on this one.

        Raises:
            ProcessError: the function failed on another process, or that process is gone.
        """
        found: list[T] = []

        def run() -> list[float]:
            found.append(work())
            return []

        self.exchanged(run, 0)
        return found[0]

    def led(self, parts: Callable[[], Iterator[object]]) -> None:
        """Runs an iterator to its end on the first process, while the others wait for each of its items.

        The others wait at most the time limit of the group for one item, not for all.

        Args:
            parts: returns the iterator; only the first process calls it.

        Raises:
            ProcessError: the iterator failed, or the first process is gone.
        """
        iterator = parts() if self.rank == 0 else iter(())
        end = object()
        while self.exchanged(lambda: [next(iterator, end) is not end], 1)[0][0]:
            pass

    def require_same(self, value: Any, message: str) -> None:
        """Checks that a value of tensors, numbers, text and containers is the same on all processes.

        Raises:
            OptionError: the values differ; the error's text is ``message``.
        """
        if self.world == 1:
            return
        # 48 bits, which a float64 represents exactly.
        found = self.exchanged(lambda: [float(int(digest(value)[:12], 16))], 1)
        if any(row != found[0] for row in found):
            raise OptionError(message)

    def spread(self, part: Tensor, share: int | None = None) -> Tensor:
        """Gives each process its share of the elements of a tensor, from all processes.

        Args:
            part: this process's tensor, of the same shape and dtype on all processes.
            share: the number of elements of each share; None takes `share_of`.

        Returns:
            [world, elements of the share]: row k is from process k. The last shares are padded with zeros.
        """
        flat = part.reshape(-1)
        if self.world == 1:
            return flat[None]
        share = self.share_of(flat.numel()) if share is None else share
        sent = flat.new_zeros(self.world * share)
        sent[: flat.numel()] = flat
        received = torch.empty_like(sent)
        self._run(lambda: _distributed().all_to_all_single(received, sent, group=self._group))
        return received.view(self.world, share)

    def joined(self, share: Tensor, count: int) -> Tensor:
        """Joins the shares of all processes to one tensor.

        Args:
            share: this process's share of the elements, as `spread` divides them.
            count: the number of elements of the whole.
        """
        return share if self.world == 1 else self._gathered(share).view(-1)[:count]

    def summed(self, part: Tensor) -> Tensor:
        """Returns the sum of the tensors of all processes, which have one shape and few elements."""
        return part if self.world == 1 else self._gathered(part).sum(0)

    def of_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Returns each tensor with those of the other processes behind it, in the order of the processes.

        Args:
            parts: vectors of one dtype, on all processes as many; their sizes may differ.
        """
        if self.world == 1:
            return list(parts)
        counts = self.exchanged(lambda: [part.numel() for part in parts], len(parts))
        sizes = [[int(size) for size in row] for row in counts]
        sent = torch.cat([*parts])
        padded = sent.new_zeros(max(sum(row) for row in sizes))
        padded[: len(sent)] = sent
        pieces = [
            torch.split(row[: sum(own)], own) for row, own in zip(self._gathered(padded), sizes, strict=True)
        ]
        return [torch.cat(found) for found in zip(*pieces, strict=True)]

    def share_of(self, count: int) -> int:
        """Returns the number of elements of a process's share of a tensor with ``count`` elements."""
        if self.world == 1:
            return count
        return -(-count // (self.world * _ALIGNED)) * _ALIGNED

    def mine(self, whole: Tensor, share: int | None = None) -> Tensor:
        """Returns this process's share of a tensor that all processes have, flat and padded with zeros.

        Args:
            whole: the tensor.
            share: as in `spread`.
        """
        flat = whole.reshape(-1)
        if self.world == 1:
            return flat
        share = self.share_of(flat.numel()) if share is None else share
        own = flat[self.rank * share : (self.rank + 1) * share]
        return torch.cat([own, own.new_zeros(share - len(own))])

    def added(self, total: Tensor | None, part: Tensor) -> Tensor:
        """Adds the parts of all processes to a total, in the order of the processes.

        Each process sends and receives twice the size of the tensor, less its own shares.

        Args:
            total: the same on all processes; None is zero. It may be changed.
            part: this process's part, of the shape of the total.

        Returns:
            The new total, the same bits on all processes.
        """
        if self.world == 1:
            return part if total is None else total.add_(part)
        rows = self.spread(part)
        share = rows[0] if total is None else self.mine(total).add_(rows[0])
        for row in rows[1:]:
            share += row
        return self.joined(share, part.numel()).view(part.shape)

    def _gathered(self, sent: Tensor) -> Tensor:
        """Returns the tensors of all processes, [world, …]."""
        device = sent.device
        out = sent.new_empty((self.world, *sent.shape), device=self._device)
        moved = sent.to(self._device).contiguous()
        self._run(lambda: _distributed().all_gather(list(out), moved, group=self._group))
        return out.to(device)

    def _run(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise ProcessError(
                f"process {self.rank} of {self.world} received nothing from another process, which ended or "
                f"exceeded the group's time limit ({str(error).splitlines()[0][:200]})"
            ) from error


ALONE = Processes()


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed


def digest(value: Any) -> str:
    """Returns the SHA-256 hash of the contents of a value, in hexadecimal digits.

    Args:
        value: tensors, arrays, numbers and text, and mappings, tuples and lists of them. Of other objects
            only the type counts.
    """
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            plain = part.detach().cpu()
            plain = (plain if plain.layout is torch.strided else plain.to_dense()).contiguous()
            found.update(f"{plain.dtype}{list(plain.shape)}".encode())
            found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(part, np.ndarray) and part.dtype != object:
            found.update(f"{part.dtype}{list(part.shape)}".encode())
            found.update(part.tobytes())
        elif isinstance(part, Mapping):
            for name, item in part.items():
                found.update(repr(name).encode())
                add(item)
        elif isinstance(part, (tuple, list)):
            found.update(f"{len(part)}".encode())
            for item in part:
                add(item)
        elif part is None or isinstance(part, (str, bytes, bool, int, float)):
            found.update(repr(part).encode())
        else:
            found.update(type(part).__qualname__.encode())

    add(value)
    return found.hexdigest()
