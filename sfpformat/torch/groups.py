"""Groups of processes of ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from ..coding.bits import Bytes
from ..deltas.agreement import agreed
from ..errors import OptionError

T = TypeVar("T")


class Group:
    """The processes that work on a model together. One process if ``torch.distributed`` is not initialised.

    Attributes:
        rank: number of this process, from 0.
        count: number of the processes.
    """

    def __init__(self, group: Any = None, *, alone: bool = False) -> None:
        """Takes a process group.

        Args:
            group: a group of ``torch.distributed``. None stands for all processes.
            alone: whether this process works alone, whatever the group.

        Raises:
            OptionError: this process is not a member of the group.
        """
        self._group = group
        started = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._alone = alone or not started
        self.rank = 0 if self._alone else torch.distributed.get_rank(group)
        self.count = 1 if self._alone else torch.distributed.get_world_size(group)
        if self.rank < 0:
            raise OptionError("this process is not a member of group")

    def exchange(self, payload: object) -> list[Any]:
        """Sends an object to all processes. Returns those of all processes, in their order."""
        if self._alone:
            return [payload]
        received: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(received, payload, group=self._group)
        return received

    @classmethod
    def of_plans(cls, group: Any, count: int) -> Group:
        """Returns the group of ``count`` processes that ``torch.distributed.checkpoint`` has planned for.

        Raises:
            OptionError: the group has another number of processes.
        """
        found = cls(group, alone=count == 1)
        if found.count != count:
            raise OptionError(
                f"the checkpoint has {count} processes, but process_group has {found.count}; pass the same "
                "process_group to SfpStorageReader or SfpStorageWriter as to torch.distributed.checkpoint"
            )
        return found

    def swap(self, sends: Mapping[int, Bytes], sizes: Mapping[int, int]) -> dict[int, Bytes]:
        """Sends bytes to other processes, and receives theirs.

        Args:
            sends: process -> bytes for it, uint8 [n].
            sizes: process -> how many bytes it sends to this one.

        Returns:
            Process -> bytes from it, uint8 [n].
        """
        if not sends and not sizes:
            return {}
        # The first device that the group supports: for "cpu:gloo,cuda:nccl" the CPU.
        device = torch.distributed.get_backend_config(self._group).partition(":")[0]
        received = {peer: torch.empty(size, dtype=torch.uint8, device=device) for peer, size in sizes.items()}
        operations = [
            torch.distributed.P2POp(operation, tensor, self._global(peer), self._group)
            for operation, tensors in (
                (
                    torch.distributed.isend,
                    {to: torch.from_numpy(data).to(device) for to, data in sends.items()},
                ),
                (torch.distributed.irecv, received),
            )
            for peer, tensor in sorted(tensors.items())
        ]
        for pending in torch.distributed.batch_isend_irecv(operations):
            pending.wait()
        return {peer: tensor.cpu().numpy() for peer, tensor in received.items()}

    def _global(self, peer: int) -> int:
        """Returns the number of a process of the group among all processes."""
        return peer if self._group is None else torch.distributed.get_global_rank(self._group, peer)

    def agreed(self, work: Callable[[], T], outcome: str) -> list[T]:
        """Calls a function in each process; see `deltas.agreement.agreed`."""
        return agreed(self.exchange, work, outcome)


def is_distributed(tensor: object) -> bool:
    """Returns whether a tensor is a DTensor, of which this process holds a part."""
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, "full_tensor")
