"""vLLM's engines for weight transfer by deltas: one in each worker, one in the trainer. Imports vLLM.

A worker keeps the checkpoint in CPU memory, because the order of the changes in a delta depends on it. vLLM's
own loader maps the changed elements to the parts of parameters that the worker holds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)

from ...errors import OptionError
from ...names import listed
from .receiver import DeltaReceiver, Patch, is_delta
from .sender import DeltaSender, Sent
from .vllm_plugin import BACKEND


@dataclass
class DeltaWeightTransferInitInfo(WeightTransferInitInfo):
    """What a worker needs before the first update.

    Attributes:
        base: path of the checkpoint that the worker serves: a file, an index or a folder. None: the first
            update has all weights.
    """

    base: str | None = None


@dataclass
class DeltaWeightTransferUpdateInfo(WeightTransferUpdateInfo):
    """An update.

    Attributes:
        path: the file, which a `DeltaSender` wrote.
    """

    path: str


class DeltaWeightTransferEngine(
    WeightTransferEngine[DeltaWeightTransferInitInfo, DeltaWeightTransferUpdateInfo]
):
    """The engine of a worker. Reads each file itself, and checks all of it before it changes the model."""

    init_info_cls = DeltaWeightTransferInitInfo
    update_info_cls = DeltaWeightTransferUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._receiver = DeltaReceiver()

    def init_transfer_engine(self, init_info: DeltaWeightTransferInitInfo) -> None:
        """Reads the checkpoint into CPU memory.

        Raises:
            OptionError, InvalidFileError, SafetensorsError, OSError: it cannot be read.
        """
        self._receiver = DeltaReceiver(init_info.base)

    def start_weight_update(self) -> None:
        """Does nothing: `receive_weights` makes the whole update."""

    def finish_weight_update(self) -> None:
        """Does nothing: `receive_weights` makes the whole update."""

    def receive_weights(self, update_info: DeltaWeightTransferUpdateInfo) -> None:
        """Reads a file, and loads what changed into the model.

        Raises:
            BaseMismatchError: the file is a delta of other weights. The model is unchanged.
            OptionError: the delta changes what vLLM's loader cannot. The model is unchanged.
            InvalidFileError, OSError: the file cannot be read. The model is unchanged.
        """
        patches = self._receiver.read(update_info.path)
        if is_delta(update_info.path):
            self._load_changes(patches)
        else:
            self._load_whole(patches)
        self._receiver.apply(update_info.path)

    def _load_whole(self, patches: dict[str, Patch]) -> None:
        from vllm.model_executor.model_loader.reload import (  # lazy, as in vLLM's own engines
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        initialize_layerwise_reload(self.model)
        self.model.load_weights(
            (name, patch.values.reshape(patch.shape).to(self.device)) for name, patch in patches.items()
        )
        finalize_layerwise_reload(self.model, self.model_config)

    def _load_changes(self, patches: dict[str, Patch]) -> None:
        whole = [name for name, patch in patches.items() if patch.positions is None]
        if whole:
            raise OptionError(f"the delta replaces or adds {listed(whole)}, which vLLM cannot in an update")
        # vLLM's loader marks unchanged elements by NaN.
        wrong = [
            name
            for name, patch in patches.items()
            if not patch.values.is_floating_point() or bool(patch.values.isnan().any())
        ]
        if wrong:
            raise OptionError(
                f"the delta changes integers in, or writes NaN into {listed(wrong)}, which vLLM's updates of "
                "elements cannot"
            )
        some = [
            CheckpointWeightPatch(
                name=name,
                shape=patch.shape,
                dtype=patch.values.dtype,
                values=patch.values.to(self.device),
                indices=patch.positions.to(self.device),
            )
            for name, patch in patches.items()
            if patch.positions is not None and len(patch.values)
        ]
        if some:
            load_checkpoint_weight_patches(self.model, some)

    def shutdown(self) -> None:
        """Releases the copy of the checkpoint."""
        self._receiver = DeltaReceiver()


@dataclass
class DeltaTrainerInitInfo(TrainerInitInfo):
    """What a trainer needs. ``rank`` is the number of the trainer's process; process 0 sends.

    Attributes:
        folder: the folder for the files, which trainer and workers share.
        base: path of the checkpoint that the workers serve. None: the first update has all weights.
    """

    backend: ClassVar[str] = BACKEND
    folder: str
    base: str | None = None


class DeltaTrainerWeightTransferEngine(TrainerWeightTransferEngine[DeltaTrainerInitInfo]):
    """The engine of a trainer. Writes what changed, and makes the workers read it.

    Attributes:
        sent: the file of the last update; None before the first, and on processes that do not send.
    """

    init_info_cls = DeltaTrainerInitInfo

    def __init__(
        self, *, client: Any, source: Any, is_sender: bool = True, rank: int = 0, sender: DeltaSender | None
    ) -> None:
        super().__init__(client=client, source=source, is_sender=is_sender, rank=rank)
        self._sender = sender
        self.sent: Sent | None = None

    @classmethod
    def trainer_init(
        cls, init_info: DeltaTrainerInitInfo, *, client: Any, source: Any = None
    ) -> DeltaTrainerWeightTransferEngine:
        """Initialises the workers. Called on every process of the trainer.

        Raises:
            OptionError: there is no source, it does not give whole tensors, or this process sends but does
                not own all of them; or the base cannot be read.
            InvalidFileError, SafetensorsError, OSError: the base cannot be read.
        """
        if source is None or not source.implements_iter_full():
            raise OptionError("source: give a WeightSource that implements iter_full()")
        if init_info.is_sender and len(source.owned_names(init_info.rank)) != len(source.metadata):
            raise OptionError("source: the process that sends must own every parameter")
        sender = DeltaSender(init_info.folder, base=init_info.base) if init_info.is_sender else None
        engine = cls(
            client=client, source=source, is_sender=init_info.is_sender, rank=init_info.rank, sender=sender
        )
        if sender is not None:
            base = None if init_info.base is None else os.path.abspath(init_info.base)
            client.init_weight_transfer_engine({"base": base})
        return engine

    def send_weights(self) -> None:
        """Sends what changed since the last update. Called on every process of the trainer.

        If the workers fail, the next update has all weights.

        Raises:
            OptionError, OSError: the file cannot be written.
        """
        weights = self.source.iter_full()
        if self._sender is None:
            for _ in weights:  # takes part in the collective operations
                pass
            return
        sent = self._sender.send(weights, add=True)
        try:
            self.client.start_weight_update()
            self.client.update_weights({"path": str(sent.path.resolve())})
            self.client.finish_weight_update()
        except BaseException:
            self._sender.reset()
            raise
        self.sent = sent
