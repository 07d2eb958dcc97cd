"""Connects `DeltaSender` to TRL's `AsyncGRPOTrainer`, whose interface for this is `WeightTransferProtocol`.

Written for TRL 1.16. Does not import TRL: the interface is structural.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from ...errors import MismatchError
from ...names import listed
from ..delta_models import Source
from .sender import DeltaSender
from .versions import version_of

_CONTROL_TIMEOUT = 300  # seconds, for requests that take no longer for larger models
_TRL = "trl.experimental.async_grpo.async_grpo_trainer"


class ServerClient(Protocol):
    """The methods of TRL's `VLLMClient` that are used. The server needs the engine ``sfp_delta``."""

    def wait_for_server_ready(self) -> None:
        """Waits until the server answers."""

    def pause(self, timeout: int = ...) -> None:
        """Pauses generation."""

    def resume(self, timeout: int = ...) -> None:
        """Resumes generation."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any], timeout: int = ...) -> None:
        """Initialises the engine of the workers."""

    def start_weight_update(self, timeout: int = ...) -> None:
        """Starts an update."""

    def update_weights(self, update_info: dict[str, Any], timeout: int = ...) -> None:
        """Makes the workers read the weights."""

    def finish_weight_update(self, timeout: int = ...) -> None:
        """Ends an update."""


class DeltaWeightTransfer:
    """Sends the weights of TRL's `AsyncGRPOTrainer` as deltas.

    ``AsyncGRPOTrainer(..., weight_transfer=DeltaWeightTransfer("sync", base="model/", client=client))``

    Writes a file per synchronisation into a folder that trainer and workers share. With ``client``, makes a
    vLLM server read each file. Without, a worker polls the folder with `DeltaReceiver.catch_up`.

    Attributes:
        sender: writes the files.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        base: Source | None = None,
        client: ServerClient | None = None,
        timeout: int = 1800,
        engine: str | None = None,
        threads: int | None = None,
    ) -> None:
        """Args:
        folder: the folder for the files.
        base: the weights that the workers start with, as for `DeltaSender`; a path, if there is a client.
            None: the first file has all weights.
        client: TRL's `VLLMClient` of `experimental.async_grpo.vllm_client`, or None.
        timeout: seconds for requests of the client that take longer for larger models.
        engine, threads: same as for `sfpformat.DeltaWriter`.

        Raises:
            OptionError, InvalidFileError, SafetensorsError, OSError: the base cannot be read.
            MismatchError: the client lacks a method, or ``base`` is not a path that the server can read.
        """
        if client is not None:
            missing = [name for name in _methods(ServerClient) if not callable(getattr(client, name, None))]
            if missing:
                raise MismatchError(
                    f"client: a {type(client).__name__} has no method {listed(missing)}; "
                    f"sfpformat was written for VLLMClient of TRL 1.16, installed is {version_of('trl')}"
                )
            if base is not None and not isinstance(base, (str, os.PathLike)):
                raise MismatchError(
                    "base: with a client, give the path of the weights that the server loaded"
                )
        self.sender = DeltaSender(folder, base=base, engine=engine, threads=threads)
        self._base, self._client, self._timeout = base, client, timeout

    def init_weight_transfer(self) -> None:
        """Initialises the server. TRL calls it before the first synchronisation.

        Raises:
            MismatchError: TRL has another interface.
        """
        require_interface()
        if self._client is not None:
            self._client.wait_for_server_ready()
            path = os.path.abspath(self._base) if isinstance(self._base, (str, os.PathLike)) else None
            self._client.init_weight_transfer_engine({"base": path}, timeout=self._timeout)

    def pause(self) -> None:
        """Pauses the server."""
        if self._client is not None:
            self._client.pause(timeout=_CONTROL_TIMEOUT)

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Writes what changed since the last call, and makes the server read it.

        If the server fails, the next file has all weights, because the server may have lost its own.

        Raises:
            OptionError, OSError: the file cannot be written.
        """
        sent = self.sender.send(iterator, add=True)
        if self._client is None:
            return
        try:
            self._client.start_weight_update(timeout=_CONTROL_TIMEOUT)
            self._client.update_weights({"path": str(sent.path.resolve())}, timeout=self._timeout)
            self._client.finish_weight_update(timeout=self._timeout)
        except BaseException:
            self.sender.reset()
            raise

    def resume(self) -> None:
        """Resumes the server."""
        if self._client is not None:
            self._client.resume(timeout=_CONTROL_TIMEOUT)

    def destroy(self) -> None:
        """Releases nothing: the files remain, for workers that are behind."""


def require_interface() -> None:
    """Checks the interface of TRL, if it is imported.

    Raises:
        MismatchError: `WeightTransferProtocol` does not exist, or has methods that are missing here.
    """
    if "trl" not in sys.modules or _TRL not in sys.modules:
        return
    protocol = getattr(sys.modules[_TRL], "WeightTransferProtocol", None)
    other = [] if protocol is None else sorted(set(_methods(protocol)) - set(_methods(DeltaWeightTransfer)))
    if protocol is None or other:
        words = "has no WeightTransferProtocol" if protocol is None else f"also calls {listed(other)}"
        raise MismatchError(
            f"TRL {version_of('trl')} {words}; sfpformat was written for TRL 1.16: use another version of one"
        )


def _methods(kind: type) -> list[str]:
    return [name for name, value in vars(kind).items() if callable(value) and not name.startswith("_")]
