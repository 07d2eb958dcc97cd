"""Connects `DeltaSender` to the trainers of transformers, which TRL's trainers are."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ...errors import OptionError
from .sender import DeltaSender, Sent


class WeightSyncCallback(TrainerCallback):
    """Sends the weights after steps of a trainer of transformers or TRL.

    ``SFTTrainer(model, ..., callbacks=[WeightSyncCallback(DeltaSender("sync", base=model))])``

    Sends on the main process only, so all of its parameters must be whole tensors.

    Attributes:
        sent: the files that were sent.
    """

    def __init__(self, sender: DeltaSender, *, every: int = 1) -> None:
        """Args:
        sender: writes the files.
        every: number of optimiser steps from one file to the next.

        Raises:
            OptionError: ``every`` is not a positive number.
        """
        if not isinstance(every, int) or every < 1:
            raise OptionError(f"every is {every!r}, must be a number of steps from 1")
        self.sent: list[Sent] = []
        self._sender, self._every = sender, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sends the weights if the step is one of ``every``."""
        if state.is_world_process_zero and state.global_step % self._every == 0:
            model = kwargs["model"]
            names = ((name.removeprefix("module."), weight) for name, weight in model.named_parameters())
            self.sent.append(self._sender.send(names))
