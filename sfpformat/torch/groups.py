"""Groups of processes of ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..deltas.agreement import agreed
from ..errors import OptionError

T = TypeVar("T")


class Group:
    """The processes that work on a model together. One process if ``torch.distributed`` is not initialised.

    Attributes:
        rank: number of this process, from 0.
        count: number of the processes.
    """

    def __init__(self, group: Any = None) -> None:
        """Takes a process group of ``torch.distributed``; None stands for all processes.

        Raises:
            OptionError: this process is not a member of the group.
        """
        self._group = group
        self._alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
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

    def agreed(self, work: Callable[[], T], outcome: str) -> list[T]:
        """Calls a function in each process; see `deltas.agreement.agreed`."""
        return agreed(self.exchange, work, outcome)


def is_distributed(tensor: object) -> bool:
    """Returns whether a tensor is a DTensor, of which this process holds a part."""
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, "full_tensor")
